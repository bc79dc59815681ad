"""The facts that dbtstream publishes: one frozen Struct per event type of the contract.

Runs and nodes are here, lineage and assets in `lineage_events`, what all share in `event_base`.

`normalizer` makes them, publishers send them, `client` decodes them. They are read
tolerantly: a reader ignores fields that it does not know, and a field added later arrives
with a default, so that old events still decode. Within v1 no field is removed or retyped
(tests compare with `schemas/`). Unknown is null, with a `*_status` beside it where the
reason matters.
"""

from datetime import datetime
from typing import Any, ClassVar

import msgspec

from dbtstream.event_base import ErrorBlock, Event, FreshnessBlock, Relation
from dbtstream.lineage_events import (
    AssetChecked,
    AssetFailed,
    AssetMaterialized,
    AssetObserved,
    AssetSkipped,
    LineageChanged,
    LineageDeclared,
    LineageObserved,
)
from dbtstream.statuses import NodeStatus, Phase, Reason, RunStatus

MAX_PLAN_BYTES = 512 * 1024
"""A plan whose node list is longer is sent in parts of about that size (`run.plan_part`)."""


class NodeBlock(msgspec.Struct, frozen=True, kw_only=True):
    """A node as the manifest of this very run describes it.

    `block_status` is `complete`, or `from_event` when no manifest could be read and only what
    dbt's events carry is known.
    """

    unique_id: str
    resource_type: str
    name: str
    package_name: str | None = None
    version: str | None = None
    materialized: str | None = None
    path: str | None = None
    fqn: list[str] = []
    tags: list[str] = []
    group: str | None = None
    access: str | None = None
    owners: list[str] = []
    meta: dict[str, Any] = {}
    checksum: str | None = None
    matches: list[str] = []
    upstream: list[str] = []
    block_status: str = "complete"


class TestBlock(msgspec.Struct, frozen=True, kw_only=True):
    """Of a data test: what it looks at and when it says no."""

    attached_node: str | None = None
    column: str | None = None
    test_name: str | None = None
    severity: str | None = None
    warn_if: str | None = None
    error_if: str | None = None
    failures_relation: str | None = None


class BatchResults(msgspec.Struct, frozen=True, kw_only=True):
    """Of a microbatch model: [start, end] of each batch, as dbt returned them."""

    successful: list[list[str]] = []
    failed: list[list[str]] = []


class PlanEntry(msgspec.Struct, frozen=True, kw_only=True):
    unique_id: str
    resource_type: str
    materialized: str | None = None
    depends_on: list[str] = []


class NodeCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Live counts of `run.progress`."""

    done: int
    running: int
    total: int
    by_status: dict[str, int] = {}


class SlowNode(msgspec.Struct, frozen=True, kw_only=True):
    unique_id: str
    elapsed_s: float


class FailedNode(msgspec.Struct, frozen=True, kw_only=True):
    unique_id: str
    status: NodeStatus
    message: str | None = None


class Resource(msgspec.Struct, frozen=True, kw_only=True):
    """What dbt's process used, as the process itself measured it."""

    max_rss: int | None = None
    cpu_s: float | None = None


class PhaseTiming(msgspec.Struct, frozen=True, kw_only=True):
    """A part of an attempt; it ends where the next one begins."""

    phase: Phase
    started_at: datetime
    finished_at: datetime


class ProcessBlock(msgspec.Struct, frozen=True, kw_only=True):
    """dbt's process, as its parent saw it. `exit_code` is null where a signal ended it."""

    pid: int
    started_at: datetime
    finished_at: datetime
    exit_code: int | None = None
    signal: str | None = None  # SIGKILL, SIGSEGV …
    oom: bool = False  # killed, and the kernel says it was for memory


class TraceBlock(msgspec.Struct, frozen=True, kw_only=True):
    """The trace context that a request came with; of its baggage what the config allows."""

    traceparent: str | None = None
    tracestate: str = ""
    baggage: dict[str, str] = {}


class ArtifactRef(msgspec.Struct, frozen=True, kw_only=True):
    kind: str
    path: str
    sha256: str | None = None
    size: int | None = None
    object: str | None = (
        None  # bucket/name in the Object Store, there when the run's state is terminal
    )


class RunQueued(Event, frozen=True, kw_only=True, tag="run.queued"):
    """A worker saw the request for the first time. Once per run, the first event of it."""

    family: ClassVar[str] = "run"

    args: list[str]  # scrubbed
    request_id: str | None = None
    position: int = 0  # requests of the same project and target that are ahead
    requested_by: str | None = None
    reason: str | None = None
    trace: TraceBlock | None = None  # null when the request came without


