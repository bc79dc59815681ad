"""Stored events, one after the other, from where the last reader of that name had got to.

A durable consumer on DBT_EVENTS that hands out one message at a time (`max_ack_pending` 1), so
that order holds over restarts and workers: the next one comes when this one is acked. While one
is in hand the server is told so. It keeps a second note of the place, in the bucket `dbt_leases`
under `position.<name>`: the server moves a consumer silently over what has aged out of the
stream, and only the note shows that. It is also what a lost consumer is made again from.

The consumer's name ends at random, and the note has it: whoever may read events may pull from
any consumer whose name it knows, and would hold up this one.
"""

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsPyError

from dbtstream.errors import NatsError
from dbtstream.kv_bucket import Bucket
from dbtstream.nats_errors import JetStreamRefused
from dbtstream.nats_link import NatsLink
from dbtstream.streams import LEASES_BUCKET
from dbtstream.subjects import EVENTS, EVENTS_STREAM

logger = logging.getLogger(__name__)

PULL_EXPIRES_S = 5.0
PULL_BATCH = 256  # one pull is good for so many messages, one at a time
SETTLE_S = 2.0
FORGET_AFTER_S = 14 * 86400  # the server does, if nobody reads; the note makes another one
_NO_CONSUMER = 10014


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """How far a reader has got, as noted."""

    consumer: str
    stream_seq: int


