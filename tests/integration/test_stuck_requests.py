"""Requests that the server has given up handing out, on a real nats-server."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from nats.js.api import RawStreamMsg

from dbtstream.artifact_store import ArtifactStore
from dbtstream.config import Config, NatsConfig, StreamsConfig
from dbtstream.consumer import RequestConsumer, durable_name
from dbtstream.events import RunRejected, decode_event
from dbtstream.execution import Services
from dbtstream.lineage_store import LineageStore
from dbtstream.messages import RunView
from dbtstream.nats_link import NatsLink
from dbtstream.runs import advance
from dbtstream.sql_process import SqlReader
from dbtstream.statuses import RunStatus
from dbtstream.store import NodeStates, Store
from dbtstream.stored_message import stored_message
from dbtstream.streams import ADVISORIES_STREAM, ensure_streams
from dbtstream.stuck_requests import StuckRequests
from dbtstream.subjects import (
    DEAD_STREAM,
    EVENTS_STREAM,
    H_RUN_ID,
    RUNS_STREAM,
    new_run_id,
    run_id_of_request,
)
from tests.daemons import daemon_config
from tests.scripted_child import GOOD_RUN

SUBJECT = "dbt.runs.shop.dev"
PAYLOAD = b'{"args":["build"]}'

Stored = Callable[[NatsLink, str], Awaitable[list[RawStreamMsg]]]


class Queue:
    """The queue of one target, the services of a worker, and what was asked of it."""

    def __init__(self, link: NatsLink, config: Config) -> None:
        self.link, self.config = link, config
        self.store = Store(link)
        self.services = Services(
            config,
            link,
            self.store,
            NodeStates(self.store),
            ArtifactStore(link),
            LineageStore(link),
            SqlReader(),
        )
        self.consumer = RequestConsumer(link, config, SUBJECT)
        self.asked_to_end: list[str] = []
        self.still_runs = False

    def stuck(self) -> StuckRequests:
        """One worker's."""
        return StuckRequests(self.link, self.services, self.end_lost)

    async def end_lost(self, view: RunView, revision: int) -> bool:
        """As a worker does it, without the events."""
        self.asked_to_end.append(view.run_id)
        if self.still_runs:
            return False
        lost = advance(view, RunStatus.LOST, at=datetime.now(UTC))
        await self.store.update_run(lost, revision)
        return True

    async def publish(self, **headers: str) -> int:
        return (await self.link.publish(SUBJECT, PAYLOAD, headers or None)).seq

    async def exhaust(self) -> None:
        """Take the oldest request and give it back, until the server says that it was enough."""
        before = await self.count(ADVISORIES_STREAM)
        deliveries = 0
        while deliveries < self.config.worker.max_deliveries:
            lease = await self.consumer.next()
            assert lease is not None
            deliveries = lease.deliveries
            await lease.give_back()
        # The server finds out when somebody asks for more.
        asking = asyncio.create_task(self.consumer.next())
        async with asyncio.timeout(30):
            while await self.count(ADVISORIES_STREAM) == before:
                pass
            if await self.count(RUNS_STREAM) > 1:
                await asking  # it is handed the next one, which a cancelled pull would swallow
        asking.cancel()
        await asyncio.wait({asking})
        if not asking.cancelled() and (lease := asking.result()) is not None:
            await lease.give_back()  # the next one
        await self.consumer.close()

    async def begun(self, seq: int, status: RunStatus = RunStatus.RUNNING) -> str:
        """A worker had been handed this request and has begun its run."""
        lease = await self.consumer.next()
        assert lease is not None
        assert lease.stream_seq == seq
        await lease.give_back()
        view = RunView(
            run_id=run_id_of_request(seq, lease.stored_at),
            project="shop",
            target="dev",
            status=status,
            attempt=1,
            worker="vanished",
            request_seq=seq,
            queued_at=lease.stored_at,
        )
        await self.store.create_run(view)
        return view.run_id

    async def count(self, stream: str) -> int:
        return (await self.link.js.stream_info(stream)).state.messages

    async def waiting(self) -> int:
        """Advisories that nobody has settled."""
        info = await self.link.js.consumer_info(ADVISORIES_STREAM, "stuck_requests")
        return (info.num_pending or 0) + (info.num_ack_pending or 0)


