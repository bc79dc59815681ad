"""What a node's events say: kinds of nodes, and dbt's values read into the contract's."""

import time
from datetime import UTC, datetime, timedelta

import pytest

from dbtstream import frames
from dbtstream.dbt_values import amount, block_from_id, clean, cut, dbt_time, seconds_of
from dbtstream.endings import Ended
from dbtstream.event_base import MAX_TEXT_BYTES, Relation
from dbtstream.events import BatchResults, NodeBatch, NodeFinished, NodeStarted
from tests.stories import Story, node

RAW, ORDERS = "model.shop.raw", "model.shop.orders"
SOURCE = "source.shop.raw.orders"


def test_an_ephemeral_model_has_its_events_and_needs_no_result() -> None:
    """dbt returns nothing of it, and the run is verified all the same."""
    story = Story()
    story.plan(node(RAW, materialized="ephemeral"), node(ORDERS, RAW))
    story.run(RAW)
    story.run(ORDERS)
    story.result(0)
    story.end()

    assert story.statuses() == {"raw": "success", "orders": "success"}
    assert story.finished.verified


def test_a_child_of_a_broken_ephemeral_model_is_skipped_because_of_it() -> None:
    """LogSkipBecauseError instead of SkippingDetails: no NodeSkip comes."""
    story = Story()
    story.plan(node(RAW, materialized="ephemeral"), node(ORDERS, RAW))
    story.fail(RAW, "Compilation Error in model raw (models/raw.sql)\n  no")
    story.open(ORDERS)
    story.finish(ORDERS, "skipped", message="Compilation Error in ..., caused by ...")
    story.result(1)
    story.end()

    end = story.end_of(ORDERS)
    assert (end.status, end.root_causes) == ("skipped", [RAW])
    assert end.error is None
    assert end.message is not None
    assert end.message.startswith("Compilation Error")


@pytest.mark.parametrize("unique_id", ["exposure.shop.board", "saved_query.shop.daily"])
def test_what_does_no_work_does_not_start(unique_id: str) -> None:
    """dbt fires NodeCompiling for these too."""
    story = Story()
    story.plan(node(unique_id))
    story.run(unique_id, "no-op")
    story.result(0)
    story.end()

    assert story.end_of(unique_id).status == "no_op"
    assert story.start_of(unique_id) is None


def test_a_singular_test_has_failures_and_no_attached_node() -> None:
    story = Story()
    story.plan(node("test.shop.no_negative_amounts", RAW, test=None))
    story.run("test.shop.no_negative_amounts", "fail", failures=3)
    story.result(1)
    story.end()

    end = story.end_of("test.shop.no_negative_amounts")
    assert (end.failures, end.test) == (3, None)


def test_a_model_has_no_failures() -> None:
    """In dbt's message it is 0 for everything."""
    story = Story()
    story.plan(node(RAW))
    story.run(RAW, failures=0)
    story.result(0)
    story.end()

    assert story.end_of(RAW).failures is None


def test_a_node_starts_once_and_when_it_works() -> None:
    story = Story()
    story.plan(node(RAW))
    story.open(RAW)
    assert story.start_of(RAW) is None, "it might yet be skipped"
    story.tell(frames.NodeWork, unique_id=RAW, index=3, total=9)
    story.tell(frames.NodeWork, unique_id=RAW)
    story.finish(RAW)
    story.result(0)
    story.end()

    (start,) = story.all(NodeStarted)
    assert (start.index, start.total, start.thread) == (3, 9, "Thread-1 (worker)")


def test_the_wait_of_a_ready_node_counts_from_its_last_upstream() -> None:
    """Frames are a tenth of a second apart."""
    story = Story()
    story.plan(node(RAW), node("model.shop.side"), node(ORDERS, RAW, "model.shop.side"))
    story.start("model.shop.side")  # plan + 0.2
    story.start(RAW)
    story.finish("model.shop.side")
    story.finish(RAW)
    story.open(ORDERS)
    story.tell(frames.NodeWork, unique_id=ORDERS)
    story.finish(ORDERS)
    story.result(0)
    story.end()

    waits = {s.node.name: s.ready_wait_s for s in story.all(NodeStarted)}
    assert waits == {
        "side": pytest.approx(0.2),
        "raw": pytest.approx(0.4),
        "orders": pytest.approx(0.2),
    }


def test_a_second_finish_of_a_node_is_not_told() -> None:
    story = Story()
    story.plan(node(RAW))
    story.run(RAW)
    story.finish(RAW, "error", message="late")
    story.returns(RAW, "success")
    story.result(0)
    story.end()

    assert story.end_of(RAW).status == "success"


