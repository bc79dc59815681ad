"""What every ring of tests may use: a real nats-server of its own, and a link to it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

import pytest
import uvloop
from nats.js.api import RawStreamMsg

from dbtstream.config import NatsConfig
from dbtstream.embedded import NatsServer
from dbtstream.nats_link import NatsLink


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The daemon runs on uvloop, and so do its tests."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def nats_server(tmp_path: Path) -> AsyncIterator[NatsServer]:
    """A server with an empty store, killable and restartable."""
    async with NatsServer.start(tmp_path / "nats") as server:
        yield server


@pytest.fixture
def nats_config(nats_server: NatsServer) -> NatsConfig:
    return NatsConfig(servers=(nats_server.url,), reconnect_wait_s=0.05)


@pytest.fixture
async def link(nats_config: NatsConfig) -> AsyncIterator[NatsLink]:
    async with NatsLink(nats_config, name="test") as link:
        await link.wait_connected(10)
        yield link


@pytest.fixture
def stored() -> Callable[[NatsLink, str], Awaitable[list[RawStreamMsg]]]:
    """`await stored(link, "DBT_EVENTS")`: every message of a stream, in its order."""

    async def read(link: NatsLink, stream: str) -> list[RawStreamMsg]:
        state = (await link.js.stream_info(stream)).state
        return [
            await link.js.get_msg(stream, seq=seq)
            for seq in range(state.first_seq, state.last_seq + 1)
        ]

    return read


@pytest.fixture
def until() -> Callable[[Callable[[], object]], Awaitable[None]]:
    """`await until(lambda: box.stats.disk_failed)`: for facts that nothing announces."""

    async def wait(fact: Callable[[], object]) -> None:
        async with asyncio.timeout(60):
            while not fact():  # noqa: ASYNC110  # there is no event to wait for
                await asyncio.sleep(0.005)

    return wait
