"""What a dbt child tells its parent: the private protocol on the frame pipe.

A frame is a 4-byte big-endian length and one JSON object, numbered `n` = 1, 2, 3 … by the
one thread that writes the pipe. The writing side is `dbt_child/` (stdlib only, so it builds dicts
whose keys are the fields here); `dbt_process` reads the pipe; `normalizer` turns frames
into contract events. Frames never leave the machine and may change with any release:
`PROTOCOL` guards the pair.

Times named `at` are Unix seconds taken in the callback. Strings ending in `_at` that come
from dbt are kept as dbt wrote them (naive ISO 8601, UTC).
"""

import struct
import time
from typing import Any

import msgspec

from dbtstream.errors import FrameCorrupt, FrameTooLarge
from dbtstream.event_base import Relation
from dbtstream.events import BatchResults, TestBlock

PROTOCOL = 1
MAX_FRAME_BYTES = 8 * 1024 * 1024
"""A longer frame means a broken child. Lists are sent in chunks well below it."""

_LENGTH = struct.Struct(">I")
LENGTH_BYTES = _LENGTH.size


class Frame(msgspec.Struct, frozen=True, kw_only=True, tag_field="t"):
    """Base of all frames. Unknown fields are ignored; `n` has no holes."""

    n: int
    at: float


class Hello(Frame, frozen=True, kw_only=True, tag="hello"):
    """First frame: dbt is imported and the child is ready. Its absence is a start failure."""

    protocol: int
    pid: int
    python_version: str
    dbt_version: str
    adapter_type: str | None  # of the target that will be used; None if it cannot be told
    adapter_version: str | None
    start: str = "cold"  # cold, warm (forked with imports), manifest (forked with a parse)
    speedups: list[str] = []  # those of `dbt_child.speedups` that are in effect


class Refused(Frame, frozen=True, kw_only=True, tag="refused"):
    """Instead of Hello: this interpreter cannot run dbt for us. The child exits after it."""

    code: str  # no_dbt, dbt_2x, dbt_too_old, import_failed
    message: str
    engine: str | None = None  # "dbt-core 2.0.1"


class Invocation(Frame, frozen=True, kw_only=True, tag="invocation"):
    """dbt announced itself (MainReportVersion). Never sent for usage errors."""

    invocation_id: str


class Parsed(Frame, frozen=True, kw_only=True, tag="parsed"):
    """dbt has read its project and linked the graph (FoundStats). `parse` never says so."""


