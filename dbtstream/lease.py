"""Our hold on one run request: heartbeats while it runs, and the one time it is settled.

The only module that answers a JetStream message. While a lease is held, `in_progress` goes
out every `heartbeat_s`, so that the server does not hand the request to another worker.
An ack is not durable across a server crash, and a stale worker's late ack is accepted
(facts of JetStream): whoever handles a redelivery looks at the run's state first.
"""

import asyncio
import contextlib
import logging
from datetime import datetime
from types import TracebackType
from typing import Self

from nats.aio.msg import Msg

from dbtstream.errors import NatsError
from dbtstream.nats_link import NatsLink

logger = logging.getLogger(__name__)

SETTLE_TRIES = 5
SETTLE_PAUSE_S = 1.0


class RequestLease:
    """One delivered run request. Use as an async context manager around its handling."""

    def __init__(self, link: NatsLink, message: Msg, *, heartbeat_s: float) -> None:
        metadata = message.metadata
        self.subject = message.subject
        self.data = message.data
        self.headers: dict[str, str] = dict(message.headers or {})
        self.stream_seq: int = metadata.sequence.stream
        self.stored_at: datetime = metadata.timestamp
        self.deliveries: int = metadata.num_delivered
        self.waiting: int = metadata.num_pending
        self._link = link
        self.reply: str = message.reply
        self._heartbeat_s = heartbeat_s
        self._settled: str | None = None
        self._beats: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._beats = asyncio.create_task(self._beat(), name=f"heartbeat {self.subject}")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._beats is not None:
            self._beats.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._beats

    async def ack(self) -> None:
        """The request is dealt with: the server deletes it. Confirmed, and repeated until it is."""
        await self._settle("ack", b"+ACK", confirmed=True)

    async def term(self) -> None:
        """As `ack`, for a request that can never run; the server publishes an advisory."""
        await self._settle("term", b"+TERM", confirmed=True)

    async def give_back(self) -> None:
        """The server hands it at once to whoever asks next."""
        await self._settle("nak", b"-NAK", confirmed=False)

    async def _settle(self, verb: str, answer: bytes, *, confirmed: bool) -> None:
        if self._settled is not None:
            raise RuntimeError(f"{self.subject}: cannot {verb}, it is settled by {self._settled}")
        self._settled = verb
        for _ in range(SETTLE_TRIES):
            try:
                if confirmed:
                    await self._link.request(self.reply, answer)
                else:
                    with self._link.translated("giving a request back"):
                        await self._link.client.publish(self.reply, answer)
            except NatsError:
                await asyncio.sleep(SETTLE_PAUSE_S)
            else:
                return
        # Not fatal: it will be redelivered and the run's state says that it is done.
        logger.warning(
            "request not settled, expect a redelivery",
            extra={"action": "lease.unsettled", "verb": verb, "subject": self.subject},
        )

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            try:
                with self._link.translated("a heartbeat"):
                    await self._link.client.publish(self.reply, b"+WPI")
            except NatsError as error:
                logger.info(
                    "heartbeat not sent",
                    extra={
                        "action": "lease.heartbeat_failed",
                        "subject": self.subject,
                        "error": str(error),
                    },
                )
