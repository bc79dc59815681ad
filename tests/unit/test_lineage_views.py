"""Pictures of lineage: everything is in them, and no name can break out of one.

Mermaid's and Graphviz's own parsers are not here: what labels may hold was compared with them
(mermaid 11, Graphviz 14), and these tests hold the text to it.
"""

import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbtstream.lineage_drawings import dot_lines, mermaid_lines
from dbtstream.lineage_events import LineageInput
from dbtstream.lineage_find import View, around, whole
from dbtstream.lineage_graph import Graph, build_graph
from dbtstream.lineage_views import json_text, tree_lines
from dbtstream.statuses import ColumnLineageStatus
from tests.lineage_graphs import (
    CUSTOMERS,
    NAMESPACE,
    ORDERS,
    PAYMENTS,
    SEED,
    STG,
    chain,
    column,
    declared,
    observed,
    reads,
    renamed,
    shop,
)


def text(lines: list[str]) -> str:
    return "\n" + "\n".join(lines) + "\n"


def odd(name: str) -> Graph:
    """A graph that has `name` as id, dataset, column, note and message."""
    model = f"model.shop.{name}"
    return build_graph(
        "shop",
        "prod",
        [
            declared(PAYMENTS),
            declared(
                model,
                LineageInput(namespace="kafka", name=name, origin="meta"),
                reads(PAYMENTS, via_ephemeral=[model]),
            ),
        ],
        [
            observed(
                model,
                reads(PAYMENTS, via_ephemeral=[model]),
                at_s=-1,
                fields={name: [column(PAYMENTS, name)]},
                column_lineage_status=ColumnLineageStatus.PARTIAL,
                column_lineage_message=name,
            )
        ],
    )


# -- tree --------------------------------------------------------------------------------------


def test_the_whole_graph_is_a_tree_from_what_nothing_feeds() -> None:
    assert (
        text(tree_lines(whole(shop())))
        == """
seed raw_customers  shop.main.raw_customers
└─ model orders (table)  shop.main.orders  columns complete
   └─ model customers (incremental)  shop.main.customers  columns complete
      └─ exposure weekly
source raw.orders  shop.raw.orders
└─ model orders (table)  shop.main.orders  columns complete  [via base_orders]  (above)
source raw.payments  shop.raw.payments
└─ model stg_payments (view)  shop.main.stg_payments  columns complete
   └─ model orders (table)  shop.main.orders  columns complete  (above)
"""
    )


def test_a_node_is_shown_with_both_sides_and_its_columns() -> None:
    assert (
        text(tree_lines(around(shop(), ORDERS, up=1, columns=True)))
        == """
model orders (table)  shop.main.orders  columns complete
  · order_id ← raw.orders.id
  · amount ← stg_payments.amount (aggregation)
  · loaded_by ← no column
  · rows ← stg_payments.order_id (join)
upstream
├─ model stg_payments (view)  shop.main.stg_payments  columns complete
│     · order_id ← raw.payments.order_id
│     · amount ← raw.payments.cents (transformation)
├─ seed raw_customers  shop.main.raw_customers
└─ source raw.orders  shop.raw.orders  [via base_orders]
downstream
└─ model customers (incremental)  shop.main.customers  columns complete
   │  · Lifetime ← orders.AMOUNT (aggregation)
   └─ exposure weekly
"""
    )


def test_a_column_is_shown_with_what_it_is_made_from_and_what_is_made_from_it() -> None:
    assert (
        text(tree_lines(around(shop(), "main.orders.amount", columns=True)))
        == """
orders.amount
upstream
└─ stg_payments.amount  [aggregation]
   └─ raw.payments.cents  [transformation]
downstream
└─ customers.Lifetime  [aggregation]
"""
    )


def test_columns_that_are_not_known_say_why() -> None:
    failed = observed(
        STG,
        PAYMENTS,
        column_lineage_status=ColumnLineageStatus.ERROR,
        column_lineage_message="line 3: unexpected token",
    )
    graph = build_graph("shop", "prod", [declared(STG, PAYMENTS)], [failed])
    lines = tree_lines(around(graph, STG, up=0, down=0, columns=True))
    assert lines == [
        "model stg_payments  shop.main.stg_payments  columns error",
        "  · line 3: unexpected token",
    ]


def test_columns_of_what_no_sql_makes_are_just_named() -> None:
    graph = build_graph("shop", "prod", [declared(SEED)], [observed(SEED, fields={"id": []})])
    assert tree_lines(whole(graph, columns=True)) == [
        "seed raw_customers  shop.main.raw_customers",
        "  · id",
    ]


