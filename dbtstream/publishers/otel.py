"""Spans and log records of runs, over OTLP/HTTP to a collector that may be slow, ill, or gone.

Layer 2, an observer; what the spans are is decided in `span_mapping`. Imported only where
`telemetry.otlp` is set, since the SDK takes memory. Nothing waits for the collector: a span goes
into a bounded queue, a thread of the SDK sends batches of them, and what does not fit, or is not
taken in time, is counted and told once. Spans are made by hand (`ReadableSpan`): the SDK's own way
would draw their ids and take the clock's time, and costs four times as much.
"""

import functools
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import MeterProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, TraceFlags, TraceState
from opentelemetry.trace.status import Status, StatusCode

import dbtstream
from dbtstream.config import OtlpConfig, TelemetryConfig
from dbtstream.envelope import RunContext
from dbtstream.events import AnyEvent
from dbtstream.instruments import METER
from dbtstream.log_records import log_record_of
from dbtstream.observers import AttemptObserver, Observer
from dbtstream.otel_sdk import signal_url
from dbtstream.readings import Flow
from dbtstream.span_mapping import RunSpans
from dbtstream.spans import Span

if TYPE_CHECKING:
    from dbtstream.publishers.otel_logs import LogExport as Logs

logger = logging.getLogger(__name__)

MAX_QUEUE = 8192  # 3.5 kB each: 28 MB, while the collector is gone
MAX_BATCH = 256  # about 25 ms of encoding, during which other threads hardly run
SCHEDULE_MS = 1000.0

SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"
SCOPE = InstrumentationScope(METER, dbtstream.__version__, SCHEMA_URL)

SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_KINDS = {
    "internal": SpanKind.INTERNAL,
    "client": SpanKind.CLIENT,
    "consumer": SpanKind.CONSUMER,
}
_UNSET = Status(StatusCode.UNSET)


class Queue:
    """What is known of a batch processor's queue; the SDK does not tell."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.flow = Flow()
        self._taken = 0
        self._is_failing = False

    @property
    def waiting(self) -> int:
        return self.flow.received - self._taken - self.flow.dropped

    def putting(self) -> None:
        """One more goes in; a full queue loses its oldest."""
        if self.waiting >= MAX_QUEUE:
            self.flow.dropped += 1
            if self.flow.dropped == 1:
                logger.warning(
                    "telemetry is dropped, its queue is full",
                    extra={"action": "telemetry.dropped", "signal": self.name},
                )
        self.flow.received += 1

    def taking(self, count: int) -> None:
        """In the SDK's thread, as is `done`."""
        self._taken += count

    def give_up(self) -> int:
        """What waits now is not sent any more; how many that are."""
        left = self.waiting
        self.flow.dropped += left
        return left

    def done(self, count: int, *, well: bool) -> None:
        if well:
            self.flow.sent += count
        else:
            self.flow.failed += count
        if well is self._is_failing:  # not as before
            self._is_failing = not well
            logger.log(
                logging.INFO if well else logging.WARNING,
                "telemetry is taken again" if well else "telemetry is not taken by the collector",
                extra={"action": "telemetry.exported", "signal": self.name, "ok": well},
            )


class OtelExport:
    """The way out for spans, and for log records where they are wanted."""

    def __init__(
        self,
        config: TelemetryConfig,
        otlp: OtlpConfig,
        resource: Resource,
        meter_provider: MeterProvider | None,
        secret_headers: Mapping[str, str],
    ) -> None:
        self._spans: SpanExport | None = None
        self._logs: Logs | None = None
        headers = {**otlp.headers, **secret_headers}
        if otlp.traces:
            self._spans = SpanExport(otlp, resource, meter_provider, headers)
        if otlp.logs:
            from dbtstream.publishers.otel_logs import LogExport

            queue = Queue("logs")
            self._logs = LogExport(otlp, resource, meter_provider, headers, queue)
        self.observer: Observer = RunObserver(config, self._spans, self._logs)

    @property
    def flow(self) -> Flow:
        """Spans and log records since the start. What is in none of the rest is on its way."""
        total = Flow()
        for way in self._ways():
            total.add(way.queue.flow)
        return total

    def _ways(self) -> list["Way"]:
        return [way for way in (self._spans, self._logs) if way is not None]

    def close(self, timeout_s: float) -> None:
        """Send what is left, but not for longer than `timeout_s`. Blocking; never raises."""
        ways = self._ways()
        # Daemons, since the SDK's shutdown waits 30 s for a collector that does not answer.
        threads = [threading.Thread(target=_finish, args=(way,), daemon=True) for way in ways]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout_s / len(threads))
        for way in ways:
            way.abandon()
        left = sum(way.queue.give_up() for way in ways)
        if left:
            logger.warning(
                "telemetry was left behind at the stop",
                extra={"action": "telemetry.left", "count": left},
            )