class EventFeed:
    """One reader at a time; see to that elsewhere (`leadership`)."""

    def __init__(
        self, link: NatsLink, name: str, families: Sequence[str], *, ack_wait_s: float
    ) -> None:
        self.name = name
        self.aged_out = 0
        """At most so many messages were gone before they could be read. The stream counts all its
        messages, also of families that are not ours."""
        self._link = link
        self._filters = [f"{EVENTS}.*.*.{family}.>" for family in families]
        self._ack_wait_s = ack_wait_s
        self._bucket = Bucket(link, LEASES_BUCKET, retry_for_s=0)
        self._inbox: tuple[str, Subscription, Callable[[], None]] | None = None
        self._queue: asyncio.Queue[Msg | None] = asyncio.Queue()
        self._asked = 0
        self._ready = False
        self._generation = -1
        self._done = 0  # all up to this stream sequence is settled, or has aged out
        self._in_hand = 0
        self.consumer = ""
        self._noted: Place | None = None

    @property
    def ready(self) -> bool:
        """The consumer is there: what is stored from now on will be read."""
        return self._ready

    # -- reading ---------------------------------------------------------------------------------

    async def next(self) -> Msg | None:
        """None when there is nothing for a while, or the connection was replaced. NatsError."""
        if self._generation != self._link.generation:
            await self.close()  # its subscription died with the client
        if not self._ready:
            await self._open()
        if self._asked <= 0:
            await self._pull()
        try:
            async with asyncio.timeout(PULL_EXPIRES_S + 1):
                message = await self._queue.get()
        except TimeoutError:
            message = None
        if message is None:
            self._asked = 0
            return None
        if not message.reply.startswith("$JS.ACK."):
            self._read_status(message)
            return None
        self._asked -= 1
        if message.metadata.sequence.stream <= self._done:  # its ack was lost
            await self._tell(message, b"+ACK")
            return None
        return message

    @asynccontextmanager
    async def in_hand(self, message: Msg) -> AsyncIterator[None]:
        """It is acked at the end, and given back if that is not reached."""
        seq = self._in_hand = message.metadata.sequence.stream
        beating = asyncio.create_task(self._beat(message), name=f"beat {self.name}")
        try:
            yield
        except BaseException:
            await self._tell(message, b"-NAK")
            raise
        else:
            await self._tell(message, b"+ACK")
            self._done = max(self._done, seq)
        finally:
            self._in_hand = 0
            beating.cancel()

    async def close(self) -> None:
        """Take back the pull, which would swallow a message else."""
        self._ready, self._asked = False, 0
        if self._inbox is not None:
            _, subscription, forget = self._inbox
            self._inbox = None
            forget()
            with contextlib.suppress(NatsPyError, NatsError, OSError, TimeoutError):
                async with asyncio.timeout(SETTLE_S):
                    await subscription.unsubscribe()
        self._queue = asyncio.Queue()

    async def note(self) -> None:
        """Write down how far we are, and count what has aged out on the way. NatsError.

        Being up to date with our families moves the place past all others.
        """
        state = await self._state()
        info = await self._info()
        idle = not info["num_pending"] and not info["num_ack_pending"]
        if idle and not self._in_hand:
            self._done = max(self._done, int(state["last_seq"]))
        else:
            self._count_hole(int(state["first_seq"]))
        await self._write_note()

    # -- the consumer ----------------------------------------------------------------------------

    async def _open(self) -> None:
        if self._inbox is None:
            with self._link.translated(f"reading {self.name}"):
                queue, client = self._queue, self._link.client
                inbox = client.new_inbox()
                subscription = await client.subscribe(inbox, cb=queue.put)
            forget = self._link.on_reconnect(lambda: queue.put_nowait(None))
            self._inbox = (inbox, subscription, forget)
            self._generation = self._link.generation
        place = await self._read_note()
        state = await self._state()
        last_seq = int(state["last_seq"])
        start = last_seq if place is None else place.stream_seq
        went_back = max(self._done, start) > last_seq  # made anew, or a crash took its end
        if went_back:
            self._done = start = 0
        try:
            info = await self._info()
            await self._update(info["config"])
            if went_back:
                start = min(last_seq, int(info["ack_floor"]["stream_seq"]))
        except JetStreamRefused as error:
            if error.err_code != _NO_CONSUMER:
                raise
            await self._create(start)
        self._done = max(self._done, start)
        await self._write_note()
        self._count_hole(int(state["first_seq"]))
        self._ready = True

    async def _read_note(self) -> Place | None:
        value = await self._bucket.read(f"position.{self.name}")
        if value is None or not value.data:
            self.consumer = self.consumer or f"{self.name}-{secrets.token_hex(8)}"
            return None
        place = msgspec.json.decode(value.data, type=Place)
        self.consumer = place.consumer
        return place

    async def _write_note(self) -> None:
        place = Place(consumer=self.consumer, stream_seq=self._done)
        if place != self._noted:
            data = msgspec.json.encode(place)
            await self._bucket.write(f"position.{self.name}", data, None)
            self._noted = place

    async def _create(self, after_seq: int) -> Any:
        config = {
            "name": self.consumer,
            "durable_name": self.consumer,
            "description": "who sends events on, and how far that is",
            "filter_subjects": self._filters,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": after_seq + 1,
            "ack_policy": "explicit",
            "ack_wait": int(self._ack_wait_s * 1e9),
            "max_ack_pending": 1,
            "max_deliver": -1,
            "inactive_threshold": int(FORGET_AFTER_S * 1e9),
        }
        return await self._configure(config, "create")

    async def _update(self, config: dict[str, Any]) -> None:
        """An older version of us may have wanted other families."""
        wanted = {"filter_subjects": self._filters, "ack_wait": int(self._ack_wait_s * 1e9)}
        if any(config.get(key) != value for key, value in wanted.items()):
            await self._configure({**config, **wanted}, "update")

    async def _configure(self, config: dict[str, Any], action: str) -> Any:
        body = {"stream_name": EVENTS_STREAM, "config": config, "action": action}
        verb = f"CONSUMER.CREATE.{EVENTS_STREAM}.{self.consumer}"
        return await self._link.ask_jetstream(verb, body)

    async def _info(self) -> Any:
        return await self._link.ask_jetstream(f"CONSUMER.INFO.{EVENTS_STREAM}.{self.consumer}")

    async def _state(self) -> Any:
        return (await self._link.ask_jetstream(f"STREAM.INFO.{EVENTS_STREAM}"))["state"]

    def _count_hole(self, first_seq: int) -> None:
        reached = max(self._done, self._in_hand)
        lost = first_seq - reached - 1
        if lost <= 0:
            return
        self.aged_out += lost
        logger.error(
            "events have aged out of the stream before they could be sent on",
            extra={
                "action": "feed.aged_out",
                "consumer": self.consumer,
                "from_seq": reached + 1,
                "to_seq": first_seq - 1,
                "at_most": lost,
                "at_most_in_all": self.aged_out,
            },
        )
        self._done = max(self._done, first_seq - 1)

    # -- the connection --------------------------------------------------------------------------

    async def _pull(self) -> None:
        if self._inbox is None:
            return
        request = {"batch": PULL_BATCH, "expires": int(PULL_EXPIRES_S * 1e9)}
        with self._link.translated(f"reading {self.name}"):
            await self._link.client.publish(
                f"$JS.API.CONSUMER.MSG.NEXT.{EVENTS_STREAM}.{self.consumer}",
                json.dumps(request).encode(),
                reply=self._inbox[0],
            )
        self._asked = PULL_BATCH

    def _read_status(self, message: Msg) -> None:
        """The end of a pull; or the consumer's (409), or there is none (503)."""
        headers = message.headers or {}
        status, text = headers.get("Status", ""), headers.get("Description", "")
        self._asked = 0
        if status not in ("404", "408") and "Batch Completed" not in text:
            self._ready = False

    async def _beat(self, message: Msg) -> None:
        while True:
            await asyncio.sleep(self._ack_wait_s / 3)
            await self._tell(message, b"+WPI")

    async def _tell(self, message: Msg, what: bytes) -> None:
        """What cannot be told comes again, after `ack_wait_s`."""
        with contextlib.suppress(NatsPyError, NatsError, OSError):
            await self._link.client.publish(message.reply, what)