class PlannedColumn(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A column that the project's YAML names.

    There are as many of them as of everything else together, and none is in a cycle: Python's
    collector need not see them (`gc=False`, and no list where there are no tags).
    """

    name: str
    data_type: str | None = None
    description: str | None = None
    tags: tuple[str, ...] = ()


class TestDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Of a data test, what its TestBlock does not say."""

    params: dict[str, Any] = {}  # the test's arguments but model and column_name
    fail_calc: str | None = None


class ExposureDetails(msgspec.Struct, frozen=True, kw_only=True):
    type: str | None = None
    url: str | None = None
    maturity: str | None = None


class PlannedNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node as the live manifest describes it. Texts are cut at 8 KiB by the child."""

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
    upstream: list[str] = []  # depends_on.nodes, as in the manifest
    relation: Relation | None = None
    test: TestBlock | None = None
    matches: list[str] = []  # names of the project's selectors that select it
    description: str | None = None
    description_truncated: bool = False
    columns: list[PlannedColumn] = []
    contract_enforced: bool = False
    language: str | None = None  # sql, python
    incremental_strategy: str | None = None
    full_refresh: bool = False  # by flag or config, in this run
    header: list[str] | None = None  # of a seed: the first line of its CSV file
    deferred: Relation | None = None  # where --defer would look for it
    test_details: TestDetails | None = None
    exposure: ExposureDetails | None = None


class Nodes(Frame, frozen=True, kw_only=True, tag="nodes"):
    """A chunk of planned nodes. All chunks come before the `Plan` that closes them."""

    nodes: list[PlannedNode]


class Plan(Frame, frozen=True, kw_only=True, tag="plan"):
    """Selection is done and no node has started. Not sent by commands without nodes."""

    node_count: int
    status: str  # "complete", or why the node list is not to be had
    manifest_hash: str | None = None
    threads: int | None = None
    target_name: str | None = None
    others: list[PlannedNode] = []  # not selected but heard of later: hooks of the project


class GraphNodes(Frame, frozen=True, kw_only=True, tag="graph_nodes"):
    """A chunk of nodes that are not selected. All chunks come after `Plan` and before `Graph`;
    there may be none.

    Where the parent knows the manifest already (`Start.known_manifest`) only those that the
    selected ones descend from, through nodes without a relation, and the exposures that read
    selected ones, with what lies between; else all that lineage is about: models, seeds,
    snapshots, sources, exposures, and what lies between (metrics, semantic models, saved queries,
    functions). Tests, hooks and analyses are not among them.
    """

    nodes: list[PlannedNode]


class SelectorProblem(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    problem: str  # "selects nothing", or dbt's own words


class Graph(Frame, frozen=True, kw_only=True, tag="graph"):
    """The manifest around the selection. Follows `Plan`, before anything starts; commands that
    run no nodes (parse, list, run-operation, nothing selected) tell it at their end, and those
    that parse nothing (debug, deps, a compilation error) not at all.

    `connection` has of the profile's target what names a dataset, never a secret: type, database,
    schema, and by adapter type path, attach (alias -> path, null where that is no file), host,
    port, account, region, project, location, method …
    """

    manifest_hash: str
    complete: bool  # false: the manifest was known, and `graph_nodes` are the near ones only
    adapter_type: str | None = None
    connection: dict[str, Any] = {}
    selector_problems: list[SelectorProblem] = []


class Columns(Frame, frozen=True, kw_only=True, tag="columns"):
    """What the adapter says of a relation that was just built; only where the project asks.

    Once per model, seed or snapshot that succeeded, after its node_finish and before the results.
    `columns` is null when it could not be asked: `problem` says why.
    """

    unique_id: str
    columns: list[PlannedColumn] | None = None
    problem: str | None = None


class NodeStart(Frame, frozen=True, kw_only=True, tag="node_start"):
    """NodeStart. Also fired for skipped nodes, and once more per microbatch batch."""

    unique_id: str
    thread: str | None = None
    started_at: str | None = None


class NodeWork(Frame, frozen=True, kw_only=True, tag="node_work"):
    """LogStartLine or NodeCompiling: the node really works, it is not skipped."""

    unique_id: str
    index: int | None = None
    total: int | None = None


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    name: str  # compile, execute
    started_at: str | None = None
    completed_at: str | None = None


class NodeError(Frame, frozen=True, kw_only=True, tag="node_error"):
    """An exception inside a node, seen while dbt handled it; the finish follows."""

    unique_id: str
    error_class: str
    message: str
    code: str | None = None
    truncated: bool = False


class NodeFinish(Frame, frozen=True, kw_only=True, tag="node_finish"):
    """NodeFinished, of a node or (same unique_id, nested) of a microbatch batch."""

    unique_id: str
    status: str
    thread: str | None = None
    started_at: str | None = None
    finished_at: str | None = None
    timing: list[Timing] = []
    message: str | None = None
    truncated: bool = False
    failures: int | None = None
    adapter_response: dict[str, Any] = {}
    relation: Relation | None = None
    compiled_code: str | None = None  # of models and snapshots in SQL, where Start asks for it
    compiled_code_hash: str | None = None  # SHA-256 of all of it, of tests, too
    compiled_code_truncated: bool = False  # it is too long for a frame (1 MiB), and not sent


class NodeSkip(Frame, frozen=True, kw_only=True, tag="node_skip"):
    """SkippingDetails. Without a NodeStart before it: on-run-start failed."""

    unique_id: str


class HookStart(Frame, frozen=True, kw_only=True, tag="hook_start"):
    unique_id: str
    index: int | None = None
    total: int | None = None


class HookFinish(Frame, frozen=True, kw_only=True, tag="hook_finish"):
    unique_id: str
    status: str
    execution_s: float | None = None
    message: str | None = None


class BatchStart(Frame, frozen=True, kw_only=True, tag="batch_start"):
    """LogStartBatch: follows, on the same thread, the nested NodeStart that it names."""

    unique_id: str
    index: int
    total: int


class BatchFinish(Frame, frozen=True, kw_only=True, tag="batch_finish"):
    unique_id: str
    index: int
    total: int
    status: str
    execution_s: float | None = None
    event_time_start: str | None = None
    event_time_end: str | None = None


class Log(Frame, frozen=True, kw_only=True, tag="log"):
    level: str  # debug, info, warn, error
    code: str
    name: str
    message: str
    unique_id: str | None = None
    truncated: bool = False


class Query(Frame, frozen=True, kw_only=True, tag="query"):
    """SQLQueryStatus, only where the project asks for the query family."""

    unique_id: str | None
    status: str
    elapsed_s: float
    query_id: str | None = None
    sql: str | None = None
    truncated: bool = False


class Artifact(Frame, frozen=True, kw_only=True, tag="artifact"):
    """ArtifactWritten (1.9+), or a file found in the target path at the end (1.8)."""

    kind: str  # manifest, run_results, sources, catalog, semantic_manifest …
    path: str
    sha256: str | None = None
    size: int | None = None


class Cancelling(Frame, frozen=True, kw_only=True, tag="cancelling"):
    """The child interrupts dbt's main thread, once."""

    by: str  # control, eof, sigterm, sigint, deadline


class QueryCancelled(Frame, frozen=True, kw_only=True, tag="query_cancelled"):
    """LogCancelLine: the adapter was asked to cancel an open connection."""

    connection: str


class Dropped(Frame, frozen=True, kw_only=True, tag="dropped"):
    """`count` frames of one family were not kept: the child's queue was full, or see `why`."""

    family: str  # the tag of the frames
    count: int
    why: str | None = None  # too_long, or the error that kept one from being encoded


class Freshness(msgspec.Struct, frozen=True, kw_only=True):
    """Of a source, from dbt's result object: no event carries it."""

    max_loaded_at: str | None = None
    snapshotted_at: str | None = None
    age_s: float | None = None
    warn_after_s: float | None = None
    error_after_s: float | None = None
    filter: str | None = None


class NodeResult(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of what dbtRunner.invoke returned."""

    unique_id: str
    status: str
    message: str | None = None
    truncated: bool = False
    failures: int | None = None
    timing: list[Timing] = []
    execution_s: float | None = None
    adapter_response: dict[str, Any] = {}
    batch_results: BatchResults | None = None
    freshness: Freshness | None = None
    compiled_code_hash: str | None = None


class Results(Frame, frozen=True, kw_only=True, tag="results"):
    """A chunk of per-node results. All chunks come before the `Result` that closes them."""

    results: list[NodeResult]


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True):
    error_class: str
    message: str
    code: str | None = None  # dbt's numeric code, where the exception has one
    truncated: bool = False


class ChildStats(msgspec.Struct, frozen=True, kw_only=True):
    """What the child measured of itself."""

    events: int = 0  # callbacks received
    frames: int = 0
    callback_errors: int = 0
    callback_error: str | None = None  # the first one, with its traceback
    callback_s: float | None = None  # CPU time; only when measuring was asked for
    writer_s: float = 0.0  # CPU time of the thread that makes and writes frames
    scrubbed: int = 0  # strings in which a secret was replaced
    max_rss_bytes: int | None = None
    cpu_s: float | None = None


class Result(Frame, frozen=True, kw_only=True, tag="result"):
    """Last frame: invoke returned. A pipe that ends without it is a crash."""

    success: bool
    exit_code: int  # 0 success, 1 handled failure, 2 unhandled
    result_count: int  # entries sent in Results; -1 where the command has no such list
    error: ErrorInfo | None = None
    interrupted: bool = False  # dbt ended by KeyboardInterrupt or SystemExit
    stats: ChildStats = ChildStats()


AnyFrame = (
    Hello
    | Refused
    | Invocation
    | Parsed
    | Nodes
    | Plan
    | GraphNodes
    | Graph
    | Columns
    | NodeStart
    | NodeWork
    | NodeError
    | NodeFinish
    | NodeSkip
    | HookStart
    | HookFinish
    | BatchStart
    | BatchFinish
    | Log
    | Query
    | Artifact
    | Cancelling
    | QueryCancelled
    | Dropped
    | Results
    | Result
)

_decoder: msgspec.json.Decoder[AnyFrame] = msgspec.json.Decoder(AnyFrame)


def frame_length(head: bytes) -> int:
    """Length of the JSON that follows a 4-byte head. Raises FrameTooLarge."""
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME_BYTES:
        raise FrameTooLarge(length, MAX_FRAME_BYTES)
    return int(length)


def decode_frame(body: bytes) -> AnyFrame:
    """One frame from its JSON. Raises FrameCorrupt with the reason and the first bytes."""
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FrameCorrupt(str(error), body[:80]) from error


class EarlierResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a node ended before, in dbt's word of run_results.json (success, error, skipped …)."""

    unique_id: str
    status: str
    batch_results: BatchResults | None = None


class Retry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the child makes a run_results.json of, before it invokes dbt's `retry` on it.

    `args` are the args of the earlier attempt, as its `Start` had them.
    """

    args: list[str]
    results: list[EarlierResult]
    state_dir: str  # where the file is to be; made by the parent
    began_at: str | None = None  # the first attempt: microbatch models end their batches there


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """Parent -> child, the first line on stdin: everything the child needs to begin.

    `args` are dbt's words with nothing of ours in them; paths, profile and target travel in
    the environment (dbt's own DBT_* variables), vars as one more `--vars`.
    """

    args: list[str]
    project_dir: str
    secret_env: list[str] = []  # variables to scrub besides DBT_ENV_SECRET_*
    log_level: str = "warn"
    queries: bool = False
    query_sql: bool = False
    measure: bool = False
    stack_file: str | None = None  # where SIGUSR1 writes the stacks of all threads
    retry: Retry | None = None
    graph: bool = False  # tell the manifest around the selection: graph_nodes, graph
    known_manifest: str | None = None  # the manifest_hash that the parent has nodes of
    compiled_code: bool = False  # with node_finish
    adapter_columns: bool = False  # ask the adapter for the columns of what was built
    selectors: dict[str, str] = {}  # name -> dbt's selection syntax
    speedups: bool = True  # where dbt is known to give the same, let it be done faster


# Control lines, parent -> child, after Start. EOF means the parent died: cancel.
CONTROL_CANCEL = b"cancel\n"


def deadline_line(stop_at: float, kill_at: float) -> bytes:
    """`deadline <stop at> <kill at>`: the child cancels dbt, and kills its group, by itself.

    Seconds of `clock_s`, which parent and child share. A later line replaces an earlier one.
    """
    return b"deadline %.3f %.3f\n" % (stop_at, kill_at)


def clock_s() -> float:
    """Seconds since boot, with the time that the machine slept (Linux); the same in every
    process, and not moved by whoever sets the time."""
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boottime is None else time.clock_gettime(boottime)
