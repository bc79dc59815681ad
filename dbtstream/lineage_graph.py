"""The current graph of a project and target, made of the last lineage events of its nodes.

Layer 1, pure. `lineage_bucket` reads the events, `lineage_find` finds what a person means and cuts
the part around it, `lineage_views` prints it. Of a node's two last events the later one says what
it reads; columns are the observed one's, as the manifest knows none.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TypeVar

import msgspec

from dbtstream.lineage_events import (
    FieldInput,
    FieldTransformation,
    Lineage,
    LineageDeclared,
    LineageInput,
    LineageObserved,
)
from dbtstream.statuses import ColumnLineageStatus

_Event = TypeVar("_Event", bound=Lineage)


class GraphNode(msgspec.Struct, frozen=True, kw_only=True):
    """`id` is the unique_id; of a dataset that no node of the project makes, its namespace and
    name with a slash between, and then `resource_type` is `dataset`."""

    id: str
    unique_id: str | None = None
    resource_type: str
    name: str
    package_name: str | None = None
    namespace: str | None = None  # with `dataset`: null of exposures, and of ephemeral models
    dataset: str | None = None
    relation_name: str | None = None
    materialized: str | None = None
    group: str | None = None
    owners: list[str] = []
    column_lineage_status: ColumnLineageStatus | None = None
    declared_at: datetime | None = None
    observed_at: datetime | None = None


class GraphEdge(msgspec.Struct, frozen=True, kw_only=True):
    """Between ids of nodes; the words of `LineageInput`."""

    upstream: str
    downstream: str
    via_ephemeral: list[str] = []
    deferred: bool = False
    origin: str = "manifest"


class ColumnSource(msgspec.Struct, frozen=True, kw_only=True):
    """A column that another one was made from, or that decides about rows."""

    node: str
    field: str
    transformations: list[FieldTransformation] = []


class NodeColumns(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a node's columns; `fields` is null where `status` says why."""

    node: str
    status: ColumnLineageStatus
    message: str | None = None
    schema_source: str | None = None
    parser: str | None = None
    fields: dict[str, list[ColumnSource]] | None = None
    dataset_inputs: list[ColumnSource] | None = None


