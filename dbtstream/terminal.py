"""A run as text: the picture that its events add up to, and one line per event.

`cli` feeds a `RunPicture` with the events of one run; `screen` draws it on a terminal, and
`plain_line` says each event in one line where there is none. Pure: no rich, no clock (time
comes in as `now`), no I/O. Nothing here costs more per event when a run has more nodes.
"""

from collections import Counter
from dataclasses import dataclass
from datetime import datetime

from dbtstream.event_base import ErrorBlock
from dbtstream.events import (
    AnyEvent,
    ArtifactWritten,
    Gap,
    LogLine,
    NodeBatch,
    NodeFinished,
    NodeStarted,
    QueryFinished,
    RunCancel,
    RunFinished,
    RunLeased,
    RunPlanned,
    RunPlanPart,
    RunProgress,
    RunQueued,
    RunRejected,
    RunStarted,
)
from dbtstream.lineage_events import Asset, Lineage, LineageChanged
from dbtstream.statuses import NodeStatus, Reason, RunStatus

MAX_PROBLEMS = 200
"""So many failed nodes are kept with their message; more are only counted."""

RESULT_LOGS = frozenset(
    {
        "PrintEvent",  # `dbt list`, and print() in a macro
        "ListCmdOut",
        "ShowNode",
        "CompiledNode",
        "JinjaLogInfo",  # log(…, info=true)
        "DebugCmdOut",
        "DebugCmdResult",
    }
)
"""dbt's log lines that are the result of a command, such as the rows of `dbt show`."""

RESULT_COMMANDS = frozenset({"list", "ls", "show", "compile", "debug"})
"""Commands whose result is text: that goes to stdout, and how the run goes to stderr."""

BAD = frozenset({NodeStatus.FAIL, NodeStatus.ERROR, NodeStatus.PARTIAL_SUCCESS, NodeStatus.LOST})
"""A node that ended so is shown at once, with its message."""

WORDS = {
    NodeStatus.SUCCESS: "OK",
    NodeStatus.WARN: "WARN",
    NodeStatus.FAIL: "FAIL",
    NodeStatus.ERROR: "ERROR",
    NodeStatus.PARTIAL_SUCCESS: "PARTIAL",
    NodeStatus.SKIPPED: "SKIP",
    NodeStatus.NO_OP: "NO-OP",
    NodeStatus.REUSED: "REUSED",
    NodeStatus.NEVER_STARTED: "NOT RUN",
    NodeStatus.CANCELLED: "CANCEL",
    NodeStatus.LOST: "LOST",
}


@dataclass(frozen=True, slots=True)
class RunningNode:
    unique_id: str
    resource_type: str
    name: str
    since: datetime


@dataclass(frozen=True, slots=True)
class Problem:
    """A node that did not pass and that people want to read about."""

    unique_id: str
    status: NodeStatus
    message: str


class RunPicture:
    """What is known of one run after some of its events; `apply` them in order."""

    def __init__(self) -> None:
        self.run_id = ""
        self.project = ""
        self.target = ""
        self.args: list[str] = []
        self.engine: str | None = None
        self.worker: str | None = None
        self.labels: dict[str, str] = {}
        self.attempt = 0
        self.position: int | None = None  # in the queue; null once it has begun
        self.first_at: datetime | None = None
        self.started_at: datetime | None = None
        self.finished: RunFinished | None = None
        self.rejected: RunRejected | None = None
        self.cancel: RunCancel | None = None
        self._new_attempt()

    def _new_attempt(self) -> None:
        """A resumed run counts only what its last attempt does."""
        self.problems: list[Problem] = []
        self.problem_count = 0
        self.skips: Counter[str] = Counter()  # by root cause
        self.total: int | None = None
        self.done = 0
        self.eta_s: float | None = None
        self.by_status: Counter[NodeStatus] = Counter()
        self.running: dict[str, RunningNode] = {}

    @property
    def status(self) -> RunStatus:
        if self.finished is not None:
            return self.finished.status
        if self.rejected is not None:
            return RunStatus.ERROR
        return RunStatus.RUNNING if self.attempt and self.started_at else RunStatus.QUEUED

    def apply(self, event: AnyEvent) -> None:
        self._envelope(event)
        match event:
            case RunQueued():
                self.args = event.args
                self.position = event.position
            case RunStarted():
                self.args = event.args
                self.position = None
                self.started_at = event.time
            case RunPlanned():
                self.total = event.node_count
            case RunProgress():
                self.total = max(event.counts.total, self.done)
                self.eta_s = event.eta_s
            case RunCancel():
                self.cancel = event
            case NodeStarted():
                node = event.node
                self.running[node.unique_id] = RunningNode(
                    node.unique_id, node.resource_type, node.name, event.time
                )
            case NodeFinished():
                self._node_finished(event)
            case RunFinished():
                self.finished = event
                self.running.clear()
            case RunRejected():
                self.rejected = event
            case _:
                pass

    def _envelope(self, event: AnyEvent) -> None:
        if event.attempt > self.attempt:
            if self.attempt:
                self._new_attempt()
            self.attempt = event.attempt
        self.run_id, self.project, self.target = event.run_id, event.project, event.target
        self.engine = event.engine or self.engine
        self.worker = event.worker
        self.labels = event.labels or self.labels
        self.first_at = self.first_at or event.time

    def _node_finished(self, event: NodeFinished) -> None:
        # dbt does not plan its hooks, so they would take the bar past its end.
        self.done += event.node.resource_type != "operation"
        self.by_status[event.status] += 1
        self.running.pop(event.node.unique_id, None)
        if event.status is NodeStatus.SKIPPED:
            self.skips.update(event.root_causes or ["unknown"])
        elif event.status in BAD:
            self.problem_count += 1
            if len(self.problems) < MAX_PROBLEMS:
                self.problems.append(
                    Problem(event.node.unique_id, event.status, message_of(event) or "")
                )

    def elapsed_s(self, now: datetime) -> float:
        """Since a worker took the request; the run's own figure once it has ended."""
        if self.finished is not None:
            return self.finished.elapsed_s
        # The worker's clock may be ahead of ours.
        return max(0.0, (now - self.first_at).total_seconds()) if self.first_at else 0.0


