"""Stored events out as OpenLineage, to a real endpoint and a real stream: whatever is down, slow,
refusing or killed meanwhile, everything arrives, in its order."""

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.js.api import RawStreamMsg, StreamConfig

from dbtstream.config import (
    Config,
    NatsConfig,
    OpenLineageConfig,
    SecretRef,
    StreamsConfig,
)
from dbtstream.daemon import Daemon
from dbtstream.embedded import NatsServer
from dbtstream.errors import ConfigError
from dbtstream.event_stream import DEFAULT_PREFETCH
from dbtstream.events import AnyEvent, RunFinished, encode_event
from dbtstream.kv_bucket import Bucket
from dbtstream.nats_link import NatsLink
from dbtstream.publishers.event_feed import NOTE_EVERY, Place
from dbtstream.publishers.openlineage import OpenLineageSender
from dbtstream.publishers.openlineage_sinks import HttpSink, NatsSink, Sink
from dbtstream.streams import LEASES_BUCKET, ensure_streams
from dbtstream.subjects import (
    EVENTS_STREAM,
    LINEAGE_BUCKET,
    event_headers,
    event_subject,
    observed_key,
)
from tests.daemons import daemon_config, serving
from tests.openlineage_events import Json, RunStory, kinds, mapped
from tests.scripted_child import GOOD_RUN

Until = Callable[[Callable[[], object]], Awaitable[None]]
Stored = Callable[[NatsLink, str], Awaitable[list[RawStreamMsg]]]

ORDERS, STG, DAILY = "model.shop.orders", "model.shop.stg_orders", "model.shop.daily"
OTHER_RUN = "0195512b-9a00-7000-8000-000000000002"
THIRD_RUN = "0195512b-9b00-7000-8000-000000000003"


