"""Small dbt projects on DuckDB, and a dbt child started as the daemon starts it.

Used by the child's own tests and by `record_frames`. A project is a dict of files; each
function below returns one that brings dbt into one situation.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import duckdb
import msgspec
import pytest

from dbtstream.frames import (
    LENGTH_BYTES,
    AnyFrame,
    Frame,
    Graph,
    GraphNodes,
    NodeFinish,
    NodeResult,
    Nodes,
    PlannedNode,
    Result,
    Results,
    Start,
    decode_frame,
    frame_length,
)
from tests.warm_children import ForkedChild, RefusedToFork, WarmChildren

CHILD = Path(__file__).parents[1] / "dbtstream" / "dbt_child"
PYTHON = os.environ.get("DBTSTREAM_TEST_PYTHON", sys.executable)
"""The interpreter that has dbt: set it to run the same tests against another dbt."""

Files = dict[str, str]
F = TypeVar("F", bound=Frame)


def write_project(root: Path, files: Mapping[str, str], *, threads: int = 2, **config: Any) -> Path:
    """A project named `shop` with two targets, dev (the default) and prod, whose databases are
    files beside it. `config` joins dbt_project.yml."""
    project = {
        "name": "shop",
        "version": "1.0",
        "config-version": 2,
        "profile": "shop",
        "flags": {"send_anonymous_usage_stats": False},
        **config,
    }
    outputs = {
        target: {"type": "duckdb", "path": str(root / f"{database}.duckdb"), "threads": threads}
        for target, database in (("dev", "shop"), ("prod", "prod"))
    }
    profiles = {"shop": {"target": "dev", "outputs": outputs}}
    everything = {
        "dbt_project.yml": json.dumps(project, indent=1),
        "profiles.yml": json.dumps(profiles, indent=1),
        **files,
    }
    for name, text in everything.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def properties(**sections: Any) -> str:
    """A YAML properties file (JSON is YAML)."""
    return json.dumps({"version": 2, **sections}, indent=1)


ORDERS = "{{ config(materialized='table') }} select 1 as id, 10 as amount"
DAILY = "select id, amount from {{ ref('orders') }}"
BROKEN = "select * from no_such_table"
SLOW = (
    "{{ config(materialized='table') }} select sum(a.range * b.range % 7) as total "
    "from range(1000000) a, range(10000000) b"
)
"""Minutes of work for DuckDB, and interruptible."""

ORDERS_PROPERTIES = properties(
    groups=[{"name": "finance", "owner": {"name": "Finance", "email": "finance@example.com"}}],
    models=[
        {
            "name": "orders",
            "description": "One row per order",
            "config": {
                "group": "finance",
                "tags": ["core"],
                "meta": {"owner": "ada@example.com", "tier": 1},
            },
            "columns": [{"name": "id", "data_tests": ["unique", "not_null"]}],
        }
    ],
)


def shop() -> Files:
    """Two models and two tests that pass."""
    return {
        "models/orders.sql": ORDERS,
        "models/daily.sql": DAILY,
        "models/models.yml": ORDERS_PROPERTIES,
    }


def node_failure() -> Files:
    return {**shop(), "models/broken.sql": BROKEN}


def test_failure() -> Files:
    """A failing test, whose model's child is skipped by `build`."""
    return {**shop(), "models/orders.sql": ORDERS + " union all select 1 as id, 20 as amount"}


def test_warn() -> Files:
    tested = [{"unique": {"config": {"severity": "warn", "store_failures": True}}}]
    models = [{"name": "orders", "columns": [{"name": "id", "data_tests": tested}]}]
    return {**test_failure(), "models/models.yml": properties(models=models)}


def skip_chain() -> Files:
    """broken -> middle -> last, and a model beside them."""
    return {
        "models/aside.sql": "select 1 as id",
        "models/broken.sql": BROKEN,
        "models/middle.sql": "select * from {{ ref('broken') }}",
        "models/last.sql": "select * from {{ ref('middle') }}",
    }


def compile_error() -> Files:
    """One that dbt finds while it parses: nothing runs."""
    return {**shop(), "models/lost.sql": "select * from {{ ref('nowhere') }}"}


