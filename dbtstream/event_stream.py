"""Events of `DBT_EVENTS` as an async iterator that no outage ends, doubles or thins.

`client.Client.events` makes it. It reads through a named pull consumer of its own (ack none,
in memory), which a per-project NATS user may create where an ordered consumer is denied to
it. Whenever that consumer is lost (server restart, reconnect, deletion, silence, or a hole in
its numbering) a new one begins at the stream sequence after the last event. It never acks,
never writes, and holds at most `prefetch` events that nobody has read yet.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import msgspec
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsPyError
from nats.js.api import AckPolicy, ConsumerConfig, ConsumerInfo

from dbtstream.errors import NatsError, NatsRefused, NatsUnavailable
from dbtstream.events import JSON, AnyEvent, RunFinished, RunRejected, decode_event
from dbtstream.nats_errors import JetStreamRefused, from_answer
from dbtstream.nats_link import NatsLink, backoff_s
from dbtstream.selection import Selection, Start
from dbtstream.subjects import EVENTS_STREAM, H_CONTENT_TYPE, H_RUN_ID

__all__ = ["EventStream", "Selection", "Start"]

logger = logging.getLogger(__name__)

DEFAULT_PREFETCH = 256
PULL_EXPIRES_S = 30.0
HEARTBEAT_S = 2.0
SILENCE_S = 5.0  # a pull without event or heartbeat for so long has lost its consumer
FIRST_ATTACH_S = 10.0
INACTIVE_S = 60.0  # the server removes a consumer that nobody pulls from
STREAM_NOT_FOUND = 10059


class _ConsumerLost(Exception):
    """The pull consumer, or the way to it, is gone. Its text says how that was noticed."""


@dataclass(slots=True)
class _Consumer:
    """One pull consumer and what it has sent: `queue` gets None at a reconnect."""

    name: str
    inbox: str
    subscription: Subscription
    queue: asyncio.Queue[Msg | None]
    forget_reconnect: Callable[[], None]
    pending: int = 0  # stored events that it had still to send when it was made
    received: int = 0
    asked: int = 0  # of the outstanding pull, not yet arrived
    ended: bool = False


class EventStream:
    """`async for event in stream`; see `Client.events` for what it promises.

    While iterating, `stream_seq` and `subject` are those of the event in hand. Store
    `stream_seq` with your own results, and pass it as `after_seq` to go on from there after
    a restart. One iterator at a time. `async with` begins the reading on entry, not with the
    first `async for`, and ends it at once instead of when Python collects the iterator.
    """

    def __init__(
        self,
        link: NatsLink,
        selection: Selection,
        start: Start,
        *,
        run_id: str | None = None,
        follow: bool = True,
        prefetch: int = DEFAULT_PREFETCH,
        on_skipped: Callable[[Exception], None] | None = None,
    ) -> None:
        self._link = link
        self._selection = selection
        self._start = start
        self._run_id = run_id
        self._follow = follow
        self._prefetch = prefetch
        self._on_skipped = on_skipped
        self._consumer: _Consumer | None = None
        self._prepared: _Consumer | None = None
        self._closed = False
        self._one_filter = False  # this user may not make a consumer of several
        self._losses = 0  # consumers lost since the last event
        self.stream_seq: int | None = None
        self.subject: str | None = None
        self.skipped = 0
        """Messages that are no event known here, such as a newer server's types."""
        self.resumed = 0
        """How often a new consumer had to be made."""
        self.aged_out = 0
        """At most so many messages were gone from the stream before they could be read: it
        counts all its messages, also those that are not selected. Only for a reader that goes on
        from somewhere (`after_seq`) and may look at the stream."""
        self._counted_to = 0  # holes up to this stream sequence are in `aged_out`

    def __aiter__(self) -> AsyncIterator[AnyEvent]:
        return self._events()

    async def __aenter__(self) -> Self:
        """Begin now: what is stored after this returns will be given, whenever it is read."""
        self._prepared = await self._attach()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the iteration, take the pull back, delete the consumer. Safe to call twice."""
        self._closed = True
        await self._detach(self._consumer)

    async def position(self) -> int:
        """All up to this stream sequence was given, is not selected, or has aged out. NatsError."""
        state = (await self._api(f"STREAM.INFO.{EVENTS_STREAM}", {}))["state"]
        given = self._start.after_seq or 0
        if self._consumer is None or self._consumer.ended:
            return given
        path = f"CONSUMER.INFO.{EVENTS_STREAM}.{self._consumer.name}"
        info = await self._api(path, {})
        delivered = int(info["delivered"]["stream_seq"])
        self._count_hole(int(state["first_seq"]), reached=max(given, delivered))
        given = self._start.after_seq or 0
        idle = not info["num_pending"] and delivered <= given
        return max(given, int(state["last_seq"])) if idle else given

    # -- reading -------------------------------------------------------------------------

    async def _events(self) -> AsyncGenerator[AnyEvent]:
        consumer, self._prepared = self._prepared, None
        try:
            while not self._closed:
                if consumer is None or consumer.ended:
                    consumer = await self._attach()
                if consumer.pending == 0 and not self._follow:
                    return
                try:
                    async for event, is_last in self._of_consumer(consumer):
                        if event is not None:
                            yield event
                        if is_last:
                            return
                except _ConsumerLost as lost:
                    await self._detach(consumer)
                    await self._after_loss(lost)
        finally:
            await self._detach(consumer)

    async def _of_consumer(
        self, consumer: _Consumer
    ) -> AsyncGenerator[tuple[AnyEvent | None, bool]]:
        """(event or None for one that is not asked for, whether nothing more is wanted)."""
        while True:
            message = await self._next(consumer)
            self._losses = 0
            event = self._accept(message)
            caught_up = message.metadata.num_pending == 0 and not self._follow
            yield event, caught_up or (event is not None and self._ends_run(event))

    async def _after_loss(self, lost: _ConsumerLost) -> None:
        if self._closed:
            return
        self._losses += 1
        self.resumed += 1
        logger.info(
            "reading events through a new consumer",
            extra={
                "action": "events.resume",
                "after_seq": self._start.after_seq,
                "why": str(lost),
            },
        )
        if self._losses > 1:
            await asyncio.sleep(backoff_s(self._losses))

    async def _next(self, consumer: _Consumer) -> Msg:
        """The consumer's next event, in its order and without a hole."""
        while True:
            if consumer.asked <= 0 and consumer.queue.empty():
                await self._pull(consumer)
            try:
                message = consumer.queue.get_nowait()
            except asyncio.QueueEmpty:
                message = await self._wait(consumer)
            if message is None:
                raise _ConsumerLost("the connection was replaced")
            if not message.reply.startswith("$JS.ACK."):
                self._read_status(consumer, message)
                continue
            consumer.asked -= 1
            consumer.received += 1
            if message.metadata.sequence.consumer != consumer.received:
                raise _ConsumerLost("a message of it did not arrive")
            return message

    async def _wait(self, consumer: _Consumer) -> Msg | None:
        try:
            async with asyncio.timeout(SILENCE_S):
                return await consumer.queue.get()
        except TimeoutError:
            raise _ConsumerLost(f"silent for {SILENCE_S:g} s") from None

    async def _pull(self, consumer: _Consumer) -> None:
        request = {
            "batch": self._prefetch,
            "expires": int(PULL_EXPIRES_S * 1e9),
            "idle_heartbeat": int(HEARTBEAT_S * 1e9),
        }
        try:
            await self._link.client.publish(
                f"$JS.API.CONSUMER.MSG.NEXT.{EVENTS_STREAM}.{consumer.name}",
                json.dumps(request).encode(),
                reply=consumer.inbox,
            )
        except (NatsPyError, NatsUnavailable, OSError) as error:
            raise _ConsumerLost(f"no pull could be sent: {error}") from error
        consumer.asked = self._prefetch

    def _read_status(self, consumer: _Consumer, message: Msg) -> None:
        """A heartbeat, the end of a pull, or the end of the consumer."""
        headers = message.headers or {}
        status, text = headers.get("Status", ""), headers.get("Description", "")
        if status == "100":
            return
        pull_ended = status in ("404", "408") or (status == "409" and "Batch Completed" in text)
        if not pull_ended:
            raise _ConsumerLost(f"the server said {status} {text}".strip())
        consumer.asked = 0

    def _accept(self, message: Msg) -> AnyEvent | None:
        """The message's event, if it is one that is asked for."""
        metadata = message.metadata
        self._start = Start(after_seq=metadata.sequence.stream)
        headers = message.headers or {}
        covered = selected = self._selection.covers(message.subject)
        if self._run_id is not None:
            if headers.get(H_RUN_ID) != self._run_id:
                return None
            # A run's end ends the iteration, so it is looked at even if it is not selected.
            selected = selected or message.subject.split(".")[4] == "run"
        if not selected:
            return None
        try:
            event = decode_event(message.data, headers.get(H_CONTENT_TYPE, JSON))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._skip(message.subject, error)
            return None
        if not covered and not self._ends_run(event):
            return None
        self.stream_seq, self.subject = metadata.sequence.stream, message.subject
        return event

    def _skip(self, subject: str, error: Exception) -> None:
        self.skipped += 1
        if self._on_skipped is not None:
            self._on_skipped(error)
            return
        if self.skipped == 1:
            logger.warning(
                "skipped a message that is no event known here; later ones are only counted",
                extra={"action": "events.skip", "subject": subject, "problem": str(error)},
            )

    def _ends_run(self, event: AnyEvent) -> bool:
        return self._run_id is not None and isinstance(event, RunFinished | RunRejected)

    # -- the consumer --------------------------------------------------------------------

    async def _attach(self) -> _Consumer:
        """Make the consumer, waiting for NATS as long as that takes.

        Raises NatsRefused; NatsUnavailable only for the first consumer, of a server that is
        there and whose JetStream is not.
        """
        name = f"events_{secrets.token_hex(8)}"
        patience = time.monotonic() + FIRST_ATTACH_S
        for attempt in itertools.count(1):
            await self._link.wait_connected()
            try:
                return await self._make_consumer(name)
            except JetStreamRefused as error:
                if error.err_code != STREAM_NOT_FOUND:
                    raise
                raise NatsRefused(
                    "reading events",
                    f"there is no stream {EVENTS_STREAM}",
                    "`dbtstream setup` creates it",
                ) from error
            except NatsUnavailable as error:
                first = self.resumed == 0 and self.stream_seq is None
                if first and self._link.connected and time.monotonic() > patience:
                    raise
                logger.debug(
                    "cannot make a consumer yet",
                    extra={"action": "events.attach", "problem": error.problem},
                )
                await asyncio.sleep(backoff_s(attempt))
        raise AssertionError("unreachable: count() does not end")

    async def _make_consumer(self, name: str) -> _Consumer:
        link = self._link
        if self.resumed or self._start.after_seq:
            await self._look_at_stream()
        queue: asyncio.Queue[Msg | None] = asyncio.Queue()
        with link.translated("reading events"):
            inbox = link.client.new_inbox()
            subscription = await link.client.subscribe(inbox, cb=queue.put)
        forget = link.on_reconnect(lambda: queue.put_nowait(None))
        self._consumer = consumer = _Consumer(name, inbox, subscription, queue, forget)
        try:
            info = await self._create(name)
        except BaseException:
            await self._detach(consumer)
            raise
        consumer.pending = info.num_pending or 0
        if self._start.after_seq is None and info.delivered is not None:
            # From here on, even if this consumer is lost before its first event.
            self._start = Start(after_seq=info.delivered.stream_seq)
        return consumer

    async def _create(self, name: str) -> ConsumerInfo:
        """With the exact filters, or with one that covers them where only that is allowed.

        A consumer of several filters has none in its API subject, which is where permissions
        see it: a user of one project may not make it. `_accept` leaves out what is too much.
        """
        wanted = self._selection
        if self._run_id is not None:
            # All of its project and target: also its end, which may not be selected.
            wanted = Selection(project=wanted.project, target=wanted.target)
        filters = wanted.subjects()
        if len(filters) > 1 and not self._one_filter:
            try:
                return await self._create_with(name, filters)
            except JetStreamRefused:
                raise
            except NatsRefused:
                self._one_filter = True
        return await self._create_with(name, [wanted.covering_subject()])

    async def _create_with(self, name: str, filters: list[str]) -> ConsumerInfo:
        """Over the JSON API: nats-py turns a denied request into a timeout."""
        one = filters[0] if len(filters) == 1 else None
        config = ConsumerConfig(
            name=name,
            ack_policy=AckPolicy.NONE,
            mem_storage=True,
            num_replicas=1,
            inactive_threshold=INACTIVE_S,
            filter_subject=one,
            filter_subjects=None if one else filters,
            **self._start.policy(),
        )
        path = ".".join(filter(None, ("CONSUMER.CREATE", EVENTS_STREAM, name, one)))
        request = {"stream_name": EVENTS_STREAM, "config": config.as_dict()}
        info: ConsumerInfo = ConsumerInfo.from_response(await self._api(path, request))
        return info

    async def _api(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        task = asyncio.current_task()
        cancels = task.cancelling() if task else 0
        reply = await self._link.request(f"$JS.API.{path}", json.dumps(request).encode())
        # nats-py waits with asyncio.wait_for, which in Python 3.11 loses a cancel that comes
        # in the same moment as the answer (python/cpython#86296, fixed in 3.12).
        if task and task.cancelling() > cancels:
            raise asyncio.CancelledError
        answer: dict[str, Any] = json.loads(reply.data)
        if "error" in answer:
            raise from_answer("reading events", self._link.servers, answer["error"])
        return answer

    async def _look_at_stream(self) -> None:
        """Begin again if it was made anew: its numbers are below ours then. Count what is gone."""
        after = self._start.after_seq
        try:
            info = await self._api(f"STREAM.INFO.{EVENTS_STREAM}", {})
        except NatsRefused as error:
            if isinstance(error, JetStreamRefused):
                raise
            return  # this user may not look; most need not
        if after is None:
            return
        if info["state"]["last_seq"] < after:
            logger.warning(
                "the events stream was made anew; reading it from its beginning",
                extra={"action": "events.restart", "after_seq": after},
            )
            self._start = Start(after_seq=0)
        elif after:
            self._count_hole(int(info["state"]["first_seq"]), reached=after)

    def _count_hole(self, first_seq: int, *, reached: int) -> None:
        reached = max(reached, self._counted_to)
        lost = first_seq - reached - 1
        if lost <= 0:
            return
        self.aged_out += lost
        self._counted_to = first_seq - 1
        logger.warning(
            "events have aged out of the stream before they could be read",
            extra={
                "action": "events.aged_out",
                "from_seq": reached + 1,
                "to_seq": first_seq - 1,
                "at_most": lost,
                "at_most_in_all": self.aged_out,
            },
        )

    async def _detach(self, consumer: _Consumer | None) -> None:
        """Best effort and bounded: the server forgets what we cannot tell it to."""
        if consumer is None or consumer.ended:
            return
        consumer.ended = True
        if self._consumer is consumer:
            self._consumer = None
        consumer.forget_reconnect()
        consumer.queue.put_nowait(None)
        with contextlib.suppress(NatsPyError, NatsError, OSError, TimeoutError):
            # An unsubscribed inbox ends the pull; without that it would swallow an event.
            await consumer.subscription.unsubscribe()
        with contextlib.suppress(NatsPyError, NatsError, OSError, TimeoutError):
            if self._link.connected:
                await self._api(f"CONSUMER.DELETE.{EVENTS_STREAM}.{consumer.name}", {})
