"""Three nats-servers that are one cluster, as deploy/nats/cluster.conf has it on one machine."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from dbtstream.config import StreamsConfig
from dbtstream.embedded import NatsServer
from dbtstream.errors import NatsError
from dbtstream.nats_link import NatsLink
from dbtstream.streams import ensure_streams
from tests.faults.harness import LIMIT_S, POLL_S, linked

SIZE = 3
REPLICAS = 3


class Cluster:
    """Its servers, each killable for itself. All streams have three copies."""

    def __init__(self, servers: list[NatsServer]) -> None:
        self.servers = servers

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]


@asynccontextmanager
async def cluster(folder: Path) -> AsyncIterator[Cluster]:
    """Up, with a leader, and with dbtstream's streams."""
    ports = _free_ports(SIZE)
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(
                NatsServer.start(folder / f"n{number}", config_extra=_member(number, ports))
            )
            for number in range(SIZE)
        ]
        made = Cluster(servers)
        async with linked(made.urls) as link:
            await _make_streams(link)
        yield made


def _member(number: int, ports: list[int]) -> str:
    routes = json.dumps([f"nats://127.0.0.1:{port}" for port in ports])
    return (
        f"server_name: n{number}\n"
        f"cluster {{ name: faults, listen: 127.0.0.1:{ports[number]}, routes: {routes} }}\n"
    )


async def _make_streams(link: NatsLink) -> None:
    """The servers are there before they have agreed on who leads."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            with contextlib.suppress(NatsError):
                await ensure_streams(link, StreamsConfig(replicas=REPLICAS))
                return
            await asyncio.sleep(POLL_S)


def _free_ports(count: int) -> list[int]:
    """Servers of a cluster name each other's before any of them is up."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
