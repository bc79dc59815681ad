"""What deploy/README.md says of backup and restore, on real nats-servers.

`nats stream backup` and `nats stream restore` are the API calls made here. The CLI itself is
in no package that the tests install.
"""

import asyncio
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dbtstream.config import Config, NatsConfig, StreamsConfig
from dbtstream.embedded import NatsServer
from dbtstream.events import NodeFinished, RunFinished
from dbtstream.nats_link import NatsLink
from dbtstream.statuses import RunStatus
from dbtstream.streams import (
    ARTIFACTS_BUCKET,
    LEASES_BUCKET,
    check_streams,
    ensure_streams,
    wanted_streams,
)
from dbtstream.subjects import RUNS_STREAM
from tests.daemons import Served, daemon_config, serving
from tests.guarantees import check_run
from tests.scripted_child import GOOD_RUN

CHUNK = 128 * 1024
LEASES = f"KV_{LEASES_BUCKET}"
STREAMS = [wanted.name for wanted in wanted_streams(StreamsConfig())]
ARTIFACT = "some-run/manifest.json"
ARTIFACT_BYTES = random.Random(1).randbytes(3 * CHUNK)  # the server compresses a backup

HALF = """
    start_line()
    hello()
    plan(model("orders"), model("customers", "orders"))
    started("orders")
    finished("orders")
    wait_for({gate!r})
    started("customers")
    finished("customers")
    result(0, [("orders", "success"), ("customers", "success")])
"""


@dataclass(frozen=True)
class Backup:
    """One stream: what `nats stream backup` writes to a folder."""

    answer: dict[str, Any]
    chunks: list[bytes]


async def take(link: NatsLink, stream: str) -> Backup:
    inbox = link.client.new_inbox()
    subscription = await link.client.subscribe(inbox)
    request = {"deliver_subject": inbox, "chunk_size": CHUNK}
    answer = await ask(link, f"STREAM.SNAPSHOT.{stream}", request)
    chunks = []
    while (message := await subscription.next_msg(10)).data:
        chunks.append(message.data)
        if message.reply:  # the server waits for it, so as not to run ahead
            await message.respond(b"")
    await subscription.unsubscribe()
    return Backup({key: answer[key] for key in ("config", "state")}, chunks)


async def restore(link: NatsLink, stream: str, backup: Backup) -> dict[str, Any]:
    """What the server says of it at the end."""
    answer = await ask(link, f"STREAM.RESTORE.{stream}", backup.answer)
    for chunk in [*backup.chunks, b""]:
        reply = await link.client.request(answer["deliver_subject"], chunk, timeout=10)
    done: dict[str, Any] = json.loads(reply.data)
    assert "error" not in done, done["error"]
    return done


async def ask(link: NatsLink, subject: str, request: dict[str, Any]) -> dict[str, Any]:
    reply = await link.client.request(
        f"$JS.API.{subject}", json.dumps(request).encode(), timeout=10
    )
    answer: dict[str, Any] = json.loads(reply.data)
    assert "error" not in answer, answer["error"]
    return answer


async def counts(link: NatsLink) -> dict[str, int]:
    return {name: (await link.js.stream_info(name)).state.messages for name in STREAMS}


@dataclass(frozen=True)
class Past:
    """What the first server was told before its backup."""

    config: Config
    run_id: str
    counts: dict[str, int]


async def live_and_stop(tmp_path: Path, nats: NatsConfig) -> Past:
    """One run; then, with the daemon gone, a request that waits in the queue."""
    config = daemon_config(tmp_path, nats, GOOD_RUN)
    async with serving(config) as served:
        accepted = await served.client.submit("shop", ["build"], target="dev", request_id="nightly")
        events = await served.events(accepted.run_id)
        check_run(events)
        await served.queue_empty()
    async with NatsLink(nats, name="test") as link:
        await link.wait_connected(10)
        bucket = await link.js.object_store(ARTIFACTS_BUCKET)
        await bucket.put(ARTIFACT, ARTIFACT_BYTES)
        await link.publish("dbt.runs.shop.dev", b'{"args":["build"],"request_id":"waiting"}')
        return Past(config, accepted.run_id, await counts(link))


