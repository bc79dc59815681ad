"""Values out of dbt's messages and of the frames above a callback. Attribute reads only.

`MessageToDict` costs 70 to 100 µs an event, this about one per attribute.
"""

from __future__ import annotations

import sys
from typing import Any, Dict, Optional, Tuple


def finish_fields(event: Any) -> Dict[str, Any]:
    """Of NodeFinished. Some 40 attributes: 50 us on a thread of dbt's, so the writer reads them.

    dbt makes a message for each event and does not touch it afterwards.
    """
    info, result = event.data.node_info, event.data.run_result
    status = result.status
    counts = info.resource_type in ("test", "unit_test") and status in ("pass", "fail", "warn")
    return {
        "unique_id": info.unique_id,
        "status": status,
        "thread": result.thread or None,
        "started_at": info.node_started_at or None,
        "finished_at": info.node_finished_at or None,
        "timing": [
            {
                "name": step.name,
                "started_at": moment(step, "started_at"),
                "completed_at": moment(step, "completed_at"),
            }
            for step in result.timing_info
        ],
        "message": result.message or None,
        "failures": result.num_failures if counts else None,
        "adapter_response": struct_dict(result.adapter_response),
        "relation": relation_dict(info.node_relation),
    }


def error_code(error: Optional[BaseException]) -> Optional[str]:
    """dbt's numeric code; its base exceptions have a negative one that says nothing."""
    code = getattr(error, "CODE", None)
    return str(code) if isinstance(code, int) and code > 0 else None


def struct_dict(struct: Any) -> Dict[str, Any]:
    """A protobuf Struct as plain values; it has turned every int into a float, so back."""
    return {key: _plain(value) for key, value in struct.fields.items()}


def _plain(value: Any) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "number_value":
        number = value.number_value
        return int(number) if number.is_integer() else number
    if kind == "struct_value":
        return struct_dict(value.struct_value)
    if kind == "list_value":
        return [_plain(item) for item in value.list_value.values]
    return None if kind in (None, "null_value") else getattr(value, kind)


def moment(step: Any, field: str) -> Any:
    return getattr(step, field).ToDatetime() if step.HasField(field) else None


def relation_dict(relation: Any) -> Optional[Dict[str, Any]]:
    name = relation.relation_name
    if not name:  # ephemeral models, and tests that store nothing
        return None
    return {
        "database": relation.database or None,
        "schema": relation.schema or None,
        "identifier": relation.alias or None,
        "relation_name": name,
    }


def batch_in_flight() -> Tuple[Any, Any]:
    """Start and end of the batch whose result line is being printed: no event has them."""
    frame: Any = sys._getframe(1)  # noqa: SLF001 - the documented way to a caller's locals
    for _ in range(15):
        frame = frame.f_back
        if frame is None:
            break
        batches = getattr(frame.f_locals.get("self"), "batches", None)
        if batches:
            start, end = batches[frame.f_locals["self"].batch_idx]
            return start, end
    return None, None
