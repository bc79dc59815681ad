"""The way out: a queue that dbt's threads fill and the one thread that writes the pipe.

`emit` never blocks and never raises, and may be called from a signal handler: the queue is
`queue.SimpleQueue` (C, re-entrant). The writer numbers the frames as it takes them, so the
order of the queue is the order of the numbers and no interrupt can leave a hole.

A parent that reads slowly costs log and query frames once `LIMIT` frames wait, counted and
told in a `dropped` frame; frames of nodes and runs are bounded by the plan and always kept.
"""

from __future__ import annotations

import json
import os
import queue
import struct
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, Optional

from .scrub import TRUNCATED, Scrubber

LIMIT = 10_000
DROPPABLE = frozenset({"log", "query"})
CHUNK_ITEMS = 200
CHUNK_BYTES = 1024 * 1024
BATCH_BYTES = 256 * 1024
MAX_FRAME_BYTES = 4 * 1024 * 1024
LISTS = {"nodes": "nodes", "graph_nodes": "nodes", "results": "results"}
"""Frames that may be sent in several."""

HEAVY = ("compiled_code", "columns", "test_details", "header", "description", "meta")
"""Left out, in this order, of what is too long for a frame, until it fits."""

LATER = "later"
"""A frame's key for a function that gives the rest of it, called by the writer thread; None
means that there is nothing to tell."""

_LENGTH = struct.Struct(">I")
_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str)

Frame = Dict[str, Any]


class Channel:
    """The pipe to the parent."""

    def __init__(self, fd: int, scrubber: Scrubber, limit: int = LIMIT) -> None:
        self.scrubber = scrubber
        self.on_broken: Callable[[], None] = lambda: None
        self._fd = fd
        self._limit = limit
        self._queue: "queue.SimpleQueue[Optional[Frame]]" = queue.SimpleQueue()
        self._dropped: Dict[str, int] = {}
        self._drop_lock = threading.Lock()
        self._started = False
        self._broken = False
        self._number = 0
        self._thread = threading.Thread(target=self._run, name="dbtstream-writer", daemon=True)

    def start(self) -> None:
        """Begin writing, once; until then `scrubber` may be replaced."""
        if not self._started:
            self._started = True
            self._thread.start()

    def emit(self, frame: Frame) -> None:
        """Take a frame whose keys are the fields of `frames`, without `n`."""
        if frame["t"] in DROPPABLE and self._queue.qsize() >= self._limit:
            with self._drop_lock:
                self._dropped[frame["t"]] = self._dropped.get(frame["t"], 0) + 1
            return
        self._queue.put(frame)

    def close(self, timeout_s: float) -> bool:
        """Write what waits. False when the parent did not take it in time."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive() and not self._broken

    # The writer thread.

    def _run(self) -> None:
        more = True
        while more:
            frames = [self._queue.get()]
            parts: List[bytes] = []
            size = 0
            while frames:
                frame = frames.pop()
                if frame is None:
                    more = False
                    break
                for part in self._encode(frame):
                    parts.append(part)
                    size += len(part)
                if size >= BATCH_BYTES:
                    break
                try:
                    frames.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            if self._dropped and self._queue.qsize() < self._limit // 2:
                parts.extend(self._told())
            self._write(b"".join(parts))

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view and not self._broken:
            try:
                view = view[os.write(self._fd, view) :]
            except OSError:  # EPIPE: the parent is gone, so nobody wants this run any more
                self._broken = True
                self.on_broken()

    def _encode(self, frame: Frame) -> Iterator[bytes]:
        try:
            if LATER in frame:
                rest = frame.pop(LATER)()
                if rest is None:
                    return
                frame.update(rest)
            if frame["t"] == "result":
                yield from self._told()
                frame["stats"]["frames"] = self._number + 1
                frame["stats"]["scrubbed"] = self.scrubber.scrubbed
                frame["stats"]["writer_s"] = time.thread_time()
            field = LISTS.get(frame["t"])
            if field is None:
                clean = self.scrubber.frame(frame)
                yield self._pack(_lightened(clean, MAX_FRAME_BYTES), frame["t"])
            else:
                yield from self._chunks(frame, field)
        except Exception as error:  # a frame that cannot be told must not cost the others
            yield self._lost(frame, error)

    def _chunks(self, frame: Frame, field: str) -> Iterator[bytes]:
        """One long list as several frames, by count and by size."""
        head = _json(self.scrubber.frame({"t": frame["t"], "at": frame["at"]}))[:-1]
        items: List[bytes] = []
        size = 0
        for item in frame[field]:
            body = _lightened(self.scrubber.value(item), MAX_FRAME_BYTES // 2)
            if items and (len(items) == CHUNK_ITEMS or size + len(body) > CHUNK_BYTES):
                yield self._pack(_with_list(head, field, items), frame["t"])
                items, size = [], 0
            items.append(body)
            size += len(body)
        if items:
            yield self._pack(_with_list(head, field, items), frame["t"])

    def _pack(self, body: bytes, family: str) -> bytes:
        """Number and length in front. A frame that is too long is told as dropped."""
        if len(body) > MAX_FRAME_BYTES:
            body = _json(_dropped(family, 1, "too_long"))
        self._number += 1
        body = b'{"n":%d,' % self._number + body[1:]
        return _LENGTH.pack(len(body)) + body

    def _told(self) -> Iterator[bytes]:
        with self._drop_lock:
            dropped, self._dropped = self._dropped, {}
        for family, count in dropped.items():
            yield self._pack(_json(_dropped(family, count)), "dropped")

    def _lost(self, frame: Frame, error: Exception) -> bytes:
        text, _ = self.scrubber.text(f"{type(error).__name__}: {error}")
        return self._pack(_json(_dropped(frame["t"], 1, text)), "dropped")


def _dropped(family: str, count: int, why: Optional[str] = None) -> Frame:
    return {"t": "dropped", "at": time.time(), "family": family, "count": count, "why": why}


def _lightened(value: Frame, limit: int) -> bytes:
    """As JSON; where that is too long without what is heavy, and says so where it can."""
    body = _json(value)
    for name in HEAVY if len(body) > limit else ():
        if value.pop(name, None):
            if name in TRUNCATED:
                value[TRUNCATED[name]] = True
            body = _json(value)
            if len(body) <= limit:
                break
    return body


def _json(value: Any) -> bytes:
    # A lone surrogate (dbt reads file names with surrogateescape) becomes "?".
    return _encoder.encode(value).encode("utf-8", "replace")


def _with_list(head: bytes, field: str, items: List[bytes]) -> bytes:
    return head + b',"' + field.encode() + b'":[' + b",".join(items) + b"]}"
