"""The current graph: made of last events, found by name, cut around a node or a column."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbtstream.lineage_events import LineageInput
from dbtstream.lineage_find import (
    AmbiguousNode,
    ColumnNotFound,
    NodeNotFound,
    around,
    find_node,
    reached,
)
from dbtstream.lineage_graph import Graph, build_graph
from dbtstream.statuses import ColumnLineageStatus
from tests.lineage_graphs import (
    BASE,
    CUSTOMERS,
    NAMESPACE,
    ORDERS,
    PAYMENTS,
    RAW_ORDERS,
    SEED,
    SHOP_DECLARED,
    SHOP_OBSERVED,
    STG,
    WEEKLY,
    chain,
    column,
    declared,
    edges_of,
    observed,
    reads,
    shop,
)

SHOP_EDGES = {
    (PAYMENTS, STG),
    (STG, ORDERS),
    (SEED, ORDERS),
    (RAW_ORDERS, ORDERS),
    (ORDERS, CUSTOMERS),
    (CUSTOMERS, WEEKLY),
}


def graph_of(*events: Any) -> Graph:
    of_kind = {kind: [e for e in events if type(e).__name__ == kind] for kind in KINDS}
    return build_graph("shop", "prod", of_kind["LineageDeclared"], of_kind["LineageObserved"])


KINDS = ("LineageDeclared", "LineageObserved")


# -- building ----------------------------------------------------------------------------------


def test_nodes_and_edges_are_those_that_the_events_declare() -> None:
    graph = shop()
    assert edges_of(graph) == SHOP_EDGES
    assert set(graph.nodes) == {id_ for ends in SHOP_EDGES for id_ in ends}
    orders = graph.nodes[ORDERS]
    assert (orders.namespace, orders.dataset) == (NAMESPACE, "shop.main.orders")
    assert (orders.materialized, orders.owners) == ("table", ["finance"])
    assert orders.column_lineage_status is ColumnLineageStatus.COMPLETE
    weekly = graph.nodes[WEEKLY]
    assert (weekly.resource_type, weekly.namespace, weekly.dataset) == ("exposure", None, None)


def test_the_order_of_the_events_says_nothing() -> None:
    for seed in range(5):
        events = [*SHOP_DECLARED, *SHOP_OBSERVED]
        random.Random(seed).shuffle(events)
        again = graph_of(*events)
        assert again.edges == shop().edges
        assert again.nodes == shop().nodes
        assert list(again.nodes) == list(shop().nodes)


def test_the_later_of_declared_and_observed_says_what_a_node_reads() -> None:
    sources = [declared(PAYMENTS), declared(RAW_ORDERS)]
    old, new = declared(STG, PAYMENTS), declared(STG, RAW_ORDERS, at_s=20)
    seen = observed(STG, PAYMENTS, fields={"id": [column(PAYMENTS, "id")]})

    assert edges_of(graph_of(*sources, old, seen)) == {(PAYMENTS, STG)}
    changed = graph_of(*sources, new, seen)
    assert edges_of(changed) == {(RAW_ORDERS, STG)}
    # What the manifest cannot know is still what the last build said.
    assert changed.columns[STG].fields is not None


def test_of_several_events_of_a_node_the_last_one_counts() -> None:
    graph = graph_of(declared(STG, RAW_ORDERS, at_s=9), declared(STG, PAYMENTS, at_s=3))
    assert edges_of(graph) == {(RAW_ORDERS, STG)}


def test_an_ephemeral_model_is_no_node_until_it_is_asked_for() -> None:
    graph = shop()
    assert BASE not in graph.nodes
    (edge,) = [edge for edge in graph.edges if edge.upstream == RAW_ORDERS]
    assert edge.via_ephemeral == [BASE]

    view = around(graph, "base_orders", down=1)
    assert view.focus == BASE
    assert edges_of(view.graph) == {(RAW_ORDERS, BASE), (BASE, ORDERS)}


def test_what_another_project_makes_is_a_node_by_its_dataset() -> None:
    kafka = LineageInput(namespace="kafka://broker", name="payments", origin="meta")
    graph = graph_of(declared(STG, kafka))
    assert edges_of(graph) == {("kafka://broker/payments", STG)}
    node = graph.nodes["kafka://broker/payments"]
    assert (node.resource_type, node.unique_id, node.dataset) == ("dataset", None, "payments")
    assert find_node(graph, "kafka://broker/payments") == node.id
    assert find_node(graph, "payments") == node.id


def test_a_dataset_that_a_node_makes_is_that_node_also_by_another_name() -> None:
    """A source on the table of a model of the same project, or meta.dbtstream.upstream."""
    by_name = LineageInput(namespace=NAMESPACE, name="shop.main.orders", origin="meta")
    same = declared(PAYMENTS, outputs=declared(ORDERS).outputs)
    graph = graph_of(same, declared(ORDERS), declared(CUSTOMERS, by_name))
    assert edges_of(graph) == {(ORDERS, CUSTOMERS)}


def test_a_parent_whose_own_event_is_missing_is_there_all_the_same() -> None:
    graph = graph_of(declared(STG, PAYMENTS))
    parent = graph.nodes[PAYMENTS]
    assert (parent.resource_type, parent.name, parent.declared_at) == ("source", "payments", None)


def test_columns_are_those_of_the_last_build_and_unknown_ones_say_why() -> None:
    failed = observed(
        STG,
        PAYMENTS,
        column_lineage_status=ColumnLineageStatus.ERROR,
        column_lineage_message="line 3: unexpected token",
    )
    graph = graph_of(declared(STG, PAYMENTS), failed, declared(ORDERS, STG))
    assert graph.columns[STG].fields is None
    assert graph.columns[STG].message == "line 3: unexpected token"
    assert graph.columns[ORDERS].status is ColumnLineageStatus.NOT_COMPILED


# -- finding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (ORDERS, ORDERS),
        ("stg_payments", STG),
        ("shop.main.orders", ORDERS),
        (f"{NAMESPACE}/shop.main.orders", ORDERS),
        ("main.orders", ORDERS),
        ("raw.payments", PAYMENTS),
        ("weekly", WEEKLY),
        ("base_orders", BASE),
    ],
)
def test_a_node_is_found_by_id_name_dataset_or_the_end_of_one(text: str, found: str) -> None:
    assert find_node(shop(), text) == found


def test_a_name_of_several_nodes_is_an_error_that_lists_them() -> None:
    """raw.orders is called orders, as the model is."""
    with pytest.raises(AmbiguousNode, match=f"'orders' may be any of 2: {ORDERS}, {RAW_ORDERS}"):
        find_node(shop(), "orders")


def test_an_unknown_name_is_an_error_that_says_what_is_like_it() -> None:
    with pytest.raises(NodeNotFound, match=f"shop/prod; did you mean {STG}"):
        find_node(shop(), "stg_payment")
    with pytest.raises(NodeNotFound, match=r"'zzz' in the lineage of shop/prod$"):
        find_node(shop(), "zzz")


# -- cutting -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ({}, set(shop().nodes)),
        ({"up": 0}, {ORDERS, CUSTOMERS, WEEKLY}),
        ({"up": 0, "down": 1}, {ORDERS, CUSTOMERS}),
        ({"up": 1, "down": 0}, {ORDERS, STG, SEED, RAW_ORDERS}),
        ({"up": 2, "down": 0}, {ORDERS, STG, SEED, RAW_ORDERS, PAYMENTS}),
        ({"up": 0, "down": 0}, {ORDERS}),
    ],
)
def test_a_view_holds_what_is_so_many_steps_away(steps: dict[str, Any], expected: set[str]) -> None:
    view = around(shop(), ORDERS, **steps)
    assert set(view.graph.nodes) == expected
    assert edges_of(view.graph) == {e for e in SHOP_EDGES if set(e) <= expected}


def test_a_cycle_ends_the_walk_and_not_the_command() -> None:
    graph = graph_of(declared(STG, CUSTOMERS), declared(ORDERS, STG), declared(CUSTOMERS, ORDERS))
    assert set(around(graph, ORDERS).graph.nodes) == {STG, ORDERS, CUSTOMERS}
    itself = graph_of(declared(ORDERS, ORDERS))
    assert set(around(itself, ORDERS).graph.nodes) == {ORDERS}


@given(st.dictionaries(st.integers(0, 8), st.lists(st.integers(0, 8))), st.integers(0, 10))
def test_each_step_adds_the_neighbours_of_the_last(near: dict[int, list[int]], steps: int) -> None:
    def neighbours(of: int) -> list[int]:
        return near.get(of, [])

    found = reached(0, neighbours, steps)
    last = reached(0, neighbours, steps - 1) if steps else set()
    assert found == ({0} | last | {n for of in last for n in neighbours(of)})


def test_a_long_chain_is_walked_to_its_end() -> None:
    assert len(around(chain(3000), "m0").graph.nodes) == 3000


# -- columns -----------------------------------------------------------------------------------


def traced(text: str, **steps: int) -> tuple[set[str], dict[str, list[str]]]:
    """The nodes of the trace; each of its columns with what it is made from."""
    view = around(shop(), text, columns=True, **steps)
    made = {
        f"{of.node.rpartition('.')[2]}.{name}": [f"{s.node}.{s.field}" for s in sources]
        for of in view.graph.columns.values()
        for name, sources in (of.fields or {}).items()
    }
    return set(view.graph.nodes), made


def test_a_column_is_traced_both_ways() -> None:
    nodes, made = traced("model.shop.orders.amount")
    assert nodes == {PAYMENTS, STG, ORDERS, CUSTOMERS}
    assert made == {
        "stg_payments.amount": [f"{PAYMENTS}.cents"],
        "orders.amount": [f"{STG}.amount"],
        "customers.Lifetime": [f"{ORDERS}.AMOUNT"],
    }


def test_a_trace_goes_so_many_steps() -> None:
    nodes, made = traced("main.orders.amount", up=1, down=0)
    assert nodes == {STG, ORDERS}
    assert made == {"stg_payments.amount": [], "orders.amount": [f"{STG}.amount"]}


def test_a_source_column_is_known_by_its_readers() -> None:
    assert traced("raw.payments.CENTS", up=0)[0] == {PAYMENTS, STG, ORDERS, CUSTOMERS}


def test_a_constant_comes_from_nowhere() -> None:
    assert traced("main.orders.loaded_by") == ({ORDERS}, {"orders.loaded_by": []})


def test_an_unknown_column_is_an_error_that_says_which_there_are() -> None:
    with pytest.raises(ColumnNotFound, match=r"'amuont'.* it has order_id, amount, loaded_by"):
        around(shop(), "main.orders.amuont", columns=True)
    with pytest.raises(ColumnNotFound, match="none of its columns is known"):
        around(shop(), "raw_customers.id", columns=True)
    with pytest.raises(AmbiguousNode):
        around(shop(), "orders.amount", columns=True)
    with pytest.raises(NodeNotFound):
        around(shop(), "main.orders.amount")


def test_a_column_that_is_made_from_itself_is_traced_once() -> None:
    """An incremental model that reads what it made before."""
    graph = graph_of(
        declared(ORDERS, ORDERS, reads(STG)),
        observed(ORDERS, ORDERS, fields={"n": [column(ORDERS, "n"), column(STG, "n")]}),
    )
    view = around(graph, "main.orders.n", columns=True)
    assert set(view.graph.nodes) == {ORDERS, STG}
