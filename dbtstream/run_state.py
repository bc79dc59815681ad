"""A run's state in KV, written behind the run's back: NATS being away must not slow dbt.

`RunState.move` and `note` only change what is wanted; one task writes the latest wish with
compare-and-set. States in between may be skipped, the last one never is.
"""

import asyncio
from datetime import datetime
from typing import Any

import msgspec

from dbtstream.errors import NatsUnavailable, Superseded
from dbtstream.messages import RunView
from dbtstream.runs import advance, given_back
from dbtstream.statuses import RunStatus
from dbtstream.store import RevisionConflict, Store

RETRY_S = 0.5


class RunState:
    """The one writer of a run's state while this worker holds its request."""

    def __init__(self, store: Store, view: RunView, revision: int) -> None:
        self.view = view
        self._store = store
        self._revision = revision
        self._changed = asyncio.Event()
        self._changed.set()
        self._closed = False

    def move(self, status: RunStatus, *, at: datetime, **facts: Any) -> None:
        """To the next status, with what is known by then. Raises IllegalMove."""
        self.view = advance(self.view, status, at=at)
        self.note(**facts)

    def give_back(self, *, at: datetime, **facts: Any) -> None:
        """To the queue, for another worker."""
        self.view = given_back(self.view, at=at)
        self.note(**facts)

    def note(self, **facts: Any) -> None:
        if facts:
            self.view = msgspec.structs.replace(self.view, **facts)
        self._changed.set()

    def close(self) -> None:
        """What is wanted now is the last; `run` returns when it is written."""
        self._closed = True
        self._changed.set()

    async def run(self) -> None:
        """Until `close` and the last write. Raises Superseded."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._write()
            if self._closed and not self._changed.is_set():
                return

    async def _write(self) -> None:
        while True:
            try:
                self._revision = await self._store.update_run(self.view, self._revision)
            except NatsUnavailable:
                await asyncio.sleep(RETRY_S)
            except RevisionConflict:
                await self._adopt()
            else:
                return

    async def _adopt(self) -> None:
        """A write that timed out may have happened: then the value is ours, go on from there."""
        stored = await self._read()
        if stored is None:  # it aged out of the bucket, or an operator has removed it
            self._revision = 0
            return
        view, self._revision = stored
        if view.fence != self.view.fence:
            how = f"worker {view.worker} has its state, with fence {view.fence}"
            raise Superseded(self.view.run_id, self.view.fence, how)

    async def _read(self) -> tuple[RunView, int] | None:
        while True:
            try:
                return await self._store.get_run(self.view.run_id)
            except NatsUnavailable:
                await asyncio.sleep(RETRY_S)
