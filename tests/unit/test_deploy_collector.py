"""The collector's configs, as far as one can tell without a collector: what a pipeline names is
declared and what is declared is used, names are those of components that there are, and the two
ends of a connection fit. A real collector has not loaded them; their headers say so."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml  # type: ignore[import-untyped]

from dbtstream.config import load_config
from dbtstream.instruments import INSTRUMENTS, UNIQUE_ID
from dbtstream.span_mapping import _for_datadog as for_datadog

DEPLOY = Path(__file__).parents[2] / "deploy"
FOLDER = DEPLOY / "otel-collector"
FILES = ("prometheus-tempo.yaml", "datadog.yaml")

Json = dict[str, Any]
Change = Callable[[Json], Any]

KNOWN = {
    "receivers": {"otlp"},
    "processors": {"memory_limiter", "batch", "transform"},
    "exporters": {"otlp", "prometheusremotewrite", "datadog"},
    "connectors": {"spanmetrics", "datadog"},
    "extensions": {"health_check"},
}
"""Components that were looked up. Others exist; whoever uses one adds it here."""


def text_of(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def parsed(text: str) -> Json:
    """Of two equal keys PyYAML takes the last one; the collector refuses the file."""
    assert twins(yaml.compose(text)) == []
    document: Json = yaml.safe_load(text)
    return document


def twins(tree: Any) -> list[str]:
    """Keys that are there twice, below a node of PyYAML's."""
    if isinstance(tree, yaml.MappingNode):
        keys = [key.value for key, _ in tree.value]
        below = [key for _, part in tree.value for key in twins(part)]
        return [key for key in set(keys) if keys.count(key) > 1] + below
    if isinstance(tree, yaml.SequenceNode):
        return [key for part in tree.value for key in twins(part)]
    return []


def header_of(text: str) -> str:
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line)
    return "\n".join(lines)


def problems_of(document: Json) -> list[str]:
    problems = [
        f"{section}: {name!r} is not known"
        for section, known in KNOWN.items()
        for name in document.get(section, {})
        if name.split("/")[0] not in known
    ]
    service = document["service"]
    if set(document) - set(KNOWN) != {"service"}:
        problems.append(f"sections: {sorted(document)}")
    used: dict[str, set[str]] = {section: set() for section in KNOWN}
    used["extensions"] = {*service.get("extensions", [])}
    ends: dict[str, set[str]] = {"receivers": set(), "exporters": set()}
    for name, pipeline in service["pipelines"].items():
        if name.split("/")[0] not in ("traces", "metrics", "logs"):
            problems.append(f"{name!r} is no kind of pipeline")
        processors = pipeline.get("processors", [])
        if processors[:1] != ["memory_limiter"] or processors[-1:] != ["batch"]:
            problems.append(f"{name}: memory_limiter comes first, batch last")
        used["processors"] |= {*processors}
        for end in ("receivers", "exporters"):
            for component in pipeline.get(end, []):
                is_connector = component in document.get("connectors", {})
                used["connectors" if is_connector else end].add(component)
                ends[end].add(component)
    for section, names in used.items():
        declared = {*document.get(section, {})}
        problems += [f"{section}: {name} is not declared" for name in sorted(names - declared)]
        problems += [f"{section}: {name} is not used" for name in sorted(declared - names)]
    problems += [
        f"connectors: {name} has one end only"
        for name in document.get("connectors", {})
        if not (name in ends["receivers"] and name in ends["exporters"])
    ]
    return problems


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_wrong_with_it(name: str) -> None:
    assert problems_of(parsed(text_of(name))) == []


def test_there_are_no_others() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {*FILES}


@pytest.mark.parametrize("name", FILES)
def test_it_says_that_no_collector_has_loaded_it(name: str) -> None:
    assert "Not loaded by a collector" in header_of(text_of(name))
    assert f"otelcol-contrib validate --config={name}" in header_of(text_of(name))


@pytest.mark.parametrize("name", FILES)
def test_every_variable_is_explained(name: str) -> None:
    text = text_of(name)
    used = set(re.findall(r"\$\{env:(\w+)", text))
    assert used
    assert used == set(re.findall(r"^#   ([A-Z][A-Z_]+)\s", header_of(text), re.MULTILINE))
    # Any other $ the collector would take for a variable, too.
    assert text.count("$") == len(re.findall(r"\$\{env:\w+(?::-[^}]*)?\}", text))


