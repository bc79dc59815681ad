"""`dbtstream serve` as a process of its own, with real dbt on DuckDB and a real nats-server."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from dbtstream.client import Client
from dbtstream.events import AnyEvent
from tests.dbt_projects import PYTHON

COMMAND = (sys.executable, "-c", "from dbtstream.cli import main; main()")
"""As the installed `dbtstream` does, from a checkout that may not be installed."""

ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "HOME": os.environ.get("HOME", "/"),
    "PYTHONPATH": str(Path(__file__).parents[2]),
    "DBT_SEND_ANONYMOUS_USAGE_STATS": "0",
}


class Serve:
    """One daemon process; `log` is what it wrote so far."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    async def until_log(self, text: str) -> None:
        async with asyncio.timeout(60):
            while text not in await asyncio.to_thread(lambda: self.log):
                assert self.process.returncode is None, self.log

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()


def write_config(folder: Path, nats_url: str, project: Path, **settings: str) -> Path:
    """A dbtstream.toml for one project `shop` with target `dev`; `settings` join its table."""
    extra = "\n".join(f"{key} = {value}" for key, value in settings.items())
    path = folder / "dbtstream.toml"
    path.write_text(
        f"""
[nats]
servers = ["{nats_url}"]

[worker]
name = "tester"
state_dir = "{folder / "state"}"
ack_wait_s = 3.0
heartbeat_s = 0.5

[http]
listen = "127.0.0.1:0"

[projects.shop]
path = "{project}"
targets = ["dev"]
python = "{PYTHON}"
{extra}
""",
        encoding="utf-8",
    )
    return path


@asynccontextmanager
async def serve(config: Path, environment: Mapping[str, str] | None = None) -> AsyncIterator[Serve]:
    """Started and ready; ended with SIGTERM if the test has not ended it."""
    log = config.with_suffix(f".{os.urandom(3).hex()}.log")
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            "--config",
            str(config),
            "serve",
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            env=ENVIRONMENT | dict(environment or {}),
        )
    served = Serve(process, log)
    try:
        await served.until_log("serving")
        yield served
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(60):
                await process.wait()


async def whole_run(client: Client, run_id: str) -> list[AnyEvent]:
    async with asyncio.timeout(100):
        return [event async for event in client.events(run_id=run_id)]
