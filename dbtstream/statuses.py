"""The closed lists of statuses, and the one table from dbt's words to ours.

Layer 0: shared by `events`, `messages` and `runs`. The legal moves of a run are in
`runs`; here are only the words. dbt's own words come from `dbt.artifacts.schemas.results`
(`NodeStatus`, `RunStatus`, `TestStatus`, `FreshnessStatus`), 1.8 to 1.12.
"""

from enum import StrEnum


class RunStatus(StrEnum):
    """Where a run is, or how it ended."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    SUCCESS = "success"  # dbt finished and was content (exit 0)
    FAILURE = "failure"  # dbt finished; at least one node did not pass (exit 1)
    ERROR = "error"  # dbt never began, or did not finish (exit 2)
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    LOST = "lost"  # its worker vanished; what had finished is in the events

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL_RUN_STATUSES


TERMINAL_RUN_STATUSES = frozenset(
    {
        RunStatus.SUCCESS,
        RunStatus.FAILURE,
        RunStatus.ERROR,
        RunStatus.CANCELLED,
        RunStatus.TIMED_OUT,
        RunStatus.LOST,
    }
)


class NodeStatus(StrEnum):
    """How a selected node ended. Every selected node gets exactly one."""

    SUCCESS = "success"
    WARN = "warn"
    FAIL = "fail"  # a test said no
    ERROR = "error"
    PARTIAL_SUCCESS = "partial_success"  # microbatch: some batches failed; not a success
    SKIPPED = "skipped"  # an upstream node did not pass
    NO_OP = "no_op"
    REUSED = "reused"
    NEVER_STARTED = "never_started"
    CANCELLED = "cancelled"
    LOST = "lost"


PASSED = frozenset({NodeStatus.SUCCESS, NodeStatus.WARN, NodeStatus.NO_OP, NodeStatus.REUSED})
"""A node with one of these does not make the run a failure."""

CAUSES_SKIP = frozenset({NodeStatus.FAIL, NodeStatus.ERROR, NodeStatus.PARTIAL_SUCCESS})
"""dbt skips what is downstream of a node with one of these."""


class Reason(StrEnum):
    """Why a node was skipped, never started, cancelled or lost."""

    UPSTREAM_FAILED = "upstream_failed"
    FAIL_FAST = "fail_fast"
    ON_RUN_START_FAILED = "on_run_start_failed"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    RUN_ERROR = "run_error"  # dbt raised between planning and this node
    CHILD_KILLED = "child_killed"  # dbt's process died; the event's error names the signal
    OOM = "oom"  # killed, and the kernel says it was for memory
    WORKER_LOST = "worker_lost"
    HANDED_OVER = "handed_over"  # its worker gave the run to another one, which goes on with it


class Phase(StrEnum):
    """The parts of an attempt, one after the other."""

    QUEUE = "queue"  # from the request's storing, or the takeover, to the start of dbt's process
    STARTUP = "startup"  # until dbt announces itself: interpreter, imports, profile
    PARSE = "parse"  # until the nodes are selected, or the project is read
    EXECUTE = "execute"  # until the last of them has ended, or the command has nothing more to do
    FINALIZE = "finalize"  # until dbt's process is gone


class ColumnLineageStatus(StrEnum):
    """What became of a node's column lineage. Closed list."""

    COMPLETE = "complete"
    PARTIAL = "partial"  # some columns could not be traced, or some inputs' columns are not known
    UNSUPPORTED = "unsupported"  # no SQL (a Python model), or a dialect that is not known
    ERROR = "error"  # the SQL could not be read, or not in time
    DISABLED = "disabled"  # by the config or by the node's meta
    NOT_COMPILED = "not_compiled"  # of lineage.declared: there is no compiled SQL yet


DBT_NODE_STATUS: dict[str, NodeStatus] = {
    # word in dbt     ours                          seen in
    "success": NodeStatus.SUCCESS,  # models, seeds, snapshots, hooks from 1.9
    "pass": NodeStatus.SUCCESS,  # tests, source freshness
    "OK": NodeStatus.SUCCESS,  # hooks in 1.8
    "warn": NodeStatus.WARN,  # tests, source freshness
    "fail": NodeStatus.FAIL,  # tests
    "error": NodeStatus.ERROR,  # everything; of a source: it is stale (the check was made)
    "runtime error": NodeStatus.ERROR,  # a freshness query that raised
    "partial success": NodeStatus.PARTIAL_SUCCESS,  # microbatch, 1.9+
    "skipped": NodeStatus.SKIPPED,
    "no-op": NodeStatus.NO_OP,  # exposures and saved queries, 1.10+
    "reused": NodeStatus.REUSED,  # 1.12; Fusion
}
"""dbt's word for a node's end -> ours. A word that is not here becomes `error` and is
named in a `log` event: an unknown status must not read as success."""
