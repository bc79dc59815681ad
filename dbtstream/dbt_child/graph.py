"""The manifest around the selection: its hash, and the nodes that are not selected.

All of them where the parent does not know this manifest, else only the near ones: what the
selected nodes descend from up to the first that has a table, and the exposures right below.
"""

from __future__ import annotations

import hashlib
from typing import Any, Dict, Iterable, Iterator, List, Optional, Set

from .nodes import (
    checksum_of,
    column_tags,
    columns_of,
    contract_enforced,
    exposure_of,
    group_of,
    group_owners,
    meta_of,
    owners,
    upstream_of,
    word,
)

COLLECTIONS = (
    "nodes",
    "sources",
    "exposures",
    "unit_tests",
    "saved_queries",
    "metrics",
    "semantic_models",
    "functions",
)
LINEAGE = frozenset({"model", "seed", "snapshot", "source", "exposure"})
BETWEEN = frozenset({"metric", "semantic_model", "saved_query", "function"})
UNDECLARED = frozenset({"test", "unit_test", "operation", "analysis"})
INLINE = "sql_operation"  # of `show --inline` and `compile --inline`, there for one command


def find_node(manifest: Any, unique_id: str) -> Any:
    """None where the manifest has no such node."""
    for name in COLLECTIONS:
        node = (getattr(manifest, name, None) or {}).get(unique_id)
        if node is not None:
            return node
    return None


def unselected(manifest: Any, selected: Iterable[str], near: bool) -> List[Any]:
    """Nodes for `graph_nodes`."""
    chosen = set(selected)
    if near:
        wanted = sorted(_near(manifest, chosen) - chosen)
        return [node for node in (find_node(manifest, each) for each in wanted) if node is not None]
    return [node for node in _lineage_nodes(manifest) if node.unique_id not in chosen]


def _lineage_nodes(manifest: Any) -> Iterator[Any]:
    for name in COLLECTIONS:
        # Copied at once: dbt is running by now, and may put a node in anew.
        for node in list((getattr(manifest, name, None) or {}).values()):
            if word(node.resource_type) in LINEAGE | BETWEEN:
                yield node


def _near(manifest: Any, selected: Set[str]) -> Set[str]:
    near = {each for one in selected for each in _ancestors(manifest, one)}
    for exposure in list((getattr(manifest, "exposures", None) or {}).values()):
        above = _ancestors(manifest, exposure.unique_id)
        if not above.isdisjoint(selected):
            near.add(exposure.unique_id)
            near.update(each for each in above if _is_passage(find_node(manifest, each)))
    return near


def _ancestors(manifest: Any, unique_id: str) -> Set[str]:
    """What a node descends from, through nodes without a table, up to the first with one."""
    found: Set[str] = set()
    waiting = upstream_of(find_node(manifest, unique_id))
    while waiting:
        parent = waiting.pop()
        if parent in found:
            continue
        node = find_node(manifest, parent)
        if node is None:
            continue
        found.add(parent)
        if _is_passage(node):
            waiting += upstream_of(node)
    return found


def _is_passage(node: Any) -> bool:
    if node is None:
        return False
    return not getattr(node, "relation_name", None) or word(node.resource_type) in BETWEEN


def manifest_hash(manifest: Any) -> str:
    """Changes with anything that `lineage.declared` tells, but descriptions, and with tests."""
    digest = hashlib.blake2b(digest_size=16)
    by_group = group_owners(manifest)
    for name in COLLECTIONS:
        collection = dict(getattr(manifest, name, None) or {})
        for unique_id in sorted(collection):
            node = collection[unique_id]
            resource_type = word(getattr(node, "resource_type", None))
            if resource_type == INLINE:
                continue
            parts = [unique_id, checksum_of(node) or "", *sorted(upstream_of(node))]
            if resource_type not in UNDECLARED:
                parts += _declared(node, resource_type, by_group)
            digest.update("\0".join(parts).encode("utf-8", "replace"))
            digest.update(b"\n")
    return digest.hexdigest()


def _declared(
    node: Any, resource_type: Optional[str], by_group: Dict[str, List[str]]
) -> Iterator[str]:
    config = getattr(node, "config", None)
    group = group_of(node, config)
    yield "\1relation"  # each list has its own head: nothing can slip into another
    for name in ("relation_name", "database", "schema", "alias", "identifier"):
        yield str(getattr(node, name, None))
    yield str(word(getattr(config, "materialized", None)))
    yield str(group)
    yield str(contract_enforced(config))
    yield "\1owners"
    yield from owners(node, config, by_group.get(group or "", []))
    for column in columns_of(node):
        yield "\1column"
        yield str(column.name)
        yield str(getattr(column, "data_type", None))
        yield from column_tags(column)
    if resource_type == "exposure":
        yield "\1exposure"
        yield str(node.name)
        yield from map(str, exposure_of(node).values())
    ours = meta_of(node, config).get("dbtstream")
    if ours is not None:
        yield "\1meta"
        yield repr(ours)
