"""The stream takes events of the last lease only: `publishers.fence` on a real nats-server."""

import asyncio
from pathlib import Path

import pytest

from dbtstream.config import StreamsConfig
from dbtstream.envelope import RunContext
from dbtstream.errors import Superseded
from dbtstream.events import AnyEvent, encode_event
from dbtstream.nats_link import NatsLink
from dbtstream.normalizer import Normalizer
from dbtstream.outbox import Outbox, Record
from dbtstream.publishers.fence import EventFence, last_leased, last_of_target
from dbtstream.publishers.jetstream import JetStreamPublisher
from dbtstream.streams import ensure_streams
from dbtstream.subjects import EVENTS_STREAM, event_headers, event_subject
from tests.stories import RUN_ID, context

LINES = 60
"""More than the publisher sends one by one."""


@pytest.fixture
async def events(link: NatsLink) -> NatsLink:
    await ensure_streams(link, StreamsConfig())
    return link


def normalizer(fence: EventFence, **changes: object) -> Normalizer:
    made: RunContext = context(fence=fence.number, **changes)
    return Normalizer(made)


def record(event: AnyEvent) -> Record:
    return Record(
        event.seq, event.family, event_subject(event), event_headers(event), encode_event(event)
    )


def lease_begins(fence: EventFence) -> tuple[Normalizer, list[Record]]:
    story = normalizer(fence)
    at = story.context.queued_at
    return story, [record(e) for e in story.queued(at) + story.leased("first", at)]


def lines(story: Normalizer, count: int) -> list[Record]:
    at = story.context.queued_at
    return [record(e) for n in range(count) for e in story.gap("log", n + 1, "a test", at=at)]


async def publish(
    link: NatsLink, folder: Path, fence: EventFence, records: list[Record], attempt: int = 1
) -> None:
    box = await Outbox.open(folder, RUN_ID, attempt, max_bytes=1024**3)
    for each in records:
        box.put(each)
    box.close_input()
    try:
        async with asyncio.timeout(60):
            await JetStreamPublisher(link, box, fence=fence).run()
    finally:
        await box.remove()


@pytest.mark.parametrize("count", [1, LINES])
async def test_after_another_lease_nothing_of_the_older_one_is_stored(
    events: NatsLink, tmp_path: Path, count: int
) -> None:
    old = await EventFence.take(events, "shop", "prod", RUN_ID, 5)
    story, begin = lease_begins(old)
    await publish(events, tmp_path, old, [*begin, *lines(story, 1)])

    new = await EventFence.take(events, "shop", "prod", RUN_ID, 9)
    taken = normalizer(new, first_seq=100).leased("worker_lost", story.context.queued_at)[0]
    await events.publish(
        event_subject(taken), encode_event(taken), event_headers(taken) | new.headers()
    )
    before = await last_of_target(events, "shop", "prod")

    with pytest.raises(Superseded, match="fence 9 of the same run follows"):
        await publish(events, tmp_path, old, lines(story, count))
    assert await last_of_target(events, "shop", "prod") == before


async def test_a_worker_frozen_between_its_lease_and_its_first_event_does_not_get_in(
    events: NatsLink, tmp_path: Path
) -> None:
    """It had looked when there was nobody; since then another one has come."""
    frozen = await EventFence.take(events, "shop", "prod", RUN_ID, 5)
    other = await EventFence.take(events, "shop", "prod", RUN_ID, 9)
    await publish(events, tmp_path, other, lease_begins(other)[1])
    with pytest.raises(Superseded):
        await publish(events, tmp_path, frozen, lease_begins(frozen)[1])
    assert (await last_leased(events, "shop", "prod")).fence == 9


async def test_our_own_event_whose_answer_was_lost_is_no_other_lease(
    events: NatsLink, tmp_path: Path
) -> None:
    fence = await EventFence.take(events, "shop", "prod", RUN_ID, 5)
    story, begin = lease_begins(fence)
    for each in begin:  # stored, and the publisher knows nothing of it
        await events.publish(each.subject, each.payload, each.headers)
    await publish(events, tmp_path, fence, [*begin, *lines(story, 2 * LINES)])
    info = await events.js.stream_info(EVENTS_STREAM)
    assert info.state.messages == len(begin) + 2 * LINES


async def test_events_of_other_runs_on_the_target_do_not_matter(
    events: NatsLink, tmp_path: Path
) -> None:
    """A request is rejected while another one runs: nobody has a lease for that."""
    fence = await EventFence.take(events, "shop", "prod", RUN_ID, 5)
    story, begin = lease_begins(fence)
    await publish(events, tmp_path, fence, begin)
    rejected = Normalizer(context(run_id=RUN_ID[:-1] + "2", fence=0)).rejected(
        "busy", "no", at=story.context.queued_at
    )[0]
    await events.publish(event_subject(rejected), encode_event(rejected), event_headers(rejected))
    await publish(events, tmp_path, fence, lines(story, LINES))
    assert (await events.js.stream_info(EVENTS_STREAM)).state.messages == len(begin) + 1 + LINES


async def test_leases_that_have_aged_out_of_the_stream_stop_nobody(
    events: NatsLink, tmp_path: Path
) -> None:
    fence = await EventFence.take(events, "shop", "prod", RUN_ID, 5)
    story, begin = lease_begins(fence)
    await publish(events, tmp_path, fence, begin)
    await events.js.purge_stream(EVENTS_STREAM)
    await publish(events, tmp_path, fence, lines(story, 3))
    assert (await events.js.stream_info(EVENTS_STREAM)).state.messages == 3


@pytest.mark.parametrize("superseded", [False, True])
async def test_what_a_dead_process_left_is_stored_only_if_nobody_took_over(
    events: NatsLink, tmp_path: Path, superseded: bool
) -> None:
    fence = await EventFence.take(events, "shop", "prod", RUN_ID, 5)
    story, begin = lease_begins(fence)
    await publish(events, tmp_path, fence, begin)
    if superseded:
        other = await EventFence.take(events, "shop", "prod", RUN_ID, 9)
        taken = normalizer(other, first_seq=100).leased("worker_lost", story.context.queued_at)[0]
        await events.publish(event_subject(taken), encode_event(taken), event_headers(taken))
    before = (await events.js.stream_info(EVENTS_STREAM)).state.messages
    box = await Outbox.open(tmp_path, RUN_ID, 1, max_bytes=1024**3)
    for each in lines(story, LINES):
        box.put(each)
    await box.close()

    (left,) = await Outbox.recover(tmp_path)
    publisher = JetStreamPublisher(events, left)
    async with asyncio.timeout(60):
        if superseded:
            with pytest.raises(Superseded):
                await publisher.run()
        else:
            await publisher.run()
    await left.remove()
    after = (await events.js.stream_info(EVENTS_STREAM)).state.messages
    assert after - before == (0 if superseded else LINES)


async def test_the_fence_grows_although_the_leases_began_anew(
    events: NatsLink, tmp_path: Path
) -> None:
    """Somebody has deleted the bucket: its revisions begin at 1 again."""
    fence = await EventFence.take(events, "shop", "prod", RUN_ID, 500)
    await publish(events, tmp_path, fence, lease_begins(fence)[1])
    assert (await EventFence.take(events, "shop", "prod", RUN_ID, 1)).number == 501
