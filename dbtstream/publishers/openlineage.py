"""Stored events out as OpenLineage messages: in order, none lost, never in anybody's way.

It reads what is in DBT_EVENTS (`event_feed`), has it mapped (`openlineage_mapping`), and sends
the messages to a place (`openlineage_sinks`); the next event is read once they are delivered.
So an endpoint that is down costs nothing but the wait: events stay in JetStream, and one event is
in hand. One worker of the fleet sends, per place (`leadership`). Whoever takes over reads the
run's earlier events again and feeds them to a mapping whose messages it throws away.

A message that the place will never take is left out, counted, and said; so is an event that
cannot be mapped. All else is tried for ever.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections import OrderedDict
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import msgspec

from dbtstream.config import Config, read_secret
from dbtstream.errors import NatsError, NatsRefused
from dbtstream.event_stream import EventStream, Selection, Start
from dbtstream.events import AnyEvent, decode_event
from dbtstream.kv_bucket import Bucket
from dbtstream.lineage_events import LineageObserved
from dbtstream.nats_link import NatsLink, backoff_s
from dbtstream.openlineage import OpenLineageMessage, encode, message_id
from dbtstream.openlineage_mapping import FAMILIES, RunMapping, ends_run
from dbtstream.publishers.event_feed import EventFeed
from dbtstream.publishers.leadership import Leadership
from dbtstream.publishers.openlineage_sinks import HttpSink, NatsSink, NotNow, Refused, Sink
from dbtstream.publishers.stored import CLOCK_SKEW_S
from dbtstream.subjects import LINEAGE_BUCKET, observed_key

logger = logging.getLogger(__name__)

LEAD_TTL_S = 30
MAX_RUNS = 50
"""Runs whose mapping is kept; another one is read again from the stream when it goes on."""
MAX_SAID = 100
AFTER_CRASH_S = 30.0
LEAVE_S = 5.0


@dataclass(slots=True)
class SenderStats:
    """Messages, but for `received` events. The four names are the same at every stage."""

    received: int = 0
    sent: int = 0
    dropped: int = 0  # events that cannot be read or mapped
    failed: int = 0  # messages that the place refused for good
    retried: int = 0


class OpenLineageOut:
    """All places of the config. Blocking to make: it reads a secret. Raises ConfigError."""

    def __init__(self, config: Config, link: NatsLink) -> None:
        self.senders: list[OpenLineageSender] = []
        section = config.openlineage
        if section is None:
            return
        sinks: list[Sink] = []
        if section.subject is not None:
            sinks.append(NatsSink(link, section.subject))
        if section.url is not None:
            secret = None
            if section.api_key is not None:
                secret = read_secret(section.api_key, config.source, "openlineage.api_key")
            sinks.append(HttpSink(section, secret))
        self.senders = [
            OpenLineageSender(link, sink, namespace=section.namespace, worker=config.worker_name)
            for sink in sinks
        ]

    async def run(self) -> None:
        """Until it is cancelled; returns at once when there is nowhere to send to."""
        async with asyncio.TaskGroup() as parts:
            for sender in self.senders:
                parts.create_task(sender.run(), name=f"openlineage {sender.sink.name}")


class OpenLineageSender:
    """To one place."""

    def __init__(
        self,
        link: NatsLink,
        sink: Sink,
        *,
        namespace: str,
        worker: str,
        lead_ttl_s: int = LEAD_TTL_S,
    ) -> None:
        name = f"openlineage-{sink.name}"
        self.sink = sink
        self.stats = SenderStats()
        self.feed = EventFeed(link, name, FAMILIES, on_skipped=self._skipped)
        self._link = link
        self._namespace = namespace
        self._lead = Leadership(link, name, worker, ttl_s=lead_ttl_s)
        self._lineage = Bucket(link, LINEAGE_BUCKET, retry_for_s=None)
        self._runs: OrderedDict[str, RunMapping] = OrderedDict()
        self._said: set[str] = set()

    async def run(self) -> None:
        """Until it is cancelled. What goes wrong in here must not end the daemon: dbt runs."""
        try:
            while True:
                try:
                    await self._lead.acquire()
                    await self._send_while_leading()
                except Exception:
                    logger.exception(
                        "sending OpenLineage has crashed and begins again",
                        extra=self._facts("crashed"),
                    )
                    await asyncio.sleep(AFTER_CRASH_S)
        finally:
            await self.sink.close()

    async def _send_while_leading(self) -> None:
        self._runs.clear()  # another one may have led, and these would lack what it saw
        ours = True
        try:
            async with asyncio.TaskGroup() as parts:
                sending = parts.create_task(self._send_all(), name=f"{self.feed.name} events")
                await self._lead.keep(self._note)
                ours = False
                sending.cancel()
        finally:
            await asyncio.shield(self._leave(ours))

    async def _leave(self, ours: bool) -> None:
        """What there is no time for is found out by the next one. If that leads already, the
        note of the place is its own."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                if ours:
                    await self._note()
                    await self._lead.give_up()
        counts = asdict(self.stats) | {"aged_out": self.feed.aged_out}
        logger.info("stops sending OpenLineage", extra=self._facts("stopped", **counts))

    async def _note(self) -> None:
        try:
            await self.feed.note()
        except NatsError as error:
            self._say("cannot note how far OpenLineage is sent", error, logging.INFO)

    # -- events ----------------------------------------------------------------------------------

    async def _send_all(self) -> None:
        failures = 0
        while True:
            try:
                async with contextlib.aclosing(self.feed.events()) as events:
                    async for event in events:
                        failures = 0
                        await self._lead.until_sure()
                        await self._handle(event)
            except NatsError as error:
                failures += 1
                self._say("cannot read events for OpenLineage, trying again", error)
                await asyncio.sleep(backoff_s(failures))

    async def _handle(self, event: AnyEvent) -> None:
        self.stats.received += 1
        for each in await self._mapped(event):
            await self._deliver(each)

    def _skipped(self, error: Exception) -> None:
        self.stats.received += 1
        self._drop("left out a message that is no event known here", error)

    async def _mapped(self, event: AnyEvent) -> list[OpenLineageMessage]:
        try:
            mapping = self._runs.get(event.run_id) or await self._recall(event)
            for unique_id in mapping.lacks(event):
                await self._teach(mapping, event, unique_id)
            messages = mapping.take(event)
        except NatsError:
            raise
        except Exception as error:  # noqa: BLE001 - one event must not hold up all that follow
            self._drop("left out an event that could not be mapped to OpenLineage", error)
            return []
        self._keep(event, mapping)
        return messages

    def _keep(self, event: AnyEvent, mapping: RunMapping) -> None:
        self._runs[event.run_id] = mapping
        self._runs.move_to_end(event.run_id)
        if ends_run(event):
            del self._runs[event.run_id]
        elif len(self._runs) > MAX_RUNS:
            self._runs.popitem(last=False)

    async def _recall(self, event: AnyEvent) -> RunMapping:
        """A mapping that has seen what the run told before, and whose messages have been sent."""
        failures = 0
        while event.seq > 1:
            try:
                return await self._read_again(event)
            except NatsError as error:
                failures += 1
                self._say("cannot read a run again for OpenLineage, trying again", error)
                await asyncio.sleep(backoff_s(failures))
        return self._new_mapping(event)

    async def _read_again(self, event: AnyEvent) -> RunMapping:
        mapping = self._new_mapping(event)
        stream = EventStream(
            self._link,
            Selection(project=event.project, target=event.target, family=FAMILIES),
            Start(at=_first_told(event.run_id)),
            run_id=event.run_id,
            follow=False,
        )
        async with stream:
            async for earlier in stream:
                if (stream.stream_seq or 0) >= self.feed.stream_seq:
                    break
                mapping.take(earlier)
        return mapping

    def _new_mapping(self, event: AnyEvent) -> RunMapping:
        mapping = RunMapping(self._namespace, event)
        if mapping.problem:
            logger.warning(
                "a run's OpenLineage parent is left out",
                extra=self._facts("parent", run_id=event.run_id, problem=mapping.problem),
            )
        return mapping

    async def _teach(self, mapping: RunMapping, event: AnyEvent, unique_id: str) -> None:
        """The node's lineage as it was last observed, maybe in an earlier run."""
        key = observed_key(event.project, event.target, unique_id)
        try:
            value = await self._lineage.read(key)
            observed = decode_event(value.data) if value is not None and value.data else None
        except (NatsRefused, msgspec.DecodeError) as error:
            self._say("cannot read earlier lineage for OpenLineage", error)
            return
        if isinstance(observed, LineageObserved):
            mapping.learn(observed)

    # -- messages --------------------------------------------------------------------------------

    async def _deliver(self, message: OpenLineageMessage) -> None:
        """Until it is there, or known to be impossible."""
        body = encode(message)
        identity = message_id(message, body)
        attempt, since, said = 0, time.monotonic(), ""
        while True:
            try:
                await self.sink.send(identity, body)
            except Refused as refused:
                self.stats.failed += 1
                self._say("an OpenLineage message is refused and left out", refused, logging.ERROR)
                return
            except NotNow as problem:
                attempt += 1
                self.stats.retried += 1
                if problem.problem != said:
                    said = problem.problem
                    self._waits(said)
                await asyncio.sleep(max(backoff_s(attempt), problem.retry_after_s))
            else:
                break
        self.stats.sent += 1
        if attempt:
            waited_s = round(time.monotonic() - since, 1)
            logger.info(
                "OpenLineage messages go out again", extra=self._facts("again", waited_s=waited_s)
            )

    def _waits(self, problem: str) -> None:
        logger.warning("OpenLineage messages wait", extra=self._facts("waiting", problem=problem))

    def _drop(self, text: str, error: Exception) -> None:
        self.stats.dropped += 1
        self._say(text, error, logging.ERROR)

    def _say(self, text: str, error: Exception, level: int = logging.WARNING) -> None:
        """Once per kind of problem; later ones are only counted."""
        problem = f"{type(error).__name__}: {error}"
        if (key := f"{text} {problem[:60]}") not in self._said and len(self._said) < MAX_SAID:
            self._said.add(key)
            logger.log(level, text, extra=self._facts("problem", problem=problem))

    def _facts(self, what: str, **facts: object) -> dict[str, object]:
        return {
            "action": f"openlineage.{what}",
            "sink": self.sink.name,
            "address": self.sink.address,
            **facts,
        }


def _first_told(run_id: str) -> datetime:
    """Not before this was anything of the run stored: its id has the time, clocks differ."""
    made_at = (uuid.UUID(run_id).int >> 80) / 1000
    with contextlib.suppress(OverflowError, ValueError, OSError):
        return datetime.fromtimestamp(made_at - CLOCK_SKEW_S, UTC)
    return datetime.fromtimestamp(0, UTC)
