"""A project parsed by dbt, put away for a template: `parse_project`, in a process that ends then.

It is a fork of an import template, or would do for a process of its own. dbt's static parser
leaves native threads behind, so nothing may be forked from the process that parsed; and it had
the run's environment, with the secrets. So it writes what dbt has made of the project into a
file, as Python's own objects: the very manifest that a cold run would go on with. `manifest`
reads it again.

With it goes what the manifest is of (`project_files`), and what a cold run would tell while it
loads the project: warnings, and deprecations for the summary at the end.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import sys
from typing import Any, Dict, List, Optional, Tuple

from . import engine, project_files
from .engine import Refusal
from .main import import_dbt
from .project_files import Places, Signature

PARSED = "manifest.pickle"
PLACES = "places.json"
PARSE_CACHE = "partial_parse.msgpack"
PASSES = 3
LOUD = frozenset({"warn", "error"})
AFTER = "AdapterRegisteredMsg"
"""The event with which dbt begins to load its manifest; until it, a fork does all by itself."""


def parse_project(folder: str, args: List[str], unset: List[str]) -> None:
    """Into `folder`, which is nobody else's. `unset`: variables that each run has its own value
    of. Raises Refusal where no run may be forked from it."""
    version = engine.installed_dbt()
    sys.argv = ["dbt", *args]
    runner_class, _ = import_dbt(version)
    hearing = Hearing()
    places = _known_places(folder)
    for _ in range(PASSES):
        before = None if places is None else project_files.take(places)
        result = runner_class(callbacks=[hearing]).invoke(args)
        if not result.success:
            raise Refusal("parse_failed", _why(result))
        config = hearing.config
        if config is None:
            raise Refusal("parse_failed", "dbt's configuration was not found")
        _check(config, result.result, version, unset)
        _use_own_cache(folder)
        was, places = places, project_files.places_of(config, _profiles_dir(config))
        after = project_files.take(places)
        if before is not None and places == was and not project_files.difference(before, after):
            _write(folder, result.result, places, after, hearing)
            return
    raise Refusal("project_changes", "its files change faster than they are parsed")


class Hearing:
    """What dbt tells while it loads its manifest, and the configuration that it does so with."""

    def __init__(self) -> None:
        self.config: Any = None
        self.said: Dict[str, Tuple[str, bytes]] = {}  # text -> the event's class, itself
        self.deprecations: Dict[str, int] = {}
        self._before: Dict[str, int] = {}
        self._is_loading = False

    def __call__(self, event: Any) -> None:
        with contextlib.suppress(Exception):  # which could hang dbt
            self._hear(event)

    def _hear(self, event: Any) -> None:
        kind = type(event)
        if kind.__name__ == AFTER:
            self._is_loading = True
            self.config = config_in_flight()
            self._before = deprecations()
        elif kind.__name__ == "CommandCompletedMsg":
            self._is_loading = False
            for name, count in deprecations().items():
                more = count - self._before.get(name, 0)
                self.deprecations[name] = max(more, self.deprecations.get(name, 0))
        elif self._is_loading and event.info.level in LOUD and "Summary" not in kind.__name__:
            said = (kind.__name__, event.SerializeToString())
            self.said.setdefault(f"{event.info.name} {event.info.msg}", said)


def config_in_flight() -> Any:
    """dbt's RuntimeConfig, in click's context among the callers; None if it is not there."""
    frame: Any = sys._getframe(1)  # noqa: SLF001 - the documented way to a caller's locals
    while frame is not None:
        found = getattr(frame.f_locals.get("ctx"), "obj", None)
        if isinstance(found, dict) and found.get("runtime_config") is not None:
            return found["runtime_config"]
        frame = frame.f_back
    return None


def deprecations() -> Dict[str, int]:
    """How often each was used in this process; before dbt 1.10, that it was."""
    active = getattr(sys.modules.get("dbt.deprecations"), "active_deprecations", ())
    return dict(active) if isinstance(active, dict) else dict.fromkeys(active, 1)


def _check(config: Any, manifest: Any, version: str, unset: List[str]) -> None:
    """Raises Refusal where a manifest that is handed to dbt would not be what dbt makes."""
    root = str(config.project_root)
    if not getattr(_flags(), "PARTIAL_PARSE", True):
        raise Refusal("parse_wanted", "partial parsing is off for this project")
    if version.startswith("1.11.") and os.path.exists(os.path.join(root, "catalogs.yml")):
        raise Refusal("catalogs", "dbt 1.11 leaves out catalogs.yml when it is given a manifest")
    manager = _plugin_manager(config)
    if getattr(manager, "hooks", None):
        raise Refusal("plugins", f"dbt plugins take part: {', '.join(sorted(manager.hooks))}")
    read = {*manifest.env_vars, *(getattr(config, "project_env_vars", None) or ())}
    read |= {*(getattr(config, "profile_env_vars", None) or ())}
    own = sorted(read & set(unset))
    if own:
        raise Refusal("run_variables", f"parsing reads {', '.join(own)}, which each run has anew")


def _plugin_manager(config: Any) -> Any:
    from dbt import plugins

    return plugins.get_plugin_manager(config.project_name)


def _profiles_dir(config: Any) -> str:
    found = getattr(_flags(), "PROFILES_DIR", None) or getattr(config.args, "PROFILES_DIR", "")
    return str(found or ".")


def _flags() -> Any:
    module: Any = importlib.import_module("dbt.flags")
    return module.get_flags()


def _why(result: Any) -> str:
    error = result.exception
    return "dbt parse failed" if error is None else f"{type(error).__name__}: {error}"


def _use_own_cache(folder: str) -> None:
    """What was parsed now is what the next pass goes on from."""
    cache = os.path.join(folder, PARSE_CACHE)
    if os.path.exists(cache):
        os.environ["DBT_PARTIAL_PARSE_FILE_PATH"] = cache


def _known_places(folder: str) -> Optional[Places]:
    """Of the parse before: then one pass is enough, where they are still the same."""
    try:
        with open(os.path.join(folder, PLACES), encoding="utf-8") as file:
            return Places(*(list(map(str, part)) for part in json.load(file)))
    except (OSError, ValueError, TypeError):
        return None


def _write(
    folder: str, manifest: Any, places: Places, signature: Signature, hearing: Hearing
) -> None:
    fields = {name: value for name, value in vars(manifest).items() if name != "_lock"}
    said = list(hearing.said.values())
    parsed = {
        "fields": fields,
        "places": tuple(places),
        "signature": signature,
        "said": said,
        "deprecations": {name: count for name, count in hearing.deprecations.items() if count},
    }
    try:
        data = pickle.dumps(parsed, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        raise Refusal("not_kept", f"the manifest: {type(error).__name__}: {error}") from error
    for name, content in ((PLACES, json.dumps(list(places)).encode()), (PARSED, data)):
        fresh = os.path.join(folder, f".{name}")
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(content)
        os.replace(fresh, os.path.join(folder, name))
