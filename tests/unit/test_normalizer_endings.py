"""Every way in which a run can end, and what becomes of each node then.

Each story ends with a check of all guarantees (`Story.end`).
"""

from typing import Any

import pytest

from dbtstream import frames
from dbtstream.endings import Ended, Ending
from dbtstream.errors import ChildCrashed, ChildNotStarted, EngineRefused, HandshakeTimeout
from dbtstream.event_base import ErrorBlock
from dbtstream.events import LogLine, RunCancel, RunFinished
from dbtstream.normalizer import Normalizer
from dbtstream.statuses import Reason, RunStatus
from tests.stories import BEGIN, Story, context, node

RAW, ORDERS, DAILY = "model.shop.raw", "model.shop.orders", "model.shop.daily"
SIDE = "model.shop.side"
UNIQUE = "test.shop.unique_orders.1a2b"
START_HOOK = "operation.shop.shop-on-run-start-0"

CHAIN = (node(RAW), node(ORDERS, RAW), node(DAILY, ORDERS))


def boom(error_class: str = "DbtRuntimeError") -> frames.ErrorInfo:
    return frames.ErrorInfo(error_class=error_class, message="Runtime Error\n  no", code="10001")


def test_all_is_well() -> None:
    story = Story()
    story.plan(*CHAIN)
    for unique_id in (RAW, ORDERS, DAILY):
        story.run(unique_id)
    story.result(0)
    story.end()

    assert [kind for kind in story.kinds() if kind != "run.progress"] == [
        "run.started",
        "run.planned",
        *["node.started", "node.finished"] * 3,
        "run.finished",
    ]
    assert story.finished.status is RunStatus.SUCCESS
    assert story.finished.counts == {"model": {"success": 3}}
    assert story.finished.verified


def test_a_failed_node_skips_what_is_downstream_and_is_named_as_the_cause() -> None:
    story = Story()
    story.plan(*CHAIN, node(SIDE))
    story.fail(RAW, "Database Error in model raw (models/raw.sql)\n  no such table")
    story.run(SIDE)
    story.skip(ORDERS)
    story.skip(DAILY)
    story.result(1)
    story.end()

    assert story.statuses() == {
        "raw": "error",
        "side": "success",
        "orders": "skipped/upstream_failed",
        "daily": "skipped/upstream_failed",
    }
    assert story.end_of(ORDERS).root_causes == [RAW]
    assert story.end_of(DAILY).root_causes == [RAW]
    error = story.end_of(RAW).error
    assert error is not None
    assert (error.class_, error.dbt_code) == ("DbtDatabaseError", "10003")
    assert story.finished.status is RunStatus.FAILURE
    assert [f.unique_id for f in story.finished.failed] == [RAW]
    assert story.finished.verified


def test_a_node_skipped_for_two_reasons_names_both() -> None:
    story = Story()
    story.plan(node(RAW), node(SIDE), node(ORDERS, RAW, SIDE), node(DAILY, ORDERS))
    story.fail(RAW)
    story.fail(SIDE)
    story.skip(ORDERS)
    story.skip(DAILY)
    story.result(1)
    story.end()

    assert story.end_of(DAILY).root_causes == [RAW, SIDE]


def test_only_the_nearest_failed_node_is_a_cause() -> None:
    """With `on_error: continue` (1.12) a node runs after a failed one, and may fail itself."""
    story = Story()
    story.plan(*CHAIN)
    story.fail(RAW)
    story.fail(ORDERS)
    story.skip(DAILY)
    story.result(1)
    story.end()

    assert story.end_of(DAILY).root_causes == [ORDERS]


