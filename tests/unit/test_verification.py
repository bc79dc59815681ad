"""What `verify` says of events alone: of runs with several attempts, and of broken guarantees."""

from collections.abc import Callable

import msgspec
import pytest

from dbtstream.endings import Ended, Ending
from dbtstream.events import AnyEvent, Gap, NodeFinished, NodeStarted, RunFinished
from dbtstream.normalizer import Normalizer
from dbtstream.statuses import NodeStatus, RunStatus
from dbtstream.verification import (
    DbtResult,
    Metadata,
    RunResults,
    check_events,
    compare_results,
    verdicts,
)
from tests.stories import Story, context, node

ORDERS, CUSTOMERS, DAILY = (f"model.shop.{name}" for name in ("orders", "customers", "daily"))
INVOCATION_2 = "9b8f3a52-33cf-4e4d-9a2f-1f6d1e0a7c11"


def two_attempts() -> list[AnyEvent]:
    """Its worker dies in `customers`; another one takes over and does that and `daily`."""
    first = Story(fence=7)
    first.plan(node(ORDERS), node(CUSTOMERS, ORDERS), node(DAILY, CUSTOMERS))
    first.run(ORDERS)
    first.start(CUSTOMERS)
    events = list(first.events)

    closing = Normalizer(context(fence=9, worker="w2"))
    closing.recall(events)
    events += closing.leased("worker_lost", first.now, decision="resume", previous_worker="w1")
    events += closing.end(Ending(how=Ended.WORKER_LOST), at=first.now, final=False)

    second = Story(attempt=2, fence=9, worker="w2")
    second.normalizer.recall(events)
    second.plan(node(CUSTOMERS, ORDERS), node(DAILY, CUSTOMERS))
    second.run(CUSTOMERS)
    second.run(DAILY)
    second.result()
    ended = second.normalizer.end(Ending(how=Ended.RESULT, exit_code=0), at=second.now)
    return [*events, *second.events, *ended]


def found(events: list[AnyEvent]) -> set[tuple[str, str]]:
    return {(difference.what, difference.field) for difference in check_events(events)}


def test_a_run_whose_second_attempt_did_the_rest_keeps_the_guarantees() -> None:
    events = two_attempts()
    assert [str(difference) for difference in check_events(events)] == []
    assert {name: (end.status, end.attempt) for name, end in verdicts(events).items()} == {
        ORDERS: (NodeStatus.SUCCESS, 1),
        CUSTOMERS: (NodeStatus.SUCCESS, 2),
        DAILY: (NodeStatus.SUCCESS, 2),
    }


def test_dbts_results_are_those_of_the_last_attempt_only() -> None:
    """`dbt retry` writes those nodes that it ran."""
    events = two_attempts()
    told = next(e.invocation_id for e in events if e.attempt == 2 and e.invocation_id)
    own = RunResults([DbtResult(CUSTOMERS, "success"), DbtResult(DAILY, "success")], Metadata(told))
    assert list(compare_results(own, events)) == []
    of_first = msgspec.structs.replace(own, results=[*own.results, DbtResult(ORDERS, "success")])
    (difference,) = compare_results(of_first, events)
    assert (difference.what, difference.left_says) == (f"node {ORDERS}", "nothing")
    other = RunResults([DbtResult(ORDERS, "error")], Metadata(INVOCATION_2))
    (difference,) = compare_results(other, events)
    assert (difference.what, difference.field) == ("attempt 2", "invocation_id")


@pytest.mark.parametrize(
    ("word", "message", "status", "agrees"),
    [
        ("skipped", None, NodeStatus.NEVER_STARTED, True),
        ("error", None, NodeStatus.CANCELLED, True),
        ("pass", None, NodeStatus.SUCCESS, True),
        ("fail", None, NodeStatus.SUCCESS, False),
        ("a word of dbt 3", None, NodeStatus.SUCCESS, False),
    ],
)
def test_dbt_has_fewer_words_than_we_have(
    word: str, message: str | None, status: NodeStatus, agrees: bool
) -> None:
    def with_status(event: AnyEvent) -> AnyEvent:
        is_end = isinstance(event, NodeFinished) and event.node.unique_id == DAILY
        return msgspec.structs.replace(event, status=status) if is_end else event

    results = RunResults([DbtResult(CUSTOMERS, "success"), DbtResult(DAILY, word, message)])
    differences = list(compare_results(results, [with_status(e) for e in two_attempts()]))
    assert (differences == []) == agrees


