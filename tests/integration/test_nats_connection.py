"""What a connection can tell of the servers that it does not reach."""

import asyncio
import contextlib
import gc
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from dbtstream.config import NatsConfig
from dbtstream.embedded import NatsServer
from dbtstream.nats_link import NatsLink

Until = Callable[[Callable[[], object]], Awaitable[None]]

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <StreamWriter:ResourceWarning")


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """nats-py 2.16 forgets to close a connection over which no INFO came."""
    yield
    gc.collect()


@contextlib.asynccontextmanager
async def linked(*urls: str) -> AsyncIterator[NatsLink]:
    async with NatsLink(NatsConfig(servers=urls, reconnect_wait_s=0.05), name="test") as link:
        yield link


async def announced(server: NatsServer) -> list[str]:
    """What its first line says of its cluster."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    line = await reader.readline()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    urls: list[str] = json.loads(line.removeprefix(b"INFO "))["connect_urls"]
    return urls


async def test_only_a_server_that_is_not_there_refuses(
    link: NatsLink, nats_server: NatsServer
) -> None:
    assert not await link.refused_everywhere(5)
    nats_server.pause()
    assert not await link.refused_everywhere(5)
    await nats_server.kill()
    assert await link.refused_everywhere(5)
    await nats_server.restart()
    assert not await link.refused_everywhere(5)


async def test_one_configured_server_that_accepts_is_enough(nats_server: NatsServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        other = f"nats://127.0.0.1:{free.getsockname()[1]}"
        async with linked(nats_server.url, other) as link:
            await link.wait_connected(10)
            await nats_server.kill()
            assert not await link.refused_everywhere(5)
            free.close()
            assert await link.refused_everywhere(5)


async def test_no_answer_is_no_refusal(nats_server: NatsServer) -> None:
    """A port whose backlog is full drops what comes, as a network does that is cut."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        address = full.getsockname()
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(address)
        async with linked(nats_server.url, f"nats://127.0.0.1:{address[1]}") as link:
            await nats_server.kill()
            assert not await link.refused_everywhere(0.2)


async def test_an_address_that_cannot_be_reached_is_no_refusal(nats_server: NatsServer) -> None:
    async with linked(nats_server.url, "nats://255.255.255.255:4222") as link:
        await nats_server.kill()
        assert not await link.refused_everywhere(5)


async def test_servers_that_have_announced_themselves_count(tmp_path: Path, until: Until) -> None:
    """The config names one of two; the other is remembered when its client has gone."""

    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
    ):
        ports = one.getsockname()[1], two.getsockname()[1]

    def cluster(name: str, port: int) -> str:
        routes = ", ".join(f'"nats-route://127.0.0.1:{route}"' for route in ports)
        listen = f"cluster {{ name: c, listen: 127.0.0.1:{port}, routes: [{routes}] }}"
        return f"server_name: {name}\n{listen}"

    async with (
        NatsServer.start(tmp_path / "a", config_extra=cluster("a", ports[0])) as a,
        NatsServer.start(tmp_path / "b", config_extra=cluster("b", ports[1])) as b,
        linked(a.url) as link,
    ):
        await link.wait_connected(10)
        await until(lambda: len(link.client.servers) == 2)
        await b.kill()
        async with asyncio.timeout(30):
            while len(await announced(a)) > 1:  # noqa: ASYNC110  # the server tells on asking only
                await asyncio.sleep(0.02)
        await link.client.close()  # as nats-py does of itself; a new one knows the config only
        await until(lambda: link.generation == 2 and link.connected)
        assert len(link.client.servers) == 1
        await a.kill()
        with socket.create_server(("127.0.0.1", b.port)):
            assert not await link.refused_everywhere(5)
        assert await link.refused_everywhere(5)
        await b.restart()
        assert not await link.refused_everywhere(5)


async def test_a_connection_knows_how_long_it_has_lasted(
    link: NatsLink, nats_server: NatsServer, until: Until
) -> None:
    loop = asyncio.get_running_loop()
    first = link.connected_since
    assert first is not None
    assert first <= loop.time()
    await link.client.flush()
    assert link.connected_since == first
    await nats_server.kill()
    await until(lambda: link.connected_since is None)
    killed = loop.time()
    await nats_server.restart()
    await until(lambda: link.connected_since is not None)
    assert link.connected_since is not None
    assert link.connected_since > killed
