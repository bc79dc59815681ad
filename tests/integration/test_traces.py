"""The trace of a run, from the daemon to an OTLP receiver: whose it is, and that it is the same
when it is made again of the stored events."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from opentelemetry import trace as tracing
from opentelemetry.proto.trace.v1 import trace_pb2

from dbtstream.config import NatsConfig, OtlpConfig, TelemetryConfig
from dbtstream.envelope import RunContext
from dbtstream.events import AnyEvent, NodeFinished, RunFinished, RunQueued, RunRejected
from dbtstream.otlp_encoding import encoded_span
from dbtstream.span_mapping import RunSpans
from dbtstream.trace import span_id_of, trace_id_of
from tests.daemons import Served, daemon_config, serving
from tests.otlp_sink import Mood, OtlpSink, otlp_sink
from tests.scripted_child import GOOD_RUN

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
REQUESTER = f"00-{TRACE}-{SPAN}-01"
REQUESTING = tracing.NonRecordingSpan(
    tracing.SpanContext(
        int(TRACE, 16), int(SPAN, 16), is_remote=False, trace_flags=tracing.TraceFlags(1)
    )
)
BUILD = b'{"args":["build"]}'

TELLS_ENVIRONMENT = """
    start_line()
    hello()
    plan(model("orders"))
    told = {name: os.environ.get(name) for name in ("TRACEPARENT", "TRACESTATE", "BAGGAGE",
        "OTEL_EXPORTER_OTLP_ENDPOINT")}
    started("orders")
    finished("orders", message=json.dumps(told))
    result(0, [("orders", "success")])
"""

MIXED_RUN = """
    start_line()
    hello()
    send("invocation", invocation_id="8317a821-dee1-4702-a582-11bab356968d")
    plan(model("orders"), model("customers", "orders"), model("daily", "customers"))
    started("orders")
    finished("orders", started_at="2026-03-01T12:00:02.5", finished_at="2026-03-01T12:00:04.1",
        adapter_response={"rows_affected": 12.0}, thread="Thread-1")
    send("query", unique_id="model.shop.customers", status="OK", elapsed_s=0.1234, query_id="01b2")
    started("customers")
    send("node_error", unique_id="model.shop.customers", error_class="DbtDatabaseError",
        message="Database Error in model customers\\n  no")
    finished("customers", "error", message="Database Error in model customers\\n  no")
    send("node_start", unique_id="model.shop.daily")
    send("node_skip", unique_id="model.shop.daily")
    finished("daily", "skipped")
    result(1, [("orders", "success"), ("customers", "error"), ("daily", "skipped")])
