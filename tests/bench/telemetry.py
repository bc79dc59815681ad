"""What telemetry costs the daemon per node, and what 10,000 nodes leave of it.

Measured: two daemons one after the other in each round, as processes: one with all of telemetry
(spans and metrics over OTLP to a receiver in this process, and /metrics, which is scraped after
each run), one with none. Each is given ten runs of 1,000 nodes from replaying children, paced at
what a fast project does. CPU is the daemon's, until the receiver has every span; so what
threads of the exporter use is in it. The difference per node is what telemetry costs.

Besides: memory after each run (a queue or a series per node would show, and not only in the first
runs, in which the daemon grows without telemetry, too), series on /metrics after all of them, and
how long events take from child to commit with and without.

The child is the same in both: it has no part in telemetry. Its share is measured in `callback`.

Disturbed by: few cores, since the receiver decodes on one of them; and by a slow machine, on which
batches are smaller and so more. The two daemons change places from round to round.
"""

import asyncio
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from dbtstream.config import (
    Config,
    HttpConfig,
    OtlpConfig,
    ProjectConfig,
    TelemetryConfig,
    WorkerConfig,
)
from dbtstream.statuses import RunStatus
from dbtstream.trace import span_id_of
from tests.bench.figures import Figure, Goal, quantile
from tests.bench.options import Options, say, scratch
from tests.bench.replayed import EVENTS_PER_NODE, replaying_child
from tests.bench.served import Served, cpu_s, free_port, run_to_end, serving, settled_rss_mb
from tests.bench.stored import stored_events
from tests.daemons import project_folder
from tests.otlp_sink import OtlpSink, otlp_sink

ROUNDS = 3
RUNS = 10
NODES_PER_S = 200.0
SCRAPE_S = 10.0


@dataclass
class _Daemon:
    """What one of them showed."""

    us_per_node: float = 0.0
    after_mb: list[float] = field(default_factory=list)
    lags_ms: list[float] = field(default_factory=list)
    series: int = 0
    spans: int = 0


async def measure(options: Options) -> list[Figure]:
    on: list[_Daemon] = []
    off: list[_Daemon] = []
    nodes = options.size(1000, 50)
    for number in range(options.rounds):
        for with_telemetry in (number % 2 == 0, number % 2 == 1):
            with scratch() as folder, otlp_sink() as sink:
                found = await _daemon(folder, nodes, sink if with_telemetry else None)
            (on if with_telemetry else off).append(found)
            word = "on" if with_telemetry else "off"
            say(f"round {number + 1}, {word}: {found.us_per_node:.0f} µs of CPU per node")
            after = ", ".join(f"{mb:.1f}" for mb in found.after_mb)
            say(f"round {number + 1}, {word}: MB after each run: {after}")
    return _figures(on, off, nodes)


async def _daemon(folder: Path, nodes: int, sink: OtlpSink | None) -> _Daemon:
    found = _Daemon()
    listen = f"127.0.0.1:{free_port()}" if sink else ""
    async with serving(_config(folder, nodes, sink, listen), folder) as served:
        await _run(served, sink)  # imports and the first of everything
        used_s = 0.0
        for _ in range(RUNS):
            before_s = cpu_s(served.daemon)
            await _run(served, sink)
            if listen:
                found.series = await asyncio.to_thread(_series, listen)
            used_s += cpu_s(served.daemon) - before_s
            found.after_mb.append(await settled_rss_mb(served.daemon))
        found.us_per_node = 1e6 * used_s / (RUNS * nodes)
        found.lags_ms = [
            event.lag_ms
            async for event in stored_events(served.link)
            if event.type.startswith("node.")
        ]
    found.spans = len(sink.spans) if sink else 0
    return found


async def _run(served: Served, sink: OtlpSink | None) -> None:
    finished = await run_to_end(served.client, "shop", ["build"])
    if finished.status is not RunStatus.SUCCESS:
        raise RuntimeError(f"a replayed run ended with {finished}")
    if sink is not None:
        run_span = span_id_of(finished.run_id, 1, "run")
        await sink.until(lambda s: any(span.span_id == run_span for span in s.spans[-20:]))


def _config(folder: Path, nodes: int, sink: OtlpSink | None, listen: str) -> Config:
    otlp = OtlpConfig(endpoint=sink.url) if sink else None
    return Config(
        worker=WorkerConfig(name="bench", state_dir=str(folder / "state")),
        telemetry=TelemetryConfig(otlp=otlp),
        http=HttpConfig(listen=listen),
        projects={
            "shop": ProjectConfig(
                path=str(project_folder(folder)),
                targets=("dev",),
                python=replaying_child(
                    folder / "child", nodes=nodes, rate=NODES_PER_S * EVENTS_PER_NODE
                ),
            )
        },
        source="bench",
    )


def _series(listen: str) -> int:
    """As Prometheus counts them: one per name and set of labels."""
    url = f"http://{listen}/metrics"
    with urllib.request.urlopen(url, timeout=SCRAPE_S) as answer:
        lines = answer.read().decode().splitlines()
    return sum(1 for line in lines if line and not line.startswith("#"))


def _figures(on: list[_Daemon], off: list[_Daemon], nodes: int) -> list[Figure]:
    without = "without"
    figures = [
        Figure(
            name="CPU of the daemon per node",
            unit="µs",
            values=[found.us_per_node for found in on],
            against=without,
            baseline=[found.us_per_node for found in off],
        ),
        Figure(
            name="CPU per node that is telemetry's",
            unit="µs",
            values=[a.us_per_node - b.us_per_node for a, b in zip(on, off, strict=True)],
            goal=Goal("<", 300),
        ),
        Figure(
            name="spans that arrived, per node",
            unit="spans",
            values=[found.spans / ((RUNS + 1) * nodes) for found in on],
            goal=Goal(">=", 1, by="min"),
        ),
        Figure(
            name=f"series after {(RUNS + 1) * nodes:,} nodes",
            unit="series",
            values=[float(found.series) for found in on],
            goal=Goal("<", 500, by="max"),
        ),
        Figure(
            name="memory, after the first run",
            unit="MB",
            values=[found.after_mb[0] for found in on],
            against=without,
            baseline=[found.after_mb[0] for found in off],
        ),
        Figure(
            name=f"memory, after {RUNS} runs",
            unit="MB",
            values=[found.after_mb[-1] for found in on],
            against="after half of them",
            baseline=[found.after_mb[RUNS // 2 - 1] for found in on],
            goal=Goal("<", 1.05, of="ratio", by="max"),
        ),
    ]
    figures += [
        Figure(
            name=f"child to commit, p{share * 100:g}",
            unit="ms",
            values=[quantile(found.lags_ms, share) for found in on],
            against=without,
            baseline=[quantile(found.lags_ms, share) for found in off],
        )
        for share in (0.5, 0.99)
    ]
    return figures
