"""The dashboards and rules of deploy/ as lists of expressions, and what is wrong with them.

An expression is right when a Prometheus that has scraped a daemon has something to answer, for the
whole of it and for each of the metrics in it: what `or vector(0)` covers up, or a comparison that
nothing meets, does not hide a name that is misspelt.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # dbt brings it

from dbtstream.instruments import INSTRUMENTS, Instrument, Kind
from deploy.grafana.source import promql
from tests.prometheus import DEPLOYED, ROOT, Prometheus, PromqlError

FOLDER = ROOT / "deploy" / "grafana" / "dashboards"

OF_THE_SDK = (promql.EXPORTS, promql.SPAN_QUEUE, promql.SPAN_QUEUE_CAPACITY)
OF_PROMETHEUS = {"up": set[str](), "target_info": {"service_version"}}
OF_SCRAPING = {"job", "instance", "le", "__name__"}

_METRIC = re.compile(
    r"(?<![\w:$\"])((?:dbtstream[_:]|process_|otel_)[\w:]+|up\b|target_info\b)"
    r"(\{[^}]*\})?"
)
_GROUPING = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_MATCHED = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"")


@dataclass(frozen=True)
class Selector:
    """A metric with its conditions, as it stands in an expression."""

    name: str
    conditions: str

    def __str__(self) -> str:
        return self.name + self.conditions

    @property
    def labels(self) -> set[str]:
        return set(_MATCHED.findall(self.conditions))


@dataclass(frozen=True)
class Expression:
    """What a panel or a rule asks, and where it stands."""

    where: str
    text: str
    is_range: bool = False
    legend: str = ""

    @property
    def selectors(self) -> list[Selector]:
        bare = _GROUPING.sub("", self.text)
        return [Selector(name, conditions) for name, conditions in _METRIC.findall(bare)]

    @property
    def groupings(self) -> set[str]:
        found = (names for _, names in _GROUPING.findall(self.text))
        return {name.strip() for names in found for name in names.split(",") if name.strip()}


def load_dashboards() -> dict[str, Any]:
    return {
        path.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(FOLDER.glob("*.json"))
    }


def panels_of(dashboard: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """All of them, those inside of rows as well."""
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", [])


def expressions_of(dashboard: Mapping[str, Any]) -> Iterator[Expression]:
    for panel in panels_of(dashboard):
        for target in panel.get("targets", []):
            if "expr" in target:
                yield Expression(
                    f"{dashboard['title']}: {panel['title']} {target['refId']}",
                    target["expr"],
                    bool(target.get("range")),
                    target.get("legendFormat", ""),
                )


def traceql_of(dashboard: Mapping[str, Any]) -> Iterator[Expression]:
    for panel in panels_of(dashboard):
        for target in panel.get("targets", []):
            if "query" in target:
                yield Expression(f"{dashboard['title']}: {panel['title']}", target["query"])


def rule_files() -> list[Path]:
    return sorted((DEPLOYED / "rules").glob("*.yml"))


def rules() -> Iterator[Mapping[str, Any]]:
    for path in rule_files():
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]:
            yield from group["rules"]


def rule_expressions() -> Iterator[Expression]:
    for rule in rules():
        yield Expression(rule.get("record") or rule["alert"], rule["expr"])


def known_labels() -> dict[str, set[str]]:
    """Every metric there is, by the name that Prometheus has for it, with its labels."""
    known = dict(OF_PROMETHEUS)
    for instrument in (*INSTRUMENTS, *OF_THE_SDK):
        labels = {promql.label(attribute) for attribute in instrument.attributes}
        known |= dict.fromkeys(_names(instrument), labels)
    for rule in rules():
        if "record" in rule:
            by = _GROUPING.search(rule["expr"])
            known[rule["record"]] = {name.strip() for name in by[2].split(",")} if by else set()
    return known


def _names(instrument: Instrument) -> list[str]:
    name = instrument.prometheus_name
    is_histogram = instrument.kind is Kind.HISTOGRAM
    return [f"{name}_{part}" for part in ("bucket", "count", "sum")] if is_histogram else [name]


def unknown_names(expressions: Iterable[Expression]) -> list[str]:
    """Metrics and labels that no instrument has: what can be said without a Prometheus."""
    known = known_labels()
    every_label = set().union(*known.values()) | OF_SCRAPING
    found = []
    for expression in expressions:
        for selector in expression.selectors:
            if selector.name not in known:
                found.append(f"{expression.where}: no metric {selector.name}")
            elif strange := selector.labels - known[selector.name] - OF_SCRAPING:
                found.append(f"{expression.where}: {selector.name} has no {sorted(strange)}")
        if strange := expression.groupings - every_label:
            found.append(f"{expression.where}: nothing has {sorted(strange)}")
        if not expression.selectors:
            found.append(f"{expression.where}: asks for no metric")
    return found


@dataclass(frozen=True)
class Asked:
    """What Grafana puts in the place of its variables, and since when a panel looks."""

    since: float
    range_s: int
    rate_s: int = 5

    def fill(self, text: str) -> str:
        """All choices are "All"; a rate's window is longer than four scrapes."""
        text = text.replace("$__rate_interval", f"{self.rate_s}s")
        text = text.replace("$__range", f"{self.range_s}s")
        return re.sub(r"\$(job|instance|project|target)\b", ".*", text)


async def answers(
    server: Prometheus, expression: Expression, asked: Asked
) -> list[tuple[Mapping[str, str], list[float]]]:
    """The series with the numbers that are some: none of them is empty. Raises PromqlError."""
    text = asked.fill(expression.text)
    if expression.is_range:
        series = await server.course(text, asked.since)
        pairs = [(each["metric"], [value for _, value in each["values"]]) for each in series]
    else:
        pairs = [(each["metric"], [each["value"][1]]) for each in await server.value(text)]
    numbers = [
        (metric, [float(value) for value in values if not math.isnan(float(value))])
        for metric, values in pairs
    ]
    return [(metric, values) for metric, values in numbers if values]


async def problems(
    server: Prometheus, expressions: Iterable[Expression], asked: Asked, *, whole: bool = True
) -> list[str]:
    """What has no answer. Not `whole`: only the metrics in it, for alerts that should not fire."""
    found = []
    for expression in expressions:
        try:
            if whole and not await answers(server, expression, asked):
                found.append(f"{expression.where}: empty")
            else:
                await answers(server, expression, asked)  # it must be PromQL in any case
            found += [
                f"{expression.where}: no series for {selector}"
                for selector in expression.selectors
                if not await server.has_series(asked.fill(str(selector)), asked.since)
            ]
        except PromqlError as error:
            found.append(f"{expression.where}: {error}")
    return found
