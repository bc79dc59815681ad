"""How each asset is: one event for each kind of end, and what is remembered of it."""

from datetime import timedelta
from typing import Any

import pytest

from dbtstream.asset_schema import Schema, schema_by_project
from dbtstream.assets import Assets, AssetState, Build
from dbtstream.column_lineage import KnownColumn
from dbtstream.config import AssetsConfig
from dbtstream.dbt_values import node_block
from dbtstream.event_base import ErrorBlock, FreshnessBlock
from dbtstream.events import NodeFinished, TestBlock
from dbtstream.frames import PlannedColumn, PlannedNode, TestDetails
from dbtstream.lineage_events import (
    Asset,
    AssetChecked,
    AssetFailed,
    AssetMaterialized,
    AssetObserved,
    AssetSkipped,
)
from dbtstream.statuses import NodeStatus, Reason
from tests.stories import BEGIN
from tests.unit.test_lineage import graph, node, relation

RAW, ORDERS, SILENT = "seed.shop.raw", "model.shop.orders", "model.shop.silent"
CUSTOMERS, SOURCE = "model.shop.customers", "source.shop.crm.people"


def check(name: str, *upstream: str, attached: str | None = None, **params: Any) -> PlannedNode:
    return node(
        f"test.shop.{name}",
        *upstream,
        test=TestBlock(attached_node=attached, column="id", test_name=name, severity="warn"),
        test_details=TestDetails(params=params, fail_calc="count(*)"),
    )


NODES = (
    node(RAW, header=["id", "amount"]),
    node(
        ORDERS,
        RAW,
        owners=["ada@example.com"],
        group="finance",
        tags=["core"],
        matches=["critical"],
        description="One row per order",
        columns=[
            PlannedColumn(name="ID", data_type="int", description="The key"),
            PlannedColumn(name="ghost"),
        ],
        meta={"dbtstream": {"labels": {"tier": "1"}}},
    ),
    node(CUSTOMERS, RAW),
    node(SILENT, RAW, meta={"dbtstream": {"asset": False}}),
    node(SOURCE, relation=relation("t_people")),
    node("model.shop.inner", RAW, materialized="ephemeral", relation=None),
    check("not_null", ORDERS, attached=ORDERS),
    check("relationships", CUSTOMERS, ORDERS, attached=ORDERS, to="ref('customers')", field="id"),
    check("fk", CUSTOMERS, SOURCE, to="ref('customers')", field="key"),
    check("of_source", SOURCE),
    check("singular", RAW, ORDERS),
    check("of_silent", SILENT, attached=SILENT),
    node("unit_test.shop.orders.adds_up", ORDERS),
    node("operation.shop.hook"),
)


def assets(*states: AssetState, **config: Any) -> Assets:
    return Assets(
        graph(*NODES),
        AssetsConfig(**config),
        project="shop",
        target="dev",
        states={state.unique_id: state for state in states},
    )


def ended(
    unique_id: str, status: NodeStatus = NodeStatus.SUCCESS, run: str = "r2", **fields: Any
) -> NodeFinished:
    planned = next(n for n in NODES if n.unique_id == unique_id)
    said: dict[str, Any] = {
        "event_id": f"{run}.1.9",
        "time": BEGIN,
        "seq": 9,
        "project": "shop",
        "target": "dev",
        "run_id": run,
        "attempt": 1,
        "fence": 7,
        "worker": "w",
        "invocation_id": f"invocation-{run}",
        "node": node_block(planned),
        "status": status,
        "test": planned.test,
    }
    return NodeFinished(**said | fields)


def told(book: Assets, finished: NodeFinished, build: Build | None = None) -> Asset | None:
    """As `asset_events` does it: told, numbered, remembered."""
    subject = book.subject_of(finished.node.unique_id)
    answer = book.told(finished, subject, build or Build()) if subject else None
    if answer is None:
        return None
    kind, facts = answer
    envelope = {
        name: getattr(finished, name)
        for name in ("event_id", "time", "seq", "project", "target", "run_id", "attempt", "fence")
    }
    event = kind(**envelope, worker="w", **facts)
    assert isinstance(event, Asset)
    book.remember(event)
    return event


def schema(*names: str, source: str = "inferred", type_: str | None = None) -> Schema:
    return Schema(columns=[KnownColumn(name=n, type=type_) for n in names], source=source)