class RunLeased(Event, frozen=True, kw_only=True, tag="run.leased"):
    """A worker holds the run from here on, by a lease whose revision is its `fence`.

    Once per lease: with the run's first attempt, and whenever another worker (or the same one
    anew) takes over. From here on the stream refuses events of an older fence. `cause` is
    `first`, `worker_lost` or `handed_over`; for the latter two, `previous_worker` had the
    attempt that is closed by the events that follow, and `decision` says what comes then:
    resume, restart, fail, or none when the run had ended.
    """

    family: ClassVar[str] = "run"

    cause: str
    decision: str | None = None
    previous_worker: str | None = None


class RunRejected(Event, frozen=True, kw_only=True, tag="run.rejected"):
    """The request cannot run; it lies in DBT_DEAD with its bytes. The only event of its run."""

    family: ClassVar[str] = "run"

    code: str  # messages.RejectCode
    message: str
    field: str | None = None
    request_id: str | None = None


class RunStarted(Event, frozen=True, kw_only=True, tag="run.started"):
    """dbt's process is up. Once per attempt."""

    family: ClassVar[str] = "run"

    args: list[str]
    dbt_version: str
    adapter_type: str | None = None
    adapter_version: str | None = None
    python_version: str
    host: str
    pid: int
    queue_wait_s: float
    start: str  # cold, warm, manifest
    start_s: float


class RunPlanned(Event, frozen=True, kw_only=True, tag="run.planned"):
    """dbt has selected its nodes and started none. Once per attempt, if it gets so far.

    Hooks are not selected; those on-run-start come before it with dbt 1.8, after it since 1.9.
    Commands that select nothing (run-operation, list, deps) have none.
    """

    family: ClassVar[str] = "run"

    node_count: int  # without hooks, which are not selected but do get node events
    nodes: list[PlanEntry] | None = None
    nodes_status: str = "complete"  # or in_parts, no_nodes, unavailable: …
    manifest_hash: str | None = None
    expected_s: float | None = None
    parts: int = 0  # `run.plan_part` events that follow at once, where nodes_status is in_parts


class RunPlanPart(Event, frozen=True, kw_only=True, tag="run.plan_part"):
    """A part of the node list of a plan that is too long for one event: 1, 2, … `parts`."""

    family: ClassVar[str] = "run"

    part: int
    parts: int
    nodes: list[PlanEntry]


class RunProgress(Event, frozen=True, kw_only=True, tag="run.progress"):
    """At most once a second, while nodes finish."""

    family: ClassVar[str] = "run"

    counts: NodeCounts
    eta_s: float | None = None


class RunCancel(Event, frozen=True, kw_only=True, tag="run.cancel"):
    """One rung of stopping dbt: requested, interrupting, terminating, killing.

    Each once, but `interrupting`: it comes again when the names of cancelled queries are known
    only after it.
    """

    family: ClassVar[str] = "run"

    step: str
    by: str | None = None
    reason: str | None = None
    cancelled_queries: list[str] = []
    stack: str | None = None  # of dbt's threads, where silence was the reason


class RunFinished(Event, frozen=True, kw_only=True, tag="run.finished"):
    """The verdict. Once per run; nothing of the run comes after it.

    `verified` is true when our per-node ledger equals what dbt returned and wrote in
    run_results.json, false when they differ or dbt wrote none; `verified_status` says which:
    `equal`, `differs: N nodes`, `no_results`, `incomplete: …`, `frames_missing`.
    """

    family: ClassVar[str] = "run"

    status: RunStatus
    exit_code: int
    command: str | None = None
    error: ErrorBlock | None = None
    counts: dict[str, dict[str, int]] = {}
    elapsed_s: float
    slowest: list[SlowNode] = []
    failed: list[FailedNode] = []
    failed_count: int = 0  # `failed` lists the first 50
    resource: Resource = Resource()
    artifacts: list[ArtifactRef] = []
    attempts: int = 1
    verified: bool = False
    verified_status: str = "no_results"
    phases: list[PhaseTiming] = []  # of the last attempt, as far as it got
    process: ProcessBlock | None = None  # of the last attempt, if its worker saw it end
    stderr_tail: str | None = None  # when dbt's process crashed


class NodeStarted(Event, frozen=True, kw_only=True, tag="node.started"):
    """Work on the node began. Not sent for nodes that dbt skips."""

    family: ClassVar[str] = "node"

    node: NodeBlock
    index: int | None = None
    total: int | None = None
    thread: str | None = None
    ready_wait_s: float | None = None  # from the last upstream's end to this start


