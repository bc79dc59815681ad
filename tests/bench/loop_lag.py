"""`dbtstream` with somebody in the daemon's event loop who notes how late it comes to its tasks.

    python -m tests.bench.loop_lag FILE --config … serve

A task sleeps for 5 ms again and again. Each time it writes down how late it was woken, and how
much of that its own thread spent computing: the rest is the kernel's, which had other processes
to run. So a loop that is blocked by the daemon's own work can be told from a busy machine. It
takes under 1 % of a core. `LoopLag.read` reads what was written, by time.
"""

import asyncio
import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dbtstream.daemon
from dbtstream.cli import main as dbtstream_main

EVERY_S = 0.005
WRITE_AFTER = 200  # notes: about a second
WAIT_S = 5.0
_NOTE = struct.Struct("<ddd")


class Watched(dbtstream.daemon.Daemon):
    """The daemon, and beside it the task that is late."""

    path: Path

    async def run(self) -> None:
        watching = asyncio.create_task(_watch(self.path), name="loop lag")
        try:
            await super().run()
        finally:
            watching.cancel()


async def _watch(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    notes = bytearray()
    count, cpu_s = 0, time.thread_time()
    while True:
        due = time.monotonic() + EVERY_S
        await asyncio.sleep(EVERY_S)
        now, cpu_before_s, cpu_s = time.monotonic(), cpu_s, time.thread_time()
        late_s = max(now - due, 0.0)
        notes += _NOTE.pack(now, late_s, min(late_s, cpu_s - cpu_before_s))
        count += 1
        if count % WRITE_AFTER == 0:
            os.write(fd, notes)
            notes.clear()


class LoopLag:
    """What is in the file of a daemon that was started so."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def read(self, since: float, until: float) -> tuple[list[float], list[float]]:
        """(milliseconds late, of those its own doing), of `time.monotonic` from here to there."""
        async with asyncio.timeout(WAIT_S):
            while True:
                notes = list(self._notes())
                if notes and notes[-1][0] >= until:
                    break
                await asyncio.sleep(0.1)
        found = [(late, own) for at, late, own in notes if since <= at <= until]
        return [1000 * late for late, _ in found], [1000 * own for _, own in found]

    def _notes(self) -> Iterator[tuple[float, float, float]]:
        data = self._path.read_bytes() if self._path.exists() else b""
        return _NOTE.iter_unpack(data[: len(data) - len(data) % _NOTE.size])


if __name__ == "__main__":
    Watched.path = Path(sys.argv.pop(1))
    dbtstream.daemon.Daemon = Watched  # type: ignore[misc]  # `serve` finds it there
    dbtstream_main()
