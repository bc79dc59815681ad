"""Figures of what the tests did, told at the end of a test run: README cites them."""

from collections.abc import Callable

import pytest

from tests.faults.form import LONG, SEED

FIGURES = pytest.StashKey[list[str]]()

Figure = Callable[[str], None]


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """`figure("100 kills in 80 runs")`: a line for the end of the test run."""
    lines = request.config.stash.setdefault(FIGURES, [])

    def tell(text: str) -> None:
        lines.append(f"{request.node.name}: {text}")

    return tell


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    lines = config.stash.get(FIGURES, [])
    if not lines:
        return
    terminalreporter.section(f"faults, {'long' if LONG else 'short'} form, seed {SEED}")
    for line in lines:
        terminalreporter.write_line(line)
