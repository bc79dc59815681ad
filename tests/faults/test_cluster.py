"""Many requests on several workers and three nats-servers, one of which dies on the way."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dbtstream.client import Client
from dbtstream.events import AnyEvent, RunFinished, RunStarted
from dbtstream.nats_link import NatsLink
from dbtstream.store import Store
from tests.faults.children import NODE_COUNT, Children
from tests.faults.cluster import REPLICAS, Cluster, cluster
from tests.faults.conftest import Figure
from tests.faults.form import form, lots
from tests.faults.harness import (
    LIMIT_S,
    POLL_S,
    Ended,
    Serve,
    judge,
    linked,
    queue_empty,
    serving,
    submit,
    until,
    write_config,
)

REQUESTS = form(20, 200)
PROJECTS = [f"p{number}" for number in range(5)]
TARGETS = ["dev", "prod"]
SLOTS = 3
NOTICED: dict[str, dict[str, Any]] = {
    "server": {"lease_ttl_s": 40, "ack_wait_s": 6.0, "heartbeat_s": 2.0},  # a new leader: 4-10 s
    "worker": {"lease_ttl_s": 6, "ack_wait_s": 3.0, "heartbeat_s": 0.5},
}
"""How soon a silent worker counts as dead."""


def configs(folder: Path, nats: Cluster, children: Children, count: int, dies: str) -> list[Path]:
    return [
        write_config(
            folder,
            nats.urls,
            f"w{number}",
            projects={project: children.table(project, TARGETS) for project in PROJECTS},
            streams={"replicas": REPLICAS},
            slots=SLOTS,
            **NOTICED[dies],
        )
        for number in range(count)
    ]


async def submit_all(link: NatsLink) -> dict[str, tuple[str, int]]:
    """Run id -> its `<project>.<target>` and its number; in order."""
    wheres = [(project, target) for target in TARGETS for project in PROJECTS]
    runs = {}
    for number in range(REQUESTS):
        project, target = wheres[number % len(wheres)]
        args = ["build", "--select", str(number)]
        run_id = await submit(link, project, target, args=args)
        runs[run_id] = (f"{project}.{target}", number)
    return runs


class Log:
    """All events as they are stored, by run."""

    def __init__(self) -> None:
        self.events: dict[str, list[AnyEvent]] = {}
        self.finished = 0
        self._more = asyncio.Condition()

    async def read(self, link: NatsLink) -> None:
        async for event in Client(link).events(since="all"):
            self.events.setdefault(event.run_id, []).append(event)
            async with self._more:
                self.finished += isinstance(event, RunFinished)
                self._more.notify_all()

    async def until_finished(self, count: int) -> None:
        async with asyncio.timeout(form(LIMIT_S, 900.0)), self._more:
            await self._more.wait_for(lambda: self.finished >= count)


async def ended(link: NatsLink, run_id: str, events: list[AnyEvent]) -> Ended:
    store = Store(link)
    async with asyncio.timeout(LIMIT_S):
        stored = await store.get_run(run_id)
        while stored is None or not stored[0].status.is_terminal:
            await asyncio.sleep(POLL_S)
            stored = await store.get_run(run_id)
    return Ended(events, stored[0])


async def kill_worker(draw: Random, daemons: list[Serve], children: Children) -> None:
    """While a dbt of its own is at work."""
    victim = draw.choice(daemons)
    assert victim.process is not None
    pid = victim.process.pid
    await until(lambda: children.now(pid))
    await victim.kill()


def told(log: Log, daemons: Sequence[Serve], overlaps: int) -> str:
    attempts = Counter(len(_starts(events)) for events in log.events.values())
    by_worker = Counter(start.worker for events in log.events.values() for start in _starts(events))
    return (
        f"{log.finished} runs on {len(daemons)} workers; runs by children {dict(attempts)}, "
        f"children by worker {dict(sorted(by_worker.items()))}, {overlaps} overlaps"
    )


def _starts(events: list[AnyEvent]) -> list[RunStarted]:
    return [event for event in events if isinstance(event, RunStarted)]


@pytest.mark.timeout(form(180, 1800))
@pytest.mark.parametrize("dies", ["server", "worker"])
@pytest.mark.parametrize("workers", form([2], [2, 4]))
async def test_each_target_has_its_runs_in_order_and_one_at_a_time_whoever_dies(
    tmp_path: Path, workers: int, dies: str, figure: Figure
) -> None:
    """One of three nats-servers, or one of the workers, is killed a third of the way, for good."""
    draw, children, log = lots(f"cluster {workers} {dies}"), Children(tmp_path / "dbt"), Log()
    async with (
        cluster(tmp_path / "nats") as nats,
        linked(nats.urls) as link,
        serving(*configs(tmp_path, nats, children, workers, dies)) as daemons,
    ):
        reading = asyncio.create_task(log.read(link))
        try:
            runs = await submit_all(link)
            await log.until_finished(REQUESTS // 3)
            if dies == "server":
                await draw.choice(nats.servers).kill()
            else:
                await kill_worker(draw, daemons, children)
            await log.until_finished(REQUESTS)
            await queue_empty(link)
        finally:
            reading.cancel()
            figure(told(log, daemons, len(children.overlaps)))
        for run_id in runs:
            judge(await ended(link, run_id, log.events[run_id]), node_count=NODE_COUNT)

    assert set(log.events) == set(runs)
    assert children.overlaps == []
    wanted: dict[str, list[int]] = {}
    for where, number in runs.values():
        wanted.setdefault(where, []).append(number)
    assert children.order() == wanted
    pids = [daemon.process.pid for daemon in daemons if daemon.process is not None]
    # A child that outlives its worker for a moment is somebody else's: init's, or a subreaper's.
    others = {line.worker for line in children.lines} - set(pids)
    assert len(others) <= (dies == "worker"), f"children of nobody: {others}"
    assert all(children.most_at_once(pid) <= SLOTS for pid in pids)
