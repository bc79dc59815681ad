"""A request that cannot run: told as `run.rejected` and kept in DBT_DEAD with its bytes.

Both are stored before the request is taken from the queue, under ids that make a repetition
harmless. Used by `worker`, by `unknown_subjects` (nobody serves it) and by `stuck_requests`
(nobody settled it). What is in DBT_DEAD is read, and asked for again, through `dead_letters`.
"""

import logging
from datetime import UTC, datetime
from typing import Protocol

from dbtstream.dead_letters import (
    H_CODE,
    H_FIELD,
    H_MESSAGE,
    H_REQUEST_SEQ,
    H_SUBJECT,
    H_TRUNCATED,
)
from dbtstream.envelope import RunContext
from dbtstream.errors import RequestRejected
from dbtstream.events import encode_event
from dbtstream.execution import Services
from dbtstream.log_context import in_run_of
from dbtstream.normalizer import Normalizer
from dbtstream.subjects import (
    DEAD,
    H_MSG_ID,
    H_RUN_ID,
    event_headers,
    event_subject,
    trace_headers,
)
from dbtstream.trace import parse_traceparent, run_trace_id, trace_block

logger = logging.getLogger(__name__)

MAX_DEAD_BYTES = 1000 * 1024
"""The server takes 1 MiB with headers; the bytes of a request that fills it are cut."""


class Request(Protocol):
    """A request as DBT_RUNS has it; `lease.RequestLease` is one."""

    @property
    def subject(self) -> str: ...
    @property
    def data(self) -> bytes: ...
    @property
    def headers(self) -> dict[str, str]: ...
    @property
    def stream_seq(self) -> int: ...
    @property
    def stored_at(self) -> datetime: ...


async def reject(
    services: Services,
    request: Request,
    run_id: str,
    project: str,
    target: str,
    rejected: RequestRejected,
) -> None:
    """Returns when both are stored: the letter first, so that who sees the event finds it."""
    trace = trace_block(request.headers, services.config.telemetry.baggage)
    parent = parse_traceparent(trace.traceparent) if trace else None
    context = RunContext(
        project=project,
        target=target,
        run_id=run_id,
        attempt=1,
        fence=0,
        worker=services.config.worker_name,
        host="",
        args=[],
        request_id=request.headers.get(H_MSG_ID),
        queued_at=request.stored_at,
        trace_id=run_trace_id(run_id, parent, services.config.telemetry.trace_context),
        trace=trace,
    )
    await bury(services, request, run_id, project, target, rejected)
    observer = services.observer.attempt(context)
    for event in Normalizer(context).rejected(
        rejected.code, rejected.message, rejected.field, at=datetime.now(UTC)
    ):
        ack = await services.events_link.publish_until_stored(
            event_subject(event),
            encode_event(event),
            event_headers(event, tracestate=context.tracestate),
        )
        if not ack.duplicate:
            observer.take(event)
    with in_run_of(run_id, event.attempt, event.trace_id):
        logger.warning(
            "request rejected",
            extra={
                "action": "request.rejected",
                "run_id": run_id,
                "subject": request.subject,
                "code": rejected.code,
                "problem": rejected.message,
            },
        )


async def bury(
    services: Services,
    request: Request,
    run_id: str,
    project: str,
    target: str,
    rejected: RequestRejected,
) -> None:
    """Into DBT_DEAD; the same letter sent again is stored once."""
    headers = {
        H_MSG_ID: f"dead-{request.stream_seq}-{request.stored_at.timestamp():.6f}",
        H_RUN_ID: run_id,
        H_CODE: rejected.code,
        H_MESSAGE: header_value(rejected.message),
        H_SUBJECT: request.subject,
        H_REQUEST_SEQ: str(request.stream_seq),
    }
    if rejected.field:
        headers[H_FIELD] = header_value(rejected.field)
    # A replay belongs to the trace of whoever asked.
    found = trace_headers(request.headers)
    headers |= {name: header_value(value) for name, value in found.items()}
    if len(request.data) > MAX_DEAD_BYTES:
        headers[H_TRUNCATED] = str(len(request.data))
    await services.events_link.publish_until_stored(
        f"{DEAD}.{project}.{target}", request.data[:MAX_DEAD_BYTES], headers
    )


def header_value(text: str) -> str:
    """One line of ASCII: NATS headers end at a line break."""
    return " ".join(text.encode("ascii", "backslashreplace").decode("ascii").split())[:1000]
