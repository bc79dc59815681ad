"""How each asset is: the fields of asset events, from a node's end and what was known. Pure.

Layer 1. `asset_events` asks, once per `node.finished`, with what the SQL reader and the adapter
said of the node; the answer is an event type and its fields. What lasts between runs is an
`AssetState` per node: the last build's version, columns, lineage hash, and how it ended.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import msgspec

from dbtstream.asset_schema import (
    Schema,
    documented_not_found,
    schema_by_project,
    schema_change,
    schema_hash,
    with_documentation,
)
from dbtstream.column_lineage import KnownColumn
from dbtstream.config import AssetsConfig
from dbtstream.event_base import Event
from dbtstream.events import AnyEvent, NodeFinished
from dbtstream.frames import PlannedNode
from dbtstream.lineage import Facts, ProjectGraph
from dbtstream.lineage_events import (
    Asset,
    AssetChecked,
    AssetFailed,
    AssetMaterialized,
    AssetObserved,
    AssetSkipped,
    CheckBlock,
    Identity,
    InputVersion,
    LineageInput,
    OtherDataset,
    SchemaChange,
    SkipCause,
)
from dbtstream.node_options import asset_key
from dbtstream.statuses import NodeStatus

BUILT = frozenset({"model", "seed", "snapshot"})
CHECKS = frozenset({"test", "unit_test"})

COMMANDS = frozenset(
    {"build", "run", "seed", "snapshot", "test", "source freshness", "retry", "clone"}
)
"""dbt commands that do something to an asset; `compile` ends nodes with success, too."""

_OVERWRITTEN = frozenset({"table", "seed"})


class Stamp(msgspec.Struct, frozen=True, kw_only=True):
    """Who wrote a value of the bucket `dbt_lineage`, and of which project and target."""

    project: str
    target: str
    run_id: str
    fence: int
    seq: int
    time: datetime


class AssetState(Stamp, frozen=True, kw_only=True):
    """What the next run wants to know of an asset or check: a value of the bucket `dbt_lineage`.

    Of a check and of a source little more than the status is there.
    """

    unique_id: str
    status: str | None = None
    namespace: str | None = None
    name: str | None = None
    dataset_version: str | None = None
    materialized_at: datetime | None = None
    columns: list[KnownColumn] | None = None
    columns_source: str | None = None
    compiled_code_hash: str | None = None
    lineage_hash: str | None = None

    @property
    def schema(self) -> Schema | None:
        if self.columns is None or self.columns_source is None:
            return None
        return Schema(columns=self.columns, source=self.columns_source)


class Build(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a successful build besides its `node.finished`."""

    schema: Schema | None = None
    inputs: list[LineageInput] = []
    lineage_hash: str | None = None
    compiled_code_hash: str | None = None


Told = tuple[type[AnyEvent], Facts]


