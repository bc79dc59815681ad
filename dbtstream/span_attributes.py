"""What the spans of a run say of it and of its nodes, in OpenTelemetry's words and ours. Pure.

Layer 1, used by `span_mapping`. `dbt.*` is about dbt's work, `dbtstream.*` about us;
`cicd.pipeline.*` and `messaging.*` are OpenTelemetry's conventions for the same facts, where it
has some. Never here: SQL, vars, environment, profiles, a command's arguments.
"""

import re

from dbtstream.error_types import ErrorType
from dbtstream.events import NodeBatch, NodeFinished, QueryFinished, RunStarted
from dbtstream.instruments import (
    ERROR_TYPE,
    FRESHNESS,
    MATERIALIZATION,
    NODE_STATUS,
    NODE_TYPE,
    OWNER,
    SEVERITY,
    START,
    UNIQUE_ID,
)
from dbtstream.spans import AttributeValue
from dbtstream.statuses import NodeStatus, RunStatus

Values = dict[str, AttributeValue | None]

OUTCOMES: dict[NodeStatus, tuple[str, str]] = {
    # ours                      dbt.node.outcome   cicd.pipeline.task.run.result
    NodeStatus.SUCCESS: ("success", "success"),
    NodeStatus.WARN: ("success", "success"),
    NodeStatus.FAIL: ("success", "failure"),  # the test did its work, and said no
    NodeStatus.ERROR: ("error", "failure"),
    NodeStatus.PARTIAL_SUCCESS: ("error", "failure"),
    NodeStatus.SKIPPED: ("skipped", "skip"),
    NodeStatus.NO_OP: ("skipped", "skip"),
    NodeStatus.REUSED: ("skipped", "skip"),
    NodeStatus.NEVER_STARTED: ("skipped", "skip"),
    NodeStatus.CANCELLED: ("canceled", "cancellation"),
    NodeStatus.LOST: ("error", "error"),
}
"""Outcomes have the words of dbt Fusion, results those of OpenTelemetry."""

RESULTS: dict[RunStatus, str] = {
    RunStatus.SUCCESS: "success",
    RunStatus.FAILURE: "failure",
    RunStatus.ERROR: "error",
    RunStatus.CANCELLED: "cancellation",
    RunStatus.TIMED_OUT: "timeout",
    RunStatus.LOST: "error",
}
"""cicd.pipeline.result."""

_SKIP_REASONS = {
    NodeStatus.SKIPPED: "upstream",
    NodeStatus.NO_OP: "no_op",
    NodeStatus.REUSED: "cached",
}
_CHECKED = {NodeStatus.SUCCESS: "passed", NodeStatus.WARN: "warned", NodeStatus.FAIL: "failed"}
_TESTS = frozenset({"test", "unit_test"})

_DB_SYSTEMS = {
    "postgres": "postgresql",
    "redshift": "aws.redshift",
    "sqlserver": "microsoft.sql_server",
    "synapse": "microsoft.sql_server",
    "fabric": "microsoft.sql_server",
}
"""dbt's adapter -> db.system.name, where they differ."""

# Possessive and atomic: a text of many comments must not be tried in all its partitions.
_OPERATION = re.compile(r"(?>\s+|/\*.*?\*/|--[^\n]*\n)*+([A-Za-z]{1,20})\b", re.DOTALL)
_LOOKED_AT = 8192  # of a query, for its first word


def node_attributes(event: NodeFinished, error: ErrorType | None) -> Values:
    node, status = event.node, event.status
    outcome, result = OUTCOMES[status]
    values: Values = {
        UNIQUE_ID: node.unique_id,
        "dbt.node.name": node.name,
        NODE_TYPE: node.resource_type,
        MATERIALIZATION: node.materialized,
        NODE_STATUS: status.value,
        "dbt.node.dbt_status": None if event.dbt_status == status else event.dbt_status,
        "dbt.node.outcome": outcome,
        "dbt.node.path": node.path,
        "dbt.node.relation": event.relation.relation_name if event.relation else None,
        "dbt.node.group": node.group,
        OWNER: node.owners,
        "dbt.node.tags": node.tags,
        "dbt.node.thread": event.thread,
        "dbt.node.compile.duration": event.compile_s,
        "dbt.node.execute.duration": event.execute_s,
        "dbt.node.rows_affected": event.rows_affected,
        "dbt.node.bytes_processed": event.bytes_processed,
        "dbt.query.id": event.query_id,
        "cicd.pipeline.task.name": node.name,
        "cicd.pipeline.task.run.id": node.unique_id,
        "cicd.pipeline.task.run.result": result,
        "cicd.pipeline.task.type": "test" if node.resource_type in _TESTS else "build",
        ERROR_TYPE: error.value if error else None,
    }
    if outcome == "skipped":
        values["dbt.node.skip_reason"] = _SKIP_REASONS.get(status) or event.reason
        values["dbt.node.skip_upstream"] = event.root_causes
    elif event.reason:
        values["dbtstream.node.reason"] = event.reason.value
    if node.resource_type in _TESTS:
        values["dbt.test.outcome"] = _CHECKED.get(status)
        values["dbt.test.failures"] = event.failures
        if event.test is not None:
            values[SEVERITY] = event.test.severity
            values["dbt.test.column"] = event.test.column
            values["dbt.test.attached_node"] = event.test.attached_node
    elif node.resource_type == "source" and event.freshness is not None:
        is_stale = error is ErrorType.SOURCE_STALE
        values[FRESHNESS] = "failed" if is_stale else _CHECKED.get(status, "error")
        values["dbt.freshness.age"] = event.freshness.age_s
        if is_stale:
            values["dbt.node.outcome"] = "success"  # the check was made
    return values


def batch_attributes(event: NodeBatch, error: ErrorType | None) -> Values:
    outcome, _ = OUTCOMES[event.status]
    begin, end = event.event_time_start, event.event_time_end
    return {
        UNIQUE_ID: event.unique_id,
        "dbt.node.name": event.name,
        NODE_TYPE: event.resource_type,
        NODE_STATUS: event.status.value,
        "dbt.node.outcome": outcome,
        "dbt.batch.index": event.index,
        "dbt.batch.total": event.total,
        "dbt.batch.event_time_start": begin.isoformat() if begin else None,
        "dbt.batch.event_time_end": end.isoformat() if end else None,
        ERROR_TYPE: error.value if error else None,
    }


def query_attributes(event: QueryFinished, adapter_type: str | None) -> Values:
    return {
        "db.system.name": _DB_SYSTEMS.get(adapter_type or "", adapter_type),
        "db.operation.name": query_operation(event),
        "dbt.query.id": event.query_id,
        "dbt.query.status": event.status,
        UNIQUE_ID: event.unique_id,
    }


def query_operation(event: QueryFinished) -> str | None:
    """The first word of the SQL, where the project has it told."""
    found = _OPERATION.match(event.sql[:_LOOKED_AT]) if event.sql else None
    return found[1].upper() if found else None


def dbt_attributes(started: RunStarted | None) -> Values:
    """Which dbt it is; nothing before it has said so."""
    if started is None:
        return {}
    return {
        "dbt.version": started.dbt_version,
        "dbt.adapter.type": started.adapter_type,
        "dbt.adapter.version": started.adapter_version,
        START: started.start,
    }
