"""What dbt is about to run: the live task's selection and manifest, before the first node.

No event lists the selected nodes. At ConcurrencyLine, though, dbt's main thread stands in
`GraphRunnableTask.execute_with_hooks(self, selected_uids)` (1.8 to 1.12): the very manifest and
selection that it will run are a few frames up. Commands that run no nodes (`parse`, `list`,
`run-operation`, nothing selected) have at least a manifest, in click's context, when they are
completed. All of it is read, never touched.

Only the finding is done on dbt's thread. The frames are made by the writer while dbt goes on;
since it writes in order, they are still told before anything starts.
"""

from __future__ import annotations

import contextvars
import sys
import threading
import time
from types import MappingProxyType
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Set,
)

from .channel import LATER
from .connection import connection_facts
from .graph import find_node, manifest_hash, unselected
from .matches import resolve
from .nodes import NodeReader, word

MAX_OTHERS = 500
MAX_DEPTH = 40


class Wanted(NamedTuple):
    """What the parent's `Start` asks for beyond the plan."""

    graph: bool = False
    known_manifest: Optional[str] = None
    selectors: Mapping[str, str] = MappingProxyType({})
    compiled_code: bool = False
    adapter_columns: bool = False


class TaskInFlight:
    """What is read off dbt's task, or off click's context where there is no task."""

    def __init__(
        self, config: Any, manifest: Any, selected: Iterable[str] = (), task: Any = None
    ) -> None:
        self.config = config
        self.manifest = manifest
        # `build` keeps unit tests apart from the rest of its selection.
        self.selected = sorted({*selected, *(getattr(task, "selected_unit_tests", None) or ())})
        self.graph = getattr(task, "graph", None)
        self.previous_state = getattr(task, "previous_state", None)
        self.state = self._deferred_to(task)
        self.context = contextvars.copy_context()  # selectors need the project's root from it

    @property
    def command(self) -> Optional[str]:
        return word(getattr(self.config.args, "which", None))

    def _deferred_to(self, task: Any) -> Any:
        if not getattr(self.config.args, "defer", False):
            return None
        previous = getattr(task, "previous_defer_state", None) or self.previous_state
        return getattr(previous, "manifest", None)


def task_in_flight() -> TaskInFlight:
    """Found by walking up from the callback. Raises LookupError."""
    for frame in _callers():
        if frame.f_code.co_name == "execute_with_hooks":
            task, selected = frame.f_locals["self"], frame.f_locals["selected_uids"]
            return TaskInFlight(task.config, task.manifest, selected, task)
    raise LookupError("execute_with_hooks is not among the callers")


def completed_command() -> Optional[TaskInFlight]:
    """At CommandCompleted; None of a command that has parsed nothing."""
    for frame in _callers():
        found = getattr(frame.f_locals.get("ctx"), "obj", None)
        if isinstance(found, dict) and "flags" in found:
            config, manifest = found.get("runtime_config"), found.get("manifest")
            return None if None in (config, manifest) else TaskInFlight(config, manifest)
    return None


def _callers() -> Iterator[Any]:
    frame: Any = sys._getframe(1)  # noqa: SLF001 - the documented way to a caller's locals
    for _ in range(MAX_DEPTH):
        if frame is None:
            return
        yield frame
        frame = frame.f_back


class Telling:
    """The plan and graph of one task, frame by frame; what cannot be had is said in `status`."""

    def __init__(
        self,
        task: TaskInFlight,
        wanted: Wanted,
        muted: Set[int],
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        self._task = task
        self._wanted = wanted
        self._muted = muted
        self._failed = failed
        self._status = "complete"
        self._hash: Optional[str] = None
        self._known = False
        self._problems: List[Dict[str, str]] = []
        self._reader: Optional[NodeReader] = None

    def plan_frames(self, data: Any) -> Iterator[Dict[str, Any]]:
        config = self._task.config
        yield {"t": "nodes", "at": time.time(), LATER: self._nodes}
        yield {
            "t": "plan",
            "at": time.time(),
            "node_count": getattr(data, "node_count", 0),
            "threads": config.threads,
            "target_name": config.target_name,
            LATER: self._plan,
        }

    def graph_frames(self) -> Iterator[Dict[str, Any]]:
        if self._wanted.graph:
            yield {"t": "graph_nodes", "at": time.time(), LATER: self._graph_nodes}
            yield {"t": "graph", "at": time.time(), LATER: self._graph}

    # The writer thread.

    def _nodes(self) -> Optional[Dict[str, Any]]:
        try:
            return {"nodes": self._read(self._selected())}
        except Exception as error:
            self._failed()
            self._status = f"unavailable: {type(error).__name__}: {error}"
            return None

    def _plan(self) -> Dict[str, Any]:
        fields: Dict[str, Any] = {"status": self._status}
        if self._status != "complete":
            return fields
        fields["node_count"] = len(self._task.selected)
        try:
            nodes = list(self._task.manifest.nodes.values())
            hooks = [node for node in nodes if word(node.resource_type) == "operation"]
            fields["others"] = self._read(hooks[:MAX_OTHERS])
            fields["manifest_hash"] = self._manifest_hash()
        except Exception:  # the list of nodes is complete all the same
            self._failed()
        return fields

    def _graph_nodes(self) -> Dict[str, Any]:
        self._known = self._manifest_hash() == self._wanted.known_manifest
        nodes = unselected(self._task.manifest, self._task.selected, near=self._known)
        return {"nodes": self._read(nodes)}

    def _graph(self) -> Dict[str, Any]:
        config = self._task.config
        credentials = getattr(config, "credentials", None)
        return {
            "manifest_hash": self._manifest_hash(),
            "complete": not self._known,
            "adapter_type": word(getattr(credentials, "type", None)),
            "connection": connection_facts(credentials, getattr(config, "project_root", None)),
            "selector_problems": self._problems,
        }

    def _selected(self) -> Iterator[Any]:
        for unique_id in self._task.selected:
            node = find_node(self._task.manifest, unique_id)
            if node is None:
                raise LookupError(f"{unique_id} is not in the manifest")
            yield node

    def _read(self, nodes: Iterable[Any]) -> List[Dict[str, Any]]:
        if self._reader is None:
            task = self._task
            self._reader = NodeReader(task.manifest, task.config, task.state, self._matches())
        read = []
        for node in nodes:
            try:
                read.append(self._reader.read(node))
            except Exception:  # something odd in one node must not cost the others
                self._failed()
                kind = word(node.resource_type)
                read.append({"unique_id": node.unique_id, "resource_type": kind, "name": node.name})
        return read

    def _matches(self) -> Dict[str, List[str]]:
        if not self._wanted.selectors:
            return {}
        self._muted.add(threading.get_ident())
        matches: Dict[str, List[str]] = {}
        try:
            resolved = self._task.context.run(resolve, self._task, self._wanted.selectors)
            matches, self._problems = resolved
        except Exception as error:  # no selector may cost the plan
            self._failed()
            problem = f"{type(error).__name__}: {error}"
            names = list(self._wanted.selectors)
            self._problems = [{"name": name, "problem": problem} for name in names]
        finally:
            self._muted.discard(threading.get_ident())
        return matches

    def _manifest_hash(self) -> str:
        if self._hash is None:
            self._hash = manifest_hash(self._task.manifest)
        return self._hash


def unavailable_plan(data: Any) -> Dict[str, Any]:
    return {
        "t": "plan",
        "at": time.time(),
        "node_count": getattr(data, "node_count", 0),
        "status": "unavailable: dbt's task was not found",
        "threads": getattr(data, "num_threads", None),
        "target_name": getattr(data, "target_name", None),
    }
