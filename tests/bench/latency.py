"""From dbt's callback to the commit in JetStream, for every node event of a real build.

Measured: `dbt build` of 300 models and 300 tests through a daemon and a nats-server on the
loopback; of each `node.started` and `node.finished` the time from its `time` (taken in the
callback) to the server's own time of storing it. Both are this machine's clock. Against: a
bare JetStream publish of a small message, twenty times a second during the same builds, from
just before it is sent to the server's time of storing it: what NATS and a busy machine take by
themselves. The server takes that time before it writes; what the disk adds is in the time to
the bare publish's answer. A second build of each round, whose frames the benchmark reads
itself, tells how much of ours is the first part of the way: from the callback, through dbt's
GIL and the writer thread, to the other end of the pipe.

Disturbed by: few cores. dbt with four threads, the daemon and the server are runnable at one
time, so on few or busy cores the tail is the kernel's scheduling more than ours: the last row
says for which share of the build the daemon was ready to go on and had no CPU. Where that is
several percent, look at the tail only on a quieter machine.
The clock's steps (NTP) would show as well.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nats.js.api import StorageType, StreamConfig

from dbtstream.nats_link import NatsLink
from tests.bench.builds import PROJECT, Builds
from tests.bench.figures import Figure, Goal, quantile
from tests.bench.options import Options, say, scratch
from tests.bench.served import queued_s, serving
from tests.bench.stored import stored_events, stored_headers

ROUNDS = 2
PROBE = "BENCH_PROBE"
PROBE_SUBJECT = "bench.probe"
PROBE_EVERY_S = 0.05
PROBE_S = 30.0
H_SENT = "sent"
BARE = "bare publish"
ANSWER = "bare publish to its answer"


async def measure(options: Options) -> list[Figure]:
    size = options.size(300, 30)
    ours: list[list[float]] = []
    bare: list[list[float]] = []
    pipe: list[list[float]] = []
    answers: list[list[float]] = []
    queued_percent: list[float] = []
    with scratch() as folder:
        builds = Builds(folder, models=size, tests=size)
        await builds.warm_up()
        async with serving(builds.config, folder) as served:
            await served.link.js.add_stream(
                StreamConfig(name=PROBE, subjects=[PROBE_SUBJECT], storage=StorageType.FILE)
            )
            for number in range(options.rounds):
                queued = queued_s(served.daemon)
                async with _probing(served.link) as answered:
                    build = await builds.submitted(served)
                answers.append(answered)
                queued_percent.append(100 * (queued_s(served.daemon) - queued) / build.wall_s)
                ours.append(await _node_lags_ms(served.link, build.run_id))
                bare.append(await _probe_lags_ms(served.link))
                pipe.append((await builds.observed()).frame_lags_ms)
                say(f"round {number + 1}: {len(ours[-1]):,} node events in {build.wall_s:.1f} s")
    waiting = Figure(name="the daemon waited for a CPU", unit="%", values=queued_percent)
    return [*_figures(ours, bare, answers, pipe), waiting]


@asynccontextmanager
async def _probing(link: NatsLink) -> AsyncIterator[list[float]]:
    """Bare publishes all the while; ms to the answer of each."""
    answers: list[float] = []

    async def publish() -> None:
        sent = time.time()
        await link.publish(PROBE_SUBJECT, b"{}" * 100, {H_SENT: repr(sent)}, timeout_s=PROBE_S)
        answers.append((time.time() - sent) * 1000)

    async def at_its_time() -> None:
        while True:
            # Not after the one before was answered: a stall would then be counted only once.
            publishes.create_task(publish())
            await asyncio.sleep(PROBE_EVERY_S)

    async with asyncio.TaskGroup() as publishes:
        ticking = publishes.create_task(at_its_time())
        try:
            yield answers
        finally:
            ticking.cancel()


async def _node_lags_ms(link: NatsLink, run_id: str) -> list[float]:
    return [
        event.lag_ms
        async for event in stored_events(link, PROJECT)
        if event.run_id == run_id and event.type in ("node.started", "node.finished")
    ]


async def _probe_lags_ms(link: NatsLink) -> list[float]:
    """Of the messages since the last call."""
    lags = [
        (stored_at - float(headers[H_SENT])) * 1000
        async for headers, stored_at in stored_headers(link, PROBE, PROBE_SUBJECT)
    ]
    await link.js.purge_stream(PROBE)
    return lags


def _figures(
    ours: list[list[float]],
    bare: list[list[float]],
    answers: list[list[float]],
    pipe: list[list[float]],
) -> list[Figure]:
    goals = {0.5: Goal("<", 10), 0.99: Goal("<", 50)}
    figures = [
        Figure(
            name=f"callback to commit, p{share * 100:g}",
            unit="ms",
            values=[quantile(lags, share) for lags in ours],
            against=BARE,
            baseline=[quantile(lags, share) for lags in bare],
            goal=goals.get(share),
        )
        for share in (0.5, 0.9, 0.99, 1.0)
    ]
    figures += [
        Figure(
            name=f"{name}, p{share * 100:g}",
            unit="ms",
            values=[quantile(lags, share) for lags in rounds],
        )
        for name, rounds in (("callback to the end of the pipe", pipe), (ANSWER, answers))
        for share in (0.5, 0.99, 1.0)
    ]
    counts = [float(len(lags)) for lags in ours]
    return [*figures, Figure(name="node events", unit="", values=counts)]
