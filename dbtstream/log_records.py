"""dbt's warnings and errors as OpenTelemetry log records, beside the spans. Pure.

Layer 1; `publishers.otel` sends them. A record has the ids of the span that it is about, and
its `event_name` is dbt's name of the event. dbt tells how a node ended in an event of its own, so
what warned and what failed is a record here whatever the project's `log_level`.
"""

from typing import Literal

from dbtstream.error_types import error_type_of
from dbtstream.events import AnyEvent, LogLine, NodeFinished
from dbtstream.instruments import ERROR_TYPE, NODE_STATUS, NODE_TYPE, PROJECT, TARGET, UNIQUE_ID
from dbtstream.span_texts import attributes, text, unix_ns
from dbtstream.spans import AttributeValue, LogRecord
from dbtstream.statuses import NodeStatus

Severity = Literal["debug", "info", "warn", "error"]

_LEVELS: dict[str, Severity] = {"debug": "debug", "info": "info", "warn": "warn"}
_ENDS: dict[NodeStatus, Severity] = {
    NodeStatus.WARN: "warn",
    NodeStatus.FAIL: "error",
    NodeStatus.ERROR: "error",
    NodeStatus.PARTIAL_SUCCESS: "error",
    NodeStatus.LOST: "error",
}
NODE_FINISHED = "dbt.NodeFinished"


def log_record_of(event: AnyEvent) -> LogRecord | None:
    """None of what is no line of text."""
    match event:
        case LogLine():
            return _record(
                event,
                _LEVELS.get(event.level, "error"),
                f"dbt.{event.name}",
                event.message,
                {"dbt.event.code": event.code, UNIQUE_ID: event.unique_id},
            )
        case NodeFinished() if (severity := _ENDS.get(event.status)) is not None:
            error = error_type_of(event)
            return _record(
                event,
                severity,
                NODE_FINISHED,
                (event.error.message if event.error else None) or event.message or event.status,
                {
                    UNIQUE_ID: event.node.unique_id,
                    NODE_TYPE: event.node.resource_type,
                    NODE_STATUS: event.status.value,
                    ERROR_TYPE: error.value if error else None,
                },
            )
    return None


def _record(
    event: LogLine | NodeFinished,
    severity: Severity,
    name: str,
    body: str,
    values: dict[str, AttributeValue | None],
) -> LogRecord:
    shared: dict[str, AttributeValue | None] = {
        PROJECT: event.project,
        TARGET: event.target,
        "dbtstream.run.id": event.run_id,
        "dbtstream.run.attempt": event.attempt,
    }
    return LogRecord(
        time_ns=unix_ns(event.time),
        severity=severity,
        event_name=text(name),
        body=text(body),
        trace_id=event.trace_id or "",
        span_id=event.span_id or "",
        attributes=attributes(shared | values),
    )