def plain_line(event: AnyEvent) -> str | None:
    """The event in one line of text without colour; None if it is not worth one."""
    text = _plain_text(event)
    return None if text is None else f"{event.time:%H:%M:%S}  {text}"


def _plain_text(event: AnyEvent) -> str | None:
    match event:
        case RunLeased(cause="first") | RunPlanPart():
            return None  # run.queued, and run.planned, have just said as much
        case NodeStarted():
            of = f" ({event.index} of {event.total})" if event.index and event.total else ""
            return _node_line("START", event.node.resource_type, event.node.name) + of
        case NodeFinished():
            return node_finished_text(event)
        case NodeBatch():
            word = WORDS[event.status]
            batch = f"{event.name} batch {event.index} of {event.total}"
            return _node_line(word, event.resource_type, batch) + _took(event.execute_s)
        case LogLine():
            return event.message if event.name in RESULT_LOGS else f"{event.level}: {event.message}"
        case RunProgress() | ArtifactWritten() | Lineage() | LineageChanged() | Asset():
            return None
        case QueryFinished():
            return f"query of {event.unique_id or 'dbt'}: {event.status}{_took(event.elapsed_s)}"
        case Gap():
            return f"{event.count} {event.dropped_family} events were dropped: {event.why}"
        case _:
            return _run_text(event)


def _run_text(
    event: RunQueued | RunLeased | RunRejected | RunStarted | RunPlanned | RunCancel | RunFinished,
) -> str:
    where = f"{event.project}/{event.target}"
    match event:
        case RunQueued():
            ahead = f", {event.position} ahead of it" if event.position else ""
            return f"{where} run {event.run_id} queued: dbt {' '.join(event.args)}{ahead}"
        case RunLeased():
            whose = f" from {event.previous_worker}" if event.previous_worker else ""
            then = f", then {event.decision}" if event.decision else ""
            return f"{where} run {event.run_id} taken over{whose}: {event.cause}{then}"
        case RunRejected():
            return f"{where} run {event.run_id} rejected: {event.code}: {event.message}"
        case RunStarted():
            adapter = f", {event.adapter_type} {event.adapter_version or ''}".rstrip()
            return (
                f"{where} started: dbt {' '.join(event.args)} "
                f"(dbt {event.dbt_version}{adapter if event.adapter_type else ''})"
            )
        case RunPlanned():
            return f"{where} planned: {plural(event.node_count, 'node')}"
        case RunCancel():
            by = f" by {event.by}" if event.by else ""
            why = f": {event.reason}" if event.reason else ""
            return f"{where} cancel: {event.step}{by}{why}"
        case RunFinished():
            error = f": {first_line(event.error.message)}" if event.error else ""
            return (
                f"{where} run {event.run_id} finished: {event.status}, exit code "
                f"{event.exit_code}, {duration(event.elapsed_s)}{error}"
            )


def node_finished_text(event: NodeFinished, *, with_message: bool = True) -> str:
    line = _node_line(WORDS[event.status], event.node.resource_type, event.node.name)
    line += _took(event.execute_s)
    if event.rows_affected:
        line += f", {plural(event.rows_affected, 'row')}"
    message = message_of(event) if with_message else None
    if event.status in (NodeStatus.SKIPPED, NodeStatus.NEVER_STARTED):
        return f"{line}: {_because(event)}"
    if message and (event.status in BAD or event.status is NodeStatus.WARN):
        return f"{line}: {first_line(message)}"
    return line


def _node_line(word: str, resource_type: str, name: str) -> str:
    return f"{word:<7}  {resource_type:<9}  {name}"


def _because(event: NodeFinished) -> str:
    if event.root_causes:
        return "because of " + ", ".join(event.root_causes[:3])
    return (event.reason or Reason.UPSTREAM_FAILED).replace("_", " ")


def _took(seconds: float | None) -> str:
    return "" if seconds is None else f"  {duration(seconds)}"


def message_of(event: NodeFinished) -> str | None:
    """What dbt said of the node; its error's text where dbt gave no message."""
    if event.message:
        return event.message.strip()
    return event.error.message.strip() if event.error else None


def error_text(error: ErrorBlock) -> str:
    """`class: message`, without saying the class twice."""
    message = error.message.strip()
    return message if message.startswith(error.class_) else f"{error.class_}: {message}"


def first_line(text: str) -> str:
    """Lines as one: dbt puts the cause on the second or third line of its messages."""
    return " ".join(text.split())


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def duration(seconds: float) -> str:
    """0.31 s, 12.4 s, 3 m 07 s, 2 h 05 m."""
    if round(seconds, 2) < 10:
        return f"{seconds:.2f} s"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} m {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} m"