def node_compile_error() -> Files:
    """One that dbt finds only when it compiles the node."""
    code = "{% if execute %}{{ exceptions.raise_compiler_error('no luck') }}{% endif %} select 1"
    return {**shop(), "models/unlucky.sql": code}


def slow() -> Files:
    """A model that takes minutes, one before and one after it."""
    return {
        "models/before.sql": "{{ config(materialized='table') }} select 1 as id",
        "models/slow.sql": "-- depends_on: {{ ref('before') }}\n" + SLOW,
        "models/after.sql": "select * from {{ ref('slow') }}",
    }


def ephemeral() -> Files:
    return {
        "models/base.sql": "{{ config(materialized='ephemeral') }} select 1 as id",
        "models/uses.sql": "select * from {{ ref('base') }}",
    }


def seeds_snapshots() -> Files:
    snapshot = (
        "{% snapshot countries_history %}{{ config(target_schema='main', unique_key='code', "
        "strategy='check', check_cols=['name']) }} select * from {{ ref('countries') }}"
        "{% endsnapshot %}"
    )
    return {
        "seeds/countries.csv": "code,name\nde,Germany\nfr,France\nit,Italy\n",
        "snapshots/history.sql": snapshot,
    }


def unit_tests() -> Files:
    """One unit test that passes and one that does not: its model is skipped."""

    def case(name: str, model: str, expected: int) -> dict[str, Any]:
        given = [{"input": "ref('orders')", "rows": [{"id": 1, "amount": 5}]}]
        expect = {"rows": [{"id": 1, "amount": expected}]}
        return {"name": name, "model": model, "given": given, "expect": expect}

    cases = [case("keeps_amount", "daily", 5), case("doubles_amount", "weekly", 10)]
    return {
        "models/orders.sql": ORDERS,
        "models/daily.sql": DAILY,
        "models/weekly.sql": DAILY,
        "models/unit.yml": properties(unit_tests=cases),
    }


def freshness() -> Files:
    """Sources that are fresh, late, stale and missing. `run` first: it makes their tables."""
    hour = {"count": 1, "period": "hour"}
    rules = {"warn_after": hour, "error_after": {"count": 2, "period": "day"}}
    tables = [
        {"name": name, "loaded_at_field": "loaded_at", "config": {"freshness": rules}}
        if name == "modern"
        else {"name": name, "loaded_at_field": "loaded_at", "freshness": rules}
        for name in ("fresh", "late", "stale", "missing")
    ]
    ages = {"fresh": "0 minutes", "late": "5 hours", "stale": "9 days"}
    return {
        "models/sources.yml": properties(
            sources=[{"name": "raw", "schema": "main", "tables": tables}]
        ),
        **{
            f"models/{name}.sql": "{{ config(materialized='table') }} "
            f"select cast(now() as timestamp) - interval '{age}' as loaded_at"
            for name, age in ages.items()
        },
    }


def microbatch(*, fail_on_day: int = 0, concurrent: bool = False) -> Files:
    """Three daily batches (dbt 1.9 and newer); one of them may fail."""
    config = (
        "{{ config(materialized='incremental', incremental_strategy='microbatch', "
        "event_time='happened_at', batch_size='day', begin='2024-01-01', "
        f"concurrent_batches={str(concurrent).lower()}) }}}}\n"
    )
    failing = f"model.batch and model.batch.event_time_start.day == {fail_on_day}"
    reading = "select * from {{ ref('events') }}"
    code = f"{{% if {failing} %}} {BROKEN} {{% else %}} {reading} {{% endif %}}"
    events = " union all ".join(
        f"select {day} as id, timestamp '2024-01-0{day} 10:00:00' as happened_at"
        for day in (1, 2, 3)
    )
    return {
        "models/events.sql": "{{ config(materialized='table', event_time='happened_at') }} "
        + events,
        "models/batched.sql": config + code,
    }


def exposure() -> Files:
    exposures = [
        {
            "name": "board",
            "type": "dashboard",
            "owner": {"name": "Grace", "email": "grace@example.com"},
            "depends_on": ["ref('daily')"],
        }
    ]
    return {**shop(), "models/exposures.yml": properties(exposures=exposures)}


