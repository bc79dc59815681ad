"""What flowed into what, and how each asset is: the lineage and asset events of the contract.

Layer 0, beside `events`. dbt facts keep dbt's words (`unique_id`, `relation_name`); datasets,
edges and transformations keep OpenLineage's (`namespace`, `name`, `inputs`, `fields`). Unknown
is null, with a `*_status` or `*_source` beside it; an empty list means that there is none.
"""

from datetime import datetime
from typing import Any, ClassVar

import msgspec

from dbtstream.event_base import ErrorBlock, Event, FreshnessBlock
from dbtstream.statuses import ColumnLineageStatus, NodeStatus, Reason

MAX_LISTED = 500
"""Of each list in `lineage.changed`, how many are named; the counts beside them are whole."""


class FieldTransformation(msgspec.Struct, frozen=True, kw_only=True):
    """OpenLineage's words. `type` DIRECT with subtype IDENTITY, TRANSFORMATION, AGGREGATION;
    INDIRECT with JOIN, GROUP_BY, FILTER, SORT, WINDOW, CONDITIONAL."""

    type: str
    subtype: str
    masking: bool = False  # the value cannot be told from the result: a hash, a count


class FieldInput(msgspec.Struct, frozen=True, kw_only=True):
    """A column that something was made from; `unique_id` of the node or source that has it."""

    namespace: str
    name: str
    field: str
    unique_id: str | None = None
    transformations: list[FieldTransformation] = []


class FieldLineage(msgspec.Struct, frozen=True, kw_only=True):
    """Of one output column: the input columns whose values it has. None is a constant's."""

    inputs: list[FieldInput] = []


class LineageInput(msgspec.Struct, frozen=True, kw_only=True):
    """A dataset that the node reads.

    `origin` is `manifest`, or `meta` for an upstream that `meta.dbtstream.upstream` names; then
    `unique_id` may be null. `via_ephemeral` are the ephemeral models between the two.
    """

    namespace: str
    name: str
    unique_id: str | None = None
    resource_type: str | None = None
    relation_name: str | None = None
    via_ephemeral: list[str] = []
    deferred: bool = False  # read where --defer pointed, not where this target would have it
    origin: str = "manifest"


class LineageOutput(msgspec.Struct, frozen=True, kw_only=True):
    """The dataset that the node makes."""

    namespace: str
    name: str
    unique_id: str
    relation_name: str | None = None


class ExposureRef(msgspec.Struct, frozen=True, kw_only=True):
    """A sink that reads the node's dataset, by the project's own words."""

    unique_id: str
    name: str
    type: str | None = None
    url: str | None = None
    maturity: str | None = None
    owners: list[str] = []


class Column(msgspec.Struct, frozen=True, kw_only=True):
    """`type` is the database's, null where nobody has said it."""

    name: str
    type: str | None = None
    description: str | None = None
    tags: list[str] = []


class Lineage(Event, frozen=True, kw_only=True):
    """What `lineage.declared` and `lineage.observed` have in common.

    `fields` is null where `column_lineage_status` says why, else each output column's inputs.
    `dataset_inputs` are columns that decide which rows there are and in what order (joins,
    filters, groups, sort keys). `schema_source` says how well the input columns are known: the
    weakest of adapter, catalog, contract, inferred, documented; null where none is known.
    `lineage_hash` is over inputs, outputs, fields and dataset_inputs.
    """

    family: ClassVar[str] = "lineage"

    unique_id: str
    resource_type: str
    name: str
    package_name: str | None = None
    inputs: list[LineageInput] = []
    outputs: list[LineageOutput] = []  # none of exposures and ephemeral models, else one
    fields: dict[str, FieldLineage] | None = None
    dataset_inputs: list[FieldInput] | None = None
    column_lineage_status: ColumnLineageStatus
    column_lineage_message: str | None = None
    parser: str | None = None  # "sqlglot/30.30.0"
    schema_source: str | None = None
    lineage_hash: str
    compiled_code_hash: str | None = None  # SHA-256
    exposures: list[ExposureRef] = []


