"""What events come to in numbers: of each event, which instruments move and by how much. Pure.

Layer 1. `metrics` feeds in the events of each attempt and records what comes out; there is no
OpenTelemetry in here. The values of attributes are bounded: names that come from outside
(a project in a subject, an owner in a project's YAML, a custom materialization) are used as far
as they are known or few, and are `_OTHER` or `custom` beyond that.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple, Protocol

from dbtstream import instruments as i
from dbtstream.config import KNOWN_COMMANDS
from dbtstream.error_types import ErrorType, error_type_of
from dbtstream.events import (
    AnyEvent,
    Gap,
    NodeFinished,
    NodeStarted,
    RunFinished,
    RunLeased,
    RunRejected,
    RunStarted,
)
from dbtstream.instruments import Instrument
from dbtstream.messages import RejectCode, RunView
from dbtstream.resume import FIRST, HANDED_OVER, WORKER_LOST
from dbtstream.statuses import NodeStatus, RunStatus

OTHER = "_OTHER"
CUSTOM = "custom"
NO_OWNER = "none"
MAX_OWNERS = 50
MAX_SLOWEST = 10

NODE_TYPES = frozenset(
    {"model", "test", "unit_test", "seed", "snapshot", "source", "operation", "exposure"}
    | {"function", "analysis", "metric", "saved_query", "semantic_model", "sql_operation"}
)
MATERIALIZATIONS = frozenset(
    {"table", "view", "incremental", "ephemeral", "materialized_view", "seed", "snapshot"}
    | {"test", "unit", "function", "clone"}
)
"""dbt's own; a project's are `custom`."""

WORKING = frozenset({"build", "run", "test", "seed", "snapshot", "retry"})
"""Commands whose slowest nodes are worth a look; a freshness check does not put them away."""

PROBLEMS = (NodeStatus.WARN, NodeStatus.FAIL, NodeStatus.ERROR, NodeStatus.PARTIAL_SUCCESS)

EXITS = (
    "ok",
    "failure",
    "error",
    "interrupted",
    "signal",
    "oom",
    "timeout",
    "no_hello",
    "protocol",
)
CODES = frozenset(code.value for code in RejectCode)
STARTS = ("cold", "warm", "manifest")
FRESHNESS = ("passed", "warned", "failed", "error")
SEVERITIES = ("warn", "error")
WITH_ROWS = ("model", "seed", "snapshot")

Attributes = Mapping[str, str]


class Measurement(NamedTuple):
    """`value` is added to a counter, recorded by a histogram, set in a gauge."""

    instrument: Instrument
    value: float
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class SourceCheck:
    """How a source's last freshness check ended."""

    outcome: str
    age_s: float | None


class KnownEnd(Protocol):
    """How a node ended last; `store.NodeState` is one."""

    @property
    def unique_id(self) -> str: ...
    @property
    def status(self) -> NodeStatus: ...
    @property
    def message(self) -> str | None: ...
    @property
    def finished_at(self) -> datetime | None: ...


