"""What dbt is about to run: the live task's selection and manifest, before the first node.

No event lists the selected nodes. At ConcurrencyLine, though, dbt's main thread stands in
`GraphRunnableTask.execute_with_hooks(self, selected_uids)` (1.8 to 1.12): the very manifest and
selection that it will run are a few frames up. They are read, never touched.
"""

from __future__ import annotations

import hashlib
import sys
import time
from typing import Any, Dict, Iterable, Iterator, List, Optional

COLLECTIONS = ("nodes", "sources", "exposures", "unit_tests", "saved_queries", "functions")
MAX_OTHERS = 500
MAX_DEPTH = 40


class TaskInFlight:
    """What is read off the frame of `execute_with_hooks`."""

    def __init__(self, task: Any, selected: Iterable[str]) -> None:
        self.config = task.config
        self.manifest = task.manifest
        # `build` keeps unit tests apart from the rest of its selection.
        self.selected = sorted({*selected, *(getattr(task, "selected_unit_tests", None) or ())})


def task_in_flight() -> TaskInFlight:
    """Found by walking up from the callback. Raises LookupError."""
    frame: Any = sys._getframe(1)  # noqa: SLF001 - the documented way to a caller's locals
    for _ in range(MAX_DEPTH):
        if frame is None:
            break
        if frame.f_code.co_name == "execute_with_hooks":
            return TaskInFlight(frame.f_locals["self"], frame.f_locals["selected_uids"])
        frame = frame.f_back
    raise LookupError("execute_with_hooks is not among the callers")


def plan_frames(task: Optional[TaskInFlight], data: Any) -> Iterator[Dict[str, Any]]:
    """The node list and the `plan` that closes it; what cannot be had is said in `status`."""
    plan: Dict[str, Any] = {
        "t": "plan",
        "at": time.time(),
        "node_count": getattr(data, "node_count", 0),
        "status": "complete",
        "threads": getattr(data, "num_threads", None),
        "target_name": getattr(data, "target_name", None),
    }
    if task is None:
        plan["status"] = "unavailable: dbt's task was not found"
        yield plan
        return
    plan["threads"] = task.config.threads
    plan["target_name"] = task.config.target_name
    try:
        nodes = planned_nodes(task.manifest, task.selected)
        plan["node_count"] = len(nodes)
        plan["others"] = [
            planned_node(task.manifest, node)
            for node in task.manifest.nodes.values()
            if word(node.resource_type) == "operation"
        ][:MAX_OTHERS]
        plan["manifest_hash"] = manifest_hash(task.manifest)
        yield {"t": "nodes", "at": time.time(), "nodes": nodes}
    except Exception as error:
        plan["status"] = f"unavailable: {type(error).__name__}: {error}"
    yield plan


def planned_nodes(manifest: Any, selected: Iterable[str]) -> List[Dict[str, Any]]:
    collections = [getattr(manifest, name, None) or {} for name in COLLECTIONS]
    nodes = []
    for unique_id in selected:
        for collection in collections:
            if unique_id in collection:
                nodes.append(planned_node(manifest, collection[unique_id]))
                break
        else:
            raise LookupError(f"{unique_id} is not in the manifest")
    return nodes


def planned_node(manifest: Any, node: Any) -> Dict[str, Any]:
    """A `frames.PlannedNode`. Attributes differ by resource type, hence the defaults."""
    config = getattr(node, "config", None)
    resource_type = word(node.resource_type)
    version = getattr(node, "version", None)
    group = getattr(node, "group", None) or getattr(config, "group", None)
    planned: Dict[str, Any] = {
        "unique_id": node.unique_id,
        "resource_type": resource_type,
        "name": node.name,
        "package_name": getattr(node, "package_name", None),
        "version": None if version is None else str(version),
        "materialized": getattr(config, "materialized", None),
        "path": getattr(node, "original_file_path", None),
        "fqn": list(getattr(node, "fqn", None) or ()),
        "tags": _tags(node, config),
        "group": group,
        "access": word(getattr(node, "access", None)),
        "meta": _meta(node, config),
        "owners": owners(manifest, node, config, group),
        "checksum": _checksum(node),
        "upstream": _upstream(node),
        "relation": _relation(node),
    }
    if resource_type == "operation":  # a hook; dbt fills in its default, view
        planned["materialized"] = None
    if resource_type == "test":
        planned["test"] = _test(node, config)
        planned["relation"] = None
    return planned


