"""How dbt is interrupted, so that it really stops.

A cancel is a KeyboardInterrupt in dbt's main thread, which is what dbt's own Ctrl-C is: it
writes run_results, cancels open queries and returns. It happens once, however many ask; only
SIGTERM, the parent's next rung, interrupts once more. Outside `invoke` it is only noted.

Four ways in which an interrupt gets lost are seen to here, each met with real dbt: a signal
that comes just before the main thread goes to sleep does not wake it; a query that begins
after dbt has cancelled the open ones runs on; an adapter's C code never looks at signals; an
adapter turns the interrupt into an error that dbt goes on after.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from types import FrameType
from typing import Any, Callable, Optional, Type

from .channel import Channel

INSIST_S = 1.0
NAMES = {signal.SIGINT: "sigint", signal.SIGTERM: "sigterm"}


class Stop:
    """Whether dbt is to stop, and the interrupting of it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._first = threading.Lock()  # taken once and kept: a test-and-set for signal handlers
        self._main = threading.main_thread().ident or 0
        self._rungs = {signal.SIGINT: 1, signal.SIGTERM: 1}
        self._signal = signal.SIGINT
        self._invoking = False
        self._interrupted = False
        self._insist_at = 0.0
        self._insisting: Optional[threading.Thread] = None
        self.requested = False
        self.signal_fd, self._wakeup_fd = os.pipe()

    def install(self) -> None:
        """Handlers of our own: a parent may have left SIGINT ignored."""
        os.set_blocking(self._wakeup_fd, False)
        signal.set_wakeup_fd(self._wakeup_fd, warn_on_full_buffer=False)
        for number in NAMES:
            signal.signal(number, self._on_signal)

    def request(self, by: str) -> None:
        """From any other thread. Only the first counts."""
        if self._note(by):
            signal.pthread_kill(self._main, self._signal)

    def signalled(self) -> None:
        """`signal_fd` can be read: a signal came, though the main thread may not know yet."""
        for number in os.read(self.signal_fd, 512):
            if number in NAMES and self._note(NAMES[signal.Signals(number)]):
                self._signal = signal.Signals(number)

    def invoke(self, invoke: Callable[[], Any]) -> Any:
        """Call dbt; outside this call nothing is ever interrupted. None: interrupted outside."""
        outcome = None
        try:
            try:
                self._invoking = True
                if self.requested:
                    self._interrupted = True
                    raise KeyboardInterrupt
                outcome = invoke()
            finally:
                self._invoking = False
        except KeyboardInterrupt:
            self._invoking = False
        return outcome

    def insist(self) -> None:
        """Once a second after a cancel, from the control thread, until dbt returns.

        dbt cancels open queries once and then waits for its workers; what a worker sends a
        moment later is cancelled here, and so is a hook's statement on the main thread, which
        dbt does not cancel at all.
        """
        now = time.monotonic()
        if not (self.requested and self._invoking) or now < self._insist_at:
            return
        self._insist_at = now + INSIST_S
        if not self._interrupted:
            signal.pthread_kill(self._main, self._signal)
        if self._insisting is None or not self._insisting.is_alive():
            self._insisting = threading.Thread(
                target=cancel_queries, name="dbtstream-cancel", daemon=True
            )
            self._insisting.start()

    def check(self) -> None:
        """At dbt's events after a cancel: raise again on the main thread what got lost there.

        DuckDB turns an interrupt that arrives during a query into a RuntimeError, and dbt takes
        that for a failed hook and goes on to build everything (seen with 1.8).
        """
        if not (self._interrupted and self._invoking):
            return
        if threading.get_ident() == self._main and not _handling(KeyboardInterrupt):
            raise KeyboardInterrupt

    def _note(self, by: str) -> bool:
        if not self._first.acquire(blocking=False):
            return False
        self._insist_at = time.monotonic() + INSIST_S
        self.requested = True
        self._channel.emit({"t": "cancelling", "at": time.time(), "by": by})
        return True

    def _on_signal(self, signum: int, _frame: Optional[FrameType]) -> None:
        number = signal.Signals(signum)
        self._note(NAMES[number])
        if self._invoking and self._rungs[number]:
            self._rungs[number] -= 1
            self._interrupted = True
            raise KeyboardInterrupt


def _handling(kind: Type[BaseException]) -> bool:
    """Whether this thread is inside the handling of such an exception."""
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__context__
    return False


def cancel_queries() -> None:
    """What dbt's main thread does on Ctrl-C, from a thread of ours."""
    factory: Any = sys.modules.get("dbt.adapters.factory")
    try:
        for adapter in list(factory.FACTORY.adapters.values()) if factory else ():
            if adapter.is_cancelable():
                # Some adapters cancel by a statement, and so need a connection of this thread.
                with adapter.connection_named("dbtstream-cancel"):
                    adapter.cancel_open_connections()
    except Exception:
        traceback.print_exc()  # to stderr; dbt may be closing the same connections right now
