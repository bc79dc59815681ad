"""An OTLP/HTTP receiver for tests: protobuf in, plain data out. It can also be ill.

It reads what exporters send with the protobuf classes of `opentelemetry-proto` and none of our
code. `until` waits for a fact of what has come. What it is told to be (`Mood`) holds for the
requests that begin after it: answering 500, slowly, or never.
"""

import asyncio
import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1 import trace_pb2

from tests.span_trees import Row, draw, label

SLOW_S = 1.5


class Mood(Enum):
    WELL = "well"
    ERROR = "error"  # 500, which exporters do not try again
    BUSY = "busy"  # 503, which they do
    SLOW = "slow"
    SILENT = "silent"  # takes the request and says nothing


@dataclass(frozen=True)
class SinkLink:
    trace_id: str
    span_id: str
    trace_state: str
    attributes: dict[str, Any]


@dataclass(frozen=True)
class SinkSpan:
    trace_id: str
    span_id: str
    parent_id: str  # "" for none
    name: str
    kind: str  # CONSUMER, CLIENT, INTERNAL …
    start_ns: int
    end_ns: int
    trace_state: str
    status: str  # UNSET, OK, ERROR
    message: str
    attributes: dict[str, Any]
    links: list[SinkLink]
    resource: dict[str, Any]
    scope: str
    raw: bytes = field(repr=False)  # the span as it came


@dataclass(frozen=True)
class SinkLog:
    trace_id: str
    span_id: str
    severity: str
    event_name: str
    body: str
    attributes: dict[str, Any]


@dataclass(frozen=True)
class SinkPoint:
    """A data point: a number, or of a histogram its count and sum."""

    metric: str
    unit: str
    attributes: dict[str, Any]
    value: float
    count: int = 1
    temporality: str = ""


@dataclass
class OtlpSink:
    """What has come. Lists are in the order of arrival."""

    url: str = ""
    mood: Mood = Mood.WELL
    spans: list[SinkSpan] = field(default_factory=list)
    logs: list[SinkLog] = field(default_factory=list)
    points: list[SinkPoint] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)  # paths, whatever was answered
    headers: list[dict[str, str]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    closing: threading.Event = field(default_factory=threading.Event)

    async def until(self, fact: Callable[["OtlpSink"], Any], timeout_s: float = 30.0) -> None:
        """Until `fact` is true of this sink. TimeoutError."""
        await asyncio.to_thread(self.wait, fact, timeout_s)

    def wait(self, fact: Callable[["OtlpSink"], Any], timeout_s: float = 30.0) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: bool(fact(self)), timeout_s):
                raise TimeoutError(f"after {len(self.requests)} requests, {len(self.spans)} spans")

    def span(self, name: str) -> SinkSpan:
        (found,) = [span for span in self.spans if span.name == name]
        return found

    def of_trace(self, trace_id: str) -> list[SinkSpan]:
        return [span for span in self.spans if span.trace_id == trace_id]

    def tree(self, trace_id: str) -> list[str]:
        return draw(
            Row(
                span.span_id,
                span.parent_id or None,
                span.start_ns,
                span.end_ns,
                label(span.name, span.kind, span.attributes, failed=span.status == "ERROR"),
            )
            for span in self.of_trace(trace_id)
        )

    def _take(self, path: str, body: bytes) -> None:
        with self.changed:
            match path:
                case "/v1/traces":
                    self.spans += _spans(ExportTraceServiceRequest.FromString(body))
                case "/v1/logs":
                    self.logs += _logs(ExportLogsServiceRequest.FromString(body))
                case "/v1/metrics":
                    self.points += _points(ExportMetricsServiceRequest.FromString(body))

    def _note(self, path: str, headers: dict[str, str]) -> None:
        with self.changed:
            self.requests.append(path)
            self.headers.append(headers)

    def _changed(self) -> None:
        with self.changed:
            self.changed.notify_all()


