"""What the dbt child tells of the manifest: its nodes, the graph around the selection, its hash,
the connection, and the SQL that nodes ran. Real dbt on DuckDB, as in `test_dbt_child`.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dbtstream import frames
from dbtstream.event_base import Relation
from dbtstream.frames import MAX_FRAME_BYTES, NodeFinish, PlannedNode
from tests import dbt_projects as projects
from tests.dbt_projects import PYTHON, Child, Starting, around, finished, graph_of, planned
from tests.warm_children import WarmChildren

VERSION = projects.dbt_release(PYTHON)
since_1_9 = pytest.mark.skipif(VERSION < (1, 9), reason="dbt 1.8 has no microbatch")
HOOK = {"on-run-start": [projects.LINEAGE_HOOK]}


@pytest.fixture
def start(tmp_path: Path, warm: WarmChildren | None) -> Iterator[Starting]:
    with projects.children(tmp_path, warm) as begin:
        yield begin


@pytest.fixture(scope="module")
def lineage_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lineage")


@pytest.fixture(scope="module")
def built(lineage_root: Path) -> Iterator[Child]:
    """A build of nearly all of `lineage_shop` by a parent that knows nothing of it."""
    with projects.children(lineage_root) as begin:
        child = begin(
            projects.lineage_shop(),
            ["build", "--exclude", "aside"],
            config=HOOK,
            graph=True,
            compiled_code=True,
        )
        assert child.end() == 0, child.output()
        assert child.result.stats.callback_error is None
        yield child


@pytest.fixture(scope="module")
def nodes(built: Child) -> dict[str, PlannedNode]:
    return {**around(built), **planned(built)}


def finish_of(child: Child, name: str) -> NodeFinish:
    """The last finish of a node, by the end of its unique_id."""
    return [each for each in child.of(NodeFinish) if each.unique_id.endswith(name)][-1]


# Nodes.


def test_documented_columns_keep_their_type_tags_and_order(nodes: dict[str, PlannedNode]) -> None:
    revenue = nodes["model.shop.revenue"]
    assert [(column.name, column.data_type) for column in revenue.columns] == [
        ("id", "integer"),
        ("amount", "bigint"),
        ("country", "varchar"),
    ]
    assert (revenue.columns[0].description, revenue.columns[0].tags) == ("Key", ("key",))
    assert revenue.columns[1].description is None
    assert revenue.contract_enforced
    assert not nodes["model.shop.payments"].contract_enforced


def test_a_description_of_megabytes_is_cut_and_says_so(
    built: Child, nodes: dict[str, PlannedNode]
) -> None:
    revenue = nodes["model.shop.revenue"]
    assert revenue.description_truncated
    assert (revenue.description or "").startswith("Erlöse Erlöse ")
    assert len((revenue.description or "").encode()) <= 8 * 1024
    assert not nodes["model.shop.payments"].description_truncated
    assert len(built.raw) < 1024 * 1024


def test_owners_and_meta_of_any_shape_come_through(nodes: dict[str, PlannedNode]) -> None:
    revenue = nodes["model.shop.revenue"]
    assert revenue.group == "finance"
    assert revenue.owners == ["ada@example.com", "finance@example.com", "Finance"]
    assert revenue.meta["owner"] == 7
    assert revenue.meta["dbtstream"] == {"labels": {"tier": "gold"}}
    assert revenue.meta["1"] == {"2": [3]}


def test_a_source_is_named_by_its_identifier_and_a_model_by_its_alias(
    nodes: dict[str, PlannedNode],
) -> None:
    source, size = nodes["source.shop.raw.payments"], nodes["model.shop.größe"]
    assert source.relation == Relation(
        database="shop",
        schema="main",
        identifier="raw.payments",
        relation_name='"shop"."main"."raw.payments"',
    )
    assert size.relation is not None
    assert size.relation.identifier == "größe.1 x"
    assert nodes["model.shop.rounded"].relation is None
    assert nodes["model.shop.rounded"].upstream == ["model.shop.cents"]


def test_a_seed_has_the_header_of_its_file_by_its_own_delimiter(
    nodes: dict[str, PlannedNode],
) -> None:
    assert nodes["seed.shop.countries"].header == ["code;1", "name"]


def test_a_test_has_its_arguments_and_what_it_counts(nodes: dict[str, PlannedNode]) -> None:
    (related,) = [node for node in nodes.values() if node.name.startswith("relationships")]
    assert related.test_details is not None
    assert related.test_details.params == {"to": "ref('countries')", "field": '"code;1"'}
    assert related.test_details.fail_calc == "count(*)"
    assert related.test is not None
    assert (related.test.attached_node, related.test.column) == ("model.shop.revenue", "country")
    positive = nodes["test.shop.positive"]
    assert positive.test_details is not None
    assert positive.test_details.params == {}
    assert nodes["unit_test.shop.größe.sums"].upstream == ["model.shop.größe"]


def test_an_exposure_has_its_details(nodes: dict[str, PlannedNode]) -> None:
    board = nodes["exposure.shop.board"]
    assert board.exposure == frames.ExposureDetails(
        type="dashboard", url="https://example.com/board", maturity="high"
    )
    assert board.upstream == ["model.shop.revenue"]
    assert nodes["exposure.shop.map"].exposure == frames.ExposureDetails(type="application")


def test_meta_is_found_in_the_config_and_beside_it(start: Starting) -> None:
    """dbt 1.10 moved it into `config`; the old place still works."""
    models = [
        {"name": "orders", "meta": {"dbtstream": {"emit": False}}},
        {"name": "daily", "config": {"meta": {"dbtstream": {"key": "x"}}}},
    ]
    files = {**projects.shop(), "models/models.yml": projects.properties(models=models)}
    child = start(files, ["parse"], graph=True)
    assert child.end() == 0
    assert around(child)["model.shop.orders"].meta == {"dbtstream": {"emit": False}}
    assert around(child)["model.shop.daily"].meta == {"dbtstream": {"key": "x"}}


def test_full_refresh_is_by_flag_unless_the_nodes_own_config_says_otherwise(
    start: Starting,
) -> None:
    incremental = "{{ config(materialized='incremental', incremental_strategy='append'%s) }} "
    files = {
        "models/flagged.sql": incremental % "" + "select 1 as id",
        "models/never.sql": incremental % ", full_refresh=false" + "select 1 as id",
    }
    child = start(files, ["run", "--full-refresh"])
    assert child.end() == 0
    nodes = planned(child)
    assert nodes["model.shop.flagged"].full_refresh
    assert not nodes["model.shop.never"].full_refresh
    assert nodes["model.shop.flagged"].incremental_strategy == "append"
    assert nodes["model.shop.flagged"].language == "sql"
    child = start(files, ["run"])
    child.end()
    assert not planned(child)["model.shop.flagged"].full_refresh


def test_deferred_relations_are_told_before_dbt_has_merged_them(start: Starting) -> None:
    files = projects.ephemeral() | projects.shop()
    child = start(files, ["parse", "--target", "prod"])
    assert child.end() == 0
    shutil.copytree(child.project / "target", child.project / "state")
    child = start(files, ["compile", "-s", "daily", "--defer", "--state", "state"], graph=True)
    assert child.end() == 0
    daily, orders = planned(child)["model.shop.daily"], around(child)["model.shop.orders"]
    assert daily.deferred is not None
    assert daily.deferred.relation_name == '"prod"."main"."daily"'
    assert orders.deferred is not None
    assert orders.deferred.database == "prod"
    assert orders.relation is not None
    assert orders.relation.database == "shop"
    assert around(child)["model.shop.base"].deferred is None


# The graph.


def test_a_parent_that_does_not_know_the_manifest_gets_all_of_it_before_anything_starts(
    built: Child,
) -> None:
    graph = graph_of(built)
    assert graph.complete
    (plan,) = built.of(frames.Plan)
    assert graph.manifest_hash == plan.manifest_hash
    assert not set(around(built)) & set(planned(built))
    told = {**around(built), **planned(built)}
    assert {"model.shop.aside", "source.shop.raw.payments", "exposure.shop.map"} <= set(told)
    order = [type(frame) for frame in built.frames]
    first = order.index(frames.HookStart)
    assert order.index(frames.Plan) < order.index(frames.GraphNodes) < order.index(frames.Graph)
    assert order.index(frames.Graph) < first < order.index(frames.NodeStart)
    assert {node.resource_type for node in around(built).values()} <= {
        "exposure",
        "model",
        "source",
    }


def test_a_parent_that_knows_it_gets_only_what_is_near(built: Child, lineage_root: Path) -> None:
    known = graph_of(built).manifest_hash
    with projects.children(lineage_root) as begin:

        def near(*args: str, known: str = known) -> tuple[bool, set[str]]:
            options = {"config": HOOK, "graph": True, "known_manifest": known}
            child = begin(projects.lineage_shop(), list(args), **options)
            assert child.end() == 0, child.output()
            names = {unique_id.split(".", 2)[2] for unique_id in around(child)}
            return graph_of(child).complete, names

        # Through both ephemeral models up to the first with a table; `through` does not
        # depend on revenue, nor `map`.
        assert near("run", "-s", "revenue") == (
            False,
            {"rounded", "cents", "payments", "countries", "board"},
        )
        # The exposure below two ephemeral models, with what lies between.
        assert near("run", "-s", "payments") == (
            False,
            {"raw.payments", "through", "rounded", "cents"},
        )
        # A test has all that it reads.
        assert near("test", "-s", "test_name:relationships") == (False, {"revenue", "countries"})
        complete, names = near("run", "-s", "aside", known="another")
        assert complete
        assert {"revenue", "map", "raw.payments", "revenue_history"} <= names


def test_an_exposure_of_a_metric_is_near_the_model_below(start: Starting) -> None:
    files = projects.semantic_layer()
    child = start(files, ["parse"], graph=True)
    assert child.end() == 0, child.output()
    nodes = around(child)
    assert nodes["exposure.shop.growth"].upstream == ["metric.shop.total_amount"]
    known = graph_of(child).manifest_hash
    child = start(files, ["run", "-s", "orders"], graph=True, known_manifest=known)
    assert child.end() == 0, child.output()
    assert not graph_of(child).complete
    assert set(around(child)) == {
        "exposure.shop.growth",
        "metric.shop.total_amount",
        "semantic_model.shop.orders",
    }


@pytest.mark.parametrize(
    ("args", "planned_too"),
    [
        (["parse"], False),
        (["list"], False),
        (["run-operation", "tidy", "--args", "{word: up}"], False),
        (["run", "-s", "nothing_of_that_name"], False),
        (["compile"], True),
        (["docs", "generate"], True),
        (["show", "--inline", "select 1 as id"], True),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_each_command_that_parses_tells_the_same_manifest(
    start: Starting, args: list[str], planned_too: bool
) -> None:
    """Those that run no nodes tell it at their end. An inline query is not part of it."""
    files = projects.exposure() | projects.run_operation()
    child = start(files, args, graph=True, selectors={"core": "tag:core"})
    assert child.end() == 0, child.output()
    assert bool(child.of(frames.Plan)) == planned_too
    told = {**around(child), **planned(child)}
    assert {"model.shop.orders", "model.shop.daily", "exposure.shop.board"} <= set(told)
    assert told["model.shop.orders"].matches == ["core"]
    reference = start(files, ["parse"], graph=True)
    reference.end()
    assert graph_of(child).manifest_hash == graph_of(reference).manifest_hash
    assert child.result.stats.callback_error is None


def test_a_command_without_a_manifest_tells_no_graph(start: Starting) -> None:
    child = start(projects.compile_error(), ["run"], graph=True)
    assert child.end() == 2
    assert child.of(frames.Graph) == []
    assert child.result.stats.callback_error is None


def test_without_the_wish_there_is_no_graph_and_no_code(start: Starting) -> None:
    child = start(projects.shop(), ["run"])
    assert child.end() == 0
    assert not child.of(frames.Graph)
    assert not child.of(frames.GraphNodes)
    assert not child.of(frames.Columns)
    assert {finish.compiled_code_hash for finish in child.of(NodeFinish)} == {None}


def test_the_hash_stays_for_a_description_and_changes_for_a_type(start: Starting) -> None:
    """Also between a full and a partial parse."""

    def hash_of(**column: str) -> str:
        model = {"name": "orders", "columns": [{"name": "id", **column}]}
        files = {**projects.shop(), "models/models.yml": projects.properties(models=[model])}
        child = start(files, ["parse"], graph=True)
        assert child.end() == 0
        return graph_of(child).manifest_hash

    first = hash_of(data_type="integer")
    assert hash_of(data_type="integer", description="Key") == first
    assert hash_of(data_type="bigint") != first


def test_the_connection_names_the_files_and_nothing_secret(start: Starting, tmp_path: Path) -> None:
    output = {
        "type": "duckdb",
        "path": "data/shop.duckdb",
        "attach": [{"path": "more.duckdb", "alias": "more"}, {"path": ":memory:", "alias": "mem"}],
        "settings": {"custom_user_agent": "hunter2"},
        "secrets": [{"type": "s3", "key_id": "hunter2", "secret": "hunter2"}],
    }
    profiles = {"shop": {"target": "dev", "outputs": {"dev": output}}}
    (tmp_path / "data").mkdir()
    files = {**projects.shop(), "profiles.yml": json.dumps(profiles)}
    child = start(files, ["parse"], graph=True)
    assert child.end() == 0, child.output()
    graph = graph_of(child)
    assert graph.adapter_type == "duckdb"
    assert graph.connection == {
        "type": "duckdb",
        "database": "shop",
        "schema": "main",
        "path": str(tmp_path / "data" / "shop.duckdb"),
        "attach": {"more": str(tmp_path / "more.duckdb"), "mem": ":memory:"},
    }
    assert b"hunter2" not in child.raw


# Compiled code.


def test_a_finish_has_the_sql_that_ran_and_a_tests_only_its_hash(
    built: Child, lineage_root: Path
) -> None:
    revenue = finish_of(built, "model.shop.revenue")
    written = lineage_root / "target" / "compiled" / "shop" / "models" / "revenue.sql"
    assert revenue.compiled_code == written.read_text()
    assert "__dbt__cte__rounded" in (revenue.compiled_code or "")
    code = (revenue.compiled_code or "").encode()
    assert revenue.compiled_code_hash == hashlib.sha256(code).hexdigest()
    assert "revenue" in (finish_of(built, "revenue_history").compiled_code or "")
    test = finish_of(built, "test.shop.positive")
    assert test.compiled_code is None
    assert len(test.compiled_code_hash or "") == 64
    assert finish_of(built, "seed.shop.countries").compiled_code_hash is None


def test_long_code_has_only_a_hash_and_a_secret_in_it_is_hidden(start: Starting) -> None:
    files = {
        "models/long.sql": "select 1 as id -- " + "ö\x01" * 600_000,
        "models/wide.sql": "select 1 as id -- " + "\x01" * 1_000_000,
        "models/secret.sql": "select '{{ env_var(\"TOKEN\") }}' as token",
    }
    child = start(
        files,
        ["run"],
        compiled_code=True,
        env={"TOKEN": "hunter2secret"},
        secret_env=["TOKEN"],
    )
    assert child.end() == 0, child.output()
    long, wide = finish_of(child, "long"), finish_of(child, "wide")
    assert (long.compiled_code, long.compiled_code_truncated) == (None, True)
    assert len(long.compiled_code_hash or "") == 64
    # Less than 1 MiB, but six times that in JSON, and so too long for a frame.
    assert (wide.status, wide.compiled_code, wide.compiled_code_truncated) == (
        "success",
        None,
        True,
    )
    secret = finish_of(child, "secret")
    assert secret.compiled_code == "select '*****' as token"
    raw = hashlib.sha256(b"select 'hunter2secret' as token").hexdigest()
    assert secret.compiled_code_hash == raw
    assert b"hunter2secret" not in child.raw
    assert len(child.raw) < MAX_FRAME_BYTES


@since_1_9
def test_a_microbatch_model_has_the_code_of_a_batch_and_its_batches_have_none(
    start: Starting,
) -> None:
    times = ["--event-time-start", "2024-01-01", "--event-time-end", "2024-01-04"]
    child = start(projects.microbatch(), ["build", *times], compiled_code=True)
    assert child.end() == 0, child.output()
    finishes = [f for f in child.of(NodeFinish) if f.unique_id == "model.shop.batched"]
    assert [bool(finish.compiled_code) for finish in finishes] == [False, False, False, True]
    code = finishes[-1].compiled_code or ""
    assert "happened_at" in code
    assert "2024-01-0" in code
    assert len(finishes[-1].compiled_code_hash or "") == 64


def test_a_python_model_says_so_and_has_no_sql(start: Starting) -> None:
    child = start(projects.python_model(), ["run"], compiled_code=True)
    assert child.end() == 0, child.output()
    assert planned(child)["model.shop.orders"].language == "python"
    orders = finish_of(child, "orders")
    assert orders.compiled_code is None
    assert len(orders.compiled_code_hash or "") == 64
    assert finish_of(child, "daily").compiled_code == 'select * from "shop"."main"."orders"'


def test_compile_has_the_code_of_what_it_did_not_build(start: Starting) -> None:
    child = start(projects.version_model(), ["compile"], compiled_code=True, graph=True)
    assert child.end() == 0
    assert set(finished(child).values()) == {"success"}
    assert finish_of(child, "uses").compiled_code == 'select * from "shop"."main"."customers_v2"'
