"""One node's part of the stream: begun, its batches, and its one terminal event.

Layer 1, pure. `normalizer` hands over the frames that are about nodes and hooks, and at the
end how the attempt ended; the outcome is written to the `ledger`. The rules of guarantee 1
(exactly one terminal event) and 3 (started before finished) are kept here, in `_start` and
`_close`, and nowhere else.
"""

from datetime import datetime

import msgspec

from dbtstream import frames
from dbtstream.dbt_values import (
    FAIL_FAST_MESSAGE,
    NodeEnd,
    amount,
    batch_results,
    batch_status,
    clean,
    dbt_time,
    end_of_finish,
    end_of_hook,
    end_of_result,
    error_block,
    utc,
    word,
)
from dbtstream.endings import Ending, Leftover, Stopping, leftover
from dbtstream.envelope import Envelope
from dbtstream.event_base import ErrorBlock
from dbtstream.events import NodeBatch, NodeFinished, NodeStarted
from dbtstream.ledger import Ledger, NodeRecord
from dbtstream.statuses import DBT_NODE_STATUS, NodeStatus, Reason

_WORKED = frozenset(
    {
        NodeStatus.SUCCESS,
        NodeStatus.WARN,
        NodeStatus.FAIL,
        NodeStatus.ERROR,
        NodeStatus.PARTIAL_SUCCESS,
        NodeStatus.CANCELLED,
        NodeStatus.LOST,
    }
)
"""Ends that only a node that began can have: `node.started` is made up for it if need be."""

_HAS_ERROR = frozenset({NodeStatus.ERROR, NodeStatus.PARTIAL_SUCCESS, NodeStatus.CANCELLED})
_TESTED = frozenset({NodeStatus.SUCCESS, NodeStatus.WARN, NodeStatus.FAIL})
_TEST_TYPES = frozenset({"test", "unit_test"})
_IDLE_TYPES = frozenset({"exposure", "saved_query"})
"""dbt goes through the motions for these and does nothing (`no-op`)."""

Fate = tuple[NodeStatus, Reason | None]


