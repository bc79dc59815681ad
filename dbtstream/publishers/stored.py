"""Which events of a run the stream has: asked when the duplicate window can no longer tell.

That is: after an outage longer than the window, and for outboxes of a predecessor. It reads
headers only, through a short-lived consumer limited to the run's project and target.
"""

import contextlib
import json
import secrets
from datetime import UTC, datetime

import nats.errors
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from dbtstream.nats_errors import from_answer
from dbtstream.nats_link import NatsLink
from dbtstream.subjects import EVENTS_STREAM, H_MSG_ID, H_RUN_ID

CLOCK_SKEW_S = 300.0
FETCH = 500


async def find_stored(link: NatsLink, subject: str, run_id: str, since: float) -> set[str]:
    """Nats-Msg-Ids of this run's events stored since about `since` (Unix time).

    `subject` is that of any event of the run. Raises NatsUnavailable or NatsRefused.
    """
    prefix = ".".join(subject.split(".")[:4])
    name = f"stored-{secrets.token_hex(8)}"
    config = ConsumerConfig(
        name=name,
        filter_subject=f"{prefix}.>",
        deliver_policy=DeliverPolicy.BY_START_TIME,
        opt_start_time=datetime.fromtimestamp(since - CLOCK_SKEW_S, UTC),
        ack_policy=AckPolicy.NONE,
        headers_only=True,
        mem_storage=True,
        inactive_threshold=30.0,
    )
    found: set[str] = set()
    # Not js.add_consumer: there a missing permission is a timeout, here it is NatsRefused.
    body = json.dumps({"stream_name": EVENTS_STREAM, "config": config.as_dict()}).encode()
    reply = await link.request(
        f"$JS.API.CONSUMER.CREATE.{EVENTS_STREAM}.{name}.{config.filter_subject}", body
    )
    answer = json.loads(reply.data)
    if "error" in answer:
        raise from_answer("looking up stored events", link.servers, answer["error"])
    left = answer.get("num_pending", 0)
    with link.translated("looking up stored events"):
        subscription = await link.js.pull_subscribe_bind(name, EVENTS_STREAM)
        try:
            while left > 0:
                messages = await subscription.fetch(min(FETCH, left), timeout=5)
                left = messages[-1].metadata.num_pending
                found.update(
                    message.headers[H_MSG_ID]
                    for message in messages
                    if message.headers and message.headers.get(H_RUN_ID) == run_id
                )
        finally:
            await subscription.unsubscribe()
            with contextlib.suppress(nats.errors.Error, TimeoutError):  # it goes by itself
                await link.js.delete_consumer(EVENTS_STREAM, name)
    return found
