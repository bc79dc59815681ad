"""Stored events, one after the other, from where the last reader of that name had got to.

The place is a note in the bucket `dbt_leases`, under `position.<name>`, written after every
`NOTE_EVERY` events, whenever the reader asks for it, and at the end. Whoever goes on after a kill
reads again what was read since the last note. What has aged out of the stream before it was read
is counted by `event_stream`, through which all reading goes.
"""

from collections.abc import AsyncGenerator, Callable, Sequence

import msgspec

from dbtstream.event_stream import EventStream, Selection, Start
from dbtstream.events import AnyEvent
from dbtstream.kv_bucket import Bucket
from dbtstream.nats_link import NatsLink
from dbtstream.streams import LEASES_BUCKET
from dbtstream.subjects import EVENTS_STREAM

NOTE_EVERY = 64


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """How far a reader has got, and in which stream: one that is made anew counts from 1 again."""

    stream_seq: int
    stream_created: str = ""


class EventFeed:
    """One reader at a time; see to that elsewhere (`leadership`). `on_skipped` gets each message
    that is no event known here, with the reason."""

    def __init__(
        self,
        link: NatsLink,
        name: str,
        families: Sequence[str],
        *,
        on_skipped: Callable[[Exception], None],
    ) -> None:
        self.name = name
        self.ready = False
        """What is stored from now on will be read."""
        self._link = link
        self._selection = Selection(family=families)
        self._on_skipped = on_skipped
        self._bucket = Bucket(link, LEASES_BUCKET, retry_for_s=0)
        self._key = f"position.{name}"
        self._stream: EventStream | None = None
        self._created = ""
        self._in_hand = False
        self._done = 0  # all up to this stream sequence is done with, or has aged out
        self._noted: Place | None = None
        self._aged_out = 0  # of earlier streams

    @property
    def aged_out(self) -> int:
        """At most so many messages were gone before they could be read. The stream counts all its
        messages, also of families that are not ours."""
        return self._aged_out + (self._stream.aged_out if self._stream else 0)

    @property
    def stream_seq(self) -> int:
        """Of the event in hand."""
        return (self._stream.stream_seq if self._stream else None) or 0

    async def events(self) -> AsyncGenerator[AnyEvent]:
        """Each is done with when the next one is asked for. NatsError; close it with `aclosing`."""
        self._done = await self._place()
        self._aged_out = self.aged_out
        self._stream = stream = EventStream(
            self._link,
            self._selection,
            Start(after_seq=self._done),
            on_skipped=self._on_skipped,
        )
        try:
            async with stream:
                await self._write_note()
                self.ready = True
                unnoted = 0
                async for event in stream:
                    self._in_hand = True
                    yield event
                    self._in_hand = False
                    self._done = stream.stream_seq or 0
                    unnoted += 1
                    if unnoted >= NOTE_EVERY:
                        unnoted = 0
                        await self._write_note()
        finally:
            self.ready = self._in_hand = False

    async def note(self) -> None:
        """Write down how far we are. NatsError.

        Being up to date with our families moves the place past all others.
        """
        if self._stream is not None:
            reached = await self._stream.position()
            if self._is_idle():
                self._done = max(self._done, reached)
        await self._write_note()

    def _is_idle(self) -> bool:
        return self.ready and not self._in_hand

    async def _place(self) -> int:
        """Where to go on: after the note, else with what comes from now on."""
        info = await self._link.ask_jetstream(f"STREAM.INFO.{EVENTS_STREAM}")
        self._created, last_seq = str(info["created"]), int(info["state"]["last_seq"])
        place = await self._read_note()
        if place is None:
            return last_seq
        if place.stream_created not in ("", self._created):
            return 0
        return min(place.stream_seq, last_seq)  # a crash of the server may have cost the end

    async def _read_note(self) -> Place | None:
        value = await self._bucket.read(self._key)
        if value is None or not value.data:
            return None
        self._noted = msgspec.json.decode(value.data, type=Place)
        return self._noted

    async def _write_note(self) -> None:
        place = Place(stream_seq=self._done, stream_created=self._created)
        if place != self._noted:
            await self._bucket.write(self._key, msgspec.json.encode(place), None)
            self._noted = place
