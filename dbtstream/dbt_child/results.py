"""What `dbtRunner.invoke` returned, and the files it left -> frames.

Events cannot be joined to what they lack: freshness ages, batch results, the compiled code
and the exception itself are only here. Read after dbt is done, on the main thread.
"""

from __future__ import annotations

import hashlib
import os
import resource
import sys
import time
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

from .callback import EventCallback
from .nodes import word
from .readers import error_code

KINDS = {
    "WritableManifest": "manifest",
    "RunExecutionResult": "run_results",
    "RunResultsArtifact": "run_results",
    "FreshnessResult": "sources",
    "CatalogArtifact": "catalog",
    "SemanticManifest": "semantic_manifest",
}
FOUND_BY_NAME = (
    "manifest.json",
    "run_results.json",
    "sources.json",
    "catalog.json",
    "semantic_manifest.json",
)
PERIOD_S = {"minute": 60, "hour": 3600, "day": 86400}
UNHANDLED, HANDLED = 2, 1


def results_frames(returned: Any) -> Tuple[int, List[Dict[str, Any]]]:
    """Entries and their frames; -1 where the command returns no list of nodes."""
    entries = getattr(returned, "results", None)
    if not isinstance(entries, (list, tuple)):
        return -1, []
    # run-operation's one entry is the macro; in dbt 1.8 a failed hook has one without a node.
    results = [node_result(entry) for entry in entries if hasattr(entry, "node")]
    if entries and not results:
        return -1, []
    return len(results), [{"t": "results", "at": time.time(), "results": results}]


def node_result(entry: Any) -> Dict[str, Any]:
    node = entry.node
    failures = entry.failures
    return {
        "unique_id": node.unique_id,
        "status": word(entry.status),
        "message": None if entry.message is None else str(entry.message),
        "failures": None if failures is None else int(failures),
        "timing": [
            {"name": step.name, "started_at": step.started_at, "completed_at": step.completed_at}
            for step in entry.timing or ()
        ],
        "execution_s": entry.execution_time,
        "adapter_response": dict(entry.adapter_response or {}),
        "batch_results": _batches(getattr(entry, "batch_results", None)),
        "freshness": _freshness(entry, node),
        "compiled_code_hash": _hash(getattr(node, "compiled_code", None)),
    }


def result_frame(outcome: Any, count: int, stats: Dict[str, Any]) -> Dict[str, Any]:
    """The last frame. Exit codes are those of dbt's own command line."""
    error = outcome.exception
    failed = HANDLED if error is None else UNHANDLED
    return {
        "t": "result",
        "at": time.time(),
        "success": bool(outcome.success),
        "exit_code": 0 if outcome.success else failed,
        "result_count": count,
        "error": error_info(error),
        "interrupted": _interrupted(error),
        "stats": stats,
    }


def error_info(error: Optional[BaseException]) -> Optional[Dict[str, Any]]:
    if error is None:
        return None
    return {
        "error_class": type(error).__name__,
        "message": str(error),
        "code": error_code(error),
    }


def _interrupted(error: Optional[BaseException]) -> bool:
    """Also where dbt's clean-up after the interrupt raised: DuckDB's cancel of a connection that
    is being closed ends a run with ConnectionException (dbt-duckdb 1.8).
    """
    while error is not None:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            return True
        error = error.__context__
    return False


def stats(callback: Optional[EventCallback], callback_s: Optional[float]) -> Dict[str, Any]:
    """What this process used; ru_maxrss is KiB on Linux and bytes on macOS."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    events, errors = callback.counts() if callback else (0, 0)
    return {
        "events": events,
        "callback_errors": errors,
        "callback_error": callback.first_error if callback else None,
        "callback_s": callback_s,
        "max_rss_bytes": own.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "cpu_s": own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime,
    }


def artifact_frames(
    told: Iterable[Tuple[str, str, float]], search: Optional[str], since: float
) -> Iterator[Dict[str, Any]]:
    """Files as they lie there now, each once; `search` only for dbt 1.8, which tells none."""
    files: Dict[str, Tuple[str, float]] = {}
    for artifact_type, path, when in told:
        files[os.path.abspath(path)] = (KINDS.get(artifact_type) or _stem(path), when)
    for name in FOUND_BY_NAME if search else ():
        path = os.path.abspath(os.path.join(search or "", name))
        try:
            when = os.stat(path).st_mtime
        except OSError:
            continue
        if when >= since and path not in files:
            files[path] = (_stem(path), when)
    for path, (kind, when) in files.items():
        sha256, size = _digest(path)
        yield {
            "t": "artifact",
            "at": when,
            "kind": kind,
            "path": path,
            "sha256": sha256,
            "size": size,
        }


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _digest(path: str) -> Tuple[Optional[str], Optional[int]]:
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
                size += len(block)
    except OSError:  # told of, but gone
        return None, None
    return digest.hexdigest(), size


def _hash(code: Optional[str]) -> Optional[str]:
    return hashlib.sha256(code.encode("utf-8", "replace")).hexdigest() if code else None


def _batches(results: Any) -> Optional[Dict[str, Any]]:
    """Of a microbatch model; other models have none, or an empty one."""
    if not results or not (results.successful or results.failed):
        return None
    return {
        "successful": [list(batch) for batch in results.successful],
        "failed": [list(batch) for batch in results.failed],
    }


def _freshness(entry: Any, node: Any) -> Optional[Dict[str, Any]]:
    if not hasattr(entry, "max_loaded_at"):
        return None
    wanted = getattr(node, "freshness", None)
    return {
        "max_loaded_at": entry.max_loaded_at,
        "snapshotted_at": entry.snapshotted_at,
        "age_s": entry.age,
        "warn_after_s": _seconds(getattr(wanted, "warn_after", None)),
        "error_after_s": _seconds(getattr(wanted, "error_after", None)),
        "filter": getattr(wanted, "filter", None),
    }


def _seconds(time_spec: Any) -> Optional[float]:
    count, period = getattr(time_spec, "count", None), word(getattr(time_spec, "period", None))
    if count is None or period not in PERIOD_S:
        return None
    return float(count) * PERIOD_S[period]