@pytest.fixture
async def queue(link: NatsLink, nats_config: NatsConfig, tmp_path: Path) -> Queue:
    await ensure_streams(link, StreamsConfig())
    return Queue(link, daemon_config(tmp_path, nats_config, GOOD_RUN, max_deliveries=2))


async def test_a_request_that_nobody_settled_is_rejected_and_kept_with_its_bytes(
    queue: Queue, stored: Stored
) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await queue.publish(traceparent=trace)
    stuck = queue.stuck()
    assert await stuck.sweep() == []
    await queue.exhaust()
    assert await queue.count(RUNS_STREAM) == 1  # and invisible: nobody would ever see it

    assert await stuck.sweep() == ["deliveries_exhausted"]

    assert await queue.count(RUNS_STREAM) == 0
    (letter,) = await stored(queue.link, DEAD_STREAM)
    headers = letter.headers or {}
    assert (letter.subject, letter.data) == ("dbt.dead.shop.dev", PAYLOAD)
    assert headers["dbtstream-code"] == "deliveries_exhausted"
    assert headers["traceparent"] == trace
    (event,) = await stored(queue.link, EVENTS_STREAM)
    rejected = decode_event(event.data or b"")
    assert isinstance(rejected, RunRejected)
    assert rejected.code == "deliveries_exhausted"
    assert "handed out 2 times" in rejected.message
    assert rejected.run_id == headers["dbtstream-run-id"]
    assert await stuck.sweep() == []
    assert await queue.waiting() == 0


async def test_the_next_request_of_the_target_is_not_held_up(queue: Queue) -> None:
    await queue.publish()
    second = await queue.publish()
    await queue.exhaust()
    lease = await queue.consumer.next()
    assert lease is not None
    assert lease.stream_seq == second
    assert await queue.stuck().sweep() == ["deliveries_exhausted"]
    assert await queue.count(RUNS_STREAM) == 1
    await queue.consumer.close()


async def test_a_run_that_control_had_accepted_does_not_stay_queued(queue: Queue) -> None:
    run_id = new_run_id(datetime.now(UTC))
    seq = await queue.publish(**{H_RUN_ID: run_id})
    view = RunView(
        run_id=run_id, project="shop", target="dev", status=RunStatus.QUEUED, request_seq=seq
    )
    await queue.store.create_run(view)
    await queue.exhaust()

    assert await queue.stuck().sweep() == ["deliveries_exhausted"]

    known = await queue.store.get_run(run_id)
    assert known is not None
    assert (known[0].status, known[0].exit_code) == (RunStatus.ERROR, 2)
    assert "deliveries_exhausted" in (known[0].error or "")


async def test_a_run_that_had_begun_is_ended_and_its_request_kept(
    queue: Queue, stored: Stored
) -> None:
    """It has its run.finished, so there is no run.rejected."""
    run_id = await queue.begun(await queue.publish())
    await queue.exhaust()

    assert await queue.stuck().sweep() == []

    assert queue.asked_to_end == [run_id]
    assert await queue.count(RUNS_STREAM) == 0
    assert await queue.count(EVENTS_STREAM) == 0
    (letter,) = await stored(queue.link, DEAD_STREAM)
    assert (letter.headers or {})["dbtstream-run-id"] == run_id
    assert letter.data == PAYLOAD


