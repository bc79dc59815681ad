"""How many events per second get from children into JetStream, and whether all of them do.

Measured: four replaying children at once, each one run into one daemon with a nats-server, two
events a node. First 100,000 events at a given rate, 5 % above the goal of 5,000 a second in
sum, so that what is stored can show 5,000; then 40,000 as fast as the daemon reads.
Stored per second is over the time from the first node event's commit to the last one's. Lost
are numbers that are missing in a run's `seq`, events covered by a `gap`, and nodes without
their two events. The daemon also writes each node's state to the KV bucket, behind the
events; its CPU is counted until the last of those is written. Against: as many messages of
like size in batches of 500 by our NATS client, which is all that it has to do.

Disturbed by: few cores; daemon, server and four children share them. Frames come in writes of
20 ms worth, not one by one as from dbt, which is kinder to the daemon than dbt is.
"""

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from dbtstream.config import Config, ProjectConfig, WorkerConfig
from dbtstream.nats_link import NatsLink
from dbtstream.outbox import Record
from dbtstream.statuses import RunStatus
from dbtstream.subjects import EVENTS, EVENTS_STREAM, H_MSG_ID, STATE_BUCKET
from tests.bench.figures import Figure, Goal, quantile
from tests.bench.options import Options, say, scratch
from tests.bench.replayed import EVENTS_PER_NODE, replay_of, replaying_child
from tests.bench.served import Served, cpu_s, end_of, planned_run, rss_mb, serving
from tests.bench.stored import stored_events
from tests.daemons import project_folder

ROUNDS = 1
PACED, FLAT_OUT = "paced", "flatout"  # projects, as far as the daemon knows
NODES = {PACED: 12_500, FLAT_OUT: 5000}  # of each child
SMALL_NODES = 250
CHILDREN = 4
TARGETS = tuple(f"t{number}" for number in range(1, CHILDREN + 1))
GOAL_PER_S = 5000
OFFERED_PER_S = 1.05 * GOAL_PER_S
BARE_EVENTS, BARE_BATCH = 20_000, 500
SAMPLE_S = 0.5
POLL_S = 0.05


@dataclass
class _Pass:
    """Four runs at one time and what came of them."""

    offered_per_s: float = 0.0
    behind_s: float = 0.0  # the child that was worst kept from its rate
    stored_per_s: float = 0.0
    wrong: int = 0  # lost, or stored twice
    lags_ms: list[float] = field(default_factory=list)
    daemon_us: float = 0.0  # CPU per event
    nats_us: float = 0.0
    states_s: float = 0.0  # from the runs' ends to the last node state
    most_mb: float = 0.0


@dataclass
class _Bare:
    """The NATS client alone."""

    stored_per_s: float
    client_us: float
    nats_us: float


async def measure(options: Options) -> list[Figure]:
    nodes = {project: options.size(full, SMALL_NODES) for project, full in NODES.items()}
    paced: list[_Pass] = []
    flat_out: list[_Pass] = []
    bare: list[_Bare] = []
    for number in range(options.rounds):
        with scratch() as folder:
            config = _config(folder, nodes)
            async with serving(config, folder) as served:
                for project, passes in ((PACED, paced), (FLAT_OUT, flat_out)):
                    passes.append(await _pass(served, folder, project, nodes[project]))
                    say(f"round {number + 1}, {project}: {passes[-1].stored_per_s:,.0f} events/s")
                bare.append(await _bare(served, options.size(BARE_EVENTS, BARE_BATCH)))
                say(f"round {number + 1}, client alone: {bare[-1].stored_per_s:,.0f} events/s")
    return _figures(paced, flat_out, bare)


def _config(folder: Path, nodes: dict[str, int]) -> Config:
    path = str(project_folder(folder))
    rates = {PACED: OFFERED_PER_S / CHILDREN, FLAT_OUT: None}
    projects = {
        project: ProjectConfig(
            path=path,
            targets=TARGETS,
            python=replaying_child(
                folder / f"child-{project}",
                nodes=nodes[project],
                rate=rate,
                go=_go(folder, project),
            ),
        )
        for project, rate in rates.items()
    }
    worker = WorkerConfig(name="bench", state_dir=str(folder / "state"), slots=CHILDREN)
    return Config(worker=worker, projects=projects, source="bench")


def _go(folder: Path, project: str) -> Path:
    return folder / f"go-{project}"


async def _pass(served: Served, folder: Path, project: str, nodes: int) -> _Pass:
    found = _Pass()
    run_ids = [await planned_run(served, project, target) for target in TARGETS]
    watching = asyncio.create_task(_watch_memory(served, found), name="memory")
    states = await _states(served.link)
    used = cpu_s(served.daemon), cpu_s(served.nats)
    _go(folder, project).touch()
    for run_id in run_ids:
        finished = await end_of(served.client, run_id)
        if finished.status is not RunStatus.SUCCESS:
            raise RuntimeError(f"a replayed run ended with {finished}")
    ended = time.monotonic()
    while await _states(served.link) < states + nodes * CHILDREN:  # noqa: ASYNC110  # no event
        await asyncio.sleep(POLL_S)
    found.states_s = time.monotonic() - ended
    sent = nodes * EVENTS_PER_NODE * CHILDREN
    found.daemon_us = 1e6 * (cpu_s(served.daemon) - used[0]) / sent
    found.nats_us = 1e6 * (cpu_s(served.nats) - used[1]) / sent
    watching.cancel()

    runs = folder / "state" / "runs" / project
    replays = [
        replay_of(runs / target / run_id / "logs")
        for target, run_id in zip(TARGETS, run_ids, strict=True)
    ]
    found.offered_per_s = sent / max(replay.elapsed_s for replay in replays)
    found.behind_s = max(replay.behind_s for replay in replays)
    await _read_back(served.link, project, nodes, found)
    return found


