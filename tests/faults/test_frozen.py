"""SIGSTOP of nats-server and of a worker, for longer than a lease lasts, with another waiting.

What is frozen does not know it. dbt keeps its deadline by itself, so that two are never at one
target; who wakes up finds that it has nothing more to say.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from dbtstream.embedded import NatsServer
from dbtstream.nats_link import NatsLink
from dbtstream.store import Store
from tests.faults.conftest import Figure
from tests.faults.form import form, lots
from tests.faults.harness import (
    Ended,
    Serve,
    ended,
    judge,
    linked,
    serving,
    submit,
    verify,
    write_config,
)
from tests.faults.project import DOZEN, Warehouse
from tests.faults.recorder import Recorder

FREEZES = form(1, 20)
SPREAD_S = 5.0
RUNNING = 0.5
TTL_S = 3
"""Of the leases, and it takes the next worker as long again to be sure. dbt would take longer."""


class Site:
    """Two workers for one target, on one machine."""

    def __init__(self, tmp_path: Path, server: NatsServer) -> None:
        self.server = server
        self.recorder = Recorder(tmp_path / "recorder")
        self.warehouse = Warehouse(tmp_path / "shop", DOZEN)
        shop = self.warehouse.table(self.recorder)
        self.configs = [
            write_config(tmp_path, server, name, projects={"shop": shop}, lease_ttl_s=TTL_S)
            for name in ("w1", "w2")
        ]
        self.attempts: Counter[int] = Counter()

    async def moment(self, draw: Random, run_id: str, *, first: bool) -> float:
        """Wait for one in the life of a run, its start included; how long to freeze then.

        The first one is while dbt has most before it, so that nothing but its deadline ends it.
        """
        if first or draw.random() < RUNNING:
            await self.recorder.until_begun(run_id)
        await asyncio.sleep(draw.uniform(0.0, 1.0 if first else SPREAD_S))
        return draw.uniform(2.0 if first else 0.5, 2.5) * TTL_S

    async def check(self, run: Ended) -> None:
        judge(run, node_count=DOZEN.node_count)
        self.attempts[run.verdict.attempts] += 1
        await self.recorder.until_free("shop", "dev")
        assert self.recorder.overlaps == []
        assert self.warehouse.wrong() == []
        assert (await verify(self.server, run.view.run_id))["run_results"] == "compared"

    def __str__(self) -> str:
        return (
            f"{len(self.recorder.begun)} dbt processes in {self.attempts.total()} runs, runs by "
            f"attempts {dict(sorted(self.attempts.items()))}, no two at one target at once"
        )


@contextmanager
def frozen(what: Serve | NatsServer) -> Iterator[None]:
    """Inside, it does nothing and does not know it."""
    if isinstance(what, Serve):
        what.freeze()
    else:
        what.pause()
    try:
        yield
    finally:
        if isinstance(what, Serve):
            what.thaw()
        else:
            what.resume()


async def worker_of(link: NatsLink, run_id: str, daemons: list[Serve]) -> Serve:
    """The one that has the run, or the first while nobody has it."""
    stored = await Store(link).get_run(run_id)
    name = stored[0].worker if stored else None
    return next((daemon for daemon in daemons if daemon.name == name), daemons[0])


@pytest.mark.timeout(form(300, 7200))
async def test_a_frozen_broker_never_leads_to_two_dbt_processes(
    tmp_path: Path, nats_server: NatsServer, figure: Figure
) -> None:
    """It takes connections and answers nothing: nobody can tell whether the other one can."""
    site, draw = Site(tmp_path, nats_server), lots("frozen broker")
    async with serving(*site.configs), linked(nats_server) as link:
        for number in range(FREEZES):
            site.warehouse.empty()
            run_id = await submit(link)
            length_s = await site.moment(draw, run_id, first=number == 0)
            with frozen(nats_server):
                await asyncio.sleep(length_s)
            await site.check(await ended(link, run_id))
    figure(f"{FREEZES} freezes, {site}")


@pytest.mark.timeout(form(300, 7200))
async def test_a_frozen_worker_never_leads_to_two_dbt_processes(
    tmp_path: Path, nats_server: NatsServer, figure: Figure
) -> None:
    """Its dbt goes on without it, as far as the lease went; it wakes up to another's run."""
    site, draw = Site(tmp_path, nats_server), lots("frozen worker")
    async with serving(*site.configs) as daemons, linked(nats_server) as link:
        for number in range(FREEZES):
            site.warehouse.empty()
            run_id = await submit(link)
            length_s = await site.moment(draw, run_id, first=number == 0)
            with frozen(await worker_of(link, run_id, daemons)):
                await asyncio.sleep(length_s)
            await site.check(await ended(link, run_id))
        assert all(daemon.is_alive for daemon in daemons)
    figure(f"{FREEZES} freezes, {site}")
