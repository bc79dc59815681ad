"""The guarantees of the contract as one check: give it all events of a run, in order.

Used by the unit tests of the normalizer and by the acceptance tests, which read the events
back from NATS. It knows the events only, not how they were made.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from itertools import pairwise

from dbtstream.events import (
    AnyEvent,
    Gap,
    NodeBatch,
    NodeFinished,
    NodeStarted,
    RunFinished,
    RunLeased,
    RunPlanned,
    RunPlanPart,
    RunQueued,
    RunRejected,
    RunStarted,
    encode_event,
    event_type,
)
from dbtstream.lineage_events import (
    Asset,
    AssetChecked,
    LineageChanged,
    LineageDeclared,
    LineageObserved,
)
from dbtstream.statuses import DBT_NODE_STATUS, PASSED, NodeStatus, Reason, RunStatus

HAS_BEGUN = {
    NodeStatus.SUCCESS,
    NodeStatus.WARN,
    NodeStatus.FAIL,
    NodeStatus.ERROR,
    NodeStatus.PARTIAL_SUCCESS,
    NodeStatus.CANCELLED,
    NodeStatus.LOST,
}
HAS_NOT_BEGUN = {NodeStatus.SKIPPED, NodeStatus.NEVER_STARTED}
FAILED = {NodeStatus.FAIL, NodeStatus.ERROR, NodeStatus.PARTIAL_SUCCESS, NodeStatus.LOST}

_SPAN_ID = re.compile(r"(?!0{16})[0-9a-f]{16}")
_TRACE_ID = re.compile(r"(?!0{32})[0-9a-f]{32}")


def check_run(
    events: Sequence[AnyEvent],
    *,
    first_seq: int = 1,
    ordered: bool = True,
    complete: bool = True,
    secrets: Iterable[str] = (),
) -> None:
    """Guarantees 1 to 5 for one run.

    `ordered=False` for `dbt clone`, which works through its nodes in no order.
    `complete=False` for the events of an attempt that another attempt follows.
    """
    assert events, "a run has at least one event"
    check_envelopes(events)
    check_sequence(events, first_seq)
    check_frame_of_the_run(events, complete=complete)
    attempts: dict[int, list[AnyEvent]] = defaultdict(list)
    for event in events:
        attempts[event.attempt].append(event)
    for of_attempt in attempts.values():
        check_one_end_per_node(of_attempt)
        check_order(of_attempt, ordered=ordered)
        check_verdicts(of_attempt)
    check_assets(events)
    if isinstance(events[-1], RunFinished):
        check_summary(events, events[-1])
    for secret in secrets:
        told = [e.event_id for e in events if secret.encode() in encode_event(e)]
        assert not told, f"a secret is told in {told}"


def check_envelopes(events: Sequence[AnyEvent]) -> None:
    """The fields that every event has say the same, and what is derived is derived so."""
    first = events[0]
    engine: dict[int, str] = {}
    invocation: dict[int, str] = {}
    spans: dict[tuple[int, str], str] = {}
    for event in events:
        assert event.event_id == f"{event.run_id}.{event.attempt}.{event.seq}"
        for name in ("run_id", "project", "target", "trace_id", "labels"):
            assert getattr(event, name) == getattr(first, name), f"{name} of {event.event_id}"
        assert event.trace_id
        assert _TRACE_ID.fullmatch(event.trace_id), event.trace_id
        assert event.span_id
        assert _SPAN_ID.fullmatch(event.span_id), event.span_id
        assert event.time.utcoffset() == timedelta(0), f"{event.event_id} is not in UTC"
        for known, value in ((engine, event.engine), (invocation, event.invocation_id)):
            if event.attempt in known:
                assert value == known[event.attempt], f"{event.event_id} forgot {known}"
            elif value is not None:
                known[event.attempt] = value
        if isinstance(event, NodeStarted | NodeFinished):
            key = event.attempt, event.node.unique_id
            assert spans.setdefault(key, event.span_id) == event.span_id
        elif event_type(event).startswith("run."):
            assert spans.setdefault((event.attempt, ""), event.span_id) == event.span_id
    assert len(set(spans.values())) == len(spans), "two things have one span"
    for earlier, later in pairwise(events):
        assert earlier.attempt <= later.attempt
        assert earlier.fence <= later.fence


def check_sequence(events: Sequence[AnyEvent], first_seq: int = 1) -> None:
    """Guarantee 2: no holes but those that a gap covers."""
    covered: set[int] = set()
    for event in events:
        if isinstance(event, Gap) and event.from_seq is not None and event.to_seq is not None:
            covered.update(range(event.from_seq, event.to_seq + 1))
    wanted = first_seq
    for event in events:
        while wanted in covered and wanted != event.seq:
            wanted += 1
        assert event.seq == wanted, f"seq {event.seq} of {event_type(event)}, not {wanted}"
        wanted += 1


def check_frame_of_the_run(events: Sequence[AnyEvent], *, complete: bool = True) -> None:
    """What comes first, what comes last, and what comes once."""
    kinds = Counter(event_type(event) for event in events)
    assert kinds["run.queued"] <= 1
    if kinds["run.queued"]:
        assert isinstance(events[0], RunQueued)
    if kinds["run.rejected"]:
        assert isinstance(events[-1], RunRejected)
        assert set(kinds) <= {"run.queued", "run.rejected"}, "a rejected run has done nothing"
        return
    assert kinds["run.finished"] == int(complete)
    if complete:
        assert isinstance(events[-1], RunFinished), "something comes after run.finished"
    leases = [event for event in events if isinstance(event, RunLeased)]
    if leases and kinds["run.queued"]:
        assert events[1] is leases[0], "a lease is the first thing after the queue"
        assert [lease.cause == "first" for lease in leases] == [True] + [False] * (len(leases) - 1)
        fences = [lease.fence for lease in leases]
        assert fences == sorted(set(fences)), f"the fence of each lease is higher: {fences}"
    per_attempt = Counter((event.attempt, event_type(event)) for event in events)
    for (attempt, kind), count in per_attempt.items():
        assert count == 1 or kind not in ("run.started", "run.planned"), f"{kind} in {attempt}"


def check_assets(events: Sequence[AnyEvent]) -> None:
    """Lineage and assets follow the ends that they are of, each once in an attempt."""
    ended: dict[str, NodeFinished] = {}
    told: Counter[tuple[int, str, str]] = Counter()
    for event in events:
        match event:
            case NodeFinished():
                ended[event.node.unique_id] = event
            case Asset():
                about = (
                    event.check.unique_id if isinstance(event, AssetChecked) else event.unique_id
                )
                assert about in ended, f"{event.event_id} is told before the end of {about}"
                told[event.attempt, "asset", about] += 1
            case LineageObserved():
                assert ended[event.unique_id].status in PASSED
                told[event.attempt, "observed", event.unique_id] += 1
            case LineageDeclared():
                told[event.attempt, "declared", event.unique_id] += 1
            case LineageChanged():
                declared = {attempt for attempt, kind, _ in told if kind == "declared"}
                assert event.attempt not in declared, "lineage.changed comes first"
                told[event.attempt, "changed", ""] += 1
            case _:
                pass
    twice = [key for key, count in told.items() if count > 1]
    assert not twice, f"told twice: {twice}"


def check_one_end_per_node(events: Sequence[AnyEvent]) -> None:
    """Guarantee 1, of one attempt: each selected node has exactly one node.finished."""
    ended = Counter(e.node.unique_id for e in events if isinstance(e, NodeFinished))
    twice = [name for name, count in ended.items() if count > 1]
    assert not twice, f"more than one node.finished: {twice}"
    started = [e.node.unique_id for e in events if isinstance(e, NodeStarted)]
    open_ = set(started) - set(ended)
    assert not open_, f"started, and no node.finished: {open_}"
    batches = {e.unique_id for e in events if isinstance(e, NodeBatch)}
    assert batches <= set(ended), f"batches of nodes without an end: {batches - set(ended)}"
    for plan in (e for e in events if isinstance(e, RunPlanned)):
        parts = [e for e in events if isinstance(e, RunPlanPart)]
        assert [part.part for part in parts] == list(range(1, plan.parts + 1))
        if plan.nodes is None and not parts:
            assert plan.nodes_status not in ("complete", "in_parts")
            continue
        nodes = plan.nodes or [entry for part in parts for entry in part.nodes]
        planned = {entry.unique_id for entry in nodes}
        assert len(planned) == len(nodes) == plan.node_count
        missing = planned - set(ended)
        assert not missing, f"planned, and no node.finished: {missing}"
        strangers = {n for n in set(ended) - planned if not n.startswith("operation.")}
        assert not strangers, f"node.finished of what was not planned: {strangers}"


def check_order(events: Sequence[AnyEvent], *, ordered: bool = True) -> None:
    """Guarantee 3, of one attempt: plan, then start, then end; upstream before downstream."""
    started: dict[str, int] = {}
    ended: dict[str, int] = {}
    planned_at: int | None = None
    for event in events:
        match event:
            case RunPlanned():
                planned_at = event.seq
                # dbt 1.8 runs its on-run-start hooks before it says what it selected.
                early = {n for n in started | ended if not n.startswith("operation.")}
                assert not early, f"before the plan: {early}"
            case RunStarted():
                assert not started
                assert planned_at is None
            case NodeStarted():
                name = event.node.unique_id
                assert name not in started, f"{name} started twice"
                assert name not in ended, f"{name} started after its end"
                started[name] = event.seq
            case NodeFinished():
                ended[event.node.unique_id] = event.seq
            case _:
                pass
    if not ordered:
        return
    for event in events:
        # A unit test runs before the model that it depends on.
        if isinstance(event, NodeStarted) and event.node.resource_type != "unit_test":
            for upstream in event.node.upstream:
                if upstream in ended:
                    assert ended[upstream] < event.seq, (
                        f"{event.node.unique_id} started before {upstream} ended"
                    )


def check_verdicts(events: Sequence[AnyEvent]) -> None:
    """Each status has what belongs to it."""
    started = {e.node.unique_id for e in events if isinstance(e, NodeStarted)}
    status_of = {e.node.unique_id: e.status for e in events if isinstance(e, NodeFinished)}
    for event in events:
        if not isinstance(event, NodeFinished):
            continue
        name = event.node.unique_id
        if event.status in HAS_BEGUN:
            assert name in started, f"{name} is {event.status} and never started"
        if event.status in HAS_NOT_BEGUN:
            assert name not in started, f"{name} is {event.status} and had started"
        if event.status is NodeStatus.SKIPPED:
            assert event.reason is Reason.UPSTREAM_FAILED
            for cause in event.root_causes:
                assert status_of[cause] not in PASSED | HAS_NOT_BEGUN, f"{cause} caused {name}"
        else:
            assert event.root_causes == [], f"{name} is {event.status}"
        if event.status in PASSED | {NodeStatus.FAIL, NodeStatus.PARTIAL_SUCCESS}:
            assert event.reason is None, f"{name} is {event.status}, {event.reason}"
        if event.status in PASSED:
            assert event.error is None
        if event.status is NodeStatus.CANCELLED:
            assert event.reason in (
                Reason.CANCELLED,
                Reason.TIMEOUT,
                Reason.FAIL_FAST,
                Reason.HANDED_OVER,
            )


def check_summary(events: Sequence[AnyEvent], finished: RunFinished) -> None:
    """Guarantee 4, as far as the events tell: run.finished counts what the nodes said last."""
    last = {event.node.unique_id: event for event in events if isinstance(event, NodeFinished)}
    ends = list(last.values())
    counts: dict[str, dict[str, int]] = {}
    for end in ends:
        of_type = counts.setdefault(end.node.resource_type, {})
        of_type[end.status.value] = of_type.get(end.status.value, 0) + 1
    assert finished.counts == counts
    failed = {end.node.unique_id for end in ends if end.status in FAILED}
    assert finished.failed_count == len(failed)
    assert {node.unique_id for node in finished.failed} <= failed
    assert len(finished.failed) == min(len(failed), 50)
    assert len(finished.slowest) <= 10
    assert finished.status.is_terminal
    assert finished.verified == (finished.verified_status == "equal")
    assert finished.attempts == finished.attempt
    assert (finished.exit_code == 0) == (finished.status is RunStatus.SUCCESS)
    if finished.status is RunStatus.SUCCESS:
        assert not failed, f"a run with {failed} is no success"


def check_run_results(events: Sequence[AnyEvent], run_results: Mapping[str, str]) -> None:
    """Guarantee 4 against dbt's own file: {unique_id: status} of run_results.json.

    Says nothing of a run whose `verified` is false.
    """
    finished = events[-1]
    assert isinstance(finished, RunFinished)
    if not finished.verified:
        return
    ends = {
        event.node.unique_id: event
        for event in events
        if isinstance(event, NodeFinished) and event.attempt == finished.attempt
    }
    for unique_id, word in run_results.items():
        assert unique_id in ends, f"{unique_id} has a result and no node.finished"
        end = ends[unique_id]
        said = DBT_NODE_STATUS.get(word, NodeStatus.ERROR)
        if said is NodeStatus.SKIPPED:
            assert end.status in HAS_NOT_BEGUN or end.reason is Reason.FAIL_FAST
        elif said is NodeStatus.ERROR:
            assert end.status in (NodeStatus.ERROR, NodeStatus.CANCELLED)
        else:
            assert end.status is said, f"{unique_id}: {end.status}, and dbt says {word}"
    without = {
        name
        for name, end in ends.items()
        if name not in run_results
        and end.node.materialized != "ephemeral"
        and end.node.resource_type != "operation"
    }
    assert not without, f"dbt has no result of {without}"
