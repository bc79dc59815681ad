"""Daemons as processes of their own, and runs to judge: what every fault test is made of.

`Serve` is one `dbtstream serve` that can be started, killed, frozen and started again over the
same state directory. `submit` puts a request into the queue with no daemon's help; `ended`
reads the whole run back and `judge` says whether all that is promised of it holds.
"""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from dbtstream.client import Client
from dbtstream.config import NatsConfig
from dbtstream.embedded import NatsServer
from dbtstream.events import AnyEvent, NodeFinished, NodeStarted, RunFinished
from dbtstream.messages import RunRequest, RunView, encode
from dbtstream.nats_link import NatsLink
from dbtstream.statuses import PASSED, RunStatus
from dbtstream.store import Store
from dbtstream.subjects import H_MSG_ID, H_RUN_ID, RUNS_STREAM, new_run_id, runs_subject
from tests.acceptance.conftest import COMMAND, ENVIRONMENT
from tests.guarantees import check_run

POLL_S = 0.02
LIMIT_S = 120.0
"""For what ends in seconds on a machine that does nothing else."""

TIMINGS: dict[str, Any] = {
    "heartbeat_s": 0.5,
    "ack_wait_s": 3.0,
    "lease_ttl_s": 4,
    "cancel_grace_s": 2.0,
    "kill_grace_s": 2.0,
    "drain_timeout_s": 0.0,
    "max_attempts": 20,
}
"""Of a worker whose death is to be noticed soon."""


async def until(fact: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """For facts that nothing announces: a line in a file, a process in /proc."""
    async with asyncio.timeout(limit_s):
        while not await asyncio.to_thread(fact):  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)


# -- daemons ---------------------------------------------------------------------------------


def write_config(
    folder: Path,
    server: NatsServer | Sequence[str],
    name: str,
    *,
    projects: dict[str, dict[str, Any]],
    limits: dict[str, int] | None = None,
    nats: dict[str, Any] | None = None,
    streams: dict[str, Any] | None = None,
    **worker: Any,
) -> Path:
    """`<folder>/<name>.toml`: a worker with a state directory of its own. Keys are dbtstream's.

    The state directory is where a daemon's life is: the same config again is the same worker.
    """
    servers = [server.url] if isinstance(server, NatsServer) else list(server)
    tables = {
        "nats": {"servers": servers, "reconnect_wait_s": 0.05} | (nats or {}),
        "streams": streams or {},
        "worker": TIMINGS | {"name": name, "state_dir": str(folder / f"state-{name}")} | worker,
        "http": {"listen": "127.0.0.1:0"},
        "limits": limits or {},
        "projects": projects,
    }
    path = folder / f"{name}.toml"
    # JSON's strings, numbers, booleans and lists are TOML's.
    path.write_text("\n".join(_table(key, table) for key, table in tables.items()))
    return path


def _table(name: str, table: dict[str, Any]) -> str:
    lines = [f"[{name}]"]
    inner = []
    for key, value in table.items():
        if isinstance(value, dict):
            inner.append(_table(f"{name}.{json.dumps(key)}", value))
        else:
            lines.append(f"{json.dumps(key)} = {json.dumps(value)}")
    return "\n".join([*lines, *inner, ""])


class Serve:
    """One worker: a config, and the process that serves it, if any."""

    def __init__(self, config: Path) -> None:
        self.config = config
        self.name = config.stem
        self.process: asyncio.subprocess.Process | None = None
        self._logs: list[Path] = []

    async def launch(self) -> None:
        """Start the process, and no more: it may be killed before it is ready."""
        assert not self.is_alive
        self._logs.append(self.config.with_suffix(f".{len(self._logs)}.log"))
        with self._logs[-1].open("wb") as output:
            self.process = await asyncio.create_subprocess_exec(
                *COMMAND,
                "--config",
                str(self.config),
                "serve",
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                env=ENVIRONMENT,
            )

    async def start(self) -> None:
        await self.launch()
        await self.until_log("serving")

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.returncode is None

    @property
    def log(self) -> str:
        """Of the process of now, or of the last one."""
        return self._logs[-1].read_text(encoding="utf-8") if self._logs else ""

    @property
    def whole_log(self) -> str:
        return "".join(path.read_text(encoding="utf-8") for path in self._logs)

    @property
    def peak_rss(self) -> int:
        """The most memory that it ever had resident, in bytes."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    async def until_log(self, text: str) -> None:
        def told() -> bool:
            assert self.is_alive, self.log
            return text in self.log

        await until(told)

    async def kill(self) -> None:
        """SIGKILL: what an OOM killer, a power cut or a lost node does."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()

    def freeze(self) -> None:
        """SIGSTOP of the daemon alone: its dbt goes on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    async def stop(self) -> None:
        """SIGTERM, twice; then SIGKILL. Safe to call when it has gone."""
        if self.process is None or self.process.returncode is not None:
            return
        self.thaw()
        try:
            for _ in range(2):
                with contextlib.suppress(ProcessLookupError):
                    self.process.terminate()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(20):
                        await self.process.wait()
                        return
        finally:
            await self.kill()


@asynccontextmanager
async def serving(*configs: Path) -> AsyncIterator[list[Serve]]:
    """A worker per config, all of them ready; whichever is alive at the end is ended."""
    daemons = [Serve(config) for config in configs]
    try:
        for daemon in daemons:
            await daemon.start()
        yield daemons
    finally:
        await asyncio.gather(*(daemon.stop() for daemon in daemons))


# -- runs ------------------------------------------------------------------------------------


@asynccontextmanager
async def linked(server: NatsServer | Sequence[str]) -> AsyncIterator[NatsLink]:
    """A connection of the test's own, which outlives any outage."""
    urls = (server.url,) if isinstance(server, NatsServer) else tuple(server)
    async with NatsLink(NatsConfig(servers=urls, reconnect_wait_s=0.05), name="fault test") as link:
        await link.wait_connected(30)
        yield link


