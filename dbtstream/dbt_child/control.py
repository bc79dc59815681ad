"""The parent's end of things: its lines on stdin, its deadlines, its death.

After `Start` each line is a wish; `stop` fulfils it. What does not end by itself in time after
a deadline or the parent's death is killed with its group.

The deadline is the parent's lease seen from here. At its first time dbt is cancelled, once; at
its second the group is killed, whatever dbt, its clean-up or our own last frames are about:
from then on another attempt may be writing to the same target. Both are absolute times of a
clock that goes on while the machine or this process sleeps, so one that wakes up late has
nothing left but to die. What the parent said meanwhile is read first: it may have renewed.
`kill_timer` does it one tick later where this thread cannot.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import select
import signal
import sys
import threading
import time
from typing import Any, Dict, List, Tuple

from .kill_timer import KillTimer
from .stop import Stop

ORPHAN_GRACE_S = 30.0
TICK_S = 0.5  # how often clocks are looked at, at least
_PR_SET_PDEATHSIG = 1


class Control:
    """The parent's side of the pipe: first `Start`, then lines; its end means that it died."""

    def __init__(self, fd: int, stop: Stop) -> None:
        self._fd = fd
        self._stop = stop
        self._buffer = b""
        self._stop_at = math.inf
        self._kill_at = math.inf  # by the parent's deadline
        self._end_at = math.inf  # by our own limits: an orphan's, or that of the last frames
        self._returned = False  # dbt has: nothing is left to cancel
        self._timer = KillTimer()
        self._open = True
        self._thread = threading.Thread(target=self._run, name="dbtstream-control", daemon=True)

    def read_start(self) -> Dict[str, Any]:
        """The first line. Raises EOFError when the parent is already gone."""
        while b"\n" not in self._buffer:
            data = os.read(self._fd, 65536)
            if not data:
                raise EOFError("stdin ended before the first line")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        start = json.loads(line.decode("utf-8"))
        if not isinstance(start, dict):
            raise TypeError("the first line on stdin is not an object")
        return start

    def watch(self) -> None:
        self._thread.start()

    def finishing(self, limit_s: float) -> None:
        """dbt has returned: only a hang at the very end may still be killed."""
        self._stop_at, self._returned = math.inf, True
        self._end_at = min(self._end_at, clock_s() + limit_s)

    def orphaned(self) -> None:
        """The parent is gone."""
        self._open = False
        self._stop.request("eof")
        self._end_at = min(self._end_at, clock_s() + ORPHAN_GRACE_S)

    def _run(self) -> None:
        while True:
            for line in self._lines():
                self._obey(line)
            kill_at = min(self._kill_at, self._end_at)
            now = clock_s()
            if now >= kill_at:
                kill_group()
            self._timer.arm(kill_at + TICK_S)
            if now >= self._stop_at:
                self._stop_at = math.inf
                self._stop.request("deadline")  # which counts once, however often it is renewed
            self._stop.insist()
            self._wait()

    def _wait(self) -> None:
        """Until the parent says something or it is time to look at the clock again."""
        try:
            watched = [self._stop.signal_fd] + ([self._fd] if self._open else [])
            next_s = min(self._stop_at, self._kill_at, self._end_at) - clock_s()
            ready, _, _ = select.select(watched, [], [], min(TICK_S, max(next_s, 0.0)))
            if self._stop.signal_fd in ready:
                self._stop.signalled()
            if self._fd not in ready:
                return
            data = os.read(self._fd, 65536)
        except OSError:
            data = b""
        if data:
            self._buffer += data
        else:
            self.orphaned()

    def _lines(self) -> List[str]:
        *lines, self._buffer = self._buffer.split(b"\n")
        return [line.decode("utf-8", "replace").strip() for line in lines]

    def _obey(self, line: str) -> None:
        word, _, argument = line.partition(" ")
        if word == "cancel":
            self._stop.request("control")
        elif word == "deadline":
            try:
                stop_at, self._kill_at = deadline(argument)
            except ValueError:
                sys.stderr.write(f"dbtstream: not a deadline: {argument!r}\n")
                return
            if not self._returned:
                self._stop_at = stop_at


def deadline(argument: str) -> Tuple[float, float]:
    """When to cancel dbt and when to kill its group. Raises ValueError."""
    stop_at, kill_at = (float(part) for part in argument.split())
    if not (math.isfinite(stop_at) and math.isfinite(kill_at)):
        raise ValueError(argument)
    return stop_at, kill_at


def clock_s() -> float:
    """The same as `dbtstream.frames.clock_s`: the parent's deadlines are times of this clock."""
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boottime is None else time.clock_gettime(boottime)


def take_stdin() -> int:
    """Keep the control pipe to ourselves; dbt and its adapters read /dev/null."""
    fd = os.dup(0)  # not inheritable
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return fd


def die_with_parent() -> None:
    """SIGTERM when the parent dies (Linux). Elsewhere, and in the race, stdin's end tells."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    except (OSError, AttributeError):  # a libc without prctl
        return
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def kill_group() -> None:
    """The hard end. Of the group only if it is ours: the parent starts us in a new session."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