# Microbatch


def batch(story: Story, index: int, status: str | None, thread: str = "Thread-1 (worker)") -> None:
    """The frames of one batch; None: its thread raised, so it has no end."""
    began = story.now.replace(tzinfo=None).isoformat()
    day = datetime(2024, 1, index, tzinfo=UTC)
    story.tell(frames.NodeStart, unique_id=RAW, thread=thread, started_at=began)
    story.tell(frames.BatchStart, unique_id=RAW, index=index, total=3)
    story.tell(frames.NodeWork, unique_id=RAW)
    if status is None:
        story.error(RAW, "Exception on worker thread. no")
        return
    story.tell(
        frames.BatchFinish,
        unique_id=RAW,
        index=index,
        total=3,
        status=status,
        execution_s=0.5,
        event_time_start=day.isoformat(),
        event_time_end=(day + timedelta(days=1)).isoformat(),
    )
    story.tell(frames.NodeFinish, unique_id=RAW, status=status, thread=thread, started_at=began)


def test_batches_are_told_and_the_model_ends_once() -> None:
    story = Story()
    story.plan(node(RAW, materialized="incremental"))
    story.start(RAW)
    batch(story, 1, "success")
    batch(story, 2, "error", "Thread-2 (worker)")
    batch(story, 3, "skipped")
    assert story.ends() == []
    story.finish(RAW, "partial success", message="PARTIAL SUCCESS (1/3)")
    story.result(1)
    story.end()

    assert [(b.index, b.status) for b in story.all(NodeBatch)] == [
        (1, "success"),
        (2, "error"),
        (3, "skipped"),
    ]
    spans = {b.span_id for b in story.all(NodeBatch)} | {story.end_of(RAW).span_id}
    assert len(spans) == 4
    end = story.end_of(RAW)
    assert end.status == "partial_success"
    assert end.batch_results is not None
    assert [start[:10] for start, _ in end.batch_results.successful] == ["2024-01-01"]
    assert [start[:10] for start, _ in end.batch_results.failed] == ["2024-01-02", "2024-01-03"]
    assert story.finished.failed_count == 1


def test_batches_may_overlap() -> None:
    story = Story()
    story.plan(node(RAW, materialized="incremental"))
    story.start(RAW)
    for thread in ("Thread-2 (worker)", "Thread-3 (worker)"):
        began = story.now.replace(tzinfo=None).isoformat()
        story.tell(frames.NodeStart, unique_id=RAW, thread=thread, started_at=began)
    for _ in range(2):
        story.tell(
            frames.NodeFinish, unique_id=RAW, status="success", started_at="2024-01-01T00:00:00"
        )
    assert story.ends() == []
    story.finish(RAW)
    story.result(0)
    story.end()

    assert story.end_of(RAW).status == "success"


def test_a_batch_whose_thread_raised_does_not_swallow_the_models_end() -> None:
    """It never finishes; the model's own finish has the start time of the model."""
    story = Story()
    story.plan(node(RAW, materialized="incremental"))
    story.start(RAW)
    batch(story, 1, "success")
    batch(story, 2, None)
    made = len(story.events)
    story.finish(RAW, "partial success")
    told_at_once = story.events[made:]
    story.result(1)
    story.end()

    assert [e for e in told_at_once if isinstance(e, NodeFinished)] == [story.end_of(RAW)]


def test_batch_results_come_from_dbt_where_no_finish_came() -> None:
    story = Story()
    story.plan(node(RAW, materialized="incremental"))
    story.start(RAW)
    batch(story, 1, None)
    from_dbt = BatchResults(failed=[["a", "b"]])
    story.returns(RAW, "error", batch_results=from_dbt, message="Exception on worker thread")
    story.result(1)
    story.end()

    assert story.end_of(RAW).batch_results == from_dbt


def test_a_child_that_dies_within_a_batch_loses_the_model() -> None:
    story = Story()
    story.plan(node(RAW, materialized="incremental"))
    story.start(RAW)
    batch(story, 1, "success")
    batch(story, 2, None)
    story.end(Ended.CRASHED)

    assert story.statuses() == {"raw": "lost/child_killed"}


# Freshness