@pytest.mark.parametrize("word", ["fail", "error"])
def test_in_build_a_failed_test_is_the_cause_of_what_it_blocks(word: str) -> None:
    """dbt's rule: what descends from all that the test looks at."""
    story = Story()
    story.plan(*CHAIN, node(SIDE, RAW), node(UNIQUE, ORDERS))
    story.run(RAW)
    story.run(ORDERS)
    story.run(SIDE)
    story.run(UNIQUE, word, failures=2)
    story.skip(DAILY)
    story.result(1)
    story.end()

    assert story.end_of(UNIQUE).status == word
    assert story.end_of(DAILY).root_causes == [UNIQUE]


def test_a_test_of_two_models_blocks_only_what_descends_from_both() -> None:
    """LEAF descends from one of the two, and is skipped for another cause alone."""
    other, both, leaf = "model.shop.other", "test.shop.relationships.9f", "model.shop.leaf"
    story = Story()
    story.plan(
        node(RAW),
        node(other),
        node(both, RAW, other),
        node(SIDE, RAW),
        node(leaf, SIDE),
        node(DAILY, SIDE, other),
    )
    story.run(RAW)
    story.run(other)
    story.fail(SIDE)
    story.run(both, "fail", failures=1)
    story.skip(leaf)
    story.skip(DAILY)
    story.result(1)
    story.end()

    assert story.end_of(DAILY).root_causes == [SIDE, both]
    assert story.end_of(leaf).root_causes == [SIDE]


def test_a_failed_test_is_no_cause_where_its_model_did_not_let_anything_through() -> None:
    """SIDE descends from RAW alone, so a failing test of ORDERS has no part in its skip."""
    story = Story()
    story.plan(node(RAW), node(ORDERS), node(SIDE, RAW), node(UNIQUE, ORDERS))
    story.run(ORDERS)
    story.run(UNIQUE, "fail", failures=1)
    story.fail(RAW)
    story.skip(SIDE)
    story.result(1)
    story.end()

    assert story.end_of(SIDE).root_causes == [RAW]


def test_a_test_that_warns_blocks_nothing() -> None:
    story = Story()
    story.plan(*CHAIN, node(UNIQUE, RAW))
    story.run(RAW)
    story.run(UNIQUE, "warn", failures=3)
    story.run(ORDERS)
    story.run(DAILY)
    story.result(0)
    story.end()

    assert story.end_of(UNIQUE).failures == 3
    assert story.finished.status is RunStatus.SUCCESS


def test_a_cause_is_found_through_nodes_that_are_not_selected() -> None:
    """`build --select raw daily`: orders lies between them, and is known but not run."""
    story = Story()
    story.plan(node(RAW), node(SIDE), node(DAILY, ORDERS), others=(node(ORDERS, RAW),))
    story.fail(SIDE)
    story.fail(RAW)
    story.skip(DAILY)
    story.result(1)
    story.end()

    assert story.end_of(DAILY).root_causes == [RAW]


def test_the_only_failed_node_is_the_cause_where_the_graph_between_is_not_known() -> None:
    story = Story()
    story.plan(node(RAW), node(DAILY, ORDERS))
    story.fail(RAW)
    story.skip(DAILY)
    story.result(1)
    story.end()

    assert story.end_of(DAILY).root_causes == [RAW]


def test_a_failed_unit_test_is_the_cause_that_its_model_is_skipped() -> None:
    """It runs before its model, on which it depends."""
    unit = "unit_test.shop.orders.adds_up"
    story = Story()
    story.plan(*CHAIN, node(unit, ORDERS, name="adds_up"))
    story.run(RAW)
    story.run(unit, "fail", message="\x1b[31mactual\x1b[0m differs", failures=1)
    story.skip(ORDERS)
    story.skip(DAILY)
    story.result(1)
    story.end()

    assert story.end_of(unit).message == "actual differs"
    assert story.end_of(unit).failures == 1
    assert story.end_of(ORDERS).root_causes == [unit]
    assert story.end_of(DAILY).root_causes == [unit]


