"""A run's state in KV, written behind the run's back: NATS being away must not slow dbt.

`RunState.move` and `note` only change what is wanted; one task writes the latest wish with
compare-and-set. States in between may be skipped, the last one never is.
"""

import asyncio
import logging
from datetime import datetime
from typing import Any

import msgspec

from dbtstream.errors import NatsUnavailable
from dbtstream.messages import RunView
from dbtstream.runs import advance
from dbtstream.statuses import RunStatus
from dbtstream.store import RevisionConflict, Store

logger = logging.getLogger(__name__)

RETRY_S = 0.5


class RunState:
    """The one writer of a run's state while this worker holds its request."""

    def __init__(self, store: Store, view: RunView, revision: int | None) -> None:
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

    def note(self, **facts: Any) -> None:
        if facts:
            self.view = msgspec.structs.replace(self.view, **facts)
        self._changed.set()

    def close(self) -> None:
        """What is wanted now is the last; `run` returns when it is written."""
        self._closed = True
        self._changed.set()

    async def run(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            if not await self._write() or (self._closed and not self._changed.is_set()):
                return

    async def _write(self) -> bool:
        while True:
            try:
                if self._revision is None:
                    self._revision = await self._store.create_run(self.view)
                else:
                    self._revision = await self._store.update_run(self.view, self._revision)
            except NatsUnavailable:
                await asyncio.sleep(RETRY_S)
            except RevisionConflict:
                if not await self._adopt():
                    return False
            else:
                return True

    async def _adopt(self) -> bool:
        """A write that timed out may have happened: then the value is ours, go on from there."""
        stored = await self._read()
        if stored is None:
            self._revision = None
            return True
        view, self._revision = stored
        if view.worker in (None, self.view.worker) and not view.status.is_terminal:
            return True
        logger.error(
            "another worker has moved this run; its state is left as it is",
            extra={
                "action": "run_state.conflict",
                "run_id": view.run_id,
                "status": view.status,
                "worker": view.worker,
            },
        )
        return False

    async def _read(self) -> tuple[RunView, int] | None:
        while True:
            try:
                return await self._store.get_run(self.view.run_id)
            except NatsUnavailable:
                await asyncio.sleep(RETRY_S)