def test_edges_of_meta_and_deferred_ones_are_marked() -> None:
    graph = build_graph(
        "shop",
        "prod",
        [
            declared(PAYMENTS),
            declared(
                STG,
                reads(PAYMENTS, deferred=True),
                LineageInput(namespace="kafka", name="payments", origin="meta"),
            ),
        ],
        [],
    )
    assert (
        text(tree_lines(around(graph, STG, down=0)))
        == """
model stg_payments  shop.main.stg_payments  columns not compiled
upstream
├─ dataset kafka/payments  [by meta]
└─ source raw.payments  shop.raw.payments  [deferred]
"""
    )
    assert "-.->" in text(mermaid_lines(whole(graph)))
    assert "style=dashed" in text(dot_lines(whole(graph)))


def test_two_nodes_of_one_name_are_told_apart() -> None:
    graph = build_graph("shop", "prod", [declared("model.a.x"), declared("model.b.x")], [])
    assert [line.split("  ")[0] for line in tree_lines(whole(graph))] == [
        "model model.a.x",
        "model model.b.x",
    ]


def test_a_circle_is_shown_once() -> None:
    events = [declared(STG, CUSTOMERS), declared(ORDERS, STG), declared(CUSTOMERS, ORDERS)]
    graph = build_graph("shop", "prod", events, [])
    for view in (whole(graph), around(graph, ORDERS)):
        lines = tree_lines(view)
        assert len(lines) < 12
        assert {STG, ORDERS, CUSTOMERS} == set(view.graph.nodes)
        assert "(above)" in text(lines)


def test_an_empty_graph_is_nothing_and_still_a_drawing() -> None:
    graph = build_graph("shop", "prod", [], [])
    assert tree_lines(whole(graph)) == []
    assert mermaid_lines(whole(graph)) == ["flowchart LR"]
    assert dot_lines(whole(graph))[-1] == "}"


def test_a_long_chain_and_a_thick_net_are_printed_in_time() -> None:
    """A chain is deeper than Python recurses; a net has more paths than one could print."""
    assert len(tree_lines(whole(chain(2000)))) == 2000
    layers = [[f"model.shop.l{layer}_{n}" for n in range(10)] for layer in range(20)]
    events = [declared(id_) for id_ in layers[0]]
    for above, below in itertools.pairwise(layers):
        events += (declared(id_, *above) for id_ in below)
    graph = build_graph("shop", "prod", events, [])
    assert len(tree_lines(whole(graph))) == 10 + len(graph.edges)


# -- JSON --------------------------------------------------------------------------------------


def test_json_has_nodes_edges_and_columns_where_they_are_asked_for() -> None:
    document = json.loads(json_text(whole(shop())))
    assert sorted(document) == ["columns", "edges", "focus", "nodes", "project", "target"]
    assert (document["project"], document["target"]) == ("shop", "prod")
    assert document["focus"] is None
    assert document["columns"] is None
    assert len(document["nodes"]) == 7
    assert {
        "upstream": STG,
        "downstream": ORDERS,
        "via_ephemeral": [],
        "deferred": False,
        "origin": "manifest",
    } in document["edges"]
    (orders,) = [node for node in document["nodes"] if node["id"] == ORDERS]
    assert orders["namespace"] == NAMESPACE

    document = json.loads(json_text(around(shop(), "main.orders.amount", columns=True)))
    assert document["focus"] == {"node": ORDERS, "column": "amount"}
    columns = {of["node"]: of["fields"] for of in document["columns"]}
    assert list(columns[ORDERS]) == ["amount"]
    assert columns[PAYMENTS] is None


# -- drawings ----------------------------------------------------------------------------------


def test_mermaid_has_a_box_for_each_node_and_an_arrow_for_each_edge() -> None:
    lines = mermaid_lines(whole(shop()))
    assert lines[0] == "flowchart LR"
    assert '  n2["model orders<br/>shop.main.orders"]' in lines
    assert '  n0(["exposure weekly"])' in lines
    assert '  n5[("source raw.orders<br/>shop.raw.orders")]' in lines
    assert '  n5 -->|"via base_orders"| n2' in lines
    assert sum(" --> " in line or "-->|" in line for line in lines) == 6