def test_a_unit_test_is_skipped_for_what_its_model_is_skipped_for() -> None:
    unit = "unit_test.shop.orders.adds_up"
    story = Story()
    story.plan(*CHAIN, node(SIDE), node(unit, ORDERS, name="adds_up"))
    story.fail(SIDE)
    story.fail(RAW)
    for unique_id in (unit, ORDERS, DAILY):
        story.skip(unique_id)
    story.result(1)
    story.end()

    assert story.end_of(unit).root_causes == [RAW]
    assert story.end_of(DAILY).root_causes == [RAW]


def test_fail_fast_leaves_nodes_that_only_the_results_name() -> None:
    story = Story(args=["build", "--fail-fast"])
    story.plan(*CHAIN, node(SIDE))
    story.fail(RAW)
    story.tell(frames.QueryCancelled, connection=RAW)
    for unique_id in (ORDERS, DAILY, SIDE):
        story.returns(unique_id, "skipped", message="Skipping due to fail_fast")
    story.result(1)
    story.end()

    assert story.statuses() == {
        "raw": "error",
        "orders": "never_started/fail_fast",
        "daily": "never_started/fail_fast",
        "side": "never_started/fail_fast",
    }
    assert story.all(RunCancel) == [], "nobody cancelled this run"
    assert story.finished.status is RunStatus.FAILURE
    assert story.finished.verified


def test_a_node_that_fail_fast_interrupts_is_cancelled() -> None:
    """dbt cancels its query; its result says "skipped" as if it had never begun."""
    story = Story(args=["build", "--fail-fast"])
    story.plan(node(RAW), node(SIDE), node(ORDERS))
    story.start(SIDE)
    story.start(ORDERS)
    story.fail(RAW)
    story.tell(frames.QueryCancelled, connection=SIDE)
    story.error(SIDE, "INTERRUPT Error: Interrupted!")
    story.finish(SIDE, "error", message="INTERRUPT Error: Interrupted!")
    for unique_id in (SIDE, ORDERS):
        story.returns(unique_id, "skipped", message="Skipping due to fail_fast")
    story.result(1)
    story.end()

    assert story.statuses() == {
        "raw": "error",
        "side": "cancelled/fail_fast",
        "orders": "cancelled/fail_fast",
    }
    assert story.all(RunCancel) == [], "nobody cancelled this run"
    assert story.finished.verified


def test_a_failed_start_hook_keeps_nodes_from_starting() -> None:
    """With skip_nodes_if_on_run_start_fails, dbt fires SkippingDetails and nothing else."""
    story = Story()
    story.plan(*CHAIN, others=(node(START_HOOK, name="shop-on-run-start-0"),))
    story.hook(START_HOOK, "error")
    for unique_id in (RAW, ORDERS, DAILY):
        story.tell(frames.NodeSkip, unique_id=unique_id)
        story.returns(unique_id, "skipped")
    story.result(1)
    story.end()

    assert story.statuses() == {
        "shop-on-run-start-0": "error",
        "raw": "never_started/on_run_start_failed",
        "orders": "never_started/on_run_start_failed",
        "daily": "never_started/on_run_start_failed",
    }
    assert [f.unique_id for f in story.finished.failed] == [START_HOOK]
    assert story.finished.failed[0].message == f"{START_HOOK} error", "only the results say why"
    assert story.finished.verified


def test_a_start_hook_that_raises_ends_the_run_and_is_the_reason() -> None:
    """dbt 1.8: the exception leaves invoke, and the hook has no end."""
    story = Story()
    story.plan(*CHAIN, others=(node(START_HOOK, name="shop-on-run-start-0"),))
    story.tell(frames.HookStart, unique_id=START_HOOK, index=1, total=1)
    story.result(2, error=boom("DbtDatabaseError"))
    story.end()

    assert story.statuses() == {
        "shop-on-run-start-0": "error",
        "raw": "never_started/on_run_start_failed",
        "orders": "never_started/on_run_start_failed",
        "daily": "never_started/on_run_start_failed",
    }
    error = story.end_of(START_HOOK).error
    assert error is not None
    assert error.class_ == "DbtDatabaseError"
    assert story.finished.status is RunStatus.ERROR


