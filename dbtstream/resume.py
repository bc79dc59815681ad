"""What becomes of a run whose worker is gone, decided from its events. Pure.

`recovery` reads the events and closes the lost attempt; here is whether the run then goes on
(`on_lost`), and what dbt's `retry` has to be told so that only nodes without success run again.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from dbtstream.events import AnyEvent, Gap, NodeFinished, RunLeased, RunPlanned, RunPlanPart
from dbtstream.frames import EarlierResult
from dbtstream.messages import OnLost
from dbtstream.statuses import NodeStatus

FIRST, WORKER_LOST, HANDED_OVER = "first", "worker_lost", "handed_over"
"""Causes of a lease, as `run.leased` tells them."""

RETRIED_BY_DBT = frozenset({"build", "run", "test", "seed", "snapshot", "clone", "retry"})
"""Commands that dbt's `retry` can take up (its TASK_DICT, 1.8 to 1.12) and that change something.
What only reads is simply run again."""

DBT_WORD = {
    NodeStatus.SUCCESS: "success",
    NodeStatus.WARN: "warn",
    NodeStatus.NO_OP: "no-op",
    NodeStatus.REUSED: "success",
    NodeStatus.FAIL: "fail",
    NodeStatus.PARTIAL_SUCCESS: "partial success",
    NodeStatus.SKIPPED: "skipped",
    NodeStatus.NEVER_STARTED: "skipped",
}
"""Our status -> that of run_results.json by which `retry` goes. The others are `error`."""


def decide(
    on_lost: OnLost, command: str, events: Sequence[AnyEvent], *, cause: str, max_attempts: int
) -> OnLost:
    """How the run goes on after an attempt without an end of its own.

    A run that was handed over has not failed anybody, and goes on in any case; one whose
    workers have died so often is not given to another. Where dbt cannot take it up again, or
    nothing tells what was to run, it begins anew.
    """
    if cause == WORKER_LOST:
        # This loss is not among the events yet; each earlier one is a lease.
        losses = 1 + sum(isinstance(e, RunLeased) and e.cause == WORKER_LOST for e in events)
        if on_lost is OnLost.FAIL or losses >= max_attempts:
            return OnLost.FAIL
    can_resume = command in RETRIED_BY_DBT and _is_planned(events)
    if on_lost is not OnLost.RESTART and can_resume:
        return OnLost.RESUME
    return OnLost.RESTART


def _is_planned(events: Sequence[AnyEvent]) -> bool:
    """Whether the events tell all that is to be done, in some attempt."""
    parts = Counter(event.attempt for event in events if isinstance(event, RunPlanPart))
    return any(
        event.nodes is not None or (event.parts > 0 and parts[event.attempt] == event.parts)
        for event in events
        if isinstance(event, RunPlanned)
    )


def earlier_results(events: Iterable[AnyEvent]) -> list[EarlierResult]:
    """Each node's last end, in dbt's words. Without hooks, which `retry` runs as ever."""
    last = {
        event.node.unique_id: event
        for event in events
        if isinstance(event, NodeFinished) and event.node.resource_type != "operation"
    }
    return [
        EarlierResult(
            unique_id=unique_id,
            status=DBT_WORD.get(event.status, "error"),
            batch_results=event.batch_results,
        )
        for unique_id, event in last.items()
    ]


def holes(events: Sequence[AnyEvent]) -> list[tuple[int, int]]:
    """[from, to] of numbers that nobody has and no gap explains: the worker dropped what had
    them, and died before it could say so."""
    known = {event.seq for event in events}
    for event in events:
        if isinstance(event, Gap) and event.from_seq is not None and event.to_seq is not None:
            known.update(range(event.from_seq, event.to_seq + 1))
    found: list[tuple[int, int]] = []
    for seq in sorted(set(range(1, max(known, default=0) + 1)) - known):
        if found and found[-1][1] == seq - 1:
            found[-1] = (found[-1][0], seq)
        else:
            found.append((seq, seq))
    return found