"""


@pytest.fixture
def sink() -> Iterator[OtlpSink]:
    with otlp_sink() as running:
        yield running


@asynccontextmanager
async def traced(
    tmp_path: Path,
    nats: NatsConfig,
    sink: OtlpSink,
    body: str = GOOD_RUN,
    *,
    project: dict[str, Any] | None = None,
    **telemetry: Any,
) -> AsyncIterator[Served]:
    otlp = OtlpConfig(endpoint=sink.url, metrics=False)
    config = msgspec.structs.replace(
        daemon_config(tmp_path, nats, body, project=project),
        telemetry=TelemetryConfig(otlp=otlp, **telemetry),
    )
    async with serving(config) as served:
        yield served


async def asked(served: Served, payload: bytes = BUILD, **headers: str) -> list[AnyEvent]:
    """One run for a message with these headers."""
    async with served.client.events(project="shop", family="run") as stream:
        await served.publish("dbt.runs.shop.dev", payload, **headers)
        async with asyncio.timeout(30):
            first = await anext(aiter(stream))
    return await served.events(first.run_id)


async def until_run(sink: OtlpSink, run_id: str, attempt: int = 1) -> None:
    span_id = span_id_of(run_id, attempt, "run")
    await sink.until(lambda s: any(span.span_id == span_id for span in s.spans))


def finished(events: list[AnyEvent], name: str) -> NodeFinished:
    (event,) = (e for e in events if isinstance(e, NodeFinished) and e.node.name == name)
    return event


async def test_a_run_is_in_the_trace_of_its_requester(
    tmp_path: Path, nats_config: NatsConfig, sink: OtlpSink
) -> None:
    async with traced(tmp_path, nats_config, sink, baggage=("team",)) as served:
        events = await asked(
            served, traceparent=REQUESTER, tracestate="rojo=1", baggage="team=data,secret=x"
        )
        await until_run(sink, events[0].run_id)

    assert sink.tree(TRACE) == [
        "dbt build shop CONSUMER [success]",
        "  queue",
        "  dbt CLIENT",
        "    startup",
        "    execute",
        "      model orders [success]",
        "      model customers [success]",
        "    finalize",
    ]
    run = sink.span("dbt build shop")
    assert (run.parent_id, run.trace_state) == (SPAN, "rojo=1")
    assert [(link.span_id, link.attributes["dbtstream.link.type"]) for link in run.links] == [
        (SPAN, "request")
    ]
    assert run.attributes["team"] == "data"
    assert "secret" not in run.attributes
    orders, customers = sink.span("model orders"), sink.span("model customers")
    assert [link.span_id for link in customers.links] == [orders.span_id]
    assert finished(events, "orders").span_id == orders.span_id
    assert {event.trace_id for event in events} == {TRACE}
    assert {event.span_id for event in events} <= {span.span_id for span in sink.spans}
    child = sink.span("dbt").attributes
    assert child["process.exit.code"] == 0


@pytest.mark.parametrize(("how", "links"), [("link", [SPAN]), ("ignore", [])])
async def test_a_run_may_have_a_trace_of_its_own(
    tmp_path: Path, nats_config: NatsConfig, sink: OtlpSink, how: str, links: list[str]
) -> None:
    async with traced(tmp_path, nats_config, sink, TELLS_ENVIRONMENT, trace_context=how) as served:
        live = await served.link.client.subscribe("dbt.live.shop.dev.node.model.orders.success")
        await served.link.client.flush()
        events = await asked(served, traceparent=REQUESTER, tracestate="rojo=1")
        message = await live.next_msg(timeout=30)
        await until_run(sink, events[0].run_id)

    own = trace_id_of(events[0].run_id)
    run = sink.span("dbt build shop")
    assert (run.trace_id, run.parent_id, run.trace_state) == (own, "", "")
    assert [link.span_id for link in run.links] == links
    assert {event.trace_id for event in events} == {own}
    headers = message.headers or {}
    assert headers["traceparent"] == f"00-{own}-{finished(events, 'orders').span_id}-01"
    assert "tracestate" not in headers, "it belongs to the requester's trace"
    told = json.loads(finished(events, "orders").message or "")
    assert (told["TRACEPARENT"], told["TRACESTATE"]) == (f"00-{own}-{run.span_id}-01", None)


async def test_dbt_is_told_its_trace_and_none_of_our_exporters(
    tmp_path: Path, nats_config: NatsConfig, sink: OtlpSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("TRACEPARENT", "00-11111111111111111111111111111111-2222222222222222-01")
    project = {"pass_env": ("OTEL_*", "TRACE*")}
    async with traced(
        tmp_path, nats_config, sink, TELLS_ENVIRONMENT, project=project, baggage=("team",)
    ) as served:
        events = await asked(
            served, traceparent=REQUESTER, tracestate="rojo=1", baggage="team=data"
        )

    span_id = span_id_of(events[0].run_id, 1, "run")
    assert json.loads(finished(events, "orders").message or "") == {
        "TRACEPARENT": f"00-{TRACE}-{span_id}-01",
        "TRACESTATE": "rojo=1",
        "BAGGAGE": None,
        "OTEL_EXPORTER_OTLP_ENDPOINT": None,
    }


async def test_the_stored_events_make_the_spans_that_were_sent(
    tmp_path: Path, nats_config: NatsConfig, sink: OtlpSink
) -> None:
    """Byte by byte, as a bridge would send them that reads the stream a day later."""
    project = {"queries": True}
    async with traced(
        tmp_path, nats_config, sink, MIXED_RUN, project=project, query_spans=True
    ) as served:
        events = await asked(
            served,
            b'{"args":["build"],"labels":{"team":"data"},"request_id":"r1"}',
            traceparent=REQUESTER,
            tracestate="rojo=1",
        )
        await until_run(sink, events[0].run_id)
        await sink.until(lambda s: len(s.spans) == 11)
        stored = await served.events(events[0].run_id)

    again = RunSpans(context_of(stored), settings=TelemetryConfig(query_spans=True))
    made = [encoded_span(span) for event in stored for span in again.take(event)]
    assert sorted(
        trace_pb2.Span.FromString(span).SerializeToString(deterministic=True) for span in made
    ) == sorted(span.raw for span in sink.spans)


def context_of(events: list[AnyEvent]) -> RunContext:
    """What the events tell of it, which is all that spans need."""
    queued, end = events[0], events[-1]
    assert isinstance(queued, RunQueued)
    assert isinstance(end, RunFinished)
    return RunContext(
        project=queued.project,
        target=queued.target,
        run_id=queued.run_id,
        attempt=end.attempt,
        fence=0,
        worker="somebody else",
        host="",
        args=[],
        command=end.command,
        queued_at=queued.time,
        labels=queued.labels,
        request_id=queued.request_id,
        trace_id=queued.trace_id,
        trace=queued.trace,
    )


async def test_a_rejected_request_is_a_short_span_in_its_requesters_trace(
    tmp_path: Path, nats_config: NatsConfig, sink: OtlpSink
) -> None:
    async with traced(tmp_path, nats_config, sink) as served:
        events = await asked(served, b'{"args":["build","--target","x"]}', traceparent=REQUESTER)
        await until_run(sink, events[0].run_id)

    (rejected,) = events
    assert isinstance(rejected, RunRejected)
    (span,) = sink.spans
    assert (span.trace_id, span.parent_id, span.name) == (TRACE, SPAN, "dbt shop")
    assert (span.status, span.attributes["error.type"]) == ("ERROR", "rejected")
    assert span.attributes["dbtstream.reject.code"] == "flag_not_allowed"
    assert span.span_id == rejected.span_id


WAITS = """
    start_line()
    hello()
    plan(model("orders"))
    control_line()
    result(2, [], interrupted=True, error={"error_class": "KeyboardInterrupt", "message": ""})
