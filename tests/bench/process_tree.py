"""What a process and all that it has started use: CPU and memory, by the kernel's own count.

CPU of a tree is user and system of each process that lives in it, and of all that these have
waited for. So nothing is counted twice, and a process that has ended is in the count of its
parent; only one whose parent died before it is in nobody's. It is in steps of 10 ms.

Memory is PSS: a page that several processes share counts for each of them by its share. Peaks
are sampled, which costs the sampled process time: never where something else is measured.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psutil

SAMPLE_S = 0.02
STEP_S = 0.3
SETTLED_S = 0.011
"""Not more CPU than that in a step: one tick of the kernel's count may always come."""


def tree(root: psutil.Process) -> list[psutil.Process]:
    """The process and all below it."""
    return [root, *root.children(recursive=True)]  # type: ignore[no-untyped-call]  # no types


def tree_cpu_s(root: psutil.Process) -> float:
    total_s = 0.0
    for process in tree(root):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total_s += times.user + times.system + times.children_user + times.children_system
    return total_s


async def settled_cpu_s(root: psutil.Process, *, limit_s: float = 10.0) -> float:
    """When all that was begun is done: the tree has come to rest, or `limit_s` is over."""
    loop = asyncio.get_running_loop()
    ends, before = loop.time() + limit_s, tree_cpu_s(root)
    while True:
        await asyncio.sleep(STEP_S)
        now = tree_cpu_s(root)
        if now - before <= SETTLED_S or loop.time() >= ends:
            return now
        before = now


def pss_mb(process: psutil.Process) -> float:
    """0 when it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0


class Peak:
    """Of what is begun below a process from now on."""

    def __init__(self, root: psutil.Process, *, itself: bool) -> None:
        self.pss_mb = 0.0
        self._root = root
        self._known = set() if itself else {process.pid for process in tree(root)}

    async def watch(self) -> None:
        while True:
            await asyncio.to_thread(self._look)
            await asyncio.sleep(SAMPLE_S)

    def _look(self) -> None:
        with suppress(psutil.NoSuchProcess):
            self.pss_mb = max(self.pss_mb, sum(map(pss_mb, self._new())))

    def _new(self) -> Iterator[psutil.Process]:
        return (process for process in tree(self._root) if process.pid not in self._known)


@asynccontextmanager
async def peak_below(root: psutil.Process, *, itself: bool = False) -> AsyncIterator[Peak]:
    """PSS at most, inside, of all processes together that are begun inside; with `itself` of the
    process and all below it."""
    peak = Peak(root, itself=itself)
    watching = asyncio.create_task(peak.watch(), name="peak")
    try:
        yield peak
    finally:
        watching.cancel()
        await asyncio.wait({watching})
