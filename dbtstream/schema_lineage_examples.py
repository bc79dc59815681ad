"""The lineage and the assets of the examples' run, told in the order in which they happen. Pure.

Part of `schema_examples`; the run is that of `schema_story`. `orders` is made of `stg_orders` and,
through an ephemeral model, of `stg_payments`; a dashboard reads it.
"""

from typing import Any

import msgspec

from dbtstream import lineage_events as lineage
from dbtstream.event_base import ErrorBlock, FreshnessBlock
from dbtstream.schema_story import INVOCATION_ID, MANIFEST_HASH, ORDERS, ORDERS_TEST, at, envelope
from dbtstream.statuses import ColumnLineageStatus, NodeStatus, Reason

_DATABASE = "duckdb:///srv/shop/shop.duckdb"
_YESTERDAY = "e1b7c0f4-2d0f-4f0a-8f27-9d1a5c3b7a10"
_SQL_HASH = "b00a3d3c5b1f5b4bd6f0e9f5a0c5b8f4c1a1c9bb0a6a4e7b8e0f65c9f2b1d7aa"
_DECLARED_HASH = "3f0f6f3a86f7e9f3b5a2f1c0d9e8a7b6c5d4e3f2a1b0c9d8e7f6a5b4c3d2e1f0"
_OBSERVED_HASH = "8d2b0c3e5f61a7948e0d1c2b3a49586776859403a2b1c0dfeeddccbbaa998877"

_BOARD = lineage.ExposureRef(
    unique_id="exposure.shop.weekly_board",
    name="weekly_board",
    type="dashboard",
    url="https://bi.example.com/weekly",
    maturity="high",
    owners=["grace@example.com"],
)

_INPUTS = [
    lineage.LineageInput(
        namespace=_DATABASE,
        name="shop.main.stg_orders",
        unique_id="model.shop.stg_orders",
        resource_type="model",
        relation_name='"shop"."main"."stg_orders"',
    ),
    lineage.LineageInput(
        namespace=_DATABASE,
        name="shop.main.stg_payments",
        unique_id="model.shop.stg_payments",
        resource_type="model",
        relation_name='"shop"."main"."stg_payments"',
        via_ephemeral=["model.shop.paid_orders"],
    ),
]
_OUTPUTS = [
    lineage.LineageOutput(
        namespace=_DATABASE,
        name="shop.main.orders",
        unique_id="model.shop.orders",
        relation_name='"shop"."main"."orders"',
    )
]
_NODE: dict[str, Any] = {
    "unique_id": "model.shop.orders",
    "resource_type": "model",
    "name": "orders",
    "package_name": "shop",
}


def _read(table: str, field: str, kind: str, subtype: str) -> lineage.FieldInput:
    return lineage.FieldInput(
        namespace=_DATABASE,
        name=f"shop.main.{table}",
        field=field,
        unique_id=f"model.shop.{table}",
        transformations=[lineage.FieldTransformation(type=kind, subtype=subtype)],
    )


_CHANGED = lineage.LineageChanged(
    **envelope(4, 3.1),
    manifest_hash=MANIFEST_HASH,
    previous_manifest_hash="41b09e6bd3c7a2f8",
    nodes_added=["model.shop.stg_payments"],
    nodes_changed=[lineage.NodeChange(unique_id="model.shop.orders", what=["code", "inputs"])],
    edges_added=[
        lineage.Edge(upstream="source.shop.raw.payments", downstream="model.shop.stg_payments"),
        lineage.Edge(upstream="model.shop.stg_payments", downstream="model.shop.orders"),
    ],
    columns_changed=[
        lineage.ColumnChange(
            unique_id="model.shop.orders", column="paid", change="added", after="decimal(12,2)"
        )
    ],
    owners_changed=[
        lineage.OwnersChange(
            unique_id="model.shop.orders",
            before=["Finance"],
            after=["ada@example.com", "Finance"],
        )
    ],
    contracts_changed=[
        lineage.ContractChange(unique_id="model.shop.orders", before=False, after=True)
    ],
    counts={
        "nodes_added": 1,
        "nodes_changed": 1,
        "edges_added": 2,
        "columns_changed": 1,
        "owners_changed": 1,
        "contracts_changed": 1,
    },
)

