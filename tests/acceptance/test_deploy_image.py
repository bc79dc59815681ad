"""What the Dockerfile does, done without Docker: its commands, in its order, in a folder.

Both environments are installed as it says, the daemon of the one serves with the image's
variables and compose.yaml's config, dbt of the other builds the sample project, and the
HEALTHCHECK finds it alive. Not done: the last stage's apt-get and user, which need an image.
"""

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dbtstream.client import Client
from dbtstream.embedded import NatsServer
from dbtstream.events import RunFinished
from dbtstream.local_run import copy_demo
from dbtstream.statuses import RunStatus
from tests.acceptance.conftest import whole_run
from tests.deploy import DEPLOY, ROOT, instructions

DOCKERFILE = DEPLOY / "docker" / "Dockerfile"

# Folders of the image that are folders of the test's here.
FOLDERS = ("/opt/", "/src", "/srv/", "/etc/dbtstream/", "/var/lib/dbtstream")


class Image:
    """A folder that is the image's root, and what the last stage's instructions say."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.said = dict(instructions(DOCKERFILE))

    def here(self, text: str) -> str:
        """With the image's paths in this folder."""
        at_start = "|".join(FOLDERS)
        return re.sub(rf"(?<![\w/.])({at_start})", rf"{self.root}\1", text)

    def environment(self) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S+)", self.here(self.said["ENV"])))

    def build(self) -> None:
        """The stages that install Python packages: `daemon` and `dbt`."""
        work, arguments, stage = self.root, dict(os.environ), ""
        for instruction, rest in instructions(DOCKERFILE):
            if instruction == "FROM":
                stage = rest.partition(" AS ")[2]
            elif not stage:
                continue
            elif instruction == "WORKDIR":
                work = Path(self.here(rest))
                work.mkdir(parents=True, exist_ok=True)
            elif instruction == "ARG":
                name, _, value = rest.partition("=")
                arguments[name] = value.strip('"')
            elif instruction == "COPY":
                self._copy(rest, work)
            elif instruction == "RUN":
                command = self.here(rest).replace("python -m venv", f"{sys.executable} -m venv")
                subprocess.run(["/bin/sh", "-ec", command], cwd=work, env=arguments, check=True)

    def _copy(self, rest: str, work: Path) -> None:
        *sources, target = rest.split()
        for source in sources:
            to = work / target
            if (ROOT / source).is_dir():
                shutil.copytree(
                    ROOT / source,
                    to,
                    dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("__pycache__"),
                )
            else:
                shutil.copy(ROOT / source, to)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    image = Image(tmp_path_factory.mktemp("image"))
    image.build()
    return image


@asynccontextmanager
async def container(
    image: Image, server: NatsServer, port: int
) -> AsyncIterator[asyncio.subprocess.Process]:
    """ENTRYPOINT and CMD without tini, with the config that compose.yaml mounts."""
    environment = image.environment() | {
        "DBTSTREAM__NATS__SERVERS": json.dumps([server.url]),
        "DBTSTREAM__HTTP__LISTEN": f"127.0.0.1:{port}",
        "DBTSTREAM__TELEMETRY__OTLP__ENDPOINT": "http://127.0.0.1:9",  # nobody is there
    }
    entrypoint, command = json.loads(image.said["ENTRYPOINT"]), json.loads(image.said["CMD"])
    assert entrypoint[1] == "--"
    process = await asyncio.create_subprocess_exec(
        *map(image.here, entrypoint[2:]), *command, env=environment, cwd=image.root
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(60):
            await process.wait()


def put_in_place(image: Image) -> None:
    """What compose.yaml mounts."""
    copy_demo(image.root / "srv" / "flights")
    etc = image.root / "etc" / "dbtstream"
    etc.mkdir(parents=True)
    text = (DEPLOY / "docker" / "dbtstream.toml").read_text(encoding="utf-8")
    (etc / "dbtstream.toml").write_text(image.here(text), encoding="utf-8")


def packages(image: Image, environment: str) -> set[str]:
    done = subprocess.run(
        [image.root / "opt" / environment / "bin" / "pip", "list", "--format=json"],
        check=True,
        capture_output=True,
    )
    return {package["name"] for package in json.loads(done.stdout)}


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:  # not listening yet, or 503
        return False


@pytest.mark.timeout(600)
async def test_its_daemon_runs_its_dbt(image: Image, nats_server: NatsServer) -> None:
    await asyncio.to_thread(put_in_place, image)
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    async with container(image, nats_server, port) as daemon:
        async with asyncio.timeout(60):
            while not await asyncio.to_thread(is_ready, port):
                assert daemon.returncode is None
        await run_something(image, nats_server)
        assert await health(image, port) == 0
        daemon.terminate()
        assert await daemon.wait() == 0
        assert await health(image, port) == 1


async def run_something(image: Image, server: NatsServer) -> None:
    async with Client.connect(server.url) as client:
        accepted = await client.submit("flights", ["build"], target="dev")
        events = await whole_run(client, accepted.run_id)
    assert isinstance(events[-1], RunFinished)
    assert events[-1].status is RunStatus.SUCCESS, events[-1]
    # By the other environment's dbt: there is none in the daemon's.
    assert "dbt-core" not in await asyncio.to_thread(packages, image, "dbtstream")
    assert "dbtstream" not in await asyncio.to_thread(packages, image, "dbt")


async def health(image: Image, port: int) -> int:
    """The exit code of HEALTHCHECK, asking where this daemon listens."""
    _, _, command = image.said["HEALTHCHECK"].partition(" CMD ")
    interpreter, *arguments = json.loads(command)
    check = await asyncio.create_subprocess_exec(
        image.here(interpreter),
        *(word.replace("9464", str(port)) for word in arguments),
        stderr=asyncio.subprocess.DEVNULL,
    )
    return await check.wait()