"""


async def test_a_run_that_is_cancelled_while_it_waits_is_in_its_requesters_trace(
    tmp_path: Path, nats_config: NatsConfig, sink: OtlpSink
) -> None:
    """Its request is taken from the queue by `control`, and no worker ever had it."""
    async with traced(tmp_path, nats_config, sink, WAITS) as served:
        first = await served.client.submit("shop", ["build"], target="dev")
        with tracing.use_span(REQUESTING):
            second = await served.client.submit("shop", ["build"], target="dev")
        await served.client.cancel(second.run_id, by="ann")
        events = await served.events(second.run_id)
        await until_run(sink, second.run_id)
        await served.client.cancel(first.run_id)
        await served.events(first.run_id)

    assert sink.tree(TRACE) == ["dbt shop CONSUMER [cancelled]", "  queue"]
    assert {event.trace_id for event in events} == {TRACE}


@pytest.mark.parametrize("mood", [Mood.ERROR, Mood.BUSY, Mood.SLOW, Mood.SILENT])
async def test_a_collector_that_is_ill_holds_up_no_run_and_no_stop(
    tmp_path: Path, nats_config: NatsConfig, sink: OtlpSink, mood: Mood
) -> None:
    """The stop is bounded by `serving`; what a run takes, by that of the run before it."""
    sink.mood = mood
    async with traced(tmp_path, nats_config, sink) as served:
        events = await asked(served, traceparent=REQUESTER)
        await sink.until(lambda s: s.requests)
        again = await asked(served, traceparent=REQUESTER)

    assert isinstance(events[-1], RunFinished)
    assert isinstance(again[-1], RunFinished)
    assert again[-1].status == "success"