class Graph(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """`dict`: for the cached neighbours. A cycle in it does no harm.

    Ephemeral models are not among the nodes, as they make no dataset; `ephemeral` has their
    declarations, for those who ask for one by name (`with_ephemeral`). `unreadable` has a sentence
    about each stored event that is not in it.
    """

    project: str
    target: str
    nodes: dict[str, GraphNode]
    edges: list[GraphEdge]
    columns: dict[str, NodeColumns]
    ephemeral: dict[str, LineageDeclared] = {}
    unreadable: list[str] = []

    @cached_property
    def inputs(self) -> Mapping[str, Sequence[GraphEdge]]:
        """By the id of the node that reads."""
        return _grouped((edge.downstream, edge) for edge in self.edges)

    @cached_property
    def readers(self) -> Mapping[str, Sequence[GraphEdge]]:
        """By the id of the node that is read."""
        return _grouped((edge.upstream, edge) for edge in self.edges)

    def upstream(self, node: str) -> list[str]:
        return [edge.upstream for edge in self.inputs.get(node, ())]

    def downstream(self, node: str) -> list[str]:
        return [edge.downstream for edge in self.readers.get(node, ())]


def build_graph(
    project: str,
    target: str,
    declared: Iterable[LineageDeclared],
    observed: Iterable[LineageObserved],
    unreadable: Sequence[str] = (),
) -> Graph:
    """Of several events of one node, the last one counts."""
    declarations = _last_of_each(declared)
    observations = _last_of_each(observed)
    ephemeral = {
        unique_id: event
        for unique_id, event in declarations.items()
        if event.materialized == "ephemeral"
    }
    ids = sorted((declarations.keys() | observations.keys()) - ephemeral.keys())
    nodes = {id_: _node(declarations.get(id_), observations.get(id_)) for id_ in ids}
    names = _Names(nodes)
    edges: list[GraphEdge] = []
    for id_ in ids:
        newest = _newest(declarations.get(id_), observations.get(id_))
        edges += (names.edge(item, id_) for item in newest.inputs)
    columns = {id_: names.columns(id_, observations.get(id_) or declarations[id_]) for id_ in ids}
    return Graph(
        project=project,
        target=target,
        nodes={**nodes, **names.others},
        edges=_sorted(edges),
        columns=columns,
        ephemeral=ephemeral,
        unreadable=list(unreadable),
    )


def with_ephemeral(graph: Graph, unique_id: str) -> Graph:
    """The graph with this ephemeral model as a node, in the middle of the edges through it."""
    event = graph.ephemeral[unique_id]
    names = _Names(graph.nodes)
    through = [edge for edge in graph.edges if unique_id in edge.via_ephemeral]
    others = [edge for edge in graph.edges if unique_id not in edge.via_ephemeral]
    readers = {edge.downstream for edge in through}
    edges = [names.edge(item, unique_id) for item in event.inputs]
    edges += (GraphEdge(upstream=unique_id, downstream=reader) for reader in readers)
    return Graph(
        project=graph.project,
        target=graph.target,
        nodes={**graph.nodes, unique_id: _node(event, None), **names.others},
        edges=_sorted([*others, *edges]),
        columns=graph.columns,
    )


class _Names:
    """From what an event says of an input to the id of a node; `others` collects those that are
    no node's: datasets of elsewhere, and nodes whose own events are missing."""

    def __init__(self, nodes: Mapping[str, GraphNode]) -> None:
        self._nodes = nodes
        self.others: dict[str, GraphNode] = {}
        self._makers: dict[tuple[str | None, str | None], str] = {}
        # A source may be another name for what a model makes; then the model counts.
        for node in sorted(nodes.values(), key=lambda node: node.resource_type != "source"):
            if node.dataset is not None:
                self._makers[node.namespace, node.dataset] = node.id

    def edge(self, item: LineageInput, downstream: str) -> GraphEdge:
        return GraphEdge(
            upstream=self._id(item, item.resource_type, item.relation_name),
            downstream=downstream,
            via_ephemeral=item.via_ephemeral,
            deferred=item.deferred,
            origin=item.origin,
        )

    def columns(self, id_: str, event: Lineage) -> NodeColumns:
        fields = event.fields
        return NodeColumns(
            node=id_,
            status=event.column_lineage_status,
            message=event.column_lineage_message,
            schema_source=event.schema_source,
            parser=event.parser,
            fields=None
            if fields is None
            else {name: self._sources(field.inputs) for name, field in fields.items()},
            dataset_inputs=None
            if event.dataset_inputs is None
            else self._sources(event.dataset_inputs),
        )

    def _sources(self, items: Iterable[FieldInput]) -> list[ColumnSource]:
        return [
            ColumnSource(
                node=self._id(item, None, None),
                field=item.field,
                transformations=item.transformations,
            )
            for item in items
        ]

    def _id(
        self,
        item: LineageInput | FieldInput,
        resource_type: str | None,
        relation_name: str | None,
    ) -> str:
        id_ = item.unique_id or self._makers.get((item.namespace, item.name))
        if id_ is None:
            id_ = f"{item.namespace}/{item.name}"
        if id_ not in self._nodes and id_ not in self.others:
            self.others[id_] = GraphNode(
                id=id_,
                unique_id=item.unique_id,
                resource_type=resource_type or (id_.split(".")[0] if item.unique_id else "dataset"),
                name=item.unique_id.rpartition(".")[2] if item.unique_id else item.name,
                namespace=item.namespace,
                dataset=item.name,
                relation_name=relation_name,
            )
        return id_


def _node(declared: LineageDeclared | None, observed: LineageObserved | None) -> GraphNode:
    newest = _newest(declared, observed)
    output = newest.outputs[0] if newest.outputs else None
    columns = observed or declared
    return GraphNode(
        id=newest.unique_id,
        unique_id=newest.unique_id,
        resource_type=newest.resource_type,
        name=newest.name,
        package_name=newest.package_name,
        namespace=output.namespace if output else None,
        dataset=output.name if output else None,
        relation_name=output.relation_name if output else None,
        materialized=declared.materialized if declared else None,
        group=declared.group if declared else None,
        owners=declared.owners if declared else [],
        column_lineage_status=columns.column_lineage_status if columns else None,
        declared_at=declared.time if declared else None,
        observed_at=observed.time if observed else None,
    )


def _newest(declared: LineageDeclared | None, observed: LineageObserved | None) -> Lineage:
    events = [event for event in (declared, observed) if event is not None]
    return max(events, key=lambda event: event.time)


def _last_of_each(events: Iterable[_Event]) -> dict[str, _Event]:
    last: dict[str, _Event] = {}
    for event in events:
        known = last.get(event.unique_id)
        if known is None or (known.time, known.seq) <= (event.time, event.seq):
            last[event.unique_id] = event
    return last


def _sorted(edges: Iterable[GraphEdge]) -> list[GraphEdge]:
    """One between any two nodes, in an order that does not hang on that of the events."""
    unique = {(edge.downstream, edge.upstream): edge for edge in edges}
    return [unique[ends] for ends in sorted(unique)]


def _grouped(pairs: Iterable[tuple[str, GraphEdge]]) -> dict[str, list[GraphEdge]]:
    groups: dict[str, list[GraphEdge]] = {}
    for id_, edge in pairs:
        groups.setdefault(id_, []).append(edge)
    return groups
