"""kill -9 of the daemon at any moment of a build: nothing is lost and nothing is done twice."""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dbtstream.embedded import NatsServer
from dbtstream.events import RunLeased, RunStarted
from dbtstream.nats_link import NatsLink
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
from tests.faults.project import SIXTY, Warehouse
from tests.faults.recorder import Recorder

KILLS = form(3, 100)
AGAIN = 0.3
"""How likely the run's next worker is killed, too."""
ELSEWHERE = 0.3
"""How likely the next worker is another one, with a disk of its own."""


@dataclass
class Told:
    """What came of it all."""

    runs: int = 0
    kills: int = 0
    attempts: Counter[int] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)
    spared: int = 0  # nodes that a later attempt did not run, as they had succeeded

    def add(self, run: Ended) -> None:
        self.runs += 1
        self.attempts[run.verdict.attempts] += 1
        for event in run.events:
            if isinstance(event, RunLeased):
                self.decisions[event.decision or event.cause] += 1
        last = run.verdict.attempts
        self.spared += sum(len(n) for attempt, n in run.succeeded.items() if attempt < last)

    def __str__(self) -> str:
        return (
            f"{self.kills} kills in {self.runs} runs of {SIXTY.node_count} nodes; runs by attempts "
            f"{dict(sorted(self.attempts.items()))}, {dict(self.decisions)}, "
            f"{self.spared} nodes spared"
        )


def attempts_began(run: Ended) -> dict[int, float]:
    return {e.attempt: e.time.timestamp() for e in run.events if isinstance(e, RunStarted)}


def built_again(run: Ended, warehouse: Warehouse) -> list[str]:
    """Tables that say themselves that a later attempt made them, though one before had."""
    began, built_at = attempts_began(run), warehouse.built_at()
    last = max(began)
    return [
        f"{name} of attempt {attempt} at {built_at[name]}, attempt {last} began {began[last]}"
        for attempt, nodes in run.succeeded.items()
        for name in (unique_id.split(".")[2] for unique_id in nodes)
        if attempt < last and name in built_at and built_at[name] >= began[last]
    ]


async def build_under_fire(
    link: NatsLink, daemons: list[Serve], draw: random.Random, length_s: float
) -> tuple[str, int]:
    """One run, whose worker is killed; the run's id, and how many were.

    `daemons[0]` is the one at work, and alive at the end. A moment is a time drawn by lot, from
    shortly before the request to shortly after the length of a whole run.
    """
    moment_s, run_id, kills = draw.uniform(-0.05, 1.05) * length_s, "", 0
    if moment_s >= 0:
        run_id = await submit(link)
    while True:
        await asyncio.sleep(max(0.0, moment_s))  # no fact is waited for: any moment will do
        await daemons[0].kill()
        kills += 1
        run_id = run_id or await submit(link)
        if draw.random() < ELSEWHERE:
            daemons.reverse()
        await daemons[0].launch()
        if draw.random() >= AGAIN:
            return run_id, kills
        moment_s = draw.uniform(0.0, 1.2) * length_s


@pytest.mark.timeout(form(300, 7200))
async def test_a_build_whose_daemon_is_killed_at_any_moment_is_done_once_and_whole(
    tmp_path: Path, nats_server: NatsServer, figure: Figure
) -> None:
    """By the events, by the children's own marks, by the tables, and by `dbtstream verify`."""
    recorder = Recorder(tmp_path / "recorder")
    warehouse = Warehouse(tmp_path / "shop")
    shop = warehouse.table(recorder)
    configs = [
        write_config(tmp_path, nats_server, name, projects={"shop": shop}) for name in ("w1", "w2")
    ]
    draw, told = lots("killed daemon"), Told()
    loop = asyncio.get_running_loop()
    async with serving(configs[0]) as daemons, linked(nats_server) as link:
        began = loop.time()
        judge(await ended(link, await submit(link)), node_count=SIXTY.node_count)
        length_s = loop.time() - began
        daemons.append(Serve(configs[1]))
        try:
            while told.kills < KILLS:
                await recorder.until_free("shop", "dev")
                warehouse.empty()
                run_id, kills = await build_under_fire(link, daemons, draw, length_s)
                run = await ended(link, run_id)
                told.kills += kills
                told.add(run)
                judge(run, node_count=SIXTY.node_count)
                await recorder.until_free("shop", "dev")
                assert warehouse.wrong() == []
                assert built_again(run, warehouse) == []
                assert recorder.overlaps == []
                assert (await verify(nats_server, run_id))["run_results"] == "compared"
        finally:
            figure(str(told))
