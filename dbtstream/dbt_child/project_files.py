"""All files that a parse of a project reads, in a form that is cheap to take and to compare.

What dbt reads is asked of dbt: the folders that its projects (the root's, installed and local
packages) name, everything in them, and files that have names of their own. Symbolic links are
followed, as dbt follows them. Taken before and after a parse, the same twice, it is what the
parse was of; the same once more before a fork, the parse still holds.

A stat says that a file has changed, unless it did so within a tick of the file system's clock.
So a file that had only just changed when it was looked at is known by its content, too, until a
later look finds it unchanged for longer (git calls such a file "racily clean").
"""

from __future__ import annotations

import hashlib
import os
import time
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Set, Tuple

RACY_NS = 2_000_000_000
"""The coarsest clock of a file system in use (FAT); ext4 and xfs tick every few milliseconds."""

SKIPPED = frozenset({"__pycache__", ".git"})

IN_PROJECT = (
    *("dbt_project.yml", "packages.yml", "dependencies.yml", "package-lock.yml"),
    *("selectors.yml", "catalogs.yml", "vars.yml", "profiles.yml", ".dbtignore", ".env"),
)
"""In the folder of a project or package. vars.yml and .env are read from dbt 1.12 on."""

PATHS = ("model", "seed", "snapshot", "analysis", "macro", "test", "function", "docs", "osi")
"""dbt's `<kind>-paths`; a release that has not all of them has nothing there."""

Stat = Tuple[int, int, int, int]  # mtime_ns, ctime_ns, size, inode
Entry = Tuple[Optional[Stat], str]  # None: it is not there; with the content's hash where racy
Signature = Dict[str, Entry]


class Places(NamedTuple):
    """Absolute paths. Of `listed` folders it is known which entries they have."""

    files: List[str]
    folders: List[str]
    listed: List[str]


def places_of(config: Any, profiles_dir: str) -> Places:
    """Of dbt's RuntimeConfig, after it has loaded its packages."""
    files, folders, listed = set(_profile_files(profiles_dir)), set(), set()
    for project in config.load_dependencies().values():
        root = os.path.abspath(str(project.project_root))
        files.update(os.path.join(root, name) for name in IN_PROJECT)
        for kind in PATHS:
            for path in getattr(project, f"{kind}_paths", None) or ():
                folders.add(os.path.normpath(os.path.join(root, path)))
    root = os.path.abspath(str(config.project_root))
    listed.add(os.path.normpath(os.path.join(root, str(config.packages_install_path))))
    files.update(os.path.join(above, ".env") for above in _above(root))
    return Places(sorted(files), sorted(_outermost(folders)), sorted(listed))


def _profile_files(profiles_dir: str) -> Iterable[str]:
    yield os.path.join(os.path.abspath(profiles_dir), "profiles.yml")
    yield os.path.expanduser("~/.dbt/user_settings.yml")  # dbt 1.12


def _above(path: str) -> Iterable[str]:
    """dbt 1.12 looks for its .env upwards."""
    while os.path.dirname(path) != path:
        path = os.path.dirname(path)
        yield path


def _outermost(folders: Set[str]) -> Iterable[str]:
    """A docs folder that is a models folder, too, is looked at once."""
    kept = ""
    for folder in sorted(folders, key=lambda each: each + os.sep):
        if not kept or not (folder + os.sep).startswith(kept + os.sep):
            kept = folder
            yield folder


def take(places: Places) -> Signature:
    """A stat of everything, and the content of what has only just changed."""
    began_ns = time.time_ns()
    stats = _stats(places)
    return {path: (stat, _content_if_racy(path, stat, began_ns)) for path, stat in stats.items()}


def first_change(known: Signature, places: Places) -> Optional[str]:
    """The path of something that is not as it was; None if all is. What is no longer racy, and
    is as it was, is from now on known by its stat alone."""
    began_ns = time.time_ns()
    stats = _stats(places)
    if stats.keys() != known.keys():
        return min(stats.keys() ^ known.keys())
    for path, stat in stats.items():
        was, content = known[path]
        if stat != was:
            return path
        if content:
            if _content(path) != content:
                return path
            known[path] = (stat, content if _is_racy(stat, began_ns) else "")
    return None


def difference(one: Signature, other: Signature) -> Optional[str]:
    """The path of something in which two that were taken one after the other differ."""
    if one.keys() != other.keys():
        return min(one.keys() ^ other.keys())
    for path, (stat, content) in one.items():
        now, now_content = other[path]
        if stat != now:
            return path
        if content and content != (now_content or _content(path)):
            return path
    return None


def _stats(places: Places) -> Dict[str, Optional[Stat]]:
    stats: Dict[str, Optional[Stat]] = {}
    for path in places.files:
        stats[path] = _stat(path)
    for folder in places.listed:
        stats.update((path, None) for path in _entries(folder))
    for folder in places.folders:
        stats[folder] = None  # that it is there is known by what is in it
        _walk(folder, stats, ())
    return stats


def _walk(
    folder: str, stats: Dict[str, Optional[Stat]], above: Tuple[Tuple[int, int], ...]
) -> None:
    """`above`: the folders that symbolic links have led through, lest they go round."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    except OSError:
        stats[folder + os.sep] = None  # not a folder, or not for us: that may change
        return
    for entry in entries:
        path = entry.path
        try:
            if entry.is_dir():
                if entry.name in SKIPPED:
                    continue
                through = above
                if entry.is_symlink():
                    found = entry.stat()
                    here = (found.st_dev, found.st_ino)
                    if here in above:
                        continue
                    through = (*above, here)
                _walk(path, stats, through)
            else:
                found = entry.stat()
                stats[path] = (
                    found.st_mtime_ns,
                    found.st_ctime_ns,
                    found.st_size,
                    found.st_ino,
                )
        except OSError:  # a link to nowhere, or gone meanwhile
            stats[path] = None


def _entries(folder: str) -> List[str]:
    """Their names, with what kind they are; a package is one of them."""
    try:
        return [
            entry.path + (os.sep if entry.is_dir() else "")
            for entry in os.scandir(folder)
            if entry.name not in SKIPPED
        ]
    except OSError:
        return []


def _stat(path: str) -> Optional[Stat]:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)


def _content_if_racy(path: str, stat: Optional[Stat], now_ns: int) -> str:
    return _content(path) if _is_racy(stat, now_ns) else ""


def _is_racy(stat: Optional[Stat], now_ns: int) -> bool:
    """Also what has a time to come: that of another machine."""
    return stat is not None and max(stat[0], stat[1]) > now_ns - RACY_NS


def _content(path: str) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for part in iter(lambda: file.read(1 << 20), b""):
                digest.update(part)
    except OSError as error:
        return f"unreadable: {error.errno}"
    return digest.hexdigest()
