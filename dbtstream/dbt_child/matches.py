"""The project's selectors, resolved by dbt's own node selector on the live manifest.

In the writer thread, once per run. dbt's state stays as it is: specs are built here, nothing
warns (`expect_exists` is false), and tests come along as by default whatever the run's own
--indirect-selection. Events that dbt fires meanwhile are not told: the caller mutes the thread.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import time
from typing import Any, Dict, List, Mapping, Set, Tuple

from .graph import COLLECTIONS
from .nodes import upstream_of

MAX_S = 5.0
"""CPU time for all of them; `state:modified` in a large project takes seconds."""

MAX_PROBLEM_CHARS = 500
NOTHING = "selects nothing"
IN_YAML = "selector:"

Problems = List[Dict[str, str]]


def resolve(task: Any, selectors: Mapping[str, str]) -> Tuple[Dict[str, List[str]], Problems]:
    """Names of selectors by unique_id, and what is wrong with the others."""
    matches: Dict[str, List[str]] = {}
    problems: Problems = []
    node_selector: Any = None
    ends_s = time.thread_time() + MAX_S
    for name, text in selectors.items():
        found: Set[str] = set()
        problem = NOTHING
        try:
            if time.thread_time() > ends_s:
                problem = f"was not tried: those before it took more than {MAX_S:g} s"
            else:
                node_selector = node_selector or _node_selector(task)
                found = node_selector.get_selected(_spec(task, node_selector, str(text)))
        except Exception as error:  # in dbt's words
            problem = " ".join(str(error).split()) or type(error).__name__
        for unique_id in found:
            matches.setdefault(str(unique_id), []).append(name)
        if not found:
            problems.append({"name": name, "problem": problem[:MAX_PROBLEM_CHARS]})
    return matches, problems


def _node_selector(task: Any) -> Any:
    """One that filters no resource types, over the task's graph or one like it."""
    from dbt.graph.selector import NodeSelector

    graph = task.graph if task.graph is not None else _graph(task.manifest)
    options: Dict[str, Any] = {}
    if "selectors" in inspect.signature(NodeSelector.__init__).parameters:  # dbt 1.12
        options["selectors"] = getattr(task.config, "selectors", None)
    return NodeSelector(graph, task.manifest, task.previous_state, **options)


def _graph(manifest: Any) -> Any:
    """For commands that have not made one."""
    from dbt.graph.graph import Graph

    networkx = importlib.import_module("networkx")  # dbt's own dependency
    graph = networkx.DiGraph()
    for name in COLLECTIONS:
        for unique_id, node in list((getattr(manifest, name, None) or {}).items()):
            graph.add_node(unique_id)
            graph.add_edges_from((parent, unique_id) for parent in upstream_of(node))
    return Graph(graph)


def _spec(task: Any, node_selector: Any, text: str) -> Any:
    """What dbt makes of `--select <text>`: a union of intersections. Raises on a bad method."""
    from dbt.graph.selector_spec import SelectionIntersection, SelectionUnion

    unions = [
        SelectionIntersection([_criteria(task, part) for part in word.split(",")])
        for word in text.split()
    ]
    if not unions:
        raise ValueError("is empty")
    spec = SelectionUnion(unions)
    _prepare(spec, node_selector)
    return spec


def _criteria(task: Any, part: str) -> Any:
    from dbt.graph.selector_spec import SelectionCriteria

    if part.startswith(IN_YAML):
        # Copied, as it is the project's own and `_prepare` writes into it.
        return copy.deepcopy(task.config.get_selector(part[len(IN_YAML) :]))
    return SelectionCriteria.from_single_spec(part)


def _prepare(spec: Any, node_selector: Any) -> None:
    """Tests come along; a method that dbt does not know raises now, where else it would say so
    on dbt's own log and select nothing."""
    from dbt.graph.selector_spec import IndirectSelection

    spec.indirect_selection = IndirectSelection.Eager
    components = getattr(spec, "components", None)
    if components is None:
        node_selector.get_method(spec.method, spec.method_arguments)
    for component in components or ():
        _prepare(component, node_selector)
