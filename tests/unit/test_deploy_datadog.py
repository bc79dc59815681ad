"""Datadog's dashboard and monitors hold what its API wants and what we measure; the config
excerpts beside them fit each other. Nothing of Datadog is asked: it cannot be had offline."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml  # type: ignore[import-untyped]
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    InMemoryMetricReader,
    Sum,
)

from dbtstream import instruments
from dbtstream.config import Config, load_config
from dbtstream.instruments import UNIQUE_ID, Kind
from dbtstream.measurements import Known, Measurement
from dbtstream.metrics import Metrics
from dbtstream.otel_sdk import DELTA
from deploy.datadog.source.__main__ import rendered
from deploy.datadog.source.queries import Unfit, how_many, percentile, value
from tests.datadog_checks import (
    COUNT,
    DISTRIBUTION,
    GAUGE,
    METRICS,
    TYPES,
    dicts,
    problems_of_dashboard,
    problems_of_monitor,
)
from tests.span_trees import spans_of
from tests.stories import Story, context, node

FOLDER = Path(__file__).parents[2] / "deploy" / "datadog"
MONITORS = sorted(path.stem for path in (FOLDER / "monitors").glob("*.json"))

Json = dict[str, Any]
Change = Callable[[Json], None]


def read(name: str) -> Json:
    document: Json = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return document


@pytest.fixture
def dashboard() -> Json:
    return read("dashboard.json")


@pytest.fixture(scope="module")
def agent() -> Json:
    config: Json = yaml.safe_load((FOLDER / "datadog.yaml").read_text(encoding="utf-8"))
    return config


@pytest.fixture(scope="module")
def daemon() -> Config:
    return load_config(FOLDER / "dbtstream.toml", {})


# -- what is committed -----------------------------------------------------------------------


def test_what_is_committed_is_what_the_source_writes() -> None:
    """If not: python -m deploy.datadog.source"""
    files = [FOLDER / "dashboard.json", *(FOLDER / "monitors").iterdir()]
    committed = {str(file.relative_to(FOLDER)): file.read_text(encoding="utf-8") for file in files}
    assert committed == rendered()


def test_nothing_is_wrong_with_the_dashboard(dashboard: Json) -> None:
    assert problems_of_dashboard(dashboard) == []


@pytest.mark.parametrize("name", MONITORS)
def test_nothing_is_wrong_with_a_monitor(name: str) -> None:
    assert problems_of_monitor(read(f"monitors/{name}.json")) == []


def test_each_thing_that_prometheus_watches_has_a_monitor() -> None:
    assert {
        *("run-failed", "no-success", "queue-stuck", "worker-gone"),
        *("telemetry-dropping", "outbox-growing", "source-stale", "run-slow"),
    } <= {*MONITORS}


def test_every_group_of_the_dashboard_is_as_high_as_its_widgets(dashboard: Json) -> None:
    for group in dashboard["widgets"]:
        inside = [widget["layout"] for widget in group["definition"]["widgets"]]
        assert group["layout"]["height"] == 1 + max(
            place["y"] + place["height"] for place in inside
        )
        taken = [
            (x, y)
            for place in inside
            for x in range(place["x"], place["x"] + place["width"])
            for y in range(place["y"], place["y"] + place["height"])
        ]
        assert len(taken) == len(set(taken)), "two widgets are in one place"
        assert max(x for x, _ in taken) < 12


def test_lists_of_spans_ask_for_attributes_that_spans_have(dashboard: Json) -> None:
    """A facet that no span has makes an empty list, and nobody is told why."""
    told = Story()
    told.plan(node("model.shop.orders"), node("test.shop.unique.1a", "model.shop.orders"))
    told.run("model.shop.orders")
    told.run("test.shop.unique.1a", "fail", failures=2)
    told.result(1)
    told.end()
    spans = spans_of(told.events, context())
    of_runs = {name for span in spans if span.kind == "consumer" for name in span.attributes}
    of_nodes = {name for span in spans if UNIQUE_ID in span.attributes for name in span.attributes}
    made_by_datadog = {"duration", "span.kind"}

    lists = [
        request
        for _, part in dicts(dashboard)
        if part.get("type") == "list_stream"
        for request in part["requests"]
    ]
    asked = [
        set(re.findall(r"@([\w.]+)", f"{request['query']['query_string']} {request['columns']}"))
        for request in lists
    ]
    assert len(asked) == 2
    assert asked[0] <= of_runs | made_by_datadog
    assert asked[1] <= of_nodes | made_by_datadog
    prefixes = {variable["prefix"] for variable in dashboard["template_variables"]}
    assert {prefix[1:] for prefix in prefixes if prefix[0] == "@"} <= of_runs & of_nodes


# -- mistakes that are found -----------------------------------------------------------------


def definition(document: Json, kind: str) -> Json:
    """The first widget of a kind."""
    for group in document["widgets"]:
        for widget in group["definition"]["widgets"]:
            if widget["definition"]["type"] == kind:
                found: Json = widget["definition"]
                return found
    raise AssertionError(kind)


def first_request(document: Json, kind: str = "timeseries") -> Json:
    found: Json = definition(document, kind)["requests"][0]
    return found


def change_query(change: Callable[[str], str], kind: str = "timeseries") -> Change:
    def changed(document: Json) -> None:
        query = first_request(document, kind)["queries"][0]
        query["query"] = change(query["query"])

    return changed


def query_of_dashboard(query: str) -> Change:
    return change_query(lambda _: query)


def set_in(request: str, key: str, to: Any) -> Change:
    return lambda document: first_request(document, request).update({key: to})


MISTAKES_IN_DASHBOARDS: dict[str, tuple[Change, str]] = {
    "kind of widget": (
        lambda d: definition(d, "toplist").update(type="toplst"),
        "fits no model",
    ),
    "kind of layout": (lambda d: d.update(layout_type="orderd"), "layout_type"),
    "display type": (set_in("timeseries", "display_type", "lines"), "fits no model"),
    "data source": (
        lambda d: first_request(d)["queries"][0].update(data_source="metric"),
        "fits no model",
    ),
    "source of a list": (
        lambda d: first_request(d, "list_stream")["query"].update(data_source="trace"),
        "fits no model",
    ),
    "no layout_type": (lambda d: d.pop("layout_type"), "Dashboard: "),
    "no title": (lambda d: d.pop("title"), "Dashboard: "),
    "an object for a list": (lambda d: d.update(widgets={}), "Dashboard: "),
    "key of the dashboard": (lambda d: d.update(widgts=[]), "'widgts' is no key of Dashboard"),
    "key of a widget": (lambda d: definition(d, "note").update(contents=""), "'contents'"),
    "key of a request": (set_in("timeseries", "displaytype", "line"), "'displaytype'"),
    "key of a variable": (lambda d: d["template_variables"][0].update(prefx=""), "'prefx'"),
    "no closing brace": (
        change_query(lambda query: query.replace("}", "", 1)),
        "has no aggregate:metric{scope}",
    ),
    "a word too many": (change_query(lambda query: query + " please"), "cannot be read"),
    "name of a metric": (
        query_of_dashboard("sum:dbtstream.run.endet{*}.as_count()"),
        "dbtstream.run.endet is no metric of ours",
    ),
    "Prometheus' name of a metric": (
        query_of_dashboard("sum:dbtstream_run_ended_total{*}.as_count()"),
        "dbtstream_run_ended_total is no metric of ours",
    ),
    "a mean of a count": (
        query_of_dashboard("avg:dbtstream.run.ended{*}.as_count()"),
        "is a count, which has no avg:",
    ),
    "a count per second": (
        query_of_dashboard("sum:dbtstream.run.ended{*}"),
        ".as_count() is missing",
    ),
    "a count of a gauge": (
        query_of_dashboard("sum:dbtstream.queue.pending{*}.as_count()"),
        "does not count: no .as_count()",
    ),
    "a percentile of a gauge": (
        query_of_dashboard("p95:dbtstream.queue.oldest.age{*}"),
        "is a gauge, which has no p95:",
    ),
    "a percentile that is none of Datadog's": (
        query_of_dashboard("p97:dbtstream.run.duration{*}"),
        "is a distribution, which has no p97:",
    ),
    "a group that the metric has not": (
        query_of_dashboard("max:dbtstream.queue.pending{*} by {dbt.command}"),
        "dbtstream.queue.pending has no dbt.command",
    ),
    "a filter that the metric has not": (
        query_of_dashboard("max:dbtstream.queue.pending{dbt.command:build}"),
        "dbtstream.queue.pending has no dbt.command",
    ),
    "a listed filter that the metric has not": (
        query_of_dashboard("max:dbtstream.queue.pending{dbt.command IN (build,run)}"),
        "dbtstream.queue.pending has no dbt.command",
    ),
    "a value that never comes": (
        query_of_dashboard("sum:dbtstream.run.ended{dbtstream.run.status:failed}.as_count()"),
        "dbtstream.run.status is never failed",
    ),
    "one of several that never comes": (
        query_of_dashboard(
            "count:dbtstream.node.duration{dbt.node.status IN (fail,broken)}.as_count()"
        ),
        "dbt.node.status is never broken",
    ),
    "a comma beside IN": (
        query_of_dashboard("max:dbtstream.queue.pending{$env,dbt.target.name IN (dev,ci)}"),
        "is no filter",
    ),
    "an undeclared variable": (
        query_of_dashboard("max:dbtstream.queue.pending{$environment}"),
        "$environment is not declared",
    ),
    "an undeclared variable in a search": (
        lambda d: first_request(d, "list_stream")["query"].update(query_string="$enviro"),
        "$enviro is not declared",
    ),
    "a variable that nothing uses": (
        lambda d: d["template_variables"].append({"name": "team", "prefix": "team"}),
        "$team is declared and not used",
    ),
    "a formula of nothing": (
        lambda d: first_request(d)["formulas"][0].update(formula="a0 + c7"),
        "c7 is not the name of a query",
    ),
    "an unknown function": (
        lambda d: first_request(d)["formulas"][0].update(formula="hours_ago(a0)"),
        "hours_ago() is not a function",
    ),
    "a formula that is none": (
        lambda d: first_request(d)["formulas"][0].update(formula="a0 +"),
        "cannot be read: a0 +",
    ),
    "a query in no formula": (
        lambda d: first_request(d)["queries"].append(
            first_request(d)["queries"][0] | {"name": "lonely"}
        ),
        "query lonely is in no formula",
    ),
    "two queries of one name": (
        lambda d: first_request(d)["queries"].append(first_request(d)["queries"][0]),
        "two queries are called a0",
    ),
    "a number of many": (
        lambda d: first_request(d, "query_value")["queries"][0].pop("aggregator"),
        "query a0 has no aggregator",
    ),
}


@pytest.fixture
def one_of_each_kind(dashboard: Json) -> Json:
    """The client takes its time for a whole dashboard."""
    kinds: Json = {}
    for group in dashboard["widgets"]:
        for widget in group["definition"]["widgets"]:
            kinds.setdefault(widget["definition"]["type"], widget)
    group["definition"]["widgets"] = list(kinds.values())
    return dashboard | {"widgets": [group]}


def test_without_a_mistake_nothing_is_found(one_of_each_kind: Json) -> None:
    assert problems_of_dashboard(one_of_each_kind) == ["$worker is declared and not used"]


@pytest.mark.parametrize("mistake", MISTAKES_IN_DASHBOARDS)
def test_a_mistake_in_the_dashboard_is_found(mistake: str, one_of_each_kind: Json) -> None:
    make, expected = MISTAKES_IN_DASHBOARDS[mistake]
    changed = copy.deepcopy(one_of_each_kind)
    make(changed)
    problems = problems_of_dashboard(changed)
    assert any(expected in problem for problem in problems), problems


def option(key: str, to: Any) -> Change:
    return lambda document: document["options"].update({key: to})


def query_of_monitor(old: str, new: str) -> Change:
    def changed(document: Json) -> None:
        assert old in document["query"]
        document["query"] = document["query"].replace(old, new, 1)

    return changed


def message(addition: str) -> Change:
    return lambda document: document.update(message=document["message"] + addition)


MISTAKES_IN_MONITORS: dict[str, tuple[str, Change, str]] = {
    "type": ("run-failed", lambda d: d.update(type="query alrt"), "does not fit MonitorType"),
    "type of another monitor": (
        "run-failed",
        lambda d: d.update(type="log alert"),
        "log alert is not the type of a metric monitor",
    ),
    "no query": ("run-failed", lambda d: d.pop("query"), "Monitor: "),
    "no type": ("run-failed", lambda d: d.pop("type"), "Monitor: "),
    "text for a number": ("run-failed", lambda d: d.update(priority="high"), "Monitor"),
    "priority": ("run-failed", lambda d: d.update(priority=9), "priority 9 is not one of 1 to 5"),
    "key of the monitor": ("run-failed", lambda d: d.update(mesage=""), "'mesage' is no key"),
    "key of the options": ("run-failed", option("notify_nodata", to=True), "'notify_nodata'"),
    "key of the thresholds": (
        "run-failed",
        lambda d: d["options"]["thresholds"].update(critcal=1),
        "'critcal' is no key of MonitorThresholds",
    ),
    "missing data": ("worker-gone", option("on_missing_data", "tell"), "does not fit"),
    "missing data said twice": (
        "worker-gone",
        option("notify_no_data", to=True),
        "exclude each other",
    ),
    "no window": ("run-failed", query_of_monitor("sum(last_10m):", ""), "not time_aggregate"),
    "unit of the window": ("run-failed", query_of_monitor("10m", "10min"), "not time_aggregate"),
    "no threshold": ("run-failed", query_of_monitor(" > 0", ""), "not time_aggregate"),
    "operator": ("run-failed", query_of_monitor(" > ", " => "), "not time_aggregate"),
    "two thresholds": (
        "queue-stuck",
        lambda d: d["options"]["thresholds"].update(critical=60),
        "the query says 3600, thresholds.critical 60",
    ),
    "a late warning": (
        "queue-stuck",
        lambda d: d["options"]["thresholds"].update(warning=4000),
        "the warning at 4000 does not come before 3600",
    ),
    "a late warning from below": (
        "worker-gone",
        lambda d: d["options"]["thresholds"].update(warning=0),
        "the warning at 0 does not come before 1",
    ),
    "a mean of counts": (
        "run-failed",
        query_of_monitor("sum(last_10m)", "avg(last_10m)"),
        "as_count() goes with sum(…) only, not with avg(…)",
    ),
    "name of a metric": ("queue-stuck", query_of_monitor("oldest.age", "age"), "no metric of ours"),
    "a tag": (
        "queue-stuck",
        query_of_monitor("dbt.target.name", "dbt.target"),
        "has no dbt.target",
    ),
    "a variable": ("queue-stuck", query_of_monitor("{*}", "{$env}"), "has no $variables"),
    "a function": ("run-slow", query_of_monitor("week_before", "weeks_before"), "weeks_before()"),
    "groups": (
        "run-slow",
        query_of_monitor("{env,service,", "{service,"),
        "its queries are grouped differently",
    ),
    "a text about no group": (
        "run-failed",
        message("{{[dbt.command].name}}"),
        "{{[dbt.command].name}} is no group of it",
    ),
    "a dot without brackets": (
        "run-failed",
        message("{{dbt.project.name.name}}"),
        "a tag with a dot has to be in brackets",
    ),
    "an unknown condition": ("run-failed", message("{{#is_bad}}{{/is_bad}}"), "is no condition"),
    "an open condition": ("run-failed", message("{{#is_alert}}"), "{{#is_alert}} is not closed"),
    "crossed conditions": (
        "run-failed",
        message("{{#is_alert}}{{/is_warning}}"),
        "{{/is_warning}} closes what is not open",
    ),
    "nobody to tell": ("run-failed", lambda d: d.update(message="Oh!"), "tells nobody"),
    "a command": ("run-failed", message("`dbtstream runs`"), "there is no `dbtstream runs`"),
    "a command below a command": ("run-failed", message("`dbtstream dead list`"), "there is no"),
    "an option": ("run-failed", message("`dbtstream ps --every`"), "has no --every"),
}


@pytest.mark.parametrize("mistake", MISTAKES_IN_MONITORS)
def test_a_mistake_in_a_monitor_is_found(mistake: str) -> None:
    name, make, expected = MISTAKES_IN_MONITORS[mistake]
    changed = read(f"monitors/{name}.json")
    make(changed)
    problems = problems_of_monitor(changed)
    assert any(expected in problem for problem in problems), problems


def test_the_source_refuses_what_a_metric_is_not() -> None:
    with pytest.raises(Unfit, match="is a gauge"):
        how_many(instruments.QUEUE_PENDING)
    with pytest.raises(Unfit, match="is no gauge"):
        value(instruments.RUN_DURATION, space="max")
    with pytest.raises(Unfit, match="is no distribution"):
        percentile(instruments.QUEUE_PENDING, 95)
    with pytest.raises(Unfit, match=r"has no dbt\.command"):
        value(instruments.QUEUE_PENDING, by=("dbt.command",), space="max")


# -- what Datadog gets -----------------------------------------------------------------------


def test_a_metric_is_sent_as_what_the_checks_take_it_for() -> None:
    """With deltas. A gauge is told again and again: Datadog shows nothing between two runs else."""
    reader = InMemoryMetricReader(preferred_temporality=DELTA)
    provider = MeterProvider([reader], shutdown_on_exit=False)
    known = Known({"shop": ["prod"]})
    metrics = Metrics(provider.get_meter("test"), known, look=lambda: None, node_metrics=False)
    of_runs = [
        instruments.RUN_DURATION,
        instruments.RUNS_ENDED,
        instruments.RUN_LAST_COMPLETION,
        instruments.RUN_LAST_DURATION,
        instruments.NODE_DURATION,
        instruments.SOURCES,
    ]
    metrics.record(Measurement(instrument, 1.0, {}) for instrument in of_runs)
    first, second = sent_types(reader), sent_types(reader)
    provider.shutdown()

    assert {instrument.name for instrument in of_runs} | {"process.cpu.time"} <= {*first}
    assert first == {name: TYPES[METRICS[name].kind] for name in first}
    assert [name for name, type_ in first.items() if type_ == GAUGE and name not in second] == []


def sent_types(reader: InMemoryMetricReader) -> dict[str, str]:
    """As Datadog's documentation has it: a delta sum is a count, and so on."""
    data = reader.get_metrics_data()
    assert data is not None
    types: dict[str, str] = {}
    for metric in data.resource_metrics[0].scope_metrics[0].metrics:
        match metric.data:
            case Sum(is_monotonic=True, aggregation_temporality=AggregationTemporality.DELTA):
                types[metric.name] = COUNT
            case Histogram(aggregation_temporality=AggregationTemporality.DELTA):
                types[metric.name] = DISTRIBUTION
            case Gauge():
                types[metric.name] = GAUGE
            case other:
                raise AssertionError(f"{metric.name} is {other}")
    return types


