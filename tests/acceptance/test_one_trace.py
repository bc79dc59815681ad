"""One trace: whoever asks for a run, the run with all its nodes, and whoever reacts to them.

Real dbt, real NATS, `dbtstream serve` as a process; the two others use OpenTelemetry's SDK as any
service does, and know nothing of each other.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pytest
from opentelemetry import propagate
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Tracer

from dbtstream.client import Client
from dbtstream.config import NatsConfig
from dbtstream.embedded import NatsServer
from dbtstream.events import NodeFinished, QueryFinished, RunFinished
from dbtstream.local_run import copy_demo
from dbtstream.nats_link import NatsLink
from dbtstream.trace import span_id_of
from tests import dbt_projects
from tests.acceptance.conftest import serve, whole_run, write_config
from tests.dbt_projects import write_project
from tests.otlp_sink import OtlpSink, SinkSpan, otlp_sink

DAILY = "carrier_daily_delays"


@pytest.fixture
def sink() -> Iterator[OtlpSink]:
    with otlp_sink() as running:
        yield running


@contextmanager
def service(name: str, sink: OtlpSink) -> Iterator[Tracer]:
    """A program with OpenTelemetry in it."""
    provider = TracerProvider(resource=Resource({"service.name": name}), shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=f"{sink.url}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=50))
    yield provider.get_tracer(name)
    provider.shutdown()


def traced_config(folder: Path, url: str, project: Path, sink: OtlpSink, **settings: str) -> Path:
    path = write_config(folder, url, project, **settings)
    with path.open("a", encoding="utf-8") as file:
        file.write(f'\n[telemetry.otlp]\nendpoint = "{sink.url}"\n')
    return path


def edges(spans: list[SinkSpan]) -> set[tuple[str, str]]:
    """(service: parent, service: name) of all of them."""
    names = {span.span_id: f"{span.resource['service.name']}: {span.name}" for span in spans}
    return {(names.get(span.parent_id, ""), names[span.span_id]) for span in spans}


async def test_a_request_its_run_and_a_reaction_are_one_trace(
    tmp_path: Path, nats_server: NatsServer, sink: OtlpSink
) -> None:
    project = copy_demo(tmp_path / "shop")
    config = traced_config(tmp_path, nats_server.url, Path(project.path), sink)
    with service("loader", sink) as loader, service("reports", sink) as reports:
        async with (
            serve(config),
            Client.connect(nats_server.url) as client,
            NatsLink(NatsConfig(servers=(nats_server.url,)), name="reports") as link,
        ):
            await link.wait_connected(30)
            live = await link.client.subscribe(f"dbt.live.shop.dev.node.model.{DAILY}.success")
            await link.client.flush()

            with loader.start_as_current_span("load flights"):
                accepted = await client.submit("shop", ["build"], target="dev")

            message = await live.next_msg(timeout=100)
            context = propagate.extract(message.headers or {})
            with reports.start_as_current_span(
                "refresh report", context=context, kind=SpanKind.CONSUMER
            ):
                pass
            events = await whole_run(client, accepted.run_id)

        assert isinstance(events[-1], RunFinished)
        assert events[-1].status == "success"
        run_span = span_id_of(accepted.run_id, 1, "run")
        await sink.until(
            lambda s: (
                {"load flights", "refresh report"} <= {span.name for span in s.spans}
                and any(span.span_id == run_span for span in s.spans)
            )
        )

    assert len({span.trace_id for span in sink.spans}) == 1
    assert {event.trace_id for event in events} == {sink.spans[0].trace_id}
    nodes = {
        f"dbtstream: {event.node.resource_type} {event.node.name}"
        for event in events
        if isinstance(event, NodeFinished)
    }
    assert len(nodes) > 30
    assert edges(sink.spans) == {
        ("", "loader: load flights"),
        ("loader: load flights", "dbtstream: dbt build shop"),
        ("dbtstream: dbt build shop", "dbtstream: queue"),
        ("dbtstream: dbt build shop", "dbtstream: dbt"),
        ("dbtstream: dbt", "dbtstream: startup"),
        ("dbtstream: dbt", "dbtstream: parse"),
        ("dbtstream: dbt", "dbtstream: execute"),
        ("dbtstream: dbt", "dbtstream: finalize"),
        *(("dbtstream: execute", name) for name in nodes),
        (f"dbtstream: model {DAILY}", "reports: refresh report"),
    }
    within_parents(sink.spans)
    known = {span.span_id for span in sink.spans}
    assert {event.span_id for event in events} <= known
    upstream = [
        link.span_id
        for link in sink.span(f"model {DAILY}").links
        if link.attributes["dbtstream.link.type"] == "upstream"
    ]
    assert upstream
    assert set(upstream) <= known


def within_parents(spans: list[SinkSpan]) -> None:
    """What is ours lies in what is around it; dbt's clock and ours are one."""
    by_id = {span.span_id: span for span in spans if span.resource["service.name"] == "dbtstream"}
    for span in by_id.values():
        if (parent := by_id.get(span.parent_id)) is not None:
            assert parent.start_ns <= span.start_ns, f"{span.name} begins before {parent.name}"
            assert span.end_ns <= parent.end_ns, f"{span.name} ends after {parent.name}"