def test_a_hook_that_dbt_leaves_without_its_end_has_failed() -> None:
    """dbt 1.8 fires no end for it and goes on to the nodes."""
    story = Story()
    story.plan(node(RAW), others=(node(START_HOOK, name="shop-on-run-start-0"),))
    story.tell(frames.HookStart, unique_id=START_HOOK, index=1, total=1)
    story.open(RAW)
    assert story.end_of(START_HOOK).status == "error", "at once, not only at the end"
    story.tell(frames.NodeWork, unique_id=RAW)
    story.finish(RAW)
    story.result(1)
    story.end()

    assert story.statuses() == {"shop-on-run-start-0": "error", "raw": "success"}


def test_hooks_after_a_failed_one_are_skipped_because_of_it() -> None:
    first, second = "operation.shop.shop-on-run-end-0", "operation.shop.shop-on-run-end-1"
    story = Story()
    story.plan(node(RAW), others=(node(first), node(second)))
    story.run(RAW)
    story.hook(first, "error")
    story.hook(second, "skipped")
    story.result(1)
    story.end()

    assert story.end_of(second).status == "skipped"
    assert story.end_of(second).root_causes == [first]
    assert story.finished.status is RunStatus.FAILURE


def test_a_project_that_does_not_compile_ends_before_the_plan() -> None:
    story = Story()
    story.hello()
    story.result(2, error=boom("CompilationError"))
    story.end()

    assert story.kinds() == ["run.started", "run.finished"]
    assert story.finished.status is RunStatus.ERROR
    assert story.finished.exit_code == 2
    assert story.finished.error == ErrorBlock(
        class_="CompilationError", message="Runtime Error\n  no", dbt_code="10001"
    )
    assert story.finished.verified_status == "no_results"


def test_a_usage_error_has_no_invocation() -> None:
    """dbt refuses the option before it fires its first event."""
    story = Story()
    story.tell(
        frames.Hello,
        protocol=1,
        pid=1,
        python_version="3.11.7",
        dbt_version="1.11.16",
        adapter_type=None,
        adapter_version=None,
    )
    story.result(
        2, error=frames.ErrorInfo(error_class="DbtUsageException", message="No such option")
    )
    story.end()

    assert story.finished.invocation_id is None
    assert story.finished.engine == "dbt-core 1.11.16"
    assert story.finished.status is RunStatus.ERROR


def test_an_error_after_the_plan_is_the_reason_for_what_never_started() -> None:
    """A duckdb file that is locked: dbt raises when it creates the schemas."""
    story = Story()
    story.plan(*CHAIN)
    story.result(2, error=boom())
    story.end()

    assert set(story.statuses().values()) == {"never_started/run_error"}
    assert story.finished.status is RunStatus.ERROR


def test_an_error_of_the_run_loses_what_was_in_flight() -> None:
    story = Story()
    story.plan(*CHAIN, node(SIDE))
    story.run(SIDE)
    story.start(RAW)
    story.result(2, error=boom())
    story.end()

    assert story.statuses() == {
        "side": "success",
        "raw": "lost/run_error",
        "orders": "never_started/run_error",
        "daily": "never_started/run_error",
    }


