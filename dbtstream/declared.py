"""What the manifest says of each node, told when it says something else than last time.

Layer 3, used by `asset_events`: `lineage.changed`, then `lineage.declared` of each node that has
changed, and the same in the bucket, where the graph's hash comes last, so that a run whose worker
dies on the way leaves the telling to the next one.
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable
from datetime import datetime
from typing import Any

import msgspec

from dbtstream.assets import Stamp
from dbtstream.config import ProjectConfig
from dbtstream.errors import NatsError
from dbtstream.events import AnyEvent
from dbtstream.frames import Graph
from dbtstream.lineage import Facts, ProjectGraph, changed, is_as_told
from dbtstream.lineage_events import LineageChanged, LineageDeclared
from dbtstream.lineage_store import (
    GraphState,
    LineageStore,
    gone_entries,
    graph_entry,
    lineage_entry,
)

logger = logging.getLogger(__name__)

PER_TURN = 20
"""After so many events in a row, other tasks get the loop."""

Tell = Callable[[type[AnyEvent], datetime, str | None, Facts], AnyEvent]
"""(event type, time, the node it is about, its fields) -> the event, numbered and on its way."""


class Declared:
    """Of one attempt: `known_manifest` before dbt starts, `declare` when its graph is there."""

    def __init__(
        self, config: ProjectConfig, store: LineageStore, project: str, target: str
    ) -> None:
        self._store, self._project, self._target = store, project, target
        told_by = (config.assets.namespace, config.lineage.emit)
        self._config_hash = hashlib.sha256(msgspec.json.encode(told_by)).hexdigest()[:16]
        self._last: GraphState | None = None
        self._knows = False

    async def known_manifest(self) -> str | None:
        """The manifest that all of the project's nodes were last told of; None: tell them all."""
        try:
            self._last = await self._store.graph(self._project, self._target)
        except (NatsError, msgspec.DecodeError) as error:
            self._say("declared lineage is left to a later run", error)
            return None
        self._knows = True
        if self._last is None or self._last.config_hash != self._config_hash:
            return None
        return self._last.manifest_hash or None

    async def declare(
        self, frame: Graph, graph: ProjectGraph, namespace: str, stamp: Stamp, tell: Tell
    ) -> None:
        """`stamp` is of now, for what is written if there is nothing to tell."""
        if not self._knows or self._is_told(frame, namespace):
            return
        if not frame.complete:
            # The profile names another database than last time: the next run hears of all nodes.
            self._note("", namespace, stamp)
            return
        try:
            old = await self._store.declared(self._project, self._target)
        except (NatsError, msgspec.DecodeError) as error:
            self._say("declared lineage is left to a later run", error)
            return
        # In a thread: a project of thousands of models takes more than a turn of the loop.
        new, differences = await asyncio.to_thread(_compare, graph, old)
        if differences["counts"]:
            previous = self._last.manifest_hash if self._last else None
            head = {
                "manifest_hash": frame.manifest_hash,
                "previous_manifest_hash": previous or None,
            }
            tell(LineageChanged, stamp.time, None, head | differences)
        for count, (unique_id, facts) in enumerate(new.items()):
            if not is_as_told(facts, old.get(unique_id)):
                event = tell(LineageDeclared, stamp.time, unique_id, facts)
                assert isinstance(event, LineageDeclared)  # noqa: S101  # it is what was told
                self._store.behind.put(lineage_entry(event))
            if count % PER_TURN == 0:
                await asyncio.sleep(0)
        for unique_id in old.keys() - new.keys():
            for entry in gone_entries(unique_id, stamp):
                self._store.behind.put(entry)
        self._note(frame.manifest_hash, namespace, stamp)

    def _is_told(self, frame: Graph, namespace: str) -> bool:
        wanted = (frame.manifest_hash, self._config_hash, namespace)
        last = self._last
        return last is not None and wanted == (last.manifest_hash, last.config_hash, last.namespace)

    def _note(self, manifest_hash: str, namespace: str, stamp: Stamp) -> None:
        state = GraphState(
            **msgspec.structs.asdict(stamp),
            manifest_hash=manifest_hash,
            config_hash=self._config_hash,
            namespace=namespace,
        )
        self._store.behind.put(graph_entry(state))

    def _say(self, text: str, error: Exception) -> None:
        logger.warning(
            text,
            extra={
                "action": "lineage.unknown",
                "project": self._project,
                "target": self._target,
                "error": str(error),
            },
        )


def _compare(
    graph: ProjectGraph, old: dict[str, LineageDeclared]
) -> tuple[dict[str, Facts], dict[str, Any]]:
    new = {node.unique_id: graph.declared(node) for node in graph.lineage_nodes()}
    return new, changed(old, new)
