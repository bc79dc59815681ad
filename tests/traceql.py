"""The little of TraceQL that our dashboards use, on the spans that a receiver of OTLP got.

    { span.dbtstream.run.id = "$run" && kind = consumer } | select(span.dbtstream.run.status)

Tempo is not to be had. What this shows is that the attributes are there and are compared with what
they hold; that Tempo reads the query, it cannot show.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from tests.otlp_sink import SinkSpan

_QUERY = re.compile(r"\{ (.+) \} \| select\((.+)\)")
_CONDITION = re.compile(r'(\S+) (=|!=|=~|>) ("[^"]*"|\w+)')
_UNITS_NS = {"s": 10**9, "ms": 10**6}

Test = Callable[[SinkSpan], bool]


def find(
    query: str, spans: Sequence[SinkSpan], variables: Mapping[str, str]
) -> tuple[list[SinkSpan], list[str]]:
    """The spans that the query finds, and what it selects that no span has, found or not."""
    parsed = _QUERY.fullmatch(query)
    assert parsed, f"not of the TraceQL that is known here: {query}"
    tests = [_test(each, variables) for each in parsed[1].split(" && ")]
    found = [span for span in spans if all(test(span) for test in tests)]
    selected = [each.strip().removeprefix("span.") for each in parsed[2].split(",")]
    return found, _absent(selected, spans)


def _absent(names: Sequence[str], spans: Sequence[SinkSpan]) -> list[str]:
    present = {name for span in spans for name in span.attributes}
    return [name for name in names if name not in present]


def _test(condition: str, variables: Mapping[str, str]) -> Test:
    parsed = _CONDITION.fullmatch(condition)
    assert parsed, f"not of the TraceQL that is known here: {condition}"
    field, operator, value = parsed.groups()
    wanted = re.sub(r"\$(\w+)", lambda name: variables[name[1]], value.strip('"'))
    match field, operator:
        case "kind", "=":
            return lambda span: span.kind.lower() == wanted
        case "status", "=":
            return lambda span: span.status.lower() == wanted
        case "duration", ">":
            return lambda span: span.end_ns - span.start_ns > _nanoseconds(wanted)
    name = field.removeprefix("span.")
    match operator:
        case "!=" if wanted == "nil":
            return lambda span: name in span.attributes
        case "=":
            return lambda span: span.attributes.get(name) == wanted
        case "=~":
            return lambda span: bool(re.fullmatch(wanted, str(span.attributes.get(name, ""))))
    raise AssertionError(f"not of the TraceQL that is known here: {condition}")


def _nanoseconds(text: str) -> int:
    parsed = re.fullmatch(r"(\d+)(\w+)", text)
    assert parsed, text
    return int(parsed[1]) * _UNITS_NS[parsed[2]]