def test_an_interrupted_node_is_cancelled_and_the_rest_never_started() -> None:
    story = Story()
    story.plan(*CHAIN, node(SIDE))
    story.run(SIDE)
    story.start(RAW)
    story.cancel()
    for connection in (SIDE, RAW, "master"):
        story.tell(frames.QueryCancelled, connection=connection)
    story.error(RAW, "INTERRUPT Error: Interrupted!")
    story.finish(RAW, "error", message="INTERRUPT Error: Interrupted!")
    story.interrupt()
    story.end(stop=Reason.CANCELLED)

    assert story.statuses() == {
        "side": "success",
        "raw": "cancelled/cancelled",
        "orders": "never_started/cancelled",
        "daily": "never_started/cancelled",
    }
    end = story.end_of(RAW)
    assert (end.dbt_status, end.message) == ("error", "INTERRUPT Error: Interrupted!")
    rungs = [(e.step, e.by, e.reason, e.cancelled_queries) for e in story.all(RunCancel)]
    assert rungs == [
        ("requested", "ann", "wrong branch", []),
        ("interrupting", "ann", "wrong branch", []),
        # SIDE had ended: dbt names idle connections, too.
        ("interrupting", "ann", "wrong branch", [RAW, "master"]),
    ]
    assert story.finished.status is RunStatus.CANCELLED
    assert (story.finished.exit_code, story.finished.error) == (2, None)
    assert story.finished.verified_status == "no_results"


def test_cancelled_queries_come_with_the_next_rung() -> None:
    story = Story()
    story.plan(node(RAW))
    story.start(RAW)
    story.cancel()
    story.tell(frames.QueryCancelled, connection=RAW)
    story.events += story.normalizer.cancel_step("terminating", at=story.now, by="ann")
    story.end(Ended.CRASHED)

    assert [(e.step, e.cancelled_queries) for e in story.all(RunCancel)] == [
        ("requested", []),
        ("interrupting", []),
        ("terminating", [RAW]),
    ]


def test_a_rung_is_told_once() -> None:
    story = Story()
    story.plan(node(RAW))
    for _ in range(2):
        story.cancel()
    story.interrupt()
    story.end()

    assert [e.step for e in story.all(RunCancel)] == ["requested", "interrupting"]


def test_a_node_that_fails_by_itself_after_the_request_keeps_its_error() -> None:
    """The request is on its way; nothing was interrupted yet."""
    story = Story()
    story.plan(node(RAW), node(SIDE))
    story.start(SIDE)
    story.events += story.normalizer.cancel_step("requested", at=story.now, by="ann")
    story.fail(RAW)
    story.tell(frames.Cancelling, by="control")
    story.interrupt()
    story.end()

    assert story.statuses() == {"raw": "error", "side": "cancelled/cancelled"}


def test_a_test_that_says_no_while_dbt_stops_still_says_no() -> None:
    story = Story()
    story.plan(node(UNIQUE))
    story.start(UNIQUE)
    story.cancel()
    story.finish(UNIQUE, "fail", failures=1)
    story.interrupt()
    story.end()

    assert story.end_of(UNIQUE).status == "fail"


def test_a_run_that_finishes_before_it_can_be_cancelled_keeps_its_success() -> None:
    story = Story()
    story.plan(node(RAW))
    story.run(RAW)
    story.events += story.normalizer.cancel_step("requested", at=story.now, by="ann")
    story.result(0)
    story.end(stop=Reason.CANCELLED)

    assert story.finished.status is RunStatus.SUCCESS


def test_a_signal_from_outside_cancels_the_run() -> None:
    """Somebody sent SIGTERM to dbt; no request came through us."""
    story = Story()
    story.plan(node(RAW), node(ORDERS, RAW))
    story.start(RAW)
    story.tell(frames.Cancelling, by="sigterm")
    story.finish(RAW, "error", message="Interrupted")
    story.interrupt()
    story.end()

    assert story.statuses() == {"raw": "cancelled/cancelled", "orders": "never_started/cancelled"}
    assert [(e.step, e.by) for e in story.all(RunCancel)] == [("interrupting", "sigterm")]
    assert story.finished.status is RunStatus.CANCELLED


def test_a_run_that_dbt_leaves_by_itself_is_cancelled() -> None:
    """KeyboardInterrupt or SystemExit out of invoke, and nobody said why."""
    story = Story()
    story.plan(node(RAW), node(ORDERS, RAW))
    story.start(RAW)
    story.interrupt()
    story.end()

    assert story.statuses() == {"raw": "cancelled/cancelled", "orders": "never_started/cancelled"}
    assert story.finished.status is RunStatus.CANCELLED


