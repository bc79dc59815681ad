"""Events as the server passes them on while it stores them (`dbt.live.>`): now, or never.

A plain subscription, for views of what goes on: nothing is kept, nothing is asked for again, and
a reader that is too slow loses what it has no room for. `event_stream` is for those who must have
all of them. Layer 2; `client.Client.live` makes it.
"""

import asyncio
import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Self

import msgspec
import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from dbtstream.errors import NatsError
from dbtstream.events import JSON, AnyEvent, decode_event
from dbtstream.nats_link import NatsLink
from dbtstream.selection import Selection, Words
from dbtstream.subjects import EVENTS, H_CONTENT_TYPE, LIVE

FAMILIES = ("node", "run")
MAX_WAITING = 20_000
MAX_WAITING_BYTES = 32 * 1024 * 1024


class LiveEvents:
    """`async with LiveEvents(link, take)`: `take` is called with each event of a run or a node."""

    def __init__(
        self,
        link: NatsLink,
        take: Callable[[AnyEvent], None],
        *,
        project: Words = None,
        target: Words = None,
    ) -> None:
        self._link, self._take = link, take
        self._selection = Selection(project=project, target=target, family=FAMILIES)
        self._generation = -1
        self._subscriptions: list[Subscription] = []
        self._subscribing: asyncio.Task[None] | None = None
        self._undo: Callable[[], None] | None = None

    async def __aenter__(self) -> Self:
        await self._subscribe()
        self._undo = self._link.on_reconnect(self._reconnected)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._undo is not None:
            self._undo()
        if self._subscribing is not None:
            self._subscribing.cancel()
            await asyncio.wait({self._subscribing})
        for subscription in self._subscriptions:
            with contextlib.suppress(nats.errors.Error, OSError):
                await subscription.unsubscribe()

    def _reconnected(self) -> None:
        """A rebuilt client has no subscriptions; a reconnected one still has its own."""
        if self._link.generation != self._generation:
            self._subscribing = asyncio.create_task(self._again(), name="live events")

    async def _again(self) -> None:
        with contextlib.suppress(NatsError):  # gone again: the next reconnect tries the next time
            await self._subscribe()

    async def _subscribe(self) -> None:
        self._generation = self._link.generation
        with self._link.translated("listening to live events"):
            self._subscriptions = [
                await self._link.client.subscribe(
                    LIVE + subject.removeprefix(EVENTS),
                    cb=self._heard,
                    pending_msgs_limit=MAX_WAITING,
                    pending_bytes_limit=MAX_WAITING_BYTES,
                )
                for subject in self._selection.subjects()
            ]

    async def _heard(self, message: Msg) -> None:
        content_type = (message.headers or {}).get(H_CONTENT_TYPE, JSON)
        # Of a newer server's types, none is known here.
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            self._take(decode_event(message.data, content_type))
