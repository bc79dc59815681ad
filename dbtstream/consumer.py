"""Run requests of one project and target, one at a time, in the order of the stream.

Each project+target has a durable consumer of its own with `max_ack_pending` 1: the server
keeps order and hands out no second request of a target before the first is settled. A
fetch is made only when there is a free slot, so that a request never waits in a busy
worker while another is idle. What a request means is decided in `worker`.
"""

import asyncio
import contextlib
import hashlib
import logging

import nats.errors
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.client import JetStreamContext

from dbtstream.config import Config
from dbtstream.lease import RequestLease
from dbtstream.nats_link import NatsLink
from dbtstream.subjects import RUNS_STREAM

logger = logging.getLogger(__name__)

FETCH_S = 5.0
"""How long one pull waits at the server. A pull does not outlive its connection."""


def durable_name(subject: str) -> str:
    """Consumer names may not hold dots; a hash keeps two subjects from sharing one."""
    return "k_" + hashlib.blake2b(subject.encode(), digest_size=8).hexdigest()


class RequestConsumer:
    """Fetches from the durable consumer of one subject of DBT_RUNS."""

    def __init__(self, link: NatsLink, config: Config, subject: str) -> None:
        self.subject = subject
        self._link = link
        self._config = config
        self._pulls: JetStreamContext.PullSubscription | None = None
        self._made_with = (-1, -1)

    async def next(self) -> RequestLease | None:
        """The next request, or None after FETCH_S or a reconnect. Raises NatsError."""
        pulls = await self._subscription()
        fetch = asyncio.ensure_future(pulls.fetch(1, timeout=FETCH_S))
        dropped = asyncio.ensure_future(self._link.wait_reconnect(self._link.reconnects))
        try:
            await asyncio.wait({fetch, dropped}, return_when=asyncio.FIRST_COMPLETED)
            if not fetch.done() or isinstance(fetch.exception(), nats.errors.TimeoutError):
                return None
            with self._link.translated(f"fetching from {self.subject}"):
                (message,) = fetch.result()
        finally:
            dropped.cancel()
            if not fetch.done():
                await self._abandon(fetch)
        return RequestLease(self._link, message, heartbeat_s=self._config.worker.heartbeat_s)

    async def close(self) -> None:
        """Take back a pull that waits at the server, which would swallow a request else."""
        if self._pulls is not None:
            with contextlib.suppress(nats.errors.Error):
                await self._pulls.unsubscribe()
            self._pulls = None

    async def _abandon(self, fetch: asyncio.Future[list[Msg]]) -> None:
        fetch.cancel()
        await asyncio.wait({fetch})
        if not fetch.cancelled() and fetch.exception() is None:
            # It came in the same turn as the cancel, which asyncio.wait_for then swallows.
            for message in fetch.result():
                with contextlib.suppress(nats.errors.Error):
                    await message.nak()
        await self.close()

    async def _subscription(self) -> JetStreamContext.PullSubscription:
        made_with = (self._link.generation, self._link.reconnects)
        if self._pulls is None or self._made_with != made_with:
            await self.close()
            name = await self.ensure()
            with self._link.translated(f"subscribing to {self.subject}"):
                self._pulls = await self._link.js.pull_subscribe_bind(name, stream=RUNS_STREAM)
            self._made_with = made_with
        return self._pulls

    async def ensure(self) -> str:
        """Create or update the durable consumer; its name. Idempotent."""
        name = durable_name(self.subject)
        with self._link.translated(f"creating the consumer of {self.subject}"):
            await self._link.js.add_consumer(
                RUNS_STREAM,
                ConsumerConfig(
                    # With `name`, nats-py asks over the subject that ends with the filter.
                    name=name,
                    durable_name=name,
                    description=f"run requests of {self.subject}",
                    filter_subject=self.subject,
                    deliver_policy=DeliverPolicy.ALL,
                    ack_policy=AckPolicy.EXPLICIT,
                    ack_wait=self._config.worker.ack_wait_s,
                    max_ack_pending=1,
                    # A drain counts as a delivery too, so it is high; attempts of a run are
                    # counted in its state. What reaches it is for `stuck_requests`.
                    max_deliver=self._config.worker.max_deliveries,
                    inactive_threshold=self._config.streams.idle_consumer_s,
                ),
            )
        return name
