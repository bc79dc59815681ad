"""What the trace of a run looks like, for every way in which a run can end."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from dbtstream import frames
from dbtstream.endings import Ended, Ending
from dbtstream.event_base import ErrorBlock
from dbtstream.events import AnyEvent, TraceBlock
from dbtstream.normalizer import Normalizer
from dbtstream.resume import HANDED_OVER, WORKER_LOST
from dbtstream.spans import Span
from dbtstream.statuses import Reason
from dbtstream.trace import span_id_of
from tests.span_trees import check_spans, replayed, spans_of, tree
from tests.stories import BEGIN, RUN_ID, Story, context, node

ORDERS, DAILY, SIDE = "model.shop.orders", "model.shop.daily", "model.shop.side"
TEST = "test.shop.unique_orders.1a2b3c"
HOOK = "operation.shop.shop-on-run-end-0"
KILLED = ErrorBlock(class_="ChildCrashed", message="dbt's process ended without a result")


def begun(*, plan: bool = True) -> Story:
    """Queued, started, and planned with two models and a test."""
    story = Story()
    story.events += story.normalizer.queued(BEGIN)
    story.events += story.normalizer.leased("first", BEGIN)
    if plan:
        story.plan(node(ORDERS), node(TEST, ORDERS), node(DAILY, ORDERS), others=(node(HOOK),))
    else:
        story.hello()
    return story


def gone(story: Story, how: Ended = Ended.RESULT, **ending: object) -> Story:
    """The child has exited, and its parent saw it."""
    story.now += timedelta(seconds=0.1)
    facts: dict[str, Any] = {"pid": 4711, "exited_at": story.now, "exit_code": 0}
    story.end(how, **facts | ending)
    return story


def success() -> Story:
    story = begun()
    for name in (ORDERS, TEST, DAILY):
        story.run(name, "pass" if name == TEST else "success")
    story.hook(HOOK)
    story.result(0)
    return gone(story)


def warn() -> Story:
    story = begun()
    story.run(ORDERS)
    story.run(TEST, "warn", failures=3, message="Got 3 results, configured to warn if != 0")
    story.run(DAILY)
    story.result(0)
    return gone(story)


def fail() -> Story:
    story = begun()
    story.run(ORDERS)
    story.run(TEST, "fail", failures=3, message="Got 3 results, configured to fail if != 0")
    story.skip(DAILY)
    story.result(1)
    return gone(story, exit_code=1)


def error() -> Story:
    story = begun()
    story.fail(ORDERS)
    story.skip(TEST)
    story.skip(DAILY)
    story.result(1)
    return gone(story, exit_code=1)


def fail_fast() -> Story:
    story = begun()
    story.run(ORDERS)
    story.run(TEST, "fail")
    story.returns(DAILY, "skipped", message="Skipping due to fail_fast")
    story.result(1)
    return gone(story, exit_code=1)


def cancelled() -> Story:
    story = begun()
    story.run(ORDERS)
    story.start(DAILY)
    story.cancel()
    story.interrupt()
    return gone(story, exit_code=2, stop=Reason.CANCELLED)


def timed_out() -> Story:
    story = begun()
    story.start(ORDERS)
    story.cancel(Reason.TIMEOUT)
    story.interrupt()
    return gone(story, exit_code=2, stop=Reason.TIMEOUT)


def crashed() -> Story:
    story = begun()
    story.run(ORDERS)
    story.start(DAILY)
    return gone(story, Ended.CRASHED, exit_code=-9, error=KILLED)


def out_of_memory() -> Story:
    story = begun()
    story.start(ORDERS)
    return gone(story, Ended.CRASHED, exit_code=-9, error=KILLED, oom=True)


def parse_error() -> Story:
    story = begun(plan=False)
    error = frames.ErrorInfo(
        error_class="CompilationError", message="Compilation Error\n  depends on a node that"
    )
    story.result(2, error=error)
    return gone(story, exit_code=2)


def no_hello() -> Story:
    story = Story()
    story.events += story.normalizer.queued(BEGIN)
    silent = ErrorBlock(class_="HandshakeTimeout", message="dbt's process said nothing for 60 s")
    return gone(story, Ended.NOT_STARTED, exit_code=-9, error=silent)


def rejected() -> Story:
    story = Story()
    story.events += story.normalizer.rejected(
        "flag_not_allowed", "--target: the target is in the subject", "args", at=story.now
    )
    return story


def cancelled_in_the_queue() -> Story:
    story = Story()
    story.normalizer = Normalizer(context())
    story.events += story.normalizer.queued(BEGIN)
    story.events += story.normalizer.cancel_step("requested", at=story.now, by="ann")
    story.end(Ended.NOT_STARTED, stop=Reason.CANCELLED)
    return story


UNTIL_EXECUTE = ["  queue", "  dbt CLIENT", "    startup", "    parse", "    execute"]
UNTIL_EXECUTE_FAILED = ["  queue", "  dbt CLIENT ERROR {}", *UNTIL_EXECUTE[2:]]


def failed_child(error_type: str) -> list[str]:
    return [line.format(error_type) for line in UNTIL_EXECUTE_FAILED]


TREES: dict[Callable[[], Story], list[str]] = {
    success: [
        "dbt build shop CONSUMER [success]",
        *UNTIL_EXECUTE,
        "      model orders [success]",
        "      test unique_orders [success]",
        "      model daily [success]",
        "      operation shop-on-run-end-0 [success]",
        "    finalize",
    ],
    warn: [
        "dbt build shop CONSUMER [success]",
        *UNTIL_EXECUTE,
        "      model orders [success]",
        "      test unique_orders [warn]",
        "      model daily [success]",
        "    finalize",
    ],
    fail: [
        "dbt build shop CONSUMER [failure] ERROR nodes_failed",
        *UNTIL_EXECUTE,
        "      model orders [success]",
        "      test unique_orders [fail] ERROR test_failed",
        "      model daily [skipped]",
        "    finalize",
    ],
    error: [
        "dbt build shop CONSUMER [failure] ERROR nodes_failed",
        *UNTIL_EXECUTE,
        "      model orders [error] ERROR database_error",
        "      test unique_orders [skipped]",
        "      model daily [skipped]",
        "    finalize",
    ],
    fail_fast: [
        "dbt build shop CONSUMER [failure] ERROR nodes_failed",
        *UNTIL_EXECUTE,
        "      model orders [success]",
        "      test unique_orders [fail] ERROR test_failed",
        "      model daily [never_started]",
        "    finalize",
    ],
    cancelled: [
        "dbt build shop CONSUMER [cancelled]",
        *UNTIL_EXECUTE,
        "      model orders [success]",
        "      model daily [cancelled]",
        "      test unique_orders [never_started]",
        "    finalize",
    ],
    timed_out: [
        "dbt build shop CONSUMER [timed_out] ERROR timeout",
        *failed_child("timeout"),
        "      model orders [cancelled] ERROR timeout",
        "      model daily [never_started]",
        "      test unique_orders [never_started]",
        "    finalize",
    ],
    crashed: [
        "dbt build shop CONSUMER [error] ERROR child_killed",
        *failed_child("child_killed"),
        "      model orders [success]",
        "      model daily [lost] ERROR child_killed",
        "      test unique_orders [never_started]",
    ],
    out_of_memory: [
        "dbt build shop CONSUMER [error] ERROR oom",
        *failed_child("oom"),
        "      model orders [lost] ERROR oom",
        "      model daily [never_started]",
        "      test unique_orders [never_started]",
    ],
    parse_error: [
        "dbt build shop CONSUMER [error] ERROR compilation_error",
        "  queue",
        "  dbt CLIENT ERROR compilation_error",
        "    startup",
        "    parse",
        "    finalize",
    ],
    no_hello: [
        "dbt build shop CONSUMER [error] ERROR no_hello",
        "  queue",
        "  dbt CLIENT ERROR no_hello",
        "    startup",
    ],
    rejected: ["dbt build shop CONSUMER ERROR rejected"],
    cancelled_in_the_queue: ["dbt build shop CONSUMER [cancelled]", "  queue"],
}


@pytest.mark.parametrize("tell", TREES, ids=lambda tell: tell.__name__)
def test_the_tree_of_a_run(tell: Callable[[], Story]) -> None:
    story = tell()
    spans = spans_of(story.events, context())

    assert tree(spans) == TREES[tell]
    check_spans(story.events, spans)


@pytest.mark.parametrize("tell", TREES, ids=lambda tell: tell.__name__)
def test_whoever_reads_the_events_again_makes_the_same_spans(tell: Callable[[], Story]) -> None:
    story = tell()

    assert spans_of(replayed(story.events), context()) == spans_of(story.events, context())


# Attempts that their worker could not end.


class Loss:
    """An attempt that another worker closes, so that the run goes on there."""

    def __init__(self, cause: str, *, decision: str = "resume") -> None:
        self.first = begun()
        self.first.run(ORDERS)
        if cause == WORKER_LOST:
            self.first.start(DAILY)
        else:
            self.first.start(DAILY)
            self.first.cancel(Reason.HANDED_OVER)
            self.first.interrupt()
            self.first.end(Ended.RESULT, final=False, stop=Reason.HANDED_OVER)
        closer = Normalizer(context(worker="w2", fence=8))
        closer.recall(self.first.events)
        at = self.first.now + timedelta(seconds=90)
        self.closing = closer.leased(cause, at, decision=decision, previous_worker="w1")
        ending = Ending(how=Ended.WORKER_LOST)
        self.closing += closer.end(ending, at=at, final=decision == "fail")

    @property
    def before(self) -> list[AnyEvent]:
        return [*self.first.events, *self.closing]

    def first_spans(self) -> list[Span]:
        """What the worker told, and what its successor did in its stead."""
        live = spans_of(self.first.events, context())
        return live + spans_of(self.closing, context(worker="w2", fence=8), self.first.events)

    def resumed(self) -> tuple[Story, list[Span]]:
        seq = self.before[-1].seq + 1
        story = Story(attempt=2, fence=8, worker="w2", first_seq=seq)
        story.now = self.before[-1].time + timedelta(seconds=2)
        story.normalizer = Normalizer(context(attempt=2, fence=8, worker="w2"))
        story.normalizer.recall(self.before)
        story.normalizer.spawned(story.now)
        story.plan(node(TEST, ORDERS), node(DAILY, ORDERS))
        story.run(TEST, "pass")
        story.run(DAILY)
        story.result(0)
        story.events += story.normalizer.end(Ending(how=Ended.RESULT), at=story.now)
        return story, spans_of(story.events, context(attempt=2), self.before)


def test_a_lost_attempt_is_told_by_the_one_that_takes_over() -> None:
    loss = Loss(WORKER_LOST)
    spans = loss.first_spans()

    assert tree(spans) == [
        "dbt build shop CONSUMER ERROR worker_lost",
        *failed_child("worker_lost"),
        "      model orders [success]",
        "      model daily [lost] ERROR worker_lost",
        "      test unique_orders [never_started]",
    ]
    check_spans(loss.before, spans)
    run = spans[[s.kind for s in spans].index("consumer")]
    assert run.attributes["dbtstream.worker"] == "w1"
    assert run.error == "worker w1 was lost"


def test_the_attempt_that_resumes_is_a_tree_of_its_own_in_the_same_trace() -> None:
    loss = Loss(WORKER_LOST)
    story, spans = loss.resumed()

    assert tree(spans) == [
        "dbt build shop CONSUMER [success]",
        *UNTIL_EXECUTE,
        "      test unique_orders [success]",
        "      model daily [success]",
        "    finalize",
    ]
    check_spans(story.events, spans)
    assert {s.trace_id for s in spans} == {s.trace_id for s in loss.first_spans()}
    (run,) = [s for s in spans if s.kind == "consumer"]
    assert [(link.attributes["dbtstream.link.type"], link.span_id) for link in run.links] == [
        ("previous_attempt", span_id_of(RUN_ID, 1, "run"))
    ]
    # It has not waited since the request was made, but since the other one was lost.
    lost_at = loss.closing[0].time
    assert run.start_ns == round(lost_at.timestamp() * 1e6) * 1000


def test_a_node_links_to_its_upstreams_in_the_attempts_in_which_they_ran() -> None:
    _, spans = Loss(WORKER_LOST).resumed()
    (daily,) = [s for s in spans if s.name == "model daily"]

    assert [(link.attributes["dbtstream.link.type"], link.span_id) for link in daily.links] == [
        ("upstream", span_id_of(RUN_ID, 1, "node", ORDERS))
    ]


def test_an_attempt_that_was_handed_over_is_no_error() -> None:
    loss = Loss(HANDED_OVER)
    spans = loss.first_spans()

    assert tree(spans) == [
        "dbt build shop CONSUMER",
        *UNTIL_EXECUTE,
        "      model orders [success]",
        "      model daily [cancelled]",
        "      test unique_orders [never_started]",
    ]
    (run,) = [s for s in spans if s.kind == "consumer"]
    assert run.attributes["dbtstream.attempt.end"] == "handed_over"
    assert run.end_ns == round(loss.first.events[-1].time.timestamp() * 1e6) * 1000


def test_a_lost_run_that_does_not_go_on_has_one_run_span() -> None:
    loss = Loss(WORKER_LOST, decision="fail")
    spans = loss.first_spans()

    assert tree(spans)[0] == "dbt build shop CONSUMER [lost] ERROR worker_lost"
    check_spans(loss.before, spans)


def test_a_taken_over_attempt_can_be_replayed_too() -> None:
    loss = Loss(WORKER_LOST)
    _, resumed = loss.resumed()
    first = spans_of(replayed(loss.before), context())

    assert {s.span_id: s for s in first} == {s.span_id: s for s in loss.first_spans()}
    assert not {s.span_id for s in first} & {s.span_id for s in resumed}


# Where it hangs.

REQUESTER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-{}"


def traced(how: str, flags: str = "01") -> tuple[Story, Span]:
    """As `execution` makes it, by the rule of `trace.run_trace_id`."""
    from dbtstream.trace import parse_traceparent, run_trace_id

    block = TraceBlock(traceparent=REQUESTER.format(flags), tracestate="rojo=00f067aa0ba902b7")
    parent = parse_traceparent(block.traceparent)
    of_run = context(trace=block, trace_id=run_trace_id(RUN_ID, parent, how))  # type: ignore[arg-type]
    story = Story(trace=block, trace_id=of_run.trace_id)
    story.plan(node(ORDERS))
    story.run(ORDERS)
    story.result(0)
    story.end()
    spans = spans_of(story.events, of_run, trace_context=how)
    check_spans(story.events, spans)
    (run,) = [s for s in spans if s.kind == "consumer"]
    return story, run


def test_a_run_is_a_child_of_its_requester_and_links_to_it() -> None:
    story, run = traced("parent")

    assert run.trace_id == story.events[0].trace_id == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert (run.parent_span_id, run.parent_is_remote) == ("00f067aa0ba902b7", True)
    assert run.tracestate == "rojo=00f067aa0ba902b7"
    (link,) = run.links
    assert link.attributes == {"dbtstream.link.type": "request"}
    assert (link.trace_id, link.span_id) == (run.trace_id, run.parent_span_id)


@pytest.mark.parametrize(("how", "flags"), [("link", "01"), ("link", "03"), ("parent", "00")])
def test_a_run_may_have_a_trace_of_its_own_that_links_to_its_requester(
    how: str, flags: str
) -> None:
    """A requester that is not sampled would take the run's spans with it."""
    story, run = traced(how, flags)

    assert run.trace_id == story.events[0].trace_id == RUN_ID.replace("-", "")
    assert run.parent_span_id is None
    assert run.tracestate == ""
    (link,) = run.links
    assert (link.trace_id, link.span_id, link.tracestate) == (
        "4bf92f3577b34da6a3ce929d0e0e4736",
        "00f067aa0ba902b7",
        "rojo=00f067aa0ba902b7",
    )


def test_a_requesters_trace_may_be_ignored() -> None:
    _, run = traced("ignore")

    assert run.trace_id == RUN_ID.replace("-", "")
    assert run.links == []