class Known:
    """What is known beyond one attempt: which names may be attributes, and what was last seen."""

    def __init__(self, targets: Mapping[str, Sequence[str]]) -> None:
        self.sources: dict[tuple[str, str], dict[str, SourceCheck]] = {}
        self.slowest: dict[tuple[str, str], dict[str, float]] = {}
        self._targets = {name: frozenset(names) for name, names in targets.items()}
        self._owners: set[str] = set()

    def where(self, project: str, target: str) -> dict[str, str]:
        targets = self._targets.get(project)
        return {
            i.PROJECT: OTHER if targets is None else project,
            i.TARGET: target if targets is not None and target in targets else OTHER,
        }

    @property
    def targets(self) -> list[tuple[str, str]]:
        return [(name, target) for name, targets in self._targets.items() for target in targets]

    def owner(self, name: str) -> str:
        """The first MAX_OWNERS that come keep their names."""
        if name not in self._owners:
            if len(self._owners) >= MAX_OWNERS:
                return OTHER
            self._owners.add(name)
        return name

    def recall_sources(
        self, project: str, target: str, states: Iterable[KnownEnd]
    ) -> list[Measurement]:
        """From how each source ended when it was last checked, before our time."""
        stored = [(s, check) for s in states if (check := _stored_check(s)) is not None]
        if not stored or (project, target) in self.sources:
            return []
        self.sources[project, target] = {s.unique_id: check for s, check in stored}
        ends = [s.finished_at.timestamp() for s, _ in stored if s.finished_at is not None]
        return self._of_sources(project, target, max(ends, default=0.0))

    def checked(
        self, project: str, target: str, checks: Mapping[str, SourceCheck], at: float
    ) -> list[Measurement]:
        self.sources[project, target] = self.sources.get((project, target), {}) | dict(checks)
        return self._of_sources(project, target, at)

    def _of_sources(self, project: str, target: str, at: float) -> list[Measurement]:
        where = {i.PROJECT: project, i.TARGET: target}
        outcomes = [check.outcome for check in self.sources[project, target].values()]
        counts = [
            Measurement(i.SOURCES, outcomes.count(outcome), where | {i.FRESHNESS: outcome})
            for outcome in FRESHNESS
        ]
        return [*counts, Measurement(i.SOURCES_CHECKED, at, where)]

    def at_zero(self) -> list[Measurement]:
        """Counters begin at 0 for all label sets that are known to come: of one that appears
        with its first 1, an increase cannot be seen."""
        zeros: list[tuple[Instrument, Attributes]] = []
        for project, targets in self._targets.items():
            in_project = {i.PROJECT: project}
            zeros += [
                (i.REQUESTS_REJECTED, in_project | {i.REASON: code.value}) for code in RejectCode
            ]
            zeros += [(i.CHILD_STARTS, in_project | {i.START: start}) for start in STARTS]
            zeros += [(i.CHILD_EXITS, in_project | {i.REASON: reason}) for reason in EXITS]
            zeros.append((i.CHILD_CPU, in_project))
            for target in targets:
                zeros += _zeros_of(in_project | {i.TARGET: target})
        return [Measurement(instrument, 0, attributes) for instrument, attributes in zeros]


