"""Runs that end without a child of ours: the worker vanished, or the run never left the queue.

`worker` comes here when a request is delivered again after its run began: what a vanished
worker had published is read back, every node without an end gets one (`lost` if it was in
flight, `never_started` else), and the run ends as `lost`. Nothing is run again.
"""

import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from socket import gethostname

import msgspec

from dbtstream.endings import Ended, Ending
from dbtstream.envelope import RunContext
from dbtstream.errors import RunNotFound
from dbtstream.event_stream import EventStream, Selection, Start
from dbtstream.events import (
    AnyEvent,
    NodeFinished,
    RunFinished,
    RunQueued,
    encode_event,
)
from dbtstream.execution import Services
from dbtstream.messages import RunView
from dbtstream.normalizer import Normalizer
from dbtstream.runs import advance
from dbtstream.statuses import Reason, RunStatus
from dbtstream.subjects import event_headers, event_subject

logger = logging.getLogger(__name__)


async def close_lost_run(services: Services, view: RunView, revision: int) -> None:
    """End a run whose worker is gone. Raises NatsError; harmless to repeat."""
    earlier = await _published(services, view)
    verdict = next((event for event in earlier if isinstance(event, RunFinished)), None)
    if verdict is None:
        normalizer = Normalizer(_context(services, view, earlier))
        normalizer.recall(earlier)
        ending = Ending(how=Ended.WORKER_LOST)
        verdict = await _publish(services, normalizer.end(ending, at=datetime.now(UTC)))
        logger.warning(
            "run closed whose worker had vanished",
            extra={
                "action": "run.lost",
                "run_id": view.run_id,
                "worker": view.worker,
                "counts": verdict.counts,
            },
        )
    await _save(services, view, revision, verdict)


async def finish_unstarted(
    services: Services, view: RunView, revision: int, *, by: str, reason: str | None
) -> None:
    """End a run that was cancelled while it waited; its request is out of the queue already."""
    normalizer = Normalizer(_context(services, view, ()))
    at = datetime.now(UTC)
    events = normalizer.queued(at)
    events += normalizer.cancel_step("requested", at=at, by=by, reason=reason)
    ending = Ending(how=Ended.NOT_STARTED, stop=Reason.CANCELLED)
    events += normalizer.end(ending, at=at)
    await _save(services, view, revision, await _publish(services, events))


async def _published(services: Services, view: RunView) -> list[AnyEvent]:
    """All that is stored of the run, in order."""
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


def _context(services: Services, view: RunView, earlier: Iterable[AnyEvent]) -> RunContext:
    """As the vanished worker had it, as far as it told."""
    queued = next((event for event in earlier if isinstance(event, RunQueued)), None)
    return RunContext(
        project=view.project,
        target=view.target,
        run_id=view.run_id,
        attempt=max(1, view.attempt),
        fence=view.fence,
        worker=services.config.worker_name,
        host=gethostname(),
        args=view.args,
        queued_at=view.queued_at or datetime.now(UTC),
        command=view.args[0] if view.args else None,
        labels=view.labels,
        request_id=view.request_id,
        requested_by=view.requested_by,
        reason=view.reason,
        trace_id=queued.trace_id if queued else None,
    )


async def _publish(services: Services, events: list[AnyEvent]) -> RunFinished:
    """In order, each stored before the next; returns the last, which is the verdict."""
    for event in events:
        command = event.command or "_" if isinstance(event, RunFinished) else "_"
        await services.events_link.publish_until_stored(
            event_subject(event, command=command), encode_event(event), event_headers(event)
        )
        if isinstance(event, NodeFinished):
            services.node_states.put(event)
    verdict = events[-1]
    assert isinstance(verdict, RunFinished)  # noqa: S101 - Normalizer.end() ends with it
    return verdict


async def _save(services: Services, view: RunView, revision: int, verdict: RunFinished) -> None:
    if view.status is RunStatus.QUEUED and verdict.status is not RunStatus.CANCELLED:
        view = advance(view, RunStatus.STARTING, at=verdict.time)
    ended = advance(view, verdict.status, at=verdict.time)
    await services.store.update_run(
        msgspec.structs.replace(
            ended,
            exit_code=verdict.exit_code,
            error=verdict.error.message if verdict.error else None,
            counts=verdict.counts,
            last_seq=verdict.seq,
        ),
        revision,
    )
