"""A manifest that was parsed by another process, in a template; and what makes it a run's own.

`Parsed.load` is called in the template, once; nothing there ever runs on the manifest, since a
second run on one manifest leaves out ephemeral models. The rest is called in the fork: there the
manifest gets its lock, and when dbt has come to where it would have parsed, its metadata and the
warnings that dbt would have told. From there on the run is as any.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import traceback
from typing import Any, Callable, Dict, List, Optional

from . import project_files
from .parse import AFTER, PARSED, config_in_flight
from .project_files import Places, Signature


class Parsed:
    """What `parse` has put away, read again."""

    def __init__(
        self,
        fields: Dict[str, Any],
        places: Places,
        signature: Signature,
        said: List[Any],
        deprecations: Dict[str, int],
    ) -> None:
        self._fields = fields
        self._places, self._signature = places, signature
        self._said, self._deprecations = said, deprecations

    @classmethod
    def load(cls, folder: str) -> "Parsed":
        """Raises OSError, and whatever a file of another dbt makes pickle raise."""
        path = os.path.join(folder, PARSED)
        with open(path, "rb") as file:
            parsed = pickle.load(file)  # noqa: S301 - ours, in a folder of our own
        os.unlink(path)
        said = [_event(*each) for each in parsed["said"]]
        places = Places(*parsed["places"])
        fields = parsed["fields"]
        return cls(fields, places, parsed["signature"], said, parsed["deprecations"])

    def compile_macros(self) -> None:
        """Into dbt's own cache, by their text: each run would do it for those that it calls."""
        jinja: Any = importlib.import_module("dbt_common.clients.jinja")
        for macro in list(self._fields["macros"].values()):
            try:
                jinja.template_cache.get_node_template(macro)
            except Exception:  # noqa: S112 - a run that calls it will tell
                continue

    def change(self) -> Optional[str]:
        """The path of something that is not as it was when this was parsed."""
        return project_files.first_change(self._signature, self._places)

    # In the fork.

    def runner(self, runner_class: Any, callback: Callable[[Any], None]) -> Any:
        """dbt's runner with the manifest. Its lock is this process's own: one that forks share
        stays locked when one of them is killed."""
        module: Any = importlib.import_module("dbt.contracts.graph.manifest")
        manifest = module.Manifest()
        manifest.__dict__.update(self._fields)
        renewal = self._renewal(manifest, callback)
        return runner_class(manifest=manifest, callbacks=[callback, renewal])

    def _renewal(self, manifest: Any, tell: Callable[[Any], None]) -> Callable[[Any], None]:
        """A callback of dbt's. `tell` hears what is said again, as it would have been."""

        def renew(event: Any) -> None:
            if type(event).__name__ != AFTER:
                return
            try:
                renew_metadata(manifest)
                self._count_deprecations()
                for each in self._said:
                    say_again(each, tell)
            except Exception:  # it could hang dbt
                traceback.print_exc()

        return renew

    def _count_deprecations(self) -> None:
        active: Any = getattr(sys.modules.get("dbt.deprecations"), "active_deprecations", None)
        for name, count in self._deprecations.items():
            if isinstance(active, dict):
                active[name] = active.get(name, 0) + count
            elif active is not None:
                active.add(name)


def renew_metadata(manifest: Any) -> None:
    """Of this invocation, as dbt makes it when it parses: else artifacts could not be joined. And
    selectors as they are: a parse that found no other change has kept those of its cache."""
    config = config_in_flight()
    if config is not None:
        manifest.metadata = config.get_metadata()
        manifest.selectors = config.manifest_selectors


def say_again(event: Any, tell: Callable[[Any], None]) -> None:
    """As dbt's event manager does, to loggers and to us: it is an event of this invocation."""
    client: Any = importlib.import_module("dbt_common.events.event_manager_client")
    functions: Any = importlib.import_module("dbt_common.events.functions")
    info = event.info
    info.pid = os.getpid()
    info.thread = "MainThread"
    info.ts.GetCurrentTime()
    info.invocation_id = importlib.import_module("dbt_common.invocation").get_invocation_id()
    info.extra.clear()
    info.extra.update(functions.get_metadata_vars())
    for logger in client.get_event_manager().loggers:
        if logger.filter(event):
            logger.write_line(event)
    tell(event)


EVENTS = (
    ("dbt.events.base_types", "CoreBaseEvent"),
    ("dbt.adapters.events.base_types", "AdapterBaseEvent"),
    ("dbt_common.events.base_types", "BaseEvent"),
)
"""Where dbt's packages have their kinds of event; the classes of messages name no module."""


def _event(name: str, data: bytes) -> Any:
    """Raises LookupError."""
    for module, base in EVENTS:
        kinds = getattr(importlib.import_module(module), base).PROTO_TYPES_MODULE
        kind: Any = getattr(kinds, name, None)
        if kind is not None:
            return kind.FromString(data)
    raise LookupError(name)
