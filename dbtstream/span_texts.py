"""Values of spans as exporters take them: bounded, without what breaks an encoder. Pure.

Layer 1. A lone surrogate is no UTF-8, and a receiver may refuse the whole batch that it is in;
and nothing after this bounds a span.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from dbtstream.spans import MAX_ATTRIBUTES, MAX_TEXT, AttributeValue

MAX_LIST = 128
"""Entries of an attribute that is a list, such as a node's tags."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


def text(value: str, limit: int = MAX_TEXT) -> str:
    """Within `limit` characters; control characters and lone surrogates are replaced."""
    if len(value) > limit:
        value = value[: limit - 1] + "…"
    if value.isprintable():  # which surrogates are not
        return value
    return value.translate(_CONTROL).encode("utf-8", "replace").decode()


def attributes(values: Mapping[str, AttributeValue | None]) -> dict[str, AttributeValue]:
    """Without those that are not known, the first MAX_ATTRIBUTES."""
    clean: dict[str, AttributeValue] = {}
    for key, value in values.items():
        if isinstance(value, str):
            if value:
                clean[key] = text(value)
        elif isinstance(value, list):
            if value:
                clean[key] = [text(each) for each in value[:MAX_LIST]]
        elif value is not None:
            clean[key] = value
    if len(clean) > MAX_ATTRIBUTES:
        return dict(list(clean.items())[:MAX_ATTRIBUTES])
    return clean


def unix_ns(at: datetime) -> int:
    """Exact: a float has no room for nanoseconds since 1970."""
    return max((at - _EPOCH) // _MICROSECOND, 0) * 1000
