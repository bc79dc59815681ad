"""Which run's trace the log lines of a task belong to. Stdlib and `trace` only.

Layer 1. Who carries a run through says so once (`in_run_of`), and every line that is logged
meanwhile, in this task, in those that it creates and in its threads, gets the ids in its JSON
(`logs`): a log collector finds the lines of a trace, and the trace of a line.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

from dbtstream.trace import span_id_of, trace_id_of

_NONE: Mapping[str, str] = MappingProxyType({})
_ids: ContextVar[Mapping[str, str]] = ContextVar("ids of the run's trace", default=_NONE)


@contextmanager
def in_run_of(run_id: str, attempt: int, trace_id: str | None) -> Iterator[None]:
    """Lines are about this attempt, and belong to its span. `trace_id`: as its events have it."""
    ids = {
        "trace_id": trace_id or trace_id_of(run_id),
        "span_id": span_id_of(run_id, attempt, "run"),
    }
    token = _ids.set(ids)
    try:
        yield
    finally:
        _ids.reset(token)


def trace_ids() -> Mapping[str, str]:
    """`trace_id` and `span_id`, the names of OpenTelemetry's log correlation; or nothing."""
    return _ids.get()
