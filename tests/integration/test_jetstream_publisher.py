"""From an outbox to the stream: in order, once, whatever happens to either side."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from nats.js.api import PubAck, RawStreamMsg

from dbtstream.config import NatsConfig, StreamsConfig
from dbtstream.embedded import NatsServer
from dbtstream.nats_link import NatsLink
from dbtstream.outbox import Outbox, Record
from dbtstream.outbox_file import OutboxFile, frame
from dbtstream.publishers import jetstream as module
from dbtstream.publishers.jetstream import JetStreamPublisher
from dbtstream.streams import ensure_streams
from dbtstream.subjects import EVENTS_STREAM

RUN = "0190b1a2-0000-7000-8000-000000000000"
MB = 1024 * 1024

Until = Callable[[Callable[[], object]], Awaitable[None]]
Stored = Callable[[NatsLink, str], Awaitable[list[RawStreamMsg]]]


def record(seq: int, family: str = "node", size: int = 10) -> Record:
    headers = {"Nats-Msg-Id": f"{RUN}.1.{seq}", "dbtstream-run-id": RUN, "dbtstream-seq": str(seq)}
    subject = f"dbt.events.shop.prod.{family}.model.m{seq % 7}.success"
    return Record(seq, family, subject, headers, str(seq).encode().ljust(size, b" "))


def leave_outbox(directory: Path, at: float) -> None:
    """As a daemon would that died with 100 undelivered events."""
    file = OutboxFile(directory / f"{RUN}.1.outbox")
    file.append(file.open().end, [frame(record(seq), at) for seq in range(1, 101)])
    file.close()


@pytest.fixture
async def events(link: NatsLink) -> NatsLink:
    """The link, with the streams set up."""
    await ensure_streams(link, StreamsConfig())
    return link


@asynccontextmanager
async def outbox(directory: Path) -> AsyncIterator[Outbox]:
    box = await Outbox.open(directory, RUN, 1, max_bytes=1024 * MB)
    try:
        yield box
    finally:
        await box.close()


async def publish_all(publisher: JetStreamPublisher) -> None:
    async with asyncio.timeout(100):
        await publisher.run()


async def seqs_in_stream(link: NatsLink, stored: Stored) -> list[int]:
    return [int(message.data or b"") for message in await stored(link, EVENTS_STREAM)]


async def test_few_events_go_one_by_one_and_each_is_told_with_its_answer(
    events: NatsLink, tmp_path: Path, stored: Stored
) -> None:
    told: list[tuple[Record, PubAck | None]] = []
    async with outbox(tmp_path / "out") as box:
        publisher = JetStreamPublisher(events, box, on_stored=lambda *each: told.append(each))
        task = asyncio.create_task(publish_all(publisher))
        for seq in range(1, 11):
            box.put(record(seq))
        box.close_input()
        await task
        await box.drained()
    assert [each.seq for each, _ in told] == list(range(1, 11))
    assert [ack.seq for _, ack in told if ack] == list(range(1, 11))
    assert await seqs_in_stream(events, stored) == list(range(1, 11))
    assert (publisher.stats.received, publisher.stats.sent, publisher.stats.failed) == (10, 10, 0)


async def test_many_events_go_in_batches(events: NatsLink, tmp_path: Path, stored: Stored) -> None:
    told: list[tuple[Record, PubAck | None]] = []
    async with outbox(tmp_path / "out") as box:
        for seq in range(1, 1201):
            box.put(record(seq))
        box.close_input()
        await publish_all(
            JetStreamPublisher(events, box, on_stored=lambda *each: told.append(each))
        )
    assert await seqs_in_stream(events, stored) == list(range(1, 1201))
    assert [each.seq for each, ack in told if ack is None][:500] == list(range(1, 501))


async def test_nothing_is_lost_doubled_or_reordered_while_the_server_crashes(
    nats_server: NatsServer, events: NatsLink, tmp_path: Path, stored: Stored
) -> None:
    """Both ways of sending are hit: the puts come in bursts."""
    progress = {seq: asyncio.Event() for seq in (100, 900, 1800)}

    def on_stored(record: Record, ack: PubAck | None) -> None:
        if record.seq in progress:
            progress[record.seq].set()

    async with outbox(tmp_path / "out") as box:
        publisher = JetStreamPublisher(events, box, on_stored=on_stored)

        async def produce() -> None:
            for seq in range(1, 2501):
                box.put(record(seq))
                if seq % 300 == 0 or seq < 120:
                    await box.next(1, 1)  # lets the publisher and the writer run
                    await asyncio.sleep(0)
            box.close_input()

        async with asyncio.timeout(110), asyncio.TaskGroup() as group:
            group.create_task(publisher.run())
            group.create_task(produce())
            for event in progress.values():
                await event.wait()
                await nats_server.kill()
                await nats_server.restart()
    assert await seqs_in_stream(events, stored) == list(range(1, 2501))
    assert publisher.stats.sent == 2500
    assert publisher.stats.retried > 0


async def test_events_wait_on_disk_for_a_server_that_is_away(
    nats_server: NatsServer, events: NatsLink, tmp_path: Path, stored: Stored, until: Until
) -> None:
    await nats_server.stop()
    async with outbox(tmp_path / "out") as box:
        publisher = JetStreamPublisher(events, box)
        task = asyncio.create_task(publish_all(publisher))
        for seq in range(1, 6):
            box.put(record(seq))
        box.close_input()
        await until(lambda: publisher.stats.retried)
        await nats_server.restart()
        await task
    assert await seqs_in_stream(events, stored) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("count", [10, 200])
async def test_a_successor_delivers_what_is_left_and_what_was_stored_unseen_is_not_doubled(
    events: NatsLink, tmp_path: Path, stored: Stored, count: int
) -> None:
    """The predecessor died after its last events were stored and before it noted that."""
    async with outbox(tmp_path / "out") as box:
        for seq in range(1, count + 1):
            box.put(record(seq))
    for seq in range(1, count // 2):
        each = record(seq)
        await events.publish(each.subject, each.payload, each.headers)
    (box,) = await Outbox.recover(tmp_path / "out")
    publisher = JetStreamPublisher(events, box)
    await publish_all(publisher)
    assert await seqs_in_stream(events, stored) == list(range(1, count + 1))
    assert publisher.stats.duplicates == count // 2 - 1
    await box.remove()


async def test_beyond_the_duplicate_window_the_stream_is_asked_what_it_has(
    events: NatsLink, tmp_path: Path, stored: Stored
) -> None:
    """The window is made so short that the server no longer knows the ids."""
    info = await events.js.stream_info(EVENTS_STREAM)
    await events.js.update_stream(info.config.evolve(duplicate_window=0.1))
    await asyncio.to_thread(leave_outbox, tmp_path, time.time() - 3600)
    other = Record(1, "node", record(1).subject, {"dbtstream-run-id": "other"}, b"0")
    await events.publish(other.subject, other.payload, other.headers)
    for seq in range(1, 41):
        each = record(seq)
        await events.publish(each.subject, each.payload, each.headers)
    probe = {"Nats-Msg-Id": "probe"}
    await events.publish(other.subject, b"0", probe)
    async with asyncio.timeout(30):  # the server forgets ids in its own time
        while (await events.publish(other.subject, b"0", probe)).duplicate:
            pass
    (box,) = await Outbox.recover(tmp_path)
    publisher = JetStreamPublisher(events, box)
    await publish_all(publisher)
    await box.remove()
    seqs = [seq for seq in await seqs_in_stream(events, stored) if seq]
    assert seqs == list(range(1, 101))
    assert publisher.stats.duplicates == 40


async def test_an_event_that_no_server_takes_is_told_and_does_not_stop_the_others(
    events: NatsLink, tmp_path: Path, stored: Stored, caplog: pytest.LogCaptureFixture
) -> None:
    failed: list[tuple[int, str]] = []
    async with outbox(tmp_path / "out") as box:
        publisher = JetStreamPublisher(
            events, box, on_failed=lambda each, why: failed.append((each.seq, why))
        )
        for seq in range(1, 101):
            box.put(record(seq, size=2 * MB if seq == 60 else 10))
        box.close_input()
        await publish_all(publisher)
    assert await seqs_in_stream(events, stored) == [n for n in range(1, 101) if n != 60]
    assert [seq for seq, _ in failed] == [60]
    assert "the server takes" in failed[0][1]
    assert (publisher.stats.sent, publisher.stats.failed) == (99, 1)
    assert "an event can never be stored" in caplog.text


async def test_a_refusal_that_can_be_mended_is_waited_out(
    link: NatsLink,
    tmp_path: Path,
    stored: Stored,
    until: Until,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stream that is full and discards new messages, until an operator widens it."""
    monkeypatch.setattr(module, "REFUSED_WAIT_S", 0.05)
    await ensure_streams(link, StreamsConfig())
    config = (await link.js.stream_info(EVENTS_STREAM)).config
    await link.js.update_stream(config.evolve(max_msgs=1, discard="new"))
    async with outbox(tmp_path / "out") as box:
        publisher = JetStreamPublisher(link, box)
        task = asyncio.create_task(publish_all(publisher))
        for seq in (1, 2, 3):
            box.put(record(seq))
        box.close_input()
        await until(lambda: publisher.stats.retried >= 2)
        assert box.stats.waiting == 2
        await link.js.update_stream(config)
        await task
    assert await seqs_in_stream(link, stored) == [1, 2, 3]