class Assets:
    """The assets of one project and target, over one attempt. `states` is kept up to date."""

    def __init__(
        self,
        graph: ProjectGraph,
        config: AssetsConfig,
        *,
        project: str,
        target: str,
        states: dict[str, AssetState],
    ) -> None:
        self.states = states
        self._graph, self._config = graph, config
        self._project, self._target = project, target
        self._ended: dict[str, NodeStatus] = {}

    def subject_of(self, unique_id: str) -> str | None:
        """The asset that an end of this node is about; None for one that is about none, or of
        which nothing is to be told."""
        node = self._graph.nodes.get(unique_id)
        if node is None or not self._config.emit:
            return None
        if node.resource_type in CHECKS:
            subject = self._checked(node)
        else:
            subject = unique_id if node.resource_type in (*BUILT, "source") else None
        if subject is None or self._graph.identity(subject) is None:
            return None
        options = self._graph.options(subject)
        return subject if options.emit and options.asset else None

    def told(self, finished: NodeFinished, subject: str, build: Build) -> Told | None:
        """The event of this end and its fields; None where there is nothing to tell."""
        node = self._graph.nodes[finished.node.unique_id]
        self._ended[node.unique_id] = finished.status
        common = self._common(subject, node)
        if node.resource_type in CHECKS:
            return AssetChecked, common | self._check(node, subject, finished)
        if node.resource_type == "source":
            return AssetObserved, common | {
                "status": finished.dbt_status or finished.status.value,
                "freshness": finished.freshness,
                "error": finished.error,
            }
        last = self.states.get(subject)
        version = last.dataset_version if last else None
        match finished.status:
            case NodeStatus.SUCCESS | NodeStatus.WARN:
                return AssetMaterialized, common | self._materialized(node, finished, build)
            case NodeStatus.SKIPPED | NodeStatus.NEVER_STARTED:
                causes = [
                    SkipCause(unique_id=cause, status=self._ended.get(cause))
                    for cause in finished.root_causes
                ]
                return AssetSkipped, common | {
                    "status": finished.status,
                    "reason": finished.reason,
                    "causes": causes,
                    "dataset_version": version,
                }
            case NodeStatus.NO_OP | NodeStatus.REUSED:
                return None
            case _:
                return AssetFailed, common | {
                    "status": finished.status,
                    "reason": finished.reason,
                    "error": finished.error,
                    "message": finished.message,
                    "started_at": finished.started_at,
                    "finished_at": finished.finished_at,
                    "dataset_version": version,
                }

    def remember(self, event: Asset) -> AssetState:
        """What the event leaves behind, for this run and the next."""
        about = event.check.unique_id if isinstance(event, AssetChecked) else event.unique_id
        return self._keep(about, stamp_of(event), status=status_of(event), **_left_by(event))

    def remember_lineage(self, unique_id: str, event: Event, lineage_hash: str) -> AssetState:
        """That `lineage.observed` was told, as `event`."""
        return self._keep(unique_id, stamp_of(event), lineage_hash=lineage_hash)

    def remember_schema(self, unique_id: str, event: Event, schema: Schema) -> AssetState:
        """What is known of the columns, for those who read them; as known by `event`."""
        return self._keep(
            unique_id, stamp_of(event), columns=schema.columns, columns_source=schema.source
        )

    def _keep(self, unique_id: str, stamp: Stamp, **facts: Any) -> AssetState:
        before = self.states.get(unique_id)
        kept = {"unique_id": unique_id} if before is None else msgspec.structs.asdict(before)
        state = AssetState(**{**kept, **msgspec.structs.asdict(stamp), **facts})
        self.states[unique_id] = state
        return state

    def schema_of(self, unique_id: str) -> Schema | None:
        """What is known of a dataset's columns, for those who read it."""
        state, node = self.states.get(unique_id), self._graph.nodes.get(unique_id)
        known = state.schema if state else None
        return known or (schema_by_project(node) if node else None)

    def input_versions(self, inputs: Iterable[LineageInput]) -> list[InputVersion]:
        versions = []
        for given in inputs:
            state = self.states.get(given.unique_id or "")
            known = state is not None and not given.deferred
            versions.append(
                InputVersion(
                    namespace=given.namespace,
                    name=given.name,
                    unique_id=given.unique_id,
                    dataset_version=state.dataset_version if state and known else None,
                    materialized_at=state.materialized_at if state and known else None,
                )
            )
        return versions

    def _common(self, subject: str, node: PlannedNode) -> Facts:
        """`subject` is the asset, `node` whose end it is about: of a check, its own."""
        asset, identity = self._graph.nodes[subject], self._graph.identity(subject)
        assert identity is not None  # noqa: S101  # subject_of has seen to it
        options = self._graph.options(subject)
        last = self.states.get(node.unique_id)
        template = options.key if options.key is not None else self._config.key
        return {
            "unique_id": subject,
            "resource_type": asset.resource_type,
            "name": asset.name,
            "package_name": asset.package_name,
            "key": asset_key(
                template,
                self._config.prefix,
                project=self._project,
                target=self._target,
                identity=identity,
                node=asset,
            ),
            "identity": identity,
            "owners": asset.owners,
            "group": asset.group,
            "tags": asset.tags,
            "meta": asset.meta,
            "description": asset.description,
            "description_truncated": asset.description_truncated,
            "matches": asset.matches,
            "asset_labels": options.labels,
            "previous_status": last.status if last else None,
        }

    def _materialized(self, node: PlannedNode, finished: NodeFinished, build: Build) -> Facts:
        last = self.states.get(node.unique_id)
        schema = build.schema
        before = last.schema if last else None
        change = schema_change(before, schema) if before and schema else None
        missing = documented_not_found(node, schema) if schema else []
        return {
            "status": finished.status,
            "materialized": node.materialized,
            "lifecycle": _lifecycle(node, change),
            "started_at": finished.started_at,
            "finished_at": finished.finished_at,
            "execute_s": finished.execute_s,
            "columns": with_documentation(schema, node) if schema else None,
            "columns_source": schema.source if schema else None,
            "schema_hash": schema_hash(schema) if schema else None,
            "schema_change": change,
            "documented_not_found": missing,
            "contract_enforced": node.contract_enforced,
            "dataset_version": finished.invocation_id or f"{finished.run_id}.{finished.attempt}",
            "input_versions": self.input_versions(build.inputs),
            "rows_affected": finished.rows_affected,
            "bytes_processed": finished.bytes_processed,
            "query_id": finished.query_id,
            "lineage_hash": build.lineage_hash,
            "compiled_code_hash": build.compiled_code_hash,
        }

    def _check(self, node: PlannedNode, subject: str, finished: NodeFinished) -> Facts:
        test, details = finished.test or node.test, node.test_details
        state = self.states.get(subject)
        column = test.column if test else None
        block = CheckBlock(
            unique_id=node.unique_id,
            name=node.name,
            kind=node.resource_type,
            assertion=test.test_name if test else None,
            status="pass" if finished.status is NodeStatus.SUCCESS else finished.status.value,
            dbt_status=finished.dbt_status,
            severity=test.severity if test else None,
            failures=finished.failures,
            warn_if=test.warn_if if test else None,
            error_if=test.error_if if test else None,
            fail_calc=details.fail_calc if details else None,
            failures_relation=test.failures_relation if test else None,
            columns=[column] if column else _combination(details.params if details else {}),
            params=details.params if details else {},
            message=finished.message,
            reason=finished.reason,
            other_datasets=self._others(node, subject),
        )
        return {"check": block, "dataset_version": state.dataset_version if state else None}

    def _checked(self, node: PlannedNode) -> str | None:
        """What a test is attached to; of one that is attached to nothing its first upstream that
        is an asset, and not the other side of its relationship."""
        attached = node.test.attached_node if node.test else None
        if attached is not None and self._graph.identity(attached) is not None:
            return attached
        upstream = [name for name in node.upstream if self._graph.identity(name) is not None]
        other = self._other_side(node)
        own = [name for name in upstream if self._graph.nodes[name].name != other]
        return next(iter(own or upstream), None)

    def _others(self, node: PlannedNode, subject: str) -> list[OtherDataset]:
        other, params = (
            self._other_side(node),
            node.test_details.params if node.test_details else {},
        )
        field = params.get("field")
        others = []
        for name in dict.fromkeys(node.upstream):
            identity = self._graph.identity(name)
            if name == subject or identity is None:
                continue
            is_other = self._graph.nodes[name].name == other
            others.append(
                OtherDataset(
                    namespace=identity.namespace,
                    name=identity.name,
                    unique_id=name,
                    column=str(field) if is_other and field else None,
                )
            )
        return others

    def _other_side(self, node: PlannedNode) -> str | None:
        """`customers` of a relationship's `ref('customers')` or `source('crm', 'customers')`."""
        to = node.test_details.params.get("to") if node.test_details else None
        if not isinstance(to, str):
            return None
        words = [word for word in to.replace('"', "'").split("'")[1::2] if word]
        return words[-1] if words else None


