"""Spans drawn as a tree, one line each, for tests that say what a trace looks like.

    dbt build shop CONSUMER [failure] ERROR nodes_failed
      queue
      dbt CLIENT

Name, kind unless internal, the status of run or node in brackets, and what went wrong. The order is
that in which they began.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dbtstream.config import TelemetryConfig
from dbtstream.envelope import RunContext
from dbtstream.events import (
    AnyEvent,
    NodeBatch,
    NodeFinished,
    RunFinished,
    RunLeased,
    RunRejected,
    decode_event,
    encode_event,
)
from dbtstream.messages import OnLost
from dbtstream.resume import FIRST
from dbtstream.span_mapping import RunSpans
from dbtstream.spans import MAX_LINKS, Span


@dataclass(frozen=True)
class Row:
    span_id: str
    parent_id: str | None
    start_ns: int
    end_ns: int
    label: str


def label(name: str, kind: str, attributes: dict[str, Any], *, failed: bool) -> str:
    parts = [name]
    if kind != "INTERNAL":
        parts.append(kind)
    status = attributes.get("dbtstream.run.status") or attributes.get("dbt.node.status")
    if status:
        parts.append(f"[{status}]")
    if failed:
        parts.append(f"ERROR {attributes.get('error.type')}")
    return " ".join(parts)


def draw(rows: Iterable[Row]) -> list[str]:
    """A span whose parent is not there is a root."""
    rows = list(rows)
    known = {row.span_id for row in rows}
    below: dict[str | None, list[Row]] = {}
    for row in rows:
        below.setdefault(row.parent_id if row.parent_id in known else None, []).append(row)
    lines: list[str] = []

    def go_down(parent: str | None, depth: int) -> None:
        for row in sorted(below.get(parent, ()), key=lambda r: (r.start_ns, r.end_ns, r.label)):
            lines.append("  " * depth + row.label)
            go_down(row.span_id, depth + 1)

    go_down(None, 0)
    return lines


def tree(spans: Iterable[Span]) -> list[str]:
    return draw(
        Row(
            span.span_id,
            span.parent_span_id,
            span.start_ns,
            span.end_ns,
            label(span.name, span.kind.upper(), span.attributes, failed=span.error is not None),
        )
        for span in spans
    )


def spans_of(
    events: Iterable[AnyEvent],
    context: RunContext,
    earlier: Iterable[AnyEvent] = (),
    **settings: Any,
) -> list[Span]:
    """Of one attempt, or of the closing of one."""
    run = RunSpans(context, settings=TelemetryConfig(**settings), earlier=list(earlier))
    return [span for event in events for span in run.take(event)]


def replayed(events: Iterable[AnyEvent]) -> list[AnyEvent]:
    """As a consumer has them."""
    return [decode_event(encode_event(event)) for event in events]


def check_spans(events: list[AnyEvent], spans: list[Span]) -> None:
    """What holds for the spans of any attempt that has ended, whatever happened in it."""
    by_id = {span.span_id: span for span in spans}
    assert len(by_id) == len(spans), "each span once"
    assert {span.trace_id for span in spans} == {event.trace_id for event in events}
    for span in spans:
        assert span.start_ns <= span.end_ns
        assert len(span.links) <= MAX_LINKS
        assert span.parent_span_id is None or span.parent_span_id in by_id or span.parent_is_remote
        for link in span.links:
            if link.attributes["dbtstream.link.type"] == "upstream" and (
                link.attributes["dbt.node.unique_id"] in _finished(events)
            ):
                assert link.span_id in by_id
    roots = [s for s in spans if s.parent_span_id is None or s.parent_is_remote]
    assert [root.kind for root in roots] == ["consumer"]
    for event in events:
        assert event.span_id in by_id, f"{event.event_id} is in a span that nobody gets"
        if isinstance(event, NodeFinished):
            assert by_id[event.span_id].attributes["dbt.node.unique_id"] == event.node.unique_id
        elif isinstance(event, NodeBatch):
            assert by_id[event.span_id].attributes["dbt.batch.index"] == event.index
        elif isinstance(event, RunFinished | RunRejected | RunLeased):
            assert by_id[event.span_id] is roots[0]


def _finished(events: list[AnyEvent]) -> set[str]:
    return {event.node.unique_id for event in events if isinstance(event, NodeFinished)}


def is_takeover(event: AnyEvent) -> bool:
    """That closes an attempt so that the run goes on."""
    return isinstance(event, RunLeased) and event.cause != FIRST and event.decision != OnLost.FAIL
