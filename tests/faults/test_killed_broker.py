"""kill -9 of nats-server at any moment of a build, and an hour that it is away: dbt goes on."""

import asyncio
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from dbtstream.embedded import NatsServer
from dbtstream.events import NodeFinished
from tests.faults.conftest import Figure
from tests.faults.form import LONG, form, lots
from tests.faults.harness import Ended, ended, judge, linked, serving, submit, verify, write_config
from tests.faults.project import SIXTY, Warehouse
from tests.faults.recorder import Recorder

KILLS = form(2, 50)
GUESS_S = 7.0
"""The length of the first run; of the others it is that of the run before."""
AWAY_S = 1.5
"""At most, of a kill that is followed by a restart."""
OUTAGE_S = form(5.0, 60.0)
REST_S = 4.0
"""Of the outage, when dbt is done already: at least as long as a lease lasts."""


@dataclass
class Outages:
    """When NATS was away, in seconds since 1970."""

    spans: list[tuple[float, float]] = field(default_factory=list)

    def covers(self, at: float) -> bool:
        return any(begin < at < end for begin, end in self.spans)

    async def make(self, server: NatsServer, away_s: float) -> None:
        await server.kill()
        begin = time.time()
        await asyncio.sleep(away_s)
        self.spans.append((begin, time.time()))
        await server.restart()


def nodes_ended(run: Ended) -> list[float]:
    return [
        e.finished_at.timestamp()
        for e in run.events
        if isinstance(e, NodeFinished) and e.finished_at is not None
    ]


async def some_kills(server: NatsServer, outages: Outages, draw: Random, length_s: float) -> int:
    """One or two, at moments drawn by lot over the length of a run."""
    moments = sorted(draw.uniform(0.0, length_s) for _ in range(draw.choice((1, 2))))
    for before_s, moment_s in pairwise([0.0, *moments]):
        await asyncio.sleep(moment_s - before_s)
        await outages.make(server, draw.uniform(0.0, AWAY_S))
    return len(moments)


@pytest.mark.timeout(form(300, 7200))
@pytest.mark.parametrize("sync", ["always", "default"])
async def test_a_build_whose_broker_is_killed_at_any_moment_is_told_in_order_and_once(
    tmp_path: Path, figure: Figure, sync: str
) -> None:
    """In one attempt: dbt does not notice. `sync`: of the server's writes to disk."""
    recorder, warehouse = Recorder(tmp_path / "recorder"), Warehouse(tmp_path / "shop")
    draw, outages = lots(f"killed broker {sync}"), Outages()
    kills = runs = ended_away = meanwhile = 0
    length_s = GUESS_S
    async with NatsServer.start(tmp_path / "nats", sync_always=sync == "always") as server:
        shop = warehouse.table(recorder)
        config = write_config(tmp_path, server, "w1", projects={"shop": shop})
        async with serving(config), linked(server) as link:
            while kills < KILLS:
                warehouse.empty()
                run_id = await submit(link)
                kills += await some_kills(server, outages, draw, length_s)
                run = await ended(link, run_id)
                runs += 1
                judge(run, node_count=SIXTY.node_count)
                assert run.verdict.attempts == 1
                length_s = (run.verdict.time - run.events[0].time).total_seconds()
                ended_away += outages.covers(run.verdict.time.timestamp())
                meanwhile += sum(map(outages.covers, nodes_ended(run)))
                assert warehouse.wrong() == []
                assert (await verify(server, run_id))["run_results"] == "compared"
    assert recorder.overlaps == []
    figure(
        f"{kills} kills in {runs} runs of {SIXTY.node_count} nodes, each in one attempt; NATS was "
        f"away while {meanwhile} nodes ended, and while {ended_away} of the runs did"
    )
    assert meanwhile > 0 or not LONG


@pytest.mark.timeout(form(300, 600))
async def test_a_run_that_ends_while_nats_is_away_is_told_when_it_is_back(
    tmp_path: Path, nats_server: NatsServer, figure: Figure
) -> None:
    """By the worker that ran it, though another one waits and the lease has long expired."""
    recorder, warehouse = Recorder(tmp_path / "recorder"), Warehouse(tmp_path / "shop")
    shop = warehouse.table(recorder)
    configs = [
        write_config(tmp_path, nats_server, name, projects={"shop": shop}) for name in ("w1", "w2")
    ]
    loop = asyncio.get_running_loop()
    async with serving(*configs), linked(nats_server) as link:
        run_id = await submit(link)
        await recorder.until_begun(run_id)
        await nats_server.kill()
        away_from = loop.time()
        await recorder.until_free("shop", "dev")
        dbt_s = loop.time() - away_from
        await asyncio.sleep(max(REST_S, OUTAGE_S - dbt_s))
        away_s, back = loop.time() - away_from, time.time()
        await nats_server.restart()
        run = await ended(link, run_id)
    judge(run, node_count=SIXTY.node_count)
    assert run.verdict.attempts == 1
    assert run.verdict.time.timestamp() < back
    assert warehouse.wrong() == []
    assert recorder.overlaps == []
    assert (await verify(nats_server, run_id))["run_results"] == "compared"
    figure(f"NATS was away for {away_s:.0f} s, dbt was done after {dbt_s:.0f} s of it")
