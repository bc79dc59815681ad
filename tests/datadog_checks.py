"""What is wrong with a dashboard or monitor of Datadog, as far as one can tell without Datadog.

The models of datadog-api-client know types, required keys and enums. They keep quiet about unknown
keys and do not look into queries, so both is done here: every metric is an instrument of ours (or
the SDK's), used as the kind of metric that Datadog makes of it, every tag is one that it has, every
`$variable` is declared.

`_unparsed` and `_data_store` are private to the client: its version is pinned in pyproject.toml.
"""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import click
from datadog_api_client import Configuration
from datadog_api_client.exceptions import ApiTypeError, ApiValueError
from datadog_api_client.model_utils import (
    OpenApiModel,
    UnparsedObject,
    validate_and_convert_types,
)
from datadog_api_client.v1.model.dashboard import Dashboard
from datadog_api_client.v1.model.monitor import Monitor
from datadog_api_client.v1.model.widget import Widget

from dbtstream.cli import cli
from dbtstream.config import KNOWN_COMMANDS
from dbtstream.error_types import ErrorType
from dbtstream.instruments import (
    COMMAND,
    ERROR_TYPE,
    FRESHNESS,
    INSTRUMENTS,
    NODE_STATUS,
    NODE_TYPE,
    RUN_STATUS,
    STAGE,
    STAGES,
    Kind,
)
from dbtstream.measurements import FRESHNESS as FRESHNESS_OUTCOMES
from dbtstream.measurements import NODE_TYPES
from dbtstream.statuses import NodeStatus, RunStatus

METRICS = {instrument.name: instrument for instrument in INSTRUMENTS}
RESOURCE_TAGS = frozenset({"env", "service", "version", "service.instance.id"})
"""From the resource, on every metric; the last one by `resource_attributes_as_tags`."""

COUNT, GAUGE, DISTRIBUTION = "count", "gauge", "distribution"
TYPES = {
    Kind.COUNTER: COUNT,
    Kind.OBSERVED_COUNTER: COUNT,
    Kind.GAUGE: GAUGE,
    Kind.OBSERVED: GAUGE,
    Kind.HISTOGRAM: DISTRIBUTION,
}
"""What Datadog's Agent and exporter make of OTLP (deltas for counters and histograms)."""

AGGREGATES = {
    COUNT: frozenset({"sum"}),
    GAUGE: frozenset({"avg", "max", "min", "sum"}),
    DISTRIBUTION: frozenset({"count", "sum", "avg", "max", "min", "p50", "p75", "p90"})
    | {"p95", "p99"},
}

FUNCTIONS = frozenset({"day_before", "week_before", "default_zero"})

VALUES: dict[str, frozenset[str]] = {
    COMMAND: frozenset(KNOWN_COMMANDS),
    ERROR_TYPE: frozenset(ErrorType),
    FRESHNESS: frozenset(FRESHNESS_OUTCOMES),
    NODE_STATUS: frozenset(NodeStatus),
    NODE_TYPE: NODE_TYPES,
    RUN_STATUS: frozenset(RunStatus),
    STAGE: frozenset(STAGES),
}
"""Of tags that are a closed list: a filter for another value finds nothing."""

LEAF = re.compile(
    r"(?P<aggregate>[a-z]+\d*):(?P<metric>[a-z][\w.]*)\{(?P<scope>[^{}]*)\}"
    r"(?: by \{(?P<by>[^{}]*)\})?(?P<as_count>\.as_count\(\))?"
)
TAG = r"[a-z][\w.]*"
VALUE = r"[\w.*/-]+"
FILTER = re.compile(
    rf"(?P<variable>\$\w+)|(?P<tag>{TAG}):(?P<value>{VALUE})"
    rf"|(?P<listed>{TAG}) (?:NOT )?IN \((?P<values>{VALUE}(?:, ?{VALUE})*)\)"
)

WINDOW = r"last_(?:\d+[mhd]|1w)"
OPERATOR = r"<=|>=|==|!=|<|>"
MONITOR_QUERY = re.compile(
    rf"(?:(?P<over>avg|sum|max|min)\((?P<window>{WINDOW})\)"
    rf"|(?:pct_)?change\((?P<change_over>avg|sum|max|min)\({WINDOW}\),{WINDOW}\))"
    rf":(?P<expression>.+) (?P<operator>{OPERATOR}) (?P<threshold>-?\d+(?:\.\d+)?)"
)

