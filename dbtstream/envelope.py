"""Numbers and addresses a run's events: seq, event_id, span, and the fields that all share.

Layer 1, pure, used by `normalizer` and `node_events`. It collects events until they are
taken; what they say is not its business.
"""

from collections.abc import Callable
from datetime import datetime
from typing import Any

import msgspec

from dbtstream.dbt_values import clean
from dbtstream.events import AnyEvent, LogLine, TraceBlock
from dbtstream.trace import TraceParent, parse_traceparent, span_id_of, trace_id_of, tracestate_in

OUR_LOG_CODE = "dbtstream"
"""`code` of log events that dbtstream itself adds to a run; dbt's are like "Q001"."""


class RunContext(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an attempt before dbt says a word."""

    project: str
    target: str
    run_id: str
    attempt: int
    fence: int
    worker: str
    host: str
    args: list[str]  # scrubbed
    queued_at: datetime
    command: str | None = None  # dbt's first word: build, test …
    labels: dict[str, str] = {}
    request_id: str | None = None
    requested_by: str | None = None
    reason: str | None = None
    position: int = 0
    first_seq: int = 1
    began_at: datetime | None = None  # when the first attempt did, in a later one
    trace_id: str | None = None  # by trace.run_trace_id; else the run id's own
    trace: TraceBlock | None = None  # what the request came with
    objects: dict[str, str] = {}  # kind of artifact -> where it will be in the Object Store
    target_path: str | None = None  # artifacts below it are named relative to it
    expected_s: float | None = None

    @property
    def requester(self) -> TraceParent | None:
        """The span that asked for the run; the run's parent if they have one `trace_id`."""
        return parse_traceparent(self.trace.traceparent) if self.trace else None

    @property
    def tracestate(self) -> str:
        """It goes with the requester's trace, and with no other."""
        return tracestate_in(self.trace, self.trace_id or trace_id_of(self.run_id))


class Envelope:
    """Makes events and keeps them until `taken`."""

    def __init__(self, context: RunContext) -> None:
        self.next_seq = context.first_seq
        self.engine: str | None = None
        self.invocation_id: str | None = None
        self._out: list[AnyEvent] = []
        self._context = context
        self._event_id = f"{context.run_id}.{context.attempt}."
        self._run_span = self.span("run")
        self._fixed: dict[str, Any] = {
            "project": context.project,
            "target": context.target,
            "run_id": context.run_id,
            "attempt": context.attempt,
            "fence": context.fence,
            "worker": context.worker,
            "trace_id": context.trace_id or trace_id_of(context.run_id),
            "labels": context.labels,
        }

    def emit(
        self,
        event: Callable[..., AnyEvent],
        at: datetime,
        span_id: str | None = None,
        **fields: Any,
    ) -> None:
        """The next event of the run; of the run's own span unless another is named."""
        seq = self.next_seq
        self.next_seq = seq + 1
        self._out.append(
            event(
                event_id=f"{self._event_id}{seq}",
                time=at,
                seq=seq,
                span_id=span_id or self._run_span,
                engine=self.engine,
                invocation_id=self.invocation_id,
                **self._fixed,
                **fields,
            )
        )

    def log(self, level: str, name: str, message: str, at: datetime) -> None:
        """A line of ours among dbt's: something about this run is not as it should be."""
        text, truncated = clean(message)
        self.emit(
            LogLine,
            at,
            level=level,
            code=OUR_LOG_CODE,
            name=name,
            message=text or "",
            truncated=truncated,
        )

    def span(self, role: str, *about: str | int) -> str:
        return span_id_of(self._context.run_id, self._context.attempt, role, *about)

    def taken(self) -> list[AnyEvent]:
        out, self._out = self._out, []
        return out
