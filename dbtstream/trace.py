"""Trace and span ids of a run: derived, so that a replay tells the same spans. Pure.

Layer 1. `normalizer` stamps them on events, `publishers/otel` builds spans that have them.
The trace is the requester's (W3C `traceparent`) where the config says so, else the run id itself;
a span id is a hash of what the span is about. Nothing here makes or sends a span.
"""

import hashlib
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Literal
from urllib.parse import unquote

import msgspec

from dbtstream.events import TraceBlock
from dbtstream.subjects import H_BAGGAGE, H_TRACEPARENT, H_TRACESTATE, trace_headers

MAX_TRACESTATE_CHARS = 512  # what W3C asks to be passed on at the least
MAX_BAGGAGE_CHARS = 256  # of one value

TraceContext = Literal["parent", "link", "ignore"]

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


def trace_block(headers: Mapping[str, str], baggage: Sequence[str] = ()) -> TraceBlock | None:
    """What a request's headers say; of its baggage the named keys. None if that is nothing."""
    found = trace_headers(headers)
    parent = found.get(H_TRACEPARENT, "").strip()
    state = found.get(H_TRACESTATE, "").strip()[:MAX_TRACESTATE_CHARS]
    block = TraceBlock(
        traceparent=parent if parse_traceparent(parent) else None,
        tracestate=state if state.isascii() and state.isprintable() else "",
        baggage=_baggage(found.get(H_BAGGAGE, ""), baggage),
    )
    return block if block != TraceBlock() else None


def _baggage(header: str, wanted: Sequence[str]) -> dict[str, str]:
    """W3C Baggage: `key=value;property, …`, values percent-encoded."""
    pairs = (member.partition(";")[0].partition("=") for member in header.split(","))
    found = {key.strip(): unquote(value.strip())[:MAX_BAGGAGE_CHARS] for key, _, value in pairs}
    return {key: found[key] for key in wanted if found.get(key)}


def run_trace_id(run_id: str, parent: TraceParent | None, how: TraceContext) -> str:
    """The trace that a run is in, and all that is told of it. This is the one rule.

    A requester that does not sample its trace would drop most of our runs with it, so theirs get
    a trace of their own.
    """
    if how == "parent" and parent is not None and parent.is_sampled:
        return parent.trace_id
    return trace_id_of(run_id)


def tracestate_in(requested: TraceBlock | None, trace_id: str) -> str:
    """What goes with `trace_id`: a requester's tracestate does with its own trace only."""
    parent = parse_traceparent(requested.traceparent) if requested else None
    is_theirs = parent is not None and parent.trace_id == trace_id
    return requested.tracestate if requested and is_theirs else ""


def trace_id_of(run_id: str) -> str:
    """The trace of a run that came without one: the 32 hex digits of its UUID."""
    return uuid.UUID(run_id).hex


def span_id_of(run_id: str, attempt: int, role: str, *about: str | int) -> str:
    """16 hex digits, the same wherever and whenever they are computed.

    Roles: `run`; `child`; `phase` about its name; `node` about a unique_id (hooks too); `batch`
    about a unique_id and an index; `query` about the number of its event.
    """
    text = "\0".join((run_id, str(attempt), role, *map(str, about)))
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    # All zeros means "no span" (W3C Trace Context, 3.2.2.4).
    return digest if digest.strip("0") else "0" * 15 + "1"
