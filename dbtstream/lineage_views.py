"""A part of a lineage graph as text: a tree for a terminal, JSON, Mermaid or DOT.

Layer 1, pure. Takes a `lineage_find.View`, gives lines. Names of tables may have anything in them:
here it is made harmless for the one who reads it, a terminal, Mermaid's parser or Graphviz.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import msgspec

from dbtstream.lineage_events import FieldTransformation
from dbtstream.lineage_find import ALL, ColumnId, ColumnTraces, View
from dbtstream.lineage_graph import ColumnSource, Graph, GraphEdge, GraphNode, NodeColumns

RESOURCE_TYPES = ("model", "seed", "snapshot", "source", "exposure")

COMPILED = ("model", "snapshot")
"""Resource types that have SQL, and so a status of their columns worth a word."""

_Key = TypeVar("_Key")


class Focus(msgspec.Struct, frozen=True, kw_only=True):
    node: str
    column: str | None = None


class LineageDocument(msgspec.Struct, frozen=True, kw_only=True):
    """What `dbtstream lineage --format json` prints. `columns` is null unless asked for; then it
    has an entry for each node, whose `fields` are null where its `status` says why."""

    project: str
    target: str
    focus: Focus | None
    nodes: list[GraphNode]
    edges: list[GraphEdge]
    columns: list[NodeColumns] | None


def json_text(view: View) -> str:
    graph = view.graph
    document = LineageDocument(
        project=graph.project,
        target=graph.target,
        focus=None if view.focus is None else Focus(node=view.focus, column=view.column),
        nodes=list(graph.nodes.values()),
        edges=graph.edges,
        columns=list(graph.columns.values()) if view.with_columns else None,
    )
    return msgspec.json.encode(document).decode()


def printable(text: str) -> str:
    """Nothing in a name reaches the terminal as a control character."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Labels:
    """What nodes are called in a picture: as short as it goes without two being alike."""

    def __init__(self, graph: Graph) -> None:
        self._nodes = graph.nodes
        kinds = ((node.resource_type, short_id(node.id)) for node in graph.nodes.values())
        self._counts = Counter(kinds)

    def of(self, id_: str) -> str:
        """Also of a node that is not in the picture."""
        node, short = self._nodes.get(id_), short_id(id_)
        return short if node is None or self._counts[node.resource_type, short] == 1 else id_


def short_id(id_: str) -> str:
    """raw.orders of source.shop.raw.orders; orders.v2 of model.shop.orders.v2."""
    parts = id_.split(".", 2)
    return parts[2] if len(parts) == 3 and parts[0] in RESOURCE_TYPES else id_


def transformed(transformations: Sequence[FieldTransformation]) -> str:
    """`aggregation`; nothing of a column that is taken as it is."""
    words = [(t.subtype or t.type).lower() + ", masked" * t.masking for t in transformations]
    return ", ".join(dict.fromkeys(word for word in words if word != "identity"))


def edge_note(edge: GraphEdge) -> str:
    notes = [f"via {', '.join(map(short_id, edge.via_ephemeral))}"] if edge.via_ephemeral else []
    if edge.deferred:
        notes.append("deferred")
    if edge.origin != "manifest":
        notes.append(f"by {edge.origin}")
    return "; ".join(notes)


# -- tree ------------------------------------------------------------------------------------


def tree_lines(view: View) -> list[str]:
    """What has been shown with all that is below it is `(above)` when it comes again."""
    if view.column is not None and view.focus is not None:
        return _column_tree(view, ColumnId(view.focus, view.column))
    return _NodeTree(view).lines()