def test_an_error_that_a_cancel_provoked_is_a_cancel() -> None:
    """Its connection is gone, and dbt raises on that before the interrupt arrives."""
    story = Story()
    story.plan(node(RAW), node(ORDERS, RAW))
    story.start(RAW)
    story.cancel()
    story.result(2, error=boom())
    story.end()

    assert story.statuses() == {"raw": "cancelled/cancelled", "orders": "never_started/cancelled"}
    assert story.finished.status is RunStatus.CANCELLED
    assert story.finished.error is not None


def test_a_hook_in_flight_is_cancelled_too() -> None:
    story = Story()
    story.plan(node(RAW), others=(node(START_HOOK),))
    story.tell(frames.HookStart, unique_id=START_HOOK, index=1, total=1)
    story.cancel()
    story.interrupt()
    story.end()

    assert story.end_of(START_HOOK).status == "cancelled"
    assert story.end_of(RAW).reason is Reason.CANCELLED


def test_a_timeout_is_told_apart_from_a_cancel() -> None:
    story = Story()
    story.plan(*CHAIN)
    story.start(RAW)
    story.cancel(Reason.TIMEOUT)
    story.finish(RAW, "error", message="Interrupted")
    story.interrupt()
    story.end(stop=Reason.TIMEOUT)

    assert story.statuses() == {
        "raw": "cancelled/timeout",
        "orders": "never_started/timeout",
        "daily": "never_started/timeout",
    }
    assert story.finished.status is RunStatus.TIMED_OUT


@pytest.mark.parametrize(
    ("fields", "in_flight", "rest", "run"),
    [
        ({}, "lost/child_killed", "never_started/child_killed", "error"),
        ({"oom": True}, "lost/oom", "never_started/oom", "error"),
        ({"stop": Reason.TIMEOUT}, "lost/timeout", "never_started/timeout", "timed_out"),
        ({"stop": Reason.CANCELLED}, "cancelled/cancelled", "never_started/cancelled", "cancelled"),
    ],
)
def test_a_child_that_dies_loses_what_was_in_flight(
    fields: dict[str, Any], in_flight: str, rest: str, run: str
) -> None:
    """Killed for a cancel, it is what was asked for; killed for anything else, it is a loss."""
    story = Story()
    story.plan(*CHAIN, node(SIDE))
    story.run(SIDE)
    story.open(RAW)
    story.tell(frames.NodeWork, unique_id=RAW)
    error = ErrorBlock(class_="ChildCrashed", message="dbt's process died (signal 9)")
    story.end(Ended.CRASHED, exit_code=-9, error=error, stderr_tail="Killed", **fields)

    assert story.statuses() == {"side": "success", "raw": in_flight, "orders": rest, "daily": rest}
    assert story.finished.status == run
    assert story.finished.exit_code == 2
    assert story.finished.stderr_tail == "Killed"
    if in_flight.startswith("lost"):
        assert story.end_of(RAW).error == error
        assert story.finished.failed[0].unique_id == RAW


def test_a_node_that_dbt_took_up_but_did_not_begin_never_started() -> None:
    """NodeStart alone: dbt might have skipped it in the next moment."""
    story = Story()
    story.plan(node(RAW))
    story.open(RAW)
    story.end(Ended.CRASHED)

    assert story.statuses() == {"raw": "never_started/child_killed"}


def test_a_hook_in_flight_when_the_child_dies_has_its_end_and_others_owe_none() -> None:
    end_hook = "operation.shop.shop-on-run-end-0"
    story = Story()
    story.plan(node(RAW), others=(node(START_HOOK), node(end_hook)))
    story.tell(frames.HookStart, unique_id=START_HOOK, index=1, total=1)
    story.end(Ended.CRASHED)

    assert {e.node.unique_id: e.status for e in story.ends()} == {
        START_HOOK: "lost",
        RAW: "never_started",
    }


