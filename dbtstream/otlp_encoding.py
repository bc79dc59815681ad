"""Spans and log records as OTLP's protobuf, without an object per field. Pure.

Layer 1. The messages are those of opentelemetry-proto 1.x (trace.proto, logs.proto, common.proto;
field numbers are beside each field), in protobuf's wire format. The SDK's encoder takes seven
times as long, and holds up every other thread for that. A test holds ours against it.

Text must be without lone surrogates, as `span_texts` leaves it; one that is not gets "?".
"""

import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache

from opentelemetry.trace import TraceState

from dbtstream.spans import AttributeValue, LogRecord, Span, SpanLink

KINDS = {"internal": 1, "client": 3, "consumer": 5}
SEVERITIES = {"debug": 5, "info": 9, "warn": 13, "error": 17}

_ERROR = 2  # Status.StatusCode
_HAS_IS_REMOTE, _IS_REMOTE = 0x100, 0x200  # SpanFlags
_SAMPLED = 0x01

_INT64 = 1 << 63


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


_VARINTS = tuple(_varint(number) for number in range(2048))


def _length(size: int) -> bytes:
    return _VARINTS[size] if size < 2048 else _varint(size)


def _message(tag: bytes, data: bytes) -> bytes:
    """A field of a length: a message, a string, bytes."""
    return tag + _length(len(data)) + data


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")


_fixed64 = struct.Struct("<Q").pack
_fixed32 = struct.Struct("<I").pack
_double = struct.Struct("<d").pack


_SHORT = 0x7E
_SHORT_HEADS = tuple(bytes((0x12, size + 2, 0x0A, size)) for size in range(_SHORT))
"""Of a KeyValue's value that is a string: the lengths of AnyValue and of string_value."""


# -- common.proto ----------------------------------------------------------------------------------


@lru_cache(1024)
def _key(key: str) -> bytes:
    return _message(b"\x0a", _utf8(key))  # KeyValue.key = 1


def _any(value: AttributeValue) -> bytes:
    """AnyValue."""
    if isinstance(value, str):
        return _message(b"\x0a", _utf8(value))  # string_value = 1
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"  # bool_value = 2
    if isinstance(value, int):
        if -_INT64 <= value < _INT64:
            return b"\x18" + _varint(value % (1 << 64))  # int_value = 3
        value = float(value)
    if isinstance(value, float):
        return b"\x21" + _double(value)  # double_value = 4
    values = b"".join(_message(b"\x0a", _any(each)) for each in value)  # ArrayValue.values = 1
    return _message(b"\x2a", values)  # array_value = 5


def _attributes(tag: bytes, attributes: Mapping[str, AttributeValue]) -> bytes:
    """Repeated KeyValue."""
    parts: list[bytes] = []
    for key, value in attributes.items():
        encoded = _utf8(value) if isinstance(value, str) else b""
        if 0 < (size := len(encoded)) < _SHORT:  # as below, with the lengths of one byte each
            name = _key(key)
            parts += (tag, _length(len(name) + 4 + size), name, _SHORT_HEADS[size], encoded)
        else:
            parts.append(_message(tag, _key(key) + _message(b"\x12", _any(value))))  # value = 2
    return b"".join(parts)


# -- trace.proto -----------------------------------------------------------------------------------


def encoded_span(span: Span) -> bytes:
    """A `Span`."""
    flags = _HAS_IS_REMOTE
    parts = [
        b"\x0a\x10",  # trace_id = 1
        bytes.fromhex(span.trace_id),
        b"\x12\x08",  # span_id = 2
        bytes.fromhex(span.span_id),
    ]
    if span.tracestate:
        parts.append(_message(b"\x1a", _tracestate(span.tracestate)))  # trace_state = 3
    if span.parent_span_id is not None:
        parts += (b"\x22\x08", bytes.fromhex(span.parent_span_id))  # parent_span_id = 4
        flags |= _IS_REMOTE if span.parent_is_remote else 0
    parts += (
        _message(b"\x2a", _utf8(span.name)),  # name = 5
        b"\x30",  # kind = 6
        _VARINTS[KINDS[span.kind]],
        b"\x39",  # start_time_unix_nano = 7
        _fixed64(span.start_ns),
        b"\x41",  # end_time_unix_nano = 8
        _fixed64(span.end_ns),
        _attributes(b"\x4a", span.attributes),  # attributes = 9
    )
    parts += (_message(b"\x6a", _link(link)) for link in span.links)  # links = 13
    parts += (
        _message(b"\x7a", b"" if span.error is None else _error(span.error)),  # status = 15
        b"\x85\x01",  # flags = 16
        _fixed32(flags),
    )
    return b"".join(parts)


