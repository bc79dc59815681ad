"""Values on their way to a KV bucket, behind the back of the run that they are of.

`store` and `lineage_store` say what is written. A run of ten thousand nodes must not wait for ten
thousand answers: `put` never waits, the newest value of a key replaces one that has not been
written, and many are written at once. What the server refuses is counted and said once.
"""

import asyncio
import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from dbtstream.errors import NatsRefused, NatsUnavailable

logger = logging.getLogger(__name__)

BATCH_KEYS = 200
LINGER_S = 0.05

T = TypeVar("T")
Group = tuple[str, str]
"""Project and target: what is waited for, and written, together."""


class WriteBehind(Generic[T]):
    """Run `run()` in a task; `close()` lets it end when all is written.

    `write` gets up to BATCH_KEYS values of one group; it may raise NatsUnavailable (they are
    kept and tried again) and NatsRefused (they are given up).
    """

    def __init__(
        self,
        write: Callable[[Sequence[T]], Awaitable[None]],
        *,
        key: Callable[[T], str],
        group: Callable[[T], Group],
        what: str,
    ) -> None:
        self._write_values, self._key, self._group, self._what = write, key, group, what
        self._waiting: dict[str, T] = {}
        self._writing: dict[str, T] = {}
        self._wake = asyncio.Event()
        self._closed = asyncio.Event()
        self._hurry = asyncio.Event()
        self._wrote = asyncio.Event()
        self.counts: Counter[str] = Counter()
        """received, sent, dropped (a newer one came before it was written), failed."""

    def put(self, value: T) -> None:
        """Never waits."""
        key = self._key(value)
        self.counts["received"] += 1
        # To the end of the line: what was put after the older one may have to be there first.
        self.counts["dropped"] += self._waiting.pop(key, None) is not None
        self._waiting[key] = value
        self._wake.set()

    def close(self) -> None:
        """No more puts."""
        self._closed.set()
        self._hurry.set()
        self._wake.set()

    async def written(self, project: str, target: str) -> None:
        """Wait until what was put of this target is in the bucket, or refused; for `run()`.

        What is not when a run ends is lost if this process dies: nobody looks at it again.
        """
        group = (project, target)
        keys = {key for key, value in self._not_written().items() if self._group(value) == group}
        while not keys.isdisjoint(self._not_written()):
            self._hurry.set()
            self._wrote.clear()
            await self._wrote.wait()

    async def run(self) -> None:
        """Until `close()` was called and everything is written. May be cancelled."""
        while not (self._closed.is_set() and not self._waiting):
            if not self._waiting:
                self._wake.clear()
                await self._wake.wait()
            await self._linger()
            # One write at a time: two of one key in flight could end in the wrong order.
            self._writing = self._next_chunk()
            if self._writing:
                await self._write(self._writing)
            self._writing = {}
            self._wrote.set()

    def _not_written(self) -> dict[str, T]:
        return {**self._waiting, **self._writing}

    async def _linger(self) -> None:
        """More may come in a moment, and many at once cost little more than one."""
        if len(self._waiting) < BATCH_KEYS:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    await self._hurry.wait()
        if not self._closed.is_set():
            self._hurry.clear()

    def _next_chunk(self) -> dict[str, T]:
        """The oldest that wait, of one group."""
        first = next(iter(self._waiting.values()), None)
        if first is None:
            return {}
        group = self._group(first)
        of_group = (key for key, value in self._waiting.items() if self._group(value) == group)
        keys = list(itertools.islice(of_group, BATCH_KEYS))
        return {key: self._waiting.pop(key) for key in keys}

    async def _write(self, chunk: dict[str, T]) -> None:
        try:
            await self._write_values(list(chunk.values()))
            self.counts["sent"] += len(chunk)
        except NatsUnavailable:
            self._waiting = chunk | self._waiting
        except NatsRefused:
            self.counts["failed"] += len(chunk)
            if self.counts["failed"] == len(chunk):
                logger.exception(
                    "%s cannot be written",
                    self._what,
                    extra={
                        "action": f"{self._what.replace(' ', '_')}.failed",
                        "keys": next(iter(chunk)),
                    },
                )
