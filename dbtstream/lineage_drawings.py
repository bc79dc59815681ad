"""A part of a lineage graph as a drawing: the text that Mermaid or Graphviz makes one of.

Layer 1, pure; beside `lineage_views`. Both languages get ids of ours (n0, n1 …) and the names in
labels, where every character that could mean something to them is written as its number.
"""

from collections.abc import Iterator
from typing import NamedTuple

from dbtstream.lineage_find import ColumnId, ColumnTraces, View
from dbtstream.lineage_graph import GraphNode
from dbtstream.lineage_views import Labels, edge_note, transformed

_MERMAID_SHAPES = {"source": ("[(", ")]"), "dataset": ("[(", ")]"), "exposure": ("([", "])")}
_DOT_SHAPES = {"source": "cylinder", "dataset": "cylinder", "exposure": "ellipse"}


class _Box(NamedTuple):
    """`columns`: their names, with ids; none where they are not asked for, or not known."""

    id: str
    node: GraphNode
    lines: list[str]
    columns: dict[str, str]


class _Arrow(NamedTuple):
    upstream: str
    downstream: str
    note: str
    is_dashed: bool


def mermaid_lines(view: View) -> list[str]:
    boxes, arrows = _drawing(view)
    return ["flowchart LR", *_mermaid_boxes(boxes), *map(_mermaid_arrow, arrows)]


def dot_lines(view: View) -> list[str]:
    boxes, arrows = _drawing(view)
    head = ["digraph lineage {", "  rankdir=LR;", "  node [shape=box];"]
    return [*head, *_dot_boxes(boxes), *map(_dot_arrow, arrows), "}"]


def _drawing(view: View) -> tuple[list[_Box], list[_Arrow]]:
    graph, labels = view.graph, Labels(view.graph)
    traces = ColumnTraces(graph.columns if view.with_columns else {})
    boxes: dict[str, _Box] = {}
    ids: dict[ColumnId, str] = {}
    for number, node in enumerate(graph.nodes.values()):
        lines = [f"{node.resource_type} {labels.of(node.id)}"]
        if node.dataset is not None and node.unique_id is not None:
            lines.append(node.dataset)
        columns = {name: f"n{number}c{place}" for place, name in enumerate(traces.known(node.id))}
        ids |= {ColumnId(node.id, name): id_ for name, id_ in columns.items()}
        boxes[node.id] = _Box(f"n{number}", node, lines, columns)
    arrows: list[_Arrow] = []
    drawn: set[tuple[str, str]] = set()
    for column, id_ in ids.items():
        for read, source in traces.sources(column):
            if read in ids:  # of a node that is shown
                arrows.append(_Arrow(ids[read], id_, transformed(source.transformations), False))
                drawn.add((read.node, column.node))
    for edge in graph.edges:
        if (edge.upstream, edge.downstream) not in drawn:
            ends = boxes[edge.upstream].id, boxes[edge.downstream].id
            dashed = edge.deferred or edge.origin != "manifest"
            arrows.append(_Arrow(*ends, edge_note(edge), dashed))
    return list(boxes.values()), arrows


# -- Mermaid ---------------------------------------------------------------------------------


def _mermaid_boxes(boxes: list[_Box]) -> Iterator[str]:
    for box in boxes:
        text = "<br/>".join(map(_mermaid_text, box.lines))
        if not box.columns:
            begin, end = _MERMAID_SHAPES.get(box.node.resource_type, ("[", "]"))
            yield f'  {box.id}{begin}"{text}"{end}'
            continue
        yield f'  subgraph {box.id}["{text}"]'
        yield from (f'    {id_}["{_mermaid_text(name)}"]' for name, id_ in box.columns.items())
        yield "  end"


def _mermaid_arrow(arrow: _Arrow) -> str:
    line = "-.->" if arrow.is_dashed else "-->"
    note = f'|"{_mermaid_text(arrow.note)}"|' if arrow.note else ""
    return f"  {arrow.upstream} {line}{note} {arrow.downstream}"


def _mermaid_text(text: str) -> str:
    """All but letters and digits as entities: quotes end a label, a backtick makes it Markdown, and
    a colon before an entity (`style:#34;`) is taken for a style (mermaid 11)."""
    shown = (c if c.isprintable() else " " for c in text)
    return "".join(c if c.isalnum() or c in " _.-" else f"#{ord(c)};" for c in shown)


# -- Graphviz --------------------------------------------------------------------------------


def _dot_boxes(boxes: list[_Box]) -> Iterator[str]:
    for box in boxes:
        text = "\\n".join(map(_dot_text, box.lines))
        shape = _DOT_SHAPES.get(box.node.resource_type)
        style = f", shape={shape}" if shape else ""
        if not box.columns:
            yield f'  {box.id} [label="{text}"{style}];'
            continue
        # Arrows need a node to go to: what names the dataset is one, beside its columns.
        yield f"  subgraph cluster_{box.id} {{"
        yield f'    {box.id} [label="{text}", shape=plaintext];'
        yield from (f'    {id_} [label="{_dot_text(name)}"];' for name, id_ in box.columns.items())
        yield "  }"


def _dot_arrow(arrow: _Arrow) -> str:
    words = [f'label="{_dot_text(arrow.note)}"'] if arrow.note else []
    words += ["style=dashed"] if arrow.is_dashed else []
    return (
        f"  {arrow.upstream} -> {arrow.downstream}" + f" [{', '.join(words)}]" * bool(words) + ";"
    )


def _dot_text(text: str) -> str:
    """Graphviz reads \\N and &amp; in labels, too."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    return shown.replace("\\", "\\\\").replace('"', '\\"').replace("&", "&amp;")