def run_operation() -> Files:
    macro = (
        "{% macro tidy(word) %}{% do log('tidied ' ~ word, info=True) %}"
        "{% do print('printed ' ~ word) %}{% do exceptions.warn('mind ' ~ word) %}{% endmacro %}"
    )
    return {**shop(), "macros/tidy.sql": macro}


def version_model() -> Files:
    models = [
        {
            "name": "customers",
            "latest_version": 2,
            "access": "public",
            "versions": [{"v": 1}, {"v": 2}],
        }
    ]
    return {
        "models/customers_v1.sql": "select 1 as id",
        "models/customers_v2.sql": "select 1 as id, 'a' as name",
        "models/uses.sql": "select * from {{ ref('customers') }}",
        "models/models.yml": properties(models=models),
    }


def late_query() -> Files:
    """A model that compiles for seconds before it sends its one, endless query."""
    spin = "{% set n = namespace(x=0) %}{% for a in range(700) %}{% for b in range(1000) %}"
    spin += "{% set n.x = n.x + 1 %}{% endfor %}{% endfor %}"
    return {"models/slow.sql": "{% if execute %}" + spin + "{% endif %}" + SLOW}


def plugin(name: str, code: str) -> Files:
    """A module that dbt imports as a plugin, if the project is on PYTHONPATH: code in the child."""
    return {f"dbt_{name}.py": code}


def dbt_release(python: str) -> tuple[int, ...]:
    """Major and minor version of an interpreter's dbt."""
    code = "from importlib.metadata import version; print(version('dbt-core'))"
    asked = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return tuple(int(part) for part in asked.stdout.split(".")[:2])