class LineageDeclared(Lineage, frozen=True, kw_only=True, tag="lineage.declared"):
    """What the manifest says of a node, told when that has changed for the project and target.

    Of every model, seed, snapshot, source and exposure of the manifest, selected or not. Its
    `fields` are null, as nothing has been compiled yet. The rest is what `lineage.changed`
    compares.
    """

    owners: list[str] = []
    group: str | None = None
    materialized: str | None = None
    checksum: str | None = None
    columns: list[Column] | None = None  # documented; null where the manifest names none
    contract_enforced: bool = False


class LineageObserved(Lineage, frozen=True, kw_only=True, tag="lineage.observed"):
    """What a node that has just succeeded was made from, told when `lineage_hash` has changed
    since the last one. Once per attempt and node; after its asset.materialized."""


class Edge(msgspec.Struct, frozen=True, kw_only=True):
    """Between unique_ids, ephemeral models collapsed."""

    upstream: str
    downstream: str


class NodeChange(msgspec.Struct, frozen=True, kw_only=True):
    """`what` of: code, inputs, relation, materialized, exposures."""

    unique_id: str
    what: list[str]


class ColumnChange(msgspec.Struct, frozen=True, kw_only=True):
    """A documented column. `change` is added, removed or changed; before and after are types,
    null where none is declared."""

    unique_id: str
    column: str
    change: str
    before: str | None = None
    after: str | None = None


class OwnersChange(msgspec.Struct, frozen=True, kw_only=True):
    unique_id: str
    before: list[str]
    after: list[str]


class ContractChange(msgspec.Struct, frozen=True, kw_only=True):
    """dbt's contract.enforced."""

    unique_id: str
    before: bool
    after: bool


class LineageChanged(Event, frozen=True, kw_only=True, tag="lineage.changed"):
    """The manifest is another than that of the last run of the project and target.

    Once per attempt, before its lineage.declared events. `previous_manifest_hash` is null where
    none is known, and then everything counts as added. Lists name the first 500, `counts`
    (nodes_added, edges_removed, columns_changed …) all.
    """

    family: ClassVar[str] = "lineage"

    manifest_hash: str
    previous_manifest_hash: str | None = None
    nodes_added: list[str] = []
    nodes_removed: list[str] = []
    nodes_changed: list[NodeChange] = []
    edges_added: list[Edge] = []
    edges_removed: list[Edge] = []
    columns_changed: list[ColumnChange] = []
    owners_changed: list[OwnersChange] = []
    contracts_changed: list[ContractChange] = []
    counts: dict[str, int] = {}


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """The asset's name in the world: `namespace` and `name` equal OpenLineage's.

    `relation_type` is table, view, materialized_view, external … as dbt's materialization says.
    """

    namespace: str
    name: str
    database: str | None = None
    schema: str | None = None
    identifier: str | None = None
    relation_name: str | None = None
    relation_type: str | None = None


