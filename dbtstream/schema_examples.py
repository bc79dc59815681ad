"""One realistic message of every kind, told as one run of the project `shop`. Pure.

`schema` writes them to `schemas/examples/`, and tests decode them and check them against
their schemas. They are made with the Structs, so an example cannot say what the code does
not. The run is that of `schema_story`; its lineage and assets are in `schema_lineage_examples`.
"""

from datetime import UTC, datetime

import msgspec

from dbtstream import events, messages
from dbtstream.event_base import Relation
from dbtstream.schema_lineage_examples import LINEAGE_EXAMPLES
from dbtstream.schema_story import (
    ARGS,
    INVOCATION_ID,
    LABELS,
    MANIFEST_HASH,
    ORDERS,
    ORDERS_TEST,
    REQUEST_ID,
    RUN_ID,
    WORKER,
    at,
    envelope,
)
from dbtstream.statuses import NodeStatus, Phase, Reason, RunStatus


def _phase(phase: Phase, started_s: float, finished_s: float) -> events.PhaseTiming:
    return events.PhaseTiming(phase=phase, started_at=at(started_s), finished_at=at(finished_s))


_EVENTS: list[events.AnyEvent] = [
    events.RunQueued(
        **envelope(1, 0.0, said_hello=False),
        args=ARGS,
        request_id=REQUEST_ID,
        requested_by="loader",
        reason="12 408 new rows in raw.orders",
        trace=events.TraceBlock(
            traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        ),
    ),
    events.RunLeased(
        **envelope(8, 131.0),
        cause="worker_lost",
        decision="resume",
        previous_worker="dbt-worker-2",
    ),
    events.RunRejected(
        **envelope(1, 0.0, said_hello=False),
        code=messages.RejectCode.FLAG_NOT_ALLOWED,
        message="--target: the target is the last token of the subject",
        field="args",
        request_id=REQUEST_ID,
    ),
    events.RunStarted(
        **envelope(2, 1.4),
        args=ARGS,
        dbt_version="1.11.16",
        adapter_type="duckdb",
        adapter_version="1.11.1",
        python_version="3.11.7",
        host="dbt-worker-1",
        pid=41,
        queue_wait_s=0.006,
        start="cold",
        start_s=1.38,
    ),
    events.RunPlanned(
        **envelope(3, 3.1),
        node_count=3,
        nodes=[
            events.PlanEntry(
                unique_id="model.shop.orders", resource_type="model", materialized="table"
            ),
            events.PlanEntry(
                unique_id=ORDERS_TEST, resource_type="test", depends_on=["model.shop.orders"]
            ),
            events.PlanEntry(
                unique_id="model.shop.daily_revenue",
                resource_type="model",
                materialized="view",
                depends_on=["model.shop.orders"],
            ),
        ],
        manifest_hash=MANIFEST_HASH,
    ),
    events.RunPlanPart(
        **envelope(4, 3.1),
        part=1,
        parts=3,
        nodes=[
            events.PlanEntry(
                unique_id="model.shop.orders", resource_type="model", materialized="table"
            )
        ],
    ),
    events.RunProgress(
        **envelope(8, 4.3),
        counts=events.NodeCounts(done=1, running=1, total=3, by_status={"success": 1}),
    ),
    events.RunCancel(
        **envelope(7, 4.6), step="requested", by="ada", reason="the load was incomplete"
    ),
    events.RunFinished(
        **envelope(15, 5.2),
        status=RunStatus.FAILURE,
        exit_code=1,
        command="build",
        counts={"model": {"success": 1, "skipped": 1}, "test": {"fail": 1}},
        elapsed_s=5.1,
        slowest=[events.SlowNode(unique_id="model.shop.orders", elapsed_s=1.12)],
        failed=[
            events.FailedNode(
                unique_id=ORDERS_TEST,
                status=NodeStatus.FAIL,
                message="Got 2 results, configured to fail if != 0",
            )
        ],
        failed_count=1,
        resource=events.Resource(max_rss=183_500_800, cpu_s=3.9),
        artifacts=[events.ArtifactRef(kind="run_results", path="run_results.json", size=4_812)],
        verified=True,
        verified_status="equal",
        phases=[
            _phase(Phase.QUEUE, -0.006, 0.0),
            _phase(Phase.STARTUP, 0.0, 1.5),
            _phase(Phase.PARSE, 1.5, 3.1),
            _phase(Phase.EXECUTE, 3.1, 4.9),
            _phase(Phase.FINALIZE, 4.9, 5.2),
        ],
        process=events.ProcessBlock(pid=41, started_at=at(0.0), finished_at=at(5.2), exit_code=1),
    ),
    events.NodeStarted(
        **envelope(6, 3.1), node=ORDERS, index=1, total=3, thread="Thread-1", ready_wait_s=0.02
    ),
    events.NodeFinished(
        **envelope(7, 4.3),
        node=ORDERS,
        status=NodeStatus.SUCCESS,
        dbt_status="success",
        started_at=at(3.15),
        finished_at=at(4.27),
        compile_s=0.04,
        execute_s=1.07,
        rows_affected=12_408,
        adapter_response={"_message": "OK"},
        message="OK",
        relation=Relation(
            database="shop",
            schema="main",
            identifier="orders",
            relation_name='"shop"."main"."orders"',
        ),
    ),
    events.NodeBatch(
        **envelope(5, 4.1),
        unique_id="model.shop.order_events",
        resource_type="model",
        name="order_events",
        index=2,
        total=3,
        status=NodeStatus.SUCCESS,
        execute_s=0.42,
        event_time_start=datetime(2025, 12, 17, tzinfo=UTC),
        event_time_end=datetime(2025, 12, 18, tzinfo=UTC),
    ),
    events.LogLine(
        **envelope(8, 4.9),
        level="warn",
        code="D019",
        name="UnusedTables",
        message="`stg_orders` is declared in sources and used by no model",
    ),
    events.QueryFinished(
        **envelope(8, 4.2),
        unique_id="model.shop.orders",
        elapsed_s=0.98,
        status="OK",
    ),
    events.ArtifactWritten(
        **envelope(14, 5.1),
        kind="run_results",
        path="run_results.json",
        sha256="b5bb9d8014a0f9b1d61e21e796d78dccdf1352f23cd32812f4850b878ae4944c",
        size=4_812,
    ),
    events.Gap(
        **envelope(12, 6.0),
        dropped_family="log",
        count=40,
        why="the outbox of this run is full",
        from_seq=13,
        to_seq=52,
    ),
]

