"""The columns that the dbt child asks the adapter for, after what it has seen being built."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dbtstream import frames
from dbtstream.frames import Columns, NodeFinish
from tests import dbt_projects as projects
from tests.dbt_projects import PYTHON, Child, Starting, finished
from tests.warm_children import WarmChildren

VERSION = projects.dbt_release(PYTHON)
since_1_9 = pytest.mark.skipif(VERSION < (1, 9), reason="dbt 1.8 has no microbatch")


@pytest.fixture
def start(tmp_path: Path, warm: WarmChildren | None) -> Iterator[Starting]:
    with projects.children(tmp_path, warm) as begin:
        yield begin


def columns(child: Child) -> dict[str, list[tuple[str, str | None]] | None]:
    """By the node's name; each node once."""
    told = child.of(Columns)
    assert len({each.unique_id for each in told}) == len(told)
    return {
        each.unique_id.split(".", 2)[2]: None
        if each.columns is None
        else [(column.name, column.data_type) for column in each.columns]
        for each in told
    }


def asking(macro: str) -> projects.Files:
    """The project's own way of asking for columns."""
    name = "duckdb__get_columns_in_relation"
    return {"macros/columns.sql": "{% macro " + name + "(relation) %}" + macro + "{% endmacro %}"}


def test_models_seeds_and_snapshots_have_the_columns_of_the_database(start: Starting) -> None:
    """Not ephemeral models, and not what failed or was skipped; each after its finish."""
    files = {
        **projects.seeds_snapshots(),
        **projects.ephemeral(),
        **projects.skip_chain(),
        "models/mixed.sql": 'select 1.5::decimal(9, 2) as "Größe.1", [1] as many, now() as at',
        **{f"models/many_{n}.sql": f"select {n} as id" for n in range(12)},
    }
    child = start(files, ["build"], threads=4, adapter_columns=True, queries=True)
    assert child.end() == 1
    found = columns(child)
    succeeded = {u for u, status in finished(child).items() if status == "success"}
    assert set(found) == {unique_id.split(".", 2)[2] for unique_id in succeeded} - {"base"}
    assert found["countries"] == [("code", "VARCHAR"), ("name", "VARCHAR")]
    assert ("dbt_valid_from", "TIMESTAMP") in (found["countries_history"] or [])
    assert found["mixed"] == [
        ("Größe.1", "DECIMAL(9,2)"),
        ("many", "INTEGER[]"),
        ("at", "TIMESTAMP WITH TIME ZONE"),
    ]
    assert {len(found[f"many_{n}"] or []) for n in range(12)} == {1}

    at = {frame.unique_id: frame.n for frame in child.of(NodeFinish)}
    assert all(frame.n > at[frame.unique_id] for frame in child.of(Columns))
    # What dbt did for us is no query of the run.
    sql = child.of(frames.Query)
    assert sql
    assert not [query for query in sql if query.unique_id is None and "columns" in str(query)]
    assert child.result.stats.callback_error is None
    assert projects.rows(child.project / "shop.duckdb", "select count(*) from countries") == [(3,)]


@since_1_9
def test_a_microbatch_model_is_asked_once(start: Starting) -> None:
    times = ["--event-time-start", "2024-01-01", "--event-time-end", "2024-01-04"]
    child = start(projects.microbatch(), ["run", *times], adapter_columns=True)
    assert child.end() == 0, child.output()
    assert columns(child)["batched"] == [("id", "INTEGER"), ("happened_at", "TIMESTAMP")]


@pytest.mark.parametrize("command", [["compile"], ["test"], ["docs", "generate"]])
def test_what_builds_nothing_asks_nothing(start: Starting, command: list[str]) -> None:
    start(projects.shop(), ["run"]).end()
    child = start(projects.shop(), command, adapter_columns=True)
    assert child.end() == 0
    assert child.of(Columns) == []


def test_an_adapter_that_cannot_tell_costs_nothing_but_the_columns(start: Starting) -> None:
    files = {**projects.shop(), **asking("{{ exceptions.raise_compiler_error('no luck') }}")}
    child = start(files, ["run"], adapter_columns=True)
    assert child.end() == 0, child.output()
    assert set(finished(child).values()) == {"success"}
    assert columns(child) == {"orders": None, "daily": None}
    assert all("no luck" in (each.problem or "") for each in child.of(Columns))
    assert child.of(frames.NodeError) == []
    assert not [log for log in child.of(frames.Log) if log.level in ("warn", "error")]


SLOW_QUERY = (
    "{% call statement('slow') %} select sum(a.range * b.range % 7) "
    "from range(1000000) a, range(10000000) b {% endcall %}{{ return([]) }}"
)


def test_a_run_waits_seconds_for_a_slow_answer_and_then_ends_as_it_would(start: Starting) -> None:
    files = {**projects.shop(), **asking(SLOW_QUERY)}
    child = start(files, ["run"], adapter_columns=True)
    last = child.until(NodeFinish, unique_id="model.shop.daily")
    began_s = time.monotonic()
    assert child.end() == 0, child.output()
    assert time.monotonic() - began_s < 20
    assert last.status == "success"
    assert columns(child) == {"orders": None, "daily": None}
    assert {bool(each.problem) for each in child.of(Columns)} == {True}
    assert child.result.success
    assert projects.rows(child.project / "shop.duckdb", "select * from daily") == [(1, 10)]


def test_a_cancelled_run_does_not_wait_for_answers(start: Starting) -> None:
    files = {**projects.slow(), **asking(SLOW_QUERY)}
    child = start(files, ["run"], adapter_columns=True)
    child.until(NodeFinish, unique_id="model.shop.before")
    child.until(frames.NodeWork, unique_id="model.shop.slow")
    child.control(frames.CONTROL_CANCEL)
    began_s = time.monotonic()
    child.end()
    assert time.monotonic() - began_s < 15
    assert child.result.interrupted
    assert columns(child) == {"before": None}
    assert "dbtstream-columns" not in {q.connection for q in child.of(frames.QueryCancelled)}
