"""A request that cannot run: told as `run.rejected` and kept in DBT_DEAD with its bytes.

Both are stored before the request is taken from the queue, under ids that make a repetition
harmless. Used by `worker` and, for subjects that no worker serves, by `unknown_subjects`.
"""

import logging
from datetime import UTC, datetime

from dbtstream.envelope import RunContext
from dbtstream.errors import RequestRejected
from dbtstream.events import encode_event
from dbtstream.execution import Services
from dbtstream.lease import RequestLease
from dbtstream.normalizer import Normalizer
from dbtstream.subjects import (
    DEAD,
    H_MSG_ID,
    H_RUN_ID,
    event_headers,
    event_subject,
)
from dbtstream.trace import parse_traceparent, trace_id_of

logger = logging.getLogger(__name__)

H_CODE = "dbtstream-code"
H_MESSAGE = "dbtstream-message"
H_FIELD = "dbtstream-field"
H_SUBJECT = "dbtstream-subject"
H_REQUEST_SEQ = "dbtstream-request-seq"
H_TRUNCATED = "dbtstream-truncated"

MAX_DEAD_BYTES = 1000 * 1024
"""The server takes 1 MiB with headers; the bytes of a request that fills it are cut."""


async def reject(
    services: Services,
    lease: RequestLease,
    run_id: str,
    project: str,
    target: str,
    rejected: RequestRejected,
) -> None:
    """Returns when both are stored: the letter first, so that who sees the event finds it."""
    parent = parse_traceparent(lease.headers.get("traceparent"))
    request_id = lease.headers.get(H_MSG_ID)
    normalizer = Normalizer(
        RunContext(
            project=project,
            target=target,
            run_id=run_id,
            attempt=1,
            fence=0,
            worker=services.config.worker_name,
            host="",
            args=[],
            request_id=request_id,
            queued_at=lease.stored_at,
            trace_id=parent.trace_id if parent else trace_id_of(run_id),
        )
    )
    headers = {
        H_MSG_ID: f"dead-{lease.stream_seq}-{lease.stored_at.timestamp():.6f}",
        H_RUN_ID: run_id,
        H_CODE: rejected.code,
        H_MESSAGE: header_value(rejected.message),
        H_SUBJECT: lease.subject,
        H_REQUEST_SEQ: str(lease.stream_seq),
    }
    if rejected.field:
        headers[H_FIELD] = header_value(rejected.field)
    if len(lease.data) > MAX_DEAD_BYTES:
        headers[H_TRUNCATED] = str(len(lease.data))
    await services.events_link.publish_until_stored(
        f"{DEAD}.{project}.{target}", lease.data[:MAX_DEAD_BYTES], headers
    )
    for event in normalizer.rejected(
        rejected.code, rejected.message, rejected.field, at=datetime.now(UTC)
    ):
        await services.events_link.publish_until_stored(
            event_subject(event), encode_event(event), event_headers(event)
        )
    logger.warning(
        "request rejected",
        extra={
            "action": "request.rejected",
            "run_id": run_id,
            "subject": lease.subject,
            "code": rejected.code,
            "problem": rejected.message,
        },
    )


def header_value(text: str) -> str:
    """One line of ASCII: NATS headers end at a line break."""
    return " ".join(text.encode("ascii", "backslashreplace").decode("ascii").split())[:1000]
