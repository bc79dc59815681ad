"""A run moves as the table says, and in no other way."""

from datetime import UTC, datetime

import pytest

from dbtstream.errors import IllegalMove
from dbtstream.messages import RunView
from dbtstream.runs import MOVES, advance, exit_code_of
from dbtstream.statuses import TERMINAL_RUN_STATUSES, RunStatus

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def view(status: RunStatus) -> RunView:
    return RunView(run_id="r1", project="shop", target="prod", status=status)


@pytest.mark.parametrize("current", RunStatus)
@pytest.mark.parametrize("wanted", RunStatus)
def test_a_move_is_made_if_the_table_has_it_and_refused_otherwise(
    current: RunStatus, wanted: RunStatus
) -> None:
    run = view(current)
    if wanted in MOVES.get(current, frozenset()):
        assert advance(run, wanted, at=NOW).status is wanted
    else:
        with pytest.raises(IllegalMove, match=f"cannot go from {current} to {wanted}"):
            advance(run, wanted, at=NOW)
    assert run.status is current


def test_nothing_follows_an_end() -> None:
    assert not TERMINAL_RUN_STATUSES & set(MOVES)


def test_every_run_can_end() -> None:
    """From each status on the way there is a path to a terminal one."""
    for status in set(RunStatus) - TERMINAL_RUN_STATUSES:
        assert MOVES[status] & TERMINAL_RUN_STATUSES


def test_a_run_cannot_succeed_without_having_run() -> None:
    assert RunStatus.SUCCESS not in MOVES[RunStatus.QUEUED] | MOVES[RunStatus.STARTING]


def test_the_times_of_a_run_are_set_as_it_moves() -> None:
    run = advance(view(RunStatus.QUEUED), RunStatus.STARTING, at=NOW)
    assert (run.started_at, run.finished_at, run.updated_at) == (None, None, NOW)
    later = NOW.replace(minute=1)
    run = advance(run, RunStatus.RUNNING, at=later)
    assert (run.started_at, run.finished_at) == (later, None)
    end = NOW.replace(minute=2)
    run = advance(run, RunStatus.FAILURE, at=end)
    assert (run.started_at, run.finished_at, run.updated_at) == (later, end, end)


@pytest.mark.parametrize(
    ("status", "dbt_said", "code"),
    [
        (RunStatus.SUCCESS, 0, 0),
        (RunStatus.FAILURE, 1, 1),
        (RunStatus.ERROR, 2, 2),
        (RunStatus.ERROR, None, 2),
        (RunStatus.SUCCESS, None, 0),
        (RunStatus.CANCELLED, 0, 2),
        (RunStatus.TIMED_OUT, 1, 2),
        (RunStatus.LOST, None, 2),
    ],
)
def test_the_exit_code_is_dbts_own_where_dbt_decided(
    status: RunStatus, dbt_said: int | None, code: int
) -> None:
    """A cancelled run is not a success, whatever dbt said while it stopped."""
    assert exit_code_of(status, dbt_said) == code