def test_a_build_says_what_the_asset_is_and_what_it_was_made_from() -> None:
    book = assets()
    told(book, ended(RAW), Build(schema=schema("id", "amount")))
    inputs = graph(*NODES).inputs(ORDERS)
    build = Build(schema=schema("id", "amount"), inputs=inputs, lineage_hash="h")
    event = told(book, ended(ORDERS, rows_affected=3), build)

    assert isinstance(event, AssetMaterialized)
    assert event.identity.name == "shop.main.orders"
    assert event.key == "shop.main.orders"
    assert (event.owners, event.group, event.tags) == (["ada@example.com"], "finance", ["core"])
    assert (event.matches, event.asset_labels) == (["critical"], {"tier": "1"})
    assert (event.rows_affected, event.lineage_hash) == (3, "h")
    assert event.dataset_version == "invocation-r2"
    (given,) = event.input_versions
    assert (given.unique_id, given.dataset_version) == (RAW, "invocation-r2")
    assert given.materialized_at == BEGIN
    assert event.columns is not None
    assert [(c.name, c.description) for c in event.columns] == [
        ("id", "The key"),
        ("amount", None),
    ]
    assert event.documented_not_found == ["ghost"]
    assert event.lifecycle == "OVERWRITE"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (NodeStatus.SUCCESS, AssetMaterialized),
        (NodeStatus.WARN, AssetMaterialized),
        (NodeStatus.ERROR, AssetFailed),
        (NodeStatus.PARTIAL_SUCCESS, AssetFailed),
        (NodeStatus.CANCELLED, AssetFailed),
        (NodeStatus.LOST, AssetFailed),
        (NodeStatus.SKIPPED, AssetSkipped),
        (NodeStatus.NEVER_STARTED, AssetSkipped),
        (NodeStatus.NO_OP, None),
        (NodeStatus.REUSED, None),
    ],
)
def test_each_end_of_a_build(status: NodeStatus, kind: type[Asset] | None) -> None:
    event = told(assets(), ended(ORDERS, status))
    assert (type(event) if event else None) is kind


def test_recovered_is_one_filter() -> None:
    book = assets()
    error = ErrorBlock(class_="DatabaseError", message="no luck")
    for status, fields in (
        (NodeStatus.SUCCESS, {}),
        (NodeStatus.ERROR, {"error": error, "message": "no luck"}),
        (NodeStatus.SKIPPED, {"root_causes": [RAW], "reason": Reason.UPSTREAM_FAILED}),
        (NodeStatus.SUCCESS, {}),
        (NodeStatus.SUCCESS, {}),
    ):
        before = book.states.get(ORDERS)
        event = told(book, ended(ORDERS, status, **fields))
        assert event is not None
        assert event.previous_status == (before.status if before else None)
        if isinstance(event, AssetFailed):
            assert event.error == error
            assert event.dataset_version == "invocation-r2", "the last good build may be there"
    states = [NodeStatus.SUCCESS, NodeStatus.ERROR, NodeStatus.SKIPPED, NodeStatus.SUCCESS]
    assert book.states[ORDERS].status == states[-1]


def test_a_skip_names_its_causes_and_how_they_ended() -> None:
    book = assets()
    told(book, ended(RAW, NodeStatus.ERROR))
    event = told(book, ended(ORDERS, NodeStatus.SKIPPED, root_causes=[RAW, "model.shop.before"]))
    assert isinstance(event, AssetSkipped)
    assert [(c.unique_id, c.status) for c in event.causes] == [
        (RAW, NodeStatus.ERROR),
        ("model.shop.before", None),
    ]


@pytest.mark.parametrize(
    ("status", "word"),
    [
        (NodeStatus.SUCCESS, "pass"),
        (NodeStatus.WARN, "warn"),
        (NodeStatus.FAIL, "fail"),
        (NodeStatus.ERROR, "error"),
        (NodeStatus.SKIPPED, "skipped"),
        (NodeStatus.NEVER_STARTED, "never_started"),
        (NodeStatus.CANCELLED, "cancelled"),
        (NodeStatus.LOST, "lost"),
    ],
)
def test_failed_could_not_run_and_skipped_are_three_words(status: NodeStatus, word: str) -> None:
    failures = 4 if status is NodeStatus.FAIL else None
    event = told(assets(), ended("test.shop.not_null", status, failures=failures))
    assert isinstance(event, AssetChecked)
    assert (event.unique_id, event.check.status, event.check.failures) == (ORDERS, word, failures)
    assert event.check.columns == ["id"]


def test_checks_remember_their_own_status() -> None:
    book = assets()
    told(book, ended("test.shop.not_null", NodeStatus.FAIL))
    told(book, ended(ORDERS))
    event = told(book, ended("test.shop.not_null"))
    assert event is not None
    assert event.previous_status == "fail"


