"""What flows into what, by a manifest: edges, exposures, hashes and what has changed."""

from typing import Any

import msgspec

from dbtstream.column_lineage import Analysis, ColumnRef
from dbtstream.datasets import Datasets
from dbtstream.event_base import Relation
from dbtstream.frames import ExposureDetails, PlannedColumn, PlannedNode
from dbtstream.lineage import ProjectGraph, changed, is_as_told
from dbtstream.lineage_events import FieldTransformation, LineageDeclared
from dbtstream.statuses import ColumnLineageStatus
from tests.stories import BEGIN

NAMESPACE = "postgres://db:5432"
IDENTITY = FieldTransformation(type="DIRECT", subtype="IDENTITY")


def relation(name: str, database: str = "shop") -> Relation:
    return Relation(
        database=database,
        schema="main",
        identifier=name,
        relation_name=f'"{database}"."main"."{name}"',
    )


def node(unique_id: str, *upstream: str, **fields: Any) -> PlannedNode:
    kind, _, rest = unique_id.partition(".")
    name = rest.rpartition(".")[2]
    has_relation = kind in ("model", "seed", "snapshot", "source")
    return PlannedNode(
        **{
            "unique_id": unique_id,
            "resource_type": kind,
            "name": name,
            "package_name": "shop",
            "materialized": "table" if kind == "model" else None,
            "upstream": list(upstream),
            "relation": relation(name) if has_relation else None,
        }
        | fields
    )


def ephemeral(unique_id: str, *upstream: str) -> PlannedNode:
    return node(unique_id, *upstream, materialized="ephemeral", relation=None)


def graph(*nodes: PlannedNode) -> ProjectGraph:
    made = ProjectGraph(Datasets("postgres", {"host": "db", "port": 5432}))
    made.add(nodes)
    return made


def declared(made: ProjectGraph) -> dict[str, LineageDeclared]:
    """As an earlier run told them."""
    envelope: dict[str, Any] = {
        "event_id": "x.1.1",
        "time": BEGIN,
        "seq": 1,
        "project": "shop",
        "target": "dev",
        "run_id": "x",
        "attempt": 1,
        "fence": 0,
        "worker": "w",
    }
    events = [LineageDeclared(**envelope, **made.declared(n)) for n in made.lineage_nodes()]
    decoder = msgspec.json.Decoder(LineageDeclared)
    return {e.unique_id: decoder.decode(msgspec.json.encode(e)) for e in events}


def inputs(made: ProjectGraph, unique_id: str) -> dict[str | None, list[str]]:
    return {given.unique_id: given.via_ephemeral for given in made.inputs(unique_id)}


def test_seeds_snapshots_and_sources_by_identifier_are_inputs() -> None:
    made = graph(
        node("seed.shop.raw"),
        node("snapshot.shop.history", "seed.shop.raw"),
        node("source.shop.crm.people", relation=relation("t_people_v2")),
        node("model.shop.all", "seed.shop.raw", "snapshot.shop.history", "source.shop.crm.people"),
    )
    told = [(given.namespace, given.name) for given in made.inputs("model.shop.all")]
    assert told == [
        (NAMESPACE, "shop.main.raw"),
        (NAMESPACE, "shop.main.history"),
        (NAMESPACE, "shop.main.t_people_v2"),
    ]


def test_ephemeral_models_are_looked_through_and_named() -> None:
    made = graph(
        node("seed.shop.raw"),
        node("seed.shop.other"),
        ephemeral("model.shop.inner", "seed.shop.raw"),
        ephemeral("model.shop.outer", "model.shop.inner", "seed.shop.other"),
        node("model.shop.all", "model.shop.outer"),
    )
    assert inputs(made, "model.shop.all") == {
        "seed.shop.other": ["model.shop.outer"],
        "seed.shop.raw": ["model.shop.outer", "model.shop.inner"],
    }
    assert made.outputs("model.shop.outer") == []


