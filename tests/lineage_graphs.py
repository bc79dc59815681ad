"""Lineage events of an invented project, for tests of the graph and of the command that shows it.

source raw.payments ─► stg_payments ─┐
seed raw_customers ──────────────────┼─► orders ─► customers ─► exposure weekly
source raw.orders ─► (ephemeral base_orders) ─┘
"""

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from dbtstream.lineage_events import (
    FieldInput,
    FieldLineage,
    FieldTransformation,
    LineageDeclared,
    LineageInput,
    LineageObserved,
    LineageOutput,
)
from dbtstream.lineage_graph import Graph, build_graph
from dbtstream.statuses import ColumnLineageStatus

AT = datetime(2025, 3, 1, 12, tzinfo=UTC)
NAMESPACE = "duckdb:///srv/shop.duckdb"

PAYMENTS = "source.shop.raw.payments"
RAW_ORDERS = "source.shop.raw.orders"
SEED = "seed.shop.raw_customers"
STG = "model.shop.stg_payments"
BASE = "model.shop.base_orders"
ORDERS = "model.shop.orders"
CUSTOMERS = "model.shop.customers"
WEEKLY = "exposure.shop.weekly"


def name_of(unique_id: str) -> str:
    return unique_id.rpartition(".")[2]


def dataset_of(unique_id: str) -> str:
    schema = "raw" if unique_id.startswith("source.") else "main"
    return f"shop.{schema}.{name_of(unique_id)}"


def reads(unique_id: str, **more: Any) -> LineageInput:
    values = {
        "namespace": NAMESPACE,
        "name": dataset_of(unique_id),
        "unique_id": unique_id,
        "resource_type": unique_id.partition(".")[0],
        **more,
    }
    return LineageInput(**values)


def _envelope(unique_id: str, at_s: float) -> dict[str, Any]:
    makes_none = unique_id.startswith("exposure.") or unique_id == BASE
    output = LineageOutput(
        namespace=NAMESPACE, name=dataset_of(unique_id), unique_id=unique_id, relation_name='"x"'
    )
    return {
        "event_id": f"r.1.{at_s:g}",
        "time": AT + timedelta(seconds=at_s),
        "seq": 1,
        "project": "shop",
        "target": "prod",
        "run_id": "r",
        "attempt": 1,
        "fence": 1,
        "worker": "w",
        "unique_id": unique_id,
        "resource_type": unique_id.partition(".")[0],
        "name": name_of(unique_id),
        "package_name": "shop",
        "outputs": [] if makes_none else [output],
        "lineage_hash": "h",
    }


def declared(
    unique_id: str, *inputs: LineageInput | str, at_s: float = 0, **more: Any
) -> LineageDeclared:
    values = {
        **_envelope(unique_id, at_s),
        "inputs": [reads(item) if isinstance(item, str) else item for item in inputs],
        "column_lineage_status": ColumnLineageStatus.NOT_COMPILED,
        **more,
    }
    return LineageDeclared(**values)


def column(unique_id: str, field: str, how: str = "IDENTITY", kind: str = "DIRECT") -> FieldInput:
    return FieldInput(
        namespace=NAMESPACE,
        name=dataset_of(unique_id),
        field=field,
        unique_id=unique_id,
        transformations=[FieldTransformation(type=kind, subtype=how)],
    )


def observed(
    unique_id: str,
    *inputs: LineageInput | str,
    fields: dict[str, list[FieldInput]] | None = None,
    at_s: float = 10,
    **more: Any,
) -> LineageObserved:
    values = {
        **_envelope(unique_id, at_s),
        "inputs": [reads(item) if isinstance(item, str) else item for item in inputs],
        "column_lineage_status": ColumnLineageStatus.COMPLETE,
        "parser": "sqlglot/30.30.0",
        "fields": None
        if fields is None
        else {name: FieldLineage(inputs=found) for name, found in fields.items()},
        **more,
    }
    return LineageObserved(**values)


SHOP_DECLARED = [
    declared(PAYMENTS),
    declared(RAW_ORDERS),
    declared(SEED, materialized="seed"),
    declared(STG, PAYMENTS, materialized="view"),
    declared(BASE, RAW_ORDERS, materialized="ephemeral"),
    declared(
        ORDERS,
        STG,
        SEED,
        reads(RAW_ORDERS, via_ephemeral=[BASE]),
        materialized="table",
        owners=["finance"],
    ),
    declared(CUSTOMERS, ORDERS, materialized="incremental"),
    declared(WEEKLY, CUSTOMERS),
]

SHOP_OBSERVED = [
    observed(
        STG,
        PAYMENTS,
        fields={
            "order_id": [column(PAYMENTS, "order_id")],
            "amount": [column(PAYMENTS, "cents", "TRANSFORMATION")],
        },
    ),
    observed(
        ORDERS,
        STG,
        SEED,
        reads(RAW_ORDERS, via_ephemeral=[BASE]),
        fields={
            "order_id": [column(RAW_ORDERS, "id")],
            "amount": [column(STG, "amount", "AGGREGATION")],
            "loaded_by": [],
        },
        dataset_inputs=[column(STG, "order_id", "JOIN", "INDIRECT")],
    ),
    observed(
        CUSTOMERS,
        ORDERS,
        fields={"Lifetime": [column(ORDERS, "AMOUNT", "AGGREGATION")]},
    ),
]


def shop() -> Graph:
    return build_graph("shop", "prod", SHOP_DECLARED, SHOP_OBSERVED)


def edges_of(graph: Graph) -> set[tuple[str, str]]:
    return {(edge.upstream, edge.downstream) for edge in graph.edges}


def chain(length: int) -> Graph:
    ids = [f"model.shop.m{n}" for n in range(length)]
    events = [declared(id_, *ids[max(n - 1, 0) : n]) for n, id_ in enumerate(ids)]
    return build_graph("shop", "prod", events, [])


def renamed(graph: Graph, name: str) -> Graph:
    """With a dataset and a name that its node has; ids of nodes stay."""
    nodes = {
        id_: msgspec.structs.replace(node, dataset=name, name=name)
        for id_, node in graph.nodes.items()
    }
    return msgspec.structs.replace(graph, nodes=nodes)