_FAILED_TEST = events.NodeFinished(
    **envelope(10, 4.8),
    node=events.NodeBlock(
        unique_id=ORDERS_TEST,
        resource_type="test",
        name="not_null_orders_customer_id",
        package_name="shop",
        materialized="test",
        path="models/marts/orders.yml",
        fqn=["shop", "marts", "not_null_orders_customer_id"],
        owners=["Finance"],
        upstream=["model.shop.orders"],
    ),
    status=NodeStatus.FAIL,
    dbt_status="fail",
    started_at=at(4.31),
    finished_at=at(4.79),
    compile_s=0.02,
    execute_s=0.44,
    message="Got 2 results, configured to fail if != 0",
    failures=2,
    test=events.TestBlock(
        attached_node="model.shop.orders",
        column="customer_id",
        test_name="not_null",
        severity="ERROR",
        warn_if="!= 0",
        error_if="!= 0",
    ),
)

_SKIPPED = events.NodeFinished(
    **envelope(12, 4.9),
    node=events.NodeBlock(
        unique_id="model.shop.daily_revenue",
        resource_type="model",
        name="daily_revenue",
        package_name="shop",
        materialized="view",
        path="models/marts/daily_revenue.sql",
        fqn=["shop", "marts", "daily_revenue"],
        upstream=["model.shop.orders"],
    ),
    status=NodeStatus.SKIPPED,
    dbt_status="skipped",
    reason=Reason.UPSTREAM_FAILED,
    root_causes=[ORDERS_TEST],
)

_REQUEST = messages.RunRequest(
    args=ARGS,
    vars={"load_date": "2025-12-18"},
    request_id=REQUEST_ID,
    not_after=at(3600),
    timeout_s=900,
    labels=LABELS,
    reason="12 408 new rows in raw.orders",
    requested_by="loader",
)

_VIEW = messages.RunView(
    run_id=RUN_ID,
    project="shop",
    target="prod",
    status=RunStatus.FAILURE,
    args=ARGS,
    request_id=REQUEST_ID,
    requested_by="loader",
    reason="12 408 new rows in raw.orders",
    labels=LABELS,
    attempt=1,
    worker=WORKER,
    invocation_id=INVOCATION_ID,
    request_seq=7,
    last_seq=15,
    queued_at=at(0),
    started_at=at(1.4),
    finished_at=at(5.2),
    updated_at=at(5.2),
    exit_code=1,
    counts={"model": {"success": 1, "skipped": 1}, "test": {"fail": 1}},
)

_WORKER_STATUS = messages.WorkerStatus(
    worker=WORKER,
    version="0.1.0",
    host="etl-1",
    at=at(3.5),
    started_at=at(-86_400),
    slots=4,
    used=1,
    projects=["crm", "shop"],
    runs=[
        messages.RunAtWork(
            run_id=RUN_ID,
            project="shop",
            target="prod",
            status=RunStatus.RUNNING,
            args=ARGS,
            last_seq=6,
            queued_at=at(0),
            started_at=at(1.4),
            done=1,
            total=3,
            by_status={"success": 1},
            running=1,
            nodes=[
                messages.NodeAtWork(
                    unique_id="model.shop.daily_revenue",
                    resource_type="model",
                    name="daily_revenue",
                    started_at=at(3.1),
                )
            ],
            eta_s=3.2,
        )
    ],
)

EXAMPLES: dict[str, msgspec.Struct] = {
    "request.run": _REQUEST,
    "request.submit": messages.SubmitRequest(project="shop", target="prod", request=_REQUEST),
    "request.cancel": messages.CancelRequest(
        run_id=RUN_ID, by="ada", reason="the load was incomplete"
    ),
    "request.get": messages.GetRequest(run_id=RUN_ID),
    "request.list": messages.ListRequest(project="shop", active=True, limit=20),
    "request.worker_status": messages.WorkerStatusRequest(),
    "reply.run_accepted": messages.RunAccepted(run_id=RUN_ID, project="shop", target="prod"),
    "reply.run_rejected": messages.RunRejected(
        code=messages.RejectCode.FLAG_NOT_ALLOWED,
        message="--target: the target is the last token of the subject",
        field="args",
    ),
    "reply.cancel_accepted": messages.CancelAccepted(run_id=RUN_ID, status=RunStatus.RUNNING),
    "reply.run_view": _VIEW,
    "reply.run_list": messages.RunList(
        runs=[_VIEW], waiting={"shop.prod": 2}, waiting_since={"shop.prod": at(1.2)}
    ),
    "reply.worker_status": _WORKER_STATUS,
    "reply.error": messages.ControlError(code="not_found", message=f"no run {RUN_ID} is known"),
    **{f"event.{events.event_type(event)}": event for event in _EVENTS},
    **LINEAGE_EXAMPLES,
    "event.node.finished.failed_test": _FAILED_TEST,
    "event.node.finished.skipped": _SKIPPED,
}
"""By the name of the schema that describes it; a further word makes a second example."""
