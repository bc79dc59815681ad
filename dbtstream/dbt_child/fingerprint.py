"""What is installed for this interpreter, in a form that is cheap to take and to compare.

Each installer writes a package's `*.dist-info` anew, so the stat of those is enough for what
lies in site-packages. Modules that come from elsewhere (an editable install, PYTHONPATH, this
very package) are looked at file by file.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from typing import Any, List, Tuple

_INFO = (".dist-info", ".egg-info")
_LINKS = (".pth", ".egg-link")

Fingerprint = Tuple[Tuple[str, int, int, int], ...]


def of_installed() -> Fingerprint:
    """Of the interpreter and of what is installed for it."""
    paths = [sys.executable, os.path.join(sys.prefix, "pyvenv.cfg")]
    for folder in sys.path:
        for name in _names(folder):
            if name.endswith(_INFO):
                paths += [os.path.join(folder, name), os.path.join(folder, name, "RECORD")]
            elif name.endswith(_LINKS):
                paths.append(os.path.join(folder, name))
    return of_files(paths)


def loose_modules() -> List[str]:
    """Files of what is imported and neither Python's own nor in a folder with packages."""
    paths = sysconfig.get_paths()
    kept = [paths["stdlib"], paths["platstdlib"]]
    kept += [each for each in sys.path if any(name.endswith(_INFO) for name in _names(each))]
    inside = tuple(os.path.join(os.path.abspath(each), "") for each in kept)
    ours = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")
    files = (_file(module) for module in list(sys.modules.values()))
    return sorted(
        {file for file in files if file and (file.startswith(ours) or not file.startswith(inside))}
    )


def of_files(paths: List[str]) -> Fingerprint:
    return tuple((path, *_stat(path)) for path in paths)


def _names(folder: str) -> List[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _file(module: Any) -> str:
    file = getattr(module, "__file__", None)
    return file if isinstance(file, str) else ""


def _stat(path: str) -> Tuple[int, int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (found.st_mtime_ns, found.st_size, found.st_ino)