class Endpoint:
    """An OpenLineage endpoint on this machine that can be told how to be."""

    def __init__(self) -> None:
        self.received: list[Json] = []  # what it has taken, in its order
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.answer: Callable[[Json], int] = lambda message: 201
        self.headers: dict[str, str] = {}
        self.gate = threading.Event()  # closed: it takes its time
        self.gate.set()
        self.port = 0
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def up(self) -> None:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                endpoint.gate.wait(30)
                message = json.loads(body)
                endpoint.requests.append((self.path, dict(self.headers)))
                status = endpoint.answer(message)
                if status < 300:
                    endpoint.received.append(message)
                said = b"{}" if status < 300 else b'{"error": "so be it"}'
                self.send_response(status)
                for name, value in endpoint.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def down(self) -> None:
        """Connections that are kept stay open, as behind a proxy; new ones are refused."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    endpoint.up()
    yield endpoint
    endpoint.gate.set()
    endpoint.down()


@pytest.fixture
async def events(link: NatsLink) -> NatsLink:
    """The link, with the streams set up."""
    await ensure_streams(link, StreamsConfig())
    return link


async def store(link: NatsLink, *told: AnyEvent) -> None:
    for event in told:
        await link.publish(event_subject(event), encode_event(event), event_headers(event))


def http_sink(endpoint: Endpoint, *, api_key: str | None = None, **config: Any) -> HttpSink:
    facts: dict[str, Any] = {"url": endpoint.url, "timeout_s": 2.0}
    return HttpSink(OpenLineageConfig(**(facts | config)), api_key)


def sender(link: NatsLink, sink: Sink, worker: str = "w1", **settings: Any) -> OpenLineageSender:
    facts: dict[str, Any] = {"namespace": "dbt", "lead_ttl_s": 4}
    return OpenLineageSender(link, sink, worker=worker, **(facts | settings))


@asynccontextmanager
async def running(sending: OpenLineageSender) -> AsyncIterator[OpenLineageSender]:
    """Until the block ends, as SIGTERM ends it. Begun once it is ready for what is new."""
    task = asyncio.create_task(sending.run())
    try:
        async with asyncio.timeout(20):
            while not sending.feed.ready:
                assert not task.done(), task
                await asyncio.sleep(0.01)
        yield sending
    finally:
        task.cancel()
        await asyncio.wait({task})


async def kill(task: asyncio.Task[None], sending: OpenLineageSender) -> None:
    """As SIGKILL does: nothing is given up or noted. Its link is closed next."""

    async def nothing(*_: object) -> None:
        """What a dead process does."""

    sending._leave = nothing  # type: ignore[method-assign,assignment]
    sending.feed._write_note = nothing  # type: ignore[method-assign]
    task.cancel()
    await asyncio.wait({task})


def one_run(run_id: str | None = None) -> RunStory:
    story = RunStory(run_id) if run_id else RunStory()
    story.begin().build(STG).build(ORDERS, STG, lineage_hash=f"hash of {ORDERS}")
    story.observed(ORDERS, STG)
    return story.test("test.shop.unique_id.x1", ORDERS).build(DAILY, ORDERS).end()


async def test_a_run_arrives_in_its_order(
    events: NatsLink, endpoint: Endpoint, until: Until
) -> None:
    story = one_run()
    async with running(sender(events, http_sink(endpoint, api_key="s3cret"))) as sending:
        await store(events, *story.events)
        await until(lambda: sending.stats.sent == len(mapped(story.events)))
    assert endpoint.received == mapped(story.events)
    path, headers = endpoint.requests[0]
    assert path == "/api/v1/lineage"
    assert headers["Authorization"] == "Bearer s3cret"
    assert headers["Content-Type"] == "application/json"
    assert sending.stats.received == len(story.events)
    assert sending.stats.failed == 0


async def test_an_endpoint_that_is_down_delays_and_loses_nothing(
    events: NatsLink, endpoint: Endpoint, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    story = one_run()
    endpoint.down()
    async with running(sender(events, http_sink(endpoint))) as sending:
        await store(events, *story.events)
        await until(lambda: sending.stats.retried >= 3)
        assert endpoint.received == []
        endpoint.up()
        await until(lambda: len(endpoint.received) == len(mapped(story.events)))
    assert endpoint.received == mapped(story.events)
    waiting = [r for r in caplog.records if r.msg == "OpenLineage messages wait"]
    assert len(waiting) == 1, "said once, however often it is tried"
    assert "OpenLineage messages go out again" in caplog.text


async def test_server_errors_are_tried_again_in_order(
    events: NatsLink, endpoint: Endpoint, until: Until
) -> None:
    left = iter([500, 503, 401, 404, 429])
    endpoint.answer = lambda message: next(left, 201)
    story = one_run()
    async with running(sender(events, http_sink(endpoint))):
        await store(events, *story.events)
        await until(lambda: len(endpoint.received) == len(mapped(story.events)))
    assert endpoint.received == mapped(story.events)


async def test_a_message_that_is_refused_is_left_out_and_said_once(
    events: NatsLink, endpoint: Endpoint, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint.answer = lambda message: 422 if message["job"]["name"] in (ORDERS, DAILY) else 201
    story = one_run()
    wanted = [m for m in mapped(story.events) if m["job"]["name"] not in (ORDERS, DAILY)]
    async with running(sender(events, http_sink(endpoint))) as sending:
        await store(events, *story.events)
        await until(lambda: len(endpoint.received) == len(wanted))
        assert sending.stats.failed == 4
    assert endpoint.received == wanted
    said = [r for r in caplog.records if "refused and left out" in r.msg]
    assert len(said) == 1
    assert "HTTP 422" in vars(said[0])["problem"]
    assert "so be it" in vars(said[0])["problem"]


async def test_a_slow_endpoint_is_asked_again_after_the_time_limit(
    events: NatsLink, endpoint: Endpoint, until: Until
) -> None:
    """And the loop that dbt's events go through is not held up meanwhile."""
    endpoint.gate.clear()
    story = one_run()
    async with running(sender(events, http_sink(endpoint, timeout_s=0.2))) as sending:
        await store(events, *story.events)
        await until(lambda: sending.stats.retried >= 2)
        endpoint.gate.set()
        await until(lambda: kinds(endpoint.received)[-1:] == ["COMPLETE shop.prod.build"])
    received = kinds(endpoint.received)
    repeated = received.count("START shop.prod.build")
    assert received[repeated - 1 :] == kinds(mapped(story.events)), "only the first one again"


async def test_a_connection_that_was_closed_while_idle_is_no_outage(
    events: NatsLink, endpoint: Endpoint, until: Until
) -> None:
    endpoint.headers = {"Connection": "close"}
    story = one_run()
    async with running(sender(events, http_sink(endpoint))) as sending:
        await store(events, *story.events)
        await until(lambda: len(endpoint.received) == len(mapped(story.events)))
        assert sending.stats.retried == 0


