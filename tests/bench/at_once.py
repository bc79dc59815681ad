"""Eight builds at once: how long their events take to the stream, and how late the loop is.

Measured: eight replaying children of 300 models each, of one project with eight targets, in one
daemon with its defaults (lineage, column lineage and asset events on), all beginning with their
first node at one moment. Three times:

    first     paced, with nothing known: the manifest is told, all SQL is read
    next      paced, with everything known, as all builds after it
    flat out  as fast as the daemon reads

Paced is 40 nodes a second and child, so 640 node events a second in sum. A real build of 300 small
models on DuckDB does 25 to 50 nodes a second with a core and more of its own (see `latency`);
eight of them on few cores do less, so this is what a machine with a core for each would offer.

Of each `node.started` and `node.finished` the time from its callback to the server's time of
storing it; of the daemon's loop how late it came to a task that sleeps for 5 ms (`loop_lag`), and
how much of that was its own computing; CPU of the daemon per node and per stored event.

Disturbed by: few cores. The children cost little, but the SQL reader computes all through the
first build, and the server shares the rest. What the loop is late by without computing is the
kernel's, which ran others.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

from dbtstream.config import Config, ProjectConfig, WorkerConfig
from dbtstream.statuses import RunStatus
from dbtstream.subjects import EVENTS_STREAM
from tests.bench.figures import Figure, Goal, quantile
from tests.bench.loop_lag import LoopLag
from tests.bench.options import Options, say, scratch
from tests.bench.replayed import EVENTS_PER_NODE, replay_of, replaying_child
from tests.bench.served import (
    Served,
    cpu_s,
    end_of,
    planned_run,
    queued_s,
    serving,
    sql_reader_cpu_s,
)
from tests.bench.stored import stored_events
from tests.daemons import project_folder

ROUNDS = 2
CHILDREN = 8
TARGETS = tuple(f"t{number}" for number in range(1, CHILDREN + 1))
NODES = 300
SMALL_NODES = 40
NODES_PER_S = 40.0  # of each child
PACED, FLAT_OUT = "paced", "flatout"  # projects, as far as the daemon knows
PASSES = {"first": PACED, "next": PACED, "flat out": FLAT_OUT}
LAG_GOAL_MS = 100
LOOP_GOAL_MS = 20


@dataclass
class _Pass:
    """Eight runs at one time and what came of them."""

    nodes: int = 0
    events: int = 0  # of all kinds
    daemon_s: float = 0.0
    reader_s: float = 0.0
    took_s: float = 0.0
    queued_s: float = 0.0
    behind_s: float = 0.0
    lags_ms: list[float] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    own_ms: list[float] = field(default_factory=list)


async def measure(options: Options) -> list[Figure]:
    nodes = options.size(NODES, SMALL_NODES)
    passes: dict[str, list[_Pass]] = {name: [] for name in PASSES}
    for number in range(options.rounds):
        with scratch() as folder:
            lateness = folder / "lateness"
            async with serving(_config(folder, nodes), folder, lateness=lateness) as served:
                for name, project in PASSES.items():
                    found = await _pass(served, folder, project, nodes, LoopLag(lateness))
                    passes[name].append(found)
                    say(
                        f"round {number + 1}, {name}: p99 {quantile(found.lags_ms, 0.99):.0f} ms, "
                        f"{1000 * found.daemon_s / found.nodes:.2f} ms of CPU per node"
                    )
    return [figure for name in PASSES for figure in _figures(name, passes[name])]


def _config(folder: Path, nodes: int) -> Config:
    path = str(project_folder(folder))
    rates = {PACED: NODES_PER_S * EVENTS_PER_NODE, FLAT_OUT: None}
    projects = {
        project: ProjectConfig(
            path=path,
            targets=TARGETS,
            python=replaying_child(
                folder / f"child-{project}",
                nodes=nodes,
                rate=rate,
                go=_go(folder, project),
                lineage=True,
            ),
        )
        for project, rate in rates.items()
    }
    worker = WorkerConfig(name="bench", state_dir=str(folder / "state"), slots=CHILDREN)
    return Config(worker=worker, projects=projects, source="bench")


def _go(folder: Path, project: str) -> Path:
    return folder / f"go-{project}"


async def _pass(served: Served, folder: Path, project: str, nodes: int, loop_lag: LoopLag) -> _Pass:
    """CPU is counted from the first node to the last run's end, with all that is told of it."""
    found = _Pass(nodes=nodes * CHILDREN)
    _go(folder, project).unlink(missing_ok=True)
    run_ids = [await planned_run(served, project, target) for target in TARGETS]
    used = cpu_s(served.daemon), sql_reader_cpu_s(served.daemon), queued_s(served.daemon)
    before, began = await _last_seq(served), time.monotonic()
    _go(folder, project).touch()
    for run_id in run_ids:
        finished = await end_of(served.client, run_id)
        if finished.status is not RunStatus.SUCCESS:
            raise RuntimeError(f"a replayed run ended with {finished}")
    ended = time.monotonic()
    found.took_s = ended - began
    found.daemon_s = cpu_s(served.daemon) - used[0]
    found.reader_s = sql_reader_cpu_s(served.daemon) - used[1]
    found.queued_s = queued_s(served.daemon) - used[2]
    found.events = await _last_seq(served) - before
    runs = folder / "state" / "runs" / project
    replays = [
        replay_of(runs / target / run_id / "logs")
        for target, run_id in zip(TARGETS, run_ids, strict=True)
    ]
    found.behind_s = max(replay.behind_s for replay in replays)
    found.late_ms, found.own_ms = await loop_lag.read(began, ended)
    async for event in stored_events(served.link, project):
        if event.run_id in run_ids and event.type in ("node.started", "node.finished"):
            found.lags_ms.append(event.lag_ms)
    if len(found.lags_ms) != found.nodes * EVENTS_PER_NODE:
        raise RuntimeError(f"{len(found.lags_ms)} node events of {found.nodes} nodes are stored")
    return found


