"""Two receivers that know nothing of each other get the same spans: ours, and Datadog's.

`ddapm-test-agent` is what Datadog tests its libraries against. It has an environment of its own,
`.venvs/ddapm`, which `make test` makes of `tests/receivers/ddapm.txt`.
"""

import json
import os
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.json_format import ParseDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from dbtstream.config import OtlpConfig, TelemetryConfig
from dbtstream.events import AnyEvent, TraceBlock
from dbtstream.publishers.otel import OtelExport
from tests.otlp_sink import otlp_sink
from tests.stories import Story, context, node

AGENT = Path(__file__).parents[2] / ".venvs" / "ddapm" / "bin" / "ddapm-test-agent"
LONG_S = 30.0
ORDERS, DAILY, TEST = "model.shop.orders", "model.shop.daily", "test.shop.not_null.abc"
ASKED = TraceBlock(
    traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", tracestate="rojo=1"
)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[str]:
    """Its URL for OTLP."""
    assert AGENT.is_file(), f"there is no {AGENT}: `make receivers` installs it"
    port, http, grpc = free_ports(3)
    command = [str(AGENT), f"--port={port}", f"--otlp-http-port={http}", f"--otlp-grpc-port={grpc}"]
    with (tmp_path / "agent.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--disable-llmobs-data-forwarding"],
            cwd=tmp_path,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"PATH": os.environ["PATH"]},
        )
    try:
        url = f"http://127.0.0.1:{http}"
        while True:
            assert process.poll() is None, (tmp_path / "agent.log").read_text()
            try:
                received(url)
            except (urllib.error.URLError, ConnectionError):
                continue
            break
        yield url
    finally:
        process.terminate()
        process.wait()


def received(url: str) -> list[bytes]:
    """The spans that it has, as they were sent."""
    with urllib.request.urlopen(f"{url}/test/session/traces", timeout=LONG_S) as answer:  # noqa: S310
        requests = json.load(answer)
    return sorted(
        span.SerializeToString(deterministic=True)
        for request in requests
        for of_resource in ParseDict(request, ExportTraceServiceRequest()).resource_spans
        for of_scope in of_resource.scope_spans
        for span in of_scope.spans
    )


def story() -> list[AnyEvent]:
    told = Story(trace=ASKED, trace_id="0af7651916cd43dd8448eb211c80319c")
    told.plan(node(ORDERS, tags=["nightly", "größe"]), node(DAILY, ORDERS), node(TEST, ORDERS))
    told.run(ORDERS)
    told.run(TEST, "fail", message="Got 2 results,\nconfigured to fail if != 0", failures=2)
    told.skip(DAILY)
    told.result(1)
    told.end(exit_code=1, pid=4711, exited_at=told.now)
    return told.events


def send(url: str, events: list[AnyEvent]) -> None:
    otlp = OtlpConfig(endpoint=url, timeout_s=LONG_S)
    export = OtelExport(
        TelemetryConfig(otlp=otlp, datadog=True), otlp, {"service.name": "x"}, None, {}
    )
    of_run = context(trace=ASKED, trace_id="0af7651916cd43dd8448eb211c80319c")
    attempt = export.observer.attempt(of_run)
    for event in events:
        attempt.take(event)
    export.close(LONG_S)
    assert export.flow.sent == export.flow.received > 0


def test_two_receivers_get_the_same_spans(agent: str) -> None:
    events = story()
    with otlp_sink() as sink:
        send(sink.url, events)
        send(agent, events)

        assert received(agent) == sorted(span.raw for span in sink.spans)
        assert len(sink.spans) == 10


def test_a_span_that_is_sent_again_is_the_same_span(agent: str) -> None:
    """A redelivered event; backends know a span by its ids."""
    events = story()
    send(agent, events)
    once = received(agent)
    send(agent, events)

    assert received(agent) == sorted(once + once)
