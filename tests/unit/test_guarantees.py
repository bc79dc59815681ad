"""The check of the guarantees notices when one of them is broken."""

from collections.abc import Callable

import msgspec
import pytest

from dbtstream.events import AnyEvent, NodeFinished, NodeStarted, RunFinished, RunPlanned
from dbtstream.statuses import NodeStatus
from tests.guarantees import check_run, check_run_results
from tests.stories import Story, node

RAW, ORDERS, DAILY = "model.shop.raw", "model.shop.orders", "model.shop.daily"


def good_run() -> list[AnyEvent]:
    story = Story()
    story.plan(node(RAW), node(ORDERS, RAW), node(DAILY, ORDERS))
    story.run(RAW)
    story.fail(ORDERS)
    story.skip(DAILY)
    story.result(1)
    story.end()
    return story.events


def numbered(events: list[AnyEvent]) -> list[AnyEvent]:
    """Without holes, so that only the fault in question is left."""
    return [
        msgspec.structs.replace(e, seq=i, event_id=f"{e.run_id}.{e.attempt}.{i}")
        for i, e in enumerate(events, 1)
    ]


def change(events: list[AnyEvent], at: int, **fields: object) -> list[AnyEvent]:
    return [*events[:at], msgspec.structs.replace(events[at], **fields), *events[at + 1 :]]


def where(events: list[AnyEvent], kind: type[AnyEvent], unique_id: str = "") -> int:
    (index,) = [
        i
        for i, e in enumerate(events)
        if isinstance(e, kind)
        and (
            not unique_id
            or (isinstance(e, NodeStarted | NodeFinished) and e.node.unique_id == unique_id)
        )
    ]
    return index


def lose_an_end(events: list[AnyEvent]) -> list[AnyEvent]:
    del events[where(events, NodeFinished, DAILY)]
    return numbered(events)


def end_twice(events: list[AnyEvent]) -> list[AnyEvent]:
    index = where(events, NodeFinished, RAW)
    return numbered([*events[: index + 1], *events[index:]])


def lose_a_number(events: list[AnyEvent]) -> list[AnyEvent]:
    return [*events[:2], *events[3:]]


def lose_the_verdict(events: list[AnyEvent]) -> list[AnyEvent]:
    return events[:-1]


def say_more_after_the_verdict(events: list[AnyEvent]) -> list[AnyEvent]:
    return numbered([*events, events[0]])


def end_without_a_start(events: list[AnyEvent]) -> list[AnyEvent]:
    del events[where(events, NodeStarted, RAW)]
    return numbered(events)


def start_before_the_upstream_ends(events: list[AnyEvent]) -> list[AnyEvent]:
    start, end = where(events, NodeStarted, ORDERS), where(events, NodeFinished, RAW)
    events[start], events[end] = events[end], events[start]
    return numbered(events)


def start_before_the_plan(events: list[AnyEvent]) -> list[AnyEvent]:
    plan = events.pop(where(events, RunPlanned))
    return numbered([*events[:-1], plan, events[-1]])


def count_wrongly(events: list[AnyEvent]) -> list[AnyEvent]:
    return change(events, -1 % len(events), counts={"model": {"success": 3}})


def hide_a_failure(events: list[AnyEvent]) -> list[AnyEvent]:
    return change(events, len(events) - 1, failed=[], failed_count=0)


def skip_for_no_reason(events: list[AnyEvent]) -> list[AnyEvent]:
    return change(events, where(events, NodeFinished, DAILY), reason=None)


def blame_a_node_that_passed(events: list[AnyEvent]) -> list[AnyEvent]:
    return change(events, where(events, NodeFinished, DAILY), root_causes=[RAW])


def share_a_span(events: list[AnyEvent]) -> list[AnyEvent]:
    start, end = where(events, NodeStarted, RAW), where(events, NodeFinished, RAW)
    events = change(events, start, span_id=events[0].span_id)
    return change(events, end, span_id=events[0].span_id)


def forget_the_engine(events: list[AnyEvent]) -> list[AnyEvent]:
    return change(events, 3, engine=None)


def number_wrongly(events: list[AnyEvent]) -> list[AnyEvent]:
    return change(events, 3, event_id="other")


def end_what_was_not_selected(events: list[AnyEvent]) -> list[AnyEvent]:
    plan = events[where(events, RunPlanned)]
    assert isinstance(plan, RunPlanned)
    assert plan.nodes is not None
    return change(events, where(events, RunPlanned), nodes=plan.nodes[:2], node_count=2)


@pytest.mark.parametrize(
    "broken",
    [
        lose_an_end,
        end_twice,
        lose_a_number,
        lose_the_verdict,
        say_more_after_the_verdict,
        end_without_a_start,
        start_before_the_upstream_ends,
        start_before_the_plan,
        count_wrongly,
        hide_a_failure,
        skip_for_no_reason,
        blame_a_node_that_passed,
        share_a_span,
        forget_the_engine,
        number_wrongly,
        end_what_was_not_selected,
    ],
)
def test_a_broken_guarantee_is_noticed(broken: Callable[[list[AnyEvent]], list[AnyEvent]]) -> None:
    check_run(good_run())
    with pytest.raises(AssertionError):
        check_run(broken(good_run()))


def test_a_secret_is_noticed() -> None:
    events = good_run()
    check_run(events, secrets=["hunter2"])
    with pytest.raises(AssertionError, match="a secret is told"):
        check_run(events, secrets=["Database Error"])


def test_a_file_of_dbt_that_says_otherwise_is_noticed() -> None:
    events = good_run()
    said = {RAW: "success", ORDERS: "error", DAILY: "skipped"}
    check_run_results(events, said)
    for name, word in ((RAW, "error"), (ORDERS, "success"), ("model.shop.other", "success")):
        with pytest.raises(AssertionError):
            check_run_results(events, said | {name: word})
    with pytest.raises(AssertionError, match="no result of"):
        check_run_results(events, {RAW: "success"})
    finished = events[-1]
    assert isinstance(finished, RunFinished)
    unverified = msgspec.structs.replace(finished, verified=False)
    check_run_results([*events[:-1], unverified], {RAW: "error"})


def test_a_success_with_a_failed_node_is_noticed() -> None:
    events = good_run()
    index = where(events, NodeFinished, RAW)
    with pytest.raises(AssertionError):
        check_run(change(events, index, status=NodeStatus.ERROR))
