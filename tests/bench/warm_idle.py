"""A daemon with three warm projects of 1,000 models that has nothing to do: CPU and memory.

Measured: a daemon with the warmest starts there are, three projects (three copies of one), after
two runs of one model in each, so that what it keeps warm is there. When all is at rest: CPU of the
daemon and all below it over 20 seconds, PSS of the daemon, and PSS of the processes that it forks
runs from, each and in sum. The process that reads SQL is still there, as no idle time of its own
has passed; it counts in the CPU.

PSS counts a page that processes share by shares, so the sum is what they take together, and one of
them alone would take more. Disturbed by: little.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.figures import Figure, Goal
from tests.bench.options import Options, say, scratch
from tests.bench.process_tree import pss_mb, tree_cpu_s
from tests.bench.projects import write_layered_project
from tests.bench.served import serving
from tests.bench.starts import BEST, ONE, fill_database
from tests.bench.ways import Cli, Daemon, Place, config_of, templates_of

ROUNDS = 1
PROJECTS = ("one", "two", "three")
RUNS = 2
IDLE_S = 20
SETTLE_S = 5.0
DAEMON_MB, TEMPLATE_MB = 80, 60


@dataclass
class _Idle:
    percent: float = 0.0
    daemon_mb: float = 0.0
    templates_mb: list[float] = field(default_factory=list)

    @property
    def per_template_mb(self) -> float:
        """What is beyond the daemon's share, of each."""
        beyond = self.daemon_mb + sum(self.templates_mb) - DAEMON_MB
        return beyond / len(self.templates_mb) if self.templates_mb else 0.0


async def measure(options: Options) -> list[Figure]:
    rounds = [await _round(options, number + 1) for number in range(options.rounds)]
    return _figures(rounds)


async def _round(options: Options, number: int) -> _Idle:
    found = _Idle()
    with scratch() as folder:
        projects = {name: folder / name for name in PROJECTS}
        for project in projects.values():
            write_layered_project(project, models=options.size(1000, 60), tests=0)
            fill_database(project)
        config = config_of(projects, folder / "state", BEST)
        await _parse(projects, folder)
        async with serving(config, folder) as served:
            daemon = Daemon(served)
            for name in PROJECTS:
                for _ in range(RUNS):
                    await daemon.ask(ONE, name)
            await daemon.settled()
            await asyncio.sleep(options.size(int(SETTLE_S), 1))
            before_s, began = tree_cpu_s(served.daemon), time.monotonic()
            await asyncio.sleep(options.size(IDLE_S, 2))
            used_s = tree_cpu_s(served.daemon) - before_s
            found.percent = 100 * used_s / (time.monotonic() - began)
            found.daemon_mb = pss_mb(served.daemon)
            found.templates_mb = [pss_mb(process) for process in templates_of(served.daemon)]
    each = ", ".join(f"{mb:.0f}" for mb in found.templates_mb)
    say(f"round {number}: daemon {found.daemon_mb:.0f} MB, templates {each} MB")
    return found


async def _parse(projects: Mapping[str, Path], folder: Path) -> None:
    """Where the daemon will look for the parse: its first runs then need not parse everything."""
    for name, project in projects.items():
        place = Place(project, folder / "state", name=name)
        await Cli(place).parse()


def _figures(rounds: list[_Idle]) -> list[Figure]:
    templates = {len(found.templates_mb) for found in rounds}
    count = " or ".join(map(str, sorted(templates)))
    return [
        Figure(
            name=f"{BEST}: CPU of daemon and {count} templates, idle",
            unit="%",
            values=[found.percent for found in rounds],
            goal=Goal("<", 0.5),
        ),
        Figure(
            name=f"{BEST}: PSS of the daemon",
            unit="MB",
            values=[found.daemon_mb for found in rounds],
            goal=Goal("<", DAEMON_MB, by="max"),
        ),
        Figure(
            name=f"{BEST}: PSS of {count} templates",
            unit="MB",
            values=[sum(found.templates_mb) for found in rounds],
        ),
        Figure(
            name=f"{BEST}: PSS beyond {DAEMON_MB} MB, per template",
            unit="MB",
            values=[found.per_template_mb for found in rounds],
            goal=Goal("<", TEMPLATE_MB, by="max"),
        ),
    ]