async def submit(link: NatsLink, project: str = "shop", target: str = "dev", **request: Any) -> str:
    """A request in the queue, stored when this returns; no daemon need be there. The run's id."""
    run_id = new_run_id(datetime.now(UTC))
    body = encode(RunRequest(**{"args": ["build"], **request}))
    headers = {H_RUN_ID: run_id, H_MSG_ID: request.get("request_id") or run_id}
    await link.publish_until_stored(runs_subject(project, target), body, headers)
    return run_id


@dataclass(frozen=True)
class Ended:
    """A run that is over: its events, its state, and its request has left the queue."""

    events: list[AnyEvent]
    view: RunView

    @property
    def verdict(self) -> RunFinished:
        last = self.events[-1]
        assert isinstance(last, RunFinished)
        return last

    @property
    def succeeded(self) -> dict[int, set[str]]:
        """By attempt, the nodes that passed in it."""
        passed: dict[int, set[str]] = {}
        for event in self.events:
            if isinstance(event, NodeFinished) and event.status in PASSED:
                passed.setdefault(event.attempt, set()).add(event.node.unique_id)
        return passed


async def ended(link: NatsLink, run_id: str, *, limit_s: float = LIMIT_S) -> Ended:
    """All of a run, when it has ended and its request is settled."""
    store = Store(link)
    async with asyncio.timeout(limit_s):
        events = [event async for event in Client(link).events(run_id=run_id)]
        await queue_empty(link)
        stored = await store.get_run(run_id)
    assert stored is not None, "its request was settled, and it has no state"
    return Ended(events, stored[0])


async def queue_empty(link: NatsLink) -> None:
    """Requests are settled after their end is told."""
    while (await link.js.stream_info(RUNS_STREAM)).state.messages:  # noqa: ASYNC110
        await asyncio.sleep(POLL_S)


def judge(run: Ended, *, status: RunStatus = RunStatus.SUCCESS, node_count: int) -> None:
    """The guarantees over all attempts; each node once in the verdict; nothing done twice."""
    check_run(run.events)
    verdict = run.verdict
    assert (verdict.status, run.view.status) == (status, status), (verdict, run.view)
    assert (run.view.attempt, run.view.last_seq) == (verdict.attempt, verdict.seq)
    assert sum(sum(counts.values()) for counts in verdict.counts.values()) == node_count
    done: set[str] = set()
    for attempt in range(1, verdict.attempt + 1):
        again = done & {
            event.node.unique_id
            for event in run.events
            if isinstance(event, NodeStarted) and event.attempt == attempt
        }
        assert not again, f"done before, and done again in attempt {attempt}: {again}"
        done |= run.succeeded.get(attempt, set())
    if status is RunStatus.SUCCESS:
        assert len(done) == node_count


async def verify(server: NatsServer | Sequence[str], run_id: str) -> dict[str, Any]:
    """`dbtstream verify RUN --json` as a user runs it; fails on any difference."""
    urls = server.url if isinstance(server, NatsServer) else ",".join(server)
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        "--nats",
        urls,
        "verify",
        run_id,
        "--json",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=ENVIRONMENT,
    )
    async with asyncio.timeout(LIMIT_S):
        out, err = await process.communicate()
    assert process.returncode == 0, (out + err).decode()
    found: dict[str, Any] = msgspec.json.decode(out)
    assert found["agrees"]
    return found
