"""dbt's artifacts: what they are called, where they lie, which are a target's state.

`workspace` makes the folders that they are written into, `artifact_store` keeps them. Paths are
fixed: a request can name no other (`policy`).
"""

import os
from pathlib import Path
from typing import Any

import msgspec

from dbtstream.scrub import Scrubber
from dbtstream.workspace import open_private

LOG = "log"
FILES = {
    "manifest": "manifest.json",
    "run_results": "run_results.json",
    "sources": "sources.json",
    "catalog": "catalog.json",
    LOG: "dbt.log",
}
"""Kind, as `artifact.written` has it -> what the file is called, on disk and in the store."""

LOG_TAIL_BYTES = 64 * 1024

_NODES = ("manifest", "run_results")
_LATEST = {
    "build": _NODES,
    "run": _NODES,
    "seed": _NODES,
    "snapshot": _NODES,
    "clone": _NODES,
    "retry": _NODES,
    # A test proves nothing about what is built: its manifest may be ahead of the warehouse.
    "test": ("run_results",),
    "source freshness": ("sources",),
    "docs generate": ("catalog",),
}

_PATH_ARGS = (
    "defer_state",
    "log_path",
    "output_path",
    "partial_parse_file_path",
    "profiles_dir",
    "project_dir",
    "state",
    "target_path",
)


class _CatalogColumn(msgspec.Struct, frozen=True):
    name: str
    type: str | None = None
    index: int = 0


class _CatalogTable(msgspec.Struct, frozen=True):
    columns: dict[str, _CatalogColumn] = {}


class _Catalog(msgspec.Struct, frozen=True):
    nodes: dict[str, _CatalogTable] = {}
    sources: dict[str, _CatalogTable] = {}


def read_catalog(path: str | Path) -> dict[str, list[tuple[str, str | None]]]:
    """unique_id -> (name, type) of each column, as the database has them and in its order.

    Blocking. Raises OSError, msgspec.DecodeError.
    """
    catalog = msgspec.json.decode(Path(path).read_bytes(), type=_Catalog)
    return {
        unique_id: [(c.name, c.type) for c in sorted(table.columns.values(), key=lambda c: c.index)]
        for unique_id, table in (catalog.nodes | catalog.sources).items()
        if table.columns
    }


def latest_kinds(command: str) -> tuple[str, ...]:
    """Which artifacts of a good run of `command` are its target's state from then on."""
    return _LATEST.get(command, ())


def artifact_files(
    target_path: Path, log_path: Path, into: Path, scrubber: Scrubber
) -> dict[str, Path]:
    """What is there, by kind; the tail of the log is written into a folder first.

    Blocking; raises OSError. In a shared target path these may be of an earlier run.
    """
    found = {kind: target_path / name for kind, name in FILES.items() if kind != LOG}
    files = {kind: path for kind, path in found.items() if path.is_file()}
    if tail := write_log_tail(log_path / FILES[LOG], into / FILES[LOG], scrubber):
        files[LOG] = tail
    return files


def write_log_tail(log: Path, tail: Path, scrubber: Scrubber) -> Path | None:
    """The last whole lines of a log in a file of their own; None if there is no log. Blocking."""
    try:
        with log.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - 2 * LOG_TAIL_BYTES)
            file.seek(start)
            # More than is kept, and scrubbed before it is cut: a secret of several lines would
            # else lose its beginning, and the rest of it would pass.
            data = scrubber.data(file.read(2 * LOG_TAIL_BYTES))
    except FileNotFoundError:
        return None
    kept = data[-LOG_TAIL_BYTES:]
    if start or len(data) > len(kept):
        kept = kept.partition(b"\n")[2] or kept
    with open_private(tail) as file:
        file.write(kept)
    return tail


def without_paths(run_results: bytes) -> bytes:
    """A run_results.json that another worker can retry from. Raises msgspec.DecodeError.

    dbt notes every path of the run in `args`, and `dbt retry` takes those of the parse cache and
    of the state directory for its own: it ends where they are not (dbt-core 1.8 to 1.12).
    """
    document: dict[str, Any] = msgspec.json.decode(run_results, type=dict[str, Any])
    args = document.get("args")
    if isinstance(args, dict):
        document["args"] = {key: value for key, value in args.items() if key not in _PATH_ARGS}
    return msgspec.json.encode(document)