async def test_a_query_comment_carries_the_trace_to_the_warehouse(
    tmp_path: Path, nats_server: NatsServer, sink: OtlpSink
) -> None:
    """DuckDB says itself which SQL it was given, but for what is around the statement: hence
    `append`, which puts the comment before the semicolon."""
    asked_sql = "{{ config(materialized='table') }} select current_query() as sql"
    files = {"models/asked.sql": asked_sql}
    comment = {"comment": "{{ env_var('TRACEPARENT', '') }}", "append": True}
    settings: dict[str, Any] = {"query-comment": comment}
    project = write_project(tmp_path / "shop", files, **settings)
    config = traced_config(tmp_path, nats_server.url, project, sink, queries="true")
    async with serve(config), Client.connect(nats_server.url) as client:
        runs = []
        for _ in range(2):
            accepted = await client.submit("shop", ["build"], target="dev")
            events = await whole_run(client, accepted.run_id)
            assert isinstance(events[-1], RunFinished)
            assert events[-1].status == "success"
            runs.append((events, await asyncio.to_thread(asked, tmp_path / "shop")))

    for events, sql in runs:
        traceparent = f"00-{events[0].trace_id}-{span_id_of(events[0].run_id, 1, 'run')}-01"
        assert f"/* {traceparent} */" in sql
    assert runs[0][1] != runs[1][1], "each run has its own"
    assert any(isinstance(event, QueryFinished) for event in runs[0][0])


def asked(project: Path) -> str:
    with duckdb.connect(str(project / "shop.duckdb"), read_only=True) as database:
        (row,) = database.execute("select sql from asked").fetchall()
    return str(row[0])


async def test_a_failing_build_has_its_errors_where_they_happened(
    tmp_path: Path, nats_server: NatsServer, sink: OtlpSink
) -> None:
    project = write_project(tmp_path / "shop", dbt_projects.skip_chain(), threads=1)
    config = traced_config(tmp_path, nats_server.url, project, sink)
    async with serve(config), Client.connect(nats_server.url) as client:
        accepted = await client.submit("shop", ["build"], target="dev")
        events = await whole_run(client, accepted.run_id)
        run_span = span_id_of(accepted.run_id, 1, "run")
        await sink.until(lambda s: any(span.span_id == run_span for span in s.spans))

    assert events[0].trace_id is not None
    assert sink.tree(events[0].trace_id) == [
        "dbt build shop CONSUMER [failure] ERROR nodes_failed",
        "  queue",
        "  dbt CLIENT",
        "    startup",
        "    parse",
        "    execute",
        "      model aside [success]",
        "      model broken [error] ERROR runtime_error",
        "      model middle [skipped]",
        "      model last [skipped]",
        "    finalize",
    ]
    broken = sink.span("model broken")
    assert "no_such_table" in broken.message
