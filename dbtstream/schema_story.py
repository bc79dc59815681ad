"""The run that the examples of the contract tell of: its ids, its clock, its nodes. Pure.

`schema_examples` and `schema_lineage_examples` tell it. A loader of the project `shop` asks for
`orders` and what follows it; the model is built, a test of it says no, and what is behind that
test is skipped. What cannot happen in that run as well (it is refused, cancelled, loses log
lines, has a model fail) has the numbers of a run like it.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

from dbtstream import events

RUN_ID = "019b2f3c-8a10-7c4e-9f21-5b0d6c7e8f90"
REQUEST_ID = "orders-load-2025-12-18T06"
ARGS = ["build", "--select", "orders+"]
LABELS = {"loader": "shop-orders"}
WORKER = "dbt-worker-1"
INVOCATION_ID = "5c1f7f0e-4a5e-4f6e-9c47-3f2d0a9b8e11"
MANIFEST_HASH = "9d3c1f0be9d24d1c"
_ENGINE = "dbt-core 1.11.16"
_T0 = datetime(2025, 12, 18, 6, 0, 0, 120_400, tzinfo=UTC)

ORDERS_TEST = "test.shop.not_null_orders_customer_id.c5b3f0a1d2"

ORDERS = events.NodeBlock(
    unique_id="model.shop.orders",
    resource_type="model",
    name="orders",
    package_name="shop",
    materialized="table",
    path="models/marts/orders.sql",
    fqn=["shop", "marts", "orders"],
    tags=["core"],
    group="finance",
    access="protected",
    owners=["ada@example.com", "Finance"],
    meta={"tier": 1},
    checksum="0015e2659122d13c4e2953d1650aa71324feec9471457457638b5421eeff36e0",
    matches=["critical", "marts"],
    upstream=["model.shop.stg_orders", "model.shop.paid_orders"],
)


def at(seconds: float) -> datetime:
    """So long after the run was asked for."""
    return _T0 + timedelta(seconds=seconds)


def envelope(seq: int, seconds: float, *, said_hello: bool = True) -> dict[str, Any]:
    """The fields that every event has; some are not known until dbt's process said hello."""
    return {
        "event_id": f"{RUN_ID}.1.{seq}",
        "time": at(seconds),
        "seq": seq,
        "project": "shop",
        "target": "prod",
        "run_id": RUN_ID,
        "attempt": 1,
        "fence": 0,
        "worker": WORKER,
        "invocation_id": INVOCATION_ID if said_hello else None,
        "engine": _ENGINE if said_hello else None,
        "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
        "span_id": f"{0x00F067AA0BA90200 + seq:016x}",
        "labels": LABELS,
    }
