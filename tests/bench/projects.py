"""A dbt project of a given size on DuckDB: layers, a mix of materializations, tests.

    staging       views over literal rows
    intermediate  ephemerals and tables over staging
    combined      views and tables over intermediate
    marts         tables over combined

A model reads one to three of the layer before. The SQL does next to nothing, so that the
time goes into dbt itself, where our callback is: with real work in the warehouse the shares
are smaller. The same arguments give the same project.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.dbt_projects import Files, properties, write_project

THREADS = 4
SEED = 20130101

LAYERS = {"staging": 0.3, "intermediate": 0.3, "combined": 0.2, "marts": 0.2}
"""Share of the models. No view is over a view over a view: DuckDB would plan it again and again."""

MATERIALIZED = {
    "staging": ("view",),
    "intermediate": ("ephemeral", "table", "table"),
    "combined": ("view", "table"),
    "marts": ("table",),
}
ROWS = "select range as id, range * 7 % 100 as amount from range(100)"
GENERIC_TESTS = ("not_null", "unique")


def write_layered_project(root: Path, *, models: int, tests: int) -> Path:
    """`tests` is at most twice `models`: each model has one column with these tests."""
    return write_project(root, layered(models, tests), threads=THREADS)


def layered(models: int, tests: int) -> Files:
    """The files of the project."""
    choice = random.Random(SEED)
    counts = [int(models * share) for share in LAYERS.values()]
    counts[0] += models - sum(counts)
    files: Files = {}
    described: list[dict[str, Any]] = []
    below: list[str] = []
    for layer, count in zip(LAYERS, counts, strict=True):
        names = [f"{layer}_{number:04}" for number in range(count)]
        for name in names:
            kind = choice.choice(MATERIALIZED[layer])
            upstream = choice.sample(below, min(choice.randint(1, 3), len(below)))
            files[f"models/{layer}/{name}.sql"] = _sql(kind, upstream)
            described.append(_described(name, layer))
        below = names
    for model, name in _tested(described, tests):
        model["columns"][0]["data_tests"].append(name)
    groups = [{"name": "bench", "owner": {"name": "Bench", "email": "bench@example.com"}}]
    files["models/models.yml"] = properties(models=described, groups=groups)
    return files


def _sql(kind: str, upstream: list[str]) -> str:
    config = "{{ config(materialized='" + kind + "') }}"
    if not upstream:
        return f"{config}\n{ROWS}\n"
    amounts = " + ".join(f"t{number}.amount" for number in range(len(upstream)))
    tables = ["{{ ref('" + name + f"') }}}} as t{number}" for number, name in enumerate(upstream)]
    joins = [f"join {table} using (id)" for table in tables[1:]]
    return "\n".join((config, f"select id, {amounts} as amount", f"from {tables[0]}", *joins, ""))


def _described(name: str, layer: str) -> dict[str, Any]:
    return {
        "name": name,
        "description": f"A model of the {layer} layer.",
        "config": {"tags": [layer], "group": "bench", "meta": {"tier": 1}},
        "columns": [{"name": "id", "data_tests": []}],
    }


def _tested(described: list[dict[str, Any]], tests: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Which models get which test: one each, then the second one each."""
    pairs = [(model, name) for name in GENERIC_TESTS for model in described]
    if tests > len(pairs):
        raise ValueError(f"{len(described)} models have room for {len(pairs)} tests, not {tests}")
    yield from pairs[:tests]
