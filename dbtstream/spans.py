"""A span as plain data: what `span_mapping` makes of events and `publishers.otel` exports. Pure.

Layer 0. Ids are hex digits as in `trace`, times integer nanoseconds since 1970. There is no SDK
in here, so that the mapping can be read, tested and run without one.
"""

from typing import Literal

import msgspec

SpanKind = Literal["internal", "client", "consumer"]

AttributeValue = str | bool | int | float | list[str]

MAX_ATTRIBUTES = 128
MAX_TEXT = 4096
"""Characters of an attribute's text. Nothing else bounds a span."""
MAX_STATUS_TEXT = 512
MAX_LINKS = 32


class SpanLink(msgspec.Struct, frozen=True, kw_only=True):
    trace_id: str
    span_id: str
    tracestate: str = ""
    attributes: dict[str, AttributeValue] = {}


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """`error` is the description of an ERROR status; without one the status is unset."""

    trace_id: str
    span_id: str
    name: str
    kind: SpanKind = "internal"
    start_ns: int
    end_ns: int
    parent_span_id: str | None = None
    parent_is_remote: bool = False
    tracestate: str = ""
    attributes: dict[str, AttributeValue] = {}
    links: list[SpanLink] = []
    error: str | None = None


class LogRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A log line of dbt's for OTLP logs."""

    time_ns: int
    severity: Literal["debug", "info", "warn", "error"]
    event_name: str
    body: str
    trace_id: str
    span_id: str
    attributes: dict[str, AttributeValue] = {}