def owners(manifest: Any, node: Any, config: Any, group: Optional[str]) -> List[str]:
    """Whoever is named as owner by meta, by an exposure, or by the node's group."""
    found: List[str] = []
    for meta in (getattr(node, "meta", None), getattr(config, "meta", None)):
        if isinstance(meta, dict):
            found += _names(meta.get("owner")) + _names(meta.get("owners"))
    found += _names(getattr(node, "owner", None))
    if group:
        for candidate in (getattr(manifest, "groups", None) or {}).values():
            if candidate.name == group:
                found += _names(getattr(candidate, "owner", None))
    return list(dict.fromkeys(found))


def manifest_hash(manifest: Any) -> str:
    """Changes when a node comes, goes, gets other code or other parents."""
    digest = hashlib.blake2b(digest_size=16)
    for name in COLLECTIONS:
        collection = getattr(manifest, name, None) or {}
        for unique_id in sorted(collection):
            node = collection[unique_id]
            parts = [unique_id, _checksum(node) or "", *sorted(_upstream(node))]
            digest.update("\0".join(parts).encode("utf-8", "replace"))
            digest.update(b"\n")
    return digest.hexdigest()


def word(value: Any) -> Optional[str]:
    """The word of one of dbt's string enums, or of a string."""
    return None if value is None else str(getattr(value, "value", value))


def _names(owner: Any) -> List[str]:
    """Of an owner: a string, a list, {email, name}, or dbt's Owner object."""
    if owner is None:
        return []
    if isinstance(owner, str):
        return [owner] if owner.strip() else []
    if isinstance(owner, (list, tuple)):
        return [name for item in owner for name in _names(item)]
    if isinstance(owner, dict):
        return _names(owner.get("email")) + _names(owner.get("name"))
    return _names(getattr(owner, "email", None)) + _names(getattr(owner, "name", None))


def _tags(node: Any, config: Any) -> List[str]:
    tags = getattr(node, "tags", None) or getattr(config, "tags", None) or ()
    return [tags] if isinstance(tags, str) else [str(tag) for tag in tags]


def _meta(node: Any, config: Any) -> Dict[str, Any]:
    meta = getattr(node, "meta", None) or getattr(config, "meta", None)
    return dict(meta) if isinstance(meta, dict) else {}


def _checksum(node: Any) -> Optional[str]:
    checksum = getattr(node, "checksum", None)
    checksum = getattr(checksum, "checksum", checksum)
    return str(checksum) if checksum else None


def _upstream(node: Any) -> List[str]:
    return list(getattr(getattr(node, "depends_on", None), "nodes", None) or ())


def _relation(node: Any) -> Optional[Dict[str, Any]]:
    name = getattr(node, "relation_name", None)
    if not name:
        return None
    return {
        "database": getattr(node, "database", None),
        "schema": getattr(node, "schema", None),
        "identifier": getattr(node, "alias", None) or getattr(node, "identifier", None),
        "relation_name": name,
    }


def _test(node: Any, config: Any) -> Dict[str, Any]:
    severity = word(getattr(config, "severity", None))
    return {
        "attached_node": getattr(node, "attached_node", None),
        "column": getattr(node, "column_name", None),
        "test_name": getattr(getattr(node, "test_metadata", None), "name", None),
        "severity": severity.lower() if severity else None,
        "warn_if": getattr(config, "warn_if", None),
        "error_if": getattr(config, "error_if", None),
        "failures_relation": getattr(node, "relation_name", None),
    }
