"""The few kinds of widget that the dashboard has, as Datadog's JSON, and their places.

A widget is twelve columns wide at most. `place` fills rows from the left, as one reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

COLUMNS: Final = 12
SECOND: Final = "second"
BYTE: Final = "byte"

Json = dict[str, Any]
Last = Literal["last", "sum", "max", "avg"]


@dataclass(frozen=True, kw_only=True)
class Widget:
    definition: Json
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class Series:
    """A query, or a formula of several, with a name for people."""

    alias: str
    queries: Mapping[str, str]
    formula: str
    unit: str = ""
    over_time: Last = "last"
    """What is shown where there is no time axis: the last value, or one of all."""


def series(alias: str, query: str, *, unit: str = "", over_time: Last = "last") -> Series:
    return Series(alias=alias, queries={"": query}, formula="", unit=unit, over_time=over_time)


def count_of(alias: str, query: str) -> Series:
    """As one number: a count without data is 0, and nothing at all would look broken."""
    return Series(alias=alias, queries={"": query}, formula="default_zero({})", over_time="sum")


NONE_IS_GOOD: Final[list[Json]] = [
    {"comparator": ">", "value": 0, "palette": "white_on_red"},
    {"comparator": "<=", "value": 0, "palette": "white_on_green"},
]
NONE_IS_BAD: Final[list[Json]] = [
    {"comparator": "<", "value": 1, "palette": "white_on_red"},
    {"comparator": ">=", "value": 1, "palette": "white_on_green"},
]


def number(
    title: str, shown: Series, *, colours: Sequence[Json] = (), width: int = 2, precision: int = 0
) -> Widget:
    request = _request([shown], "scalar")
    if colours:
        request["conditional_formats"] = list(colours)
    definition = {
        "type": "query_value",
        "title": title,
        "requests": [request],
        "autoscale": True,
        "precision": precision,
    }
    return Widget(definition=definition, width=width, height=2)


def lines(title: str, *shown: Series, width: int = 4, height: int = 3) -> Widget:
    return _timeseries(title, shown, "line", width, height)


def bars(title: str, *shown: Series, width: int = 4, height: int = 3) -> Widget:
    return _timeseries(title, shown, "bars", width, height)


def ranking(
    title: str, shown: Series, *, limit: int = 10, width: int = 4, height: int = 3
) -> Widget:
    request = _request([shown], "scalar")
    request["sort"] = _sort(limit)
    return Widget(
        definition={"type": "toplist", "title": title, "requests": [request]},
        width=width,
        height=height,
    )


def table(
    title: str, *shown: Series, limit: int = 50, width: int = COLUMNS, height: int = 4
) -> Widget:
    request = _request(shown, "scalar")
    request["sort"] = _sort(limit)
    definition = {
        "type": "query_table",
        "title": title,
        "requests": [request],
        "has_search_bar": "auto",
    }
    return Widget(definition=definition, width=width, height=height)


def spans(title: str, search: str, columns: Sequence[str], *, height: int = 5) -> Widget:
    query = {"data_source": "trace_stream", "query_string": search, "indexes": []}
    request = {
        "response_format": "event_list",
        "query": query,
        "columns": [{"field": field, "width": "auto"} for field in columns],
    }
    definition = {"type": "list_stream", "title": title, "requests": [request]}
    return Widget(definition=definition, width=COLUMNS, height=height)


def note(text: str, *, height: int = 1) -> Widget:
    definition = {
        "type": "note",
        "content": text,
        "background_color": "transparent",
        "font_size": "14",
        "text_align": "left",
        "vertical_align": "center",
        "has_padding": False,
        "show_tick": False,
    }
    return Widget(definition=definition, width=COLUMNS, height=height)


def group(title: str, *widgets: Widget) -> Widget:
    placed, height = place(widgets)
    definition = {
        "type": "group",
        "layout_type": "ordered",
        "title": title,
        "show_title": True,
        "widgets": placed,
    }
    return Widget(definition=definition, width=COLUMNS, height=height + 1)


def place(widgets: Sequence[Widget]) -> tuple[list[Json], int]:
    """As JSON, each with its place, and the height of all."""
    placed: list[Json] = []
    x = y = row = 0
    for widget in widgets:
        if x + widget.width > COLUMNS:
            x, y, row = 0, y + row, 0
        layout = {"x": x, "y": y, "width": widget.width, "height": widget.height}
        placed.append({"definition": widget.definition, "layout": layout})
        x, row = x + widget.width, max(row, widget.height)
    return placed, y + row


def _timeseries(
    title: str, shown: Sequence[Series], display: str, width: int, height: int
) -> Widget:
    request = _request(shown, "timeseries") | {"display_type": display}
    definition = {
        "type": "timeseries",
        "title": title,
        "show_legend": True,
        "legend_layout": "auto",
        "requests": [request],
    }
    return Widget(definition=definition, width=width, height=height)


def _request(shown: Sequence[Series], response: Literal["scalar", "timeseries"]) -> Json:
    """Queries of several series have names of their own: a0, a1, b0 and so on."""
    queries: list[Json] = []
    formulas: list[Json] = []
    for letter, one in zip("abcdefghij", shown, strict=False):
        formula = one.formula
        for index, (name, query) in enumerate(one.queries.items()):
            named: Json = {"data_source": "metrics", "name": f"{letter}{index}", "query": query}
            if response == "scalar":
                named["aggregator"] = one.over_time
            queries.append(named)
            formula = formula.replace(f"{{{name}}}", f"{letter}{index}") or f"{letter}{index}"
        formulas.append({"formula": formula, "alias": one.alias} | _number_format(one.unit))
    return {"response_format": response, "queries": queries, "formulas": formulas}


def _number_format(unit: str) -> Json:
    """OTLP brings no units along as Datadog takes it."""
    if not unit:
        return {}
    return {"number_format": {"unit": {"type": "canonical_unit", "unit_name": unit}}}


def _sort(limit: int) -> Json:
    return {"count": limit, "order_by": [{"type": "formula", "index": 0, "order": "desc"}]}
