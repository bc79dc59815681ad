"""What subscribers cost a build: one that never reads and one that dies, against none.

Measured: the CPU (user and system) of dbt's process and of the daemon, together, in a build of
150 models and 150 tests, while a process that is subscribed to everything (live events, events
as they are published, a push consumer) is frozen with a socket buffer of some kilobytes, and
another one is killed when the first node is done. Against: the same build with no subscriber,
which runs before and after it in every round; the baseline is the mean of both, and their ratio
to each other is the noise of this very run.

Disturbed by: whatever shares caches and cores with the build, so also by nats-server, which has
more to do with subscribers; its own CPU is shown. Read a ratio only together with the noise: with
1.02 there, a goal of 1.01 is neither met nor missed.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from dbtstream.subjects import LIVE
from tests.bench.builds import Builds
from tests.bench.figures import Figure, Goal
from tests.bench.options import Options, say, scratch
from tests.bench.served import Served, cpu_s, serving
from tests.faults.subscribers import Subscriber, bad_subscribers

ROUNDS = 6
NONE = "no subscriber, mean of 2"
FIRST_NODE = f"{LIVE}.*.*.node.>"


class Used(msgspec.Struct, frozen=True, kw_only=True):
    """CPU of one build, in seconds."""

    dbt_s: float
    daemon_s: float
    nats_s: float

    @property
    def build_s(self) -> float:
        return self.dbt_s + self.daemon_s


async def measure(options: Options) -> list[Figure]:
    size = options.size(150, 30)
    rounds = _Rounds()
    with scratch() as folder:
        builds = Builds(folder, models=size, tests=size)
        await builds.warm_up()
        async with serving(builds.config, folder) as served:
            await builds.submitted(served)  # the daemon's first run costs more than later ones
            for number in range(options.rounds):
                await rounds.add(builds, served)
                say(f"round {number + 1}: CPU s {rounds.last()}")
    return rounds.figures()


class _Rounds:
    """Builds of each kind, by round."""

    def __init__(self) -> None:
        self.before: list[Used] = []
        self.watched: list[Used] = []
        self.after: list[Used] = []

    async def add(self, builds: Builds, served: Served) -> None:
        self.before.append(await _build(builds, served))
        async with bad_subscribers(served.link, served.url) as dying, _dies_soon(served, dying):
            self.watched.append(await _build(builds, served))
        self.after.append(await _build(builds, served))

    def last(self) -> str:
        kinds = {"none": self.before, "subscribers": self.watched, "none again": self.after}
        return ", ".join(f"{kind} {used[-1].build_s:.2f}" for kind, used in kinds.items())

    def figures(self) -> list[Figure]:
        pairs = list(zip(self.before, self.after, strict=True))
        return [
            Figure(
                name="CPU of dbt and daemon, no subscriber again (the noise)",
                unit="s",
                values=[used.build_s for used in self.after],
                against="no subscriber, before",
                baseline=[used.build_s for used in self.before],
            ),
            Figure(
                name="CPU of dbt and daemon, bad subscribers",
                unit="s",
                values=[used.build_s for used in self.watched],
                against=NONE,
                baseline=[(one.build_s + other.build_s) / 2 for one, other in pairs],
                goal=Goal("<", 1.01, of="ratio"),
            ),
            Figure(
                name="CPU of the daemon, bad subscribers",
                unit="s",
                values=[used.daemon_s for used in self.watched],
                against=NONE,
                baseline=[(one.daemon_s + other.daemon_s) / 2 for one, other in pairs],
            ),
            Figure(
                name="CPU of nats-server, bad subscribers",
                unit="s",
                values=[used.nats_s for used in self.watched],
                against=NONE,
                baseline=[(one.nats_s + other.nats_s) / 2 for one, other in pairs],
            ),
        ]


async def _build(builds: Builds, served: Served) -> Used:
    daemon_s, nats_s = cpu_s(served.daemon), cpu_s(served.nats)
    build = await builds.submitted(served)
    return Used(
        dbt_s=build.cpu_s,
        daemon_s=cpu_s(served.daemon) - daemon_s,
        nats_s=cpu_s(served.nats) - nats_s,
    )


@asynccontextmanager
async def _dies_soon(served: Served, dying: Subscriber) -> AsyncIterator[None]:
    """Inside, that subscriber is killed when the first node of a build is told of."""
    told = await served.link.client.subscribe(FIRST_NODE, max_msgs=1)
    await served.link.client.flush()

    async def watch() -> None:
        await told.next_msg(timeout=None)
        await dying.die()

    watching = asyncio.create_task(watch(), name="dying subscriber")
    try:
        yield
        await watching
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
