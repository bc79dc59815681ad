"""Asks the adapter for the columns of what was built, in a thread of its own.

Only where the project wants it: it costs one connection and one metadata query per relation.
dbt's threads go on meanwhile; only the one that finishes the last node waits for the answers,
`PATIENCE_S` at most, since dbt closes all connections right after. Whatever is not answered by
then, or fails, is told as a `columns` frame with a problem; nothing ever reaches dbt.
"""

from __future__ import annotations

import collections
import contextvars
import threading
import time
from typing import Any, Callable, Deque, Dict, List, Optional, Set

from .nodes import word

PATIENCE_S = 5.0  # in all, per run
TICK_S = 0.1
LIMIT = 1000
MAX_COLUMNS = 5000
CONNECTION = "dbtstream-columns"
BUILDING = frozenset({"build", "run", "seed", "snapshot", "clone"})
BUILT = frozenset({"model", "seed", "snapshot"})
ENDED = "dbt's run ended before the adapter was asked"
UNANSWERED = "dbt's run ended before the adapter answered"

Emit = Callable[[Dict[str, Any]], None]


class ColumnAsker:
    """`expect` and `finished` are called by dbt's threads, `ask` and `pass_over` by the writer.

    Each finish that is expected is settled once: when it is clear that nothing is to be asked,
    or when the answer has been told.
    """

    def __init__(
        self,
        task: Any,
        emit: Emit,
        muted: Set[int],
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config, self._manifest = task.config, task.manifest
        self._emit = emit
        self._muted = muted
        self._cancelled = cancelled
        self._connection: Any = None  # while it is in use
        self._unfinished: Set[str] = set(task.selected)
        self._state = threading.Condition()  # guards all that follows
        self._waiting: Deque[str] = collections.deque()
        self._asking: Optional[str] = None
        self._expected = self._settled = 0
        self._ended = self._closed = False
        self._patience_s = PATIENCE_S
        context = contextvars.copy_context()  # dbt's macros look up the invocation in it
        thread = threading.Thread(
            target=context.run, args=(self._run,), name=CONNECTION, daemon=True
        )
        thread.start()

    def expect(self) -> None:
        """A node is about to be told as finished."""
        with self._state:
            self._expected += 1

    def finished(self, unique_id: str) -> None:
        """It was. Waits for all answers where no node is left, for dbt will go on to its end."""
        self._unfinished.discard(unique_id)
        if not self._unfinished:
            self._wait()

    def end(self) -> None:
        """On dbt's main thread, just before it closes a connection: ask no more.

        One that is still busy is passed off as closed, so that dbt leaves it alone: DuckDB
        refuses to close it, and that would be the end of a good run (seen with DuckDB 2.0).
        """
        self._ended = True
        connection = self._connection
        if connection is not None:
            from dbt.adapters.contracts.connection import ConnectionState

            connection.state = ConnectionState.CLOSED

    def close(self) -> None:
        """dbt has returned, and the writer has told every finish: tell what was not answered."""
        with self._state:
            self._ended = self._closed = True
            if self._asking is not None:
                self._tell(self._asking, problem=UNANSWERED)
            for unique_id in self._waiting:
                self._tell(unique_id, problem=ENDED)
            self._waiting.clear()
            self._state.notify_all()

    # The writer thread.

    def ask(self, unique_id: str, status: str, resource_type: str) -> None:
        """About a node that has finished, batches and all."""
        node = self._manifest.nodes.get(unique_id)
        built = resource_type in BUILT and status in ("success", "partial success")
        if not built or node is None or getattr(node, "is_ephemeral_model", False):
            self.pass_over()
            return
        with self._state:
            if len(self._waiting) < LIMIT:
                self._waiting.append(unique_id)
                self._state.notify_all()
                return
        self._tell(unique_id, problem=f"{LIMIT} relations were waiting already")
        self.pass_over()

    def pass_over(self) -> None:
        with self._state:
            self._settled += 1
            self._state.notify_all()

    # The thread that asks.

    def _run(self) -> None:
        self._muted.add(threading.get_ident())
        while True:
            with self._state:
                while not self._waiting and not self._closed:
                    self._state.wait()
                if self._closed:
                    return
                self._asking = unique_id = self._waiting.popleft()
            answer = self._answer(unique_id)
            with self._state:
                if self._closed:  # then `close` has told it
                    return
                self._asking = None
                self._tell(unique_id, **answer)
            self.pass_over()

    def _answer(self, unique_id: str) -> Dict[str, Any]:
        if self._ended or self._cancelled():
            return {"problem": ENDED}
        try:
            return {"columns": self._columns(unique_id)}
        except Exception as error:
            return {"problem": f"{type(error).__name__}: {error}"}

    def _columns(self, unique_id: str) -> List[Dict[str, Any]]:
        """A connection each time: dbt does so, too, and within one transaction DuckDB would not
        see what was built since."""
        from dbt.adapters.factory import get_adapter

        adapter: Any = get_adapter(self._config)
        relation = adapter.Relation.create_from(self._config, self._manifest.nodes[unique_id])
        with adapter.connection_named(CONNECTION):
            self._connection = connection = adapter.connections.get_if_exists()
            try:
                found = list(adapter.get_columns_in_relation(relation))
            finally:
                self._connection = None
                if self._ended:  # then nobody else will close it
                    connection.handle.close()
        return [
            {"name": str(column.name), "data_type": word(column.dtype)}
            for column in found[:MAX_COLUMNS]
        ]

    # All of them.

    def _tell(self, unique_id: str, **answer: Any) -> None:
        self._emit({"t": "columns", "at": time.time(), "unique_id": unique_id, **answer})

    def _wait(self) -> None:
        began_s = time.monotonic()
        with self._state:
            while self._settled < self._expected and not self._cancelled():
                if time.monotonic() - began_s >= self._patience_s:
                    self._ended = True
                    break
                self._state.wait(TICK_S)
            self._patience_s -= time.monotonic() - began_s
