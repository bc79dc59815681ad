"""Trace context is read as W3C says, and span ids are derived, not drawn."""

import pytest

from dbtstream.trace import TraceParent, parse_traceparent, span_id_of, trace_id_of
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