class Child:
    """A real dbt child. Iterate it for its frames; it ends with the pipe."""

    def __init__(
        self,
        project: Path,
        args: list[str],
        *,
        python: list[str] | None = None,
        env: Mapping[str, str] | None = None,
        start_line: bytes | None = None,
        warm: WarmChildren | None = None,
        **start: Any,
    ) -> None:
        """With `warm`, it is forked from a template of that."""
        ours, theirs = os.pipe()
        self.project = project
        self._frames = os.fdopen(ours, "rb")
        self.raw = b""
        self.frames: list[AnyFrame] = []
        self.output_path = project / "child.out"
        self._output = (project / "child.out").open("wb")
        environment = child_env(project, env)
        self.process: subprocess.Popen[bytes] | ForkedChild
        try:
            if warm is not None:
                if "PYTHONPATH" in environment:
                    environment["PYTHONPATH"] = str(project / environment["PYTHONPATH"])
                self.process = warm.fork(
                    python or [PYTHON], project, environment, theirs, self._output.fileno()
                )
            else:
                self.process = subprocess.Popen(
                    [*(python or [PYTHON]), str(CHILD), "--fd", str(theirs)],
                    stdin=subprocess.PIPE,
                    stdout=self._output,
                    stderr=subprocess.STDOUT,
                    cwd=project,
                    pass_fds=(theirs,),
                    start_new_session=True,
                    env=environment,
                )
        except BaseException:
            self._frames.close()
            self._output.close()
            raise
        finally:
            os.close(theirs)
        begin = Start(args=args, project_dir=str(project), **start)
        self.control(msgspec.json.encode(begin) + b"\n" if start_line is None else start_line)

    def control(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def hang_up(self) -> None:
        """What the child sees when its parent dies: the end of stdin."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def stop_reading(self) -> None:
        """Close our end of the frame pipe."""
        self._frames.close()

    def of(self, kind: type[F]) -> list[F]:
        """Frames of one kind, as received so far."""
        return [frame for frame in self.frames if isinstance(frame, kind)]

    @property
    def result(self) -> Result:
        """The last frame, which must be a result."""
        last = self.frames[-1]
        assert isinstance(last, Result), f"{last}: {self.output()}"
        return last

    def __iter__(self) -> Iterator[AnyFrame]:
        while head := self._frames.read(LENGTH_BYTES):
            body = self._frames.read(frame_length(head))
            self.raw += head + body
            self.frames.append(decode_frame(body))
            yield self.frames[-1]

    def until(self, kind: type[F], **facts: Any) -> F:
        """Read on to the first frame of a kind with these facts."""
        for frame in self:
            if isinstance(frame, kind) and all(
                getattr(frame, name) == value for name, value in facts.items()
            ):
                return frame
        raise AssertionError(f"no {kind.__name__} {facts}: {self.output()}")

    def end(self) -> int:
        """Read to the end; the exit code."""
        for _ in self:
            pass
        return self.process.wait()

    def output(self) -> str:
        return self.output_path.read_text(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for file in (self.process.stdin, self._frames, self._output):
            if file is not None:
                file.close()


Starting = Callable[..., Child]
"""`start(files, args, threads=, config=, **what Child takes)`: a child of the one project."""


@contextmanager
def children(root: Path, warm: WarmChildren | None = None) -> Iterator[Starting]:
    """Starts children of one project, and ends them whatever happens."""
    started: list[Child] = []

    def start(files: Files, args: list[str], **options: Any) -> Child:
        config = options.pop("config", {})
        threads = options.pop("threads", 2)
        project = write_project(root, files, threads=threads, **config)
        try:
            started.append(Child(project, args, warm=warm, **options))
        except RefusedToFork as refused:
            pytest.skip(f"it would start cold: {refused}")
        return started[-1]

    try:
        yield start
    finally:
        for child in started:
            child.__exit__()


def planned(child: Child) -> dict[str, PlannedNode]:
    return {node.unique_id: node for chunk in child.of(Nodes) for node in chunk.nodes}


def results(child: Child) -> dict[str, NodeResult]:
    return {each.unique_id: each for chunk in child.of(Results) for each in chunk.results}


def finished(child: Child) -> dict[str, str]:
    return {finish.unique_id: finish.status for finish in child.of(NodeFinish)}


def rows(database: Path, query: str) -> list[tuple[Any, ...]]:
    """What a query finds in a database file that no process has open."""
    with duckdb.connect(str(database), read_only=True) as connection:
        found: list[tuple[Any, ...]] = connection.execute(query).fetchall()
    return found


def child_env(project: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """As the daemon sets it: nothing of DBT_* is inherited."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DBT_")}
    return {
        **inherited,
        "DBT_SEND_ANONYMOUS_USAGE_STATS": "0",
        "DBT_PROFILES_DIR": str(project),
        "DBT_PROJECT_DIR": str(project),
        **(extra or {}),
    }