def test_the_end_of_a_source_waits_for_its_ages() -> None:
    story = Story(command="source")
    story.plan(node(SOURCE, name="orders"))
    story.run(SOURCE, "warn")
    assert story.ends() == []
    story.returns(
        SOURCE,
        "warn",
        freshness=frames.Freshness(
            max_loaded_at="2026-03-01T00:00:00+01:00",
            snapshotted_at="2026-03-01T12:00:00Z",
            age_s=43200.0,
            warn_after_s=3600.0,
        ),
    )
    story.result(0)
    assert len(story.ends()) == 1, "with the results, not only at the end"
    story.end()

    freshness = story.end_of(SOURCE).freshness
    assert freshness is not None
    assert freshness.max_loaded_at == datetime(2026, 2, 28, 23, tzinfo=UTC)
    assert freshness.snapshotted_at == datetime(2026, 3, 1, 12, tzinfo=UTC)
    assert (freshness.age_s, freshness.warn_after_s, freshness.error_after_s) == (43200, 3600, None)


def test_a_source_that_was_checked_keeps_its_verdict_when_the_child_dies() -> None:
    story = Story(command="source")
    story.plan(node(SOURCE, name="orders"), node("source.shop.raw.late", name="late"))
    story.run(SOURCE, "pass")
    story.start("source.shop.raw.late")
    story.end(Ended.CRASHED)

    assert story.statuses() == {"orders": "success", "late": "lost/child_killed"}
    assert story.end_of(SOURCE).freshness is None


def test_a_stale_source_stays_stale_while_dbt_stops() -> None:
    """The check was made; what a cancel makes of a check is a `runtime error`."""
    story = Story(command="source")
    story.plan(node(SOURCE, name="orders"), node("source.shop.raw.late", name="late"))
    story.start("source.shop.raw.late")
    story.start(SOURCE)
    story.cancel()
    story.finish(SOURCE, "error")
    story.finish("source.shop.raw.late", "runtime error", message="Interrupted")
    story.interrupt()
    story.end()

    assert story.statuses() == {"orders": "error", "late": "cancelled/cancelled"}


# Nodes of which the plan says nothing


@pytest.mark.parametrize(
    ("unique_id", "resource_type", "package", "name", "version"),
    [
        ("model.shop.orders", "model", "shop", "orders", None),
        ("model.shop.customers.v2", "model", "shop", "customers", "2"),
        ("test.shop.not_null_orders_id.84ef11d8fe", "test", "shop", "not_null_orders_id", None),
        ("test.shop.no_negative_amounts", "test", "shop", "no_negative_amounts", None),
        ("unit_test.shop.orders.adds_up", "unit_test", "shop", "adds_up", None),
        ("source.shop.raw.orders", "source", "shop", "orders", None),
        ("operation.shop.shop-on-run-end-0", "operation", "shop", "shop-on-run-end-0", None),
        ("seed.shop.countries", "seed", "shop", "countries", None),
        ("oddity", "oddity", None, "oddity", None),
    ],
)
def test_an_id_alone_gives_a_block(
    unique_id: str, resource_type: str, package: str | None, name: str, version: str | None
) -> None:
    block = block_from_id(unique_id)

    assert (block.resource_type, block.package_name, block.name, block.version) == (
        resource_type,
        package,
        name,
        version,
    )
    assert block.block_status == "from_event"


def test_without_a_plan_nodes_are_known_by_their_ids() -> None:
    story = Story()
    story.plan(status="unavailable: no manifest")
    story.run(ORDERS)
    story.start(RAW)
    story.end(Ended.CRASHED)

    assert story.end_of(ORDERS).node.block_status == "from_event"
    assert story.statuses() == {"orders": "success", "raw": "lost/child_killed"}


# dbt's values


def test_an_end_has_its_times_and_durations() -> None:
    story = Story()
    story.plan(node(RAW))
    story.start(RAW)
    story.finish(
        RAW,
        started_at="2026-03-01T12:00:00.500000",
        finished_at="2026-03-01T12:00:04",
        timing=[
            {
                "name": "compile",
                "started_at": "2026-03-01T12:00:00.500000",
                "completed_at": "2026-03-01T12:00:01",
            },
            {
                "name": "execute",
                "started_at": "2026-03-01T12:00:01",
                "completed_at": "2026-03-01T12:00:03.250000",
            },
        ],
    )
    story.result(0)
    story.end()

    end = story.end_of(RAW)
    assert end.started_at == datetime(2026, 3, 1, 12, 0, 0, 500000, tzinfo=UTC)
    assert end.finished_at == datetime(2026, 3, 1, 12, 0, 4, tzinfo=UTC)
    assert (end.compile_s, end.execute_s) == (0.5, 2.25)
    assert [(s.unique_id, s.elapsed_s) for s in story.finished.slowest] == [(RAW, 2.25)]


@pytest.mark.parametrize("text", [None, "", "None", "yesterday", "2026-13-01T00:00:00", "0"])
def test_a_time_that_is_none_costs_nothing(text: str | None) -> None:
    assert dbt_time(text) is None