@contextmanager
def otlp_sink(port: int = 0) -> Iterator[OtlpSink]:
    """On a port of its choice on loopback."""
    sink = OtlpSink()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            sink._note(self.path, {name.lower(): value for name, value in self.headers.items()})
            mood = sink.mood
            sink._changed()
            if mood is Mood.SILENT:
                sink.closing.wait()
                self.close_connection = True
                return
            if mood is Mood.SLOW:
                sink.closing.wait(SLOW_S)
            status = {Mood.ERROR: 500, Mood.BUSY: 503}.get(mood, 200)
            if status == 200:
                sink._take(self.path, body)
            self.send_response(status)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()
            sink._changed()

        def log_message(self, *_: object) -> None:
            """Not on stderr."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_: object) -> None:
            """An exporter that has given up has closed its end."""

    server = Server(("127.0.0.1", port), Handler)
    sink.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    thread.start()
    try:
        yield sink
    finally:
        sink.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    """A sink of its own process, that says what comes: `python -m tests.otlp_sink`."""
    with otlp_sink(4318) as sink:
        print(f"OTLP/HTTP at {sink.url}; Ctrl-C ends it", flush=True)
        told = 0
        while True:
            time.sleep(1.0)
            for span in sink.spans[told:]:
                print(f"{span.trace_id} {span.name} {span.status}", flush=True)
            told = len(sink.spans)


def _spans(request: ExportTraceServiceRequest) -> Iterator[SinkSpan]:
    for of_resource in request.resource_spans:
        resource = _values(of_resource.resource.attributes)
        for of_scope in of_resource.scope_spans:
            for span in of_scope.spans:
                yield _span(span, resource, of_scope.scope.name)


def _span(span: trace_pb2.Span, resource: dict[str, Any], scope: str) -> SinkSpan:
    kinds, codes = trace_pb2.Span.SpanKind, trace_pb2.Status.StatusCode
    return SinkSpan(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        name=span.name,
        kind=kinds.Name(span.kind).removeprefix("SPAN_KIND_"),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        trace_state=span.trace_state,
        status=codes.Name(span.status.code).removeprefix("STATUS_CODE_"),
        message=span.status.message,
        attributes=_values(span.attributes),
        links=[
            SinkLink(
                link.trace_id.hex(), link.span_id.hex(), link.trace_state, _values(link.attributes)
            )
            for link in span.links
        ],
        resource=resource,
        scope=scope,
        raw=span.SerializeToString(deterministic=True),
    )


def _logs(request: ExportLogsServiceRequest) -> Iterator[SinkLog]:
    for of_resource in request.resource_logs:
        for of_scope in of_resource.scope_logs:
            for record in of_scope.log_records:
                yield _log(record)


def _log(record: LogRecord) -> SinkLog:
    return SinkLog(
        trace_id=record.trace_id.hex(),
        span_id=record.span_id.hex(),
        severity=record.severity_text,
        event_name=record.event_name,
        body=record.body.string_value,
        attributes=_values(record.attributes),
    )


def _points(request: ExportMetricsServiceRequest) -> Iterator[SinkPoint]:
    for of_resource in request.resource_metrics:
        for of_scope in of_resource.scope_metrics:
            for metric in of_scope.metrics:
                yield from _points_of(metric)


def _points_of(metric: Metric) -> Iterator[SinkPoint]:
    kind = metric.WhichOneof("data")
    if kind is None:
        return
    data: Any = getattr(metric, kind)
    temporality = {1: "delta", 2: "cumulative"}.get(getattr(data, "aggregation_temporality", 0), "")
    for point in data.data_points:
        is_histogram = "histogram" in kind
        number = point.sum if is_histogram else (point.as_double or point.as_int)
        yield SinkPoint(
            metric=metric.name,
            unit=metric.unit,
            attributes=_values(point.attributes),
            value=float(number),
            count=point.count if is_histogram else 1,
            temporality=temporality,
        )


def _values(pairs: Any) -> dict[str, Any]:
    items: list[KeyValue] = list(pairs)
    return {item.key: _value(item.value) for item in items}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None


if __name__ == "__main__":
    main()
