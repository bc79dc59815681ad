"""The events of one run attempt: on disk first, until JetStream has them.

`execution` puts, `publishers.jetstream` takes and acks, `daemon` recovers what a predecessor
left. `put` never waits, for disk or for NATS: a group of records that came together is
written in one go by a background task, in a thread (`outbox_file`).

    put → pending → (written) → window, or only on disk when the window is full → next → ack

Records leave in the order of their put. With NATS away only the window (4 MB) stays in
memory. With the disk failing, records go from `pending` straight to `next`, and the disk is
tried again. It never drops run, node, batch, artifact or gap events; what it drops of the
others is told by `take_dropped`.
"""

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dbtstream.events import DROPPABLE
from dbtstream.outbox_file import (
    HEADER_BYTES,
    SUFFIX,
    Contents,
    OutboxCorrupt,
    OutboxFile,
    Record,
    frame,
)

__all__ = ["Dropped", "Outbox", "OutboxStats", "Record"]

logger = logging.getLogger(__name__)

WINDOW_BYTES = 4 * 1024 * 1024
READ_BYTES = 1024 * 1024
MEMORY_CAP_BYTES = 64 * 1024 * 1024  # of records that no disk takes
RESET_BYTES = 4 * 1024 * 1024  # a longer file is emptied when all in it is acked
POSITION_EVERY_S = 0.2  # what is acked and not noted is sent again after a crash: deduplicated
DISK_RETRY_S = 2.0
FIRST_DROPPED_AT = 0.8  # of the cap: the first droppable family makes room for the others


@dataclass(frozen=True, slots=True)
class Dropped:
    """`count` = `to_seq` - `from_seq` + 1 events of one family that nobody will see."""

    family: str
    count: int
    from_seq: int
    to_seq: int


@dataclass(frozen=True, slots=True)
class OutboxStats:
    """Counts since open; `waiting` and the bytes are what is there now."""

    received: int
    acked: int
    dropped: int
    lost: int  # unreadable when their turn came, or closed with no disk to keep them
    waiting: int
    waiting_bytes: int
    memory_bytes: int
    oldest_age_s: float
    disk_failed: bool


class _Entry(NamedTuple):
    record: Record
    at: float
    size: int
    end: int | None  # the file offset after it; None if it went past the disk


class _Unwritten(NamedTuple):
    record: Record
    at: float
    frame: bytes


