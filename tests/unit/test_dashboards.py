"""What deploy/grafana and deploy/prometheus say is right as far as it can be told without a daemon:
the JSON is what the code writes, Grafana's SDK knows all of it, every name is one of ours, and
Prometheus' own tools take the rules."""

import json
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import click
import pytest
import yaml  # type: ignore[import-untyped]  # dbt brings it
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from dbtstream import instruments
from dbtstream.cli import cli
from dbtstream.config import HttpConfig
from dbtstream.instruments import INSTRUMENTS
from deploy.grafana.source import frame
from deploy.grafana.source.__main__ import rendered
from deploy.grafana.source.promql import Scope
from tests.dashboards import (
    FOLDER,
    Expression,
    expressions_of,
    load_dashboards,
    panels_of,
    rule_expressions,
    rule_files,
    rules,
    unknown_names,
)
from tests.prometheus import DEPLOYED, ROOT, need

DASHBOARDS = load_dashboards()
EXPRESSIONS = [each for one in DASHBOARDS.values() for each in expressions_of(one)]
PROVISIONING = ROOT / "deploy" / "grafana" / "provisioning"
UIDS = {frame.FLEET, frame.PROJECT_UID, frame.RUN_UID, frame.DAEMON}

GRIDWIDTH = 24


@pytest.fixture(params=DASHBOARDS)
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = DASHBOARDS[request.param]
    return found


def test_json_is_what_the_code_writes() -> None:
    """`python -m deploy.grafana.source` writes it anew."""
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}

    assert there == rendered()


def differences(given: Any, known: Any, where: str = "$") -> list[str]:
    """Where what is given is not known so; that a default is added does not count."""
    if isinstance(given, dict) and isinstance(known, dict):
        return [
            line
            for key, value in given.items()
            for line in differences(value, known.get(key), f"{where}.{key}")
        ]
    if isinstance(given, list) and isinstance(known, list) and len(given) == len(known):
        return [
            line
            for at, pair in enumerate(zip(given, known, strict=True))
            for line in differences(*pair, f"{where}[{at}]")
        ]
    return [] if given == known else [where]


def as_grafana_knows_it(document: Any) -> Any:
    plugins.register_default_plugins()  # for the keys of panels and of queries by their type
    return json.loads(JSONEncoder().encode(Dashboard.from_json(document)))


def test_grafana_knows_every_key(dashboard: dict[str, Any]) -> None:
    assert differences(dashboard, as_grafana_knows_it(dashboard)) == []


@pytest.mark.parametrize("path", ["", "fieldConfig", "targets"])
def test_a_key_that_grafana_does_not_know_is_found(path: str) -> None:
    document = json.loads(rendered()["fleet.json"])
    panel = document["panels"][1]
    place = panel[path] if path else panel
    (place[0] if isinstance(place, list) else place)["dezcription"] = "?"

    assert [line.rsplit(".", 1)[1] for line in differences(document, as_grafana_knows_it(document))]


def test_every_name_is_one_of_ours() -> None:
    assert unknown_names([*EXPRESSIONS, *rule_expressions()]) == []


@pytest.mark.parametrize(
    ("expr", "problem"),
    [
        ("sum(dbtstream_slot_limits)", "no metric dbtstream_slot_limits"),
        ('dbtstream_slot_limit{project="a"}', "dbtstream_slot_limit has no ['project']"),
        ("sum by (dbt_project) (dbtstream_run_active)", "nothing has ['dbt_project']"),
        ("dbtstream_run_duration_seconds", "no metric dbtstream_run_duration_seconds"),
        ("vector(1)", "asks for no metric"),
    ],
)
def test_a_misspelt_name_is_found(expr: str, problem: str) -> None:
    assert unknown_names([Expression("here", expr)]) == [f"here: {problem}"]


def test_a_label_that_a_metric_does_not_have_is_an_error_in_the_code() -> None:
    with pytest.raises(ValueError, match=r"dbtstream.slot.limit has no dbt_project_name"):
        Scope({})(instruments.SLOT_LIMIT, PROJECT="shop")


def test_every_instrument_is_shown_or_alerted_on() -> None:
    everything = " ".join(each.text for each in [*EXPRESSIONS, *rule_expressions()])

    assert [one.name for one in INSTRUMENTS if one.prometheus_name not in everything] == []


def test_panels_say_what_they_show_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    panels = [panel for panel in panels_of(dashboard) if panel["type"] != "row"]
    taken: Counter[tuple[int, int]] = Counter()
    for panel in panels_of(dashboard):
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= GRIDWIDTH
        taken.update(
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        )

    assert max(taken.values()) == 1
    assert [p["title"] for p in panels if not p.get("description") and p["type"] != "text"] == []
    assert len({panel["id"] for panel in panels_of(dashboard)}) == len(list(panels_of(dashboard)))