def test_a_relationship_has_two_sides() -> None:
    event = told(assets(), ended("test.shop.relationships"))
    assert isinstance(event, AssetChecked)
    assert event.unique_id == ORDERS
    (other,) = event.check.other_datasets
    assert (other.unique_id, other.name, other.column) == (CUSTOMERS, "shop.main.customers", "id")


def test_a_relationship_of_a_source_is_of_the_source() -> None:
    """dbt attaches tests to models only; the first parent would be the other side."""
    event = told(assets(), ended("test.shop.fk"))
    assert event is not None
    assert event.unique_id == SOURCE


def test_a_singular_test_is_of_its_first_parent_and_names_the_others() -> None:
    event = told(assets(), ended("test.shop.singular", NodeStatus.FAIL))
    assert isinstance(event, AssetChecked)
    assert event.unique_id == RAW
    assert [other.unique_id for other in event.check.other_datasets] == [ORDERS]


def test_unit_tests_are_checks_of_their_model() -> None:
    event = told(assets(), ended("unit_test.shop.orders.adds_up", NodeStatus.FAIL))
    assert isinstance(event, AssetChecked)
    assert (event.unique_id, event.check.kind) == (ORDERS, "unit_test")


def test_freshness_is_an_observation_of_the_source() -> None:
    loaded = BEGIN - timedelta(hours=30)
    block = FreshnessBlock(max_loaded_at=loaded, age_s=108_000.0, error_after_s=86_400.0)
    book = assets()
    event = told(book, ended(SOURCE, NodeStatus.ERROR, dbt_status="error", freshness=block))
    assert isinstance(event, AssetObserved)
    assert (event.status, event.freshness, event.identity.name) == (
        "error",
        block,
        "shop.main.t_people",
    )
    assert book.states[SOURCE].materialized_at == loaded, "what a downstream build has seen"


@pytest.mark.parametrize(
    "unique_id",
    [SILENT, "test.shop.of_silent", "model.shop.inner", "operation.shop.hook"],
)
def test_of_these_nothing_is_told(unique_id: str) -> None:
    assert told(assets(), ended(unique_id)) is None


def test_a_project_may_turn_assets_off() -> None:
    assert told(assets(emit=False), ended(ORDERS)) is None


def test_keys_follow_the_template() -> None:
    event = told(assets(key="{target}/{identifier}", prefix="wh:"), ended(ORDERS))
    assert event is not None
    assert event.key == "wh:dev/orders"


def test_schema_changes_are_told_once() -> None:
    book = assets()
    changes = []
    for names in (("id", "a"), ("id", "a"), ("ID", "b"), ("id", "b")):
        event = told(book, ended(ORDERS), Build(schema=schema(*names)))
        assert isinstance(event, AssetMaterialized)
        changes.append(event.schema_change)
    assert changes[0] is None, "nothing was known before"
    assert changes[1] is None
    assert changes[2] is not None
    assert (changes[2].added, changes[2].removed) == (["b"], ["a"])
    assert changes[3] is None


def test_a_retyped_column_needs_two_words_of_one_source() -> None:
    for second, expected in (("adapter", ["a"]), ("contract", [])):
        book = assets()
        told(book, ended(ORDERS), Build(schema=schema("a", source="adapter", type_="INTEGER")))
        event = told(book, ended(ORDERS), Build(schema=schema("a", source=second, type_="BIGINT")))
        assert isinstance(event, AssetMaterialized)
        change = event.schema_change
        assert [r.name for r in change.retyped] if change else expected == []


def test_documentation_proves_no_change() -> None:
    """It may name some columns only."""
    book = assets()
    told(book, ended(ORDERS), Build(schema=schema("id", "a")))
    event = told(book, ended(ORDERS), Build(schema=schema("id", source="documented")))
    assert isinstance(event, AssetMaterialized)
    assert event.schema_change is None


def test_what_the_project_says_of_columns() -> None:
    by_id = {n.unique_id: schema_by_project(n) for n in NODES}
    raw, orders = by_id[RAW], by_id[ORDERS]
    assert raw is not None
    assert ([c.name for c in raw.columns], raw.source) == (["id", "amount"], "inferred")
    assert orders is not None
    assert ([c.name for c in orders.columns], orders.source) == (["ID", "ghost"], "documented")
    assert by_id[CUSTOMERS] is None
    contract = node(
        "model.shop.c", contract_enforced=True, columns=[PlannedColumn(name="x", data_type="int")]
    )
    assert schema_by_project(contract) == schema("x", source="contract", type_="int")
