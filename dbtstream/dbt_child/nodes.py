"""A node as the live manifest has it -> `frames.PlannedNode`.

Attributes differ by resource type and by dbt release, hence the defaults. What is empty is left
out: the parent's Struct has the same default. What a project has written of the wrong type
becomes text or nothing; no node may cost the plan. Read in the writer thread, never touched.
"""

from __future__ import annotations

import csv
import io
import os
from typing import Any, Dict, List, Optional

MAX_HEADER_BYTES = 64 * 1024
REFABLE = frozenset({"model", "seed", "snapshot"})  # what --defer looks for elsewhere


class NodeReader:
    """Reads nodes of one manifest. `config` is dbt's RuntimeConfig, `state` the manifest that
    --defer points to, `matches` the names of selectors by unique_id."""

    def __init__(
        self,
        manifest: Any,
        config: Any = None,
        state: Any = None,
        matches: Optional[Dict[str, List[str]]] = None,
    ) -> None:
        self._config = config
        self._state = state
        self._matches = matches or {}
        self._group_owners = group_owners(manifest)
        self._full_refresh = bool(getattr(getattr(config, "args", None), "full_refresh", None))

    def read(self, node: Any) -> Dict[str, Any]:
        unique_id, resource_type = str(node.unique_id), word(node.resource_type) or ""
        found: Dict[str, Any] = {
            "unique_id": unique_id,
            "resource_type": resource_type,
            "name": str(node.name),
        }
        config = getattr(node, "config", None)
        group = group_of(node, config)
        facts: Dict[str, Any] = {
            "package_name": word(getattr(node, "package_name", None)),
            "version": word(getattr(node, "version", None)),
            "materialized": word(getattr(config, "materialized", None)),
            "path": word(getattr(node, "original_file_path", None)),
            "fqn": _words(getattr(node, "fqn", None)),
            "tags": _tags(node, config),
            "group": group,
            "access": word(getattr(node, "access", None)),
            "meta": meta_of(node, config),
            "owners": owners(node, config, self._group_owners.get(group or "", [])),
            "checksum": checksum_of(node),
            "upstream": upstream_of(node),
            "relation": relation_of(node),
            "matches": self._matches.get(unique_id),
            "description": word(getattr(node, "description", None)),
            "columns": [_column(column) for column in columns_of(node)],
            "contract_enforced": contract_enforced(config),
        }
        if resource_type == "model":
            facts["language"] = word(getattr(node, "language", None))
            facts["incremental_strategy"] = word(getattr(config, "incremental_strategy", None))
        if resource_type in ("model", "seed"):
            facts["full_refresh"] = self._refreshes(config)
        if resource_type in REFABLE:
            facts["deferred"] = self._deferred(node)
        if resource_type == "seed":
            facts["header"] = self._header(node, config)
        elif resource_type == "exposure":
            facts["exposure"] = exposure_of(node)
        elif resource_type == "operation":  # a hook; dbt fills in its default, view
            del facts["materialized"]
        elif resource_type == "test":
            facts["test"] = _test(node, config)
            facts["test_details"] = _test_details(node, config)
            del facts["relation"]
        found.update((name, value) for name, value in facts.items() if value)
        return found

    def _refreshes(self, config: Any) -> bool:
        """As dbt's macro should_full_refresh() decides: the node's own config wins."""
        own = getattr(config, "full_refresh", None)
        return self._full_refresh if own is None else bool(own)

    def _deferred(self, node: Any) -> Optional[Dict[str, Any]]:
        """As dbt merges the other manifest into this one, which it does after ConcurrencyLine."""
        merged = getattr(node, "defer_relation", None)
        if merged is not None:
            return relation_of(merged)
        other = (getattr(self._state, "nodes", None) or {}).get(node.unique_id)
        return None if other is None else relation_of(other)  # an ephemeral one has no name

    def _header(self, node: Any, config: Any) -> Optional[List[str]]:
        """dbt has the folder on the node; in a plan from elsewhere it may be the project's."""
        root = getattr(node, "root_path", None) or getattr(self._config, "project_root", None)
        path = os.path.join(str(root or ""), str(node.original_file_path))
        delimiter = getattr(config, "delimiter", None)
        return csv_header(path, delimiter if isinstance(delimiter, str) else ",")


