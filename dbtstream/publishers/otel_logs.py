"""Log records over OTLP/HTTP: the one place that uses the SDK's unfinished logs API.

Layer 2, part of `otel`, imported only where `telemetry.otlp.logs` is on. The modules with an
underscore may change with any release of the SDK, which says so.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from opentelemetry import _logs
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.metrics import MeterProvider
from opentelemetry.sdk._logs import ReadableLogRecord, ReadWriteLogRecord
from opentelemetry.sdk._logs.export import (
    BatchLogRecordProcessor,
    LogRecordExporter,
    LogRecordExportResult,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import NonRecordingSpan, SpanContext, set_span_in_context

from dbtstream.config import OtlpConfig
from dbtstream.otel_sdk import signal_url
from dbtstream.publishers.otel import MAX_BATCH, MAX_QUEUE, SAMPLED, SCHEDULE_MS, SCOPE
from dbtstream.spans import LogRecord

if TYPE_CHECKING:
    from dbtstream.publishers.otel import Queue

_SEVERITIES = {
    "debug": _logs.SeverityNumber.DEBUG,
    "info": _logs.SeverityNumber.INFO,
    "warn": _logs.SeverityNumber.WARN,
    "error": _logs.SeverityNumber.ERROR,
}


class LogExport:
    """Our records as the SDK's, in its queue."""

    def __init__(
        self,
        otlp: OtlpConfig,
        resource: Resource,
        meter_provider: MeterProvider | None,
        headers: Mapping[str, str],
        queue: "Queue",
    ) -> None:
        self.queue = queue
        self._resource = resource
        self._exporter = _CountedExporter(
            OTLPLogExporter(
                endpoint=signal_url(otlp.endpoint, "logs"),
                certificate_file=otlp.tls_ca_file,
                headers=headers,
                timeout=otlp.timeout_s,
                compression=Compression.Gzip,
                meter_provider=meter_provider,
            ),
            queue,
        )
        self._processor = BatchLogRecordProcessor(
            self._exporter,
            schedule_delay_millis=SCHEDULE_MS,
            max_export_batch_size=MAX_BATCH,
            max_queue_size=MAX_QUEUE,
            meter_provider=meter_provider,
        )

    def put(self, record: LogRecord) -> None:
        self.queue.putting()
        span = SpanContext(int(record.trace_id, 16), int(record.span_id, 16), False, SAMPLED)
        self._processor.on_emit(
            ReadWriteLogRecord(
                _logs.LogRecord(
                    timestamp=record.time_ns,
                    observed_timestamp=record.time_ns,
                    context=set_span_in_context(NonRecordingSpan(span)),
                    severity_text=record.severity.upper(),
                    severity_number=_SEVERITIES[record.severity],
                    body=record.body,
                    attributes=record.attributes,
                    event_name=record.event_name,
                ),
                resource=self._resource,
                instrumentation_scope=SCOPE,
            )
        )

    def finish(self) -> None:
        self._processor.shutdown()  # type: ignore[no-untyped-call]

    def abandon(self) -> None:
        self._exporter.abandon()


class _CountedExporter(LogRecordExporter):
    def __init__(self, exporter: OTLPLogExporter, queue: "Queue") -> None:
        self._exporter, self._queue = exporter, queue
        self._is_closed = False

    def export(self, batch: Sequence[ReadableLogRecord]) -> LogRecordExportResult:
        self._queue.taking(len(batch))
        result = self._exporter.export(batch)
        self._queue.done(len(batch), well=result is LogRecordExportResult.SUCCESS)
        return result

    def shutdown(self) -> None:
        self.abandon()

    def force_flush(self, timeout_millis: int = 0) -> bool:
        """Nothing is kept here."""
        return True

    def abandon(self) -> None:
        """End the wait between two tries, and refuse the rest."""
        if not self._is_closed:
            self._is_closed = True
            self._exporter.shutdown()  # type: ignore[no-untyped-call]
