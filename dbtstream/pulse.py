"""Whether the event loop still comes to its tasks, and how late.

Layer 2. One task ticks; threads that must answer even when the loop hangs (`http_port`) look at
when it last did. What is done at a tick may fail, and the next one comes all the same: a daemon
must not be restarted for a mistake in its metrics.
"""

import asyncio
import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

TICK_S = 1.0


class Pulse:
    """`run` until cancelled. `on_tick` gets how late each tick came; it must not block."""

    def __init__(self, *, tick_s: float = TICK_S) -> None:
        self.ticked_at = time.monotonic()
        self._tick_s = tick_s

    async def run(self, on_tick: Callable[[float], None]) -> None:
        loop = asyncio.get_running_loop()
        said = ""
        while True:
            due = loop.time() + self._tick_s
            await asyncio.sleep(self._tick_s)
            self.ticked_at = time.monotonic()
            try:
                on_tick(max(loop.time() - due, 0.0))
            except Exception as error:
                if said != (said := repr(error)):
                    logger.exception("a tick went wrong", extra={"action": "pulse.failed"})

    @property
    def silent_s(self) -> float:
        """Since the last tick. May be asked from any thread."""
        return time.monotonic() - self.ticked_at
