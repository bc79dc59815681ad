"""JSON values as YAML that people like to read. Pure; for `asyncapi`.

Not a YAML library: dbt brings one, and the daemon does not rely on what dbt brings. Every text
that could be read as something else is quoted as in JSON, which YAML contains. The order of
keys is kept, so the same value is always the same text.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

_PLAIN = re.compile(r"[A-Za-z/$][\w ./()|*>{}$@<=;,'’…-]*(:[\w./-]+)*", re.ASCII)
"""Texts that need no quotes: no `: `, no ` #`, no sign that means something at the beginning."""

_NOT_A_TEXT = frozenset(("null", "true", "false", "yes", "no", "on", "off", "y", "n"))
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
_BLOCK = re.compile("[^ \n\t][^\x00-\x08\x0b-\x1f\t]*[^\\s]", re.DOTALL)


def to_yaml(value: Any) -> str:
    """A document of dicts, lists, texts, numbers, booleans and None."""
    return "\n".join(_lines(value)) + "\n"


def _lines(value: Any) -> Iterator[str]:
    match value:
        case dict() if value:
            for key, each in value.items():
                yield from _entry(f"{_scalar(key)}:", each)
        case list() if value:
            for each in value:
                first, *rest = _lines(each)
                yield f"- {first}"
                yield from (f"  {line}" if line else "" for line in rest)
        case _:
            yield _scalar(value)


def _entry(key: str, value: Any) -> Iterator[str]:
    """A key and what is behind it: on its line, or below it and indented."""
    if isinstance(value, dict | list) and value:
        yield key
        yield from (f"  {line}" if line else "" for line in _lines(value))
    elif isinstance(value, str) and _is_block(value):
        yield f"{key} |-"
        yield from (f"  {line}" if line else "" for line in value.split("\n"))
    else:
        yield f"{key} {_scalar(value)}"


def _is_block(text: str) -> bool:
    return bool("\n" in text and _BLOCK.fullmatch(text) and not _UNPRINTABLE.search(text))


def _is_plain(text: str) -> bool:
    return bool(_PLAIN.fullmatch(text)) and text[-1] != " " and text.lower() not in _NOT_A_TEXT


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _is_plain(value):
        return value
    text = json.dumps(value, ensure_ascii=False)
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
