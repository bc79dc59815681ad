"""A run's events as spans: the tree, its ids and times, what is an error. Pure.

    dbt build shop           CONSUMER   from the request's storing to the run's end
    ├─ queue                            until dbt's process is started
    └─ dbt                   CLIENT     the process
       ├─ startup, parse
       ├─ execute
       │  └─ model orders               nodes, tests, hooks; links to what they read
       │     ├─ batch orders            of a microbatch model
       │     └─ SELECT       CLIENT     queries, where they are asked for
       └─ finalize

Layer 1. A span is made when the event comes that closes it, and never changed. All in it comes
from events and from the ids of `trace`, so that whoever reads the events again, in another
process, a day later, makes the same spans; a backend then has them once. An attempt of a lost
worker has no closing event of its own: its spans are made of the `run.leased` of the one that
takes over. `publishers.otel` sends them.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from dbtstream.config import TelemetryConfig
from dbtstream.envelope import RunContext
from dbtstream.error_types import ErrorType, error_type_of
from dbtstream.events import (
    AnyEvent,
    NodeBatch,
    NodeFinished,
    NodeStarted,
    PhaseTiming,
    ProcessBlock,
    QueryFinished,
    RunFinished,
    RunLeased,
    RunPlanned,
    RunRejected,
    RunStarted,
)
from dbtstream.instruments import (
    COMMAND,
    ERROR_TYPE,
    PHASE,
    PROJECT,
    RUN_STATUS,
    TARGET,
    UNIQUE_ID,
)
from dbtstream.messages import OnLost
from dbtstream.phases import Phases
from dbtstream.resume import FIRST, WORKER_LOST
from dbtstream.span_attributes import (
    RESULTS,
    Values,
    batch_attributes,
    dbt_attributes,
    node_attributes,
    query_attributes,
    query_operation,
)
from dbtstream.span_texts import attributes, text, unix_ns
from dbtstream.spans import MAX_LINKS, MAX_STATUS_TEXT, Span, SpanKind, SpanLink
from dbtstream.statuses import Phase
from dbtstream.subjects import runs_subject
from dbtstream.trace import TraceParent, span_id_of, trace_id_of

LINK_TYPE = "dbtstream.link.type"

_TYPES = {"consumer": "queue", "client": "custom", "internal": "custom"}
"""Datadog's span.type, by kind."""


