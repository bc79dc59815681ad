"""Whether what is told of a run in several places is the same: differences, found one by one.

Pure: `verify_run` reads the event log, the KV state and run_results.json, and calls these. A
run may have several attempts; a node's verdict is the one of its highest attempt, and what the
guarantees of the contract say of nodes, they say of each attempt.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

import msgspec

from dbtstream.events import (
    AnyEvent,
    Gap,
    NodeFinished,
    NodeStarted,
    RunFinished,
    RunPlanned,
    RunRejected,
    event_type,
)
from dbtstream.ledger import FAILED, agrees
from dbtstream.messages import RunView
from dbtstream.statuses import RunStatus
from dbtstream.store import NodeState

EVENTS, CONTRACT = "the events", "the contract"
RUN_STATE, NODE_STATE = "the run's KV state", "the node's KV state"
RUN_RESULTS = "run_results.json"
NOTHING = "nothing"

_NO_RESULT = frozenset({"ephemeral"})
"""dbt returns no result of such models, and none of hooks before 1.9."""


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Two places say different things of `what` (the run, a node, a seq) in `field`."""

    what: str
    field: str
    left: str
    left_says: str
    right: str
    right_says: str

    def __str__(self) -> str:
        return (
            f"{self.what}: {self.field}: {self.left} say{'s' * (self.left != EVENTS)} "
            f"{self.left_says}, {self.right} says {self.right_says}"
        )


class DbtResult(msgspec.Struct, frozen=True):
    """What of a result in run_results.json is compared."""

    unique_id: str
    status: str
    message: str | None = None


class Metadata(msgspec.Struct, frozen=True):
    invocation_id: str | None = None


class RunResults(msgspec.Struct, frozen=True):
    """dbt's own file of one attempt, as far as it is compared."""

    results: list[DbtResult]
    metadata: Metadata = Metadata()


# -- the event log against the contract ------------------------------------------------------


def check_events(events: Sequence[AnyEvent]) -> Iterator[Difference]:
    """The guarantees, of all events of a run in the order of the stream."""
    yield from _check_envelopes(events)
    yield from _check_sequence(events)
    yield from _check_last(events)
    for attempt, of_attempt in sorted(by_attempt(events).items()):
        yield from _check_ends(attempt, of_attempt)
        yield from _check_order(attempt, of_attempt)
    if events and isinstance(events[-1], RunFinished):
        yield from _check_verdict(events, events[-1])


def by_attempt(events: Iterable[AnyEvent]) -> dict[int, list[AnyEvent]]:
    attempts: dict[int, list[AnyEvent]] = defaultdict(list)
    for event in events:
        attempts[event.attempt].append(event)
    return attempts


def verdicts(events: Iterable[AnyEvent]) -> dict[str, NodeFinished]:
    """Each node's end in the highest attempt that has one."""
    found: dict[str, NodeFinished] = {}
    for event in events:
        if isinstance(event, NodeFinished):
            before = found.get(event.node.unique_id)
            if before is None or before.attempt <= event.attempt:
                found[event.node.unique_id] = event
    return found


def _check_envelopes(events: Sequence[AnyEvent]) -> Iterator[Difference]:
    for event in events:
        wanted = f"{event.run_id}.{event.attempt}.{event.seq}"
        if event.event_id != wanted:
            yield _breach(_at(event), "event_id", event.event_id, wanted)
        for name in ("project", "target"):
            if getattr(event, name) != (first := getattr(events[0], name)):
                yield _breach(_at(event), name, getattr(event, name), first)
    for earlier, later in pairwise(events):
        for name in ("attempt", "fence"):
            if getattr(later, name) < (least := getattr(earlier, name)):
                yield _breach(_at(later), name, getattr(later, name), f"{least} or more")


def _check_sequence(events: Sequence[AnyEvent]) -> Iterator[Difference]:
    """1, 2, 3 … in the order of the stream, without a hole that no gap covers."""
    covered: set[int] = set()
    for event in events:
        if isinstance(event, Gap) and event.from_seq is not None and event.to_seq is not None:
            covered.update(range(event.from_seq, event.to_seq + 1))
    wanted = 1
    for event in events:
        while wanted in covered and wanted < event.seq:
            wanted += 1
        if event.seq != wanted:
            yield _breach(_at(event), "seq", event.seq, wanted)
        wanted = max(wanted, event.seq + 1)


