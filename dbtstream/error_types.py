"""`error.type` of spans and metrics: a short closed list of what went wrong. Pure.

Layer 1, used by `measurements` and `span_mapping`, so that a span and a metric of one node say
the same word. dbt has some 200 classes of exceptions; those of a kind have one word here, by the
first words of their text ("Database Error in model orders"), else by their class. What passed,
what was skipped and what somebody cancelled has none.
"""

import re
from enum import StrEnum

from dbtstream.event_base import ErrorBlock
from dbtstream.events import AnyEvent, NodeBatch, NodeFinished, RunFinished, RunRejected
from dbtstream.statuses import NodeStatus, Reason, RunStatus


class ErrorType(StrEnum):
    """The closed list."""

    # What dbt found out.
    TEST_FAILED = "test_failed"
    SOURCE_STALE = "source_stale"
    PARTIAL_SUCCESS = "partial_success"  # some batches of a microbatch model failed
    NODES_FAILED = "nodes_failed"  # of a run: dbt was done, some node did not pass
    # What dbt raised.
    DATABASE_ERROR = "database_error"
    COMPILATION_ERROR = "compilation_error"
    PARSING_ERROR = "parsing_error"
    DEPENDENCY_ERROR = "dependency_error"
    VALIDATION_ERROR = "validation_error"
    RUNTIME_ERROR = "runtime_error"
    INTERNAL_ERROR = "internal_error"
    CONFIG_ERROR = "config_error"  # project, profile or ours
    USAGE_ERROR = "usage_error"
    # What became of dbt's process, and of its worker.
    CHILD_NOT_STARTED = "child_not_started"
    NO_HELLO = "no_hello"
    ENGINE_REFUSED = "engine_refused"
    CHILD_KILLED = "child_killed"
    PROTOCOL = "protocol"
    OOM = "oom"
    TIMEOUT = "timeout"
    WORKER_LOST = "worker_lost"
    HANDED_OVER = "handed_over"
    STATE_MISSING = "state_missing"
    REJECTED = "rejected"  # the request could not run at all
    OTHER = "_OTHER"  # OpenTelemetry's own word


_HEAD = re.compile(
    r"(?:Encountered an error:\s*)?"
    r"(Database|Compilation|Parsing|Dependency|Validation|Runtime|Internal) Error\b"
)

_CLASSES = {
    "DbtDatabaseError": ErrorType.DATABASE_ERROR,
    "FailedToConnectError": ErrorType.DATABASE_ERROR,
    "CompilationError": ErrorType.COMPILATION_ERROR,
    "ContractError": ErrorType.COMPILATION_ERROR,
    "ParsingError": ErrorType.PARSING_ERROR,
    "YamlLoadError": ErrorType.PARSING_ERROR,
    "EnvVarMissingError": ErrorType.PARSING_ERROR,
    "DependencyError": ErrorType.DEPENDENCY_ERROR,
    "DbtValidationError": ErrorType.VALIDATION_ERROR,
    "DbtRuntimeError": ErrorType.RUNTIME_ERROR,
    "FailFastError": ErrorType.NODES_FAILED,
    "DbtInternalError": ErrorType.INTERNAL_ERROR,
    "DbtConfigError": ErrorType.CONFIG_ERROR,
    "DbtProjectError": ErrorType.CONFIG_ERROR,
    "DbtProfileError": ErrorType.CONFIG_ERROR,
    "DbtSelectorsError": ErrorType.CONFIG_ERROR,
    "ConfigError": ErrorType.CONFIG_ERROR,
    "DbtUsageException": ErrorType.USAGE_ERROR,
    "BadOptionUsage": ErrorType.USAGE_ERROR,
    "ChildNotStarted": ErrorType.CHILD_NOT_STARTED,
    "HandshakeTimeout": ErrorType.NO_HELLO,
    "EngineRefused": ErrorType.ENGINE_REFUSED,
    "ChildCrashed": ErrorType.CHILD_KILLED,
    "FrameCorrupt": ErrorType.PROTOCOL,
    "FrameTooLarge": ErrorType.PROTOCOL,
    "StateMissing": ErrorType.STATE_MISSING,
}
"""Class -> word. First of all the text counts: it has a kind also where the class is a rare one."""

_REASONS = {
    Reason.TIMEOUT: ErrorType.TIMEOUT,
    Reason.CHILD_KILLED: ErrorType.CHILD_KILLED,
    Reason.OOM: ErrorType.OOM,
    Reason.WORKER_LOST: ErrorType.WORKER_LOST,
    Reason.HANDED_OVER: ErrorType.HANDED_OVER,
}

_NODES = {
    NodeStatus.FAIL: ErrorType.TEST_FAILED,
    NodeStatus.PARTIAL_SUCCESS: ErrorType.PARTIAL_SUCCESS,
}

_RUNS = {
    RunStatus.FAILURE: ErrorType.NODES_FAILED,
    RunStatus.TIMED_OUT: ErrorType.TIMEOUT,
    RunStatus.LOST: ErrorType.WORKER_LOST,
}


def error_type_of(event: AnyEvent) -> ErrorType | None:
    """Of the end of a run, a node or a batch; None of whatever did not go wrong."""
    match event:
        case NodeFinished():
            return _of_node(event)
        case RunFinished():
            return _of_run(event)
        case RunRejected():
            return ErrorType.REJECTED
        case NodeBatch(status=NodeStatus.ERROR):
            return ErrorType.OTHER  # its error comes with the node's end
    return None


def error_type_of_block(block: ErrorBlock | None) -> ErrorType:
    """The kind of what was raised."""
    if block is None:
        return ErrorType.OTHER
    if (head := _HEAD.match(block.message)) is not None:
        return ErrorType(f"{head[1].lower()}_error")
    named = _HEAD.match(block.class_)  # "Database Error", where only dbt's text told
    if named is not None:
        return ErrorType(f"{named[1].lower()}_error")
    return _CLASSES.get(block.class_, ErrorType.OTHER)


def _of_node(event: NodeFinished) -> ErrorType | None:
    if (known := _NODES.get(event.status)) is not None:
        return known
    if event.status is NodeStatus.ERROR:
        is_source = event.node.resource_type == "source"
        if is_source and event.dbt_status == "error" and event.error is None:
            return ErrorType.SOURCE_STALE
        if event.dbt_status == "runtime error" and event.error is None:
            return ErrorType.RUNTIME_ERROR
        return error_type_of_block(event.error)
    if event.status is NodeStatus.LOST:
        return _REASONS.get(event.reason, ErrorType.OTHER) if event.reason else ErrorType.OTHER
    if event.status is NodeStatus.CANCELLED and event.reason is Reason.TIMEOUT:
        return ErrorType.TIMEOUT
    return None


def _of_run(event: RunFinished) -> ErrorType | None:
    if (known := _RUNS.get(event.status)) is not None:
        return known
    if event.status is not RunStatus.ERROR:
        return None
    known = error_type_of_block(event.error)
    was_oom = event.process is not None and event.process.oom
    return ErrorType.OOM if was_oom and known is ErrorType.CHILD_KILLED else known
