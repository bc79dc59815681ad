"""Our YAML is what YAML readers read, whatever the texts look like, and reads well."""

from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # dbt brings it
from hypothesis import given
from hypothesis import strategies as st

from dbtstream.yaml_text import to_yaml

AWKWARD = [
    *("", " ", " a", "a ", "~", "null", "Yes", "off", "y", "=", "<<", "-", "- x", "*a", "&a", "!a"),
    *("a: b", "a:", ":a", "a #b", "#", "{x}", "[x]", "a, b", "1", "1e3", "0x1f", "1_0", ".5", "+1"),
    *("12:30:45", "2024-01-01", "2024-01-01T00:00:00Z", "it's", '"', "\\", "%a", "@a", "`a`", "|"),
    *("a\nb", "a\n\n  b", "\na", "a\n", "a\n ", "a\tb", "a\n\tb", "a\rb\nc", "---", "...", "?"),
    *("\x7f", "\x85", "\u2028\n", "\ufeff", "é", "😀", "a\nb: c\n# d"),
]
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(AWKWARD)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
    max_leaves=20,
)


@pytest.mark.parametrize("text", AWKWARD)
def test_no_text_is_read_as_something_else(text: str) -> None:
    for value in (text, [text], {text: text}, {"a": [text, {"b": text}]}):
        assert yaml.safe_load(to_yaml(value)) == value


@given(VALUES)
def test_whatever_is_written_is_read(value: Any) -> None:
    assert yaml.safe_load(to_yaml(value)) == value


def test_it_reads_well() -> None:
    value = {
        "asyncapi": "3.0.0",
        "info": {"description": "One line.\n\nAnother: line."},
        "address": "dbt.runs.{project}.{target}",
        "messages": [{"$ref": "#/a", "null": None}, {}, []],
        "count": 3,
    }
    assert to_yaml(value) == (
        'asyncapi: "3.0.0"\n'
        "info:\n"
        "  description: |-\n"
        "    One line.\n"
        "\n"
        "    Another: line.\n"
        "address: dbt.runs.{project}.{target}\n"
        "messages:\n"
        '  - $ref: "#/a"\n'
        '    "null": null\n'
        "  - {}\n"
        "  - []\n"
        "count: 3\n"
    )
