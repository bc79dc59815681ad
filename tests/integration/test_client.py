"""The Python client against a real nats-server: no event missed, none twice, whatever happens.

Events are published here as a daemon publishes them; control requests are answered by plain
subscribers on the control subjects, so no dbt is needed.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.aio.msg import Msg
from opentelemetry import trace

from dbtstream import messages
from dbtstream.client import Client, EventsGone, NoDaemon
from dbtstream.config import NatsConfig, StreamsConfig
from dbtstream.embedded import NatsServer
from dbtstream.errors import NatsRefused, NatsUnavailable, RequestRejected, RunNotFound
from dbtstream.event_stream import EventStream
from dbtstream.events import (
    JSON,
    MSGPACK,
    AnyEvent,
    NodeBlock,
    NodeFinished,
    RunFinished,
    RunQueued,
    RunRejected,
    encode_event,
)
from dbtstream.messages import (
    CancelAccepted,
    ControlError,
    RejectCode,
    Reply,
    RunAccepted,
    RunList,
    RunView,
    SubmitRequest,
)
from dbtstream.nats_link import NatsLink
from dbtstream.statuses import NodeStatus, RunStatus
from dbtstream.streams import ensure_streams
from dbtstream.subjects import (
    CONTROL,
    EVENTS_STREAM,
    event_headers,
    event_subject,
    new_run_id,
)

LIMIT_S = 30


@pytest.fixture
async def client(link: NatsLink, nats_config: NatsConfig) -> AsyncIterator[Client]:
    """On a server that has the streams."""
    await ensure_streams(link, StreamsConfig())
    async with Client.connect(config=nats_config, name="client under test") as client:
        yield client


class Run:
    """Publishes the events of one run."""

    def __init__(self, link: NatsLink, **where: str) -> None:
        self.link = link
        self.run_id = new_run_id(datetime.now(UTC))
        self.where = {"project": "shop", "target": "prod"} | where
        self.seq = 0

    def envelope(self) -> dict[str, Any]:
        self.seq += 1
        return self.where | {
            "event_id": f"{self.run_id}.1.{self.seq}",
            "time": datetime.now(UTC),
            "seq": self.seq,
            "run_id": self.run_id,
            "attempt": 1,
            "fence": 1,
            "worker": "w1",
        }

    async def publish(self, event: AnyEvent, content_type: str = JSON) -> int:
        ack = await self.link.publish_until_stored(
            event_subject(event, command="build"),
            encode_event(event, content_type),
            event_headers(event, content_type=content_type),
            give_up_after_s=LIMIT_S,
        )
        return ack.seq or 0

    async def node(
        self, name: str, status: NodeStatus = NodeStatus.SUCCESS, *, content_type: str = JSON
    ) -> int:
        block = NodeBlock(unique_id=f"model.shop.{name}", resource_type="model", name=name)
        event = NodeFinished(node=block, status=status, **self.envelope())
        return await self.publish(event, content_type)

    async def nodes(self, count: int) -> None:
        for _ in range(count):
            await self.node(f"m{self.seq + 1}")

    async def queued(self) -> int:
        return await self.publish(RunQueued(args=["build"], **self.envelope()))

    async def finished(self, status: RunStatus = RunStatus.SUCCESS) -> int:
        event = RunFinished(status=status, exit_code=0, elapsed_s=1.0, **self.envelope())
        return await self.publish(event)

    async def rejected(self) -> int:
        event = RunRejected(code="expired", message="too late", **self.envelope())
        return await self.publish(event)


@pytest.fixture
def run(link: NatsLink) -> Run:
    return Run(link)


async def seqs(stream: EventStream, count: int) -> list[int]:
    """The `seq` of the next events."""
    found: list[int] = []
    async with asyncio.timeout(LIMIT_S):
        async for event in stream:
            found.append(event.seq)
            if len(found) == count:
                break
    return found


async def names(stream: EventStream) -> list[str]:
    """Of all events that the stream has to give; for `follow=False`."""
    async with asyncio.timeout(LIMIT_S):
        return [event.node.name async for event in stream if isinstance(event, NodeFinished)]


async def consumers(link: NatsLink) -> list[str]:
    return [info.name for info in await link.js.consumers_info(EVENTS_STREAM)]


async def until(fact: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not await fact():
            pass


async def attached(link: NatsLink) -> str:
    """The one reader's consumer exists, so that what is published now is new to it; its name."""
    found: list[str] = []

    async def there() -> bool:
        found[:] = await consumers(link)
        return len(found) == 1

    await until(there)
    return found[0]


