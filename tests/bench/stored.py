"""The events stream, read back: of each message its headers and when the server stored it.

Afterwards, not while a benchmark runs: reading takes the server's and our CPU.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime

from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from dbtstream.nats_link import NatsLink
from dbtstream.subjects import EVENTS, EVENTS_STREAM, H_RUN_ID, H_SEQ

BATCH = 1000
FETCH_S = 30.0


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """`at` is the event's time (of a node event: when dbt called back), both are Unix time."""

    type: str  # "node.finished"
    run_id: str
    seq: int
    at: float
    stored_at: float

    @property
    def lag_ms(self) -> float:
        return (self.stored_at - self.at) * 1000


async def stored_events(link: NatsLink, project: str = "*") -> AsyncIterator[StoredEvent]:
    """All of a project, in the stream's order."""
    async for headers, stored_at in stored_headers(link, EVENTS_STREAM, f"{EVENTS}.{project}.>"):
        yield StoredEvent(
            type=headers["ce-type"].removeprefix("dev.dbtstream.").removesuffix(".v1"),
            run_id=headers[H_RUN_ID],
            seq=int(headers[H_SEQ]),
            at=datetime.fromisoformat(headers["ce-time"]).timestamp(),
            stored_at=stored_at,
        )


async def stored_headers(
    link: NatsLink, stream: str, subject: str
) -> AsyncIterator[tuple[dict[str, str], float]]:
    """Headers and time of storing of all messages on a subject."""
    config = ConsumerConfig(
        ack_policy=AckPolicy.NONE,
        deliver_policy=DeliverPolicy.ALL,
        mem_storage=True,
        headers_only=True,
    )
    subscription = await link.js.pull_subscribe(subject, stream=stream, config=config)
    left = (await subscription.consumer_info()).num_pending or 0
    while left:
        for message in await subscription.fetch(min(left, BATCH), timeout=FETCH_S):
            left = message.metadata.num_pending
            yield message.headers or {}, message.metadata.timestamp.timestamp()
    await subscription.unsubscribe()