def test_variables_are_declared_and_used(dashboard: dict[str, Any]) -> None:
    declared = {variable["name"] for variable in dashboard["templating"]["list"]}
    of_grafana = r"__\w+"
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard["panels"])))

    assert {name for name in used if not re.fullmatch(of_grafana, name)} <= declared
    assert declared - {"datasource", "tempo"} <= set(
        re.findall(r"\$\{?(\w+)", json.dumps(dashboard))
    )


def test_links_lead_to_dashboards_that_there_are(dashboard: dict[str, Any]) -> None:
    linked = set(re.findall(r"/d/([\w-]+)", json.dumps(dashboard)))

    assert dashboard["uid"] in UIDS
    assert linked <= UIDS
    assert {one["uid"] for one in DASHBOARDS.values()} == UIDS


def alerts() -> list[Any]:
    return [rule for rule in rules() if "alert" in rule]


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_says_how_bad_what_and_what_to_do(alert: Any) -> None:
    assert alert["labels"]["severity"] in {"critical", "warning", "info"}
    said = alert["annotations"]
    assert said.keys() == {"summary", "description", "action", "dashboard"}
    assert said["dashboard"].removeprefix("/d/") in UIDS


def test_commands_that_are_recommended_exist() -> None:
    """In the texts of alerts and panels, between backquotes."""
    texts = [text for alert in alerts() for text in alert["annotations"].values()]
    texts += [json.dumps(one) for one in DASHBOARDS.values()]
    named = {words for text in texts for words in re.findall(r"`dbtstream ([^`]+)`", text)}

    assert named
    for words in named:
        first, *others = words.split()
        command: click.Command = cli.commands[first]
        if isinstance(command, click.Group):
            command = command.commands[others.pop(0)]
        options = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in others if word.startswith("--")} <= options, words


def run(program: str, *arguments: str | Path) -> None:
    done = subprocess.run(
        [need(program), *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_config_and_the_rules() -> None:
    run("promtool", "check", "config", DEPLOYED / "prometheus.yml")
    run("promtool", "check", "rules", *rule_files())


def test_alerts_fire_when_they_should_and_only_then() -> None:
    run("promtool", "test", "rules", DEPLOYED / "tests" / "alerts.yml")


def test_each_alert_has_a_unit_test() -> None:
    tested = (DEPLOYED / "tests" / "alerts.yml").read_text(encoding="utf-8")

    assert [one["alert"] for one in alerts() if f'alertname="{one["alert"]}"' not in tested] == []


def test_alertmanager_takes_the_sample_and_routes_by_owner() -> None:
    sample = DEPLOYED / "alertmanager.yml"
    run("amtool", "check-config", sample)
    for receiver, labels in {
        "finance": ("alertname=DbtstreamNodeProblems", "dbt_node_owner=finance@shop.org"),
        "data-platform": ("alertname=DbtstreamNodeProblems", "dbt_node_owner=sales"),
        "on-call": ("alertname=DbtstreamNoWorker", "severity=critical"),
        "nobody": ("alertname=DbtstreamRunSlow", "severity=info"),
    }.items():
        verify = f"--verify.receivers={receiver}"
        run("amtool", "config", "routes", "test", f"--config.file={sample}", verify, *labels)


def test_the_sample_names_alerts_and_labels_that_there_are() -> None:
    sample = (DEPLOYED / "alertmanager.yml").read_text(encoding="utf-8")
    names = set(re.findall(r"\bDbtstream\w+", sample))

    assert names <= {alert["alert"] for alert in alerts()}


def test_grafana_is_told_of_both_sources_and_of_the_folder() -> None:
    sources = yaml.safe_load((PROVISIONING / "datasources" / "dbtstream.yaml").read_text())
    folders = yaml.safe_load((PROVISIONING / "dashboards" / "dbtstream.yaml").read_text())
    scraping = yaml.safe_load((DEPLOYED / "prometheus.yml").read_text())
    by_type = {source["type"]: source for source in sources["datasources"]}

    assert by_type.keys() == {"prometheus", "tempo"}
    assert (
        by_type["prometheus"]["jsonData"]["timeInterval"] == scraping["global"]["scrape_interval"]
    )
    assert folders["providers"][0]["options"]["path"] == "/var/lib/grafana/dashboards"


def test_prometheus_scrapes_the_port_that_the_daemon_has() -> None:
    scraping = yaml.safe_load((DEPLOYED / "prometheus.yml").read_text(encoding="utf-8"))
    (target,) = scraping["scrape_configs"][0]["static_configs"][0]["targets"]

    assert target.split(":")[1] == HttpConfig().listen.split(":")[1]