def test_an_edge_that_is_direct_as_well_is_direct() -> None:
    made = graph(
        node("seed.shop.raw"),
        ephemeral("model.shop.between", "seed.shop.raw"),
        node("model.shop.all", "model.shop.between", "seed.shop.raw"),
    )
    assert inputs(made, "model.shop.all") == {"seed.shop.raw": []}


def test_exposures_are_sinks_also_through_metrics() -> None:
    details = ExposureDetails(type="dashboard", url="https://bi/1", maturity="high")
    made = graph(
        node("model.shop.orders"),
        node("semantic_model.shop.orders", "model.shop.orders"),
        node("metric.shop.revenue", "semantic_model.shop.orders"),
        node(
            "exposure.shop.board",
            "metric.shop.revenue",
            exposure=details,
            owners=["ada@example.com"],
        ),
    )
    assert inputs(made, "exposure.shop.board") == {"model.shop.orders": []}
    (sink,) = made.exposures("model.shop.orders")
    assert (sink.unique_id, sink.type, sink.url) == (
        "exposure.shop.board",
        "dashboard",
        "https://bi/1",
    )
    assert sink.owners == ["ada@example.com"]


def test_meta_adds_upstreams_that_dbt_does_not_know() -> None:
    upstream = ["seed.shop.raw", {"namespace": "s3://lake", "name": "events"}, "seed.shop.none"]
    made = graph(
        node("seed.shop.raw"),
        node("model.shop.api", meta={"dbtstream": {"upstream": upstream}}),
    )
    told = [(i.namespace, i.name, i.unique_id, i.origin) for i in made.inputs("model.shop.api")]
    assert told == [
        (NAMESPACE, "shop.main.raw", "seed.shop.raw", "meta"),
        ("s3://lake", "events", None, "meta"),
    ]


def test_a_deferred_input_is_where_the_sql_reads_it() -> None:
    made = graph(
        node("model.shop.built", deferred=relation("built", "prod")),
        node("model.shop.absent", deferred=relation("absent", "prod")),
        node("model.shop.all", "model.shop.built", "model.shop.absent"),
    )
    sql = 'select * from "shop"."main"."built" join "prod"."main"."absent" using (id)'
    deferred = made.deferred_in("model.shop.all", sql)
    told = [(i.name, i.deferred) for i in made.inputs("model.shop.all", deferred)]
    assert told == [("shop.main.built", False), ("prod.main.absent", True)]


def test_a_node_may_keep_its_lineage_to_itself() -> None:
    made = graph(
        node("model.shop.quiet", meta={"dbtstream": {"lineage": False}}),
        node("model.shop.silent", meta={"dbtstream": {"emit": False}}),
        node("model.shop.told", "model.shop.quiet"),
        node("test.shop.unique", "model.shop.told"),
    )
    assert [n.unique_id for n in made.lineage_nodes()] == ["model.shop.told"]
    assert inputs(made, "model.shop.told") == {"model.shop.quiet": []}


def test_what_is_wrong_in_a_nodes_meta_is_said_with_its_name() -> None:
    made = graph(node("model.shop.odd", meta={"dbtstream": {"emit": "no"}}))
    (problem,) = made.problems
    assert "model.shop.odd" in problem
    assert made.options("model.shop.odd").emit


def test_observed_columns_are_named_as_datasets() -> None:
    made = graph(node("seed.shop.raw"), node("model.shop.orders", "seed.shop.raw"))
    analysis = Analysis(
        status=ColumnLineageStatus.COMPLETE,
        fields={
            "id": [ColumnRef(ref="seed.shop.raw", field="id", transformations=[IDENTITY])],
            "at": [ColumnRef(relation_name='"lake"."x"."log ""1"""', field="ts")],
        },
        dataset_inputs=[],
    )
    facts = made.observed("model.shop.orders", analysis, frozenset(), "inferred")
    (of_id,) = facts["fields"]["id"].inputs
    (of_at,) = facts["fields"]["at"].inputs
    assert (of_id.name, of_id.field, of_id.unique_id) == ("shop.main.raw", "id", "seed.shop.raw")
    assert (of_at.name, of_at.unique_id) == ('lake.x.log "1"', None)
    assert facts["dataset_inputs"] == []