def csv_header(path: str, delimiter: str = ",") -> Optional[List[str]]:
    """The names in the first line of a CSV file; None if it has none that can be read."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_HEADER_BYTES)
            whole = len(raw) < MAX_HEADER_BYTES
        text = raw.decode("utf-8-sig", "strict" if whole else "ignore")
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter or ",")
        header = next(rows)
    except (OSError, ValueError, TypeError, csv.Error, StopIteration):
        return None
    if not whole and next(rows, None) is None:  # the line may go on
        return None
    return header


# Values that both the plan and the manifest's hash are made of.


def word(value: Any) -> Optional[str]:
    """The word of one of dbt's string enums, or any other value as text."""
    return None if value is None else str(getattr(value, "value", value))


def group_of(node: Any, config: Any) -> Optional[str]:
    return word(getattr(node, "group", None) or getattr(config, "group", None))


def group_owners(manifest: Any) -> Dict[str, List[str]]:
    groups = (getattr(manifest, "groups", None) or {}).values()
    return {group.name: _names(getattr(group, "owner", None)) for group in groups}


def owners(node: Any, config: Any, of_group: List[str]) -> List[str]:
    """Whoever is named as owner by meta, by an exposure, or by the node's group; once each."""
    found: List[str] = []
    for meta in (getattr(node, "meta", None), getattr(config, "meta", None)):
        if meta and isinstance(meta, dict):
            found += _names(meta.get("owner")) + _names(meta.get("owners"))
    found += _names(getattr(node, "owner", None))
    return list(dict.fromkeys(found + of_group))


def meta_of(node: Any, config: Any) -> Dict[str, Any]:
    meta = getattr(node, "meta", None) or getattr(config, "meta", None)
    return dict(meta) if isinstance(meta, dict) else {}


def checksum_of(node: Any) -> Optional[str]:
    checksum = getattr(node, "checksum", None)
    checksum = getattr(checksum, "checksum", checksum)
    return str(checksum) if checksum else None


def upstream_of(node: Any) -> List[str]:
    return list(getattr(getattr(node, "depends_on", None), "nodes", None) or ())


def relation_of(node: Any) -> Optional[Dict[str, Any]]:
    """None of what has no table of its own: ephemeral models, exposures, most tests."""
    name = getattr(node, "relation_name", None)
    if not name:
        return None
    return {
        "database": word(getattr(node, "database", None)),
        "schema": word(getattr(node, "schema", None)),
        "identifier": word(getattr(node, "alias", None) or getattr(node, "identifier", None)),
        "relation_name": str(name),
    }


def columns_of(node: Any) -> List[Any]:
    columns = getattr(node, "columns", None)
    return list(columns.values()) if isinstance(columns, dict) else []


def column_tags(column: Any) -> List[str]:
    tags = getattr(column, "tags", None) or getattr(getattr(column, "config", None), "tags", None)
    return _words(tags)


def contract_enforced(config: Any) -> bool:
    return bool(getattr(getattr(config, "contract", None), "enforced", False))


def exposure_of(node: Any) -> Dict[str, Any]:
    return {name: word(getattr(node, name, None)) for name in ("type", "url", "maturity")}


def _column(column: Any) -> Dict[str, Any]:
    facts = {
        "name": str(column.name),
        "data_type": word(getattr(column, "data_type", None)),
        "description": word(getattr(column, "description", None)),
        "tags": column_tags(column),
    }
    return {name: value for name, value in facts.items() if value or name == "name"}


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


def _words(values: Any) -> List[str]:
    if isinstance(values, str):
        return [values]
    return [str(value) for value in values] if isinstance(values, (list, tuple, set)) else []


def _tags(node: Any, config: Any) -> List[str]:
    return _words(getattr(node, "tags", None) or getattr(config, "tags", None))


def _test(node: Any, config: Any) -> Dict[str, Any]:
    severity = word(getattr(config, "severity", None))
    return {
        "attached_node": word(getattr(node, "attached_node", None)),
        "column": word(getattr(node, "column_name", None)),
        "test_name": word(getattr(getattr(node, "test_metadata", None), "name", None)),
        "severity": severity.lower() if severity else None,
        "warn_if": word(getattr(config, "warn_if", None)),
        "error_if": word(getattr(config, "error_if", None)),
        "failures_relation": word(getattr(node, "relation_name", None)),
    }


def _test_details(node: Any, config: Any) -> Dict[str, Any]:
    arguments = getattr(getattr(node, "test_metadata", None), "kwargs", None)
    params = dict(arguments) if isinstance(arguments, dict) else {}
    params.pop("model", None)
    params.pop("column_name", None)
    return {"params": params, "fail_calc": word(getattr(config, "fail_calc", None))}