class Outbox:
    """Made by `open` and `recover`; ended by `remove` (all is stored) or `close` (file stays)."""

    def __init__(self, path: Path, run_id: str, attempt: int, *, max_bytes: int) -> None:
        self.run_id, self.attempt = run_id, attempt
        self.recovered = False
        self._max_bytes = max_bytes
        self._file = OutboxFile(path)
        self._pending: deque[_Unwritten] = deque()
        self._writing: list[_Unwritten] = []
        self._window: deque[_Entry] = deque()
        self._on_disk = 0  # records that are written and neither in the window nor acked
        self._read_at = self._acked_to = self._noted = self._end = HEADER_BYTES
        self._unwritten_bytes = self._window_bytes = self._waiting_bytes = 0
        self._received = self._acked = self._dropped = self._lost = 0
        self._drops: list[Dropped] = []
        self._input_closed = self._stopping = self._disk_failed = self._said_failed = False
        self._disk_resting = self._position_due = self._position_timed = False
        self._wake = asyncio.Event()
        self._available = asyncio.Event()
        self._empty = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None

    # -- beginnings ------------------------------------------------------------------------

    @classmethod
    async def open(cls, directory: Path, run_id: str, attempt: int, *, max_bytes: int) -> "Outbox":
        """A new one (or what is left of the same attempt). A failing disk does not stop it."""
        box = cls(directory / f"{run_id}.{attempt}{SUFFIX}", run_id, attempt, max_bytes=max_bytes)
        try:
            box._take_over(await asyncio.to_thread(box._file.open))
        except (OSError, OutboxCorrupt) as error:
            box._disk_fails(error)
        box._start()
        return box

    @classmethod
    async def recover(cls, directory: Path, *, max_bytes: int = 1024**3) -> list["Outbox"]:
        """What dead processes left undelivered, oldest run first; their input is closed.

        Files of living processes are theirs; empty ones are removed; one that cannot be read
        at all is left where it is and named in the log.
        """
        found = []
        for path in await asyncio.to_thread(_files_in, directory):
            run_id, _, attempt = path.name.removesuffix(SUFFIX).rpartition(".")
            if not (run_id and attempt.isdigit()):
                continue
            box = cls(path, run_id, int(attempt), max_bytes=max_bytes)
            try:
                contents = await asyncio.to_thread(box._file.open, create=False)
            except BlockingIOError:
                continue
            except (OSError, OutboxCorrupt):
                logger.exception(
                    "an outbox cannot be read; its events are not delivered",
                    extra={"action": "outbox.unreadable", "path": str(path)},
                )
                continue
            if contents.records == 0 and not contents.cut_bytes:
                await asyncio.to_thread(box._file.remove)
                continue
            box._take_over(contents)
            box.recovered = True
            box._start()
            box.close_input()
            found.append(box)
        return found

    def _take_over(self, contents: Contents) -> None:
        self._read_at = self._acked_to = self._noted = contents.position
        self._end = contents.end
        self._on_disk = contents.records
        self._waiting_bytes += contents.end - contents.position
        if contents.cut_bytes:
            self._lost += 1
            logger.warning(
                "an outbox ended in a broken record, which is cut off",
                extra={
                    "action": "outbox.cut",
                    "run_id": self.run_id,
                    "path": str(self._file.path),
                    "cut_bytes": contents.cut_bytes,
                    "records": contents.records,
                },
            )

    def _start(self) -> None:
        self._writer = asyncio.create_task(self._write_loop(), name=f"outbox {self.run_id}")
        self._writer.add_done_callback(_log_death)

    # -- in --------------------------------------------------------------------------------

    def put(self, record: Record) -> bool:
        """Take it. False: it is dropped, since its family may be and there is no room."""
        if self._input_closed:
            raise RuntimeError("the outbox takes no more records")
        self._received += 1
        if record.family in DROPPABLE and self._is_full_for(record.family):
            self._drop(record)
            return False
        at = time.time()
        framed = frame(record, at)
        self._pending.append(_Unwritten(record, at, framed))
        self._unwritten_bytes += len(framed)
        self._waiting_bytes += len(framed)
        self._wake.set()
        if self._disk_failed:
            self._available.set()
        return True

    def close_input(self) -> None:
        """No more puts. `next` returns [] and `drained` returns when all is acked."""
        self._input_closed = True
        self._check_empty()

    def take_dropped(self) -> list[Dropped]:
        """What was dropped since the last call, for the run's `gap` events."""
        drops, self._drops = self._drops, []
        return drops

    def _is_full_for(self, family: str) -> bool:
        share = FIRST_DROPPED_AT if family == DROPPABLE[0] else 1.0
        return (
            self._waiting_bytes > share * self._max_bytes
            or self._unwritten_bytes > share * MEMORY_CAP_BYTES
        )

    def _drop(self, record: Record) -> None:
        self._dropped += 1
        last = self._drops[-1] if self._drops else None
        if last and last.family == record.family and last.to_seq + 1 == record.seq:
            self._drops[-1] = Dropped(last.family, last.count + 1, last.from_seq, record.seq)
        else:
            self._drops.append(Dropped(record.family, 1, record.seq, record.seq))

    # -- out -------------------------------------------------------------------------------

    async def next(self, max_records: int, max_bytes: int) -> list[Record]:
        """The oldest records that are not acked; the same ones again until `ack`.

        Waits until there is one. [] says that the input is closed and all is acked.
        """
        while True:
            if not self._window:
                if self._on_disk:
                    await self._read_back()
                elif self._disk_failed and not self._writing:
                    self._pass_the_disk()
            if self._window:
                return self._front(max_records, max_bytes)
            if self._empty.is_set():
                return []
            self._available.clear()
            await self._available.wait()

    def ack(self, count: int) -> None:
        """The first `count` of what `next` gave are stored."""
        for _ in range(count):
            entry = self._window.popleft()
            self._window_bytes -= entry.size
            self._waiting_bytes -= entry.size
            if entry.end is not None:
                self._acked_to = entry.end
        self._acked += count
        if self._noted != self._acked_to and not self._position_timed:
            self._position_timed = True
            asyncio.get_running_loop().call_later(POSITION_EVERY_S, self._ask_for_position)
        self._check_empty()

    @property
    def head_at(self) -> float | None:
        """Unix time of the put of the oldest record that `next` has given and nobody acked."""
        return self._window[0].at if self._window else None

    async def drained(self) -> None:
        """Wait until the input is closed and everything is acked."""
        await self._empty.wait()

    def _front(self, max_records: int, max_bytes: int) -> list[Record]:
        records: list[Record] = []
        size = 0
        for entry in self._window:
            size += entry.size
            if records and (len(records) >= max_records or size > max_bytes):
                break
            records.append(entry.record)
        return records

    async def _read_back(self) -> None:
        try:
            found = await asyncio.to_thread(self._file.read, self._read_at, self._end, READ_BYTES)
        except (OSError, OutboxCorrupt):
            logger.exception(
                "events of a run cannot be read back from its outbox and are lost",
                extra={
                    "action": "outbox.lost",
                    "run_id": self.run_id,
                    "records": self._on_disk,
                },
            )
            self._lost += self._on_disk
            self._waiting_bytes -= self._end - self._read_at
            self._read_at = self._acked_to = self._end
            self._on_disk = 0
            self._check_empty()
            return
        for stored, end in found:
            self._enter(_Entry(stored.record(), stored.at, end - self._read_at, end))
            self._read_at = end
        self._on_disk -= len(found)

    def _pass_the_disk(self) -> None:
        while self._pending and self._window_bytes < WINDOW_BYTES:
            item = self._pending.popleft()
            self._unwritten_bytes -= len(item.frame)
            self._enter(_Entry(item.record, item.at, len(item.frame), None))

    def _enter(self, entry: _Entry) -> None:
        self._window.append(entry)
        self._window_bytes += entry.size

    def _check_empty(self) -> None:
        waiting = self._pending or self._writing or self._window or self._on_disk
        if self._input_closed and not waiting:
            self._empty.set()
            self._available.set()

    # -- the disk --------------------------------------------------------------------------

    async def _write_loop(self) -> None:
        while not self._stopping:
            await self._wake.wait()
            self._wake.clear()
            if self._pending and not self._disk_resting:
                await self._write_pending()
            if self._position_due:
                await self._note_position()

    async def _write_pending(self) -> None:
        self._writing = list(self._pending)
        self._pending.clear()
        try:
            if not self._file.is_open:
                self._take_over(await asyncio.to_thread(self._file.open))
            await asyncio.to_thread(
                self._file.append, self._end, [item.frame for item in self._writing]
            )
        except (OSError, OutboxCorrupt) as error:
            self._pending.extendleft(reversed(self._writing))
            self._writing = []
            self._disk_fails(error)
            return
        self._written(self._writing)
        self._writing = []
        if self._disk_failed:
            self._disk_failed = self._said_failed = False
            logger.info(
                "the outbox is written to disk again",
                extra={"action": "outbox.disk_back", "run_id": self.run_id},
            )
        self._available.set()

    def _written(self, group: list[_Unwritten]) -> None:
        for item in group:
            size = len(item.frame)
            self._unwritten_bytes -= size
            self._end += size
            if self._on_disk or self._window_bytes + size > WINDOW_BYTES:
                self._on_disk += 1
            else:
                self._enter(_Entry(item.record, item.at, size, self._end))
                self._read_at = self._end

    async def _note_position(self) -> None:
        self._position_due = self._position_timed = False
        idle = not (self._pending or self._window or self._on_disk)
        try:
            if idle and self._end > RESET_BYTES:
                await asyncio.to_thread(self._file.reset)
                self._read_at = self._acked_to = self._noted = self._end = HEADER_BYTES
            else:
                position = self._acked_to
                await asyncio.to_thread(self._file.write_position, position)
                self._noted = position
        except OSError as error:
            self._disk_fails(error)

    def _ask_for_position(self) -> None:
        self._position_due = True
        self._wake.set()

    def _try_the_disk(self) -> None:
        self._disk_resting = False
        self._wake.set()

    def _disk_fails(self, error: Exception) -> None:
        self._disk_failed = self._disk_resting = True
        asyncio.get_running_loop().call_later(DISK_RETRY_S, self._try_the_disk)
        self._available.set()
        if not self._said_failed:
            self._said_failed = True
            logger.error(
                "the outbox cannot be written; events go to NATS from memory only, "
                "so free or repair the disk of worker.state_dir",
                extra={
                    "action": "outbox.disk_failed",
                    "run_id": self.run_id,
                    "path": str(self._file.path),
                    "error": str(error),
                },
            )

    # -- ends ------------------------------------------------------------------------------

    async def close(self) -> None:
        """Write what waits, keep the file for `recover`, give back the lock."""
        await self._stop_writer()
        if self._file.is_open:
            if self._pending:
                await self._write_pending()
            await self._note_position()
        await asyncio.to_thread(self._file.close)
        if lost := len(self._pending) + sum(entry.end is None for entry in self._window):
            self._lost += lost
            logger.error(
                "events of a run were in memory only and are lost",
                extra={"action": "outbox.lost", "run_id": self.run_id, "records": lost},
            )

    async def remove(self) -> None:
        """Delete the file, after `drained`."""
        await self._stop_writer()
        await asyncio.to_thread(self._file.remove)

    async def _stop_writer(self) -> None:
        self._input_closed = self._stopping = True
        self._wake.set()
        if self._writer is not None:
            await asyncio.wait([self._writer])
            self._writer = None

    @property
    def stats(self) -> OutboxStats:
        first = self._window or self._writing or self._pending
        return OutboxStats(
            received=self._received,
            acked=self._acked,
            dropped=self._dropped,
            lost=self._lost,
            waiting=len(self._pending) + len(self._writing) + len(self._window) + self._on_disk,
            waiting_bytes=self._waiting_bytes,
            memory_bytes=self._unwritten_bytes + self._window_bytes,
            oldest_age_s=max(0.0, time.time() - first[0].at) if first else 0.0,
            disk_failed=self._disk_failed,
        )


def _files_in(directory: Path) -> list[Path]:
    """By name: run ids sort by time."""
    return sorted(directory.glob(f"*{SUFFIX}")) if directory.is_dir() else []


def _log_death(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        logger.error("the outbox writer died", exc_info=error, extra={"action": "outbox.crash"})
