"""What dbt does slowly, done faster where it is provably the same. Nothing else of dbt is patched.

Each one is tied to the releases and to the very text of the function that it was checked
against; where those are others, dbt stays as it is. A project can switch all of them off.

    cycle_check   `Linker.find_cycles` walks the edges anew from every root: most of the time
                  before the first node where there are some thousand. Whether there is a cycle at
                  all takes linear time; where there is one, dbt's own function has the message.

Not among them: DBT_USE_FAST_TEST_EDGES. In projects with sources it leaves out edges of tests that
depend on several nodes (dbt 1.10 to 1.12), so that a model can be built before such a test.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from typing import Any, Callable, List, Optional

CHECKED = ("1.8.", "1.9.", "1.10.", "1.11.", "1.12.")
FIND_CYCLES = "d0bcc9d2b3af95d4"
"""Of the text of `Linker.find_cycles`, which is the same in all of them."""


def apply(version: str) -> List[str]:
    """The names of those that are in effect now. Never raises."""
    if not version.startswith(CHECKED):
        return []
    try:
        return ["cycle_check"] if _check_cycles_in_linear_time() else []
    except Exception as error:
        sys.stderr.write(f"dbtstream: dbt's cycle check stays as it is: {error!r}\n")
        return []


def _check_cycles_in_linear_time() -> bool:
    compilation: Any = importlib.import_module("dbt.compilation")
    original = compilation.Linker.find_cycles
    if getattr(original, "is_ours", False):
        return True
    if source_hash(original) != FIND_CYCLES:
        return False
    is_acyclic = compilation.nx.is_directed_acyclic_graph
    compilation.Linker.find_cycles = faster_find_cycles(original, is_acyclic)
    return True


def faster_find_cycles(original: Callable[[Any], Optional[str]], is_acyclic: Any) -> Any:
    def find_cycles(self: Any) -> Optional[str]:
        return None if is_acyclic(self.graph) else original(self)

    find_cycles.is_ours = True  # type: ignore[attr-defined]
    return find_cycles


def source_hash(function: Any) -> str:
    """Raises OSError where there is no source."""
    text = inspect.getsource(function).rstrip() + "\n"
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