class Way(Protocol):
    """What `close` needs of an export."""

    queue: Queue

    def finish(self) -> None: ...
    def abandon(self) -> None: ...


def _finish(way: Way) -> None:
    try:
        way.finish()
    except Exception as error:  # noqa: BLE001 - the SDK's, and nobody is there to catch it
        logger.warning(
            "telemetry could not be closed",
            extra={"action": "telemetry.close_failed", "error": repr(error)},
        )


class SpanExport:
    """Our spans as the SDK's, in its queue."""

    def __init__(
        self,
        otlp: OtlpConfig,
        resource: Resource,
        meter_provider: MeterProvider | None,
        headers: Mapping[str, str],
    ) -> None:
        self.queue = Queue("traces")
        self._resource = resource
        self._exporter = _CountedExporter(
            OTLPSpanExporter(
                endpoint=signal_url(otlp.endpoint, "traces"),
                certificate_file=otlp.tls_ca_file,
                headers=headers,
                timeout=otlp.timeout_s,
                compression=Compression.Gzip,
                meter_provider=meter_provider,
            ),
            self.queue,
        )
        self._processor = BatchSpanProcessor(
            self._exporter,
            max_queue_size=MAX_QUEUE,
            schedule_delay_millis=SCHEDULE_MS,
            max_export_batch_size=MAX_BATCH,
            meter_provider=meter_provider,
        )

    def put(self, span: Span) -> None:
        self.queue.putting()
        self._processor.on_end(readable_span(span, self._resource))

    def finish(self) -> None:
        self._processor.shutdown()  # type: ignore[no-untyped-call]

    def abandon(self) -> None:
        self._exporter.abandon()


class _CountedExporter(SpanExporter):
    def __init__(self, exporter: OTLPSpanExporter, queue: Queue) -> None:
        self._exporter, self._queue = exporter, queue
        self._is_closed = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._queue.taking(len(spans))
        result = self._exporter.export(spans)
        self._queue.done(len(spans), well=result is SpanExportResult.SUCCESS)
        return result

    def shutdown(self) -> None:
        self.abandon()

    def abandon(self) -> None:
        """End the wait between two tries, and refuse the rest."""
        if not self._is_closed:
            self._is_closed = True
            self._exporter.shutdown()  # type: ignore[no-untyped-call]


def readable_span(span: Span, resource: Resource) -> ReadableSpan:
    trace_id, state = int(span.trace_id, 16), trace_state(span.tracestate)
    parent = None
    if span.parent_span_id is not None:
        parent = SpanContext(
            trace_id, int(span.parent_span_id, 16), span.parent_is_remote, SAMPLED, state
        )
    return ReadableSpan(
        name=span.name,
        context=SpanContext(trace_id, int(span.span_id, 16), False, SAMPLED, state),
        parent=parent,
        resource=resource,
        attributes=span.attributes,
        links=[
            Link(
                SpanContext(
                    int(link.trace_id, 16),
                    int(link.span_id, 16),
                    True,
                    SAMPLED,
                    trace_state(link.tracestate),
                ),
                link.attributes,
            )
            for link in span.links
        ],
        kind=_KINDS[span.kind],
        status=_UNSET if span.error is None else Status(StatusCode.ERROR, span.error),
        start_time=span.start_ns,
        end_time=span.end_ns,
        instrumentation_scope=SCOPE,
    )


@functools.lru_cache(maxsize=64)
def trace_state(header: str) -> TraceState:
    return TraceState.from_header([header]) if header else TraceState()


class RunObserver:
    """Makes of each attempt's events what goes out."""

    def __init__(
        self, config: TelemetryConfig, spans: SpanExport | None, logs: "Logs | None"
    ) -> None:
        self._config, self._spans, self._logs = config, spans, logs

    def attempt(self, context: RunContext, *, earlier: Sequence[AnyEvent] = ()) -> AttemptObserver:
        run = RunSpans(
            context,
            settings=self._config,
            earlier=earlier,
        )
        return _Attempt(run, self._spans, self._logs)


class _Attempt:
    def __init__(self, run: RunSpans, spans: SpanExport | None, logs: "Logs | None") -> None:
        self._run, self._spans, self._logs = run, spans, logs

    def take(self, event: AnyEvent) -> None:
        if self._spans is not None:
            for span in self._run.take(event):
                self._spans.put(span)
        if self._logs is not None and (record := log_record_of(event)) is not None:
            self._logs.put(record)