async def test_retry_after_is_heeded(events: NatsLink, endpoint: Endpoint, until: Until) -> None:
    endpoint.headers = {"Retry-After": "1"}
    left = iter([429])
    endpoint.answer = lambda message: next(left, 201)
    loop = asyncio.get_running_loop()
    async with running(sender(events, http_sink(endpoint))):
        began = loop.time()
        await store(events, *RunStory().begin().events)
        await until(lambda: endpoint.received)
        assert loop.time() - began >= 1


async def test_a_redirect_says_what_to_do(
    events: NatsLink, endpoint: Endpoint, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint.answer = lambda message: 308
    async with running(sender(events, http_sink(endpoint))) as sending:
        await store(events, *RunStory().begin().events)
        await until(lambda: sending.stats.retried)
    problems = [vars(r).get("problem", "") for r in caplog.records]
    assert any("set `url` to where it leads" in problem for problem in problems)


@pytest.mark.parametrize("stop", ["SIGTERM", "SIGKILL"])
async def test_whoever_begins_again_goes_on_in_the_middle_of_a_run(
    events: NatsLink, nats_config: NatsConfig, endpoint: Endpoint, until: Until, stop: str
) -> None:
    """After a kill what was sent since the last note is sent again; held ends are not forgotten."""
    story = one_run()
    whole = mapped(story.events)
    cut = 8  # orders has been built, and waits for its lineage
    async with NatsLink(nats_config, name="w1") as own:
        first = sender(own, http_sink(endpoint))
        task = asyncio.create_task(first.run())
        await until(lambda: first.feed.ready)
        await store(events, *story.events[:cut])
        await until(lambda: first.stats.received == cut)
        await until(lambda: len(endpoint.received) == len(mapped(story.events[:cut])))
        if stop == "SIGKILL":
            await kill(task, first)
        else:
            task.cancel()
            await asyncio.wait({task})
    await store(events, *story.events[cut:])
    async with running(sender(events, http_sink(endpoint), worker="w2")):
        await until(lambda: kinds(endpoint.received)[-1:] == ["COMPLETE shop.prod.build"])
    assert once(endpoint.received) == whole
    twice = len(mapped(story.events[:cut])) if stop == "SIGKILL" else 0
    assert len(endpoint.received) <= len(whole) + twice


def once(messages: list[Json]) -> list[Json]:
    """Without repetitions, which OpenLineage tells by run id and event type."""
    out: list[Json] = []
    for message in messages:
        if message not in out:
            out.append(message)
    return out


def has_ended(messages: list[Json], run_id: str) -> bool:
    return any(
        message["run"]["runId"] == run_id and message["eventType"] == "COMPLETE"
        for message in list(messages)
        if "run" in message
    )


async def test_of_two_workers_one_sends_and_the_other_takes_over_when_it_is_killed(
    events: NatsLink, nats_config: NatsConfig, endpoint: Endpoint, until: Until
) -> None:
    first, second = one_run(), one_run(OTHER_RUN)
    other = sender(events, http_sink(endpoint), worker="w2")
    async with NatsLink(nats_config, name="w1") as own:
        leader = sender(own, http_sink(endpoint), worker="w1")
        leading = asyncio.create_task(leader.run())
        await until(lambda: leader.feed.ready)
        waiting = asyncio.create_task(other.run())
        await store(events, *first.events)
        await until(lambda: len(endpoint.received) == len(mapped(first.events)))
        assert other.stats.received == 0
        await kill(leading, leader)
    await store(events, *second.events)
    await until(lambda: has_ended(endpoint.received, OTHER_RUN))
    waiting.cancel()
    await asyncio.wait({waiting})
    assert once(endpoint.received) == mapped(first.events) + mapped(second.events)


async def test_a_leader_that_was_away_too_long_sends_no_more(
    events: NatsLink, endpoint: Endpoint, until: Until
) -> None:
    """Somebody else wrote the key: it stops, and asks for the lead again."""
    async with running(sender(events, http_sink(endpoint))) as sending:
        await events.publish(f"$KV.dbt_leases.{sending._lead.key}", b"{}", {"Nats-TTL": "2s"})
        await until(lambda: not sending.feed.ready)
        await store(events, *RunStory().begin().events)
        await until(lambda: endpoint.received)  # the key of the other one has expired
        assert sending.feed.ready


async def test_a_leader_that_has_not_renewed_for_long_waits(
    events: NatsLink, endpoint: Endpoint, until: Until
) -> None:
    """As one that was frozen: another one may lead by now."""
    async with running(sender(events, http_sink(endpoint))) as sending:
        sending._lead._renewed_at -= 1000
        await store(events, *RunStory().begin().events)
        await until(lambda: sending.feed._in_hand)
        assert sending.stats.received == 0
        await until(lambda: endpoint.received)  # the next renewal has come
        assert sending._lead.sure


async def test_lineage_of_an_earlier_run_completes_an_unchanged_model(
    events: NatsLink, endpoint: Endpoint, until: Until
) -> None:
    earlier = RunStory(OTHER_RUN).observed(ORDERS, STG)
    key = observed_key("shop", "prod", ORDERS)
    await events.publish(f"$KV.{LINEAGE_BUCKET}.{key}", encode_event(earlier))
    story = RunStory().begin().build(ORDERS, STG, lineage_hash=earlier.lineage_hash)
    async with running(sender(events, http_sink(endpoint))):
        await store(events, *story.events)
        await until(lambda: len(endpoint.received) == 3)
    assert endpoint.received == mapped(story.events, earlier)
    assert "columnLineage" in endpoint.received[-1]["outputs"][0]["facets"]


async def test_a_nats_outage_in_the_middle_loses_nothing(
    events: NatsLink, nats_server: NatsServer, endpoint: Endpoint, until: Until
) -> None:
    story = one_run()
    async with running(sender(events, http_sink(endpoint))):
        await store(events, *story.events[:6])
        await until(lambda: endpoint.received)
        await nats_server.kill()
        await nats_server.restart()
        await events.wait_connected(20)
        await store(events, *story.events[6:])
        await until(lambda: kinds(endpoint.received)[-1:] == ["COMPLETE shop.prod.build"])
    assert once(endpoint.received) == mapped(story.events)


async def test_what_has_aged_out_before_it_could_be_sent_is_counted_and_said(
    events: NatsLink, endpoint: Endpoint, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(sender(events, http_sink(endpoint))) as sending:
        await store(events, *RunStory().begin().events)
        await until(lambda: sending.feed._done == 2)
    missed, seen = one_run(OTHER_RUN), RunStory(THIRD_RUN).begin()
    await store(events, *missed.events)
    await events.js.purge_stream(EVENTS_STREAM)
    async with running(sender(events, http_sink(endpoint))) as again:
        assert again.feed.aged_out == len(missed.events)
        await store(events, *seen.events)
        await until(lambda: len(endpoint.received) == 2)
    said = [r for r in caplog.records if "aged out" in r.msg]
    assert len(said) == 1
    assert vars(said[0])["at_most"] == len(missed.events)


async def test_events_of_other_families_that_age_out_are_no_loss(
    events: NatsLink, endpoint: Endpoint, until: Until
) -> None:
    async with running(sender(events, http_sink(endpoint))) as sending:
        await store(events, *RunStory().begin().events)
        await until(lambda: len(endpoint.received) == 1)
        for number in range(20):
            await events.publish("dbt.events.shop.prod.log.warn.x._", b"%d" % number)
        await sending.feed.note()
    await events.js.purge_stream(EVENTS_STREAM)
    async with running(sender(events, http_sink(endpoint))) as again:
        assert again.feed.aged_out == 0


async def test_a_consumer_that_was_deleted_is_made_again_where_it_was(
    events: NatsLink, endpoint: Endpoint, until: Until
) -> None:
    story = one_run()
    async with running(sender(events, http_sink(endpoint))) as sending:
        await store(events, *story.events[:6])
        await until(lambda: len(endpoint.received) == 4)
        (consumer,) = await events.js.consumers_info(EVENTS_STREAM)
        await events.js.delete_consumer(EVENTS_STREAM, consumer.name)
        await store(events, *story.events[6:])
        await until(lambda: kinds(endpoint.received)[-1:] == ["COMPLETE shop.prod.build"])
        assert sending.feed.aged_out == 0
    assert endpoint.received == mapped(story.events)


async def test_the_place_is_noted_on_the_way(
    events: NatsLink, endpoint: Endpoint, until: Until
) -> None:
    """So that a kill costs no more than to send what came since."""
    story = RunStory().begin()
    for number in range(NOTE_EVERY):
        story.build(f"model.shop.m{number}")
    leases = Bucket(events, LEASES_BUCKET, retry_for_s=0)
    async with running(sender(events, http_sink(endpoint), lead_ttl_s=600)) as sending:
        await store(events, *story.events)
        await until(lambda: sending.stats.received == len(story.events))
        value = await leases.read("position.openlineage-http")
        assert value is not None
        assert value.data is not None
        place = msgspec.json.decode(value.data, type=Place)
    assert place.stream_seq == len(story.events) // NOTE_EVERY * NOTE_EVERY


async def test_what_ages_out_behind_a_slow_endpoint_is_counted(
    events: NatsLink, endpoint: Endpoint, until: Until
) -> None:
    """What had been fetched is not lost by that."""
    endpoint.gate.clear()
    more = 10
    async with running(sender(events, http_sink(endpoint, timeout_s=30.0))) as sending:
        for story in (RunStory(f"0195512b-9a00-7000-8000-{n:012}") for n in range(133)):
            await store(events, *story.begin().events)
        stream = await events.js.stream_info(EVENTS_STREAM)
        assert stream.state.last_seq == DEFAULT_PREFETCH + more
        stream.config.max_msgs = 1
        await events.js.update_stream(stream.config)
        await sending.feed.note()
        assert sending.feed.aged_out == more - 1
        endpoint.gate.set()
        await until(lambda: sending.stats.received == DEFAULT_PREFETCH + 1)


async def test_a_stream_that_was_made_anew_is_read_from_its_beginning(
    events: NatsLink, endpoint: Endpoint, until: Until
) -> None:
    async with running(sender(events, http_sink(endpoint))):
        await store(events, *RunStory(OTHER_RUN).begin().events)
        await until(lambda: len(endpoint.received) == 1)
        await events.js.delete_stream(EVENTS_STREAM)
        await ensure_streams(events, StreamsConfig())
        await store(events, RunStory().begin().events[1])
        await until(lambda: len(endpoint.received) == 2)


async def test_what_happened_before_it_was_switched_on_is_not_sent(
    events: NatsLink, endpoint: Endpoint, until: Until
) -> None:
    """But a run that is under way is told with what belongs to it."""
    await store(events, *one_run(OTHER_RUN).events)
    story = RunStory().begin()
    story.start(ORDERS)
    await store(events, *story.events)
    story.finish(ORDERS)
    story.materialized(ORDERS, STG)
    story.end()
    async with running(sender(events, http_sink(endpoint))):
        await store(events, *story.events[3:])
        await until(lambda: len(endpoint.received) == 2)
    assert endpoint.received == mapped(story.events)[-2:]


async def test_a_message_that_is_no_event_is_left_out_and_said(
    events: NatsLink, endpoint: Endpoint, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(sender(events, http_sink(endpoint))) as sending:
        await events.publish("dbt.events.shop.prod.node.model.x.success", b'{"type": "new.one"}')
        await store(events, *RunStory(run_id="no-uuid").begin().events)
        await store(events, *RunStory().begin().events)
        await until(lambda: endpoint.received)
        assert sending.stats.dropped == 3
    assert "left out a message that is no event known here" in caplog.text
    assert "left out an event that could not be mapped" in caplog.text


class TestNats:
    SUBJECT = "openlineage.events"

    @staticmethod
    async def messages(link: NatsLink, stored: Stored) -> list[Json]:
        return [json.loads(m.data or b"") for m in await stored(link, "OPENLINEAGE")]

    async def make_stream(self, link: NatsLink) -> None:
        await link.js.add_stream(StreamConfig(name="OPENLINEAGE", subjects=[self.SUBJECT]))

    async def test_messages_are_stored_under_ids_that_follow_from_them(
        self, events: NatsLink, until: Until, stored: Stored
    ) -> None:
        await self.make_stream(events)
        story = one_run()
        async with running(sender(events, NatsSink(events, self.SUBJECT))) as sending:
            await store(events, *story.events)
            await until(lambda: sending.stats.sent == len(mapped(story.events)))
        assert await self.messages(events, stored) == mapped(story.events)
        first = (await stored(events, "OPENLINEAGE"))[0]
        assert (first.headers or {})["Nats-Msg-Id"].startswith(f"{story.run_id}:START:")

    async def test_a_message_that_is_sent_twice_is_stored_once(
        self, events: NatsLink, until: Until, stored: Stored
    ) -> None:
        """The same events under another consumer, as after a loss of all that was noted."""
        await self.make_stream(events)
        story = one_run()
        for _ in range(2):
            async with running(sender(events, NatsSink(events, self.SUBJECT))) as sending:
                for event in story.events:
                    headers = event_headers(event)
                    del headers["Nats-Msg-Id"]  # stored twice
                    await events.publish(event_subject(event), encode_event(event), headers)
                await until(lambda: sending.stats.sent >= len(mapped(story.events)))
        assert await self.messages(events, stored) == mapped(story.events)

    async def test_a_subject_without_a_stream_is_said_and_waited_for(
        self, events: NatsLink, until: Until, stored: Stored, caplog: pytest.LogCaptureFixture
    ) -> None:
        story = one_run()
        async with running(sender(events, NatsSink(events, self.SUBJECT))) as sending:
            await store(events, *story.events)
            await until(lambda: sending.stats.retried)
            await self.make_stream(events)
            await until(lambda: sending.stats.sent == len(mapped(story.events)))
        assert await self.messages(events, stored) == mapped(story.events)
        problems = [vars(r).get("problem", "") for r in caplog.records]
        assert any(p.startswith("no stream takes openlineage.events") for p in problems)

    async def test_a_message_that_no_stream_can_hold_is_left_out(
        self, events: NatsLink, until: Until
    ) -> None:
        await events.js.add_stream(
            StreamConfig(name="OPENLINEAGE", subjects=[self.SUBJECT], max_msg_size=3000)
        )
        story = RunStory().begin().build(ORDERS, description="long " * 1000).end()
        async with running(sender(events, NatsSink(events, self.SUBJECT))) as sending:
            await store(events, *story.events)
            await until(lambda: sending.stats.sent == len(mapped(story.events)) - 1)
            assert sending.stats.failed == 1

    async def test_an_endpoint_that_is_down_does_not_hold_up_the_subject(
        self, events: NatsLink, endpoint: Endpoint, until: Until
    ) -> None:
        await self.make_stream(events)
        endpoint.down()
        story = one_run()
        async with (
            running(sender(events, http_sink(endpoint))),
            running(sender(events, NatsSink(events, self.SUBJECT))) as sending,
        ):
            await store(events, *story.events)
            await until(lambda: sending.stats.sent == len(mapped(story.events)))


def leads(daemon: Daemon) -> list[OpenLineageSender]:
    """Its senders that read events by now."""
    return [each for each in daemon.openlineage if each.feed.ready]


class TestInTheDaemon:
    def config(self, tmp_path: Path, nats: NatsConfig, **section: Any) -> Config:
        config = daemon_config(tmp_path, nats, GOOD_RUN)
        return msgspec.structs.replace(config, openlineage=OpenLineageConfig(**section))

    async def test_an_endpoint_that_is_down_delays_neither_a_run_nor_the_end(
        self, tmp_path: Path, nats_config: NatsConfig, endpoint: Endpoint, until: Until
    ) -> None:
        """And what was not sent goes out when the daemon is started again."""
        endpoint.down()
        config = self.config(tmp_path, nats_config, url=endpoint.url)
        loop = asyncio.get_running_loop()
        async with serving(config) as served:
            await until(lambda: len(leads(served.daemon)) == 1)
            told = await served.run()
            assert isinstance(told[-1], RunFinished)
            stopped_at = loop.time()
        assert loop.time() - stopped_at < 15
        assert endpoint.received == []
        endpoint.up()
        async with serving(config):
            await until(lambda: kinds(endpoint.received)[-1:] == ["COMPLETE shop.dev.build"])
        assert once(endpoint.received) == mapped(told)

    async def test_a_key_that_cannot_be_read_keeps_it_from_starting(
        self, tmp_path: Path, nats_config: NatsConfig
    ) -> None:
        section: dict[str, Any] = {
            "url": "http://127.0.0.1:1",
            "api_key": SecretRef(file=str(tmp_path / "gone")),
        }
        with pytest.raises(ConfigError, match=r"openlineage\.api_key: secret file .*gone"):
            async with serving(self.config(tmp_path, nats_config, **section)):
                pass