async def test_a_run_that_still_runs_is_left_alone_until_it_has_ended(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dbtstream.stuck_requests.AGAIN_S", 0.2)
    run_id = await queue.begun(await queue.publish())
    await queue.exhaust()
    queue.still_runs = True
    stuck = queue.stuck()
    async with asyncio.timeout(30):
        while len(queue.asked_to_end) < 2:  # the advisory comes again
            assert await stuck.sweep() == []
    assert (await queue.count(RUNS_STREAM), await queue.count(DEAD_STREAM)) == (1, 0)

    known = await queue.store.get_run(run_id)
    assert known is not None
    await queue.store.update_run(
        advance(known[0], RunStatus.SUCCESS, at=datetime.now(UTC)), known[1]
    )
    async with asyncio.timeout(30):
        while await queue.count(RUNS_STREAM):
            await stuck.sweep()
    assert await queue.count(DEAD_STREAM) == 0  # it ran: nothing is wrong with the request


async def test_workers_that_sweep_at_once_and_again_after_a_crash_leave_one_letter(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dbtstream.stuck_requests.AGAIN_S", 0.2)
    for _ in range(3):
        await queue.publish()
        await queue.exhaust()

    async def crash(*_: Any) -> bool:
        raise ConnectionResetError

    with monkeypatch.context() as crashing:
        crashing.setattr("dbtstream.stuck_requests.delete_stored", crash)
        with pytest.raises(ConnectionResetError):
            await queue.stuck().sweep()
    assert (await queue.count(RUNS_STREAM), await queue.count(DEAD_STREAM)) == (3, 1)

    workers = [queue.stuck() for _ in range(3)]
    async with asyncio.timeout(30):
        while await queue.count(RUNS_STREAM) or await queue.waiting():
            await asyncio.gather(*(worker.sweep() for worker in workers))
    assert await queue.count(DEAD_STREAM) == await queue.count(EVENTS_STREAM) == 3


@pytest.mark.parametrize("made_anew", [True, False])
async def test_an_advisory_of_an_earlier_consumer_touches_nothing(
    queue: Queue, made_anew: bool
) -> None:
    """A consumer that is made anew, now or later, hands the request out again."""
    await queue.publish()
    await queue.exhaust()
    await queue.link.js.delete_consumer(RUNS_STREAM, durable_name(SUBJECT))
    if made_anew:
        await queue.consumer.ensure()
    assert await queue.stuck().sweep() == []
    assert (await queue.count(RUNS_STREAM), await queue.waiting()) == (1, 0)
    assert await queue.consumer.next() is not None
    await queue.consumer.close()


async def test_an_advisory_about_an_earlier_stream_touches_nothing(queue: Queue) -> None:
    """The sequence is another request's, when the stream was made anew."""
    await queue.publish()
    await queue.exhaust()
    await queue.link.js.delete_stream(RUNS_STREAM)
    await ensure_streams(queue.link, StreamsConfig())
    await queue.consumer.ensure()
    await queue.publish()
    assert await queue.stuck().sweep() == []
    assert (await queue.count(RUNS_STREAM), await queue.waiting()) == (1, 0)


async def test_a_sweeper_whose_stream_was_made_anew_goes_on(queue: Queue) -> None:
    stuck = queue.stuck()
    assert await stuck.sweep() == []
    await queue.link.js.delete_stream(ADVISORIES_STREAM)
    await ensure_streams(queue.link, StreamsConfig())
    await queue.publish()
    await queue.exhaust()
    async with asyncio.timeout(30):
        while await queue.count(RUNS_STREAM):
            await stuck.sweep()
    assert await queue.count(DEAD_STREAM) == 1


async def test_the_consumer_is_asked_for_over_the_subject_that_has_its_filter(
    queue: Queue,
) -> None:
    """Permissions see that subject; the older one, without the filter, need not be allowed."""
    asked: list[str] = []
    heard = asyncio.Event()

    async def hear(message: Any) -> None:
        asked.append(message.subject)
        heard.set()

    await queue.link.client.subscribe("$JS.API.CONSUMER.>", cb=hear)
    await queue.link.client.flush()
    name = await queue.consumer.ensure()
    async with asyncio.timeout(30):
        await heard.wait()
    assert asked == [f"$JS.API.CONSUMER.CREATE.DBT_RUNS.{name}.{SUBJECT}"]
    config = (await queue.link.js.consumer_info(RUNS_STREAM, name)).config
    assert (config.durable_name, config.max_deliver) == (name, 2)
    assert config.filter_subject == SUBJECT


async def test_a_request_that_is_read_has_the_time_of_one_that_is_delivered(
    link: NatsLink,
) -> None:
    """To the microsecond: its run id is derived from it."""
    await ensure_streams(link, StreamsConfig())
    for _ in range(30):
        await link.publish("dbt.dead.shop.dev", b"x")
    pulls = await link.js.pull_subscribe("dbt.dead.>", stream=DEAD_STREAM)
    delivered = {m.metadata.sequence.stream: m.metadata for m in await pulls.fetch(30)}
    assert len(delivered) == 30
    for seq, metadata in delivered.items():
        read = await stored_message(link, DEAD_STREAM, seq)
        assert read is not None
        assert read.stored_at == metadata.timestamp