def test_a_child_that_dies_after_its_result_has_done_its_run() -> None:
    story = Story()
    story.plan(node(RAW))
    story.run(RAW)
    story.result(0)
    story.end(Ended.CRASHED, exit_code=-11)

    assert story.finished.status is RunStatus.SUCCESS
    assert story.finished.error is None


def test_a_child_that_dies_between_nodes_and_plan_owes_the_nodes_that_it_named() -> None:
    story = Story()
    story.hello()
    story.tell(frames.Nodes, nodes=[node(RAW), node(ORDERS, RAW)])
    story.end(Ended.CRASHED)

    assert "run.planned" not in story.kinds()
    assert story.statuses() == {
        "raw": "never_started/child_killed",
        "orders": "never_started/child_killed",
    }


@pytest.mark.parametrize(
    ("error", "tail"),
    [
        (HandshakeTimeout(60, "stuck in import"), "stuck in import"),
        (ChildNotStarted("/venv/bin/python", "no such file"), None),
        (EngineRefused("dbt_2x", "dbt 2.0.1 refuses callbacks", "dbt-core 2.0.1"), None),
    ],
)
def test_a_child_that_never_said_hello_ends_the_run_with_its_error(
    error: HandshakeTimeout | ChildNotStarted | EngineRefused, tail: str | None
) -> None:
    normalizer = Normalizer(context())
    normalizer.spawned(BEGIN)
    events = normalizer.queued(BEGIN)
    events += normalizer.end(Ending.of_error(error), at=BEGIN)

    finished = events[-1]
    assert isinstance(finished, RunFinished)
    assert [e.seq for e in events] == [1, 2]
    assert finished.status is RunStatus.ERROR
    assert finished.error == ErrorBlock(class_=type(error).__name__, message=str(error))
    assert finished.stderr_tail == tail
    assert finished.counts == {}


def test_a_refused_engine_is_named() -> None:
    story = Story()
    story.tell(frames.Refused, code="dbt_2x", message="no callbacks", engine="dbt-core 2.0.1")
    story.end(Ended.NOT_STARTED)

    assert story.finished.engine == "dbt-core 2.0.1"
    assert story.kinds() == ["run.finished"]


def test_a_run_that_is_cancelled_in_the_queue_never_had_a_child() -> None:
    normalizer = Normalizer(context())
    events = normalizer.queued(BEGIN)
    events += normalizer.cancel_step("requested", at=BEGIN, by="ann")
    events += normalizer.end(Ending(how=Ended.NOT_STARTED, stop=Reason.CANCELLED), at=BEGIN)

    finished = events[-1]
    assert isinstance(finished, RunFinished)
    assert finished.status is RunStatus.CANCELLED


def test_an_ending_keeps_the_facts_of_the_crash() -> None:
    error = ChildCrashed("died", exit_code=-9, stderr_tail="Killed")
    ending = Ending.of_error(error, oom=True, stop=Reason.TIMEOUT)

    assert ending == Ending(
        how=Ended.CRASHED,
        exit_code=-9,
        error=ErrorBlock(class_="ChildCrashed", message=str(error)),
        oom=True,
        stderr_tail="Killed",
        stop=Reason.TIMEOUT,
    )


def test_a_vanished_worker_loses_what_was_in_flight() -> None:
    """Another worker knows the run from its published events alone, and ends the attempt."""
    first = Story()
    first.events += first.normalizer.queued(BEGIN)
    first.plan(*CHAIN, node(SIDE))
    first.run(SIDE)
    first.start(RAW)

    second = Normalizer(context(worker="w2", fence=8))
    second.recall(first.events)
    first.events += second.end(Ending(how=Ended.WORKER_LOST), at=first.now)

    assert first.statuses() == {
        "side": "success",
        "raw": "lost/worker_lost",
        "orders": "never_started/worker_lost",
        "daily": "never_started/worker_lost",
    }
    assert first.finished.status is RunStatus.LOST
    assert first.finished.engine == "dbt-core 1.11.16"
    assert first.finished.counts == {"model": {"success": 1, "lost": 1, "never_started": 2}}
    assert [e.seq for e in first.events] == list(range(1, len(first.events) + 1))