@dataclass(slots=True)
class AttemptMeasurements:
    """Of one attempt: `take` each of its events, in order."""

    known: Known
    command: str
    _where: dict[str, str]
    _project: dict[str, str]
    _checked: dict[str, SourceCheck] = field(default_factory=dict)
    _at_zero: set[str] = field(default_factory=set)  # owners whose counters have begun

    @classmethod
    def of(
        cls, known: Known, project: str, target: str, command: str | None
    ) -> "AttemptMeasurements":
        where = known.where(project, target)
        return cls(known, command_of(command), where, {i.PROJECT: where[i.PROJECT]})

    def take(self, event: AnyEvent) -> Iterable[Measurement]:
        match event:
            case NodeStarted():
                return self._expected(event)
            case NodeFinished():
                return self._node(event)
            case RunStarted():
                return self._run_started(event)
            case RunFinished():
                return self._run_finished(event)
            case RunLeased() if event.cause != FIRST:
                cause = event.cause if event.cause in (WORKER_LOST, HANDED_OVER) else OTHER
                return [Measurement(i.RUN_TAKEOVERS, 1, self._where | {i.REASON: cause})]
            case RunRejected():
                code = event.code if event.code in CODES else OTHER
                return [Measurement(i.REQUESTS_REJECTED, 1, self._project | {i.REASON: code})]
            case Gap():
                attributes = {i.FAMILY: event.dropped_family, i.REASON: gap_reason(event.why)}
                return [Measurement(i.EVENT_DROPPED, event.count, attributes)]
        return ()

    # -- nodes ---------------------------------------------------------------------------------

    def _expected(self, event: NodeStarted) -> Iterable[Measurement]:
        """An owner's counters begin at 0 before there can be a problem."""
        new = [owner for owner in self._owners(event.node.owners) if owner not in self._at_zero]
        if not new:
            return ()
        self._at_zero.update(new)
        return [
            Measurement(
                i.NODE_PROBLEMS, 0, self._where | {i.OWNER: owner, i.NODE_STATUS: status.value}
            )
            for owner in new
            for status in PROBLEMS
        ]

    def _node(self, event: NodeFinished) -> list[Measurement]:
        node, status = event.node, event.status.value
        kind = node.resource_type if node.resource_type in NODE_TYPES else OTHER
        attributes = self._where | {i.NODE_TYPE: kind, i.NODE_STATUS: status}
        if node.materialized:
            known = node.materialized in MATERIALIZATIONS
            attributes[i.MATERIALIZATION] = node.materialized if known else CUSTOM
        if (error := error_type_of(event)) is not None:
            attributes[i.ERROR_TYPE] = error.value
        found = [Measurement(i.NODE_DURATION, node_duration_s(event), attributes)]
        if event.rows_affected:
            rows = self._where | {i.NODE_TYPE: kind}
            found.append(Measurement(i.NODE_ROWS, event.rows_affected, rows))
        if event.status in PROBLEMS:
            found += (
                Measurement(
                    i.NODE_PROBLEMS, 1, self._where | {i.OWNER: owner, i.NODE_STATUS: status}
                )
                for owner in self._owners(node.owners)
            )
        if event.test is not None and event.failures:
            severity = (event.test.severity or "error").lower()
            severity = severity if severity in SEVERITIES else OTHER
            found.append(
                Measurement(i.TEST_FAILURES, event.failures, self._where | {i.SEVERITY: severity})
            )
        if kind == "source" and (check := source_check(event)) is not None:
            self._checked[node.unique_id] = check
        return found

    def _owners(self, owners: Sequence[str]) -> Iterable[str]:
        return {self.known.owner(owner) for owner in owners} or {NO_OWNER}

    # -- runs ----------------------------------------------------------------------------------

    def _run_started(self, event: RunStarted) -> list[Measurement]:
        start = event.start if event.start in STARTS else OTHER
        found = [Measurement(i.CHILD_STARTS, 1, self._project | {i.START: start})]
        if event.attempt == 1:  # later ones have waited for more than the queue
            found.append(Measurement(i.RUN_QUEUE_DURATION, event.queue_wait_s, self._where))
        return found

    def _run_finished(self, event: RunFinished) -> list[Measurement]:
        key = (self._where[i.PROJECT], self._where[i.TARGET])
        command = self._where | {i.COMMAND: self.command}
        ended = {i.RUN_STATUS: event.status.value}
        error = error_type_of(event)
        with_error = {} if error is None else {i.ERROR_TYPE: error.value}
        found = [
            Measurement(i.RUN_DURATION, event.elapsed_s, command | ended | with_error),
            Measurement(i.RUNS_ENDED, 1, self._where | ended),
            Measurement(i.RUN_LAST_COMPLETION, event.time.timestamp(), command | ended),
        ]
        if event.status in (RunStatus.SUCCESS, RunStatus.FAILURE):
            found.append(Measurement(i.RUN_LAST_DURATION, event.elapsed_s, command))
            slowest = event.slowest[:MAX_SLOWEST]
            if slowest and self.command in WORKING:
                self.known.slowest[key] = {node.unique_id: node.elapsed_s for node in slowest}
        return [*found, *self._process(event), *self._phases(event), *self._sources(event)]

    def _process(self, event: RunFinished) -> Iterable[Measurement]:
        if (reason := exit_reason(event)) is not None:
            yield Measurement(i.CHILD_EXITS, 1, self._project | {i.REASON: reason})
        if (cpu_s := event.resource.cpu_s) is not None:
            yield Measurement(i.CHILD_CPU, cpu_s, self._project)
        if (max_rss := event.resource.max_rss) is not None:
            yield Measurement(i.CHILD_MEMORY, max_rss, self._where)

    def _phases(self, event: RunFinished) -> Iterable[Measurement]:
        for timing in event.phases:
            took_s = max((timing.finished_at - timing.started_at).total_seconds(), 0.0)
            yield Measurement(
                i.PHASE_DURATION, took_s, self._project | {i.PHASE: timing.phase.value}
            )

    def _sources(self, event: RunFinished) -> list[Measurement]:
        if not self._checked:
            return []
        project, target = self._where[i.PROJECT], self._where[i.TARGET]
        return self.known.checked(project, target, self._checked, event.time.timestamp())