class RunSpans:
    """Those of one attempt; `take` its events in order.

    `earlier` are the events of the run that are told already: of attempts before this one, and
    of this one where it is closed in place of a worker that is gone.
    """

    def __init__(
        self,
        context: RunContext,
        *,
        settings: TelemetryConfig,
        earlier: Iterable[AnyEvent] = (),
    ) -> None:
        self._context, self._settings = context, settings
        self._trace_id = context.trace_id or trace_id_of(context.run_id)
        requester = context.requester
        self._parent = requester if requester and requester.trace_id == self._trace_id else None
        self._tracestate = context.tracestate
        self._run_span = self._id("run")
        self._child_span = self._id("child")
        self._execute_span = self._id("phase", Phase.EXECUTE.value)
        self._links = self._links_of_run(requester)
        self._phases = Phases(context.queued_at)
        self._started: RunStarted | None = None
        self._open: dict[str, NodeStarted] = {}
        self._ended_in: dict[str, int] = {}  # unique_id -> the attempt that has its span
        self._told_at: datetime | None = None
        self._shared: Values = {
            PROJECT: context.project,
            TARGET: context.target,
            "dbtstream.run.id": context.run_id,
            "dbtstream.run.attempt": context.attempt,
        }
        for event in earlier:
            self._recall(event)

    def take(self, event: AnyEvent) -> list[Span]:
        """The spans that it closes; mostly none or one."""
        match event:
            case NodeFinished():
                span = self._node(event)
                self._note(event)
                return [span]
            case NodeBatch():
                return [self._batch(event)]
            case QueryFinished():
                return [self._query(event)] if self._settings.query_spans else []
            case RunFinished():
                return self._finished(event)
            case RunRejected():
                return [self._rejected(event)]
            case RunLeased() if event.cause != FIRST and event.decision != OnLost.FAIL:
                return self._taken_over(event)
            case _:
                self._note(event)
                return []

    # What later spans need of an event.

    def _recall(self, event: AnyEvent) -> None:
        if event.attempt == self._context.attempt:
            self._told_at = event.time
            self._note(event)
        elif isinstance(event, NodeFinished):
            self._ended_in[event.node.unique_id] = event.attempt
        elif isinstance(event, RunLeased):
            self._phases.waits_since = event.time

    def _note(self, event: AnyEvent) -> None:
        match event:
            case NodeStarted():
                self._open[event.node.unique_id] = event
            case NodeFinished():
                self._open.pop(event.node.unique_id, None)
                self._ended_in[event.node.unique_id] = event.attempt
            case RunStarted():
                self._started = event
                self._phases.spawned_at = event.time - timedelta(seconds=event.start_s)
                self._phases.invoked_at = event.time
                if self._context.attempt == 1:
                    waited = timedelta(seconds=event.queue_wait_s)
                    self._phases.waits_since = self._phases.spawned_at - waited
            case RunPlanned():
                self._phases.planned_at = event.time
            case _:
                pass

    # Nodes and what is below them.

    def _node(self, event: NodeFinished) -> Span:
        node, error = event.node, error_type_of(event)
        started = self._open.get(node.unique_id)
        end = event.finished_at or event.time
        begin = event.started_at or (started.time if started else end)
        return self._span(
            event,
            event.span_id or self._run_span,
            self._name(node.resource_type, node.name),
            self._work_span,
            begin,
            end,
            node_attributes(event, error),
            links=self._upstream(node.upstream),
            error=_said(event, error),
        )

    def _batch(self, event: NodeBatch) -> Span:
        error = error_type_of(event)
        return self._span(
            event,
            event.span_id or self._run_span,
            self._name("batch", event.name),
            self._id("node", event.unique_id),
            event.time - timedelta(seconds=event.execute_s or 0.0),
            event.time,
            batch_attributes(event, error),
            error="the batch failed" if error else None,
        )

    def _query(self, event: QueryFinished) -> Span:
        about_node = event.span_id is not None and event.span_id != self._run_span
        return self._span(
            event,
            self._id("query", event.seq),
            query_operation(event) or "query",
            event.span_id if about_node else self._work_span,
            event.time - timedelta(seconds=event.elapsed_s),
            event.time,
            query_attributes(event, self._started.adapter_type if self._started else None),
            kind="client",
        )

    def _upstream(self, upstream: Sequence[str]) -> list[SpanLink]:
        ended = [(name, self._ended_in[name]) for name in upstream if name in self._ended_in]
        return [
            SpanLink(
                trace_id=self._trace_id,
                span_id=span_id_of(self._context.run_id, attempt, "node", name),
                attributes={LINK_TYPE: "upstream", UNIQUE_ID: text(name)},
            )
            for name, attempt in ended[:MAX_LINKS]
        ]

    # The end of an attempt.

    def _finished(self, event: RunFinished) -> list[Span]:
        error = error_type_of(event)
        told = None
        if error is not None:
            told = event.error.message if event.error else _count(event)
        values: Values = {
            RUN_STATUS: event.status.value,
            "cicd.pipeline.result": RESULTS[event.status],
            ERROR_TYPE: error.value if error else None,
            "dbtstream.run.verified": event.verified,
            **{f"dbt.run.nodes.{name}": count for name, count in _counts(event).items()},
        }
        phases = event.phases or self._phases.timings(event.time)
        in_child = error not in (None, ErrorType.NODES_FAILED)
        return self._attempt(
            event, phases, event.time, values, told, event.process, child_failed=in_child
        )

    def _taken_over(self, event: RunLeased) -> list[Span]:
        """The attempt of another worker, which cannot tell its end any more."""
        lost = event.cause == WORKER_LOST
        # One that was handed over had told the ends of its nodes, and that was its end.
        end = event.time if lost or self._open or self._told_at is None else self._told_at
        values: Values = {
            "dbtstream.worker": event.previous_worker,
            "dbtstream.attempt.end": event.cause,
            "dbtstream.attempt.next": event.decision,
            "cicd.pipeline.result": "error" if lost else "cancellation",
            ERROR_TYPE: ErrorType.WORKER_LOST.value if lost else None,
        }
        told = f"worker {event.previous_worker} was lost" if lost else None
        return self._attempt(
            event, self._phases.timings(end), end, values, told, None, child_failed=lost
        )

    def _attempt(
        self,
        event: RunFinished | RunLeased,
        phases: Sequence[PhaseTiming],
        end: datetime,
        values: Values,
        error: str | None,
        process: ProcessBlock | None,
        *,
        child_failed: bool,
    ) -> list[Span]:
        """The run's span and those right below it; nodes are told already."""
        begin = phases[0].started_at if phases else end
        spans = [self._run(event, begin, end, values, error)]
        spans += [self._phase(event, phase) for phase in phases]
        began = [phase for phase in phases if phase.phase is not Phase.QUEUE]
        if began:
            first, last = began[0].started_at, began[-1].finished_at
            failed = error if child_failed else None
            error_type = values[ERROR_TYPE] if child_failed else None
            spans.append(self._child(event, first, last, process, failed, error_type))
        return spans

    def _run(
        self,
        event: RunFinished | RunLeased | RunRejected,
        begin: datetime,
        end: datetime,
        values: Values,
        error: str | None,
    ) -> Span:
        context = self._context
        command = context.command if context.command != "_" else None
        name = " ".join(word for word in ("dbt", command, context.project) if word)
        asked_with = context.trace.baggage if context.trace else {}
        baggage = {key: value for key, value in asked_with.items() if key not in self._shared}
        return self._span(
            event,
            self._run_span,
            name,
            self._parent.span_id if self._parent else None,
            begin,
            end,
            {
                **baggage,
                COMMAND: command,
                **dbt_attributes(self._started),
                "dbt.invocation_id": event.invocation_id,
                "dbtstream.worker": event.worker,
                "cicd.pipeline.name": context.project,
                "cicd.pipeline.run.id": context.run_id,
                "cicd.pipeline.action.name": "RUN",
                "messaging.system": "nats",
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "messaging.destination.name": runs_subject(context.project, context.target),
                "messaging.message.id": context.request_id,
                **values,
                **{f"dbtstream.label.{key}": value for key, value in context.labels.items()},
            },
            kind="consumer",
            links=self._links,
            error=error,
            is_local=False,
        )

    def _child(
        self,
        event: AnyEvent,
        begin: datetime,
        end: datetime,
        process: ProcessBlock | None,
        error: str | None,
        error_type: object,
    ) -> Span:
        started = self._started
        values: Values = {
            "process.pid": started.pid if started else None,
            "process.runtime.version": started.python_version if started else None,
            **dbt_attributes(started),
            ERROR_TYPE: str(error_type) if error_type else None,
        }
        if process is not None:
            begin, end = process.started_at, process.finished_at
            values["process.pid"] = process.pid
            values["process.exit.code"] = process.exit_code
            values["dbtstream.process.signal"] = process.signal
        return self._span(
            event,
            self._child_span,
            "dbt",
            self._run_span,
            begin,
            end,
            values,
            kind="client",
            error=error,
        )

    def _phase(self, event: AnyEvent, phase: PhaseTiming) -> Span:
        return self._span(
            event,
            self._id("phase", phase.phase.value),
            phase.phase.value,
            self._run_span if phase.phase is Phase.QUEUE else self._child_span,
            phase.started_at,
            phase.finished_at,
            {PHASE: phase.phase.value},
        )

    def _rejected(self, event: RunRejected) -> Span:
        values: Values = {
            "dbtstream.reject.code": event.code,
            "dbtstream.reject.field": event.field,
            "cicd.pipeline.result": "error",
            ERROR_TYPE: ErrorType.REJECTED.value,
        }
        return self._run(event, self._context.queued_at, event.time, values, event.message)

    # One span.

    def _span(
        self,
        event: AnyEvent,
        span_id: str,
        name: str,
        parent: str | None,
        begin: datetime,
        end: datetime,
        values: Values,
        *,
        kind: SpanKind = "internal",
        links: Sequence[SpanLink] = (),
        error: str | None = None,
        is_local: bool = True,
    ) -> Span:
        start_ns = unix_ns(begin)
        name = text(name)
        if self._settings.datadog:
            values = {**values, **_for_datadog(name, kind, values)}
        return Span(
            trace_id=event.trace_id or self._trace_id,
            span_id=span_id,
            name=name,
            kind=kind,
            start_ns=start_ns,
            end_ns=max(start_ns, unix_ns(end)),
            parent_span_id=parent,
            parent_is_remote=parent is not None and not is_local,
            tracestate=self._tracestate,
            attributes=attributes({**self._shared, **values}),
            links=list(links[:MAX_LINKS]),
            error=None if error is None else text(error, MAX_STATUS_TEXT),
        )

    @property
    def _work_span(self) -> str:
        """Under which nodes are: dbt begins none before it has planned, but who knows."""
        if self._phases.planned_at is not None:
            return self._execute_span
        return self._child_span if self._started is not None else self._run_span

    def _links_of_run(self, requester: TraceParent | None) -> list[SpanLink]:
        links = []
        asked = self._context.trace
        if requester is not None and asked and self._settings.trace_context != "ignore":
            links.append(
                SpanLink(
                    trace_id=requester.trace_id,
                    span_id=requester.span_id,
                    tracestate=asked.tracestate,
                    attributes={LINK_TYPE: "request"},
                )
            )
        if self._context.attempt > 1:
            previous = span_id_of(self._context.run_id, self._context.attempt - 1, "run")
            links.append(
                SpanLink(
                    trace_id=self._trace_id,
                    span_id=previous,
                    attributes={LINK_TYPE: "previous_attempt"},
                )
            )
        return links

    def _name(self, kind: str, name: str) -> str:
        return f"{kind} {name}" if self._settings.span_names == "node" else kind

    def _id(self, role: str, *about: str | int) -> str:
        return span_id_of(self._context.run_id, self._context.attempt, role, *about)


def _said(event: NodeFinished, error: ErrorType | None) -> str | None:
    """What an ERROR status says; None for a status that stays unset."""
    if error is None:
        return None
    block = event.error.message if event.error else None
    return block or event.message or (event.reason.value if event.reason else error.value)


def _count(event: RunFinished) -> str:
    return f"{event.failed_count} nodes did not pass"


def _counts(event: RunFinished) -> dict[str, int]:
    """By status, over all types."""
    counts: dict[str, int] = {}
    for of_type in event.counts.values():
        for name, count in of_type.items():
            counts[name] = counts.get(name, 0) + count
    return counts


def _for_datadog(name: str, kind: SpanKind, values: Values) -> Values:
    """What Datadog would make of kind and name otherwise."""
    if "db.system.name" in values:
        return {"operation.name": "dbt.query", "resource.name": name, "span.type": "sql"}
    about = "run" if kind == "consumer" else "node" if UNIQUE_ID in values else "phase"
    return {"operation.name": f"dbt.{about}", "resource.name": name, "span.type": _TYPES[kind]}
