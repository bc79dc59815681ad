"""From one outbox to the stream DBT_EVENTS, in order, each event once.

One task per outbox; nothing else publishes its records. Few waiting: one awaited publish
after the other. Many: atomic batches, whose commit costs the server 25 to 40 ms however
small they are. An attempt whose outcome is unknown is repeated with the same ids until it is
answered; the server drops what it had (`duplicate`). Where the answer comes later than the
stream's duplicate window can tell, what is stored is looked up first.

With a `fence` every publish is conditional on our still holding the run; `run` raises
Superseded when the server has refused one for that.

A record is given up only when the server can never take it (too large); that is counted,
logged, and told to `on_failed`. A refusal that an operator can mend (permissions, limits) is
retried: the records are safe in the outbox.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from nats.js.api import PubAck

from dbtstream.errors import NatsError, NatsRefused
from dbtstream.events import DROPPABLE
from dbtstream.nats_errors import BATCH_DUPLICATE_ID, WRONG_LAST_SEQUENCE, JetStreamRefused
from dbtstream.nats_link import NatsLink, backoff_s
from dbtstream.outbox import Outbox, Record
from dbtstream.publishers.fence import EventFence
from dbtstream.publishers.stored import find_stored
from dbtstream.streams import DUPLICATE_WINDOW_EVENTS_S
from dbtstream.subjects import H_MSG_ID

logger = logging.getLogger(__name__)

BATCH_FROM = 50
BATCH_MAX = 500
BATCH_BYTES = 2 * 1024 * 1024
REFUSED_WAIT_S = 15.0
WINDOW_IS_SURE_S = 0.8 * DUPLICATE_WINDOW_EVENTS_S

OnStored = Callable[[Record, PubAck | None], None]


@dataclass(slots=True)
class PublisherStats:
    """`received` = `sent` + `failed`, once all is done. `dropped` is always 0 here: the outbox
    is where events are dropped; the four names are the same at every stage."""

    received: int = 0
    sent: int = 0
    dropped: int = 0
    failed: int = 0
    retried: int = 0
    duplicates: int = 0


class _Fenced(NamedTuple):
    """A record with the condition in its headers, as `NatsLink.publish_batch` takes it."""

    subject: str
    headers: Mapping[str, str]
    payload: bytes


class JetStreamPublisher:
    """`on_stored` gets each record once it is stored, with the server's answer if it was sent
    alone; `on_failed` each that never will be, with the reason. Both must not block."""

    def __init__(
        self,
        link: NatsLink,
        outbox: Outbox,
        *,
        fence: EventFence | None = None,
        on_stored: OnStored | None = None,
        on_failed: Callable[[Record, str], None] | None = None,
    ) -> None:
        self._link, self._outbox, self._fence = link, outbox, fence
        self._on_stored, self._on_failed = on_stored, on_failed
        self._known: set[str] = set()  # ids that are stored though we saw no answer
        self._doubt_since: float | None = None  # Unix time of the oldest unanswered attempt
        self._said: set[str] = set()
        self.stats = PublisherStats()

    async def run(self) -> None:
        """Until the outbox's input is closed and all of it is stored. May be cancelled.

        Raises Superseded.
        """
        first = True
        while records := await self._outbox.next(BATCH_MAX, BATCH_BYTES):
            if first and self._outbox.recovered:
                self._doubt_since = self._outbox.head_at
                self._fence = EventFence.of_headers(records[0].subject, records[0].headers)
                await self._look_at_fence()
            first = False
            if len(records) >= BATCH_FROM and (self._fence is None or self._fence.is_up):
                await self._send_batch(records)
            else:
                await self._send_each(records[:BATCH_FROM])

    # -- ways of sending -------------------------------------------------------------------

    async def _send_each(self, records: list[Record]) -> None:
        for record in records:
            await self._send_one(record)

    async def _send_one(self, record: Record) -> None:
        """Until it is stored, or known to be impossible."""
        attempt = 0
        while True:
            try:
                await self._settle_doubt(record)
                if self._is_known(record):
                    return self._stored([record], None, duplicate=True)
                ack = await self._link.publish(
                    record.subject, record.payload, self._with_fence(record).headers
                )
            except NatsError as error:
                if isinstance(error, JetStreamRefused) and error.about_message:
                    return self._failed(record, error)
                attempt += 1
                if self._is_fenced_off(error):
                    await self._look_at_fence()
                    if attempt == 1:
                        continue  # what we knew of the last lease was old, now we know
                await self._wait_after(error, attempt)
            else:
                if self._fence is not None:
                    self._fence.stored(record.subject, ack.seq)
                return self._stored([record], ack, duplicate=bool(ack.duplicate))

    async def _send_batch(self, records: list[Record]) -> None:
        """All in one commit. Where the server will not have them so, one by one."""
        attempt = 0
        while True:
            try:
                await self._settle_doubt(records[0])
                if any(map(self._is_known, records)):
                    return await self._send_each(records)
                await self._link.publish_batch([self._with_fence(records[0]), *records[1:]])
            except JetStreamRefused as error:
                if self._is_fenced_off(error):
                    await self._look_at_fence()
                    return await self._send_each(records)
                # An id is stored already: this very batch was committed and its answer lost, or
                # a predecessor got so far. Sent alone, each is answered as a duplicate or stored.
                if error.err_code != BATCH_DUPLICATE_ID:
                    self._say(
                        "a batch is refused; its events are sent one by one", error, logging.WARNING
                    )
                return await self._send_each(records)
            except NatsError as error:
                attempt += 1
                await self._wait_after(error, attempt)
            else:
                return self._stored(records, None)

    # -- whether we still may --------------------------------------------------------------

    def _with_fence(self, record: Record) -> _Fenced | Record:
        if self._fence is None:
            return record
        return _Fenced(record.subject, record.headers | self._fence.headers(), record.payload)

    def _is_fenced_off(self, error: NatsError) -> bool:
        return (
            self._fence is not None
            and isinstance(error, JetStreamRefused)
            and error.err_code in WRONG_LAST_SEQUENCE
        )

    async def _look_at_fence(self) -> None:
        """Until it is known. Raises Superseded."""
        attempt = 0
        while self._fence is not None:
            try:
                await self._fence.look(self._link)
            except NatsError as error:
                attempt += 1
                await self._wait_after(error, attempt)
            else:
                return

    # -- what became of it -----------------------------------------------------------------

    def _stored(
        self, records: list[Record], ack: PubAck | None, *, duplicate: bool = False
    ) -> None:
        self._doubt_since = None
        self._count(sent=len(records), duplicates=len(records) if duplicate else 0)
        for record in records:
            self._known.discard(record.headers.get(H_MSG_ID, ""))
            if self._on_stored is not None:
                self._on_stored(record, ack)
        self._outbox.ack(len(records))

    def _failed(self, record: Record, error: NatsRefused) -> None:
        self._count(failed=1)
        text = "an event can never be stored and is left out"
        if record.family in DROPPABLE:
            self._say(text, error, logging.ERROR)
        else:
            logger.error(
                text,
                extra={
                    "action": "publish.failed",
                    "run_id": self._outbox.run_id,
                    "seq": record.seq,
                    "subject": record.subject,
                    "error": str(error),
                },
            )
        if self._on_failed is not None:
            self._on_failed(record, str(error))
        self._outbox.ack(1)

    def _count(self, *, sent: int = 0, failed: int = 0, duplicates: int = 0) -> None:
        self.stats.received += sent + failed
        self.stats.sent += sent
        self.stats.failed += failed
        self.stats.duplicates += duplicates

    async def _wait_after(self, error: NatsError, attempt: int) -> None:
        self.stats.retried += 1
        if self._doubt_since is None:
            self._doubt_since = self._outbox.head_at
        if isinstance(error, NatsRefused):
            self._say("NATS refuses events; they wait in the outbox", error, logging.ERROR)
            await asyncio.sleep(min(REFUSED_WAIT_S, backoff_s(attempt) * 4))
            return
        if attempt == 1:
            logger.warning(
                "events wait for NATS",
                extra={
                    "action": "publish.waiting",
                    "run_id": self._outbox.run_id,
                    "error": str(error),
                },
            )
        await asyncio.sleep(backoff_s(attempt))
        await self._link.wait_connected()

    def _is_known(self, record: Record) -> bool:
        return record.headers.get(H_MSG_ID) in self._known

    async def _settle_doubt(self, record: Record) -> None:
        """Beyond the duplicate window only the stream itself can say what it has."""
        since = self._doubt_since
        if since is None or time.time() - since < WINDOW_IS_SURE_S:
            return
        try:
            self._known = await find_stored(self._link, record.subject, self._outbox.run_id, since)
        except NatsRefused as error:
            self._say("cannot look up which events are stored", error, logging.WARNING)
        self._doubt_since = None

    def _say(self, text: str, error: NatsError, level: int) -> None:
        """Once per kind of problem."""
        if text not in self._said:
            self._said.add(text)
            logger.log(
                level,
                text,
                extra={
                    "action": "publish.refused",
                    "run_id": self._outbox.run_id,
                    "error": str(error),
                },
            )
