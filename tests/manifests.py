"""What a manifest.json says of lineage, read without any code of ours: what tests compare with."""

import json
from pathlib import Path
from typing import Any

DATASETS = ("model", "seed", "snapshot", "source")
SINKS = (*DATASETS, "exposure")


def edges_of(manifest: Path) -> set[tuple[str, str]]:
    """(upstream, downstream) of all models, seeds, snapshots, sources and exposures; an edge goes
    through ephemeral models and whatever else is no dataset."""
    document = json.loads(manifest.read_text(encoding="utf-8"))
    nodes: dict[str, Any] = {}
    for kind in ("nodes", "sources", "exposures", "metrics", "semantic_models", "saved_queries"):
        nodes |= document.get(kind, {})

    def is_dataset(node: dict[str, Any]) -> bool:
        ephemeral = node.get("config", {}).get("materialized") == "ephemeral"
        return node["resource_type"] in DATASETS and not ephemeral

    def datasets_behind(unique_id: str) -> set[str]:
        found: set[str] = set()
        for parent in nodes[unique_id].get("depends_on", {}).get("nodes", ()):
            if parent in nodes:
                found |= {parent} if is_dataset(nodes[parent]) else datasets_behind(parent)
        return found

    return {
        (parent, unique_id)
        for unique_id, node in nodes.items()
        if node["resource_type"] in SINKS
        for parent in datasets_behind(unique_id)
    }
