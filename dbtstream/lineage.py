"""What flows into what: a manifest's nodes as datasets and the edges between them. Pure.

Layer 1. `asset_events` fills a `ProjectGraph` with what dbt's process tells of the manifest; it
answers with the fields of `lineage.declared`, `lineage.observed` and `lineage.changed`. Models
without a relation (ephemeral ones), metrics, semantic models and saved queries are no datasets:
an edge goes through them, to what lies behind.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from dbtstream.column_lineage import Analysis, ColumnRef
from dbtstream.datasets import Datasets
from dbtstream.event_base import Relation
from dbtstream.frames import PlannedNode
from dbtstream.lineage_events import (
    MAX_LISTED,
    Column,
    ColumnChange,
    ContractChange,
    Edge,
    ExposureRef,
    FieldInput,
    FieldLineage,
    Identity,
    LineageDeclared,
    LineageInput,
    LineageOutput,
    NodeChange,
    OwnersChange,
)
from dbtstream.node_options import NodeOptions, read_options
from dbtstream.statuses import ColumnLineageStatus

LINEAGE_TYPES = frozenset({"model", "seed", "snapshot", "source", "exposure"})

Facts = dict[str, Any]
"""The fields of an event beyond its envelope."""

_encoder = msgspec.json.Encoder(order="deterministic")


class ProjectGraph:
    """The nodes of a manifest, or those of them that have been told."""

    def __init__(self, datasets: Datasets) -> None:
        self.nodes: dict[str, PlannedNode] = {}
        self.problems: list[str] = []  # of nodes' own options, for the project's people
        self._datasets = datasets
        self._identities: dict[str, Identity | None] = {}
        self._options: dict[str, NodeOptions] = {}
        self._exposures: dict[str, list[ExposureRef]] | None = None

    def add(self, nodes: Iterable[PlannedNode]) -> None:
        """Each node once: a second telling of it is left out."""
        for node in nodes:
            if node.unique_id not in self.nodes:
                self.nodes[node.unique_id] = node
                options, problems = read_options(node.meta, node.unique_id)
                self._options[node.unique_id] = options
                self.problems += problems
        self._exposures = None

    def identity(self, unique_id: str) -> Identity | None:
        """The node's dataset; None where it has none."""
        if unique_id not in self._identities:
            node = self.nodes.get(unique_id)
            self._identities[unique_id] = None if node is None else self._datasets.identity(node)
        return self._identities[unique_id]

    def options(self, unique_id: str) -> NodeOptions:
        return self._options.get(unique_id) or NodeOptions()

    def lineage_nodes(self) -> Iterator[PlannedNode]:
        """Of whom lineage is told."""
        for unique_id, node in self.nodes.items():
            options = self._options[unique_id]
            if node.resource_type in LINEAGE_TYPES and options.emit and options.lineage:
                yield node

    def inputs(self, unique_id: str, deferred: frozenset[str] = frozenset()) -> list[LineageInput]:
        """What the node reads, in the manifest's order, ephemeral models collapsed; then what its
        meta adds. `deferred` are unique_ids that were read where --defer pointed."""
        found: dict[str, list[str]] = {}
        node = self.nodes[unique_id]
        self._collect(node.upstream, [], found, {unique_id})
        inputs = [self._input(name, via, deferred) for name, via in found.items()]
        return inputs + list(self._declared_upstreams(node, found))

    def outputs(self, unique_id: str) -> list[LineageOutput]:
        identity = self.identity(unique_id)
        if identity is None:
            return []
        return [
            LineageOutput(
                namespace=identity.namespace,
                name=identity.name,
                unique_id=unique_id,
                relation_name=identity.relation_name,
            )
        ]

    def exposures(self, unique_id: str) -> list[ExposureRef]:
        """Those that read the node's dataset."""
        if self._exposures is None:
            self._exposures = self._sinks()
        return self._exposures.get(unique_id, [])

    def deferred_in(self, unique_id: str, code: str) -> frozenset[str]:
        """Which upstreams the compiled SQL reads where --defer points, and not here."""
        found: dict[str, list[str]] = {}
        self._collect(self.nodes[unique_id].upstream, [], found, {unique_id})
        return frozenset(
            name
            for name in found
            if (there := self.nodes[name].deferred) is not None
            and there.relation_name
            and there.relation_name in code
            and (here := self.identity(name)) is not None
            and (here.relation_name or "") not in code
        )

    def declared(self, node: PlannedNode) -> Facts:
        """The fields of the node's `lineage.declared`."""
        unique_id = node.unique_id
        inputs, outputs = self.inputs(unique_id), self.outputs(unique_id)
        return {
            **_about(node),
            "inputs": inputs,
            "outputs": outputs,
            "column_lineage_status": ColumnLineageStatus.NOT_COMPILED,
            "lineage_hash": lineage_hash(inputs, outputs, None, None),
            "exposures": self.exposures(unique_id),
            "owners": node.owners,
            "group": node.group,
            "materialized": node.materialized,
            "checksum": node.checksum,
            "columns": documented(node),
            "contract_enforced": node.contract_enforced,
        }

    def observed(
        self,
        unique_id: str,
        analysis: Analysis,
        deferred: frozenset[str],
        schema_source: str | None,
    ) -> Facts:
        """The fields of the node's `lineage.observed`, but the hash of its code."""
        inputs, outputs = self.inputs(unique_id, deferred), self.outputs(unique_id)
        fields = dataset_inputs = None
        if analysis.fields is not None:
            fields = {
                column: FieldLineage(inputs=self._columns(refs, deferred))
                for column, refs in analysis.fields.items()
            }
        if analysis.dataset_inputs is not None:
            dataset_inputs = self._columns(analysis.dataset_inputs, deferred)
        return {
            **_about(self.nodes[unique_id]),
            "inputs": inputs,
            "outputs": outputs,
            "fields": fields,
            "dataset_inputs": dataset_inputs,
            "column_lineage_status": analysis.status,
            "column_lineage_message": analysis.message,
            "parser": analysis.parser,
            "schema_source": schema_source,
            "lineage_hash": lineage_hash(inputs, outputs, fields, dataset_inputs),
            "exposures": self.exposures(unique_id),
        }

    def _collect(
        self, upstream: Iterable[str], via: list[str], found: dict[str, list[str]], seen: set[str]
    ) -> None:
        """Datasets behind `upstream`. Nearer ones first, so that a direct edge has no `via`."""
        behind = []
        for name in upstream:
            node = self.nodes.get(name)
            if node is None or name in seen:
                continue
            if self.identity(name) is not None:
                found.setdefault(name, via)
            else:
                seen.add(name)
                behind.append(node)
        for node in behind:
            is_model = node.resource_type == "model"
            self._collect(node.upstream, [*via, node.unique_id] if is_model else via, found, seen)

    def _input(self, unique_id: str, via: list[str], deferred: frozenset[str]) -> LineageInput:
        node = self.nodes[unique_id]
        is_deferred = unique_id in deferred
        identity = self._where_read(unique_id, is_deferred)
        return LineageInput(
            namespace=identity.namespace,
            name=identity.name,
            unique_id=unique_id,
            resource_type=node.resource_type,
            relation_name=identity.relation_name,
            via_ephemeral=via,
            deferred=is_deferred,
        )

    def _where_read(self, unique_id: str, is_deferred: bool) -> Identity:
        node = self.nodes[unique_id]
        there = self._datasets.identity(node, node.deferred) if is_deferred else None
        identity = there or self.identity(unique_id)
        assert identity is not None  # noqa: S101  # only datasets are collected
        return identity

    def _declared_upstreams(
        self, node: PlannedNode, found: Mapping[str, Any]
    ) -> Iterator[LineageInput]:
        for upstream in self.options(node.unique_id).upstream:
            if not isinstance(upstream, str):
                yield LineageInput(namespace=upstream.namespace, name=upstream.name, origin="meta")
            elif upstream not in found and self.identity(upstream) is not None:
                told = self._input(upstream, [], frozenset())
                yield msgspec.structs.replace(told, origin="meta")

    def _columns(self, refs: Iterable[ColumnRef], deferred: frozenset[str]) -> list[FieldInput]:
        return [self._column(ref, deferred) for ref in refs]

    def _column(self, ref: ColumnRef, deferred: frozenset[str]) -> FieldInput:
        if ref.ref is not None:
            identity = self._where_read(ref.ref, ref.ref in deferred)
            namespace, name = identity.namespace, identity.name
        else:  # a table that the manifest does not name
            namespace, name = self._datasets.of_relation(_parsed(ref.relation_name or ""))
        return FieldInput(
            namespace=namespace,
            name=name,
            field=ref.field,
            unique_id=ref.ref,
            transformations=ref.transformations,
        )

    def _sinks(self) -> dict[str, list[ExposureRef]]:
        sinks: dict[str, list[ExposureRef]] = defaultdict(list)
        for unique_id, node in self.nodes.items():
            if node.resource_type != "exposure":
                continue
            details = node.exposure
            sink = ExposureRef(
                unique_id=unique_id,
                name=node.name,
                type=details.type if details else None,
                url=details.url if details else None,
                maturity=details.maturity if details else None,
                owners=node.owners,
            )
            for given in self.inputs(unique_id):
                if given.unique_id is not None:
                    sinks[given.unique_id].append(sink)
        return sinks


