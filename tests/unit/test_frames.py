"""The private protocol: length before payload, and anything odd is one named error."""

import contextlib
import json
import struct
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbtstream import events, frames
from dbtstream.errors import ChildCrashed, FrameCorrupt, FrameTooLarge
from dbtstream.event_base import Relation
from dbtstream.frames import MAX_FRAME_BYTES, decode_frame, frame_length


def test_a_head_tells_the_length_of_what_follows() -> None:
    assert frame_length(b"\x00\x00\x00\x00") == 0
    assert frame_length(b"\x00\x00\x01\x02") == 258


def test_a_frame_over_the_limit_is_refused_before_it_is_read() -> None:
    assert frame_length(struct.pack(">I", MAX_FRAME_BYTES)) == MAX_FRAME_BYTES
    with pytest.raises(FrameTooLarge, match=f"{MAX_FRAME_BYTES + 1} bytes.* {MAX_FRAME_BYTES}$"):
        frame_length(struct.pack(">I", MAX_FRAME_BYTES + 1))
    with pytest.raises(FrameTooLarge):
        frame_length(b"\xff\xff\xff\xff")


def test_text_that_strayed_onto_the_pipe_is_too_large_for_a_frame() -> None:
    """Printable bytes read as a length: the first four of `Traceback` are over a gigabyte."""
    with pytest.raises(FrameTooLarge):
        frame_length(b"Trac")


def test_a_frame_is_decoded_by_its_tag_and_unknown_fields_pass() -> None:
    frame = decode_frame(
        b'{"t": "node_work", "n": 3, "at": 1.5, "unique_id": "model.a.b", "index": 1, "new": []}'
    )
    assert frame == frames.NodeWork(n=3, at=1.5, unique_id="model.a.b", index=1)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "truncated"),
        (b"{", "truncated"),
        (b"not json", "malformed"),
        (b"\xff\x00", "malformed"),
        (b'{"t": "query_cancelled", "n": 1, "at": 0, "connection": ""} {', "malformed"),
        (b"[]", "Expected `object`"),
        (b"{}", "missing required field `t`"),
        (b'{"t": "goodbye", "n": 1, "at": 0}', "goodbye"),
        (b'{"t": 4, "n": 1, "at": 0}', "Expected `str`"),
        (b'{"t": "invocation", "n": 1, "at": 0}', "invocation_id"),
        (b'{"t": "invocation", "n": "1", "at": 0, "invocation_id": "x"}', "$.n"),
        (b'{"t": "invocation", "n": 1, "at": 0, "invocation_id": "\xff"}', "utf-8"),
        (b'{"t": "plan", "n": 1, "at": 0, "status": "", "node_count": 1.5}', "$.node_count"),
        (b'{"t": "nodes", "n": 1, "at": 0, "nodes": [{"unique_id": 1}]}', "$.nodes[0]"),
    ],
)
def test_what_is_no_frame_is_corrupt_with_its_reason(body: bytes, problem: str) -> None:
    with pytest.raises(FrameCorrupt) as caught:
        decode_frame(body)
    assert problem in str(caught.value)
    assert isinstance(caught.value, ChildCrashed)


def test_of_a_long_corrupt_frame_only_the_beginning_is_shown() -> None:
    with pytest.raises(FrameCorrupt) as caught:
        decode_frame(b"x" * 100_000)
    assert len(str(caught.value)) < 400


@given(st.binary(max_size=200))
def test_no_bytes_at_all_raise_anything_else(body: bytes) -> None:
    with contextlib.suppress(FrameCorrupt):
        decode_frame(body)


def test_every_frame_comes_back_as_it_was_written() -> None:
    """The child writes dicts with these keys; a chunk with every optional field set."""
    node = frames.PlannedNode(
        unique_id="model.shop.orders",
        resource_type="model",
        name="orders",
        meta={"tier": 1, "nested": [None]},
        relation=Relation(identifier="orders"),
        test=events.TestBlock(column="id"),
    )
    written = frames.Nodes(n=2, at=1.25, nodes=[node])
    as_dict = json.loads(msgspec.json.encode(written))
    assert as_dict["t"] == "nodes"
    assert decode_frame(json.dumps(as_dict).encode()) == written


def test_the_deadline_line_has_both_times_in_milliseconds_and_ends_the_line() -> None:
    assert frames.deadline_line(12_345.12345, 99_999) == b"deadline 12345.123 99999.000\n"
    assert frames.CONTROL_CANCEL.endswith(b"\n")


def test_the_clock_of_deadlines_is_that_of_the_machine_not_of_the_process() -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= frames.clock_s() <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_a_start_says_only_of_a_retry_what_is_known() -> None:
    """The child takes what is not there for null."""
    results = [frames.EarlierResult(unique_id="model.shop.orders", status="error")]
    retry = frames.Retry(args=["build"], results=results, state_dir="/state")
    start = frames.Start(args=["build"], project_dir="/shop", retry=retry)
    assert json.loads(msgspec.json.encode(start))["retry"] == {
        "args": ["build"],
        "results": [{"unique_id": "model.shop.orders", "status": "error"}],
        "state_dir": "/state",
    }
    assert msgspec.json.decode(msgspec.json.encode(start), type=frames.Start) == start
