"""NATS goes away or freezes while dbt builds: when dbt has to stop (`cut_off`), and what is kept.

Real dbt where its deadline is the point: that is kept by the real child only.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from nats.js.api import RawStreamMsg

from dbtstream.config import Config, NatsConfig, ProjectConfig, WorkerConfig
from dbtstream.embedded import NatsServer
from dbtstream.events import (
    AnyEvent,
    Gap,
    LogLine,
    NodeFinished,
    NodeStarted,
    RunFinished,
    RunLeased,
    RunStarted,
)
from dbtstream.frames import clock_s
from dbtstream.nats_link import NatsLink
from dbtstream.statuses import NodeStatus, Reason, RunStatus
from dbtstream.subjects import EVENTS_STREAM
from tests.daemons import Served, daemon_config, serving
from tests.dbt_projects import PYTHON, SLOW, write_project
from tests.guarantees import check_run

TTL_S = 3

Until = Callable[[Callable[[], object]], Awaitable[None]]
Stored = Callable[[NatsLink, str], Awaitable[list[RawStreamMsg]]]

WAITING = """
import os, threading, time

from dbt.adapters.duckdb.plugins import BasePlugin

class Plugin(BasePlugin):
    def configure_cursor(self, cursor):
        # dbt looks for tables from its main thread and an executor's, and runs nodes in others.
        if threading.current_thread().name.startswith("Thread-"):
            while not os.path.exists({go!r}):
                time.sleep(0.01)
"""
"""No node is done before the test has made a file."""


class Dbt:
    """A real project, and when it may get done."""

    def __init__(self, folder: Path, nats: NatsConfig) -> None:
        self.go = folder / "go"
        self._folder, self._nats = folder, nats

    def let_go(self) -> None:
        self.go.touch()

    def slow(self, cut_off: Any) -> Config:
        """`orders`, then `slow`: a query of minutes, unless it is let go before it begins."""
        looking = f"from glob('{self.go}') select count(*)"
        slow = (
            "-- depends_on: {{ ref('orders') }}\n{{ config(materialized='table') }}"
            f'{{% set go = run_query("{looking}").columns[0].values()[0] if execute else 1 %}}'
            f"{{% if go %}} select 1 as total {{% else %}} {SLOW} {{% endif %}}"
        )
        return self._config(cut_off, {"models/slow.sql": slow}, [])

    def waiting(self, cut_off: Any) -> Config:
        """`orders`, which ends when it is let go."""
        files = {"dbt_waiting.py": WAITING.format(go=str(self.go))}
        return self._config(cut_off, files, [{"module": "dbt_waiting"}])

    def _config(self, cut_off: Any, files: dict[str, str], plugins: list[dict[str, str]]) -> Config:
        orders = "{{ config(materialized='table') }} select 1 as id"
        root = write_project(self._folder / "shop", {"models/orders.sql": orders, **files})
        path = str(self._folder / "shop.duckdb")
        output = {"type": "duckdb", "path": path, "threads": 1, "plugins": plugins}
        profiles = {"shop": {"target": "dev", "outputs": {"dev": output}}}
        (root / "profiles.yml").write_text(json.dumps(profiles))
        return Config(
            nats=self._nats,
            worker=WorkerConfig(
                name="tester",
                state_dir=str(self._folder / "state"),
                lease_ttl_s=TTL_S,
                heartbeat_s=0.5,
                ack_wait_s=3.0,
                cut_off=cut_off,
                cancel_grace_s=1.0,
                kill_grace_s=1.0,
            ),
            projects={
                "shop": ProjectConfig(
                    path=str(root),
                    targets=("dev",),
                    python=PYTHON,
                    env={"DBT_SEND_ANONYMOUS_USAGE_STATS": "0", "PYTHONPATH": str(root)},
                )
            },
            source="test",
        )


@pytest.fixture
def dbt(tmp_path: Path, nats_config: NatsConfig) -> Dbt:
    return Dbt(tmp_path, nats_config)


async def begun(served: Served, node: str) -> tuple[str, int]:
    """A run whose dbt is at that node: its id, and dbt's pid."""
    run = await served.client.submit("shop", ["build"])
    pid = 0
    async with asyncio.timeout(60):
        async for event in served.client.events(run_id=run.run_id):
            if isinstance(event, RunStarted):
                pid = event.pid or 0
            if isinstance(event, NodeStarted) and event.node.name == node:
                return run.run_id, pid
    raise AssertionError(f"the run ended without {node}")


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def past_the_lease(until: Until, pid: int) -> None:
    """No renewal has come through for longer than the lease lives, and dbt is there."""
    over = clock_s() + 1.5 * TTL_S
    await until(lambda: clock_s() > over)
    assert is_alive(pid)


def leases(events: list[AnyEvent]) -> list[tuple[str, str | None]]:
    return [(event.cause, event.decision) for event in events if isinstance(event, RunLeased)]


def ends(events: list[AnyEvent], attempt: int) -> dict[str, tuple[NodeStatus, Reason | None]]:
    return {
        event.node.name: (event.status, event.reason)
        for event in events
        if isinstance(event, NodeFinished) and event.attempt == attempt
    }


