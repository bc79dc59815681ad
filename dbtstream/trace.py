"""Trace and span ids of a run: derived, so that a replay tells the same spans. Pure.

Layer 1. `normalizer` stamps them on events, `publishers/otel` builds spans that have them.
The trace is the requester's (W3C `traceparent`), else the run id itself; a span id is a hash
of what the span is about. Nothing here makes or sends a span.
"""

import hashlib
import re
import uuid

import msgspec

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class TraceParent(msgspec.Struct, frozen=True, kw_only=True):
    """The span that asked for the run."""

    trace_id: str  # 32 hex digits
    span_id: str  # 16 hex digits
    flags: int

    @property
    def is_sampled(self) -> bool:
        return bool(self.flags & 0x01)


def parse_traceparent(header: str | None) -> TraceParent | None:
    """A W3C Trace Context header, or None when there is none or it is not valid.

    A version above 00 may carry more fields than we know; 00 has exactly four.
    """
    match = _TRACEPARENT.fullmatch(header.strip()) if header else None
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    if version == "ff" or (version == "00" and rest is not None):
        return None
    if not int(trace_id, 16) or not int(span_id, 16):
        return None
    return TraceParent(trace_id=trace_id, span_id=span_id, flags=int(flags, 16))


def trace_id_of(run_id: str) -> str:
    """The trace of a run that came without one: the 32 hex digits of its UUID."""
    return uuid.UUID(run_id).hex


def span_id_of(run_id: str, attempt: int, role: str, *about: str | int) -> str:
    """16 hex digits, the same wherever and whenever they are computed.

    Roles: `run`; `node` about a unique_id (hooks too); `batch` about a unique_id and an index.
    """
    text = "\0".join((run_id, str(attempt), role, *map(str, about)))
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    # All zeros means "no span" (W3C Trace Context, 3.2.2.4).
    return digest if digest.strip("0") else "0" * 15 + "1"