async def _watch_memory(served: Served, found: _Pass) -> None:
    while True:
        found.most_mb = max(found.most_mb, rss_mb(served.daemon))
        await asyncio.sleep(SAMPLE_S)


async def _states(link: NatsLink) -> int:
    """Writes to the state bucket so far: one per node and a few per run."""
    return int((await link.js.stream_info(f"KV_{STATE_BUCKET}")).state.last_seq)


async def _read_back(link: NatsLink, project: str, nodes: int, found: _Pass) -> None:
    seqs: dict[str, list[int]] = defaultdict(list)
    stored_at: list[float] = []
    async for event in stored_events(link, project):
        seqs[event.run_id].append(event.seq)
        if event.type in ("node.started", "node.finished"):
            stored_at.append(event.stored_at)
            found.lags_ms.append(event.lag_ms)
    found.stored_per_s = (len(stored_at) - 1) / (max(stored_at) - min(stored_at))
    expected = nodes * EVENTS_PER_NODE * CHILDREN
    holes = sum(max(run) - len(set(run)) for run in seqs.values())
    twice = sum(len(run) - len(set(run)) for run in seqs.values())
    found.wrong = max(holes, expected - len(stored_at)) + twice


async def _bare(served: Served, count: int) -> _Bare:
    """Real events once more, under another project and ids of their own."""
    records = await _copies(served.link, count)
    used = time.process_time(), cpu_s(served.nats)
    began = time.monotonic()
    for first in range(0, count, BARE_BATCH):
        await served.link.publish_batch(records[first : first + BARE_BATCH])
    return _Bare(
        stored_per_s=count / (time.monotonic() - began),
        client_us=1e6 * (time.process_time() - used[0]) / count,
        nats_us=1e6 * (cpu_s(served.nats) - used[1]) / count,
    )


async def _copies(link: NatsLink, count: int) -> list[Record]:
    """Made of the last batch that is stored."""
    last = (await link.js.stream_info(EVENTS_STREAM)).state.last_seq
    models = [await link.js.get_msg(EVENTS_STREAM, seq=last - n) for n in range(BARE_BATCH)]
    copies = []
    for number in range(count):
        model = models[number % len(models)]
        headers = {
            name: value
            for name, value in (model.headers or {}).items()
            if not name.startswith("Nats-")  # it may have come in a batch
        }
        headers[H_MSG_ID] = f"bare.1.{number}"
        subject = f"{EVENTS}.bare.t.node.model.copy.success"
        copies.append(Record(number, "node", subject, headers, model.data or b""))
    return copies


def _figures(paced: list[_Pass], flat_out: list[_Pass], bare: list[_Bare]) -> list[Figure]:
    alone = "NATS client alone"
    bare_per_s = [found.stored_per_s for found in bare]
    bare_us = [found.client_us for found in bare]
    nats_us = [found.nats_us for found in bare]
    none_wrong = Goal("==", 0, by="max")
    figures = [
        Figure(
            name="paced: offered by the children",
            unit="events/s",
            values=[found.offered_per_s for found in paced],
        ),
        Figure(
            name="paced: stored",
            unit="events/s",
            values=[found.stored_per_s for found in paced],
            against=alone,
            baseline=bare_per_s,
            goal=Goal(">=", GOAL_PER_S),
        ),
        Figure(
            name="flat out: stored",
            unit="events/s",
            values=[found.stored_per_s for found in flat_out],
            against=alone,
            baseline=bare_per_s,
        ),
    ]
    for name, passes in (("paced", paced), ("flat out", flat_out)):
        figures += [
            Figure(
                name=f"{name}: lost, or stored twice",
                unit="events",
                values=[float(found.wrong) for found in passes],
                goal=none_wrong,
            ),
            Figure(
                name=f"{name}: CPU of the daemon per event",
                unit="µs",
                values=[found.daemon_us for found in passes],
                against=alone,
                baseline=bare_us,
            ),
            Figure(
                name=f"{name}: CPU of nats-server per event",
                unit="µs",
                values=[found.nats_us for found in passes],
                against=alone,
                baseline=nats_us,
            ),
            *(
                Figure(
                    name=f"{name}: child to commit, p{share * 100:g}",
                    unit="ms",
                    values=[quantile(found.lags_ms, share) for found in passes],
                )
                for share in (0.5, 0.99)
            ),
            Figure(
                name=f"{name}: a child was behind by",
                unit="s",
                values=[found.behind_s for found in passes],
            ),
            Figure(
                name=f"{name}: node states written after the end",
                unit="s",
                values=[found.states_s for found in passes],
            ),
            Figure(
                name=f"{name}: memory of the daemon at most",
                unit="MB",
                values=[found.most_mb for found in passes],
            ),
        ]
    return figures
