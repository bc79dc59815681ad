"""Spans and log records leave over OTLP, and a collector that is ill holds up nothing."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from dbtstream.config import OtlpConfig, TelemetryConfig
from dbtstream.events import AnyEvent, NodeBlock
from dbtstream.publishers import otlp_export
from dbtstream.publishers.otel import OtelExport
from tests.otlp_sink import Mood, OtlpSink, otlp_sink
from tests.stories import Story, context, node

ORDERS, DAILY, TEST = "model.shop.orders", "model.shop.daily", "test.shop.not_null.abc"
NO_TIME_LIMIT_S = 30.0


@pytest.fixture
def sink() -> Iterator[OtlpSink]:
    with otlp_sink() as running:
        yield running


@contextmanager
def exporting(sink: OtlpSink, **otlp: object) -> Iterator[OtelExport]:
    config = OtlpConfig(**({"endpoint": sink.url, "logs": True} | otlp))  # type: ignore[arg-type]
    export = OtelExport(
        TelemetryConfig(otlp=config), config, {"service.name": "dbtstream"}, None, {}
    )
    try:
        yield export
    finally:
        export.close(0.1)


def story() -> Story:
    told = Story()
    told.events += told.normalizer.queued(told.now)
    told.plan(node(ORDERS), node(DAILY, ORDERS), node(TEST, ORDERS))
    told.run(ORDERS)
    told.run(TEST, "fail", message="Got 2 results, configured to fail if != 0", failures=2)
    told.skip(DAILY)
    told.result(1)
    told.end(exit_code=1, pid=4711, exited_at=told.now)
    return told


def tell(export: OtelExport, events: list[AnyEvent]) -> None:
    attempt = export.observer.attempt(context())
    for event in events:
        attempt.take(event)


def test_spans_and_records_arrive(sink: OtlpSink) -> None:
    told = story()
    with exporting(sink, headers={"x-team": "data"}) as export:
        tell(export, told.events)
        export.close(NO_TIME_LIMIT_S)

    assert told.events[0].trace_id is not None
    assert sink.tree(told.events[0].trace_id) == [
        "dbt build shop CONSUMER [failure] ERROR nodes_failed",
        "  queue",
        "  dbt CLIENT",
        "    startup",
        "    parse",
        "    execute",
        "      model orders [success]",
        "      test not_null [fail] ERROR test_failed",
        "      model daily [skipped]",
        "    finalize",
    ]
    assert {span.resource["service.name"] for span in sink.spans} == {"dbtstream"}
    assert {span.scope for span in sink.spans} == {"dbtstream"}
    (failed,) = sink.logs
    assert (failed.severity, failed.event_name) == ("ERROR", "dbt.NodeFinished")
    assert failed.body == "Got 2 results, configured to fail if != 0"
    assert failed.span_id == sink.span("test not_null").span_id
    assert all(headers["x-team"] == "data" for headers in sink.headers)
    assert all(headers["content-encoding"] == "gzip" for headers in sink.headers)
    flow = export.flow
    assert (flow.received, flow.sent, flow.dropped, flow.failed) == (11, 11, 0, 0)


def test_without_logs_none_are_made(sink: OtlpSink) -> None:
    with exporting(sink, logs=False) as export:
        tell(export, story().events)
        export.close(NO_TIME_LIMIT_S)

    assert sink.spans
    assert set(sink.requests) == {"/v1/traces"}


def test_what_a_collector_refuses_is_counted(sink: OtlpSink) -> None:
    sink.mood = Mood.ERROR
    with exporting(sink) as export:
        tell(export, story().events)
        export.close(NO_TIME_LIMIT_S)

    flow = export.flow
    assert (flow.received, flow.sent, flow.dropped, flow.failed) == (11, 0, 0, 11)


def test_a_full_queue_drops_the_oldest_and_counts_them(
    sink: OtlpSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otlp_export, "MAX_QUEUE", 20)
    monkeypatch.setattr(otlp_export, "MAX_BATCH", 10)
    sink.mood = Mood.SILENT
    events = story().events
    with exporting(sink, logs=False, timeout_s=60.0) as export:
        tell(export, events)
        # Until the worker holds a batch in its hands, and will not take another.
        sink.wait(lambda s: s.requests)
        for _ in range(5):
            tell(export, events)
        flow = export.flow
        assert (flow.received, flow.dropped, flow.sent) == (60, 30, 0)


def test_closing_does_not_wait_for_a_collector_that_never_answers(sink: OtlpSink) -> None:
    sink.mood = Mood.SILENT
    with exporting(sink, timeout_s=60.0) as export:
        tell(export, story().events)
        closing = threading.Thread(target=export.close, args=(0.2,))
        closing.start()
        closing.join(NO_TIME_LIMIT_S)

    assert not closing.is_alive()
    assert not sink.spans


def test_a_collector_that_is_not_there_is_no_error_of_ours() -> None:
    with otlp_sink() as gone:
        pass
    with exporting(gone) as export:
        tell(export, story().events)
        export.close(NO_TIME_LIMIT_S)

    assert export.flow.failed == 11


def test_a_batch_is_not_lost_for_one_bad_name(sink: OtlpSink) -> None:
    """A lone surrogate is no UTF-8, and protobuf refuses what it is in."""
    told = Story()
    told.plan(node(ORDERS))
    told.fail(ORDERS, "Database Error in model orders")
    bad = "ord\udc80ers\x00"
    end = msgspec.structs.replace(
        told.end_of(ORDERS), node=NodeBlock(unique_id=ORDERS, resource_type="model", name=bad)
    )
    with exporting(sink) as export:
        tell(export, [end])
        export.close(NO_TIME_LIMIT_S)

    assert sink.span("model ord?ers\ufffd").attributes["dbt.node.name"] == "ord?ers\ufffd"
    assert export.flow.sent == export.flow.received == 2