# -- nothing missed, nothing twice -----------------------------------------------------------


async def test_events_arrive_once_each_and_in_order_over_crashes_of_the_server(
    client: Client, run: Run, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The consumer is in memory: each kill -9 takes it away, with what it was sending."""
    monkeypatch.setattr("dbtstream.event_stream.SILENCE_S", 600.0)  # noticed by the reconnect
    total = 300
    reading = asyncio.create_task(seqs(client.events(since="all"), total))
    for number in range(1, total + 1):
        await run.node(f"m{number}")
        if number % 100 == 50:
            await nats_server.kill()
            await nats_server.restart()

    assert await reading == list(range(1, total + 1))


async def test_events_go_on_when_the_consumer_is_deleted_under_the_reader(
    client: Client, run: Run, link: NatsLink
) -> None:
    async with asyncio.timeout(LIMIT_S), client.events(since="all") as events:
        iterator = aiter(events)
        for number in range(1, 4):
            assert events._consumer is not None
            await link.js.delete_consumer(EVENTS_STREAM, events._consumer.name)
            await run.node(f"m{number}")
            assert (await anext(iterator)).seq == number
        assert events.resumed == 3


async def test_events_go_on_when_the_consumer_falls_silent(
    client: Client, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its node of a cluster is gone and says nothing."""
    monkeypatch.setattr("dbtstream.event_stream.SILENCE_S", 0.3)
    async with asyncio.timeout(LIMIT_S), client.events() as events:
        assert events._consumer is not None
        await events._consumer.subscription.unsubscribe()
        await run.node("m1")
        assert (await anext(aiter(events))).seq == 1
        assert events.resumed >= 1


async def test_a_reader_from_now_on_misses_nothing_though_it_has_received_nothing(
    client: Client, run: Run, nats_server: NatsServer
) -> None:
    """ "Now" is when it began, not when its consumer had to be made again."""
    await run.nodes(3)
    async with client.events() as events:
        await nats_server.kill()
        await nats_server.restart()
        await run.nodes(2)

        assert await seqs(events, 2) == [4, 5]


async def test_a_message_lost_on_its_way_is_read_again(
    client: Client, run: Run, link: NatsLink
) -> None:
    """A consumer without acks does not repeat; its numbering shows the hole."""
    await run.nodes(4)
    async with asyncio.timeout(LIMIT_S), client.events(since="all") as events:
        iterator = aiter(events)
        assert (await anext(iterator)).seq == 1
        consumer = events._consumer
        assert consumer is not None
        await until(lambda: _holds(consumer.queue, 3))
        lost = consumer.queue.get_nowait()
        assert lost is not None
        assert [(await anext(iterator)).seq for _ in range(3)] == [2, 3, 4]
        assert events.resumed == 1


async def _holds(queue: asyncio.Queue[Any], count: int) -> bool:
    await asyncio.sleep(0)
    return queue.qsize() >= count


async def test_a_stream_that_was_made_anew_is_read_from_its_beginning(
    client: Client, run: Run, link: NatsLink
) -> None:
    """After a power loss it may be gone; its numbers then begin again, below ours."""
    await run.nodes(5)
    async with client.events(since="all") as events:
        assert await seqs(events, 5) == [1, 2, 3, 4, 5]
        await link.js.delete_stream(EVENTS_STREAM)
        await ensure_streams(link, StreamsConfig())
        await run.nodes(2)
        events.resumed += 1  # as after the loss that the deletion is to an iteration under way
        assert await seqs(events, 2) == [6, 7]


async def test_a_reader_that_was_away_goes_on_after_its_bookmark(client: Client, run: Run) -> None:
    await run.nodes(5)
    async with client.events(since="all") as events:
        assert await seqs(events, 3) == [1, 2, 3]
        bookmark = events.stream_seq
        assert events.subject == "dbt.events.shop.prod.node.model.m3.success"

    assert bookmark == 3
    assert await seqs(client.events(after_seq=bookmark), 2) == [4, 5]


async def test_leaving_the_loop_and_coming_back_goes_on_where_it_was(
    client: Client, run: Run
) -> None:
    await run.nodes(4)
    events = client.events(since="all")
    assert await seqs(events, 2) == [1, 2]
    assert await seqs(events, 2) == [3, 4]


# -- which events ----------------------------------------------------------------------------


async def test_filters_are_words_sets_of_words_or_anything(client: Client, link: NatsLink) -> None:
    shop, crm = Run(link), Run(link, project="crm", target="dev")
    await shop.node("orders", NodeStatus.ERROR)
    await shop.node("customers", NodeStatus.SUCCESS)
    await crm.node("contacts", NodeStatus.FAIL)
    await crm.node("with.dots", NodeStatus.ERROR)
    await shop.finished()

    async def found(**filters: Any) -> list[str]:
        return await names(client.events(since="all", follow=False, **filters))

    assert await found(status={"error", "fail"}) == ["orders", "contacts", "with.dots"]
    assert await found(project="shop", status={"error", "fail"}) == ["orders"]
    assert await found(project=["crm", "shop"], name=("contacts", "customers")) == [
        "customers",
        "contacts",
    ]
    assert await found(name="with.dots") == ["with.dots"]
    assert await found(target="dev", kind="model", family="node") == ["contacts", "with.dots"]
    assert await found(family="run") == []
    assert await found(kind="test") == []


async def test_events_begin_at_a_time(client: Client, run: Run) -> None:
    await run.nodes(2)
    later = datetime.now(UTC) + timedelta(milliseconds=1)
    await until(lambda: _is_past(later))
    await run.nodes(2)

    assert await names(client.events(since=later, follow=False)) == ["m3", "m4"]
    everything = client.events(since=later - timedelta(hours=1), follow=False)
    assert await names(everything) == ["m1", "m2", "m3", "m4"]


async def _is_past(at: datetime) -> bool:
    await asyncio.sleep(0)
    return datetime.now(UTC) > at


async def test_what_is_stored_is_read_to_its_end_without_waiting_for_more(
    client: Client, run: Run
) -> None:
    assert await names(client.events(since="all", follow=False)) == []
    await run.nodes(600)
    stream = client.events(since="all", follow=False, prefetch=100)
    assert len(await names(stream)) == 600


async def test_the_events_of_a_run_are_its_own_and_end_with_it(
    client: Client, link: NatsLink
) -> None:
    """Also when a filter leaves out the end itself."""
    first, second = Run(link), Run(link)
    for one in (first, second):
        await one.queued()
        await one.node("orders")
        await one.node("broken", NodeStatus.ERROR)
    await second.finished()
    await first.finished()

    async with asyncio.timeout(LIMIT_S):
        whole = [event async for event in client.events(run_id=second.run_id)]
        errors = [e async for e in client.events(run_id=second.run_id, status="error")]

    assert [event.seq for event in whole] == [1, 2, 3, 4]
    assert {event.run_id for event in whole} == {second.run_id}
    # The end ends the iteration and is given too: it is how a reader knows.
    assert [event.seq for event in errors] == [3, 4]


async def test_msgpack_events_are_typed_like_json_ones(client: Client, run: Run) -> None:
    await run.node("a", content_type=MSGPACK)
    await run.node("b", content_type=JSON)

    assert await names(client.events(since="all", follow=False)) == ["a", "b"]


async def test_events_of_a_newer_server_are_skipped_and_counted(
    client: Client, run: Run, link: NatsLink
) -> None:
    await run.node("a")
    subject = "dbt.events.shop.prod.node.model.a.dreamt"
    for payload in (b'{"type":"node.dreamt"}', b"", b"\xff\xfe", b"[]"):
        await link.publish(subject, payload)
    await run.node("b")

    events = client.events(since="all", follow=False)
    assert await names(events) == ["a", "b"]
    assert events.skipped == 4


# -- what it leaves behind -------------------------------------------------------------------


async def test_a_slow_reader_holds_no_more_than_it_asked_for(
    client: Client, run: Run, link: NatsLink
) -> None:
    await run.nodes(60)
    async with client.events(since="all", prefetch=10) as events:
        assert await seqs(events, 1) == [1]
        iterator = aiter(events)
        assert (await anext(iterator)).seq == 2
        assert events._consumer is not None
        info = await link.js.consumer_info(EVENTS_STREAM, events._consumer.name)
        assert info.delivered is not None
        assert info.delivered.consumer_seq <= 10
        assert [(await anext(iterator)).seq for _ in range(58)] == list(range(3, 61))


@pytest.mark.parametrize("how", ["break", "cancel", "close", "error"])
async def test_no_consumer_is_left_behind(
    client: Client, run: Run, link: NatsLink, how: str
) -> None:
    await run.nodes(2)
    events = client.events(since="all")

    async def read() -> None:
        async for event in events:
            if event.seq == 2 and how == "break":
                return
            if event.seq == 2 and how == "error":
                raise RuntimeError("the reader's own")

    reading = asyncio.create_task(read())
    await attached(link)
    if how == "cancel":
        reading.cancel()
    if how == "close":
        await events.aclose()
        await events.aclose()
    with contextlib.suppress(asyncio.CancelledError, RuntimeError):
        await asyncio.wait_for(reading, LIMIT_S)

    async def none_left() -> bool:
        return not await consumers(link)

    await until(none_left)


async def test_reading_events_needs_a_stream_and_says_how_to_get_it(
    nats_config: NatsConfig,
) -> None:
    async with Client.connect(config=nats_config) as client:
        with pytest.raises(NatsRefused, match=r"DBT_EVENTS.*dbtstream setup"):
            await seqs(client.events(), 1)


VIEWER_OF_SHOP = """
accounts { A { jetstream: enabled, users: [
    { user: root, password: x },
    { user: viewer, password: x, permissions: {
        publish: [
            "$JS.API.CONSUMER.CREATE.DBT_EVENTS.*.dbt.events.shop.>",
            "$JS.API.CONSUMER.MSG.NEXT.DBT_EVENTS.*",
            "$JS.API.CONSUMER.DELETE.DBT_EVENTS.*",
        ], subscribe: ["_INBOX.>"] } }
] } }
no_auth_user: root
"""


async def test_a_user_who_may_read_one_project_reads_it_and_no_other(tmp_path: Path) -> None:
    """The filter is in the subject of the API request, where permissions see it."""
    async with NatsServer.start(tmp_path / "nats", config_extra=VIEWER_OF_SHOP) as server:
        async with NatsLink(NatsConfig(servers=(server.url,)), name="root") as root:
            await root.wait_connected(LIMIT_S)
            await ensure_streams(root, StreamsConfig())
            await Run(root).nodes(2)
        async with Client.connect(server.url.replace("//", "//viewer:x@")) as viewer:
            assert await seqs(viewer.events(project="shop", since="all"), 2) == [1, 2]
            with pytest.raises(NatsRefused, match=r"(?i)permissions violation"):
                await seqs(viewer.events(project="crm", since="all"), 1)


# -- asking ----------------------------------------------------------------------------------


class Answers:
    """Stands where a daemon's control service would; keeps what it was asked."""

    def __init__(self, link: NatsLink) -> None:
        self.link = link
        self.asked: list[Msg] = []

    async def give(self, verb: str, *replies: Reply) -> None:
        """These replies in turn, the last one for ever."""
        left = list(replies)

        async def answer(message: Msg) -> None:
            self.asked.append(message)
            await message.respond(messages.encode(left.pop(0) if len(left) > 1 else left[0]))

        await self.link.client.subscribe(f"{CONTROL}.{verb}", cb=answer)
        await self.link.js.account_info()  # a round trip behind the SUB; flush() may overtake it


@pytest.fixture
def answers(link: NatsLink) -> Answers:
    return Answers(link)


ACCEPTED = RunAccepted(run_id="x", project="shop", target="prod", position=1)


def view_of(run: Run, status: RunStatus) -> RunView:
    return RunView(run_id=run.run_id, project="shop", target="prod", status=status)


async def test_without_a_daemon_every_request_says_so_at_once(client: Client) -> None:
    match = r"no dbtstream daemon answers on NATS at nats://127.*start one with `dbtstream serve`"
    with pytest.raises(NoDaemon, match=match):
        await client.submit("shop", ["build"])
    with pytest.raises(NoDaemon, match=match):
        await client.list()


async def test_a_submission_carries_everything_and_the_trace_it_belongs_to(
    client: Client, answers: Answers
) -> None:
    await answers.give("submit", ACCEPTED)
    context = trace.SpanContext(
        trace_id=0xABC, span_id=0xDEF, is_remote=False, trace_flags=trace.TraceFlags(1)
    )
    with trace.use_span(trace.NonRecordingSpan(context)):
        accepted = await client.submit(
            "shop",
            ["build", "--select", "orders+"],
            target="prod",
            vars={"day": "2026-03-01"},
            labels={"team": "finance"},
            request_id="r1",
            reason="late data",
        )

    assert accepted == ACCEPTED
    [asked] = answers.asked
    assert asked.headers is not None
    assert asked.headers["traceparent"] == f"00-{0xABC:032x}-{0xDEF:016x}-01"
    sent = messages.decode_submit(asked.data)
    assert (sent.project, sent.target) == ("shop", "prod")
    assert sent.request.args == ["build", "--select", "orders+"]
    assert sent.request.vars == {"day": "2026-03-01"}
    assert sent.request.request_id == "r1"


async def test_a_submission_that_is_asked_again_is_the_same_request(
    client: Client, answers: Answers
) -> None:
    """The first answer may be lost; a second run must not come of it."""
    busy = ControlError(code="unavailable", message="no answer from JetStream")
    await answers.give("submit", busy, ACCEPTED)

    assert await client.submit("shop", ["build"]) == ACCEPTED

    sent = [msgspec.json.decode(asked.data, type=SubmitRequest) for asked in answers.asked]
    assert len(sent) == 2
    assert sent[0] == sent[1]
    assert sent[0].request.request_id


@pytest.mark.parametrize(
    ("request_", "code", "field"),
    [
        ({"vars": {"x": "y" * 65 * 1024}}, RejectCode.TOO_LARGE, "vars"),
        ({"args": ["build", "x" * 300 * 1024]}, RejectCode.TOO_LARGE, None),
        ({"args": []}, RejectCode.BAD_MESSAGE, "args"),
        ({"labels": {"k": "v" * 200}}, RejectCode.TOO_LARGE, "labels.k"),
    ],
)
async def test_a_request_over_its_limits_is_not_even_sent(
    client: Client, request_: dict[str, Any], code: str, field: str | None
) -> None:
    """No daemon is there: had it been sent, NoDaemon would be raised."""
    args = request_.pop("args", ["build"])
    with pytest.raises(RequestRejected) as rejected:
        await client.submit("shop", args, **request_)
    assert (rejected.value.code, rejected.value.field) == (code, field)


async def test_replies_become_results_or_errors_of_ours(client: Client, answers: Answers) -> None:
    view = RunView(run_id="x", project="shop", target="prod", status=RunStatus.RUNNING)
    await answers.give("list", RunList(runs=[view], waiting={"shop.prod": 1}))
    await answers.give("cancel", CancelAccepted(run_id="x", status=RunStatus.RUNNING))
    await answers.give(
        "submit",
        messages.RunRejected(code="unknown_project", message="no project crm", field="project"),
        ControlError(code="bad_message", message="odd"),
        view,
    )
    await answers.give("get", view, ControlError(code="not_found", message=""))

    assert (await client.list(active=True)).runs == [view]
    assert (await client.cancel("x", reason="why")).status is RunStatus.RUNNING
    assert await client.get("x") == view
    with pytest.raises(RunNotFound):
        await client.get("x")
    with pytest.raises(RequestRejected, match="no project crm"):
        await client.submit("crm", ["build"])
    with pytest.raises(NatsRefused, match="odd"):
        await client.submit("crm", ["build"])
    with pytest.raises(NatsRefused, match="RunView"):
        await client.submit("crm", ["build"])


async def test_a_server_that_is_not_there_is_an_error_within_the_time_given() -> None:
    with pytest.raises(NatsUnavailable, match=r"nats://127\.0\.0\.1:1\b"):
        async with Client.connect("nats://127.0.0.1:1", timeout_s=0.3):
            pass


# -- waiting ---------------------------------------------------------------------------------


async def test_wait_gives_the_verdict_of_a_run_that_ended_long_ago(
    client: Client, run: Run, answers: Answers
) -> None:
    await run.queued()
    await run.node("orders")
    await run.finished(RunStatus.FAILURE)
    await answers.give("get", view_of(run, RunStatus.FAILURE))

    assert (await client.wait(run.run_id, timeout_s=LIMIT_S)).status is RunStatus.FAILURE


async def test_wait_gives_the_verdict_when_it_comes_and_not_that_of_another_run(
    client: Client, run: Run, link: NatsLink, answers: Answers
) -> None:
    await answers.give("get", view_of(run, RunStatus.RUNNING))
    await run.queued()
    waiting = asyncio.create_task(client.wait(run.run_id, timeout_s=LIMIT_S))
    await attached(link)
    await Run(link).finished(RunStatus.ERROR)
    await run.finished(RunStatus.SUCCESS)

    assert (await waiting).run_id == run.run_id


async def test_wait_needs_no_daemon_where_the_events_are(client: Client, run: Run) -> None:
    await run.finished()
    assert (await client.wait(run.run_id, timeout_s=LIMIT_S)).status is RunStatus.SUCCESS


async def test_wait_raises_what_became_of_a_run_that_has_no_verdict(
    client: Client, run: Run, link: NatsLink, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dbtstream.client.LAST_EVENT_S", 0.3)
    await run.rejected()
    gone, going = Run(link), Run(link)
    await answers.give(
        "get",
        view_of(run, RunStatus.ERROR),
        view_of(gone, RunStatus.SUCCESS),
        view_of(going, RunStatus.RUNNING),
        ControlError(code="not_found", message=""),
    )

    with pytest.raises(RequestRejected, match="too late"):
        await client.wait(run.run_id)
    with pytest.raises(EventsGone, match="ended with success"):
        await client.wait(gone.run_id)
    with pytest.raises(NatsUnavailable, match=r"did not end within 0\.1 s"):
        await client.wait(going.run_id, timeout_s=0.1)
    with pytest.raises(RunNotFound):
        await client.wait(new_run_id(datetime.now(UTC)))