class NodeFinished(Event, frozen=True, kw_only=True, tag="node.finished"):
    """The node's one terminal event in this attempt.

    Of a source it comes when dbt returns, with its freshness. A source with status `error`
    and dbt_status `error` is stale and has no error block; `runtime error` is a failed check.
    """

    family: ClassVar[str] = "node"

    node: NodeBlock
    status: NodeStatus
    dbt_status: str | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    compile_s: float | None = None
    execute_s: float | None = None
    rows_affected: int | None = None
    bytes_processed: int | None = None
    query_id: str | None = None
    adapter_response: dict[str, Any] = {}
    message: str | None = None
    truncated: bool = False
    error: ErrorBlock | None = None
    failures: int | None = None
    root_causes: list[str] = []
    reason: Reason | None = None
    relation: Relation | None = None
    test: TestBlock | None = None
    freshness: FreshnessBlock | None = None
    batch_results: BatchResults | None = None
    thread: str | None = None


class NodeBatch(Event, frozen=True, kw_only=True, tag="node.batch"):
    """One batch of a microbatch model ended. `status` as for nodes."""

    family: ClassVar[str] = "batch"

    unique_id: str
    resource_type: str
    name: str
    index: int
    total: int
    status: NodeStatus
    execute_s: float | None = None
    event_time_start: datetime | None = None
    event_time_end: datetime | None = None


class LogLine(Event, frozen=True, kw_only=True, tag="log"):
    """A dbt log line at or above the project's level, scrubbed."""

    family: ClassVar[str] = "log"

    level: str
    code: str
    name: str
    message: str
    unique_id: str | None = None
    truncated: bool = False


class QueryFinished(Event, frozen=True, kw_only=True, tag="query.finished"):
    """A statement ended in the warehouse. Only where the project asks for queries."""

    family: ClassVar[str] = "query"

    unique_id: str | None = None
    elapsed_s: float
    status: str
    query_id: str | None = None
    sql: str | None = None
    truncated: bool = False


class ArtifactWritten(Event, frozen=True, kw_only=True, tag="artifact.written"):
    """dbt wrote an artifact; `path` is relative to the run's target path."""

    family: ClassVar[str] = "artifact"

    kind: str
    path: str
    sha256: str | None = None
    size: int | None = None
    object: str | None = (
        None  # bucket/name in the Object Store, there when the run's state is terminal
    )


class Gap(Event, frozen=True, kw_only=True, tag="gap"):
    """Something of a droppable family was not kept, and how much.

    `from_seq`..`to_seq` cover numbers that no event will ever carry; both are null when
    what was dropped had no number yet (the child's own queue was full).
    """

    family: ClassVar[str] = "gap"

    dropped_family: str
    count: int
    why: str
    from_seq: int | None = None
    to_seq: int | None = None


AnyEvent = (
    RunQueued
    | RunLeased
    | RunRejected
    | RunStarted
    | RunPlanned
    | RunPlanPart
    | RunProgress
    | RunCancel
    | RunFinished
    | NodeStarted
    | NodeFinished
    | NodeBatch
    | LogLine
    | QueryFinished
    | ArtifactWritten
    | Gap
    | LineageDeclared
    | LineageObserved
    | LineageChanged
    | AssetMaterialized
    | AssetChecked
    | AssetObserved
    | AssetFailed
    | AssetSkipped
)

DROPPABLE = ("log", "query")
"""Families that may be dropped when there is no room, the first one first."""

_json_encoder = msgspec.json.Encoder()
_json_decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)
_msgpack_encoder = msgspec.msgpack.Encoder()
_msgpack_decoder: msgspec.msgpack.Decoder[AnyEvent] = msgspec.msgpack.Decoder(AnyEvent)

JSON = "application/json"
MSGPACK = "application/msgpack"


def encode_event(event: AnyEvent, content_type: str = JSON) -> bytes:
    """The payload that goes over NATS."""
    encoder = _msgpack_encoder if content_type == MSGPACK else _json_encoder
    return encoder.encode(event)


def decode_event(data: bytes, content_type: str = JSON) -> AnyEvent:
    """A typed event. Raises msgspec.ValidationError (path in the text) or DecodeError."""
    if content_type == MSGPACK:
        return _msgpack_decoder.decode(data)
    return _json_decoder.decode(data)


def event_type(event: AnyEvent) -> str:
    """`node.finished`, as in the payload's `type`."""
    return str(event.__struct_config__.tag)