_DECLARED = lineage.LineageDeclared(
    **envelope(5, 3.1),
    **_NODE,
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    column_lineage_status=ColumnLineageStatus.NOT_COMPILED,
    lineage_hash=_DECLARED_HASH,
    exposures=[_BOARD],
    owners=ORDERS.owners,
    group=ORDERS.group,
    materialized=ORDERS.materialized,
    checksum=ORDERS.checksum,
    columns=[
        lineage.Column(name="order_id", type="bigint", description="Key of the shop's till"),
        lineage.Column(name="customer_id", type="bigint"),
        lineage.Column(name="paid", type="decimal(12,2)", tags=["money"]),
    ],
    contract_enforced=True,
)

_OBSERVED = lineage.LineageObserved(
    **envelope(9, 4.31),
    **_NODE,
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    fields={
        "order_id": lineage.FieldLineage(
            inputs=[_read("stg_orders", "order_id", "DIRECT", "IDENTITY")]
        ),
        "customer_id": lineage.FieldLineage(
            inputs=[_read("stg_orders", "customer_id", "DIRECT", "IDENTITY")]
        ),
        "paid": lineage.FieldLineage(
            inputs=[_read("stg_payments", "amount_cents", "DIRECT", "AGGREGATION")]
        ),
        "loaded_by": lineage.FieldLineage(),
    },
    dataset_inputs=[
        _read("stg_orders", "order_id", "INDIRECT", "JOIN"),
        _read("stg_payments", "order_id", "INDIRECT", "JOIN"),
        _read("stg_payments", "order_id", "INDIRECT", "GROUP_BY"),
        _read("stg_orders", "status", "INDIRECT", "FILTER"),
    ],
    column_lineage_status=ColumnLineageStatus.COMPLETE,
    parser="sqlglot/30.30.0",
    schema_source="inferred",
    lineage_hash=_OBSERVED_HASH,
    compiled_code_hash=_SQL_HASH,
    exposures=[_BOARD],
)

_ASSET: dict[str, Any] = {
    **_NODE,
    "key": "shop.main.orders",
    "identity": lineage.Identity(
        namespace=_DATABASE,
        name="shop.main.orders",
        database="shop",
        schema="main",
        identifier="orders",
        relation_name='"shop"."main"."orders"',
        relation_type="table",
    ),
    "owners": ORDERS.owners,
    "group": ORDERS.group,
    "tags": ORDERS.tags,
    "meta": ORDERS.meta,
    "description": "One row per order, with what was paid for it",
    "matches": ORDERS.matches,
    "asset_labels": {"domain": "sales"},
}

_MATERIALIZED = lineage.AssetMaterialized(
    **envelope(8, 4.3),
    **_ASSET,
    previous_status="success",
    status=NodeStatus.SUCCESS,
    materialized="table",
    lifecycle="OVERWRITE",
    started_at=at(3.15),
    finished_at=at(4.27),
    execute_s=1.07,
    columns=[
        lineage.Column(name="order_id", type="BIGINT", description="Key of the shop's till"),
        lineage.Column(name="customer_id", type="BIGINT"),
        lineage.Column(name="paid", type="DECIMAL(12,2)", tags=["money"]),
        lineage.Column(name="loaded_by", type="VARCHAR"),
    ],
    columns_source="adapter",
    schema_hash="6c0e4a1f9b27d385",
    schema_change=lineage.SchemaChange(
        added=["paid"],
        removed=["paid_eur"],
        retyped=[lineage.Retyped(name="customer_id", before="INTEGER", after="BIGINT")],
    ),
    contract_enforced=True,
    dataset_version=INVOCATION_ID,
    input_versions=[
        lineage.InputVersion(
            namespace=_DATABASE,
            name="shop.main.stg_orders",
            unique_id="model.shop.stg_orders",
            dataset_version=_YESTERDAY,
            materialized_at=at(-86_390),
        ),
        lineage.InputVersion(
            namespace=_DATABASE,
            name="shop.main.stg_payments",
            unique_id="model.shop.stg_payments",
        ),
    ],
    rows_affected=12_408,
    lineage_hash=_OBSERVED_HASH,
    compiled_code_hash=_SQL_HASH,
)

