"""Setting up a real server, twice, over differences, and where it cannot be done."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from nats.js.api import RawStreamMsg

from dbtstream.config import NatsConfig, StreamsConfig
from dbtstream.embedded import NatsServer
from dbtstream.errors import NatsRefused
from dbtstream.nats_link import NatsLink
from dbtstream.streams import ARTIFACTS_BUCKET, LEASES_BUCKET, check_streams, ensure_streams
from dbtstream.subjects import H_MSG_ID, RUNS_STREAM, STATE_BUCKET

NAMES = [
    "stream DBT_RUNS",
    "stream DBT_EVENTS",
    "stream DBT_DEAD",
    "stream DBT_ADVISORIES",
    "KV bucket dbt_state",
    "KV bucket dbt_lineage",
    "KV bucket dbt_leases",
    "object store dbt_artifacts",
]


async def test_setup_creates_everything_and_the_second_time_finds_it(link: NatsLink) -> None:
    config = StreamsConfig()
    assert await ensure_streams(link, config) == [f"{name}: created" for name in NAMES]
    assert await ensure_streams(link, config) == [f"{name}: as it should be" for name in NAMES]
    assert await check_streams(link, config) == []


async def test_nats_pys_own_key_value_and_object_store_read_what_setup_made(
    link: NatsLink,
) -> None:
    await ensure_streams(link, StreamsConfig())
    for bucket in (STATE_BUCKET, LEASES_BUCKET):
        kv = await link.js.key_value(bucket)
        revision = await kv.create("a.b", b"1", msg_ttl=60)
        await kv.update("a.b", b"2", last=revision)
        assert (await kv.get("a.b")).value == b"2"
    objects = await link.js.object_store(ARTIFACTS_BUCKET)
    await objects.put("run/manifest.json", b"{}")
    assert (await objects.get("run/manifest.json")).data == b"{}"


async def test_a_changed_config_is_carried_over_and_what_we_do_not_know_stays(
    link: NatsLink,
) -> None:
    await ensure_streams(link, StreamsConfig())
    info = await link.js.stream_info(RUNS_STREAM)
    await link.js.update_stream(info.config.evolve(description="an operator's words"))
    lines = await ensure_streams(link, StreamsConfig(runs_max_msgs=7))
    assert lines[0] == "stream DBT_RUNS: updated (max_msgs is 10000, should be 7)"
    after = (await link.js.stream_info(RUNS_STREAM)).config
    assert (after.max_msgs, after.description) == (7, "an operator's words")


async def test_check_names_what_is_missing_and_what_does_not_do_and_changes_nothing(
    link: NatsLink,
) -> None:
    config = StreamsConfig()
    problems = await check_streams(link, config)
    assert len(problems) == len(NAMES)
    assert problems[0] == "stream DBT_RUNS is missing (`dbtstream setup` creates it)"
    assert await link.js.streams_info() == []

    await ensure_streams(link, StreamsConfig(events_max_bytes=1024**2))
    info = await link.js.stream_info("DBT_EVENTS")
    await link.js.update_stream(info.config.evolve(allow_atomic=False))
    assert await check_streams(link, config) == [
        "stream DBT_EVENTS differs: allow_atomic is null, should be true"
    ]


async def test_a_stream_that_cannot_be_changed_in_place_is_refused_with_what_to_do(
    link: NatsLink,
) -> None:
    await link.js.add_stream(name=RUNS_STREAM, subjects=["dbt.runs.>"])
    with pytest.raises(NatsRefused, match=r"retention is .limits.*nats stream rm DBT_RUNS"):
        await ensure_streams(link, StreamsConfig())


async def test_a_subject_that_another_stream_has_is_refused_with_the_servers_words(
    link: NatsLink,
) -> None:
    await link.js.add_stream(name="OTHER", subjects=["dbt.>"])
    with pytest.raises(NatsRefused, match="subjects overlap"):
        await ensure_streams(link, StreamsConfig())


async def test_an_account_without_jetstream_is_refused_with_what_to_do(tmp_path: Path) -> None:
    extra = "accounts { A { users: [{user: u, password: p}] } }"
    async with NatsServer.start(tmp_path, config_extra=extra) as server:
        config = NatsConfig(servers=(server.url.replace("//", "//u:p@"),))
        async with NatsLink(config, name="x") as link:
            await link.wait_connected(10)
            with pytest.raises(NatsRefused, match=r"(?i)jetstream"):
                await ensure_streams(link, StreamsConfig())


async def test_live_subscribers_see_a_stored_event_once_even_if_it_is_sent_twice(
    link: NatsLink,
    stored: Callable[[NatsLink, str], Awaitable[list[RawStreamMsg]]],
) -> None:
    await ensure_streams(link, StreamsConfig())
    seen: list[bytes] = []
    last = asyncio.Event()

    async def on_message(message: object) -> None:
        seen.append(message.data)  # type: ignore[attr-defined]  # nats.aio.msg.Msg
        if seen[-1] == b"last":
            last.set()

    await link.client.subscribe("dbt.live.>", cb=on_message)
    await link.client.flush()
    for payload, msg_id in ((b"one", "1"), (b"one", "1"), (b"last", "2")):
        await link.publish("dbt.events.shop.prod.run.build._.started", payload, {H_MSG_ID: msg_id})
    async with asyncio.timeout(30):
        await last.wait()
    assert seen == [b"one", b"last"]
    assert len(await stored(link, "DBT_EVENTS")) == 2