VARIABLES_OF_MESSAGES = frozenset(
    {"value", "threshold", "warn_threshold", "ok_threshold", "comparator"}
    | {"first_triggered_at", "last_triggered_at", "triggered_duration_sec"}
)
CONDITIONS = frozenset(
    {"is_alert", "is_warning", "is_recovery", "is_no_data", "is_alert_recovery"}
    | {"is_warning_recovery", "is_no_data_recovery", "is_renotify"}
)


@dataclass(frozen=True)
class Leaf:
    """`agg:metric{scope} by {tags}.as_count()`."""

    text: str
    aggregate: str
    metric: str
    scope: str
    by: tuple[str, ...]
    as_count: bool


def problems_of_dashboard(document: Mapping[str, Any]) -> list[str]:
    # A group with a bad widget is bad as a whole, to the client: look at each widget first.
    problems = [
        f"{path}: {text}"
        for path, widget in _in_groups(document)
        for text in problems_of_model(widget, Widget)
    ] or problems_of_model(document, Dashboard)
    declared = {str(variable.get("name")) for variable in document.get("template_variables", [])}
    used: set[str] = set()
    for path, key, value in strings(document):
        if key == "query":
            problems += [f"{path}: {text}" for text in _problems_of_expression(value)]
        if key in ("query", "query_string"):
            names = set(re.findall(r"\$(\w+)", value))
            problems += [f"{path}: ${name} is not declared" for name in sorted(names - declared)]
            used |= names
    for path, request in dicts(document):
        if "formulas" in request:
            problems += [f"{path}: {text}" for text in _problems_of_formulas(request)]
    problems += [f"${name} is declared and not used" for name in sorted(declared - used)]
    return problems


def problems_of_monitor(document: Mapping[str, Any]) -> list[str]:
    problems = problems_of_model(document, Monitor)
    query = str(document.get("query", ""))
    parsed = MONITOR_QUERY.fullmatch(query)
    if parsed is None:
        return [*problems, f"not time_aggregate(window):expression operator number: {query}"]
    problems += _problems_of_expression(parsed["expression"])
    leaves = list(_leaves(parsed["expression"]))
    if any("$" in leaf.scope for leaf in leaves):
        problems.append("a monitor has no $variables")
    if len({leaf.by for leaf in leaves}) > 1:
        problems.append("its queries are grouped differently")
    over = parsed["over"] or parsed["change_over"]
    if any(leaf.as_count for leaf in leaves) and over != "sum":
        problems.append(f"as_count() goes with sum(…) only, not with {over}(…)")
    problems += _problems_of_thresholds(document, parsed["operator"], float(parsed["threshold"]))
    if (priority := document.get("priority")) not in range(1, 6):
        problems.append(f"priority {priority} is not one of 1 to 5")
    options = document.get("options", {})
    if "on_missing_data" in options and "notify_no_data" in options:
        problems.append("on_missing_data and notify_no_data exclude each other")
    if document.get("type") != "query alert":
        problems.append(f"{document.get('type')} is not the type of a metric monitor: query alert")
    if leaves:
        problems += _problems_of_message(document, leaves[0].by)
    return problems


def problems_of_model(document: Mapping[str, Any], model: type[OpenApiModel]) -> list[str]:
    """As the client's own models see it, and what they keep to themselves."""
    try:
        read = validate_and_convert_types(
            document, (model,), ["document"], True, True, configuration=Configuration()
        )
    except (ApiTypeError, ApiValueError, TypeError, ValueError) as error:
        return [f"{model.__name__}: {error}"]
    return list(_unread(read, model.__name__))


