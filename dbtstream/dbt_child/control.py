"""The parent's end of things: its lines on stdin, its deadlines, its death.

After `Start` each line is a wish; `stop` fulfils it. What does not end by itself after a
deadline or the parent's death is killed with its group.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import threading
import time
from typing import Any, Dict, List, Optional

from .stop import Stop

DEADLINE_GRACE_S = 10.0
ORPHAN_GRACE_S = 30.0
TICK_S = 0.5  # how often clocks are looked at; a machine that slept notices at once
_PR_SET_PDEATHSIG = 1


class Control:
    """The parent's side of the pipe: first `Start`, then lines; its end means that it died."""

    def __init__(self, fd: int, stop: Stop) -> None:
        self._fd = fd
        self._stop = stop
        self._buffer = b""
        self._deadline: Optional[float] = None
        self._kill_at: Optional[float] = None
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
        self._deadline = None
        self._kill_at = time.monotonic() + limit_s

    def orphaned(self) -> None:
        """The parent is gone."""
        self._open = False
        self._stop.request("eof")
        if self._kill_at is None:
            self._kill_at = time.monotonic() + ORPHAN_GRACE_S

    def _run(self) -> None:
        while True:
            for line in self._lines():
                self._obey(line)
            if self._deadline is not None and time.time() >= self._deadline:
                self._deadline = None
                self._kill_at = time.monotonic() + DEADLINE_GRACE_S
                self._stop.request("deadline")
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                kill_group()
            self._stop.insist()
            self._wait()

    def _wait(self) -> None:
        """Until the parent says something or it is time to look at the clock again."""
        try:
            watched = [self._stop.signal_fd] + ([self._fd] if self._open else [])
            ready, _, _ = select.select(watched, [], [], TICK_S)
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
                self._deadline = float(argument)
            except ValueError:
                sys.stderr.write(f"dbtstream: not a deadline: {argument!r}\n")


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