def lineage_shop() -> Files:
    """One of everything that lineage is about, and passages of all kinds between them.

    raw.payments -> payments -> cents -> rounded -> revenue <- countries
                                                    revenue -> revenue_history, board, `größe`
    cents and rounded are ephemeral; the exposure `through` reads rounded, `map` countries.
    """
    related = {"to": "ref('countries')", "field": '"code;1"', "config": {"severity": "warn"}}
    columns: list[dict[str, Any]] = [
        {
            "name": "id",
            "data_type": "integer",
            "description": "Key",
            "data_tests": ["not_null"],
            "tags": ["key"],
        },
        {"name": "amount", "data_type": "bigint"},
        {"name": "country", "data_type": "varchar", "data_tests": [{"relationships": related}]},
    ]
    models = [
        {
            "name": "revenue",
            "description": "Erlöse " * 650_000,
            "config": {
                "group": "finance",
                "contract": {"enforced": True},
                "meta": {
                    "owner": 7,
                    "owners": [{"email": "ada@example.com"}, None, 3],
                    "dbtstream": {"labels": {"tier": "gold"}},
                    "1": {"2": [3]},
                },
            },
            "columns": columns,
        },
        {"name": "payments", "config": {"meta": {"owner": "bob@example.com"}}},
    ]
    tables = [{"name": "payments", "identifier": "raw.payments", "columns": [{"name": "id"}]}]
    exposures = [
        {
            "name": "board",
            "type": "dashboard",
            "maturity": "high",
            "url": "https://example.com/board",
            "owner": {"name": "Grace", "email": "grace@example.com"},
            "depends_on": ["ref('revenue')"],
        },
        {
            "name": "through",
            "type": "notebook",
            "owner": {"name": "Grace"},
            "depends_on": ["ref('rounded')"],
        },
        {
            "name": "map",
            "type": "application",
            "owner": {"name": "Grace"},
            "depends_on": ["ref('countries')"],
        },
    ]
    snapshot = (
        "{% snapshot revenue_history %}{{ config(target_schema='main', unique_key='id', "
        "strategy='check', check_cols=['amount']) }} select * from {{ ref('revenue') }}"
        "{% endsnapshot %}"
    )
    groups = [{"name": "finance", "owner": {"name": "Finance", "email": "finance@example.com"}}]
    unit = {
        "name": "sums",
        "model": "größe",
        "given": [{"input": "ref('revenue')", "rows": [{"id": 1, "amount": 2}]}],
        "expect": {"rows": [{"id": 1, "amount": 2}]},
    }
    return {
        "seeds/countries.csv": '"code;1";name\nde;Germany\n',
        "seeds/seeds.yml": properties(seeds=[{"name": "countries", "config": {"delimiter": ";"}}]),
        "models/payments.sql": "select * from {{ source('raw', 'payments') }}",
        "models/cents.sql": "{{ config(materialized='ephemeral') }} "
        "select id, amount * 100 as amount from {{ ref('payments') }}",
        "models/rounded.sql": "{{ config(materialized='ephemeral') }} "
        "select * from {{ ref('cents') }}",
        "models/revenue.sql": "{{ config(materialized='table') }} "
        'select id, amount::bigint as amount, "code;1" as country '
        "from {{ ref('rounded') }}, {{ ref('countries') }}",
        "models/größe.sql": "{{ config(alias='größe.1 x') }} select * from {{ ref('revenue') }}",
        "models/aside.sql": "select 1 as id",
        "snapshots/history.sql": snapshot,
        "tests/positive.sql": "select * from {{ ref('revenue') }} where amount < 0",
        "models/models.yml": properties(
            models=models,
            sources=[{"name": "raw", "schema": "main", "tables": tables}],
            exposures=exposures,
            groups=groups,
            unit_tests=[unit],
        ),
    }


LINEAGE_HOOK = (
    'create or replace table main."raw.payments" as select 1::integer as id, 10 as amount'
)
"""Makes the source of `lineage_shop`."""


def semantic_layer() -> Files:
    """orders -> semantic model -> metric -> exposure."""
    semantic = {
        "name": "orders",
        "model": "ref('orders')",
        "defaults": {"agg_time_dimension": "ordered_on"},
        "entities": [{"name": "order_id", "type": "primary", "expr": "id"}],
        "dimensions": [
            {"name": "ordered_on", "type": "time", "type_params": {"time_granularity": "day"}}
        ],
        "measures": [{"name": "total", "agg": "sum", "expr": "amount"}],
    }
    metric = {
        "name": "total_amount",
        "label": "Total",
        "type": "simple",
        "type_params": {"measure": "total"},
    }
    exposure = {
        "name": "growth",
        "type": "dashboard",
        "owner": {"name": "Grace"},
        "depends_on": ["metric('total_amount')"],
    }
    return {
        "models/orders.sql": "select 1 as id, 10 as amount, current_date as ordered_on",
        "models/aside.sql": "select 1 as id",
        "models/metricflow_time_spine.sql": "{{ config(materialized='table') }} "
        "select current_date as date_day",
        "models/semantic.yml": properties(
            semantic_models=[semantic], metrics=[metric], exposures=[exposure]
        ),
    }


def python_model() -> Files:
    """A model in Python on DuckDB, which needs no more than DuckDB itself."""
    code = "def model(dbt, session):\n    return session.sql('select 1 as id')\n"
    return {"models/orders.py": code, "models/daily.sql": "select * from {{ ref('orders') }}"}


def around(child: Child) -> dict[str, PlannedNode]:
    """The nodes of the graph that are not selected."""
    return {node.unique_id: node for chunk in child.of(GraphNodes) for node in chunk.nodes}


def graph_of(child: Child) -> Graph:
    (graph,) = child.of(Graph)
    return graph