def stamp_of(event: Event) -> Stamp:
    return Stamp(
        project=event.project,
        target=event.target,
        run_id=event.run_id,
        fence=event.fence,
        seq=event.seq,
        time=event.time,
    )


def status_of(event: Asset) -> str:
    """The word that the next event's `previous_status` will have."""
    match event:
        case AssetChecked():
            return event.check.status
        case AssetObserved():
            return event.status
        case AssetMaterialized() | AssetFailed() | AssetSkipped():
            return event.status.value
    raise TypeError(f"{type(event).__name__} has no status")


def _lifecycle(node: PlannedNode, change: SchemaChange | None) -> str | None:
    """OpenLineage's lifecycleStateChange, where the materialization alone tells it."""
    if node.materialized in _OVERWRITTEN or (
        node.materialized == "incremental" and node.full_refresh
    ):
        return "OVERWRITE"
    return "ALTER" if node.materialized == "incremental" and change else None


def _left_by(event: Asset) -> Facts:
    if isinstance(event, AssetObserved):
        loaded = event.freshness.max_loaded_at if event.freshness else None
        return {**_named(event.identity), "materialized_at": loaded} if loaded else {}
    if not isinstance(event, AssetMaterialized):
        return {}
    left: Facts = {
        **_named(event.identity),
        "dataset_version": event.dataset_version,
        "materialized_at": event.finished_at or event.time,
        "compiled_code_hash": event.compiled_code_hash,
    }
    if event.columns is not None:
        left["columns"] = [KnownColumn(name=c.name, type=c.type) for c in event.columns]
        left["columns_source"] = event.columns_source
    return left


def _named(identity: Identity) -> Facts:
    return {"namespace": identity.namespace, "name": identity.name}


def _combination(params: Mapping[str, object]) -> list[str]:
    """The columns of a test over several: dbt_utils' unique_combination_of_columns and the like."""
    for key in ("combination_of_columns", "columns", "column_list"):
        names = params.get(key)
        if isinstance(names, list):
            return [name for name in names if isinstance(name, str)]
    return []
