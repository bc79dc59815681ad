"""Values out of dbt's messages and of the frames above a callback. Attribute reads only.

`MessageToDict` costs 70 to 100 µs an event, this about one per attribute.
"""

from __future__ import annotations

import sys
from typing import Any, Dict, Optional, Tuple


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
