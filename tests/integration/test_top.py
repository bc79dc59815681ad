"""`dbtstream top` and what it asks: daemons with scripted children on a real nats-server.

The live view is tried on a pseudo-terminal: the command as a person types it.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import pty
import re
import signal
import struct
import sys
import termios
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dbtstream.client import Client
from dbtstream.config import Config, NatsConfig
from dbtstream.embedded import NatsServer
from dbtstream.events import AnyEvent, NodeFinished, RunFinished, RunRejected
from dbtstream.logs import JsonFormatter
from dbtstream.messages import ControlError, RunList, decode_reply
from dbtstream.nats_connection import NatsConnection
from dbtstream.statuses import RunStatus
from dbtstream.subjects import CONTROL_STATUS
from dbtstream.top_commands import FleetWatch
from tests.daemons import Served, daemon_config, serving
from tests.scripted_child import GOOD_RUN

LIMIT_S = 60
TRACE = "0af7651916cd43dd8448eb211c80319c"

Until = Callable[[Callable[[], object]], Awaitable[None]]


def stepwise(tmp_path: Path) -> str:
    """A run of three models: the second waits for the file `second`, the end for `end`."""
    return f"""
        start_line()
        hello()
        plan(model("orders"), model("customers"), model("late"))
        started("orders")
        finished("orders")
        started("customers")
        wait_for({str(tmp_path / "second")!r})
        finished("customers", "error", message="no such table: raw_customers")
        started("late")
        wait_for({str(tmp_path / "end")!r})
        finished("late")
        result(1, [("orders", "success"), ("customers", "error"), ("late", "success")])
    """


@contextlib.asynccontextmanager
async def watched(served: Served, **only: Any) -> AsyncIterator[FleetWatch]:
    """Looked at, live, for as long as the block lasts."""
    watch = FleetWatch(served.client, project=only.get("project"), target=only.get("target"))
    looking = asyncio.create_task(watch.look_on())
    try:
        yield watch
    finally:
        looking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await looking


def runs_of(watch: FleetWatch) -> list[Any]:
    return watch.fleet.view(now()).runs


def now() -> datetime:
    return datetime.now(UTC)


# -- what workers say ------------------------------------------------------------------------


async def test_every_worker_says_how_it_is_and_how_far_its_runs_are(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = daemon_config(tmp_path / "a", nats_config, stepwise(tmp_path), name="etl-1", slots=2)
    second = daemon_config(tmp_path / "b", nats_config, stepwise(tmp_path), name="etl-2", slots=3)
    async with serving(first) as served, serving(second):
        accepted = await served.client.submit("shop", ["build"], target="dev")
        running: list[Any] = []

        async with asyncio.timeout(LIMIT_S):
            while not (running and running[0].done == 1 and running[0].nodes):
                workers = await served.client.workers()
                running = [run for worker in workers for run in worker.runs]
        (tmp_path / "second").touch()
        (tmp_path / "end").touch()
        await served.client.wait(accepted.run_id, timeout_s=LIMIT_S)

    assert [(worker.worker, worker.slots) for worker in workers] == [("etl-1", 2), ("etl-2", 3)]
    assert sum(worker.used for worker in workers) == 1
    (run,) = running
    assert (run.run_id, run.status, run.attempt) == (accepted.run_id, RunStatus.RUNNING, 1)
    assert (run.done, run.total, run.by_status, run.running) == (1, 3, {"success": 1}, 1)
    assert [node.unique_id for node in run.nodes] == ["model.shop.customers"]
    assert run.last_seq > 4


async def test_nobody_answers_where_no_worker_is(nats_config: NatsConfig) -> None:
    async with Client.connect(config=nats_config) as client:
        assert list(await client.workers()) == []


async def test_a_worker_refuses_a_question_that_it_does_not_know(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    """As every request with an unknown key; and it answers no subject that means something."""
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN)) as served:
        answer = await served.link.request(CONTROL_STATUS, b'{"colour": "red"}')
        reply = decode_reply(answer.data)
        assert isinstance(reply, ControlError)
        assert reply.code == "bad_message"
        assert "colour" in reply.message
        heard = await served.link.client.subscribe("dbt.events.>")
        await served.link.client.publish(CONTROL_STATUS, b"", reply="dbt.events.x")
        await served.client.workers()  # the worker has seen both by now
        assert heard.pending_msgs == 0


async def test_a_draining_worker_says_so(
    tmp_path: Path, nats_config: NatsConfig, until: Until
) -> None:
    config = daemon_config(tmp_path, nats_config, stepwise(tmp_path), drain_timeout_s=60.0)
    async with serving(config) as served:
        accepted = await served.client.submit("shop", ["build"], target="dev")
        worker = served.daemon.worker
        assert worker is not None
        await until(lambda: accepted.run_id in worker.executions)
        served.daemon.stop()
        async with asyncio.timeout(LIMIT_S):
            while not (await served.client.workers())[0].draining:
                pass
        (tmp_path / "second").touch()
        (tmp_path / "end").touch()


async def test_the_list_says_since_when_the_oldest_request_waits(
    tmp_path: Path, nats_config: NatsConfig, until: Until
) -> None:
    config = daemon_config(tmp_path, nats_config, stepwise(tmp_path))
    async with serving(config) as served:
        running = await served.client.submit("shop", ["build"], target="dev")
        worker = served.daemon.worker
        assert worker is not None
        await until(lambda: running.run_id in worker.executions)
        first = await served.client.submit("shop", ["build"], target="dev")
        await served.client.submit("shop", ["build"], target="dev")
        # What no worker serves waits, too, and no consumer counts it.
        await served.publish("dbt.runs.other.prod", b'{"args": ["build"]}')
        listed: RunList = await served.client.list()
        stored = {view.run_id: view.queued_at for view in listed.runs}

        assert listed.waiting["shop.dev"] == 2
        since, queued_at = listed.waiting_since["shop.dev"], stored[first.run_id]
        assert queued_at is not None
        assert abs((since - queued_at).total_seconds()) < 5
        assert set(listed.waiting_since) == set(listed.waiting)
        (tmp_path / "second").touch()
        (tmp_path / "end").touch()


# -- looking on ------------------------------------------------------------------------------


async def test_what_is_seen_follows_a_run_to_its_end(
    tmp_path: Path, nats_config: NatsConfig, until: Until
) -> None:
    config = daemon_config(tmp_path, nats_config, stepwise(tmp_path))
    async with serving(config) as served, watched(served) as watch:
        accepted = await served.client.submit("shop", ["build"], target="dev")
        await until(lambda: [run.done for run in runs_of(watch)] == [1])
        (tmp_path / "second").touch()
        await until(lambda: [run.by_status.get("error") for run in runs_of(watch)] == [1])
        (failure,) = watch.fleet.view(now()).failures
        assert (failure.name, failure.message) == ("customers", "no such table: raw_customers")
        await until(lambda: [n.name for run in runs_of(watch) for n in run.nodes] == ["late"])
        (tmp_path / "end").touch()
        await until(lambda: not runs_of(watch))
        (ended,) = watch.fleet.view(now()).ended
        assert (ended.run_id, ended.status) == (accepted.run_id, RunStatus.FAILURE)


async def test_failures_from_before_are_found(tmp_path: Path, nats_config: NatsConfig) -> None:
    (tmp_path / "second").touch()
    (tmp_path / "end").touch()
    async with serving(daemon_config(tmp_path, nats_config, stepwise(tmp_path))) as served:
        events = await served.run()
        failed = next(e for e in events if isinstance(e, NodeFinished) and e.status == "error")
        await served.queue_empty()
        watch = FleetWatch(served.client, project="shop", target=None)
        await watch.look_once()
        view = watch.fleet.view(now())
        assert [(row.at, row.name) for row in view.failures] == [(failed.time, "customers")]
        other = FleetWatch(served.client, project="crm", target=None)
        await other.look_once()
        assert other.fleet.view(now()).failures == []


async def test_an_outage_of_nats_is_seen_and_what_comes_after_it(
    tmp_path: Path, nats_server: NatsServer, nats_config: NatsConfig, until: Until
) -> None:
    config = daemon_config(tmp_path, nats_config, stepwise(tmp_path))
    async with serving(config) as served, watched(served) as watch:
        await served.client.submit("shop", ["build"], target="dev")
        await until(lambda: [run.done for run in runs_of(watch)] == [1])
        await until(lambda: watch.fleet.view(now()).workers)

        await nats_server.kill()
        await until(lambda: watch.connection().away_since is not None)
        assert [run.done for run in runs_of(watch)] == [1]
        assert watch.fleet.view(now()).workers[0].silent_s is None

        await nats_server.restart()
        await until(lambda: watch.connection().away_since is None)
        (tmp_path / "second").touch()
        await until(lambda: [run.by_status.get("error") for run in runs_of(watch)] == [1])
        (tmp_path / "end").touch()
        await until(lambda: not runs_of(watch))


async def test_live_events_go_on_over_a_new_connection(
    tmp_path: Path, nats_server: NatsServer, nats_config: NatsConfig, until: Until
) -> None:
    """nats-py closes its client for good on some errors; a new one has no subscriptions."""
    heard: list[AnyEvent] = []
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN)) as served:
        link: NatsConnection = served.client._link
        async with served.client.live(heard.append, project="shop", target={"dev", "prod"}):
            events = await served.run()
            await until(lambda: any(isinstance(event, RunFinished) for event in heard))
            ours = [e for e in events if e.family in ("run", "node")]
            assert [e.event_id for e in heard] == [e.event_id for e in ours]
            generation = link.generation
            await link.client.close()
            await until(lambda: link.generation > generation and link.connected)
            heard.clear()
            await served.run()
            await until(lambda: any(isinstance(event, RunFinished) for event in heard))


async def test_without_a_daemon_the_view_waits_for_one(
    tmp_path: Path, nats_config: NatsConfig, until: Until
) -> None:
    async with Client.connect(config=nats_config) as client:
        watch = FleetWatch(client, project=None, target=None)
        looking = asyncio.create_task(watch.look_on())
        await until(lambda: watch.connection().problem)
        assert "no dbtstream daemon answers" in str(watch.connection().problem)
        async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN)):
            await until(lambda: watch.fleet.view(now()).workers)
            await until(lambda: watch.connection().problem is None)
        looking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await looking


# -- the terminal ----------------------------------------------------------------------------


class Terminal:
    """A pseudo-terminal with a command in it, and what the command wrote there."""

    def __init__(self, process: asyncio.subprocess.Process, master: int) -> None:
        self.process, self._master = process, master
        self.written = ""
        asyncio.get_running_loop().add_reader(master, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._master, 65536)
        except OSError:  # the command has closed its end
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._master)
        self.written += data.decode(errors="replace")

    @property
    def frame(self) -> str:
        """What is on the screen: all since the cursor was last put at the top."""
        last = self.written.rpartition("\x1b[H")[2]
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last).replace("\r\n", "\n")

    @property
    def frames(self) -> int:
        return self.written.count("\x1b[H")


@contextlib.asynccontextmanager
async def terminal(config: Config, *words: str) -> AsyncIterator[Terminal]:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 80, 0, 0))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from dbtstream.cli import main; main()"),
        *("--nats", config.nats.servers[0], *words),
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "30"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    shown = Terminal(process, master)
    try:
        yield shown
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        asyncio.get_running_loop().remove_reader(master)
        os.close(master)


async def test_the_live_view_changes_when_a_run_goes_on_and_ctrl_c_leaves_the_terminal_as_it_was(
    tmp_path: Path, nats_config: NatsConfig, until: Until
) -> None:
    config = daemon_config(tmp_path, nats_config, stepwise(tmp_path))
    async with serving(config) as served, terminal(config, "top") as shown:
        await until(lambda: "nothing runs" in shown.frame)
        await served.client.submit("shop", ["build"], target="dev")
        await until(lambda: re.search(r"1/3[^\n]*\n *model customers", shown.frame))
        assert "\x1b[?1049h" in shown.written
        (tmp_path / "second").touch()
        await until(lambda: "2/3" in shown.frame)
        await until(lambda: re.search(r"customers +error +no such table", shown.frame))
        (tmp_path / "end").touch()
        await until(lambda: re.search(r"shop\.dev +\w{8} +failure", shown.frame))
        assert all(len(line) <= 80 for line in shown.frame.split("\n"))

        shown.process.send_signal(signal.SIGINT)
        async with asyncio.timeout(LIMIT_S):
            assert await shown.process.wait() == 0
        await until(lambda: "\x1b[?1049l" in shown.written)
        assert "Traceback" not in shown.written
        assert shown.written.endswith("\x1b[?25h\x1b[?1049l")  # the cursor is there again


async def test_a_burst_of_events_is_drawn_four_times_a_second_at_the_most(
    tmp_path: Path, nats_config: NatsConfig, until: Until
) -> None:
    """However many there are. The frames are counted between two that are a known time apart."""
    body = f"""
        start_line()
        hello()
        plan(*[model(f"n{{i}}") for i in range(2000)])
        for i in range(2000):
            started(f"n{{i}}")
            finished(f"n{{i}}")
        wait_for({str(tmp_path / "end")!r})
        result(0, [(f"n{{i}}", "success") for i in range(2000)])
    """
    config = daemon_config(tmp_path, nats_config, body)
    async with serving(config) as served, terminal(config, "top") as shown:
        await until(lambda: "nothing runs" in shown.frame)
        began, before = asyncio.get_running_loop().time(), shown.frames
        await served.client.submit("shop", ["build"], target="dev")
        await until(lambda: "2000/2000" in shown.frame)
        took_s = asyncio.get_running_loop().time() - began
        assert shown.frames - before <= 4 * took_s + 2
        (tmp_path / "end").touch()


# -- trace ids in log lines ------------------------------------------------------------------


class Lines(logging.Handler):
    """Formats when a line is logged, as the handler of `dbtstream serve` does."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))

    def of(self, action: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("action") == action]


