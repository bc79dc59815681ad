"""The kernel's share of a deadline: SIGKILL at a given time, whatever this process is doing.

`control` kills the whole group in time, but it is a Python thread: it stands still while an
adapter's C code holds the interpreter, and in a process that was stopped others may send one
more statement before it gets its turn. A POSIX timer needs neither: a stopped process dies
without ever being woken, even if the parent has renewed what could not be read. Linux only;
elsewhere nothing is armed and `control` is alone.
"""

from __future__ import annotations

import ctypes
import math
import signal
import sys
from typing import Any

_CLOCK_BOOTTIME = 7  # as in `control.clock_s`
_SIGEV_SIGNAL = 0
_TIMER_ABSTIME = 1


class _Event(ctypes.Structure):
    """`struct sigevent`, padded to its 64 bytes."""

    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("pad", ctypes.c_char * 48),
    ]


class _Times(ctypes.Structure):
    """`struct itimerspec`: no interval, and when."""

    _fields_ = [
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    ]


class KillTimer:
    """One timer of this process; `arm` as often as the time changes."""

    def __init__(self) -> None:
        self._libc: Any = None
        self._id = ctypes.c_void_p()
        self._at = math.inf
        if not sys.platform.startswith("linux"):
            return
        event = _Event(signo=signal.SIGKILL, notify=_SIGEV_SIGNAL)
        try:
            libc: Any = ctypes.CDLL(None, use_errno=True)
            made = libc.timer_create(
                ctypes.c_int(_CLOCK_BOOTTIME), ctypes.byref(event), ctypes.byref(self._id)
            )
        except (OSError, AttributeError):  # a libc that keeps timers elsewhere
            return
        if made == 0:
            self._libc = libc

    @property
    def works(self) -> bool:
        return self._libc is not None

    def arm(self, at: float) -> None:
        """Die at that time of `control.clock_s`; at once if it is past, never if infinite."""
        if at == self._at or not self.works:
            return
        self._at = at
        # All zeros would disarm; and no process is alive that was started at second 1.
        seconds = max(at, 1.0) if math.isfinite(at) else 0.0
        times = _Times(value_s=int(seconds), value_ns=int(seconds % 1 * 1e9))
        self._libc.timer_settime(self._id, _TIMER_ABSTIME, ctypes.byref(times), None)