def _link(link: SpanLink) -> bytes:
    """Span.Link; to what another span, maybe of another process, did."""
    return b"".join(
        (
            b"\x0a\x10",  # trace_id = 1
            bytes.fromhex(link.trace_id),
            b"\x12\x08",  # span_id = 2
            bytes.fromhex(link.span_id),
            _message(b"\x1a", _tracestate(link.tracestate)),  # trace_state = 3
            _attributes(b"\x22", link.attributes),  # attributes = 4
            b"\x35",  # flags = 6
            _fixed32(_HAS_IS_REMOTE | _IS_REMOTE),
        )
    )


@lru_cache(64)
def _tracestate(header: str) -> bytes:
    """Without the members that W3C Trace Context does not allow."""
    return _utf8(TraceState.from_header([header]).to_header() if header else "")


def _error(description: str) -> bytes:
    """Status."""
    return (
        _message(b"\x12", _utf8(description)) + b"\x18" + _VARINTS[_ERROR]
    )  # message = 2, code = 3


# -- logs.proto ------------------------------------------------------------------------------------


def encoded_log_record(record: LogRecord) -> bytes:
    """A `LogRecord`."""
    time = _fixed64(record.time_ns)
    return b"".join(
        (
            b"\x09",  # time_unix_nano = 1
            time,
            b"\x10",  # severity_number = 2
            _VARINTS[SEVERITIES[record.severity]],
            _message(b"\x1a", _utf8(record.severity.upper())),  # severity_text = 3
            _message(b"\x2a", _any(record.body)),  # body = 5
            _attributes(b"\x32", record.attributes),  # attributes = 6
            b"\x45",  # flags = 8
            _fixed32(_SAMPLED),
            _message(b"\x4a", bytes.fromhex(record.trace_id)),  # trace_id = 9
            _message(b"\x52", bytes.fromhex(record.span_id)),  # span_id = 10
            b"\x59",  # observed_time_unix_nano = 11
            time,
            _message(b"\x62", _utf8(record.event_name)),  # event_name = 12
        )
    )


# -- requests --------------------------------------------------------------------------------------


class Envelope:
    """What stands around the spans or records of a request: who tells them.

    ExportTraceServiceRequest > ResourceSpans > ScopeSpans and ExportLogsServiceRequest >
    ResourceLogs > ScopeLogs have the same numbers.
    """

    def __init__(
        self,
        resource: Mapping[str, AttributeValue],
        *,
        scope: str,
        version: str,
        schema_url: str,
    ) -> None:
        attributes = _attributes(b"\x0a", resource)  # Resource.attributes = 1
        self._resource = _message(b"\x0a", attributes)  # ResourceSpans.resource = 1
        name, number = _message(b"\x0a", _utf8(scope)), _message(b"\x12", _utf8(version))
        self._scope = _message(b"\x0a", name + number)  # ScopeSpans.scope = 1
        self._schema = _message(b"\x1a", _utf8(schema_url))  # ScopeSpans.schema_url = 3

    def request(self, encoded: Iterable[bytes]) -> bytes:
        items = b"".join(_message(b"\x12", each) for each in encoded)  # ScopeSpans.spans = 2
        of_scope = _message(b"\x12", self._scope + items + self._schema)  # scope_spans = 2
        return _message(b"\x0a", self._resource + of_scope)  # resource_spans = 1