@pytest.fixture
def said() -> Iterator[Lines]:
    lines = Lines()
    ours = logging.getLogger("dbtstream")
    level = ours.level
    ours.addHandler(lines)
    ours.setLevel("DEBUG")
    yield lines
    ours.removeHandler(lines)
    ours.setLevel(level)


async def test_lines_about_a_run_have_the_ids_of_its_events(
    tmp_path: Path, nats_config: NatsConfig, said: Lines
) -> None:
    """Also of those that are rejected; and two runs at one time are not mixed up."""
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN)) as served:
        request = msgspec.json.encode({"args": ["build"]})
        asked = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
        async with served.client.events(family="run") as events:
            await served.publish("dbt.runs.shop.dev", request, **asked)
            await served.publish("dbt.runs.shop.prod", request)
            await served.publish("dbt.runs.shop.dev", b"no json", **asked)
            ends: list[AnyEvent] = []
            async with asyncio.timeout(LIMIT_S):
                async for event in events:
                    if isinstance(event, RunFinished | RunRejected):
                        ends.append(event)
                    if len(ends) == 3:
                        break
        await served.queue_empty()

    lines = said.of("run.finished") + said.of("request.rejected")
    assert sorted((x["run_id"], x["trace_id"], x["span_id"]) for x in lines) == sorted(
        (event.run_id, event.trace_id, event.span_id) for event in ends
    )
    assert {line["trace_id"] for line in lines} > {TRACE}
    assert all("trace_id" not in line for line in said.of("daemon.ready"))