_PART = re.compile(r'"((?:[^"]|"")*)"|`([^`]*)`|\[([^\]]*)\]|([^.]+)')


def _parsed(text: str) -> Relation:
    """`"shop"."main"."orders"`, as SQL has it, with the quotes of any dialect."""
    parts = [next(filter(None, found), "").replace('""', '"') for found in _PART.findall(text)]
    database, schema, identifier = ([None] * 3 + parts)[-3:]
    return Relation(database=database, schema=schema, identifier=identifier, relation_name=text)


def lineage_hash(
    inputs: list[LineageInput],
    outputs: list[LineageOutput],
    fields: Mapping[str, FieldLineage] | None,
    dataset_inputs: list[FieldInput] | None,
) -> str:
    """SHA-256 over what a `lineage` event says of datasets and columns."""
    told = _encoder.encode((inputs, outputs, fields, dataset_inputs))
    return hashlib.sha256(told).hexdigest()


def documented(node: PlannedNode) -> list[Column] | None:
    """The columns that the project's YAML names."""
    return [
        Column(name=c.name, type=c.data_type, description=c.description, tags=[*c.tags])
        for c in node.columns
    ] or None


def changed(old: Mapping[str, LineageDeclared], new: Mapping[str, Facts]) -> Facts:
    """The lists and counts of `lineage.changed` between two manifests."""
    lists: dict[str, list[Any]] = {
        "nodes_added": sorted(new.keys() - old.keys()),
        "nodes_removed": sorted(old.keys() - new.keys()),
        "nodes_changed": [],
        "columns_changed": [],
        "owners_changed": [],
        "contracts_changed": [],
    }
    for unique_id in sorted(new.keys() & old.keys()):
        _compare(unique_id, old[unique_id], new[unique_id], lists)
    edges_before = _edges((name, event.inputs) for name, event in old.items())
    edges_now = _edges((name, facts["inputs"]) for name, facts in new.items())
    lists["edges_added"] = _as_edges(edges_now - edges_before)
    lists["edges_removed"] = _as_edges(edges_before - edges_now)
    return {
        "counts": {name: len(items) for name, items in lists.items() if items},
        **{name: items[:MAX_LISTED] for name, items in lists.items()},
    }