def _unread(read: Any, path: str) -> Iterator[str]:
    """Keys that no model has, and the lowest parts that no model fits."""
    if isinstance(read, list):
        for index, item in enumerate(read):
            yield from _unread(item, f"{path}[{index}]")
    if not isinstance(read, OpenApiModel):
        return
    if isinstance(read, UnparsedObject):
        yield f"{path}: fits no model: {shorten(str(read), 200)}"
        return
    if composed := vars(read).get("_composed_instances"):  # one of several models fitted
        yield from _unread(composed[0], path)
        return
    inside: list[str] = []
    for key, value in read._data_store.items():
        if key not in type(read).openapi_types:
            inside.append(f"{path}: {key!r} is no key of {type(read).__name__}")
        inside += _unread(value, f"{path}.{key}")
    yield from inside
    if read._unparsed and not inside:
        yield f"{path}: does not fit {type(read).__name__}: {shorten(str(read), 200)}"


def _problems_of_expression(expression: str) -> list[str]:
    """Queries with numbers and functions around them. What is left without the queries is
    arithmetic as Python has it."""
    problems: list[str] = []
    leaves = list(_leaves(expression))
    if not leaves:
        problems.append(f"has no aggregate:metric{{scope}}: {expression}")
    for leaf in leaves:
        problems += _problems_of_leaf(leaf)
    rest = LEAF.sub("q", expression)
    return problems + _problems_of_arithmetic(rest, {"q"}, FUNCTIONS)


def _problems_of_arithmetic(text: str, names: set[str], functions: frozenset[str]) -> list[str]:
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        return [f"cannot be read: {text}"]
    problems = []
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) if id(node) in called:
                if name not in functions:
                    problems.append(f"{name}() is not a function that we know of Datadog")
            case ast.Name(id=name):
                if name not in names:
                    problems.append(f"{name} is not the name of a query")
            case (
                ast.Expression()
                | ast.BinOp()
                | ast.UnaryOp()
                | ast.operator()
                | ast.unaryop()
                | ast.Call()
                | ast.Load()
                | ast.Constant(value=int() | float())
            ):
                pass
            case _:
                problems.append(f"cannot be read: {text}")
    return problems


def _problems_of_leaf(leaf: Leaf) -> list[str]:
    instrument = METRICS.get(leaf.metric)
    if instrument is None:
        return [f"{leaf.metric} is no metric of ours"]
    type_ = TYPES[instrument.kind]
    problems = []
    if leaf.aggregate not in AGGREGATES[type_]:
        problems.append(f"{leaf.metric} is a {type_}, which has no {leaf.aggregate}:")
    counts = type_ == COUNT or (type_ == DISTRIBUTION and leaf.aggregate == "count")
    if counts and not leaf.as_count:
        problems.append(f"{leaf.metric} is counted, but shown per second: .as_count() is missing")
    if leaf.as_count and not counts:
        problems.append(f"{leaf.aggregate}:{leaf.metric} does not count: no .as_count()")
    tags = {*instrument.attributes, *RESOURCE_TAGS}
    problems += [f"{leaf.metric} has no {tag}" for tag in leaf.by if tag not in tags]
    return problems + _problems_of_scope(leaf, tags)


def _problems_of_scope(leaf: Leaf, tags: set[str]) -> list[str]:
    if leaf.scope == "*":
        return []
    if " AND " in leaf.scope or " IN " in leaf.scope:
        parts = leaf.scope.split(" AND ")
    else:
        parts = leaf.scope.split(",")
    problems = []
    for part in parts:
        found = FILTER.fullmatch(part.strip())
        if found is None:
            problems.append(f"{leaf.metric}: {part.strip()!r} in {{{leaf.scope}}} is no filter")
        elif tag := found["tag"] or found["listed"]:
            if tag not in tags:
                problems.append(f"{leaf.metric} has no {tag}")
            values = set(re.split(", ?", found["value"] or found["values"]))
            unknown = values - VALUES[tag] if tag in VALUES else set()
            problems += [f"{tag} is never {value}" for value in sorted(unknown)]
    return problems