def test_columns_are_boxes_in_the_box_of_their_node() -> None:
    view = around(shop(), "main.orders.amount", columns=True)
    assert (
        text(mermaid_lines(view))
        == """
flowchart LR
  subgraph n0["model customers<br/>shop.main.customers"]
    n0c0["Lifetime"]
  end
  subgraph n1["model orders<br/>shop.main.orders"]
    n1c0["amount"]
  end
  subgraph n2["model stg_payments<br/>shop.main.stg_payments"]
    n2c0["amount"]
  end
  subgraph n3["source raw.payments<br/>shop.raw.payments"]
    n3c0["cents"]
  end
  n1c0 -->|"aggregation"| n0c0
  n2c0 -->|"aggregation"| n1c0
  n3c0 -->|"transformation"| n2c0
"""
    )
    dot = dot_lines(view)
    assert '    n1c0 [label="amount"];' in dot
    assert '  n2c0 -> n1c0 [label="aggregation"];' in dot


def test_a_node_whose_columns_are_not_known_keeps_its_arrow() -> None:
    lines = mermaid_lines(whole(shop(), columns=True))
    assert "  n4 --> n2" in lines  # the seed, none of whose columns is read


HOSTILE = [
    'a"b',
    "`md`",
    "x\ny",
    "back\\slash\\",
    "\\",
    'style:"x',
    "#35;",
    '"]; click n0 "http://x"',
    '"; a -> b; "',
    "<b>&amp;</b>",
    "end",
    "%%{init: {}}%%",
    "\x1b[31mred\x00\x07",
    "\u202etxt.exe",
    "é·漢字😀",
    "x" * 200,
    "a.b.c",
    " ",
]
NAMES = st.text(min_size=1, max_size=40) | st.sampled_from(HOSTILE)

_MERMAID_LABEL = r'"(?:[\w .\-]|#\d+;|<br/>)*"'
_MERMAID_LINE = re.compile(
    rf"flowchart LR|  subgraph n\d+\[{_MERMAID_LABEL}\]|  end|"
    rf" +n\d+(c\d+)?(\[{_MERMAID_LABEL}\]|\[\({_MERMAID_LABEL}\)\]|\(\[{_MERMAID_LABEL}\]\))|"
    rf"  n\d+(c\d+)? (-->|-\.->)(\|{_MERMAID_LABEL}\|)? n\d+(c\d+)?"
)
_DOT_LABEL = r'label="(?:[^"\\]|\\["\\n])*"'
_DOT_LINE = re.compile(
    r"digraph lineage \{|  rankdir=LR;|  node \[shape=box\];| *\}|  subgraph cluster_n\d+ \{|"
    rf" +n\d+(c\d+)? \[{_DOT_LABEL}(, shape=\w+)?\];|"
    rf"  n\d+(c\d+)? -> n\d+(c\d+)?( \[({_DOT_LABEL})?(, )?(style=dashed)?\])?;"
)


def views(name: str) -> list[View]:
    graph = odd(name)
    return [whole(graph), whole(graph, columns=True), whole(renamed(shop(), name), columns=True)]


@given(NAMES)
def test_no_name_breaks_out_of_its_place_in_mermaid(name: str) -> None:
    for view in views(name):
        for line in mermaid_lines(view):
            assert _MERMAID_LINE.fullmatch(line), line


@given(NAMES)
def test_no_name_breaks_out_of_its_place_in_dot(name: str) -> None:
    for view in views(name):
        for line in dot_lines(view):
            assert _DOT_LINE.fullmatch(line), line


@given(NAMES)
def test_no_name_reaches_the_terminal_as_a_control_character(name: str) -> None:
    for view in views(name):
        for line in tree_lines(view):
            assert line.isprintable(), ascii(line)


@pytest.mark.parametrize("name", HOSTILE)
def test_json_keeps_every_name_as_it_is(name: str) -> None:
    document = json.loads(json_text(whole(odd(name), columns=True)))
    (model,) = [node for node in document["nodes"] if node["resource_type"] == "model"]
    assert model["id"] == f"model.shop.{name}"
    (of,) = [of for of in document["columns"] if of["node"] == model["id"]]
    assert list(of["fields"]) == [name]


def test_a_name_can_still_be_read_in_a_drawing() -> None:
    graph = renamed(shop(), 'a "b" & \\c')
    assert '  n4["seed raw_customers<br/>a #34;b#34; #38; #92;c"]' in mermaid_lines(whole(graph))
    assert '  n4 [label="seed raw_customers\\na \\"b\\" &amp; \\\\c"];' in dot_lines(whole(graph))
