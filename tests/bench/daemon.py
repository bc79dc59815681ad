"""The daemon by itself: memory and CPU when idle, and memory after 10,000 nodes.

Measured: `dbtstream serve` as a process on a nats-server. RSS and CPU over 20 idle seconds;
then ten runs of 1,000 nodes each from replaying children, one after the other as fast as they
are read, and RSS after each of them, when it has settled. Against: a Python process that has
the same libraries (uvloop, msgspec, nats-py) and as many idle connections to that server, in
the same 20 seconds; and for memory after the runs, the memory after the first of them.

"Flat" is: not more than 5 % above the memory after the first run, in the worst round.

Disturbed by: little. The kernel counts CPU in steps of 10 ms, so 0.05 % is one step. Freed
memory goes back to the kernel when malloc likes, hence a few MB up and down between runs.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil

from dbtstream.config import Config, ProjectConfig, WorkerConfig
from dbtstream.statuses import RunStatus
from tests.bench.figures import Figure, Goal
from tests.bench.options import Options, say, scratch
from tests.bench.replayed import replaying_child
from tests.bench.served import cpu_s, process_of, rss_mb, run_to_end, serving, settled_rss_mb
from tests.daemons import project_folder

ROUNDS = 1
IDLE_S = 20.0
SETTLE_S = 5.0
RUNS = 10
BARE = """
import asyncio, sys
import msgspec, nats, nats.js.api, uvloop

async def main():
    links = [await nats.connect(sys.argv[1]) for _ in range(2)]
    print(len(links), flush=True)
    await asyncio.Event().wait()

uvloop.run(main())
"""


async def measure(options: Options) -> list[Figure]:
    rounds = [await _round(options, number + 1) for number in range(options.rounds)]
    return _figures(rounds)


class _Round:
    """What one daemon showed in its life."""

    def __init__(self) -> None:
        self.idle_mb = self.bare_mb = self.idle_percent = self.bare_percent = 0.0
        self.after_mb: list[float] = []


async def _round(options: Options, number: int) -> _Round:
    found = _Round()
    nodes = options.size(1000, 50)
    with scratch() as folder:
        config = _config(folder, nodes)
        async with serving(config, folder) as served:
            async with _bare(served.url) as bare:
                idle_s = options.size(int(IDLE_S), 2)
                await asyncio.sleep(SETTLE_S)
                before = cpu_s(served.daemon), cpu_s(bare)
                await asyncio.sleep(idle_s)
                found.idle_percent = 100 * (cpu_s(served.daemon) - before[0]) / idle_s
                found.bare_percent = 100 * (cpu_s(bare) - before[1]) / idle_s
                found.idle_mb, found.bare_mb = rss_mb(served.daemon), rss_mb(bare)
            say(f"round {number}: idle {found.idle_mb:.1f} MB, {found.idle_percent:.2f} % CPU")
            for _ in range(RUNS):
                finished = await run_to_end(served.client, "shop", ["build"])
                if finished.status is not RunStatus.SUCCESS:
                    raise RuntimeError(f"a replayed run ended with {finished}")
                found.after_mb.append(await settled_rss_mb(served.daemon))
            after = ", ".join(f"{mb:.1f}" for mb in found.after_mb)
            say(f"round {number}: MB after each run of {nodes:,} nodes: {after}")
    return found


def _config(folder: Path, nodes: int) -> Config:
    return Config(
        worker=WorkerConfig(name="bench", state_dir=str(folder / "state")),
        projects={
            "shop": ProjectConfig(
                path=str(project_folder(folder)),
                targets=("dev",),
                python=replaying_child(folder / "child", nodes=nodes),
            )
        },
        source="bench",
    )


@asynccontextmanager
async def _bare(url: str) -> AsyncIterator[psutil.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", BARE, url), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        if not await process.stdout.readline():
            raise RuntimeError("the bare process did not connect")
        yield process_of(process.pid)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def _figures(rounds: list[_Round]) -> list[Figure]:
    first = [found.after_mb[0] for found in rounds]
    return [
        Figure(
            name="memory, idle",
            unit="MB",
            values=[found.idle_mb for found in rounds],
            against="bare process",
            baseline=[found.bare_mb for found in rounds],
            goal=Goal("<", 80, by="max"),
        ),
        Figure(
            name="CPU, idle",
            unit="%",
            values=[found.idle_percent for found in rounds],
            against="bare process",
            baseline=[found.bare_percent for found in rounds],
            goal=Goal("<", 0.5),
        ),
        Figure(
            name="memory, after the first run",
            unit="MB",
            values=first,
            against="idle",
            baseline=[found.idle_mb for found in rounds],
        ),
        Figure(
            name=f"memory, after {RUNS} runs",
            unit="MB",
            values=[found.after_mb[-1] for found in rounds],
            against="after the first",
            baseline=first,
            goal=Goal("<", 1.05, of="ratio", by="max"),
        ),
        Figure(
            name="memory, highest after any run",
            unit="MB",
            values=[max(found.after_mb) for found in rounds],
            against="after the first",
            baseline=first,
        ),
    ]
