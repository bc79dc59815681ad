"""The ways in which one dbt command can be started, each asked for the same facts.

    Cli     dbt's own command line, a new process each time
    Bare    a fork of a process that has dbt imported, or also the manifest (`bare_fork`)
    Daemon  a request to a daemon over NATS, with one kind of warm starts

The first node is seen by the one who asked: in the output of `Cli` and `Bare`, where dbt has
written that it starts, and as `node.started` by a NATS subscriber of `Daemon`'s. It ends with
the process there, with `run.finished` here. CPU is that of everything there is for it: dbt's
process, the process that it was forked from, the daemon, the process that reads SQL; not that of
nats-server, nor ours.
"""

import asyncio
import json
import resource
import shutil
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import msgspec
import psutil

from dbtstream.config import DEFAULT_TARGET, Config, HttpConfig, ProjectConfig, WorkerConfig
from dbtstream.statuses import RunStatus
from dbtstream.subjects import LIVE, new_run_id
from dbtstream.workspace import Workspace, keep_parse_cache, prepare_workspace
from tests.bench import bare_fork
from tests.bench.builds import DBT, NOT_PLAIN, PROJECT
from tests.bench.process_tree import peak_below, settled_cpu_s, tree_cpu_s
from tests.bench.served import (
    Served,
    cpu_s,
    free_port,
    process_of,
    serving,
    sql_reader_cpu_s,
)

DBT_CHILD = Path(__file__).parents[2] / "dbtstream" / "dbt_child"
STARTS = " START "
LIMIT_S = 600.0
LINE_BYTES = 4 * 1024 * 1024
ENDS = frozenset(status.value for status in RunStatus if status.is_terminal)


class Took(msgspec.Struct, frozen=True, kw_only=True):
    """What one run took, in seconds; `pss_mb` only where it was asked for."""

    first_s: float
    total_s: float
    cpu_s: float
    daemon_s: float = 0.0  # of cpu_s
    reader_s: float = 0.0  # of cpu_s
    nats_s: float = 0.0  # beside it
    pss_mb: float = 0.0

    @property
    def dbt_s(self) -> float:
        return self.cpu_s - self.daemon_s - self.reader_s


class Way(Protocol):
    async def run(self, args: Sequence[str]) -> Took:
        """Once, from nothing that is still at work to nothing that is still at work."""

    async def peak_pss_mb(self, args: Sequence[str]) -> float:
        """Once more, of the run's own process and what it starts."""


class Place:
    """A project, and what a dbt in it finds around itself; a parse cache of its own."""

    def __init__(
        self, project: Path, state_dir: Path, warm_starts: str = "off", *, name: str = PROJECT
    ) -> None:
        self.folder, self._name = project, name
        self.config = config_of({name: project}, state_dir, warm_starts)

    def workspace(self) -> Workspace:
        run_id = new_run_id(datetime.now(UTC))
        project = self.config.projects[self._name]
        return prepare_workspace(self.config, self._name, project, DEFAULT_TARGET, run_id, "")

    def environment(self) -> dict[str, str]:
        """Of a dbt that nobody observes."""
        found = self.workspace().environment
        return {name: value for name, value in found.items() if name not in NOT_PLAIN}

    def take_parse_of(self, other: "Place") -> None:
        shutil.copyfile(other.workspace().parse_cache, self.workspace().parse_cache)


def config_of(projects: Mapping[str, Path], state_dir: Path, warm_starts: str) -> Config:
    """The defaults, but for a port of each daemon's own: there are several at once."""
    return Config(
        http=HttpConfig(listen=f"127.0.0.1:{free_port()}"),
        worker=WorkerConfig(
            name="bench",
            state_dir=str(state_dir),
            warm_starts=warm_starts,  # type: ignore[arg-type]  # one of its Literal
        ),
        projects={
            name: ProjectConfig(
                path=str(folder),
                targets=(DEFAULT_TARGET,),
                python=sys.executable,
                profiles_dir=str(folder),
                env={"DBT_SEND_ANONYMOUS_USAGE_STATS": "0"},
            )
            for name, folder in projects.items()
        },
        source="bench",
    )


class Cli:
    def __init__(self, place: Place) -> None:
        self._place = place

    async def parse(self) -> None:
        """Fill the parse cache, once and for all."""
        workspace = self._place.workspace()
        process = await self._start(["parse"], workspace.environment)
        if code := await _read_to_end(process, None):
            raise RuntimeError(f"dbt parse ended with {code}")
        await asyncio.to_thread(keep_parse_cache, workspace)

    async def run(self, args: Sequence[str]) -> Took:
        environment = self._place.environment()
        used_s, began = _children_cpu_s(), time.monotonic()
        process = await self._start(args, environment)
        seen: list[float] = []
        code = await _read_to_end(process, seen)
        ended = time.monotonic()
        _check(code, args)
        return Took(
            first_s=seen[0] - began, total_s=ended - began, cpu_s=_children_cpu_s() - used_s
        )

    async def peak_pss_mb(self, args: Sequence[str]) -> float:
        process = await self._start(args, self._place.environment())
        async with peak_below(process_of(process.pid), itself=True) as peak:
            await _read_to_end(process, None)
        return peak.pss_mb

    async def _start(
        self, args: Sequence[str], environment: dict[str, str]
    ) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", DBT, *args),
            cwd=self._place.folder,
            env=environment,
            limit=LINE_BYTES,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )


