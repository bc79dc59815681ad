"""dbt's events, on dbt's own threads -> frames.

An exception out of a callback can hang dbt for ever or turn a built model into an error
(dbt-core#11612), and a slow one stalls a worker thread; so nothing but the KeyboardInterrupt
that cancels dbt leaves `EventCallback`, and all real work is left to the channel's thread.

The type of an event decides, once, what is done with all of its kind; the commonest kinds
(queries, connections, the cache) cost one dictionary look-up. Types are known by the name of
their protobuf class: packages and codes have changed between dbt 1.8 and 1.12, names have not.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
import traceback
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

from .channel import LATER
from .columns import BUILDING, CONNECTION, ColumnAsker
from .compiled import compiled_code
from .event_names import LEVELS, NO_LEVEL, OUTPUT, QUIET, TOLD
from .plan import (
    TaskInFlight,
    Telling,
    Wanted,
    completed_command,
    task_in_flight,
    unavailable_plan,
)
from .readers import batch_in_flight, error_code, finish_fields
from .stop import Stop

Emit = Callable[[Dict[str, Any]], None]
Handler = Callable[[Any], None]

FLUSH_S = 10.0  # for a parent that reads slowly, before the results


class EventCallback:
    """What dbtRunner calls with every event."""

    def __init__(
        self,
        emit: Emit,
        stop: Optional[Stop] = None,
        *,
        log_level: str = "warn",
        queries: bool = False,
        query_sql: bool = False,
        wanted: Optional[Wanted] = None,
    ) -> None:
        self._emit = emit
        self._stop = stop
        self._wanted = wanted or Wanted()
        self._threshold = LEVELS.get(log_level, LEVELS["warn"])
        self._handlers: Dict[type, Optional[Handler]] = {}
        self._named = self._table(queries, query_sql)
        self._planned = False
        self._task: Optional[TaskInFlight] = None
        self._asker: Optional[ColumnAsker] = None
        self._muted: Set[int] = set()  # threads of ours in which dbt does something for us
        self._hook: Optional[str] = None  # hooks run one after the other
        self._working: Set[str] = set()  # the writer thread's, as is the next
        self._begun: Dict[str, int] = {}  # by unique_id: a model, and batches within it
        self._sql: Dict[int, str] = {}
        self._events = itertools.count()  # next() is atomic; `+= 1` is not
        self._errors = itertools.count()
        self.first_error: Optional[str] = None
        self.artifacts: List[Tuple[str, str, float]] = []  # type, path, when
        self.target_path: Optional[str] = None

    def __call__(self, event: Any) -> None:
        try:
            next(self._events)
            kind = type(event)
            try:
                handler = self._handlers[kind]
            except KeyError:
                handler = self._handlers[kind] = self._choose(kind.__name__)
            if handler is not None and not (self._muted and threading.get_ident() in self._muted):
                handler(event)
        except Exception:
            self._failed()
        if self._stop is not None and self._stop.requested:
            self._stop.check()

    def close(self) -> None:
        """dbt has returned: what the adapter has not answered is told as that."""
        if self._asker is not None:
            told = threading.Event()
            self._emit({"t": "columns", LATER: told.set})  # which tells nothing
            told.wait(FLUSH_S)
            self._asker.close()

    def counts(self) -> Tuple[int, int]:
        """Events received and handlers that raised; to be asked once, at the end."""
        return next(self._events), next(self._errors)

    def _failed(self) -> None:
        next(self._errors)
        if self.first_error is None:
            self.first_error = traceback.format_exc()

    def _read(
        self, fields: Callable[[Any], Optional[Dict[str, Any]]], event: Any
    ) -> Optional[Dict[str, Any]]:
        """In the writer thread; what it cannot read the channel tells as dropped."""
        try:
            return fields(event)
        except Exception:
            self._failed()
            raise

    def _choose(self, name: str) -> Optional[Handler]:
        if name in self._named:
            return self._named[name]
        if name in TOLD or (name in QUIET and self._threshold > LEVELS["debug"]):
            return None
        return self._output if name in OUTPUT else self._log

    def _table(self, queries: bool, query_sql: bool) -> Dict[str, Handler]:
        table: Dict[str, Handler] = {
            "MainReportVersionMsg": self._invocation,
            "FoundStatsMsg": self._found,
            "ConcurrencyLineMsg": self._plan,
            "NodeStartMsg": self._node_start,
            "LogStartLineMsg": self._start_line,
            "NodeCompilingMsg": self._compiling,
            "NodeFinishedMsg": self._node_finish,
            "SkippingDetailsMsg": self._skip,
            "LogStartBatchMsg": self._batch_start,
            "LogBatchResultMsg": self._batch_finish,
            "LogHookStartLineMsg": self._hook_start,
            "LogHookEndLineMsg": self._hook_finish,
            "DatabaseErrorRunningHookMsg": self._hook_error,
            "CatchableExceptionOnRunMsg": self._node_error,
            "InternalErrorOnRunMsg": self._node_error,
            "GenericExceptionOnRunMsg": self._node_error,
            "MainEncounteredErrorMsg": self._main_error,
            "MainStackTraceMsg": self._main_error,
            "ArtifactWrittenMsg": self._artifact,
            "LogCancelLineMsg": self._query_cancelled,
        }
        if self._wanted.graph:
            table["CommandCompletedMsg"] = self._command_completed
        if self._wanted.adapter_columns:
            table["ConnectionLeftOpenInCleanupMsg"] = self._cleaning_up
            table["ConnectionClosedInCleanupMsg"] = self._cleaning_up
        if queries:
            table["SQLQueryStatusMsg"] = self._query
            if query_sql:
                table["SQLQueryMsg"] = self._query_text
        return table

    # The run.

    def _invocation(self, event: Any) -> None:
        self._emit(
            {"t": "invocation", "at": time.time(), "invocation_id": event.info.invocation_id}
        )

    def _found(self, event: Any) -> None:
        self._emit({"t": "parsed", "at": time.time()})
        self._log(event)

    def _plan(self, event: Any) -> None:
        if self._planned:
            return
        self._planned = True
        try:
            self._task = task_in_flight()
            self.target_path = self._task.config.project_target_path
        finally:
            self._tell_plan(event.data)

    def _tell_plan(self, data: Any) -> None:
        task, wanted = self._task, self._wanted
        if task is None:
            self._emit(unavailable_plan(data))
            return
        telling = Telling(task, wanted, self._muted, self._failed)
        for frame in (*telling.plan_frames(data), *telling.graph_frames()):
            self._emit(frame)
        if wanted.adapter_columns and task.command in BUILDING:
            self._asker = ColumnAsker(task, self._emit, self._muted, self._cancelled)

    def _command_completed(self, event: Any) -> None:
        """A command that ran no nodes may have parsed a manifest all the same."""
        task = completed_command() if self._task is None else None
        if task is not None:
            for frame in Telling(task, self._wanted, self._muted, self._failed).graph_frames():
                self._emit(frame)

    def _cleaning_up(self, event: Any) -> None:
        if self._asker is not None:
            self._asker.end()

    def _cancelled(self) -> bool:
        return self._stop is not None and self._stop.requested

    def _main_error(self, event: Any) -> None:
        """The run-level exception is in `result`; a fail-fast one is not, dbt swallows it."""
        error = sys.exc_info()[1]
        if error is None or type(error).__name__ == "FailFastError":
            self._log(event)

    def _artifact(self, event: Any) -> None:
        data = event.data
        self.artifacts.append((data.artifact_type, data.artifact_path, time.time()))

    def _query_cancelled(self, event: Any) -> None:
        name = event.data.conn_name
        if name != CONNECTION:  # ours
            self._emit({"t": "query_cancelled", "at": time.time(), "connection": name})

    # Nodes.

    def _node_start(self, event: Any) -> None:
        self._emit(
            {
                "t": "node_start",
                "at": time.time(),
                "thread": threading.current_thread().name,
                LATER: partial(self._read, self._begin, event),
            }
        )

    def _start_line(self, event: Any) -> None:
        self._emit(
            {"t": "node_work", "at": time.time(), LATER: partial(self._read, self._line, event)}
        )

    def _compiling(self, event: Any) -> None:
        """All that ephemeral models have; of others LogStartLine came before."""
        self._emit(
            {"t": "node_work", "at": time.time(), LATER: partial(self._read, self._compile, event)}
        )

    def _line(self, event: Any) -> Dict[str, Any]:
        data = event.data
        unique_id = data.node_info.unique_id
        self._working.add(unique_id)
        return {"unique_id": unique_id, "index": data.index, "total": data.total}

    def _compile(self, event: Any) -> Optional[Dict[str, Any]]:
        unique_id = event.data.node_info.unique_id
        if unique_id in self._working:
            return None
        self._working.add(unique_id)
        return {"unique_id": unique_id, "index": None, "total": None}

    def _begin(self, event: Any) -> Dict[str, Any]:
        info = event.data.node_info
        unique_id = info.unique_id
        self._begun[unique_id] = self._begun.get(unique_id, 0) + 1
        return {"unique_id": unique_id, "started_at": info.node_started_at or None}

    def _node_finish(self, event: Any) -> None:
        asker = self._asker
        if asker is not None:
            asker.expect()
        self._emit(
            {"t": "node_finish", "at": time.time(), LATER: partial(self._read, self._end, event)}
        )
        if asker is not None:
            asker.finished(event.data.node_info.unique_id)

    def _end(self, event: Any) -> Dict[str, Any]:
        """Fields of the frame; what is worth knowing of a whole node goes on from here."""
        whole = False
        fields: Dict[str, Any] = {}
        try:
            fields = finish_fields(event)
            unique_id = fields["unique_id"]
            begun = self._begun[unique_id] = self._begun.get(unique_id, 1) - 1
            whole = begun <= 0
            if whole and self._wanted.compiled_code and self._task is not None:
                fields.update(self._code(unique_id))
            return fields
        finally:
            if self._asker is not None:
                if whole:
                    kind = event.data.node_info.resource_type
                    self._asker.ask(fields["unique_id"], fields["status"], kind)
                else:
                    self._asker.pass_over()

    def _code(self, unique_id: str) -> Dict[str, Any]:
        try:
            return compiled_code(self._task.manifest, self._task.config, unique_id)  # type: ignore[union-attr]
        except Exception:  # the finish is worth more than its code
            self._failed()
            return {}

    def _skip(self, event: Any) -> None:
        self._emit(
            {"t": "node_skip", "at": time.time(), "unique_id": event.data.node_info.unique_id}
        )

    def _node_error(self, event: Any) -> None:
        """Fired inside dbt's except clause, so the exception itself can still be looked at."""
        data = event.data
        error = sys.exc_info()[1]
        self._emit(
            {
                "t": "node_error",
                "at": time.time(),
                "unique_id": data.node_info.unique_id or getattr(data, "unique_id", ""),
                "error_class": "Exception" if error is None else type(error).__name__,
                "message": data.exc,
                "code": error_code(error),
            }
        )

    def _batch_start(self, event: Any) -> None:
        data = event.data
        self._emit(
            {
                "t": "batch_start",
                "at": time.time(),
                "unique_id": data.node_info.unique_id,
                "index": data.batch_index,
                "total": data.total_batches,
            }
        )

    def _batch_finish(self, event: Any) -> None:
        data = event.data
        frame = {
            "t": "batch_finish",
            "at": time.time(),
            "unique_id": data.node_info.unique_id,
            "index": data.batch_index,
            "total": data.total_batches,
            # dbt puts the adapter's answer here when the batch went well
            "status": data.status if data.status in ("error", "skipped") else "success",
            "execution_s": round(data.execution_time, 6),
        }
        try:
            frame["event_time_start"], frame["event_time_end"] = batch_in_flight()
        finally:
            self._emit(frame)

    # Hooks of the project.

    def _hook_start(self, event: Any) -> None:
        # dbt 1.8 runs start hooks before ConcurrencyLine; its task is in flight already.
        self._plan(event)
        data = event.data
        self._hook = data.node_info.unique_id
        self._emit(
            {
                "t": "hook_start",
                "at": time.time(),
                "unique_id": data.node_info.unique_id,
                "index": data.index,
                "total": data.total,
            }
        )

    def _hook_finish(self, event: Any) -> None:
        data = event.data
        self._hook = None
        self._emit(
            {
                "t": "hook_finish",
                "at": time.time(),
                "unique_id": data.node_info.unique_id,
                "status": data.status,
                "execution_s": round(data.execution_time, 6),
            }
        )

    def _hook_error(self, event: Any) -> None:
        """dbt 1.8 tells the failure of a hook so, and has no result for it."""
        if self._hook is not None:
            frame = {"t": "hook_finish", "at": time.time(), "unique_id": self._hook}
            self._hook = None
            self._emit({**frame, "status": "error", "message": str(sys.exc_info()[1] or "")})

    # Text.

    def _log(self, event: Any) -> None:
        level = event.info.level
        if LEVELS.get(level, NO_LEVEL) >= self._threshold:
            self._log_line(event, level)

    def _output(self, event: Any) -> None:
        self._log_line(event, event.info.level)

    def _log_line(self, event: Any, level: str) -> None:
        info = event.info
        if not info.msg:
            return
        node = getattr(event.data, "node_info", None)
        self._emit(
            {
                "t": "log",
                "at": time.time(),
                "level": level if level in ("info", "warn", "error") else "debug",
                "code": info.code,
                "name": info.name,
                "message": info.msg,
                "unique_id": getattr(node, "unique_id", None) or None,
            }
        )

    def _query_text(self, event: Any) -> None:
        self._sql[threading.get_ident()] = event.data.sql

    def _query(self, event: Any) -> None:
        data = event.data
        self._emit(
            {
                "t": "query",
                "at": time.time(),
                "unique_id": data.node_info.unique_id or None,
                "status": data.status,
                "elapsed_s": round(data.elapsed, 6),  # float32 in dbt
                "query_id": getattr(data, "query_id", None) or None,
                "sql": self._sql.pop(threading.get_ident(), None),
            }
        )


class MeasuredCallback:
    """An EventCallback that knows what it took; only where measuring was asked for.

    CPU time of the calling thread: a wait for the interpreter lock in here is one that dbt
    would have had a moment later. What the same measurement of nothing, beside it, takes is
    the clock's and taken off.
    """

    def __init__(self, callback: EventCallback) -> None:
        self._callback = callback
        self._lock = threading.Lock()
        self._total_ns = 0

    def __call__(self, event: Any) -> None:
        start = time.thread_time_ns()
        self._callback(event)
        middle = time.thread_time_ns()
        _nothing(event)
        end = time.thread_time_ns()
        with self._lock:
            self._total_ns += (middle - start) - (end - middle)

    @property
    def total_s(self) -> float:
        return self._total_ns / 1e9


def _nothing(event: Any) -> None:
    pass