def test_the_lineage_hash_follows_columns_and_nothing_else() -> None:
    made = graph(node("seed.shop.raw"), node("model.shop.orders", "seed.shop.raw"))

    def hash_of(status: ColumnLineageStatus, field: str, parser: str) -> str:
        refs = [ColumnRef(ref="seed.shop.raw", field=field)]
        analysis = Analysis(status=status, fields={"id": refs}, dataset_inputs=[], parser=parser)
        facts = made.observed("model.shop.orders", analysis, frozenset(), None)
        return str(facts["lineage_hash"])

    complete, partial = ColumnLineageStatus.COMPLETE, ColumnLineageStatus.PARTIAL
    assert hash_of(complete, "id", "a") == hash_of(partial, "id", "b")
    assert hash_of(complete, "id", "a") != hash_of(complete, "key", "a")


def test_an_unchanged_manifest_tells_nothing() -> None:
    nodes = (
        node("seed.shop.raw", columns=[PlannedColumn(name="id", data_type="int")]),
        node("model.shop.orders", "seed.shop.raw"),
    )
    before, now = declared(graph(*nodes)), graph(*nodes)
    new = {n.unique_id: now.declared(n) for n in now.lineage_nodes()}
    assert changed(before, new)["counts"] == {}
    assert all(is_as_told(facts, before[name]) for name, facts in new.items())


def test_every_kind_of_change_is_found() -> None:
    before = declared(
        graph(
            node("seed.shop.raw"),
            node("model.shop.gone"),
            node(
                "model.shop.orders",
                "seed.shop.raw",
                checksum="a",
                owners=["ada"],
                columns=[
                    PlannedColumn(name="id", data_type="int"),
                    PlannedColumn(name="old"),
                ],
            ),
        )
    )
    now = graph(
        node("seed.shop.raw"),
        node("seed.shop.new"),
        node(
            "model.shop.orders",
            "seed.shop.new",
            checksum="b",
            owners=["bob"],
            contract_enforced=True,
            columns=[
                PlannedColumn(name="id", data_type="bigint"),
                PlannedColumn(name="fresh", data_type="text"),
            ],
        ),
    )
    told = changed(before, {n.unique_id: now.declared(n) for n in now.lineage_nodes()})

    assert told["nodes_added"] == ["seed.shop.new"]
    assert told["nodes_removed"] == ["model.shop.gone"]
    assert [(c.unique_id, c.what) for c in told["nodes_changed"]] == [
        ("model.shop.orders", ["code", "inputs"])
    ]
    assert [(e.upstream, e.downstream) for e in told["edges_added"]] == [
        ("seed.shop.new", "model.shop.orders")
    ]
    assert [(e.upstream, e.downstream) for e in told["edges_removed"]] == [
        ("seed.shop.raw", "model.shop.orders")
    ]
    assert [(c.column, c.change, c.before, c.after) for c in told["columns_changed"]] == [
        ("id", "changed", "int", "bigint"),
        ("old", "removed", None, None),
        ("fresh", "added", None, "text"),
    ]
    assert [(c.before, c.after) for c in told["owners_changed"]] == [(["ada"], ["bob"])]
    assert [(c.before, c.after) for c in told["contracts_changed"]] == [(False, True)]
    assert told["counts"] == {
        "nodes_added": 1,
        "nodes_removed": 1,
        "nodes_changed": 1,
        "columns_changed": 3,
        "owners_changed": 1,
        "contracts_changed": 1,
        "edges_added": 1,
        "edges_removed": 1,
    }


def test_long_lists_are_cut_and_counted() -> None:
    now = graph(*(node(f"seed.shop.s{number}") for number in range(600)))
    told = changed({}, {n.unique_id: now.declared(n) for n in now.lineage_nodes()})
    assert len(told["nodes_added"]) == 500
    assert told["counts"] == {"nodes_added": 600}