_CHECK = lineage.CheckBlock(
    unique_id=ORDERS_TEST,
    name="not_null_orders_customer_id",
    kind="test",
    assertion="not_null",
    status="fail",
    dbt_status="fail",
    severity="ERROR",
    failures=2,
    warn_if="!= 0",
    error_if="!= 0",
    fail_calc="count(*)",
    columns=["customer_id"],
    params={"column_name": "customer_id"},
    message="Got 2 results, configured to fail if != 0",
)

_CHECKED = lineage.AssetChecked(
    **envelope(11, 4.8),
    **_ASSET,
    previous_status="pass",
    check=_CHECK,
    dataset_version=INVOCATION_ID,
)

_RECOVERED = lineage.AssetChecked(
    **envelope(11, 4.8),
    **_ASSET,
    previous_status="fail",
    check=lineage.CheckBlock(
        unique_id="test.shop.relationships_orders_customer_id.7d1e9a4c02",
        name="relationships_orders_customer_id",
        kind="test",
        assertion="relationships",
        status="pass",
        dbt_status="pass",
        severity="ERROR",
        failures=0,
        warn_if="!= 0",
        error_if="!= 0",
        fail_calc="count(*)",
        columns=["customer_id"],
        params={"column_name": "customer_id", "to": "ref('stg_customers')", "field": "id"},
        other_datasets=[
            lineage.OtherDataset(
                namespace=_DATABASE,
                name="shop.main.stg_customers",
                unique_id="model.shop.stg_customers",
                column="id",
            )
        ],
    ),
    dataset_version=INVOCATION_ID,
)

_STALE = lineage.AssetObserved(
    **envelope(5, 3.4),
    unique_id="source.shop.raw.payments",
    resource_type="source",
    name="payments",
    package_name="shop",
    key="shop.raw.payments_v2",
    identity=lineage.Identity(
        namespace=_DATABASE,
        name="shop.raw.payments_v2",
        database="shop",
        schema="raw",
        identifier="payments_v2",
        relation_name='"shop"."raw"."payments_v2"',
    ),
    owners=["loaders@example.com"],
    previous_status="pass",
    status="error",
    freshness=FreshnessBlock(
        max_loaded_at=at(-187_200),
        snapshotted_at=at(3.3),
        age_s=187_203.3,
        warn_after_s=43_200.0,
        error_after_s=86_400.0,
    ),
)

_FAILED = lineage.AssetFailed(
    **envelope(8, 4.3),
    **_ASSET,
    previous_status="success",
    status=NodeStatus.ERROR,
    error=ErrorBlock(
        class_="DbtDatabaseError",
        message='Catalog Error: Table with name "stg_payments" does not exist!',
    ),
    message='Catalog Error: Table with name "stg_payments" does not exist!',
    started_at=at(3.15),
    finished_at=at(4.27),
    dataset_version=_YESTERDAY,
)

_SKIPPED = lineage.AssetSkipped(
    **envelope(13, 4.9),
    unique_id="model.shop.daily_revenue",
    resource_type="model",
    name="daily_revenue",
    package_name="shop",
    key="shop.main.daily_revenue",
    identity=lineage.Identity(
        namespace=_DATABASE,
        name="shop.main.daily_revenue",
        database="shop",
        schema="main",
        identifier="daily_revenue",
        relation_name='"shop"."main"."daily_revenue"',
        relation_type="view",
    ),
    previous_status="success",
    status=NodeStatus.SKIPPED,
    reason=Reason.UPSTREAM_FAILED,
    causes=[lineage.SkipCause(unique_id=ORDERS_TEST, status=NodeStatus.FAIL)],
    dataset_version=_YESTERDAY,
)

LINEAGE_EXAMPLES: dict[str, msgspec.Struct] = {
    "event.lineage.changed": _CHANGED,
    "event.lineage.declared": _DECLARED,
    "event.lineage.observed": _OBSERVED,
    "event.asset.materialized": _MATERIALIZED,
    "event.asset.checked": _CHECKED,
    "event.asset.checked.recovered": _RECOVERED,
    "event.asset.observed": _STALE,
    "event.asset.failed": _FAILED,
    "event.asset.skipped": _SKIPPED,
}
