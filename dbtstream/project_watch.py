"""Hears of changes in a project's files, so that what depends on them is made anew ahead of need.

Layer 2. Nothing relies on it: a template looks at the files itself before each fork. So where
the kernel gives no more watches, that is said once and the project goes on without.

A thread of its own: to begin a watch goes through all folders.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from typing import NamedTuple

logger = logging.getLogger(__name__)
logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it tells each change at level info

STEP_MS = 250
"""How often the thread looks at what the kernel has told; so late it stops, too."""

DEBOUNCE_MS = 1000
"""Changes that follow each other are one, for so long."""


class Places(NamedTuple):
    """As `dbt_child.project_files` has them: absolute paths, of `listed` folders their entries."""

    files: list[str]
    folders: list[str]
    listed: list[str]


class ProjectWatch:
    """`of` says what is watched, and may be called again; `close` at the end."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._places: Places | None = None
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def of(self, places: Places) -> None:
        if places == self._places:
            return
        self._stop.set()
        self._stop, self._places = threading.Event(), places
        self._threads = [
            threading.Thread(
                target=self._watch,
                args=(kind, places, self._stop),
                name="project watch",
                daemon=True,
            )
            for kind in (True, False)
        ]
        for thread in self._threads:
            thread.start()

    async def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    def _watch(self, recursive: bool, places: Places, stop: threading.Event) -> None:
        try:
            from watchfiles import watch

            paths = deep(places) if recursive else flat(places)
            if not paths:
                return
            for changes in watch(
                *paths,
                watch_filter=None,
                debounce=DEBOUNCE_MS,
                step=STEP_MS,
                stop_event=stop,
                recursive=recursive,
                ignore_permission_denied=True,
                raise_interrupt=False,
            ):
                if stop.is_set():
                    return
                if recursive or any(_is_one_of(path, places) for _, path in changes):
                    self._loop.call_soon_threadsafe(self._changed)
        except Exception as error:  # noqa: BLE001 - nothing relies on it
            if not stop.is_set():
                _say_once(f"{type(error).__name__}: {error}")


def deep(places: Places) -> list[str]:
    """Folders that are watched with all that is in them."""
    return [folder for folder in places.folders if os.path.isdir(folder)]


def flat(places: Places) -> list[str]:
    """Folders of which only the entries are watched: those that have one of the files, now or,
    as a project's own, once it is there."""
    found = {os.path.dirname(file) for file in places.files if os.path.isfile(file)}
    found |= {os.path.dirname(folder) for folder in (*places.folders, *places.listed)}
    found |= set(places.listed)
    return sorted(folder for folder in found if os.path.isdir(folder))


def _is_one_of(path: str, places: Places) -> bool:
    """Not a database or a log that lies beside the project's files."""
    known = path in places.files or path in places.folders
    return known or os.path.dirname(path) in places.listed


_has_said = threading.Event()


def _say_once(problem: str) -> None:
    if not _has_said.is_set():
        _has_said.set()
        logger.warning(
            "projects are not watched; they are parsed anew only after a run has found a change",
            extra={"action": "template.unwatched", "error": problem},
        )