def test_what_run_operation_calls_is_no_node() -> None:
    told = [DbtResult(name, "success") for name in (CUSTOMERS, DAILY, "macro.shop.vacuum")]
    results = RunResults(told)
    assert list(compare_results(results, two_attempts())) == []


def test_a_hole_is_a_difference_unless_a_gap_covers_it() -> None:
    events = two_attempts()
    hole = next(n for n, e in enumerate(events) if isinstance(e, NodeStarted)) + 1
    gone = events.pop(hole)
    assert any(field == "seq" for _, field in found(events))
    at = events[-1]
    gap = Gap(
        event_id=gone.event_id,
        **{
            name: getattr(gone, name)
            for name in ("time", "seq", "project", "target", "run_id", "attempt", "fence", "worker")
        },
        dropped_family="unknown",
        count=1,
        why="the worker died",
        from_seq=gone.seq,
        to_seq=gone.seq,
    )
    closing = msgspec.structs.replace(
        gap, seq=at.seq, attempt=2, fence=9, event_id=f"{at.run_id}.2.{at.seq}"
    )
    end = msgspec.structs.replace(at, seq=at.seq + 1, event_id=f"{at.run_id}.2.{at.seq + 1}")
    assert not any(field == "seq" for _, field in found([*events[:-1], closing, end]))


def swap(events: list[AnyEvent]) -> None:
    """A node starts before what it needs has ended."""
    start = next(
        n for n, e in enumerate(events) if isinstance(e, NodeStarted) and e.node.unique_id == DAILY
    )
    renumber(events, start, start - 1)


def end_before_start(events: list[AnyEvent]) -> None:
    start = next(n for n, e in enumerate(events) if isinstance(e, NodeStarted))
    renumber(events, start, start + 1)


def renumber(events: list[AnyEvent], one: int, other: int) -> None:
    events[one], events[other] = (
        msgspec.structs.replace(events[other], seq=events[one].seq),
        msgspec.structs.replace(events[one], seq=events[other].seq),
    )


def no_end(events: list[AnyEvent]) -> None:
    events.pop()


def two_ends(events: list[AnyEvent]) -> None:
    events.append(events[-1])


def end_says(**facts: object) -> Callable[[list[AnyEvent]], None]:
    def change(events: list[AnyEvent]) -> None:
        assert isinstance(events[-1], RunFinished)
        events[-1] = msgspec.structs.replace(events[-1], **facts)

    return change


def older_fence(events: list[AnyEvent]) -> None:
    events[-2] = msgspec.structs.replace(events[-2], fence=7)


def earlier_attempt(events: list[AnyEvent]) -> None:
    events[-2] = msgspec.structs.replace(events[-2], attempt=1)


def other_target(events: list[AnyEvent]) -> None:
    events[-2] = msgspec.structs.replace(events[-2], target="dev")


def unplanned(events: list[AnyEvent]) -> None:
    for n, event in enumerate(events):
        if isinstance(event, NodeStarted | NodeFinished) and event.node.unique_id == ORDERS:
            other = msgspec.structs.replace(event.node, unique_id="model.shop.other")
            events[n] = msgspec.structs.replace(event, node=other)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (swap, (f"node {DAILY} in attempt 2", "node.started")),
        (end_before_start, (f"node {ORDERS} in attempt 1", "node.started")),
        (no_end, ("the run", "run.finished")),
        (two_ends, ("the run", "run.finished")),
        (end_says(counts={}), ("the run", "counts")),
        (end_says(failed_count=1), ("the run", "failed_count")),
        (end_says(attempts=1), ("the run", "attempts")),
        (end_says(exit_code=1), ("the run", "exit_code is 0")),
        (end_says(status=RunStatus.FAILURE), ("the run", "exit_code is 0")),
        (older_fence, ("node.finished 2.14", "fence")),
        (earlier_attempt, ("node.finished 1.14", "attempt")),
        (other_target, ("node.finished 2.14", "target")),
        (unplanned, ("node model.shop.other in attempt 1", "run.planned")),
        (unplanned, (f"node {ORDERS} in attempt 1", "node.finished")),
    ],
)
def test_what_breaks_a_guarantee_is_named(
    change: Callable[[list[AnyEvent]], None], where: tuple[str, str]
) -> None:
    events = two_attempts()
    change(events)
    assert where in found(events)