class _NodeTree:
    def __init__(self, view: View) -> None:
        self._view = view
        self._graph = view.graph
        self._labels = Labels(view.graph)

    def lines(self) -> list[str]:
        focus = self._view.focus
        if focus is None:
            return self._whole()
        lines = [self._line(focus), *self._details(focus, "")]
        for word, neighbours, steps in (
            ("upstream", self._upstream, self._view.up),
            ("downstream", self._downstream, self._view.down),
        ):
            if steps > 0 and neighbours(focus):
                lines.append(word)
                lines += _branches(focus, neighbours, self._line, self._details, steps, {focus})
        return lines

    def _whole(self) -> list[str]:
        """From what nothing feeds down to what nothing reads."""
        graph = self._graph
        lines: list[str] = []
        shown: set[str] = set()
        # First the nodes without inputs. What is left then is in a circle, or below one.
        for id_ in sorted(graph.nodes, key=lambda id_: bool(graph.inputs.get(id_))):
            if id_ in shown:
                continue
            shown.add(id_)
            lines += [self._line(id_), *self._details(id_, "")]
            lines += _branches(id_, self._downstream, self._line, self._details, ALL, shown)
        return lines

    def _upstream(self, id_: str) -> list[tuple[str, str]]:
        edges = self._graph.inputs.get(id_, ())
        return [(edge.upstream, edge_note(edge)) for edge in edges]

    def _downstream(self, id_: str) -> list[tuple[str, str]]:
        edges = self._graph.readers.get(id_, ())
        return [(edge.downstream, edge_note(edge)) for edge in edges]

    def _line(self, id_: str) -> str:
        node = self._graph.nodes[id_]
        made = node.materialized if node.materialized != node.resource_type else None
        words = [f"{node.resource_type} {self._labels.of(id_)}" + f" ({made})" * bool(made)]
        if node.dataset is not None and node.unique_id is not None:
            words.append(node.dataset)
        if node.resource_type in COMPILED and node.column_lineage_status is not None:
            words.append(f"columns {node.column_lineage_status.replace('_', ' ')}")
        return printable("  ".join(words))

    def _details(self, id_: str, prefix: str) -> Iterator[str]:
        of = self._graph.columns.get(id_)
        if of is None or not self._view.with_columns:
            return
        if of.message:
            yield prefix + printable(f"  · {of.message}")
        is_made = self._graph.nodes[id_].resource_type in COMPILED
        for name, sources in (of.fields or {}).items():
            made_from = f" ← {self._sources(sources)}" if is_made or sources else ""
            yield prefix + printable(f"  · {name}{made_from}")
        if of.dataset_inputs:
            yield prefix + printable(f"  · rows ← {self._sources(of.dataset_inputs)}")

    def _sources(self, sources: Iterable[ColumnSource]) -> str:
        words = []
        for source in sources:
            how = transformed(source.transformations)
            words.append(f"{self._labels.of(source.node)}.{source.field}" + f" ({how})" * bool(how))
        return ", ".join(words) or "no column"


def _column_tree(view: View, focus: ColumnId) -> list[str]:
    labels = Labels(view.graph)
    traces = ColumnTraces(view.graph.columns)

    def line(column: ColumnId) -> str:
        return printable(f"{labels.of(column.node)}.{column.column}")

    def sources(column: ColumnId) -> list[tuple[ColumnId, str]]:
        return [(read, transformed(by.transformations)) for read, by in traces.sources(column)]

    def users(column: ColumnId) -> list[tuple[ColumnId, str]]:
        return [(user, transformed(by.transformations)) for user, by in traces.users(column)]

    lines = [line(focus)]
    for word, neighbours, steps in (
        ("upstream", sources, view.up),
        ("downstream", users, view.down),
    ):
        if steps > 0 and neighbours(focus):
            lines.append(word)
            lines += _branches(focus, neighbours, line, lambda _one, _prefix: (), steps, {focus})
    return lines


def _branches(
    root: _Key,
    neighbours: Callable[[_Key], list[tuple[_Key, str]]],
    line: Callable[[_Key], str],
    details: Callable[[_Key, str], Iterable[str]],
    steps: int,
    shown: set[_Key],
) -> Iterator[str]:
    """All that is below `root`, whose own line is printed, each only once with what is below it.

    `shown` grows. By hand and not by recursion: a chain of a thousand models is no error.
    """
    stack = [(key, note, "", n == 0, 1) for n, (key, note) in enumerate(neighbours(root)[::-1])]
    while stack:
        key, note, prefix, is_last, depth = stack.pop()
        below = neighbours(key) if depth < steps else []
        again = key in shown
        words = [
            line(key),
            f"[{printable(note)}]" * bool(note),
            "(above)" * (again and bool(below)),
        ]
        yield prefix + ("└─ " if is_last else "├─ ") + "  ".join(filter(None, words))
        if again:
            continue
        if below or depth < steps:
            shown.add(key)
        prefix += "   " if is_last else "│  "
        yield from details(key, prefix + ("│" if below else " "))
        stack += (
            (near, how, prefix, n == 0, depth + 1) for n, (near, how) in enumerate(below[::-1])
        )
