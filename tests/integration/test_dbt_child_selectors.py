"""The project's selectors, as the dbt child has them resolved by dbt itself."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dbtstream import frames
from tests import dbt_projects as projects
from tests.dbt_projects import Child, Starting, around, graph_of, planned
from tests.warm_children import WarmChildren

SELECTORS = {
    "by_name": "orders",
    "by_tag": "tag:core",
    "by_path": "path:models/daily.sql",
    "by_config": "config.materialized:table",
    "below": "orders+",
    "above": "+daily",
    "around": "@orders",
    "both": "tag:core,config.materialized:table",
    "either": "tag:core daily",
    "of_yaml": "selector:nightly",
    "sources": "source:raw",
    "none": "tag:nobody",
    "unknown": "colour:blue",
    "malformed": "@orders+",
    "state": "state:modified",
    "empty": "  ",
    "no_yaml": "selector:hourly",
}
PROBLEMS = {"none", "unknown", "malformed", "state", "empty", "no_yaml"}

FILES = {
    **projects.shop(),
    "models/sources.yml": projects.properties(
        sources=[{"name": "raw", "schema": "main", "tables": [{"name": "payments"}]}]
    ),
    "selectors.yml": projects.properties(
        selectors=[
            {"name": "nightly", "definition": {"method": "fqn", "value": "daily", "parents": True}}
        ]
    ),
}


@pytest.fixture
def start(tmp_path: Path, warm: WarmChildren | None) -> Iterator[Starting]:
    with projects.children(tmp_path, warm) as begin:
        yield begin


def matched(child: Child) -> dict[str, set[str]]:
    """Names of nodes by selector."""
    found: dict[str, set[str]] = {}
    for node in (*planned(child).values(), *around(child).values()):
        for name in node.matches:
            found.setdefault(name, set()).add(node.name)
    return found


def test_selectors_find_what_dbt_finds_in_the_selection_and_around_it(start: Starting) -> None:
    """Whatever the run itself selects, and by which rule its tests are."""
    args = ["run", "-s", "daily orders", "--indirect-selection", "empty", "--warn-error"]
    child = start(FILES, args, graph=True, selectors=SELECTORS)
    assert child.end() == 0, child.output()
    found = matched(child)
    assert found == {
        "by_name": {"orders"},
        "by_tag": {"orders"},
        "by_path": {"daily"},
        "by_config": {"orders"},
        "below": {"orders", "daily"},
        "above": {"orders", "daily"},
        "around": {"orders", "daily"},
        "both": {"orders"},
        "either": {"orders", "daily"},
        "of_yaml": {"orders", "daily"},
        "sources": {"payments"},
    }
    problems = {each.name: each.problem for each in graph_of(child).selector_problems}
    assert set(problems) == PROBLEMS
    assert problems["none"] == "selects nothing"
    assert "'colour' is not a valid method name" in problems["unknown"]
    assert "comparison manifest" in problems["state"]
    assert "hourly" in problems["no_yaml"]
    assert child.result.stats.callback_error is None


def test_tests_come_along_with_what_they_test(start: Starting) -> None:
    args = ["build", "--indirect-selection", "cautious"]
    child = start(FILES, args, graph=True, selectors={"core": "orders"})
    assert child.end() == 0, child.output()
    assert matched(child)["core"] == {"orders", "not_null_orders_id", "unique_orders_id"}


def test_state_is_compared_where_the_run_has_one(start: Starting) -> None:
    child = start(FILES, ["parse"])
    assert child.end() == 0
    shutil.copytree(child.project / "target", child.project / "state")
    changed = {**FILES, "models/daily.sql": projects.DAILY + " where amount > 0"}
    child = start(
        changed,
        ["run", "--state", "state"],
        graph=True,
        selectors={"changed": "state:modified"},
    )
    assert child.end() == 0, child.output()
    assert matched(child) == {"changed": {"daily"}}


def test_resolving_leaves_no_trace_in_what_dbt_says_and_does(start: Starting) -> None:
    def said(child: Child) -> list[str]:
        """dbt's own lines without their times."""
        lines = [line.split("  ", 1)[-1] for line in child.output().splitlines()]
        return [line for line in lines if "seconds" not in line and " in 0." not in line]

    start(FILES, ["run"]).end()
    plain = start(FILES, ["run"], threads=1)
    assert plain.end() == 0
    asked = start(FILES, ["run"], threads=1, selectors=SELECTORS, log_level="info", graph=True)
    assert asked.end() == 0
    assert said(asked) == said(plain)
    assert not [log for log in asked.of(frames.Log) if "elect" in log.message]
