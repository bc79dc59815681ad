"""How an attempt ended, and what that means for the run and for the nodes left open. Pure.

Layer 1. `execution` fills in an `Ending` from what it saw of the child; `normalizer` asks
here for the run's status and `node_events` for the fate of nodes of which dbt told no end.
"""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

import msgspec

from dbtstream.errors import ChildCrashed, ChildError
from dbtstream.event_base import ErrorBlock
from dbtstream.frames import Result
from dbtstream.statuses import NodeStatus, Reason, RunStatus


class Ended(StrEnum):
    """What became of the child."""

    RESULT = "result"  # dbt's invoke returned, and the Result frame says what
    CRASHED = "crashed"  # the frame pipe ended before a Result, or spoke nonsense
    NOT_STARTED = "not_started"  # no child, no hello, or an engine that we refuse
    WORKER_LOST = "worker_lost"  # the worker that ran it is gone; another one writes this


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How the child ended, and why we stopped it if we did.

    Once a Result frame was seen it decides, whatever `how` says: a child that dies while it
    tears down has still done its run.
    """

    how: Ended
    exit_code: int | None = None  # of the process; negative is a signal
    error: ErrorBlock | None = None
    oom: bool = False  # killed, and the kernel says it was for memory
    stderr_tail: str | None = None
    stop: Reason | None = None  # CANCELLED, TIMEOUT or HANDED_OVER, when we stopped it
    pid: int | None = None
    exited_at: datetime | None = None

    @classmethod
    def of_error(
        cls, error: ChildError, *, oom: bool = False, stop: Reason | None = None
    ) -> "Ending":
        """From what `dbt_process` raised."""
        block = ErrorBlock(class_=type(error).__name__, message=str(error))
        if isinstance(error, ChildCrashed):
            return cls(
                how=Ended.CRASHED,
                exit_code=error.exit_code,
                error=block,
                oom=oom,
                stderr_tail=error.stderr_tail or None,
                stop=stop,
            )
        tail = getattr(error, "stderr_tail", None) or None
        return cls(how=Ended.NOT_STARTED, error=block, stderr_tail=tail, stop=stop)


@dataclass(slots=True)
class Stopping:
    """What is known, while dbt runs, of somebody's wish that it should not."""

    stop: Reason | None = None  # CANCELLED, TIMEOUT or HANDED_OVER
    by: str | None = None
    reason: str | None = None
    steps: set[str] = field(default_factory=set)  # rungs that have been told
    connections: list[str] = field(default_factory=list)  # whose queries the adapter cancelled
    _told: int = 0

    @property
    def is_interrupted(self) -> bool:
        """dbt was made to stop, which is more than that somebody asked for it."""
        return bool(self.steps - {"requested"})

    @property
    def untold(self) -> bool:
        return len(self.connections) > self._told

    def asked(self, stop: Reason, by: str | None = None, reason: str | None = None) -> None:
        """The first wish counts: a cancel during a timeout changes nothing."""
        self.stop = self.stop or stop
        self.by = self.by or by
        self.reason = self.reason or reason

    def tell(self) -> list[str]:
        """Connections not named in any event yet."""
        untold, self._told = self.connections[self._told :], len(self.connections)
        return untold


class Leftover(msgspec.Struct, frozen=True, kw_only=True):
    """The fate of nodes of which dbt told no end.

    Those in flight get `in_flight`, those that had not begun are `never_started`; both have
    the reason.
    """

    in_flight: NodeStatus
    reason: Reason | None


_EXIT_STATUS = {0: RunStatus.SUCCESS, 1: RunStatus.FAILURE}
_STOP_STATUS = {
    Reason.CANCELLED: RunStatus.CANCELLED,
    Reason.TIMEOUT: RunStatus.TIMED_OUT,
    Reason.HANDED_OVER: RunStatus.LOST,
}


def run_status(ending: Ending, result: Result | None) -> RunStatus:
    """The run's terminal status.

    A run that was asked to stop but finished by itself first keeps what it earned.
    """
    stopped = _STOP_STATUS.get(ending.stop) if ending.stop else None
    if result is None:
        if stopped is not None:
            return stopped
        return RunStatus.LOST if ending.how is Ended.WORKER_LOST else RunStatus.ERROR
    if result.interrupted:
        return stopped or RunStatus.CANCELLED
    if stopped is not None and result.error is not None:
        return stopped
    return _EXIT_STATUS.get(result.exit_code, RunStatus.ERROR)


def leftover(
    ending: Ending, result: Result | None, *, fail_fast: bool, start_hook_failed: bool
) -> Leftover:
    """What nodes without an end have become; the first cause that applies."""
    if result is None:
        return _leftover_of_dead_child(ending)
    if result.interrupted or (ending.stop is not None and result.error is not None):
        return Leftover(in_flight=NodeStatus.CANCELLED, reason=ending.stop or Reason.CANCELLED)
    if fail_fast:
        return Leftover(in_flight=NodeStatus.CANCELLED, reason=Reason.FAIL_FAST)
    if start_hook_failed:
        return Leftover(in_flight=NodeStatus.LOST, reason=Reason.ON_RUN_START_FAILED)
    if result.error is not None:
        return Leftover(in_flight=NodeStatus.LOST, reason=Reason.RUN_ERROR)
    # dbt says that all is done and never named these: we do not know why.
    return Leftover(in_flight=NodeStatus.LOST, reason=None)


def _leftover_of_dead_child(ending: Ending) -> Leftover:
    if ending.how is Ended.WORKER_LOST:
        return Leftover(in_flight=NodeStatus.LOST, reason=Reason.WORKER_LOST)
    if ending.stop is Reason.CANCELLED:
        # Killed because somebody wanted it to stop: that was the request, not a loss.
        return Leftover(in_flight=NodeStatus.CANCELLED, reason=Reason.CANCELLED)
    if ending.stop is not None:
        return Leftover(in_flight=NodeStatus.LOST, reason=ending.stop)
    if ending.oom:
        return Leftover(in_flight=NodeStatus.LOST, reason=Reason.OOM)
    if ending.how is Ended.NOT_STARTED:
        return Leftover(in_flight=NodeStatus.LOST, reason=Reason.RUN_ERROR)
    return Leftover(in_flight=NodeStatus.LOST, reason=Reason.CHILD_KILLED)
