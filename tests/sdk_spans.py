"""Our spans and log records as OpenTelemetry's SDK would have them: what our encoder is held
against."""

from collections.abc import Sequence

from opentelemetry import _logs
from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    TraceFlags,
    TraceState,
    set_span_in_context,
)
from opentelemetry.trace.status import Status, StatusCode

from dbtstream.spans import LogRecord, Span

SAMPLED = TraceFlags(TraceFlags.SAMPLED)


def sdk_traces(
    spans: Sequence[Span], resource: Resource, scope: InstrumentationScope
) -> ExportTraceServiceRequest:
    return encode_spans([_readable_span(span, resource, scope) for span in spans])


def sdk_logs(
    records: Sequence[LogRecord], resource: Resource, scope: InstrumentationScope
) -> ExportLogsServiceRequest:
    return encode_logs([_readable_record(record, resource, scope) for record in records])


def _readable_span(span: Span, resource: Resource, scope: InstrumentationScope) -> ReadableSpan:
    trace_id, state = int(span.trace_id, 16), _trace_state(span.tracestate)
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
                SpanContext(int(link.trace_id, 16), int(link.span_id, 16), True, SAMPLED),
                link.attributes,
            )
            for link in span.links
        ],
        kind=SpanKind[span.kind.upper()],
        status=Status(StatusCode.UNSET if span.error is None else StatusCode.ERROR, span.error),
        start_time=span.start_ns,
        end_time=span.end_ns,
        instrumentation_scope=scope,
    )


def _trace_state(header: str) -> TraceState:
    return TraceState.from_header([header]) if header else TraceState()


def _readable_record(
    record: LogRecord, resource: Resource, scope: InstrumentationScope
) -> ReadableLogRecord:
    span = SpanContext(int(record.trace_id, 16), int(record.span_id, 16), False, SAMPLED)
    number = _logs.SeverityNumber[record.severity.upper()]
    told = _logs.LogRecord(
        timestamp=record.time_ns,
        observed_timestamp=record.time_ns,
        context=set_span_in_context(NonRecordingSpan(span)),
        severity_text=record.severity.upper(),
        severity_number=number,
        body=record.body,
        attributes=record.attributes,
        event_name=record.event_name,
    )
    return ReadableLogRecord(told, resource=resource, instrumentation_scope=scope)