class NodeEvents:
    """Turns what is heard of nodes into their events."""

    def __init__(
        self, envelope: Envelope, ledger: Ledger, stopping: Stopping, *, ordered: bool
    ) -> None:
        self.done = self.running = 0
        self.ready_at = 0.0  # when the first nodes could begin: the plan's time
        self._envelope, self._ledger, self._stopping = envelope, ledger, stopping
        self._ordered = ordered  # dbt begins a node only when its upstreams have ended
        self._hook: NodeRecord | None = None  # the one that dbt's main thread is in
        self._results: dict[str, frames.NodeResult] = {}

    @property
    def results(self) -> dict[str, frames.NodeResult]:
        """What dbt returned, by unique_id."""
        return self._results

    # Frames

    def node_start(self, frame: frames.NodeStart) -> None:
        self._leave_hook(frame.at)
        record = self._ledger.record(frame.unique_id)
        record.opened = record.opened or frame
        record.depth += 1

    def node_work(self, frame: frames.NodeWork) -> None:
        record = self._ledger.record(frame.unique_id)
        if record.block.resource_type in _IDLE_TYPES:
            return
        if self._ordered:
            self._close_upstream_that_raised(record, frame.at)
        self._start(record, frame.at, index=frame.index, total=frame.total)

    def node_error(self, frame: frames.NodeError) -> None:
        record = self._ledger.record(frame.unique_id)
        # The first is the cause; those that follow are dbt passing it on.
        record.error = record.error or frame
        if record.block.resource_type in _TEST_TYPES:
            self._ledger.note_failed_test(record)

    def node_finish(self, frame: frames.NodeFinish) -> None:
        record = self._ledger.record(frame.unique_id)
        nested = record.is_nested(frame)
        record.depth = max(record.depth - 1, 0)
        if nested or record.status is not None or record.held is not None:
            return
        if record.block.resource_type == "source":
            record.held = frame
            self._count_end(record)
            return
        end = end_of_finish(frame)
        if record.batches:
            end = msgspec.structs.replace(end, batch_results=batch_results(record.batches))
        self._close(record, end, frame.at)

    def node_skip(self, frame: frames.NodeSkip) -> None:
        """With a NodeStart before it, its NodeFinish follows. Without one, on-run-start failed
        and dbt fires nothing else for the node."""
        record = self._ledger.record(frame.unique_id)
        if record.opened is None:
            self._close(record, NodeEnd(dbt_status="skipped"), frame.at)

    def hook_start(self, frame: frames.HookStart) -> None:
        self._leave_hook(frame.at)
        self._hook = record = self._ledger.record(frame.unique_id)
        self._start(record, frame.at, index=frame.index, total=frame.total)

    def hook_finish(self, frame: frames.HookFinish) -> None:
        self._hook = None
        record = self._ledger.record(frame.unique_id)
        self._close(record, end_of_hook(frame, record.began), frame.at)

    def batch_finish(self, frame: frames.BatchFinish) -> None:
        record = self._ledger.record(frame.unique_id)
        record.batches.append(frame)
        self._envelope.emit(
            NodeBatch,
            utc(frame.at),
            self._envelope.span("batch", frame.unique_id, frame.index),
            unique_id=frame.unique_id,
            resource_type=record.block.resource_type,
            name=record.block.name,
            index=frame.index,
            total=frame.total,
            status=batch_status(frame),
            execute_s=frame.execution_s,
            event_time_start=dbt_time(frame.event_time_start),
            event_time_end=dbt_time(frame.event_time_end),
        )

    def results_in(self, frame: frames.Results) -> None:
        for result in frame.results:
            self._results[result.unique_id] = result
            record = self._ledger.nodes.get(result.unique_id)
            if record is None:
                continue
            if record.held is not None:
                self._close(record, end_of_finish(record.held, result), frame.at)
            elif record.message is None:
                # What a failed hook said is in no event, and `run.finished` can still tell it.
                record.message, _ = clean(result.message)

    # The end of the attempt

    def close_all(self, ending: Ending, result: frames.Result | None, at: datetime) -> None:
        """From what dbt returned where it returned something, else from how the child ended."""
        unix_s = at.timestamp()
        for unique_id, of_node in self._results.items():
            self._close(self._ledger.record(unique_id), end_of_result(of_node), unix_s)
        for record in self._ledger.nodes.values():
            if record.held is not None:
                self._close(record, end_of_finish(record.held), unix_s)
        error = ending.error if result is None else error_block(result.error, None)
        if not _is_cut_short(result) and self._stopping.stop is None:
            self._leave_hook(unix_s, error)
        rest = leftover(
            ending,
            result,
            fail_fast=any(r.message == FAIL_FAST_MESSAGE for r in self._results.values()),
            start_hook_failed=self._ledger.start_hook_failed(),
        )
        for record in self._ledger.nodes.values():
            if record.in_flight and record.error is not None and not _is_cut_short(result):
                # Its thread raised, and it is ephemeral: neither finish nor result.
                self._close_raised(record, unix_s)
            self._close_leftover(record, rest, error, unix_s)

    def _close_leftover(
        self, record: NodeRecord, rest: Leftover, error: ErrorBlock | None, unix_s: float
    ) -> None:
        if record.is_hook and record.began is None:
            return  # an error named it; a hook is not selected and owes no end
        status = rest.in_flight if record.in_flight else NodeStatus.NEVER_STARTED
        if status is not NodeStatus.LOST:
            error = None
        end = NodeEnd(message=error.message if error else None)
        self._close(record, end, unix_s, fate=(status, rest.reason), error=error)

    def _leave_hook(self, at: float, error: ErrorBlock | None = None) -> None:
        """dbt has gone on without telling the end of a hook: it raised (1.8)."""
        hook, self._hook = self._hook, None
        if hook is not None:
            end = NodeEnd(message=error.message if error else None)
            self._close(hook, end, at, fate=(NodeStatus.ERROR, None), error=error)

    # One node

    def _start(
        self, record: NodeRecord, at: float, *, index: int | None = None, total: int | None = None
    ) -> None:
        if record.began is not None or record.status is not None:
            return
        record.began = at
        self.running += 1
        self._envelope.emit(
            NodeStarted,
            utc(at),
            self.span_of(record),
            node=record.block,
            index=index,
            total=total,
            thread=record.opened.thread if record.opened else None,
            ready_wait_s=None if record.is_hook else self._ready_wait_s(record, at),
        )

    def _ready_wait_s(self, record: NodeRecord, at: float) -> float | None:
        ready_at = self.ready_at
        for upstream in self._ledger.upstream_of(record):
            if upstream.ended is not None and upstream.ended > ready_at:
                ready_at = upstream.ended
        return max(at - ready_at, 0.0) if ready_at else None

    def _close_upstream_that_raised(self, record: NodeRecord, at: float) -> None:
        """A node whose thread raised has no NodeFinished. When dbt lets its child begin all the
        same (`on_error: continue`, 1.12), its end cannot wait for the results."""
        for upstream in self._ledger.upstream_of(record):
            if upstream.status is None and upstream.error is not None and upstream.held is None:
                self._close_raised(upstream, at)

    def _close_raised(self, record: NodeRecord, at: float) -> None:
        if record.error is not None:
            message, truncated = clean(record.error.message, record.error.truncated)
            end = NodeEnd(dbt_status="error", message=message, truncated=truncated)
            self._close(record, end, at)

    def _close(
        self,
        record: NodeRecord,
        end: NodeEnd,
        at: float,
        *,
        fate: Fate | None = None,
        error: ErrorBlock | None = None,
    ) -> None:
        """The node's terminal event, once. `fate` where it is not dbt that decided."""
        if record.status is not None:
            return
        status, reason = fate or self._verdict(record, end, at)
        if status in _WORKED:
            self._start(record, at)
        if status is NodeStatus.SKIPPED:
            record.root_causes = self._ledger.root_causes(record)
        if error is None and status in _HAS_ERROR and not _is_stale(record, end):
            error = error_block(record.error, end.message)
        if record.held is None:
            self._count_end(record)
        record.status, record.reason, record.message = status, reason, end.message
        record.ended = at
        record.elapsed_s = end.execute_s if end.execute_s is not None else end.compile_s
        is_test = record.block.resource_type in _TEST_TYPES
        if is_test and status in (NodeStatus.FAIL, NodeStatus.ERROR):
            self._ledger.note_failed_test(record)
        self._envelope.emit(
            NodeFinished,
            utc(at),
            self.span_of(record),
            node=record.block,
            status=status,
            dbt_status=end.dbt_status,
            started_at=end.started_at,
            finished_at=end.finished_at,
            compile_s=end.compile_s,
            execute_s=end.execute_s,
            rows_affected=amount(end.adapter_response, "rows_affected"),
            bytes_processed=amount(end.adapter_response, "bytes_processed", "bytes_billed"),
            query_id=word(end.adapter_response, "query_id", "job_id"),
            adapter_response=end.adapter_response,
            message=end.message,
            truncated=end.truncated,
            error=error,
            failures=end.failures if is_test and status in _TESTED else None,
            root_causes=record.root_causes,
            reason=reason,
            relation=end.relation or record.relation,
            test=record.test,
            freshness=end.freshness,
            batch_results=end.batch_results,
            thread=record.opened.thread if record.opened else None,
        )

    def _verdict(self, record: NodeRecord, end: NodeEnd, at: float) -> Fate:
        """dbt's word as ours, in the light of what was going on."""
        status = DBT_NODE_STATUS.get(end.dbt_status or "")
        unique_id = record.block.unique_id
        if status is None:
            self._envelope.log(
                "error",
                "UnknownNodeStatus",
                f"dbt says that {unique_id} is {end.dbt_status!r}, a status that dbtstream "
                "does not know; it counts as an error",
                utc(at),
            )
            return NodeStatus.ERROR, None
        if status is NodeStatus.ERROR and not _is_stale(record, end):
            if self._stopping.is_interrupted:
                return NodeStatus.CANCELLED, self._stopping.stop
            if unique_id in self._stopping.connections:
                # dbt cancelled its query of its own accord, and does so only to fail fast.
                return NodeStatus.CANCELLED, Reason.FAIL_FAST
        if status is not NodeStatus.SKIPPED:
            return status, None
        if end.message == FAIL_FAST_MESSAGE:
            began = record.began is not None
            return NodeStatus.CANCELLED if began else NodeStatus.NEVER_STARTED, Reason.FAIL_FAST
        if record.opened is None and not record.is_hook:
            return NodeStatus.NEVER_STARTED, Reason.ON_RUN_START_FAILED
        return status, Reason.UPSTREAM_FAILED

    def _count_end(self, record: NodeRecord) -> None:
        self.running -= record.began is not None
        self.done += not record.is_hook

    def span_of(self, record: NodeRecord) -> str:
        if not record.span_id:
            record.span_id = self._envelope.span("node", record.block.unique_id)
        return record.span_id


def _is_cut_short(result: frames.Result | None) -> bool:
    """dbt did not get to the end of what it was doing."""
    return result is None or result.interrupted


def _is_stale(record: NodeRecord, end: NodeEnd) -> bool:
    """A source beyond error_after has dbt's status `error`, but nothing was raised: a check
    that could not be made is a `runtime error`."""
    return record.block.resource_type == "source" and end.dbt_status == "error"
