"""Headers are parsed as nats-py parses them."""

from hypothesis import example, given
from hypothesis import strategies as st
from nats.aio.client import Client

from dbtstream.nats_client import NatsClient

names = st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=12)
lines = st.builds(
    lambda name, colon, value: f"{name}{colon}{value}".encode("latin-1", "replace"),
    names,
    st.sampled_from([":", ": ", ":\t", ""]),
    st.text(max_size=20).map(lambda text: text.encode("utf-8", "replace").decode("latin-1")),
)


@given(st.lists(st.binary(max_size=40) | lines, max_size=8))
@example([b"ce-id: 1", b"ce-id:2", b"", b"no colon", b": no name", b"a b: c", "ö: x".encode()])
@example([b"name: value: more ", b" padded :\tx\t", b"bad: \xff\xfe", b"tab\tin: x", b"sep\x1c: x"])
def test_as_nats_py_does(raw: list[bytes]) -> None:
    block = b"\r\n".join(raw) + b"\r\n\r\n"
    assert NatsClient._parse_header_lines(block) == Client._parse_header_lines(block)