async def test_without_batches_on_the_stream_events_go_one_by_one(
    events: NatsLink, tmp_path: Path, stored: Stored
) -> None:
    config = (await events.js.stream_info(EVENTS_STREAM)).config
    await events.js.update_stream(config.evolve(allow_atomic=False))
    async with outbox(tmp_path / "out") as box:
        for seq in range(1, 101):
            box.put(record(seq))
        box.close_input()
        await publish_all(JetStreamPublisher(events, box))
    assert await seqs_in_stream(events, stored) == list(range(1, 101))


async def test_a_cancelled_publisher_can_be_followed_by_another_on_the_same_outbox(
    nats_server: NatsServer, events: NatsLink, tmp_path: Path, stored: Stored
) -> None:
    async with outbox(tmp_path / "out") as box:
        for seq in range(1, 201):
            box.put(record(seq))
        first = asyncio.create_task(JetStreamPublisher(events, box).run())
        await box.next(1, 1)
        nats_server.pause()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        nats_server.resume()
        box.close_input()
        await publish_all(JetStreamPublisher(events, box))
    assert await seqs_in_stream(events, stored) == list(range(1, 201))


async def test_a_second_connection_sees_the_live_feed_without_duplicates(
    nats_server: NatsServer, nats_config: NatsConfig, events: NatsLink, tmp_path: Path
) -> None:
    seen: list[int] = []
    done = asyncio.Event()
    async with NatsLink(nats_config, name="viewer") as viewer:
        await viewer.wait_connected(10)

        async def on_message(message: object) -> None:
            seen.append(int(message.data))  # type: ignore[attr-defined]  # nats.aio.msg.Msg
            if seen[-1] == 300:
                done.set()

        await viewer.client.subscribe("dbt.live.>", cb=on_message)
        await viewer.client.flush()
        each = record(1)
        await events.publish(each.subject, each.payload, each.headers)
        async with outbox(tmp_path / "out") as box:
            for seq in range(1, 301):
                box.put(record(seq))
            box.close_input()
            await publish_all(JetStreamPublisher(events, box))
        async with asyncio.timeout(30):
            await done.wait()
    assert seen == list(range(1, 301))