def test_a_run_that_goes_on_elsewhere_has_no_verdict_yet() -> None:
    """`final=False`: the attempt's nodes have their ends, the run has none."""
    story = Story()
    story.plan(node(RAW), node(ORDERS, RAW))
    story.start(RAW)
    story.end(Ended.WORKER_LOST, final=False)

    assert story.kinds()[-2:] == ["node.finished", "node.finished"]
    assert story.normalizer.last_seq == len(story.events)

    resumed = Story(attempt=2, fence=9, first_seq=story.normalizer.last_seq + 1)
    resumed.plan(node(RAW), node(ORDERS, RAW))
    resumed.run(RAW)
    resumed.run(ORDERS)
    resumed.result(0)
    resumed.end()
    assert resumed.finished.attempts == 2
    assert resumed.events[0].seq == story.events[-1].seq + 1


def test_a_run_that_has_ended_cannot_be_recalled() -> None:
    story = Story()
    story.plan(node(RAW))
    story.run(RAW)
    story.result(0)
    story.end()

    with pytest.raises(RuntimeError, match="has ended with event"):
        Normalizer(context()).recall(story.events)


def test_a_node_without_finish_event_has_its_result() -> None:
    """An exception on the worker thread gives no NodeFinished, but a result."""
    story = Story()
    story.plan(node(RAW), node(SIDE))
    story.start(RAW)
    story.error(RAW, "Exception on worker thread. no", "Exception")
    story.returns(RAW, "error", message="Exception on worker thread. no")
    story.returns(SIDE, "error", message="Exception on worker thread. neither")
    story.result(1)
    story.end()

    assert story.statuses() == {"raw": "error", "side": "error"}
    assert story.start_of(SIDE) is not None, "an error means that it had begun"
    error = story.end_of(SIDE).error
    assert error is not None
    assert error.class_ == "Unknown"
    assert story.finished.verified


def test_a_node_that_raised_ends_before_its_child_begins() -> None:
    """Guarantee 3, where dbt goes on after an error (1.12) and fires no NodeFinished."""
    story = Story()
    story.plan(node(RAW), node(ORDERS, RAW))
    story.start(RAW)
    story.error(RAW, "Exception on worker thread. no", "Exception")
    story.run(ORDERS)
    story.returns(RAW, "error", message="Exception on worker thread. no")
    story.result(1)
    story.end()

    assert story.statuses() == {"raw": "error", "orders": "success"}


def test_results_that_say_something_else_are_told() -> None:
    story = Story()
    story.plan(node(RAW), node(SIDE))
    story.run(RAW)
    story.run(SIDE)
    story.returns(RAW, "error")
    story.result(1)
    story.end()

    assert not story.finished.verified
    assert story.finished.verified_status == "differs: 1 nodes"
    (line,) = story.all(LogLine)
    assert (line.level, line.name) == ("warn", "ResultsDiffer")
    assert RAW in line.message
    assert SIDE not in line.message


def test_results_that_did_not_all_come_verify_nothing() -> None:
    story = Story()
    story.plan(node(RAW))
    story.run(RAW)
    story.tell(frames.Result, success=True, exit_code=0, result_count=1)
    story.end()

    assert not story.finished.verified
    assert story.finished.verified_status == "incomplete: 0 of 1 results came"


def test_nodes_that_dbt_forgets_are_not_forgotten() -> None:
    """dbt says that all is done and never spoke of these: their ends have no reason."""
    story = Story()
    story.plan(node(RAW), node(SIDE))
    story.start(RAW)
    story.result(0)
    story.end()

    assert story.statuses() == {"raw": "lost", "side": "never_started"}
    assert story.finished.status is RunStatus.FAILURE
    assert story.finished.exit_code == 1