async def _last_seq(served: Served) -> int:
    return int((await served.link.js.stream_info(EVENTS_STREAM)).state.last_seq)


def _figures(name: str, passes: list[_Pass]) -> list[Figure]:
    paced = name != "flat out"
    figures = [
        Figure(
            name=f"{name}: callback to commit, {label}",
            unit="ms",
            values=[quantile(found.lags_ms, share) for found in passes],
            goal=Goal("<", LAG_GOAL_MS) if paced and share == 0.99 else None,
        )
        for share, label in ((0.5, "p50"), (0.99, "p99"), (1.0, "max"))
    ]
    figures += [
        Figure(
            name=f"{name}: loop lag, {label}",
            unit="ms",
            values=[quantile(found.late_ms, share) for found in passes],
            goal=Goal("<", LOOP_GOAL_MS) if paced and share == 0.99 else None,
        )
        for share, label in ((0.5, "p50"), (0.99, "p99"), (1.0, "max"))
    ]
    return [
        *figures,
        Figure(
            name=f"{name}: loop lag by the daemon's own computing, max",
            unit="ms",
            values=[max(found.own_ms) for found in passes],
            goal=Goal("<", LOOP_GOAL_MS) if paced else None,
        ),
        Figure(
            name=f"{name}: the daemon waited for a CPU",
            unit="%",
            values=[100 * found.queued_s / found.took_s for found in passes],
        ),
        Figure(
            name=f"{name}: CPU of the daemon per node",
            unit="ms",
            values=[1000 * found.daemon_s / found.nodes for found in passes],
        ),
        Figure(
            name=f"{name}: CPU of the daemon per stored event",
            unit="µs",
            values=[1e6 * found.daemon_s / found.events for found in passes],
        ),
        Figure(
            name=f"{name}: stored events per node",
            unit="",
            values=[found.events / found.nodes for found in passes],
        ),
        Figure(
            name=f"{name}: CPU of the process that reads SQL, per node",
            unit="ms",
            values=[1000 * found.reader_s / found.nodes for found in passes],
        ),
        Figure(
            name=f"{name}: all stored after",
            unit="s",
            values=[found.took_s for found in passes],
        ),
        Figure(
            name=f"{name}: a child was behind by",
            unit="s",
            values=[found.behind_s for found in passes],
        ),
    ]