def _problems_of_formulas(request: Mapping[str, Any]) -> list[str]:
    names = [str(query.get("name")) for query in request.get("queries", [])]
    problems = [f"two queries are called {name}" for name in {*names} if names.count(name) > 1]
    formulas = [str(formula.get("formula")) for formula in request["formulas"]]
    for formula in formulas:
        problems += _problems_of_arithmetic(formula, {*names}, FUNCTIONS)
    unused = [name for name in names if not re.search(rf"\b{name}\b", " ".join(formulas))]
    problems += [f"query {name} is in no formula" for name in unused]
    if request.get("response_format") == "scalar":
        problems += [
            f"query {query.get('name')} has no aggregator"
            for query in request.get("queries", [])
            if "aggregator" not in query
        ]
    return problems


def _problems_of_thresholds(
    document: Mapping[str, Any], operator: str, threshold: float
) -> list[str]:
    thresholds = document.get("options", {}).get("thresholds", {})
    critical, warning = thresholds.get("critical"), thresholds.get("warning")
    problems = []
    if critical != threshold:
        problems.append(f"the query says {threshold:g}, thresholds.critical {critical}")
    if warning is not None and critical is not None:
        too_late = warning >= critical if operator.startswith(">") else warning <= critical
        if too_late:
            problems.append(f"the warning at {warning:g} does not come before {critical:g}")
    return problems


def _problems_of_message(document: Mapping[str, Any], by: Sequence[str]) -> list[str]:
    text = f"{document.get('name')}\n{document.get('message')}"
    problems = []
    opened: list[str] = []
    for name in re.findall(r"\{\{([^{}]*)\}\}", text):
        if name[:1] in "#^/":
            if name[1:] not in CONDITIONS:
                problems.append(f"{{{{{name}}}}} is no condition")
            elif name[0] != "/":
                opened.append(name[1:])
            elif not opened or opened.pop() != name[1:]:
                problems.append(f"{{{{{name}}}}} closes what is not open")
        elif name not in VARIABLES_OF_MESSAGES:
            problems += _problems_of_tag_variable(name, by)
    problems += [f"{{{{#{name}}}}} is not closed" for name in opened]
    if not re.search(r"(?:^|\s)@[\w-]+", str(document.get("message"))):
        problems.append("tells nobody: there is no @handle in its message")
    return problems + _problems_of_commands(text)


def _problems_of_tag_variable(name: str, by: Sequence[str]) -> list[str]:
    bracketed = re.fullmatch(r"\[(.+)\]\.name", name)
    tag = bracketed[1] if bracketed else name.removesuffix(".name")
    if tag not in by:
        return [f"{{{{{name}}}}} is no group of it"]
    if "." in tag and not bracketed:
        return [f"{{{{{name}}}}}: a tag with a dot has to be in brackets"]
    return []


def _problems_of_commands(text: str) -> list[str]:
    """`dbtstream …` in a message is a command that there is."""
    problems = []
    for words in re.findall(r"`dbtstream ([^`]*)`", text):
        command: click.Command = cli
        for word in words.split():
            if not isinstance(command, click.Group):
                break
            if word not in command.commands:
                problems.append(f"there is no `dbtstream {words}`")
                break
            command = command.commands[word]
        options = {option for parameter in command.params for option in parameter.opts}
        problems += [
            f"`dbtstream {words}` has no {option}"
            for option in re.findall(r"(?<=\s)--\w[\w-]*", words)
            if option not in options
        ]
    return problems


def _leaves(expression: str) -> Iterator[Leaf]:
    for found in LEAF.finditer(expression):
        yield Leaf(
            text=found[0],
            aggregate=found["aggregate"],
            metric=found["metric"],
            scope=found["scope"],
            by=tuple(tag.strip() for tag in (found["by"] or "").split(",") if tag),
            as_count=found["as_count"] is not None,
        )


def _in_groups(document: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for path, part in dicts(document):
        if part.get("type") == "group":
            for index, widget in enumerate(part.get("widgets", [])):
                yield f"{path}.widgets[{index}]", widget


def strings(document: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Path, key and text of everything in it that is text."""
    for where, part in dicts(document, path):
        for key, value in part.items():
            if isinstance(value, str):
                yield where, key, value


def dicts(document: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(document, Mapping):
        yield path, document
        for key, value in document.items():
            yield from dicts(value, f"{path}.{key}")
    elif isinstance(document, list):
        for index, value in enumerate(document):
            yield from dicts(value, f"{path}[{index}]")
