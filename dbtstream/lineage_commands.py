"""What `dbtstream lineage` does; `cli_lineage` reads its words.

As `commands`: it prints to the terminal and returns the exit code; errors rise to `cli.main`. It
asks NATS through `client` alone, and no daemon.
"""

import sys
from collections.abc import Callable

import msgspec

from dbtstream.commands import connect, say
from dbtstream.config import NatsConfig
from dbtstream.lineage_drawings import dot_lines, mermaid_lines
from dbtstream.lineage_find import ALL, View, around, whole
from dbtstream.lineage_graph import Graph
from dbtstream.lineage_views import json_text, tree_lines

FORMATS: dict[str, Callable[[View], list[str]]] = {
    "tree": tree_lines,
    "json": lambda view: [json_text(view)],
    "mermaid": mermaid_lines,
    "dot": dot_lines,
}


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What part of the graph. Of a node, without `up` and `down`, everything on both sides."""

    project: str
    target: str | None = None
    node: str | None = None
    up: int | None = None
    down: int | None = None
    columns: bool = False


async def lineage(nats: NatsConfig, wanted: Wanted, *, as_format: str) -> int:
    async with connect(nats) as client:
        graph = await client.lineage(wanted.project, wanted.target)
    if graph.unreadable:
        count, first = len(graph.unreadable), graph.unreadable[0]
        sys.stderr.write(f"dbtstream: {count} of the stored events cannot be read: {first}\n")
    say("\n".join(FORMATS[as_format](_view(graph, wanted))))
    return 0


def _view(graph: Graph, wanted: Wanted) -> View:
    if wanted.node is None:
        return whole(graph, columns=wanted.columns)
    both = wanted.up is None and wanted.down is None
    return around(
        graph,
        wanted.node,
        up=ALL if both else wanted.up or 0,
        down=ALL if both else wanted.down or 0,
        columns=wanted.columns,
    )
