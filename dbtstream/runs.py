"""A run and the moves it may make. Pure: time comes in as `at`.

The value stored per run is `messages.RunView`; `store` writes it with compare-and-set, so
two workers cannot both move a run.
"""

from datetime import datetime

import msgspec

from dbtstream.errors import IllegalMove
from dbtstream.messages import RunView
from dbtstream.statuses import TERMINAL_RUN_STATUSES, RunStatus

MOVES: dict[RunStatus, frozenset[RunStatus]] = {
    RunStatus.QUEUED: frozenset(
        {RunStatus.STARTING, RunStatus.CANCELLED, RunStatus.ERROR, RunStatus.LOST}
    ),
    RunStatus.STARTING: frozenset(
        {
            RunStatus.RUNNING,
            RunStatus.ERROR,
            RunStatus.CANCELLED,
            RunStatus.TIMED_OUT,
            RunStatus.LOST,
            RunStatus.QUEUED,
        }
    ),
    # Back to the queue: the worker gives the run to another, or has died.
    RunStatus.RUNNING: TERMINAL_RUN_STATUSES | {RunStatus.QUEUED},
}
"""From a status to those that may follow. What is not a key is an end."""


def advance(run: RunView, wanted: RunStatus, *, at: datetime) -> RunView:
    """The run in its next status. Raises IllegalMove."""
    if wanted not in MOVES.get(run.status, frozenset()):
        raise IllegalMove(run.run_id, run.status, wanted)
    return msgspec.structs.replace(
        run,
        status=wanted,
        updated_at=at,
        started_at=run.started_at or at if wanted is RunStatus.RUNNING else run.started_at,
        finished_at=at if wanted.is_terminal else run.finished_at,
    )


def taken_over(run: RunView, *, worker: str, fence: int, at: datetime) -> RunView:
    """The same attempt of the same run, in the hands of another worker, which will close it."""
    return msgspec.structs.replace(run, worker=worker, fence=fence, updated_at=at)


def next_attempt(run: RunView, *, at: datetime) -> RunView:
    """The run before its next attempt. Raises IllegalMove."""
    if run.status is not RunStatus.QUEUED:
        run = advance(run, RunStatus.QUEUED, at=at)
    return msgspec.structs.replace(run, attempt=run.attempt + 1, updated_at=at)


def given_back(run: RunView, *, at: datetime) -> RunView:
    """The run in the queue again, without a worker. Raises IllegalMove."""
    if run.status is not RunStatus.QUEUED:
        run = advance(run, RunStatus.QUEUED, at=at)
    return msgspec.structs.replace(run, worker=None, updated_at=at)


def exit_code_of(status: RunStatus, dbt_exit_code: int | None) -> int:
    """What `dbtstream run` exits with: dbt's own code where dbt gave one, else dbt's 2."""
    if dbt_exit_code is not None and status in (
        RunStatus.SUCCESS,
        RunStatus.FAILURE,
        RunStatus.ERROR,
    ):
        return dbt_exit_code
    return 0 if status is RunStatus.SUCCESS else 2
