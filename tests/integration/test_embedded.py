"""The bundled nats-server: it starts, it can be broken in every way, and it never outlives us."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import nats
import pytest

from dbtstream.embedded import NatsServer
from dbtstream.errors import NatsRefused


async def _hello(server: NatsServer) -> str:
    client = await nats.connect(server.url, allow_reconnect=False)
    try:
        return str((await client.jetstream().account_info()).domain or "js")
    finally:
        await client.close()


def _exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_it_accepts_connections_with_jetstream_as_soon_as_the_context_is_entered(
    tmp_path: Path,
) -> None:
    async with NatsServer.start(tmp_path) as server:
        assert await _hello(server) == "js"
        pid = server.pid
    assert not _exists(pid)


async def test_after_a_kill_it_comes_back_on_the_same_port_with_its_store(tmp_path: Path) -> None:
    async with NatsServer.start(tmp_path) as server:
        url = server.url
        client = await nats.connect(url)
        await client.jetstream().add_stream(name="S", subjects=["s"])
        await client.close()
        await server.kill()
        await server.restart()
        assert server.url == url
        client = await nats.connect(url)
        assert (await client.jetstream().stream_info("S")).config.name == "S"
        await client.close()


async def test_a_paused_server_is_stopped_all_the_same(tmp_path: Path) -> None:
    async with NatsServer.start(tmp_path) as server:
        server.pause()
        pid = server.pid
    assert not _exists(pid)


async def test_a_cancelled_context_leaves_no_server_behind(tmp_path: Path) -> None:
    started: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def hold() -> None:
        async with NatsServer.start(tmp_path) as server:
            started.set_result(server.pid)
            await asyncio.Event().wait()

    task = asyncio.create_task(hold())
    pid = await started
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not _exists(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
async def test_it_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import asyncio, pathlib, sys\n"
        "from dbtstream.embedded import NatsServer\n"
        "async def main():\n"
        "    async with NatsServer.start(pathlib.Path(sys.argv[1])) as server:\n"
        "        print(server.pid, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    # A pidfd becomes readable when its process ends.
    server = os.pidfd_open(int(await parent.stdout.readline()))
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(server, ended.set)
    os.kill(parent.pid, signal.SIGKILL)
    await parent.wait()
    async with asyncio.timeout(20):
        await ended.wait()
    asyncio.get_running_loop().remove_reader(server)
    os.close(server)


async def test_a_config_that_the_server_refuses_is_told_with_the_servers_words(
    tmp_path: Path,
) -> None:
    with pytest.raises(NatsRefused, match="starting a nats-server"):
        async with NatsServer.start(tmp_path, config_extra="max_payload: [1]"):
            pytest.fail("it started")


async def test_a_taken_port_is_an_error_that_says_so(tmp_path: Path) -> None:
    async with NatsServer.start(tmp_path / "a") as first:
        with pytest.raises(NatsRefused, match="address already in use"):
            async with NatsServer.start(tmp_path / "b", port=first.port):
                pytest.fail("it started")