class Retyped(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    before: str
    after: str


class SchemaChange(msgspec.Struct, frozen=True, kw_only=True):
    """Against the last time that the columns were known. Never all empty: then it is null."""

    added: list[str] = []
    removed: list[str] = []
    retyped: list[Retyped] = []


class InputVersion(msgspec.Struct, frozen=True, kw_only=True):
    """Which version of an input a build saw. Nulls: it was never seen being built."""

    namespace: str
    name: str
    unique_id: str | None = None
    dataset_version: str | None = None
    materialized_at: datetime | None = None


class OtherDataset(msgspec.Struct, frozen=True, kw_only=True):
    """What a check looks at besides its asset: a relationship's other side."""

    namespace: str
    name: str
    unique_id: str | None = None
    column: str | None = None


class CheckBlock(msgspec.Struct, frozen=True, kw_only=True):
    """A data test or unit test of an asset.

    `status` is pass, warn, fail, error (it could not run), skipped, cancelled, lost or
    never_started. `failures` is null unless the test ran. `params` are the test's arguments.
    """

    unique_id: str
    name: str
    kind: str  # test, unit_test
    assertion: str | None = None  # not_null, unique, relationships …; null of a singular test
    status: str
    dbt_status: str | None = None
    severity: str | None = None
    failures: int | None = None
    warn_if: str | None = None
    error_if: str | None = None
    fail_calc: str | None = None
    failures_relation: str | None = None
    columns: list[str] = []
    params: dict[str, Any] = {}
    message: str | None = None
    reason: Reason | None = None
    other_datasets: list[OtherDataset] = []


class SkipCause(msgspec.Struct, frozen=True, kw_only=True):
    """`status` is null where the cause has no end yet, or lies in an earlier attempt."""

    unique_id: str
    status: NodeStatus | None = None


class Asset(Event, frozen=True, kw_only=True):
    """What all asset events have. The asset is the dataset of a model, seed, snapshot or source.

    `unique_id` is the asset's; `key` follows the project's template. `previous_status` is what
    an event of this type, or of its siblings materialized, failed and skipped, said of the same
    asset (of the same check) last: "recovered" is one filter on it. Null: nothing is known.
    """

    family: ClassVar[str] = "asset"

    unique_id: str
    resource_type: str
    name: str
    package_name: str | None = None
    key: str
    identity: Identity
    owners: list[str] = []
    group: str | None = None
    tags: list[str] = []
    meta: dict[str, Any] = {}
    description: str | None = None
    description_truncated: bool = False
    matches: list[str] = []
    asset_labels: dict[str, str] = {}  # meta.dbtstream.labels
    previous_status: str | None = None


class AssetMaterialized(Asset, frozen=True, kw_only=True, tag="asset.materialized"):
    """The dataset was built. Once per successful build.

    `columns` are as `columns_source` (adapter, catalog, contract, inferred, documented) has
    them, null where nothing has. `dataset_version` names this build; a downstream's
    `input_versions` quote it. `lineage_hash` is that of the last `lineage.observed`.
    """

    status: NodeStatus
    materialized: str | None = None
    lifecycle: str | None = None  # OpenLineage's: CREATE, OVERWRITE, ALTER …; null if not known
    started_at: datetime | None = None
    finished_at: datetime | None = None
    execute_s: float | None = None
    columns: list[Column] | None = None
    columns_source: str | None = None
    schema_hash: str | None = None
    schema_change: SchemaChange | None = None
    documented_not_found: list[str] = []
    contract_enforced: bool = False
    dataset_version: str
    input_versions: list[InputVersion] = []
    rows_affected: int | None = None
    bytes_processed: int | None = None
    query_id: str | None = None
    lineage_hash: str | None = None
    compiled_code_hash: str | None = None


class AssetChecked(Asset, frozen=True, kw_only=True, tag="asset.checked"):
    """A test of the asset has its end, whatever that is. Once per test and attempt, of the
    asset that the test is attached to; `check.other_datasets` are what else it reads.
    `dataset_version` is the build that was looked at, null if not known."""

    check: CheckBlock
    dataset_version: str | None = None


class AssetObserved(Asset, frozen=True, kw_only=True, tag="asset.observed"):
    """`dbt source freshness` looked at a source. `status` is pass, warn, error (stale) or
    runtime error (it could not look)."""

    status: str
    freshness: FreshnessBlock | None = None
    error: ErrorBlock | None = None


class AssetFailed(Asset, frozen=True, kw_only=True, tag="asset.failed"):
    """A build did not succeed. `status` error, partial_success (some microbatch batches),
    cancelled or lost; of the last two `reason` says why."""

    status: NodeStatus
    reason: Reason | None = None
    error: ErrorBlock | None = None
    message: str | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    dataset_version: str | None = None  # of the last good build, which may still be there


class AssetSkipped(Asset, frozen=True, kw_only=True, tag="asset.skipped"):
    """A build that was selected did not begin: skipped or never_started, and because of whom."""

    status: NodeStatus
    reason: Reason | None = None
    causes: list[SkipCause] = []
    dataset_version: str | None = None