def verdict(events: list[AnyEvent]) -> RunFinished:
    check_run(events)
    assert isinstance(events[-1], RunFinished)
    return events[-1]


async def stored_once(served: Served, stored: Stored, events: list[AnyEvent]) -> None:
    messages = await stored(served.link, EVENTS_STREAM)
    ids = [(message.headers or {})["Nats-Msg-Id"] for message in messages]
    assert ids == [event.event_id for event in events]


@pytest.mark.parametrize("cut_off", ["stop", "auto"])
async def test_dbt_stops_by_its_deadline_when_nats_freezes_and_goes_on_when_it_is_back(
    nats_server: NatsServer, dbt: Dbt, until: Until, stored: Stored, cut_off: str
) -> None:
    """A frozen server may be one that only we cannot reach: somebody else could have the lease."""
    async with serving(dbt.slow(cut_off)) as served:
        run_id, pid = await begun(served, "slow")
        nats_server.pause()
        await until(lambda: not is_alive(pid))
        dbt.let_go()
        nats_server.resume()
        events = await served.events(run_id)
        await served.link.wait_connected(30)
        await served.queue_empty()
        view = await served.client.get(run_id)
        await stored_once(served, stored, events)

    end = verdict(events)
    assert (end.status, end.attempts, end.exit_code) == (RunStatus.SUCCESS, 2, 0)
    assert (view.status, view.attempt) == (RunStatus.SUCCESS, 2)
    assert leases(events) == [("first", None), ("handed_over", "resume")]
    assert {event.worker for event in events} == {"tester"}
    assert ends(events, 1) == {
        "orders": (NodeStatus.SUCCESS, None),
        "slow": (NodeStatus.CANCELLED, Reason.HANDED_OVER),
    }
    assert ends(events, 2) == {"slow": (NodeStatus.SUCCESS, None)}


async def test_dbt_goes_on_while_no_nats_server_is_there(
    nats_server: NatsServer, dbt: Dbt, until: Until, stored: Stored
) -> None:
    """cut_off = "auto": killed for longer than the lease lives, and dbt ends meanwhile."""
    async with serving(dbt.waiting("auto")) as served:
        run_id, pid = await begun(served, "orders")
        await nats_server.kill()
        await past_the_lease(until, pid)
        dbt.let_go()
        await until(lambda: not is_alive(pid))
        await nats_server.restart()
        events = await served.events(run_id)
        await served.link.wait_connected(30)
        await served.queue_empty()
        await stored_once(served, stored, events)

    end = verdict(events)
    assert (end.status, end.attempts) == (RunStatus.SUCCESS, 1)
    assert leases(events) == [("first", None)]


async def test_dbt_goes_on_under_a_frozen_nats_where_that_is_asked_for(
    nats_server: NatsServer, dbt: Dbt, until: Until, stored: Stored
) -> None:
    """cut_off = "go_on", for those who have one worker only."""
    async with serving(dbt.waiting("go_on")) as served:
        run_id, pid = await begun(served, "orders")
        nats_server.pause()
        await past_the_lease(until, pid)
        dbt.let_go()
        await until(lambda: not is_alive(pid))
        nats_server.resume()
        events = await served.events(run_id)
        await served.link.wait_connected(30)
        await served.queue_empty()
        await stored_once(served, stored, events)

    end = verdict(events)
    assert (end.status, end.attempts) == (RunStatus.SUCCESS, 1)
    assert leases(events) == [("first", None)]


async def test_what_no_outbox_had_room_for_is_told_in_gaps_and_nodes_never_are(
    tmp_path: Path, nats_server: NatsServer, nats_config: NatsConfig, until: Until
) -> None:
    """NATS is away, and dbt says far more than `outbox_max_bytes`."""
    go, done = tmp_path / "go", tmp_path / "done"
    body = f"""
        start_line()
        hello()
        nodes = [f"m{{i:03}}" for i in range(100)]
        plan(*map(model, nodes))
        started(nodes[0])
        wait_for({str(go)!r})
        finished(nodes[0])
        for name in nodes[1:]:
            started(name)
            for i in range(20):
                send("log", level="warn", code="Z", name="JinjaLogWarning", message="x" * 1000)
            finished(name)
        result(0, [(name, "success") for name in nodes])
        open({str(done)!r}, "w").close()
    """
    config = daemon_config(tmp_path, nats_config, body, outbox_max_bytes=500_000)
    async with serving(config) as served:
        run_id, _ = await begun(served, "m000")
        await nats_server.kill()
        Dbt(tmp_path, nats_config).let_go()
        await until(done.exists)
        await nats_server.restart()
        events = await served.events(run_id)

    assert verdict(events).status is RunStatus.SUCCESS
    assert len(ends(events, 1)) == 100
    gaps = [event for event in events if isinstance(event, Gap)]
    logs = [event for event in events if isinstance(event, LogLine)]
    assert gaps
    assert {(gap.dropped_family, gap.why) for gap in gaps} == {("log", "the outbox is full")}
    assert len(logs) + sum(gap.count for gap in gaps) == 99 * 20
    assert len(events) + sum(gap.count for gap in gaps) == events[-1].seq
