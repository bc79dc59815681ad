"""How a run goes on whose worker is gone: decided from its events alone."""

import pytest

from dbtstream.endings import Ended, Ending
from dbtstream.events import AnyEvent, NodeFinished, RunFinished, RunLeased
from dbtstream.messages import OnLost
from dbtstream.normalizer import Normalizer
from dbtstream.resume import HANDED_OVER, WORKER_LOST, decide, earlier_results, holes
from dbtstream.statuses import NodeStatus, Reason, RunStatus
from tests.guarantees import check_run
from tests.stories import BEGIN, Story, context, node

RAW, ORDERS, DAILY = "model.shop.raw", "model.shop.orders", "model.shop.daily"
TEST = "test.shop.not_null.1"


def begun() -> list[AnyEvent]:
    """RAW is built, its test failed, ORDERS is in flight, DAILY has not begun."""
    story = Story()
    queued = Normalizer(context())
    events = queued.queued(BEGIN) + queued.leased("first", BEGIN)
    story.normalizer.recall(events)
    story.plan(node(RAW), node(TEST, RAW), node(ORDERS, RAW), node(DAILY, ORDERS))
    story.run(RAW)
    story.start(TEST)
    story.finish(TEST, "fail")
    story.start(ORDERS)
    return events + story.events


def closed(events: list[AnyEvent], *, final: bool = False) -> list[AnyEvent]:
    """As the next worker ends the attempt."""
    normalizer = Normalizer(context(fence=9, worker="w2"))
    normalizer.recall(events)
    decision = "fail" if final else "resume"
    taken = normalizer.leased(WORKER_LOST, BEGIN, decision=decision, previous_worker="w1")
    ending = Ending(how=Ended.WORKER_LOST)
    return [*events, *taken, *normalizer.end(ending, at=BEGIN, final=final)]


@pytest.mark.parametrize(
    ("on_lost", "command", "cause", "decision"),
    [
        (OnLost.RESUME, "build", WORKER_LOST, OnLost.RESUME),
        (OnLost.RESTART, "build", WORKER_LOST, OnLost.RESTART),
        (OnLost.FAIL, "build", WORKER_LOST, OnLost.FAIL),
        (OnLost.FAIL, "build", HANDED_OVER, OnLost.RESUME),
        (OnLost.RESUME, "source freshness", WORKER_LOST, OnLost.RESTART),
        (OnLost.RESUME, "run-operation", WORKER_LOST, OnLost.RESTART),
    ],
)
def test_a_lost_run_goes_on_as_it_was_asked_to(
    on_lost: OnLost, command: str, cause: str, decision: OnLost
) -> None:
    assert decide(on_lost, command, begun(), cause=cause, max_attempts=5) is decision


def test_what_nobody_knows_the_plan_of_begins_anew() -> None:
    unplanned = [event for event in begun() if event.seq <= 3]
    decision = decide(OnLost.RESUME, "build", unplanned, cause=WORKER_LOST, max_attempts=5)
    assert decision is OnLost.RESTART


def test_a_run_that_has_lost_so_many_workers_is_given_to_no_other() -> None:
    events = closed(begun())
    assert sum(isinstance(event, RunLeased) for event in events) == 2
    for max_attempts, decision in ((3, OnLost.RESUME), (2, OnLost.FAIL)):
        found = decide(OnLost.RESUME, "build", events, cause=WORKER_LOST, max_attempts=max_attempts)
        assert found is decision
    # Handing over kills nobody.
    found = decide(OnLost.RESUME, "build", events, cause=HANDED_OVER, max_attempts=2)
    assert found is OnLost.RESUME


def test_dbt_is_told_of_each_node_what_retry_goes_by() -> None:
    results = {r.unique_id: r.status for r in earlier_results(closed(begun()))}
    assert results == {RAW: "success", TEST: "fail", ORDERS: "error", DAILY: "skipped"}


def test_an_attempt_that_another_follows_has_an_end_for_each_node_and_no_verdict() -> None:
    events = closed(begun())
    check_run(events, complete=False)
    ends = {e.node.unique_id: (e.status, e.reason) for e in events if isinstance(e, NodeFinished)}
    assert ends[ORDERS] == (NodeStatus.LOST, Reason.WORKER_LOST)
    assert ends[DAILY] == (NodeStatus.NEVER_STARTED, Reason.WORKER_LOST)
    assert not any(isinstance(event, RunFinished) for event in events)


def test_the_verdict_of_the_last_attempt_counts_each_node_once() -> None:
    """RAW succeeded in the first attempt, the others in the second."""
    earlier = closed(begun())
    story = Story(attempt=2, fence=9, worker="w2", began_at=BEGIN)
    story.normalizer.recall(earlier)
    story.events += earlier
    story.plan(node(TEST, RAW), node(ORDERS, RAW), node(DAILY, ORDERS))
    for name in (TEST, ORDERS, DAILY):
        story.run(name)
    story.result(0)
    story.end()
    check_run(story.events)
    verdict = story.events[-1]
    assert isinstance(verdict, RunFinished)
    assert verdict.status is RunStatus.SUCCESS
    assert verdict.counts == {"model": {"success": 3}, "test": {"success": 1}}
    assert verdict.failed == []
    assert verdict.verified
    assert verdict.elapsed_s == (verdict.time - BEGIN).total_seconds()


def test_numbers_that_nobody_has_are_found() -> None:
    events = begun()
    assert holes(events) == []
    assert holes([e for e in events if e.seq not in (3, 5, 6)]) == [(3, 3), (5, 6)]


def test_numbers_that_a_gap_explains_are_no_holes() -> None:
    normalizer = Normalizer(context())
    events = normalizer.queued(BEGIN)
    normalizer.recall(events)
    lost = normalizer.gap("log", 1, "x", at=BEGIN)  # seq 2, never stored
    events += normalizer.gap("log", 1, "y", at=BEGIN, from_seq=lost[0].seq, to_seq=lost[0].seq)
    assert holes(events) == []