def last_completions(known: Known, views: Iterable[RunView]) -> list[Measurement]:
    """Of stored runs, newest first: how each kind of run last ended. Only the newest counts."""
    found: list[Measurement] = []
    seen: set[tuple[tuple[str, str], ...]] = set()

    def tell(instrument: Instrument, value: float, attributes: dict[str, str]) -> None:
        label_set = ((instrument.name, ""), *sorted(attributes.items()))
        if label_set not in seen:
            seen.add(label_set)
            found.append(Measurement(instrument, value, attributes))

    for view in views:
        ended = view.finished_at
        if ended is None or not view.status.is_terminal or not view.attempt:
            continue  # also those that were rejected
        command = known.where(view.project, view.target) | {
            i.COMMAND: command_of(command_in(view.args))
        }
        tell(i.RUN_LAST_COMPLETION, ended.timestamp(), command | {i.RUN_STATUS: view.status.value})
        if view.status in (RunStatus.SUCCESS, RunStatus.FAILURE) and view.started_at:
            elapsed_s = max((ended - view.started_at).total_seconds(), 0.0)
            tell(i.RUN_LAST_DURATION, elapsed_s, command)
    return found


def command_of(command: str | None) -> str:
    return command if command in KNOWN_COMMANDS else OTHER


def command_in(args: Sequence[str]) -> str | None:
    """dbt's command in a request's words: the first of them that is one, or two that are."""
    pairs = zip(args, [*args[1:], ""], strict=True)
    words = (word for one, two in pairs for word in (f"{one} {two}", one))
    return next((word for word in words if word in KNOWN_COMMANDS), None)


def node_duration_s(event: NodeFinished) -> float:
    """From start to end, as dbt says; what never ran took 0."""
    if event.started_at is not None and event.finished_at is not None:
        return max((event.finished_at - event.started_at).total_seconds(), 0.0)
    return (event.compile_s or 0.0) + (event.execute_s or 0.0)


def source_check(event: NodeFinished) -> SourceCheck | None:
    """None when it was not checked: skipped, cancelled, lost."""
    age_s = event.freshness.age_s if event.freshness else None
    match event.status:
        case NodeStatus.SUCCESS:
            return SourceCheck("passed", age_s)
        case NodeStatus.WARN:
            return SourceCheck("warned", age_s)
        case NodeStatus.ERROR:
            stale = error_type_of(event) is ErrorType.SOURCE_STALE
            return SourceCheck("failed" if stale else "error", age_s)
    return None


def _stored_check(end: KnownEnd) -> SourceCheck | None:
    """A stale source was checked well, so there is no message; its age is not stored."""
    match end.status:
        case NodeStatus.SUCCESS:
            return SourceCheck("passed", None)
        case NodeStatus.WARN:
            return SourceCheck("warned", None)
        case NodeStatus.ERROR:
            return SourceCheck("error" if end.message else "failed", None)
    return None


def gap_reason(why: str) -> str:
    """Of `why` in a gap event, one of a few words."""
    for part, reason in (
        ("outbox", "outbox_full"),
        ("refused by NATS", "refused"),
        ("worker died", "worker_lost"),
        ("dbt's process", "child_queue_full"),
    ):
        if part in why:
            return reason
    return OTHER


def exit_reason(event: RunFinished) -> str | None:
    """How dbt's process ended, one of EXITS; None where there was none, or nobody saw its end."""
    match error_type_of(event):
        case ErrorType.NO_HELLO:
            return "no_hello"
        case ErrorType.PROTOCOL:
            return "protocol"
        case ErrorType.OOM:
            return "oom"
        case ErrorType.CHILD_KILLED:
            return "signal"
    if event.process is None:
        return None
    return {
        RunStatus.SUCCESS: "ok",
        RunStatus.FAILURE: "failure",
        RunStatus.CANCELLED: "interrupted",
        RunStatus.TIMED_OUT: "timeout",
    }.get(event.status, "error")


def _zeros_of(where: dict[str, str]) -> list[tuple[Instrument, Attributes]]:
    zeros: list[tuple[Instrument, Attributes]] = [
        (i.RUNS_ENDED, where | {i.RUN_STATUS: status.value})
        for status in RunStatus
        if status.is_terminal
    ]
    zeros += [(i.RUN_TAKEOVERS, where | {i.REASON: cause}) for cause in (WORKER_LOST, HANDED_OVER)]
    zeros += [(i.NODE_ROWS, where | {i.NODE_TYPE: kind}) for kind in WITH_ROWS]
    zeros += [(i.TEST_FAILURES, where | {i.SEVERITY: severity}) for severity in SEVERITIES]
    zeros += [
        (i.NODE_PROBLEMS, where | {i.OWNER: NO_OWNER, i.NODE_STATUS: status.value})
        for status in PROBLEMS
    ]
    return zeros