class Bare:
    """Made by `bare`."""

    def __init__(self, place: Place, process: asyncio.subprocess.Process) -> None:
        self._place, self._process = place, process
        self._root = process_of(process.pid)

    async def run(self, args: Sequence[str]) -> Took:
        used_s, began = tree_cpu_s(self._root), time.monotonic()
        seen = await self.ask(args)
        ended = time.monotonic()
        return Took(
            first_s=seen[0] - began,
            total_s=ended - began,
            cpu_s=tree_cpu_s(self._root) - used_s,
        )

    async def peak_pss_mb(self, args: Sequence[str]) -> float:
        async with peak_below(self._root) as peak:
            await self.ask(args)
        return peak.pss_mb

    async def ask(self, args: Sequence[str]) -> list[float]:
        """To its end; when nodes were seen to start."""
        run = {
            "folder": str(self._place.folder),
            "environment": self._place.environment(),
            "args": list(args),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(run).encode() + b"\n")
        seen: list[float] = []
        while line := (await self._process.stdout.readline()).decode():
            _note_start(line, seen)
            _, mark, told = line.partition(bare_fork.ENDED)
            if mark:
                _check(json.loads(told)["code"], args)
                return seen
        raise RuntimeError("the process that forks has ended")


@asynccontextmanager
async def bare(place: Place, kind: str) -> AsyncIterator[Bare]:
    """`kind` is `imports` or `manifest`; it is ready when the context begins."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, bare_fork.__file__, str(DBT_CHILD), kind),
        cwd=place.folder,
        env=place.environment(),
        limit=LINE_BYTES,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        way = Bare(place, process)
        if kind == "manifest":
            await way.ask(["parse"])
        yield way
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


class Daemon:
    """Made by `daemon`."""

    def __init__(self, served: Served) -> None:
        self.served = served

    async def run(self, args: Sequence[str]) -> Took:
        daemon, nats = self.served.daemon, self.served.nats
        before_s = await settled_cpu_s(daemon)
        own_s, reader_s, nats_s = cpu_s(daemon), sql_reader_cpu_s(daemon), cpu_s(nats)
        first_s, total_s = await self.ask(args)
        after_s = await settled_cpu_s(daemon)
        return Took(
            first_s=first_s,
            total_s=total_s,
            cpu_s=after_s - before_s,
            daemon_s=cpu_s(daemon) - own_s,
            reader_s=sql_reader_cpu_s(daemon) - reader_s,
            nats_s=cpu_s(nats) - nats_s,
        )

    async def peak_pss_mb(self, args: Sequence[str]) -> float:
        async with peak_below(self.served.daemon) as peak:
            await self.ask(args)
        await self.settled()
        return peak.pss_mb

    async def settled(self) -> None:
        """Nothing of it computes any more."""
        await settled_cpu_s(self.served.daemon)

    async def ask(self, args: Sequence[str], project: str = PROJECT) -> tuple[float, float]:
        """From the request to (first `node.started`, `run.finished`) seen by a subscriber."""
        client = self.served.link.client
        seen: list[float] = []

        async def note(_: object) -> None:
            seen.append(time.monotonic())

        node = f"{LIVE}.{project}.*.node.*.*.started"
        await client.subscribe(node, cb=note, max_msgs=1)  # a build has many
        story = await client.subscribe(f"{LIVE}.{project}.*.run.*._.*")
        await client.flush()
        began = time.monotonic()
        await self.served.client.submit(project, args)
        status = ""
        while status not in ENDS:
            status = (await story.next_msg(timeout=LIMIT_S)).subject.rpartition(".")[2]
        ended = time.monotonic()
        await story.unsubscribe()
        if status != RunStatus.SUCCESS:
            raise RuntimeError(f"{project}: {' '.join(args)} ended as {status}")
        return seen[0] - began, ended - began


@asynccontextmanager
async def daemon(place: Place, folder: Path) -> AsyncIterator[Daemon]:
    """With the place's config. Its first runs may be cold: ask for some before measuring."""
    await asyncio.to_thread(folder.mkdir, exist_ok=True)
    async with serving(place.config, folder) as served:
        yield Daemon(served)


def templates_of(daemon: psutil.Process) -> list[psutil.Process]:
    """The processes that runs are forked from, while no run is there."""
    below = daemon.children(recursive=True)  # type: ignore[no-untyped-call]  # no types
    return [process for process in below if "--template" in process.cmdline()]


async def _read_to_end(process: asyncio.subprocess.Process, seen: list[float] | None) -> int:
    assert process.stdout is not None
    async for line in process.stdout:
        if seen is not None:
            _note_start(line.decode(), seen)
    return await process.wait()


def _note_start(line: str, seen: list[float]) -> None:
    if STARTS in line:
        seen.append(time.monotonic())


def _check(code: int, args: Sequence[str]) -> None:
    if code:
        raise RuntimeError(f"dbt {' '.join(args)} ended with {code}")


def _children_cpu_s() -> float:
    """Of all processes that we have waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