def test_a_time_without_a_zone_is_utc_wherever_we_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert dbt_time("2026-03-01T12:00:00") == datetime(2026, 3, 1, 12, tzinfo=UTC)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_time_with_a_zone_is_told_in_utc() -> None:
    assert dbt_time("2026-03-01T12:00:00+02:00") == datetime(2026, 3, 1, 10, tzinfo=UTC)
    assert dbt_time("0001-01-01T00:00:00+02:00") is None, "before the first UTC year"


def test_a_timing_without_an_end_has_no_duration() -> None:
    began = "2026-03-01T12:00:00"
    assert seconds_of([frames.Timing(name="execute", started_at=began)], "execute") is None
    assert seconds_of([], "execute") is None


@pytest.mark.parametrize(
    ("response", "rows", "size", "query_id"),
    [
        ({"_message": "SELECT 3", "rows_affected": 3.0}, 3, None, None),
        ({"rows_affected": -1, "query_id": "01b2"}, None, None, "01b2"),
        ({"bytes_processed": 10.0, "bytes_billed": 20.0, "job_id": "j-1"}, None, 10, "j-1"),
        ({"bytes_billed": 20, "rows_affected": "many"}, None, 20, None),
        ({"rows_affected": True, "query_id": ""}, None, None, None),
    ],
)
def test_what_adapters_say_is_read_by_key(
    response: dict[str, object], rows: int | None, size: int | None, query_id: str | None
) -> None:
    story = Story()
    story.plan(node(RAW))
    story.run(RAW, adapter_response=response)
    story.result(0)
    story.end()

    end = story.end_of(RAW)
    assert (end.rows_affected, end.bytes_processed, end.query_id) == (rows, size, query_id)
    assert end.adapter_response == response


def test_a_count_that_is_no_number_is_unknown() -> None:
    assert amount({"rows_affected": float("nan")}, "rows_affected") is None
    assert amount({"rows_affected": float("inf")}, "rows_affected") is None


def test_a_relation_is_the_events_else_the_plans() -> None:
    built = Relation(
        database="db", schema="dev", identifier="raw", relation_name='"db"."dev"."raw"'
    )
    story = Story()
    story.plan(node(RAW), node(ORDERS))
    story.run(RAW, relation=built)
    story.run(ORDERS)
    story.result(0)
    story.end()

    assert story.end_of(RAW).relation == built
    assert story.end_of(ORDERS).relation == Relation(
        database="db", schema="main", identifier="orders"
    )


def test_a_long_message_is_cut_and_says_so() -> None:
    story = Story()
    story.plan(node(RAW), node(ORDERS))
    story.fail(RAW, "Database Error in model raw\n" + "é" * MAX_TEXT_BYTES)
    story.run(ORDERS, message="cut by dbt's process", truncated=True)
    story.result(1)
    story.end()

    end = story.end_of(RAW)
    assert end.message is not None
    assert end.error is not None
    assert end.truncated
    assert end.error.truncated
    assert len(end.message.encode()) <= MAX_TEXT_BYTES
    assert story.end_of(ORDERS).truncated
    (failed,) = story.finished.failed
    assert failed.message is not None
    assert len(failed.message.encode()) <= 1024


def test_cutting_leaves_whole_characters() -> None:
    assert cut("äöü", 3) == ("ä", True)
    assert cut("äöü", 6) == ("äöü", False)
    assert clean("\n\x1b[31mred\x1b[0m\n") == ("red", False)
    assert clean("") == (None, False)


@pytest.mark.parametrize(
    ("message", "error_class"),
    [
        ("Database Error in model raw (models/raw.sql)\n  no", "Database Error"),
        ("Compilation Error in model raw", "Compilation Error"),
        ("no such file in folder", "Unknown"),
    ],
)
def test_an_error_that_was_not_seen_is_named_by_its_message(message: str, error_class: str) -> None:
    story = Story()
    story.plan(node(RAW))
    story.run(RAW, "error", message=message)
    story.result(1)
    story.end()

    error = story.end_of(RAW).error
    assert error is not None
    assert (error.class_, error.message) == (error_class, message)


def test_the_first_error_of_a_node_is_its_cause() -> None:
    story = Story()
    story.plan(node(RAW))
    story.start(RAW)
    story.error(RAW, "the cause", "DbtDatabaseError")
    story.error(RAW, "and what followed", "Exception")
    story.finish(RAW, "error", message="the cause")
    story.result(1)
    story.end()

    error = story.end_of(RAW).error
    assert error is not None
    assert error.message == "the cause"