def _check_last(events: Sequence[AnyEvent]) -> Iterator[Difference]:
    """What comes once comes once, and the end comes last."""
    ends = [n for n, event in enumerate(events) if isinstance(event, RunFinished | RunRejected)]
    if not ends:
        yield _breach("the run", "run.finished", NOTHING, "once")
    elif len(ends) > 1:
        yield _breach("the run", "run.finished", f"{len(ends)} times", "once")
    for event in events[ends[0] + 1 :] if ends else ():
        yield _breach(_at(event), "place", "after the run's end", "before it")
    once = Counter(
        (event.attempt, event_type(event))
        for event in events
        if event_type(event) in ("run.started", "run.planned")
    )
    for (attempt, kind), count in once.items():
        if count > 1:
            yield _breach(f"attempt {attempt}", kind, f"{count} times", "once")


def _check_ends(attempt: int, events: Sequence[AnyEvent]) -> Iterator[Difference]:
    """Exactly one node.finished of each node that was planned or started."""
    ended = Counter(e.node.unique_id for e in events if isinstance(e, NodeFinished))
    started = Counter(e.node.unique_id for e in events if isinstance(e, NodeStarted))
    plans = [e.nodes for e in events if isinstance(e, RunPlanned) and e.nodes is not None]
    planned = {entry.unique_id for nodes in plans for entry in nodes}
    for unique_id in sorted(planned | set(started) | set(ended)):
        what = _node(unique_id, attempt)
        if ended[unique_id] != 1:
            yield _breach(what, "node.finished", _times(ended[unique_id]), "once")
        if started[unique_id] > 1:
            yield _breach(what, "node.started", _times(started[unique_id]), "at most once")
        if plans and unique_id not in planned and not unique_id.startswith("operation."):
            yield _breach(what, "run.planned", "not planned", "planned")


def _check_order(attempt: int, events: Sequence[AnyEvent]) -> Iterator[Difference]:
    """A start before its end, and after the ends of what is upstream."""
    ended: dict[str, int] = {}
    for event in events:
        if isinstance(event, NodeFinished):
            ended.setdefault(event.node.unique_id, event.seq)
    last = events[-1]
    # `dbt clone` works through its nodes in no order.
    ordered = not (isinstance(last, RunFinished) and last.command == "clone")
    for event in events:
        if not isinstance(event, NodeStarted):
            continue
        what = _node(event.node.unique_id, attempt)
        end = ended.get(event.node.unique_id)
        if end is not None and end < event.seq:
            yield _breach(what, "node.started", f"seq {event.seq}", f"before its end, seq {end}")
        # A unit test runs before the model that it depends on.
        if ordered and event.node.resource_type != "unit_test":
            for upstream in event.node.upstream:
                if (end := ended.get(upstream)) is not None and end > event.seq:
                    wanted = f"after the end of {upstream}, seq {end}"
                    yield _breach(what, "node.started", f"seq {event.seq}", wanted)


def _check_verdict(events: Sequence[AnyEvent], finished: RunFinished) -> Iterator[Difference]:
    """run.finished says what the nodes' own ends say."""
    counts: dict[str, dict[str, int]] = {}
    last = verdicts(events)
    for end in last.values():
        of_type = counts.setdefault(end.node.resource_type, {})
        of_type[end.status.value] = of_type.get(end.status.value, 0) + 1
    failed = sum(end.status in FAILED for end in last.values())
    highest = max(event.attempt for event in events)
    is_success = finished.status is RunStatus.SUCCESS
    for field, said, wanted in (
        ("counts", finished.counts, counts),
        ("failed_count", finished.failed_count, failed),
        ("attempts", finished.attempts, highest),
        ("exit_code is 0", finished.exit_code == 0, is_success),
    ):
        if said != wanted:
            yield Difference(
                what="the run",
                field=field,
                left="run.finished",
                left_says=_said(said),
                right="its other events" if field != "exit_code is 0" else "its status",
                right_says=_said(wanted),
            )
    if is_success and failed:
        yield _breach("the run", "status", f"success with {failed} failed nodes", "no success")


# -- the KV state ----------------------------------------------------------------------------


