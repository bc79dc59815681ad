"""Frames of one attempt in, contract events out. Pure: no I/O, no clock, no asyncio.

Layer 1. `execution` feeds it what `dbt_process` reads and publishes what it returns. The
run's own events are made here, those of nodes in `node_events`; what is known of each node is
in `ledger`, what an end means in `endings`, how dbt's values are read in `dbt_values`. It
keeps the promise that every selected node gets exactly one terminal event, whatever happens:
`end` closes every node that dbt left open.

What a subscriber may want to know, where the contract leaves a choice:

* A command that selects no nodes (run-operation, list, deps, parse) has no `run.planned`, and
  neither has a run that fails before selection. Wait for `run.planned` or `run.finished`.
* `node.finished` of a source comes when dbt returns, not when its check ends: only dbt's
  result object has the ages, and they are what one wants to know.
* The names of cancelled queries are known after dbt was interrupted, so they come with the
  next rung of `run.cancel`, or in a second `interrupting` before the closing events.
* Exposures and saved queries do no work, so they end `no_op` without a `node.started`.
* A unit test depends on its model and runs before it. `dbt clone` works through its nodes in
  no order: there an upstream may end after a downstream has begun.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import PurePath
from typing import Any, assert_never

import msgspec

from dbtstream import frames
from dbtstream.dbt_values import clean, utc
from dbtstream.endings import Ending, Stopping, run_status
from dbtstream.envelope import Envelope, RunContext
from dbtstream.events import (
    MAX_PLAN_BYTES,
    AnyEvent,
    ArtifactRef,
    ArtifactWritten,
    Gap,
    LogLine,
    NodeBlock,
    NodeCounts,
    NodeFinished,
    NodeStarted,
    PlanEntry,
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
from dbtstream.ledger import Ledger
from dbtstream.node_events import NodeEvents
from dbtstream.phases import Phases
from dbtstream.statuses import NodeStatus, Reason, RunStatus
from dbtstream.verdict import Told, tell_verdict

PROGRESS_EVERY_S = 1.0

_encoder = msgspec.json.Encoder()


class Normalizer:
    """One attempt. The methods are in the order of a run; `end` comes once and last."""

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.status = RunStatus.QUEUED
        self._closed = False
        self._envelope = Envelope(context)
        self._ledger = Ledger()
        self._stopping = Stopping()
        ordered = context.command != "clone"
        self._nodes = NodeEvents(self._envelope, self._ledger, self._stopping, ordered=ordered)
        self._began = context.began_at or context.queued_at
        self._phases = Phases(context.queued_at)
        self._last_n = 0
        self._frames_missing = False
        self._total: int | None = None
        self._progress_at = 0.0
        self._progress_done = 0
        self._artifacts: list[ArtifactRef] = []
        self._result: frames.Result | None = None

    # What a worker may look at

    @property
    def last_seq(self) -> int:
        """The highest `seq` given out; the next attempt begins after it."""
        return self._envelope.next_seq - 1

    @property
    def engine(self) -> str | None:
        return self._envelope.engine

    @property
    def invocation_id(self) -> str | None:
        return self._envelope.invocation_id

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """By resource_type and status, of nodes that have ended."""
        return self._ledger.counts()

    @property
    def in_flight(self) -> list[str]:
        """unique_ids of what has started and not finished."""
        return [name for name, record in self._ledger.nodes.items() if record.in_flight]

    def progress(self, unix_s: float) -> tuple[NodeCounts | None, float | None]:
        """Live counts, and in how many seconds the rest may be done; None until it is planned."""
        if self._total is None:
            return None, None
        counts = NodeCounts(
            done=self._nodes.done,
            running=self._nodes.running,
            total=self._total,
            by_status=self._ledger.by_status(),
        )
        if not counts.done:
            return counts, None
        per_node_s = (unix_s - self._nodes.ready_at) / counts.done
        return counts, per_node_s * max(counts.total - counts.done, 0)

    def at_work(self, limit: int) -> list[tuple[NodeBlock, datetime]]:
        """What has started and not finished, and since when; those that have for the longest."""
        running = [
            (record.block, record.began)
            for record in self._ledger.nodes.values()
            if record.in_flight and record.held is None and record.began is not None
        ]
        running.sort(key=lambda one: one[1])
        return [(block, utc(began)) for block, began in running[:limit]]

    # Before dbt

    def queued(self, at: datetime) -> list[AnyEvent]:
        self._check_open()
        self._envelope.emit(
            RunQueued,
            at,
            args=self.context.args,
            request_id=self.context.request_id,
            position=self.context.position,
            requested_by=self.context.requested_by,
            reason=self.context.reason,
            trace=self.context.trace,
        )
        return self._envelope.taken()

    def leased(
        self,
        cause: str,
        at: datetime,
        *,
        decision: str | None = None,
        previous_worker: str | None = None,
    ) -> list[AnyEvent]:
        """We hold the run from here on: `first`, or after another worker, whose attempt the
        events that follow will close."""
        self._check_open()
        self._envelope.emit(
            RunLeased, at, cause=cause, decision=decision, previous_worker=previous_worker
        )
        return self._envelope.taken()

    def rejected(
        self, code: str, message: str, field: str | None = None, *, at: datetime
    ) -> list[AnyEvent]:
        """The request cannot run. Nothing can come after it."""
        self._check_open()
        self._closed = True
        self._envelope.emit(
            RunRejected,
            at,
            code=code,
            message=message,
            field=field,
            request_id=self.context.request_id,
        )
        return self._envelope.taken()

    def recall(self, earlier: Iterable[AnyEvent]) -> None:
        """Take up all that is published of the run, in order.

        So as to `end` an attempt of a lost worker, whose plan's nodes are known as far as its
        event lists them; or to begin the next one, whose verdict covers the earlier ones.
        """
        self._check_open()
        for event in earlier:
            self._envelope.next_seq = max(self._envelope.next_seq, event.seq + 1)
            if event.attempt == self.context.attempt:
                self._recall(event)
            elif isinstance(event, NodeFinished):
                self._ledger.recall_earlier(event)
            elif isinstance(event, RunLeased):
                self._phases.waits_since = event.time  # since then for us, not for its request

    def spawned(self, at: datetime) -> None:
        """The child was started. What came before was the queue's time, the rest is dbt's."""
        self._check_open()
        self.status = RunStatus.STARTING
        self._phases.spawned_at = at
        if self.context.began_at is None:
            self._began = at

    # While dbt runs

    def frame(self, frame: frames.AnyFrame) -> list[AnyEvent]:
        """The events that one frame makes: none, one, or a few."""
        self._check_open()
        if frame.n != self._last_n + 1:
            self._miss_frames(frame)
        self._last_n = frame.n
        self._take_in(frame)
        if (
            self._nodes.done != self._progress_done
            and frame.at - self._progress_at >= PROGRESS_EVERY_S
        ):
            self._progress(frame.at)
        return self._envelope.taken()

    def cancel_step(
        self,
        step: str,
        *,
        at: datetime,
        by: str | None = None,
        reason: str | None = None,
        stop: Reason = Reason.CANCELLED,
        stack: str | None = None,
    ) -> list[AnyEvent]:
        """A rung of stopping dbt: requested, interrupting, terminating, killing; each once.

        `stop` is what the nodes will be told (CANCELLED, TIMEOUT or HANDED_OVER), `reason` a
        person's words, `stack` where dbt's threads were.
        """
        self._check_open()
        self._stopping.asked(stop, by, reason)
        self._cancel_rung(step, by, at, stack)
        return self._envelope.taken()

    def gap(
        self,
        family: str,
        count: int,
        why: str,
        *,
        at: datetime,
        from_seq: int | None = None,
        to_seq: int | None = None,
    ) -> list[AnyEvent]:
        """Events were not kept; with the numbers they had, if they had any."""
        self._check_open()
        self._envelope.emit(
            Gap,
            at,
            dropped_family=family,
            count=count,
            why=why,
            from_seq=from_seq,
            to_seq=to_seq,
        )
        return self._envelope.taken()

    def is_cut_short(self, ending: Ending) -> bool:
        """Whether dbt was stopped before its end so that the run can go on elsewhere."""
        stop = self._stopping.stop or ending.stop
        ending = msgspec.structs.replace(ending, stop=stop)
        return stop is Reason.HANDED_OVER and run_status(ending, self._result) is RunStatus.LOST

    def tell(
        self, event: type[AnyEvent], at: datetime, unique_id: str | None, facts: dict[str, Any]
    ) -> list[AnyEvent]:
        """A lineage or asset event of `facts`, numbered; in the span of the node `unique_id`."""
        self._check_open()
        self._envelope.emit(event, at, self._span_about(unique_id), **facts)
        return self._envelope.taken()

    def warn(self, name: str, message: str, at: datetime) -> list[AnyEvent]:
        """A line of ours for the project's people: something of theirs is not as it should be."""
        self._check_open()
        self._envelope.log("warn", name, message, at)
        return self._envelope.taken()

    def end(self, ending: Ending, *, at: datetime, final: bool = True) -> list[AnyEvent]:
        """Close every node still open, then the run: `run.finished` is the last event.

        With `final=False` the run goes on in another attempt, and there is no `run.finished`.
        """
        return self.close_nodes(ending, at=at) + self.finish(ending, at=at, final=final)

    def close_nodes(self, ending: Ending, *, at: datetime) -> list[AnyEvent]:
        """The ends of all nodes that dbt left open. What they mean for lineage and assets may
        still be told, then `finish` comes."""
        self._check_open()
        if ending.stop is not None:
            self._stopping.asked(ending.stop)
        ending = self._as_stopped(ending)
        if self._stopping.untold and ending.stop is not None:
            self._tell_cancel("interrupting", self._stopping.by, at)
        self._nodes.close_all(ending, self._result, at)
        return self._envelope.taken()

    def finish(self, ending: Ending, *, at: datetime, final: bool = True) -> list[AnyEvent]:
        """After `close_nodes`: the run's own end, once and last; none if it is not `final`."""
        self._check_open()
        self._closed = True
        if final:
            self._finish(self._as_stopped(ending), at)
        return self._envelope.taken()

    def _as_stopped(self, ending: Ending) -> Ending:
        return msgspec.structs.replace(ending, stop=self._stopping.stop)

    # One frame

    def _take_in(self, frame: frames.AnyFrame) -> None:
        match frame:
            case frames.NodeStart():
                self._nodes.node_start(frame)
            case frames.NodeWork():
                self._nodes.node_work(frame)
            case frames.NodeFinish():
                self._phases.worked_at = utc(frame.at)
                self._nodes.node_finish(frame)
            case frames.Log():
                self._log_line(frame)
            case frames.Query():
                self._query(frame)
            case frames.NodeError():
                self._nodes.node_error(frame)
            case frames.NodeSkip():
                self._phases.worked_at = utc(frame.at)
                self._nodes.node_skip(frame)
            case frames.HookStart():
                self._nodes.hook_start(frame)
            case frames.HookFinish():
                self._phases.worked_at = utc(frame.at)
                self._nodes.hook_finish(frame)
            case frames.BatchStart():
                pass  # its NodeStart was counted, and its BatchFinish names it
            case frames.BatchFinish():
                self._nodes.batch_finish(frame)
            case frames.Nodes():
                self._ledger.select(frame.nodes)
            case frames.Plan():
                self._plan(frame)
            case frames.GraphNodes() | frames.Graph() | frames.Columns():
                pass  # `asset_events` reads them
            case frames.Hello():
                self._hello(frame)
            case frames.Refused():
                self._envelope.engine = frame.engine
            case frames.Invocation():
                self._envelope.invocation_id = frame.invocation_id
                self._phases.invoked_at = utc(frame.at)
            case frames.Parsed():
                self._phases.parsed_at = utc(frame.at)
            case frames.Artifact():
                self._artifact(frame)
            case frames.Cancelling():
                # If nobody asked through us: a signal from outside, or the lease's deadline.
                cut_off = frame.by == "deadline"
                self._stopping.asked(Reason.HANDED_OVER if cut_off else Reason.CANCELLED)
                self._cancel_rung("interrupting", self._stopping.by or frame.by, utc(frame.at))
            case frames.QueryCancelled():
                self._query_cancelled(frame)
            case frames.Dropped():
                self._envelope.emit(
                    Gap,
                    utc(frame.at),
                    dropped_family=frame.family,
                    count=frame.count,
                    why="the queue of dbt's process was full",
                )
            case frames.Results():
                self._nodes.results_in(frame)
            case frames.Result():
                self._result = frame
                self._returned(frame)
            case _:
                assert_never(frame)

    def _hello(self, frame: frames.Hello) -> None:
        at = utc(frame.at)
        spawned_at = self._phases.spawned_at or at
        self.status = RunStatus.RUNNING
        self._envelope.engine = f"dbt-core {frame.dbt_version}"
        self._envelope.emit(
            RunStarted,
            at,
            args=self.context.args,
            dbt_version=frame.dbt_version,
            adapter_type=frame.adapter_type,
            adapter_version=frame.adapter_version,
            python_version=frame.python_version,
            host=self.context.host,
            pid=frame.pid,
            queue_wait_s=max((spawned_at - self.context.queued_at).total_seconds(), 0.0),
            start=frame.start,
            start_s=max((at - spawned_at).total_seconds(), 0.0),
        )

    def _plan(self, frame: frames.Plan) -> None:
        self._phases.planned_at = utc(frame.at)
        self._ledger.know(frame.others)
        self._nodes.ready_at = self._progress_at = frame.at
        entries: list[PlanEntry] | None = None
        parts: list[list[PlanEntry]] = []
        self._total, status = frame.node_count, frame.status
        if status == "complete":
            entries = [record.plan_entry() for record in self._ledger.selected()]
            self._total = len(entries)
            parts = _in_parts(entries)
            if len(parts) > 1:
                entries, status = None, "in_parts"
        at = utc(frame.at)
        self._envelope.emit(
            RunPlanned,
            at,
            node_count=self._total,
            nodes=entries,
            nodes_status=status,
            manifest_hash=frame.manifest_hash,
            expected_s=self.context.expected_s,
            parts=0 if entries is not None else len(parts),
        )
        if entries is None:
            for number, part in enumerate(parts, start=1):
                self._envelope.emit(RunPlanPart, at, part=number, parts=len(parts), nodes=part)

    def _returned(self, frame: frames.Result) -> None:
        self._phases.returned_at = utc(frame.at)
        if frame.interrupted or frame.error is not None:
            self._phases.worked_at = utc(frame.at)  # nodes were being worked at until then

    def _log_line(self, frame: frames.Log) -> None:
        message, truncated = clean(frame.message, frame.truncated)
        self._envelope.emit(
            LogLine,
            utc(frame.at),
            self._span_about(frame.unique_id),
            level=frame.level,
            code=frame.code,
            name=frame.name,
            message=message or "",
            unique_id=frame.unique_id,
            truncated=truncated,
        )

    def _query(self, frame: frames.Query) -> None:
        self._envelope.emit(
            QueryFinished,
            utc(frame.at),
            self._span_about(frame.unique_id),
            unique_id=frame.unique_id,
            elapsed_s=frame.elapsed_s,
            status=frame.status,
            query_id=frame.query_id,
            sql=frame.sql,
            truncated=frame.truncated,
        )

    def _query_cancelled(self, frame: frames.QueryCancelled) -> None:
        """dbt names all open connections by what they were last used for, idle ones too."""
        record = self._ledger.nodes.get(frame.connection)
        if record is None or record.status in (None, NodeStatus.CANCELLED):
            self._stopping.connections.append(frame.connection)

    def _artifact(self, frame: frames.Artifact) -> None:
        path = PurePath(frame.path)
        root = self.context.target_path
        if root is not None and path.is_relative_to(root):
            path = path.relative_to(root)
        artifact = ArtifactRef(
            kind=frame.kind,
            path=str(path),
            sha256=frame.sha256,
            size=frame.size,
            object=self.context.objects.get(frame.kind),
        )
        self._artifacts.append(artifact)
        self._envelope.emit(ArtifactWritten, utc(frame.at), **msgspec.structs.asdict(artifact))

    def _progress(self, unix_s: float) -> None:
        counts, eta_s = self.progress(unix_s)
        if counts is not None:
            self._envelope.emit(RunProgress, utc(unix_s), counts=counts, eta_s=eta_s)
            self._progress_at, self._progress_done = unix_s, counts.done

    def _miss_frames(self, frame: frames.AnyFrame) -> None:
        """A hole is a bug of ours; the run goes on, and says at its end that it is unverified."""
        if not self._frames_missing:
            self._frames_missing = True
            self._envelope.log(
                "error",
                "FramesMissing",
                f"frame {frame.n} came after frame {self._last_n}: what dbt's process sent "
                "between them is lost",
                utc(frame.at),
            )

    # Stopping and ending

    def _cancel_rung(
        self, step: str, by: str | None, at: datetime, stack: str | None = None
    ) -> None:
        if step not in self._stopping.steps:
            self._stopping.steps.add(step)
            self._tell_cancel(step, by, at, stack)

    def _tell_cancel(
        self, step: str, by: str | None, at: datetime, stack: str | None = None
    ) -> None:
        self._envelope.emit(
            RunCancel,
            at,
            step=step,
            by=by,
            reason=self._stopping.reason,
            cancelled_queries=self._stopping.tell(),
            stack=stack,
        )

    def _finish(self, ending: Ending, at: datetime) -> None:
        what = Told(
            result=self._result,
            results=self._nodes.results,
            frames_missing=self._frames_missing,
            artifacts=self._artifacts,
            began=self._began,
            phases=self._phases,
        )
        self.status = tell_verdict(self._envelope, self.context, self._ledger, what, ending, at)

    def _recall(self, event: AnyEvent) -> None:
        self._envelope.engine = event.engine or self._envelope.engine
        self._envelope.invocation_id = event.invocation_id or self._envelope.invocation_id
        match event:
            case RunStarted():
                self.status = RunStatus.RUNNING
                if self.context.began_at is None:
                    self._began = event.time
                self._phases.spawned_at = event.time - timedelta(seconds=event.start_s)
                self._phases.invoked_at = event.time
            case RunPlanned():
                self._phases.planned_at = event.time
                self._ledger.recall_plan(event.nodes or [])
            case RunPlanPart():
                self._ledger.recall_plan(event.nodes)
            case NodeStarted() | NodeFinished():
                self._ledger.recall_node(event)
            case RunCancel():
                self._stopping.steps.add(event.step)
            case ArtifactWritten():
                # Not where it was to be stored: its worker died before it could.
                artifact = ArtifactRef(
                    kind=event.kind, path=event.path, sha256=event.sha256, size=event.size
                )
                self._artifacts.append(artifact)
            case RunFinished() | RunRejected():
                raise RuntimeError(f"run {event.run_id} has ended with event {event.event_id}")
            case _:
                pass

    def _span_about(self, unique_id: str | None) -> str | None:
        """A line about a node belongs to the node's span, or to the run's where the node has
        none: dbt also logs about nodes that are not selected."""
        record = self._ledger.nodes.get(unique_id) if unique_id is not None else None
        return None if record is None else self._nodes.span_of(record)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(
                f"attempt {self.context.attempt} of run {self.context.run_id} has ended: "
                "nothing can come after it"
            )


def _in_parts(entries: list[PlanEntry]) -> list[list[PlanEntry]]:
    """The whole list as the one part, if it fits into an event."""
    parts: list[list[PlanEntry]] = [[]]
    size = 0
    for entry in entries:
        entry_size = len(_encoder.encode(entry)) + 1
        if parts[-1] and size + entry_size > MAX_PLAN_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += entry_size
    return parts
