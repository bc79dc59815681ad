"""What a template has imported: dbt, the adapter, and what a run would import besides.

Imports may read the environment, and keep what they found for as long as the process lives. So
the names that they read are written down: a run whose environment says something else there
must not be a fork of this process. Only reads through `os.environ` are seen; what C libraries
read when they are loaded, `dbtstream.templates` knows by name.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import sys
from typing import Any, Iterator, List, Set

from . import engine
from .main import import_dbt

BESIDES = (
    "_strptime",
    "babel.dates",
    "dbt_common.clients.agate_helper",
    "google.protobuf.descriptor_pb2",
    "metricflow.converters.msi_to_osi",
    "multiprocessing.dummy",
    "multiprocessing.pool",
)
"""What dbt 1.8 to 1.12 import later, in a build on DuckDB; not every release has all of them."""

LOOK_FOR = {"networkx.utils.backends": "NETWORKX_"}
"""Modules that go through the whole environment, and the beginning of the names that they want."""

EVERYTHING = "*"
_BETWEEN = frozenset({"os", "posixpath", "collections.abc", "_collections_abc"})


def import_all() -> List[str]:
    """The names in the environment that were read; a final * matches any ending.

    Raises engine.Refusal.
    """
    with Reads() as reads:
        import_dbt(engine.installed_dbt())
        task: Any = importlib.import_module("dbt.task")
        names = [f"dbt.task.{module.name}" for module in pkgutil.iter_modules(task.__path__)]
        for name in (*names, *BESIDES):
            with contextlib.suppress(Exception):  # a run that needs it will tell
                importlib.import_module(name)
        only = engine.only_adapter()
        if only is not None:
            _import(only)
    return reads.names()


def import_adapter(kind: str) -> List[str]:
    """The same of one adapter. Raises engine.Refusal."""
    with Reads() as reads:
        _import(kind)
    return reads.names()


def _import(kind: str) -> None:
    try:
        importlib.import_module(f"dbt.adapters.{kind}")
    except Exception as error:
        message = f"dbt.adapters.{kind}: {type(error).__name__}: {error}"
        raise engine.Refusal("import_failed", message) from error


def imported_adapters() -> List[str]:
    """Their types; among them are names of what only looks like one."""
    head = "dbt.adapters."
    names = [name[len(head) :] for name in list(sys.modules) if name.startswith(head)]
    return sorted(name for name in names if "." not in name)


class Reads:
    """Inside, `os.environ` is one that notes who is asked for."""

    def __init__(self) -> None:
        self._seen: Set[str] = set()

    def __enter__(self) -> "Reads":
        _noted.clear()
        os.environ.__class__ = _Noting
        return self

    def __exit__(self, *error: object) -> None:
        os.environ.__class__ = _PLAIN
        self._seen = set(_noted)

    def names(self) -> List[str]:
        return sorted(self._seen)


_PLAIN: Any = type(os.environ)
_noted: Set[str] = set()


class _Noting(_PLAIN):  # type: ignore[misc]
    def __getitem__(self, name: str) -> str:
        prefix = LOOK_FOR.get(_caller(), "")
        if name.startswith(prefix) or self.encodekey(name) not in self._data:
            _noted.add(name)
        value: str = super().__getitem__(name)
        return value

    def __iter__(self) -> Iterator[str]:
        _noted.add(LOOK_FOR.get(_caller(), "") + EVERYTHING)
        names: Iterator[str] = super().__iter__()
        return names


def _caller() -> str:
    """The module that asks, behind those that only hand it on."""
    frame: Any = sys._getframe(2)  # noqa: SLF001
    while frame is not None and frame.f_globals.get("__name__") in _BETWEEN:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")) if frame is not None else ""
