"""A daemon in this process on a real nats-server, with scripted children as its dbt."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from dbtstream.client import Client
from dbtstream.config import (
    Config,
    HttpConfig,
    NatsConfig,
    ProjectConfig,
    TelemetryConfig,
    WorkerConfig,
)
from dbtstream.daemon import Daemon
from dbtstream.events import AnyEvent
from dbtstream.nats_link import NatsLink
from dbtstream.subjects import DEAD_STREAM, RUNS_STREAM
from tests.scripted_child import scripted_child


@dataclass
class Served:
    """What a test needs of a running daemon."""

    daemon: Daemon
    client: Client
    link: NatsLink  # a connection of the test's own
    config: Config

    async def publish(self, subject: str, payload: bytes, **headers: str) -> None:
        """As `nats pub` does, through JetStream so that it is stored when this returns."""
        await self.link.publish(subject, payload, headers or None)

    async def events(self, run_id: str) -> list[AnyEvent]:
        """All of a run, to its end."""
        async with asyncio.timeout(60):
            return [event async for event in self.client.events(run_id=run_id)]

    async def run(self, args: list[str] | None = None, **request: Any) -> list[AnyEvent]:
        """Submit and read to the end."""
        accepted = await self.client.submit("shop", args or ["build"], target="dev", **request)
        return await self.events(accepted.run_id)

    async def queue_empty(self) -> None:
        """Requests are settled after their end is told; this waits for it."""
        async with asyncio.timeout(30):
            while (await self.link.js.stream_info(RUNS_STREAM)).state.messages:
                pass

    async def dead_letters(self) -> list[tuple[str, dict[str, str], bytes]]:
        info = await self.link.js.stream_info(DEAD_STREAM)
        letters = []
        for seq in range(info.state.first_seq, info.state.last_seq + 1):
            message = await self.link.js.get_msg(DEAD_STREAM, seq)
            letters.append((message.subject or "", message.headers or {}, message.data or b""))
        return letters


def project_folder(tmp_path: Path, name: str = "shop") -> Path:
    """Scripted children read no project, but the config insists on one."""
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    (folder / "dbt_project.yml").write_text(f"name: {name}\n", encoding="utf-8")
    return folder


def daemon_config(
    tmp_path: Path,
    nats: NatsConfig,
    body: str,
    *,
    project: dict[str, Any] | None = None,
    listen: str = "",
    telemetry: TelemetryConfig | None = None,
    **worker: Any,
) -> Config:
    shop = ProjectConfig(
        path=str(project_folder(tmp_path)),
        targets=("dev", "prod"),
        python=scripted_child(tmp_path / "child", body),
    )
    settings: dict[str, Any] = {
        "name": "tester",
        "state_dir": str(tmp_path / "state"),
        "cancel_grace_s": 5.0,
        "kill_grace_s": 5.0,
    }
    return Config(
        nats=nats,
        worker=WorkerConfig(**settings | worker),
        projects={"shop": msgspec.structs.replace(shop, **project or {})},
        http=HttpConfig(listen=listen),
        telemetry=telemetry or TelemetryConfig(),
        source="test",
    )


@asynccontextmanager
async def serving(config: Config) -> AsyncIterator[Served]:
    """The daemon, ready; stopped and waited for at the end, whatever the test did."""
    daemon = Daemon(config)
    running = asyncio.create_task(daemon.run(), name="daemon")
    try:
        async with asyncio.timeout(30):
            await daemon.ready()
        async with (
            Client.connect(config=config.nats, name="tester") as client,
            NatsLink(config.nats, name="tester") as link,
        ):
            await link.wait_connected(30)
            yield Served(daemon, client, link, config)
    finally:
        daemon.stop()
        daemon.stop()
        try:
            async with asyncio.timeout(30):
                await running
        finally:
            daemon.stop()