async def go_on(tmp_path: Path, past: Past, server: NatsServer) -> None:
    """A daemon that has lost its disk, too, on what was restored."""
    nats = msgspec.structs.replace(past.config.nats, servers=(server.url,))
    worker = msgspec.structs.replace(past.config.worker, state_dir=str(tmp_path / "new state"))
    config = msgspec.structs.replace(past.config, nats=nats, worker=worker)
    async with serving(config) as served:
        # The request that waited runs.
        await served.queue_empty()
        by_request = {view.request_id: view for view in await served.client.stored_runs()}
        assert by_request["waiting"].status is RunStatus.SUCCESS
        check_run(await served.events(by_request["waiting"].run_id))
        # What was, is, and agrees with itself.
        check_run(await served.events(past.run_id))
        verified = await served.client.verify(past.run_id)
        assert (verified.agrees, verified.differences) == (True, [])
        # A request that ran before the backup does not run again.
        again = await served.client.submit("shop", ["build"], target="dev", request_id="nightly")
        assert again.run_id == past.run_id
        await served.queue_empty()
        finished = [e for e in await served.events(past.run_id) if isinstance(e, RunFinished)]
        assert len(finished) == 1
        bucket = await served.link.js.object_store(ARTIFACTS_BUCKET)
        assert (await bucket.get(ARTIFACT)).data == ARTIFACT_BYTES


async def test_streams_backed_up_one_by_one_and_restored_to_an_empty_server(
    tmp_path: Path, nats_server: NatsServer, nats_config: NatsConfig
) -> None:
    past = await live_and_stop(tmp_path, nats_config)
    async with NatsLink(nats_config, name="test") as link:
        await link.wait_connected(10)
        backups = {stream: await take(link, stream) for stream in STREAMS if stream != LEASES}
    assert len(backups[f"OBJ_{ARTIFACTS_BUCKET}"].chunks) > 1
    async with NatsServer.start(tmp_path / "other") as other:
        async with NatsLink(NatsConfig(servers=(other.url,)), name="test") as link:
            await link.wait_connected(10)
            for stream, backup in backups.items():
                await restore(link, stream, backup)
            # `dbtstream setup` makes what is not worth a backup, and finds the rest as it was.
            lines = await ensure_streams(link, StreamsConfig())
            made = [line for line in lines if not line.endswith(": as it should be")]
            assert made == [f"KV bucket {LEASES_BUCKET}: created"]
            assert await check_streams(link, StreamsConfig()) == []
            assert await counts(link) == past.counts | {LEASES: 0}
            assert past.counts[RUNS_STREAM] == 1
        await go_on(tmp_path, past, other)


async def test_the_store_of_a_stopped_server_copied_file_by_file(
    tmp_path: Path, nats_server: NatsServer, nats_config: NatsConfig
) -> None:
    past = await live_and_stop(tmp_path, nats_config)
    await nats_server.stop()
    await asyncio.to_thread(
        shutil.copytree, nats_server.store_dir / "jetstream", tmp_path / "other" / "jetstream"
    )
    async with NatsServer.start(tmp_path / "other") as other:
        async with NatsLink(NatsConfig(servers=(other.url,)), name="test") as link:
            await link.wait_connected(10)
            assert await counts(link) == past.counts
        await go_on(tmp_path, past, other)


async def test_a_stream_that_is_there_is_not_restored_over(
    nats_config: NatsConfig, link: NatsLink
) -> None:
    """Remove it first; `nats stream restore` says so, too."""
    await ensure_streams(link, StreamsConfig())
    backup = await take(link, LEASES)
    with pytest.raises(AssertionError, match="already in use"):
        await restore(link, f"KV_{LEASES_BUCKET}", backup)


async def until_it_listens(served: Served) -> None:
    """The connection for requests may be back later than the one for events."""
    async with asyncio.timeout(30):
        while not await served.client.workers():  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.05)


async def test_nothing_left_of_nats_and_no_backup(
    tmp_path: Path, nats_server: NatsServer, nats_config: NatsConfig
) -> None:
    """dbt finishes meanwhile; after `dbtstream setup` the daemon goes on by itself."""
    gate = tmp_path / "gate"
    config = daemon_config(tmp_path, nats_config, HALF.format(gate=str(gate)))
    async with serving(config) as served:
        accepted = await served.client.submit("shop", ["build"], target="dev")
        async for event in served.client.events(run_id=accepted.run_id):
            if isinstance(event, NodeFinished):
                break
        await nats_server.kill()
        await asyncio.to_thread(shutil.rmtree, nats_server.store_dir / "jetstream")
        await nats_server.restart()
        await served.link.wait_reconnect(0)
        gate.touch()
        await ensure_streams(served.link, config.streams)
        # What had not been stored before is told now, and what had been is lost.
        left = await served.events(accepted.run_id)
        told = [type(event).__name__ for event in left]
        assert told == ["NodeStarted", "NodeFinished", "RunFinished"]
        assert isinstance(left[-1], RunFinished)
        assert left[-1].status is RunStatus.SUCCESS
        await until_it_listens(served)
        check_run(await served.run())
