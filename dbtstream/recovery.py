"""Runs without a worker: one has died or handed its run over, or the run never left the queue.

`worker` comes here with the lease of a run that had begun elsewhere. What the other worker
published is read back and every node without an end gets one (`lost` if it was in flight,
`never_started` else); then the run ends as `lost` or goes on in its next attempt, by `on_lost`.
The `run.leased` event with which that begins is stored on the condition that nothing was
stored since the reading, and shuts the other worker out (`publishers.fence`).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from socket import gethostname

import msgspec

from dbtstream.endings import Ended, Ending
from dbtstream.envelope import RunContext
from dbtstream.errors import NatsError, RunNotFound
from dbtstream.event_stream import EventStream, Selection, Start
from dbtstream.events import (
    AnyEvent,
    NodeFinished,
    RunFinished,
    RunQueued,
    TraceBlock,
    encode_event,
)
from dbtstream.execution import Services
from dbtstream.log_context import in_run_of
from dbtstream.messages import OnLost, RunView
from dbtstream.nats_errors import WRONG_LAST_SEQUENCE, JetStreamRefused
from dbtstream.normalizer import Normalizer
from dbtstream.observers import AttemptObserver
from dbtstream.publishers.fence import EventFence, last_of_target
from dbtstream.resume import HANDED_OVER, WORKER_LOST, decide, holes
from dbtstream.runs import advance
from dbtstream.statuses import Reason, RunStatus
from dbtstream.subjects import event_headers, event_subject
from dbtstream.trace import parse_traceparent, run_trace_id

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Policy:
    """What the request and the project say about a lost worker."""

    on_lost: OnLost
    command: str
    cause: str  # of `run.leased`
    max_attempts: int
    trace: TraceBlock | None = None  # what the request came with, where that is known

    @property
    def ends_untold(self) -> bool:
        """Whether a run of which nothing is stored ends all the same: its dbt may have begun."""
        return self.on_lost is OnLost.FAIL and self.cause == WORKER_LOST


@dataclass(frozen=True, slots=True)
class Closed:
    """A lost attempt has its end. `verdict`: so has the run; else it goes on by `decision`."""

    events: list[AnyEvent]
    state: tuple[RunView, int]
    verdict: RunFinished | None = None
    decision: OnLost | None = None


async def close_attempt(
    services: Services, view: RunView, revision: int, fence: EventFence, policy: Policy
) -> Closed:
    """End what another worker left open. `view` is stored with our fence already.

    Raises NatsError (harmless to repeat), Superseded.
    """
    while True:
        last = await last_of_target(services.events_link, view.project, view.target)
        earlier = await published(services, view)
        for event in earlier:  # the states of these nodes may have died with the worker
            if isinstance(event, NodeFinished):
                services.node_states.put(event)
        verdict = next((event for event in earlier if isinstance(event, RunFinished)), None)
        if verdict is None and not earlier and policy.ends_untold:
            await _tell_queued(services, view, policy.command, policy.trace)
            continue
        if verdict is not None or not earlier:
            return Closed(earlier, (view, revision), verdict)
        decision = decide(
            policy.on_lost,
            policy.command,
            earlier,
            cause=policy.cause,
            max_attempts=policy.max_attempts,
        )
        context = _context(
            services, view, earlier, policy.command, policy.trace, fence=fence.number
        )
        events = _closing_events(context, earlier, policy.cause, decision)
        if not await _begin_lease(services, context, fence, events[0], last):
            continue  # something came in between: read again
        observer = _observer(services, context, earlier)
        observer.take(events[0])
        await _publish(services, context, events[1:], fence, observer)
        with in_run_of(view.run_id, view.attempt, context.trace_id):
            logger.warning(
                "took over a run",
                extra={
                    "action": "run.taken_over",
                    "run_id": view.run_id,
                    "attempt": view.attempt,
                    "cause": policy.cause,
                    "decision": decision,
                },
            )
        closed = [*earlier, *events]
        if isinstance(events[-1], RunFinished):
            return Closed(closed, (view, revision), events[-1], decision)
        return Closed(closed, (view, revision), None, decision)


async def finish_waiting(
    services: Services,
    view: RunView,
    revision: int,
    *,
    by: str,
    reason: str | None,
    trace: TraceBlock | None,
) -> None:
    """End a run that was cancelled while it waited; its request, which had `trace`, is out of
    the queue already."""
    earlier = await published(services, view) if view.attempt else []
    command = view.args[0] if view.args else "_"
    context = _context(services, view, earlier, command, trace, fence=view.fence)
    normalizer = Normalizer(context)
    normalizer.recall(earlier)
    at = datetime.now(UTC)
    events = [] if earlier else normalizer.queued(at)
    events += normalizer.cancel_step("requested", at=at, by=by, reason=reason)
    ending = Ending(how=Ended.NOT_STARTED, stop=Reason.CANCELLED)
    events += normalizer.end(ending, at=at)
    verdict = events[-1]
    assert isinstance(verdict, RunFinished)  # noqa: S101 - Normalizer.end() ends with it
    await _publish(services, context, events, None, _observer(services, context, earlier))
    await save_verdict(services, view, revision, verdict)


async def save_verdict(
    services: Services, view: RunView, revision: int, verdict: RunFinished
) -> None:
    """The state of a run whose last event is stored. Raises NatsError, RevisionConflict."""
    if view.status is RunStatus.QUEUED and verdict.status is not RunStatus.CANCELLED:
        view = advance(view, RunStatus.STARTING, at=verdict.time)
    ended = advance(view, verdict.status, at=verdict.time)
    await services.node_states.written(view.project, view.target)
    await services.store.update_run(
        msgspec.structs.replace(
            ended,
            attempt=verdict.attempt,
            exit_code=verdict.exit_code,
            error=verdict.error.message if verdict.error else None,
            counts=verdict.counts,
            last_seq=verdict.seq,
        ),
        revision,
    )


async def published(services: Services, view: RunView) -> list[AnyEvent]:
    """All that is stored of the run, in order. Raises NatsError, RunNotFound."""
    if view.queued_at is None:
        raise RunNotFound(view.run_id)
    stream = EventStream(
        services.events_link,
        Selection(project=view.project, target=view.target),
        Start(at=view.queued_at),
        run_id=view.run_id,
        follow=False,
    )
    async with stream:
        return [event async for event in stream]


def _closing_events(
    context: RunContext, earlier: Sequence[AnyEvent], cause: str, decision: OnLost
) -> list[AnyEvent]:
    """`run.leased`, the ends of all that is open, and the run's own if it does not go on."""
    normalizer = Normalizer(context)
    normalizer.recall(earlier)
    at = datetime.now(UTC)
    previous = earlier[-1].worker if earlier else None
    events = normalizer.leased(cause, at, decision=decision, previous_worker=previous)
    for from_seq, to_seq in holes(earlier):
        events += normalizer.gap(
            "unknown",
            to_seq - from_seq + 1,
            "the worker died before it told what it had dropped",
            at=at,
            from_seq=from_seq,
            to_seq=to_seq,
        )
    ending = Ending(
        how=Ended.WORKER_LOST, stop=Reason.HANDED_OVER if cause == HANDED_OVER else None
    )
    return events + normalizer.end(ending, at=at, final=decision is OnLost.FAIL)


