"""A dbt project of 60 nodes that takes a few seconds, and what must be in its tables after it.

Seeds, layers of models, tests and snapshots on DuckDB. Each node pauses, so that a moment drawn
by lot hits dbt at work. What the models add up is computed here once more.
"""

# ruff: noqa: S608  # names in this SQL are made here

import json
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tests.dbt_projects import PYTHON, Files, properties, rows, write_project
from tests.faults.recorder import Recorder

ROWS = 10
SEEDS = 4

PAUSING = """
import time

from dbt.adapters.duckdb.plugins import BasePlugin

class Plugin(BasePlugin):
    def configure_cursor(self, cursor):
        time.sleep({pause_s})
"""
"""dbt opens a cursor for each node, when it has said that the node started."""


@dataclass(frozen=True)
class Shape:
    """Of the default one, `SEEDS + layers * width + tests + snapshots` is 60."""

    layers: int = 6
    width: int = 6
    tests: int = 18
    snapshots: int = 2
    pause_s: float = 0.03

    @property
    def node_count(self) -> int:
        return SEEDS + self.layers * self.width + self.tests + self.snapshots


SIXTY = Shape()
DOZEN = Shape(layers=2, width=3, tests=2, snapshots=0, pause_s=0.3)
"""For what is about the processes and not about many moments."""


class Warehouse:
    """The project named `shop` in `root`, with targets dev and prod of a database file each."""

    def __init__(self, root: Path, shape: Shape = SIXTY) -> None:
        self.root, self.shape = root, shape
        outputs = {
            target: {
                "type": "duckdb",
                "path": str(self.database(target)),
                "threads": 4,
                "plugins": [{"module": "dbt_pausing"}],
            }
            for target in ("dev", "prod")
        }
        profiles = {"shop": {"target": "dev", "outputs": outputs}}
        files = {
            **_files(shape),
            "profiles.yml": json.dumps(profiles, indent=1),
            "dbt_pausing.py": PAUSING.format(pause_s=shape.pause_s),
        }
        write_project(root, files)

    def table(self, recorder: Recorder, **settings: Any) -> dict[str, Any]:
        """The project's table in a worker's config."""
        path = f"{recorder.folder}{os.pathsep}{self.root}"
        return {
            "path": str(self.root),
            "targets": ["dev"],
            "python": PYTHON,
            "env": {"PYTHONPATH": path},
            **settings,
        }

    def database(self, target: str = "dev") -> Path:
        return self.root / f"{target}.duckdb"

    def empty(self, target: str = "dev") -> None:
        """As before the first build. No dbt may be at it."""
        for path in (self.database(target), Path(f"{self.database(target)}.wal")):
            path.unlink(missing_ok=True)

    def wrong(self, target: str = "dev") -> list[str]:
        """What is not as a whole build leaves it. No dbt may be at it."""
        wanted = _sums(self.shape)
        query = " union all ".join(
            f"select '{name}', count(*), count(distinct id), sum(amount)::bigint from main.{name}"
            for name in wanted
        )
        found = {name: tuple(facts) for name, *facts in rows(self.database(target), query)}
        return [
            f"{name}: {found.get(name)}, not {(ROWS, ROWS, total)}"
            for name, total in wanted.items()
            if found.get(name) != (ROWS, ROWS, total)
        ]

    def built_at(self, target: str = "dev") -> dict[str, float]:
        """When each table's last build began, in seconds since 1970, by the table itself."""
        names = [name for name, kind in _models(self.shape) if kind == "table"]
        query = " union all ".join(
            f"select '{name}', max(epoch(built_at)) from main.{name}" for name in names
        )
        return dict(rows(self.database(target), query))


def _models(shape: Shape) -> list[tuple[str, str]]:
    """Names and materializations, in order of the layers."""
    kinds = {shape.width - 1: "view", shape.width - 2: "incremental"}
    return [
        (f"m_{layer}_{place}", kinds.get(place, "table"))
        for layer in range(1, shape.layers + 1)
        for place in range(shape.width)
    ]


def _upstream(shape: Shape, name: str) -> tuple[str, str]:
    _, layer, place = name.split("_")
    first, second = int(place), int(place) + 1
    if layer == "1":
        return f"seed_{first % SEEDS}", f"seed_{second % SEEDS}"
    below = int(layer) - 1
    return f"m_{below}_{first}", f"m_{below}_{second % shape.width}"


def _model(shape: Shape, name: str, kind: str) -> str:
    one, other = _upstream(shape, name)
    key = ", unique_key='id'" if kind == "incremental" else ""
    return (
        f"{{{{ config(materialized='{kind}'{key}) }}}} "
        "select a.id, a.amount + b.amount as amount, now() as built_at "
        f"from {{{{ ref('{one}') }}}} a join {{{{ ref('{other}') }}}} b using (id)"
    )


def _files(shape: Shape) -> Files:
    models = _models(shape)
    files = {f"models/{name}.sql": _model(shape, name, kind) for name, kind in models}
    for seed in range(SEEDS):
        lines = [f"{row},{row * (seed + 1)}" for row in range(ROWS)]
        files[f"seeds/seed_{seed}.csv"] = "\n".join(["id,amount", *lines, ""])
    for number in range(shape.snapshots):
        files[f"snapshots/s_{number}.sql"] = (
            f"{{% snapshot s_{number} %}}{{{{ config(target_schema='main', unique_key='id', "
            f"strategy='check', check_cols=['amount']) }}}} "
            f"select id, amount from {{{{ ref('m_2_{number}') }}}}{{% endsnapshot %}}"
        )
    tests = [(name, word) for name, _ in models for word in ("unique", "not_null")]
    step = len(tests) // shape.tests
    tested: dict[str, list[str]] = {}
    for name, word in islice(tests[::step], shape.tests):
        tested.setdefault(name, []).append(word)
    files["models/models.yml"] = properties(
        models=[
            {"name": name, "columns": [{"name": "id", "data_tests": words}]}
            for name, words in tested.items()
        ]
    )
    return files


def _sums(shape: Shape) -> dict[str, int]:
    """The sum of `amount` in each seed, model and snapshot."""
    sums = {f"seed_{seed}": (seed + 1) * ROWS * (ROWS - 1) // 2 for seed in range(SEEDS)}
    for name, _ in _models(shape):
        one, other = _upstream(shape, name)
        sums[name] = sums[one] + sums[other]
    return sums | {f"s_{number}": sums[f"m_2_{number}"] for number in range(shape.snapshots)}