def is_as_told(facts: Facts, event: LineageDeclared | None) -> bool:
    return event is not None and all(getattr(event, name) == value for name, value in facts.items())


def _about(node: PlannedNode) -> Facts:
    return {
        "unique_id": node.unique_id,
        "resource_type": node.resource_type,
        "name": node.name,
        "package_name": node.package_name,
    }


_COMPARED = {
    "code": "checksum",
    "inputs": "inputs",
    "relation": "outputs",
    "materialized": "materialized",
    "exposures": "exposures",
}


def _compare(unique_id: str, old: LineageDeclared, new: Facts, lists: dict[str, list[Any]]) -> None:
    what = [word for word, field in _COMPARED.items() if getattr(old, field) != new[field]]
    if what:
        lists["nodes_changed"].append(NodeChange(unique_id=unique_id, what=what))
    if sorted(old.owners) != sorted(new["owners"]):
        lists["owners_changed"].append(
            OwnersChange(unique_id=unique_id, before=old.owners, after=new["owners"])
        )
    if old.contract_enforced != new["contract_enforced"]:
        lists["contracts_changed"].append(
            ContractChange(
                unique_id=unique_id, before=old.contract_enforced, after=new["contract_enforced"]
            )
        )
    before = {column.name: column for column in old.columns or ()}
    after = {column.name: column for column in new["columns"] or ()}
    for name in [*before, *(name for name in after if name not in before)]:
        was, now = before.get(name), after.get(name)
        if was == now:
            continue
        change = "added" if was is None else "removed" if now is None else "changed"
        lists["columns_changed"].append(
            ColumnChange(
                unique_id=unique_id,
                column=name,
                change=change,
                before=was.type if was else None,
                after=now.type if now else None,
            )
        )


def _edges(inputs: Iterable[tuple[str, list[LineageInput]]]) -> set[tuple[str, str]]:
    return {
        (given.unique_id or f"{given.namespace}/{given.name}", unique_id)
        for unique_id, of_node in inputs
        for given in of_node
    }


def _as_edges(edges: set[tuple[str, str]]) -> list[Edge]:
    return [Edge(upstream=up, downstream=down) for up, down in sorted(edges)]