def _context(
    services: Services,
    view: RunView,
    earlier: Sequence[AnyEvent],
    command: str,
    trace: TraceBlock | None,
    *,
    fence: int,
) -> RunContext:
    """As the other worker had it, as far as it told."""
    queued = next((event for event in earlier if isinstance(event, RunQueued)), None)
    if queued is not None:
        trace = queued.trace
    parent = parse_traceparent(trace.traceparent) if trace else None
    how = services.config.telemetry.trace_context
    return RunContext(
        project=view.project,
        target=view.target,
        run_id=view.run_id,
        attempt=max(1, view.attempt),
        fence=fence,
        worker=services.config.worker_name,
        host=gethostname(),
        args=queued.args if queued else view.args,
        queued_at=view.queued_at or datetime.now(UTC),
        began_at=view.started_at,
        command=command,
        labels=queued.labels if queued else view.labels,
        request_id=view.request_id,
        requested_by=view.requested_by,
        reason=view.reason,
        trace_id=queued.trace_id if queued else run_trace_id(view.run_id, parent, how),
        trace=trace,
    )


def _observer(
    services: Services, context: RunContext, earlier: Sequence[AnyEvent]
) -> AttemptObserver:
    return services.observer.attempt(context, earlier=earlier)


async def _tell_queued(
    services: Services, view: RunView, command: str, trace: TraceBlock | None
) -> None:
    context = _context(services, view, (), command, trace, fence=0)
    events = Normalizer(context).queued(datetime.now(UTC))
    await _publish(services, context, events, None, _observer(services, context, ()))


async def _begin_lease(
    services: Services, context: RunContext, fence: EventFence, leased: AnyEvent, last: int
) -> bool:
    """Store `leased` if the target's last event still has sequence `last`."""
    link, subject = services.events_link, event_subject(leased)
    content_type = services.content_type(leased.project)
    headers = event_headers(leased, content_type=content_type, tracestate=context.tracestate)
    headers |= fence.headers_if_last(last)
    try:
        ack = await link.publish_until_stored(subject, encode_event(leased, content_type), headers)
    except JetStreamRefused as error:
        if error.err_code not in WRONG_LAST_SEQUENCE:
            raise
        await fence.look(link)  # Superseded, or our own whose answer was lost
        return fence.is_up
    fence.stored(subject, ack.seq)
    return True


async def _publish(
    services: Services,
    context: RunContext,
    events: Sequence[AnyEvent],
    fence: EventFence | None,
    observer: AttemptObserver,
) -> None:
    """In order, each stored before the next, and told then. Raises NatsError, Superseded."""
    link = services.events_link
    for event in events:
        content_type = services.content_type(event.project)
        headers = event_headers(event, content_type=content_type, tracestate=context.tracestate)
        headers |= fence.headers() if fence else {}
        subject = event_subject(event, command=context.command or "_")
        try:
            ack = await link.publish_until_stored(
                subject, encode_event(event, content_type), headers
            )
        except NatsError as error:
            if fence and isinstance(error, JetStreamRefused):
                await fence.look(link)
            raise
        if not ack.duplicate:
            observer.take(event)
        if isinstance(event, NodeFinished):
            services.node_states.put(event)
