"""What part of a lineage graph a person means: a node, what is around it, one of its columns.

Layer 1, pure; works on `lineage_graph.Graph`. A name that fits several nodes is an error that
lists them: a graph of the wrong node would look right.
"""

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import msgspec

from dbtstream.errors import DbtstreamError
from dbtstream.lineage_graph import ColumnSource, Graph, NodeColumns, with_ephemeral

ALL = sys.maxsize
"""As a number of steps: however far it goes."""

MAX_LISTED = 10

_Key = TypeVar("_Key")


class NodeNotFound(DbtstreamError):
    def __init__(self, text: str, graph: Graph, candidates: Sequence[str]) -> None:
        self.text, self.candidates = text, candidates
        hint = f"; did you mean {_listed(candidates)}?" if candidates else ""
        super().__init__(
            f"no node, dataset or exposure {text!r} in the lineage of "
            f"{graph.project}/{graph.target}{hint}"
        )


class AmbiguousNode(DbtstreamError):
    def __init__(self, text: str, candidates: Sequence[str]) -> None:
        self.text, self.candidates = text, candidates
        super().__init__(
            f"{text!r} may be any of {len(candidates)}: {_listed(candidates)} "
            "(give one of these ids)"
        )


class ColumnNotFound(DbtstreamError):
    def __init__(self, node: str, column: str, columns: Sequence[str]) -> None:
        self.node, self.column, self.columns = node, column, columns
        known = f"it has {_listed(columns)}" if columns else "none of its columns is known"
        super().__init__(f"{node} has no column {column!r} that lineage knows of; {known}")


class ColumnId(NamedTuple):
    node: str
    column: str