@pytest.mark.parametrize("name", FILES)
def test_it_listens_where_the_daemon_is_told_to_send(name: str) -> None:
    receiver = parsed(text_of(name))["receivers"]["otlp"]["protocols"]
    assert list(receiver) == ["http"], "the daemon speaks OTLP over HTTP only"
    (told,) = re.findall(r'endpoint = "(http://[^"]+)"', header_of(text_of(name)))
    port = urlsplit(told).port
    assert receiver["http"]["endpoint"] == f"0.0.0.0:{port}"
    otlp = load_config(DEPLOY / "datadog" / "dbtstream.toml", {}).telemetry.otlp
    assert otlp is not None
    assert urlsplit(otlp.endpoint).port == port


def test_metrics_of_spans_have_no_names_of_nodes() -> None:
    connector = parsed(text_of("prometheus-tempo.yaml"))["connectors"]["spanmetrics"]
    assert "span.name" in connector["exclude_dimensions"]
    dimensions = {dimension["name"] for dimension in connector["dimensions"]}
    bounded = {name for i in INSTRUMENTS if not i.per_node for name in i.attributes}
    assert dimensions <= bounded


def test_datadogs_percentiles_and_tags_are_those_of_its_agent() -> None:
    """The same settings, whichever way it goes."""
    exporter = parsed(text_of("datadog.yaml"))["exporters"]["datadog/exporter"]
    agent = yaml.safe_load((DEPLOY / "datadog" / "datadog.yaml").read_text(encoding="utf-8"))
    assert exporter["metrics"] == agent["otlp_config"]["metrics"]


def test_the_collector_names_operations_as_the_daemon_does() -> None:
    """Read from the top, the first that fits wins: as in the daemon."""
    processor = parsed(text_of("datadog.yaml"))["processors"]["transform/datadog"]
    (statements,) = (part["statements"] for part in processor["trace_statements"])
    by_us = [
        for_datadog("SELECT", "client", {"db.system.name": "duckdb", UNIQUE_ID: "model.shop.a"}),
        for_datadog("dbt build shop", "consumer", {}),
        for_datadog("model a", "internal", {UNIQUE_ID: "model.shop.a"}),
        for_datadog("parse", "internal", {}),
    ]
    names = re.findall(r'set\(attributes\["operation.name"\], "([\w.]+)"\)', "\n".join(statements))
    assert names == [values["operation.name"] for values in by_us]
    assert all(f'attributes["{UNIQUE_ID}"]' in line for line in statements if "dbt.node" in line)


def pipeline(document: Json, name: str = "traces") -> Json:
    found: Json = document["service"]["pipelines"][name]
    return found


MISTAKES: dict[str, tuple[Change, str]] = {
    "not declared": (
        lambda d: pipeline(d)["exporters"].append("otlp/jaeger"),
        "exporters: otlp/jaeger is not declared",
    ),
    "not used": (lambda d: pipeline(d)["exporters"].remove("otlp/tempo"), "otlp/tempo is not used"),
    "unknown": (lambda d: d["processors"].update(bach={}), "processors: 'bach' is not known"),
    "one end": (
        lambda d: pipeline(d, "metrics")["receivers"].remove("spanmetrics"),
        "connectors: spanmetrics has one end only",
    ),
    "order": (lambda d: pipeline(d)["processors"].reverse(), "traces: memory_limiter comes first"),
    "kind of pipeline": (
        lambda d: d["service"]["pipelines"].update(spans=pipeline(d)),
        "'spans' is no kind of pipeline",
    ),
    "section": (lambda d: d.update(exporter={}), "sections: "),
    "extension": (
        lambda d: d["service"].pop("extensions"),
        "extensions: health_check is not used",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str) -> None:
    make, expected = MISTAKES[mistake]
    changed = copy.deepcopy(parsed(text_of("prometheus-tempo.yaml")))
    make(changed)
    assert any(expected in problem for problem in problems_of(changed)), problems_of(changed)


def test_a_key_that_is_there_twice_is_found() -> None:
    with pytest.raises(AssertionError, match="otlp"):
        parsed("receivers: {otlp: {}, otlp: {}}")