# -- the configs -----------------------------------------------------------------------------


def test_the_agent_gets_what_the_daemon_sends(agent: Json, daemon: Config) -> None:
    assert daemon.telemetry.otlp is not None
    sent_to = urlsplit(daemon.telemetry.otlp.endpoint)
    assert agent["otlp_config"]["receiver"]["protocols"]["http"]["endpoint"] == sent_to.netloc


def test_the_daemon_speaks_as_datadog_wants_it(daemon: Config) -> None:
    assert daemon.telemetry.otlp is not None
    assert daemon.telemetry.otlp.temporality == "delta"
    assert daemon.telemetry.datadog
    assert daemon.telemetry.environment
    assert daemon.telemetry.service_name in str(read("dashboard.json")["template_variables"])


def test_lineage_goes_to_the_intake_of_its_product(daemon: Config) -> None:
    assert daemon.openlineage is not None
    assert daemon.openlineage.url is not None
    assert daemon.openlineage.url.startswith("https://data-obs-intake.")
    assert daemon.openlineage.endpoint == "api/v1/lineage"
    assert daemon.openlineage.api_key is not None
    assert daemon.openlineage.namespace == daemon.telemetry.environment


def test_the_agents_config_has_no_other_keys_than_these(agent: Json) -> None:
    """Each of them was looked up; one that the Agent does not know, it ignores."""
    assert set(paths(agent)) == {
        "apm_config.features",
        "logs_enabled",
        "otlp_config.logs.enabled",
        "otlp_config.metrics.histograms.mode",
        "otlp_config.metrics.resource_attributes_as_tags",
        "otlp_config.receiver.protocols.http.endpoint",
    }
    assert agent["otlp_config"]["metrics"]["histograms"]["mode"] == "distributions"
    assert agent["otlp_config"]["metrics"]["resource_attributes_as_tags"] is True
    assert agent["apm_config"]["features"] == [
        "enable_otlp_compute_top_level_by_span_kind",
        "enable_operation_and_resource_name_logic_v2",
    ]


def test_the_readme_lists_the_metrics_that_need_percentiles() -> None:
    used = set(re.findall(r"p\d\d:([\w.]+)", (FOLDER / "dashboard.json").read_text("utf-8")))
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert used
    assert {name for name in METRICS if f"`{name}`" in readme} == used
    assert {METRICS[name].kind for name in used} == {Kind.HISTOGRAM}


def test_the_readme_names_every_file() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in FOLDER.iterdir():
        if path.name not in ("README.md", "__pycache__"):
            assert f"`{path.name}" in readme
    for name in MONITORS:
        assert f"`{name}`" in readme


def paths(document: Json, prefix: str = "") -> list[str]:
    found = []
    for key, part in document.items():
        if isinstance(part, dict):
            found += paths(part, f"{prefix}{key}.")
        else:
            found.append(prefix + key)
    return found
