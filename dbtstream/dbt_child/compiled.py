"""The SQL that a node ran, when it has finished: from the live manifest, in the writer thread.

dbt fills `compiled_code` of the very node that it runs (1.8 to 1.12). Only a microbatch model
keeps none: each batch compiles a copy, whose code is left in a file.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from typing import Any, Dict, Optional

from .nodes import word

MAX_CODE_BYTES = 1024 * 1024  # longer code is not told, only its hash
MAX_FILE_BYTES = 16 * 1024 * 1024
MAX_BATCH_FILES = 20_000
TOLD = frozenset({"model", "snapshot"})


def compiled_code(manifest: Any, config: Any, unique_id: str) -> Dict[str, Any]:
    """Fields of `node_finish`; {} of what has no code, or none yet. The hash is of the code as
    it is; what is told of it goes through the scrubber like everything."""
    node = manifest.nodes.get(unique_id)
    code = getattr(node, "compiled_code", None)
    if not code and is_microbatch(node):
        code = _code_of_a_batch(node, config)
    if not isinstance(code, str) or not code:
        return {}
    raw = code.encode("utf-8", "replace")
    fields: Dict[str, Any] = {"compiled_code_hash": hashlib.sha256(raw).hexdigest()}
    if word(node.resource_type) in TOLD and getattr(node, "language", None) != "python":
        if len(raw) > MAX_CODE_BYTES:
            fields["compiled_code_truncated"] = True
        else:
            fields["compiled_code"] = code
    return fields


def is_microbatch(node: Any) -> bool:
    config = getattr(node, "config", None)
    return (
        getattr(config, "materialized", None) == "incremental"
        and getattr(config, "incremental_strategy", None) == "microbatch"
    )


def _code_of_a_batch(node: Any, config: Any) -> Optional[str]:
    """Of the last one written: `<the model's file without .sql>/<model>_<batch>.sql`."""
    whole = node.get_target_write_path(config.target_path, "compiled")
    folder = os.path.splitext(os.path.join(config.project_root, whole))[0]
    latest, path = -1.0, None
    try:
        with os.scandir(folder) as entries:
            for entry in itertools.islice(entries, MAX_BATCH_FILES):
                written = entry.stat().st_mtime
                if written > latest:
                    latest, path = written, entry.path
        if path is None:
            return None
        with open(path, "rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError:
        return None
    return raw.decode("utf-8", "replace") if len(raw) <= MAX_FILE_BYTES else None
