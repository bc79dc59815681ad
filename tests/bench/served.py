"""A daemon and a NATS server, each a process of its own, and what they use.

The daemon is `dbtstream serve` with a written config, as in production. The figures are the
kernel's, asked for with psutil: CPU in steps of 10 ms.
"""

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil

from dbtstream.client import Client, NoDaemon
from dbtstream.config import Config, NatsConfig
from dbtstream.embedded import NatsServer
from dbtstream.errors import NatsUnavailable
from dbtstream.events import RunFinished, RunPlanned
from dbtstream.nats_link import NatsLink

REPOSITORY = Path(__file__).parents[2]
SERVE = "from dbtstream.cli import main; main()"
READY_S = 60.0
STOP_S = 60.0
POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class Served:
    """`daemon` and `nats` are processes; `client` and `link` are connections of ours."""

    daemon: psutil.Process
    nats: psutil.Process
    client: Client
    link: NatsLink
    url: str


@asynccontextmanager
async def serving(
    config: Config, folder: Path, *, lateness: Path | None = None
) -> AsyncIterator[Served]:
    """`config` says all but where NATS is. The daemon serves when the context begins; with
    `lateness` it writes there how late its loop comes to its tasks (`loop_lag`)."""
    async with NatsServer.start(folder / "nats") as server:
        config = msgspec.structs.replace(config, nats=NatsConfig(servers=(server.url,)))
        async with (
            _daemon(config, folder, lateness) as process,
            Client.connect(server.url, name="bench") as client,
            NatsLink(config.nats, name="bench") as link,
        ):
            await link.wait_connected(READY_S)
            await _ready(client, process, folder)
            daemon, nats = process_of(process.pid), process_of(server.pid)
            yield Served(daemon, nats, client, link, server.url)


async def planned_run(served: Served, project: str, target: str) -> str:
    """Submitted, and ready to send its first node."""
    accepted = await served.client.submit(project, ["build"], target=target)
    async with served.client.events(run_id=accepted.run_id) as events:
        async for event in events:
            if isinstance(event, RunPlanned):
                return accepted.run_id
    raise RuntimeError(f"run {accepted.run_id} ended without a plan")


async def run_to_end(
    client: Client, project: str, args: Sequence[str], *, target: str | None = None
) -> RunFinished:
    """Submit and wait. It asks now and then, since reading along would take CPU from the run."""
    run_id = (await client.submit(project, args, target=target)).run_id
    return await end_of(client, run_id)


async def end_of(client: Client, run_id: str) -> RunFinished:
    while not (await client.get(run_id)).status.is_terminal:  # noqa: ASYNC110  # see run_to_end
        await asyncio.sleep(POLL_S)
    return await client.wait(run_id)


def free_port() -> int:
    """That nobody listens on just now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def process_of(pid: int) -> psutil.Process:
    return psutil.Process(pid)  # type: ignore[no-untyped-call]  # psutil comes without types


def cpu_s(process: psutil.Process) -> float:
    """User and system, of the process alone."""
    times = process.cpu_times()
    return float(times.user + times.system)


def sql_reader_cpu_s(daemon: psutil.Process) -> float:
    """Of its process that reads SQL; 0 while there is none."""
    total_s = 0.0
    for child in daemon.children():  # type: ignore[no-untyped-call]  # psutil has no types
        if "dbtstream.sql_child" in child.cmdline():
            total_s += cpu_s(child)
    return total_s


def queued_s(process: psutil.Process) -> float:
    """How long its main thread was ready and had no CPU, so far; 0 where the kernel tells not."""
    try:
        return int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def rss_mb(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / 1e6


async def settled_rss_mb(process: psutil.Process, *, limit_s: float = 10.0) -> float:
    """When it has not changed by more than 0.1 MB for a second; or as it is after `limit_s`."""
    loop = asyncio.get_running_loop()
    ends, before = loop.time() + limit_s, rss_mb(process)
    while True:
        await asyncio.sleep(1.0)
        now = rss_mb(process)
        if abs(now - before) <= 0.1 or loop.time() >= ends:
            return now
        before = now


def toml(config: Config) -> str:
    """As a file that `load_config` reads."""
    tables = msgspec.to_builtins(config)
    del tables["source"]
    return "\n".join(_lines(tables, ()))


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    if path:
        yield f"[{'.'.join(path)}]"
    for key, value in table.items():
        if value is not None and not isinstance(value, Mapping):
            yield f"{key} = {json.dumps(value)}"  # strings, numbers, lists: TOML writes them so
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _lines(value, (*path, key))


@asynccontextmanager
async def _daemon(
    config: Config, folder: Path, lateness: Path | None
) -> AsyncIterator[asyncio.subprocess.Process]:
    path = folder / "dbtstream.toml"
    path.write_text(toml(config), encoding="utf-8")
    code = ("-c", SERVE) if lateness is None else ("-m", "tests.bench.loop_lag", str(lateness))
    with _log(folder).open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *code, "--config", str(path), "serve"),
            cwd=REPOSITORY,
            env=_environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a Ctrl-C is ours; the daemon is then stopped below
        )
    try:
        yield process
    finally:
        await asyncio.shield(_stop(process))


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Drain, then cancel what runs, then leave it: each SIGTERM is a step, SIGKILL the last."""
    for limit_s in (2.0, 30.0, 10.0):
        if process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(limit_s):
                await process.wait()
        except TimeoutError:
            continue
    if process.returncode is None:
        process.kill()
        await process.wait()


async def _ready(client: Client, process: asyncio.subprocess.Process, folder: Path) -> None:
    async with asyncio.timeout(READY_S):
        while True:
            if process.returncode is not None:
                raise RuntimeError(f"the daemon ended: {_log(folder).read_text()[-4000:]}")
            try:
                await client.list(limit=1)
            except (NoDaemon, NatsUnavailable):
                await asyncio.sleep(0.05)
            else:
                return


def _log(folder: Path) -> Path:
    return folder / "daemon.log"


def _environment() -> dict[str, str]:
    """Ours, without what would change the daemon's config."""
    return {name: value for name, value in os.environ.items() if not name.startswith("DBTSTREAM_")}