class View(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be shown. `graph` holds just that; `up` and `down` are steps from `focus`, the
    node that it is about (null: all there is). `column` narrows it to the trace of one."""

    graph: Graph
    focus: str | None = None
    column: str | None = None
    up: int = ALL
    down: int = ALL
    with_columns: bool = False


def whole(graph: Graph, *, columns: bool = False) -> View:
    return View(graph=graph, with_columns=columns)


def around(
    graph: Graph, text: str, *, up: int = ALL, down: int = ALL, columns: bool = False
) -> View:
    """The view of a node, or, with `columns`, of `<node>.<column>`. Raises NodeNotFound,
    AmbiguousNode, ColumnNotFound."""
    try:
        node = find_node(graph, text)
    except NodeNotFound:
        if not columns or (found := _node_and_column(graph, text)) is None:
            raise
        return _around_column(graph, found, up, down)
    if node in graph.ephemeral:
        graph = with_ephemeral(graph, node)
    kept = reached(node, graph.upstream, up) | reached(node, graph.downstream, down)
    part = _part(graph, kept, graph.columns)
    return View(graph=part, focus=node, up=up, down=down, with_columns=columns)


def find_node(graph: Graph, text: str) -> str:
    """The id of the node of this unique_id, name, dataset, or end of one of them."""
    names = {id_: [node.name, node.dataset] for id_, node in graph.nodes.items()}
    names |= {id_: [event.name, None] for id_, event in graph.ephemeral.items()}
    if text in names:
        return text
    exact = [
        id_
        for id_, (name, dataset) in names.items()
        if text in (name, dataset)
        or (dataset and text == f"{graph.nodes[id_].namespace}/{dataset}")
    ]
    ends = [
        id_
        for id_, (_, dataset) in names.items()
        if f".{id_}".endswith(f".{text}") or (dataset or "").endswith(f".{text}")
    ]
    candidates = sorted(exact or ends)
    if len(candidates) > 1:
        raise AmbiguousNode(text, candidates)
    if not candidates:
        raise NodeNotFound(text, graph, _close(text, names))
    return candidates[0]


def reached(start: _Key, neighbours: Callable[[_Key], Iterable[_Key]], steps: int) -> set[_Key]:
    """`start` and what can be reached from it in so many steps."""
    found, edge = {start}, [start]
    while edge and steps > 0:
        edge = [near for one in edge for near in dict.fromkeys(neighbours(one))]
        edge = [near for near in dict.fromkeys(edge) if near not in found]
        found.update(edge)
        steps -= 1
    return found


# -- columns ---------------------------------------------------------------------------------


class ColumnTraces:
    """Column lineage of a whole graph, to be walked both ways."""

    def __init__(self, columns: Mapping[str, NodeColumns]) -> None:
        self._sources: dict[ColumnId, list[tuple[ColumnId, ColumnSource]]] = {}
        self._users: dict[ColumnId, list[tuple[ColumnId, ColumnSource]]] = {}
        spelled = {
            ColumnId(of.node, name.casefold()): ColumnId(of.node, name)
            for of in columns.values()
            for name in of.fields or ()
        }
        for of in columns.values():
            for name, sources in (of.fields or {}).items():
                column = ColumnId(of.node, name)
                self._sources.setdefault(column, [])
                for source in sources:
                    # Databases have one case for a column and SQL another.
                    folded = ColumnId(source.node, source.field.casefold())
                    read = spelled.get(folded) or ColumnId(source.node, source.field)
                    self._sources[column].append((read, source))
                    self._users.setdefault(read, []).append((column, source))
        self._known: dict[str, list[str]] = {}
        for column in dict.fromkeys([*self._sources, *self._users]):
            self._known.setdefault(column.node, []).append(column.column)

    def known(self, node: str) -> list[str]:
        """Columns of the node that it makes, or that somebody reads."""
        return self._known.get(node, [])

    def sources(self, column: ColumnId) -> list[tuple[ColumnId, ColumnSource]]:
        return self._sources.get(column, [])

    def users(self, column: ColumnId) -> list[tuple[ColumnId, ColumnSource]]:
        return self._users.get(column, [])


def _node_and_column(graph: Graph, text: str) -> tuple[str, str] | None:
    """Of `orders.amount`; the shortest column name whose rest is a node. Raises AmbiguousNode."""
    parts = text.split(".")
    for length in range(1, len(parts)):
        try:
            node = find_node(graph, ".".join(parts[:-length]))
        except NodeNotFound:
            continue
        return node, ".".join(parts[-length:])
    return None


def _around_column(graph: Graph, found: tuple[str, str], up: int, down: int) -> View:
    node, text = found
    traces = ColumnTraces(graph.columns)
    known = traces.known(node)
    fits = [c for c in known if c == text] or [c for c in known if c.casefold() == text.casefold()]
    if not fits:
        raise ColumnNotFound(node, text, known)
    column = ColumnId(node, fits[0])
    above = reached(column, lambda one: [read for read, _ in traces.sources(one)], up)
    below = reached(column, lambda one: [user for user, _ in traces.users(one)], down)
    narrow = {
        of.node: msgspec.structs.replace(
            of, fields=_only(of, traces, above, below), dataset_inputs=None
        )
        for of in graph.columns.values()
    }
    nodes = {one.node for one in above | below}
    return View(
        graph=_part(graph, nodes, narrow),
        focus=node,
        column=column.column,
        up=up,
        down=down,
        with_columns=True,
    )


def _only(
    of: NodeColumns, traces: ColumnTraces, above: set[ColumnId], below: set[ColumnId]
) -> dict[str, list[ColumnSource]] | None:
    """Of a node's columns those of the trace; of their sources those, too."""
    fields: dict[str, list[ColumnSource]] = {}
    for name in of.fields or ():
        column = ColumnId(of.node, name)
        for reached_ones in (above, below):
            if column in reached_ones:
                kept = [source for read, source in traces.sources(column) if read in reached_ones]
                known = fields.setdefault(name, [])
                known += (source for source in kept if source not in known)
    return None if of.fields is None else fields


def _part(graph: Graph, kept: set[str], columns: Mapping[str, NodeColumns]) -> Graph:
    return Graph(
        project=graph.project,
        target=graph.target,
        nodes={id_: node for id_, node in graph.nodes.items() if id_ in kept},
        edges=[e for e in graph.edges if e.upstream in kept and e.downstream in kept],
        columns={id_: of for id_, of in columns.items() if id_ in kept},
    )


def _close(text: str, names: Mapping[str, Sequence[str | None]]) -> list[str]:
    """Ids of nodes that are called nearly so."""
    by_name: dict[str, str] = {}
    for id_, (name, dataset) in names.items():
        by_name |= {word.casefold(): id_ for word in (name, dataset, id_) if word}
    near = difflib.get_close_matches(text.casefold(), by_name, n=3)
    return list(dict.fromkeys(by_name[word] for word in near))


def _listed(items: Sequence[str]) -> str:
    more = len(items) - MAX_LISTED
    return ", ".join(items[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