def compare_run(view: RunView | None, events: Sequence[AnyEvent]) -> Iterator[Difference]:
    """The state of a run that has ended. A rejected one need not have a state."""
    end = events[-1] if events else None
    if view is None:
        if not isinstance(end, RunRejected):
            yield _differs("the run", "state", "it is there", RUN_STATE, None)
        return
    if isinstance(end, RunFinished):
        pairs: dict[str, tuple[Any, Any]] = {
            "status": (end.status, view.status),
            "exit_code": (end.exit_code, view.exit_code),
            "counts": (end.counts, view.counts),
            "last_seq": (end.seq, view.last_seq),
            "attempt": (end.attempt, view.attempt),
            "fence": (end.fence, view.fence),
            "finished_at": (end.time, view.finished_at),
        }
    elif isinstance(end, RunRejected):
        pairs = {"status": (RunStatus.ERROR, view.status)}
    else:
        pairs = {"status": ("it has not ended", view.status)}
    for field, (told, stored) in pairs.items():
        if told != stored:
            yield _differs("the run", field, told, RUN_STATE, stored)


def compare_nodes(
    states: Mapping[str, NodeState | None], last: Mapping[str, NodeFinished]
) -> Iterator[Difference]:
    """The state of each node, unless a later run has overwritten it since."""
    for unique_id, end in last.items():
        state = states.get(unique_id)
        what = f"node {unique_id}"
        if state is None:
            yield _differs(what, "state", end.status, NODE_STATE, None)
        elif state.run_id != end.run_id:
            if state.finished_at is not None and state.finished_at < _finished_at(end):
                yield _differs(what, "run_id", end.run_id, NODE_STATE, state.run_id)
        else:
            for field in ("status", "attempt", "seq"):
                told, stored = getattr(end, field), getattr(state, field)
                if told != stored:
                    yield _differs(what, field, told, NODE_STATE, stored)


def _finished_at(end: NodeFinished) -> datetime:
    return end.finished_at or end.time


# -- run_results.json ------------------------------------------------------------------------


def compare_results(results: RunResults, events: Sequence[AnyEvent]) -> Iterator[Difference]:
    """dbt's file against the ends of the attempt that wrote it: the last one."""
    finished = next((event for event in events if isinstance(event, RunFinished)), None)
    attempt = max((event.attempt for event in events), default=0)
    told = next((e.invocation_id for e in events if e.attempt == attempt and e.invocation_id), None)
    wrote = results.metadata.invocation_id
    if told and wrote and told != wrote:
        yield _differs(f"attempt {attempt}", "invocation_id", told, RUN_RESULTS, wrote)
        return  # of another attempt, or another run: nothing of it can be compared
    ends = {
        event.node.unique_id: event
        for event in events
        if isinstance(event, NodeFinished) and event.attempt == attempt
    }
    for result in results.results:
        what, end = f"node {result.unique_id}", ends.get(result.unique_id)
        if end is None:
            # What `run-operation` calls is no node, and dbt has a result of it.
            if not result.unique_id.startswith("macro."):
                yield _differs(what, "status", None, RUN_RESULTS, result.status)
        elif not agrees(result.status, result.message, end.status, end.reason):
            yield _differs(what, "status", end.status, RUN_RESULTS, result.status)
    if finished is None or not finished.verified:
        return  # dbt was stopped, or did not tell all: it need not have a result of each
    named = {result.unique_id for result in results.results}
    for unique_id, end in ends.items():
        of_its_own = end.node.resource_type != "operation"
        if unique_id not in named and of_its_own and end.node.materialized not in _NO_RESULT:
            yield _differs(f"node {unique_id}", "status", end.status, RUN_RESULTS, None)


# -- words -----------------------------------------------------------------------------------


def _at(event: AnyEvent) -> str:
    return f"{event_type(event)} {event.attempt}.{event.seq}"


def _node(unique_id: str, attempt: int) -> str:
    return f"node {unique_id} in attempt {attempt}"


def _times(count: int) -> str:
    return NOTHING if count == 0 else "once" if count == 1 else f"{count} times"


def _said(value: object) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, str | int) else msgspec.json.encode(value).decode()


def _breach(what: str, field: str, says: object, wanted: object) -> Difference:
    return _differs(what, field, says, CONTRACT, wanted)


def _differs(what: str, field: str, told: object, other: str, says: object) -> Difference:
    return Difference(
        what=what,
        field=field,
        left=EVENTS,
        left_says=_said(told),
        right=other,
        right_says=_said(says),
    )
