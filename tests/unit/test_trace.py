"""Trace context is read as W3C says, and span ids are derived, not drawn."""

import pytest

from dbtstream.events import TraceBlock
from dbtstream.trace import (
    TraceContext,
    TraceParent,
    parse_traceparent,
    run_trace_id,
    span_id_of,
    trace_block,
    trace_id_of,
)
from tests.stories import RUN_ID

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_a_valid_traceparent_is_read() -> None:
    parent = parse_traceparent(f"00-{TRACE}-{SPAN}-01")

    assert parent == TraceParent(trace_id=TRACE, span_id=SPAN, flags=1)
    assert parent is not None
    assert parent.is_sampled


def test_a_parent_may_be_unsampled() -> None:
    parent = parse_traceparent(f"00-{TRACE}-{SPAN}-00")

    assert parent is not None
    assert not parent.is_sampled


def test_a_later_version_may_say_more() -> None:
    """We read the four fields that we know (Trace Context, 3.2.4)."""
    assert parse_traceparent(f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like") is not None


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "nonsense",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01-more",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-zz",
    ],
)
def test_an_invalid_traceparent_is_none_and_no_error(header: str | None) -> None:
    """The run must not fail for a header that it does not need."""
    assert parse_traceparent(header) is None


def test_a_run_without_a_trace_is_its_own() -> None:
    assert trace_id_of(RUN_ID) == RUN_ID.replace("-", "")


def test_a_span_id_is_the_same_each_time() -> None:
    """A literal: publishers and later versions must come to the same."""
    assert span_id_of(RUN_ID, 1, "run") == span_id_of(RUN_ID, 1, "run")
    assert span_id_of(RUN_ID, 1, "node", "model.shop.orders") == "18be2c507ace6891"


def test_things_that_differ_have_spans_that_differ() -> None:
    spans = [
        span_id_of(RUN_ID, 1, "run"),
        span_id_of(RUN_ID, 2, "run"),
        span_id_of(RUN_ID[:-1] + "2", 1, "run"),
        span_id_of(RUN_ID, 1, "node", "model.shop.a"),
        span_id_of(RUN_ID, 1, "node", "model.shop.b"),
        span_id_of(RUN_ID, 1, "batch", "model.shop.a", 1),
        span_id_of(RUN_ID, 1, "batch", "model.shop.a", 2),
        span_id_of(RUN_ID, 11, "batch", "model.shop.a", 1),
    ]

    assert len(set(spans)) == len(spans)
    assert all(len(span) == 16 and int(span, 16) for span in spans)


PARENT = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    ("how", "flags", "trace_id"),
    [
        ("parent", "01", TRACE),
        ("parent", "03", TRACE),  # sampled, and the id is random
        ("parent", "00", trace_id_of(RUN_ID)),
        ("link", "01", trace_id_of(RUN_ID)),
        ("ignore", "01", trace_id_of(RUN_ID)),
    ],
)
def test_a_run_is_in_its_requesters_trace_where_that_is_sampled(
    how: TraceContext, flags: str, trace_id: str
) -> None:
    parent = parse_traceparent(f"00-{TRACE}-{SPAN}-{flags}")

    assert run_trace_id(RUN_ID, parent, how) == trace_id
    assert run_trace_id(RUN_ID, None, how) == trace_id_of(RUN_ID)


def test_a_requests_trace_context_is_read_however_its_headers_are_written() -> None:
    """NATS keeps the case of names, and Go's carriers write `Traceparent`."""
    headers = {
        "Traceparent": PARENT,
        "TRACESTATE": "rojo=1",
        "Baggage": "tenant=acme%20inc;p=1, team = data ,secret=x",
    }

    assert trace_block(headers, ["team", "tenant", "absent"]) == TraceBlock(
        traceparent=PARENT, tracestate="rojo=1", baggage={"team": "data", "tenant": "acme inc"}
    )


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"traceparent": "nonsense"},
        {"tracestate": "a=\x00"},
        {"baggage": "tenant=acme"},
        {"baggage": ",;=,=x"},
    ],
)
def test_without_anything_of_use_there_is_no_context(headers: dict[str, str]) -> None:
    assert trace_block(headers) is None
