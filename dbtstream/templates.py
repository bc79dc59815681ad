"""Warm starts: processes that have imported dbt already, and the runs that are forked from them.

Layer 2. A template is a process of a project's interpreter that imports dbt and the adapter once
and then waits; a run that is forked from it has those seconds behind it. `dbt_process` asks here
first, and starts the run from nothing where the answer is None: there is no template yet, or it
says that a fork would not be the same as a new process. Why, is counted, and logged once.

What imports read of the environment is in a template for good. So it gets only that much of an
environment, its values are what a template is known by, and a run whose environment differs
there is another template's. The other side is `dbt_child.template`.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import sys
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from dbtstream.config import DEFAULT_PASS_ENV, Config
from dbtstream.forked_process import ForkedProcess
from dbtstream.manifest_templates import ManifestTemplates, Recipe
from dbtstream.template import FORK_S, Key, NoFork, Template
from dbtstream.workspace import child_environment

logger = logging.getLogger(__name__)

MAX_TEMPLATES = 4
"""At one time; each takes some 100 MB. The one that was not asked for longest makes room."""

MAX_RUNS = 200
"""Then a template is replaced: what forked runs leave in it, if they do, is bounded."""

MAX_PAUSE_S = 60.0
UNFIT_S = 600.0
"""An interpreter whose imports start threads will do so the next time, too."""

ASKED_KEPT = 64

READ_BY_LIBRARIES = (
    *("PYTHON", "LD_", "LANG", "LC_", "TZ", "GLIBC_", "MALLOC_", "JEMALLOC_", "OPENSSL_"),
    *("OMP_", "OPENBLAS_", "GOTO_", "MKL_", "KMP_", "BLIS_", "GRPC_", "ARROW_", "ABSL_", "RUST_"),
)
"""How the names of variables begin that C code may read when it is loaded. What Python code
reads, the template notices by itself."""

SECRET_PREFIX = "DBT_ENV_SECRET_"  # noqa: S105 - a name

REPLACED = frozenset({"runs", "memory", "stale"})
"""Ends of a template after which the next one is begun at once."""

QUIET = frozenset({"starting", "other_environment", *REPLACED})

DEATHS = frozenset({"died", "hung"})
"""After those it is begun a while later, if the last one had been ready."""


@dataclass(slots=True)
class TemplateStats:
    """`warm` and `cold` are runs, by why they were cold; the others are templates."""

    warm: int = 0
    cold: Counter[str] = field(default_factory=Counter)
    started: int = 0
    died: int = 0
    replaced: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Pause:
    """Between a template that failed and the next one of the same key."""

    failures: int = 0
    not_before: float = 0.0
    reason: str = ""


class Templates:
    """Those of a worker. Use as an async context manager; afterwards they are gone."""

    def __init__(
        self,
        mode: Literal["off", "imports", "manifest"],
        *,
        max_templates: int = MAX_TEMPLATES,
        max_runs: int = MAX_RUNS,
        fork_s: float = FORK_S,
    ) -> None:
        self.stats = TemplateStats()
        self._is_on = mode != "off" and sys.platform == "linux"
        self._max_templates, self._max_runs, self._fork_s = max_templates, max_runs, fork_s
        self._templates: OrderedDict[Key, Template] = OrderedDict()
        self._reads: dict[str, set[str]] = {}
        self._asked: OrderedDict[Key, None] = OrderedDict()
        self._pauses: dict[Key, _Pause] = {}
        self._said: set[tuple[str, str]] = set()
        self._lives: set[asyncio.Task[None]] = set()
        self._one_at_a_time = asyncio.Lock()
        self._is_closing = False
        self.manifests: ManifestTemplates | None = None
        if mode == "manifest" and self._is_on:
            self.manifests = ManifestTemplates(
                self._find, self._one_at_a_time, max_runs=max_runs, fork_s=fork_s
            )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_closing = True
        if self.manifests is not None:
            await self.manifests.close()
        for life in self._lives:
            life.cancel()
        await asyncio.gather(*self._lives, return_exceptions=True)

    def prepare(self, config: Config) -> None:
        """Begin a template for each interpreter of the config, before a run asks for it."""
        for project in config.projects.values():
            if self._is_on:
                environment = child_environment(project, os.environ)
                with contextlib.suppress(NoFork):
                    self._find(project.python, environment, project.secrets)

    async def fork(
        self,
        python: str,
        folder: str,
        environment: Mapping[str, str],
        secret_names: Collection[str],
        frames: int,
        recipe: Recipe | None = None,
    ) -> ForkedProcess | None:
        """A process that reads its `Start` and writes frames, or None: it has to start cold.

        With a `recipe`, of a template that has parsed what that says, if there is one.
        """
        # A folder that is not there is for a cold start to complain of.
        if not self._is_on or not await asyncio.to_thread(os.access, folder, os.X_OK):
            return None
        if self.manifests is not None and (
            parsed := await self._fork_parsed(recipe, environment, frames)
        ):
            return parsed
        try:
            template = self._find(python, environment, secret_names)
            process = await template.fork(folder, environment, frames, self._fork_s)
        except NoFork as cold:
            self.stats.cold[cold.reason] += 1
            self._say(python, cold)
            return None
        self.stats.warm += 1
        return process

    async def _fork_parsed(
        self, recipe: Recipe | None, environment: Mapping[str, str], frames: int
    ) -> ForkedProcess | None:
        assert self.manifests is not None  # noqa: S101 - the caller looked
        if recipe is None:
            self.manifests.stats.declined["own_parse"] += 1
            return None
        with contextlib.suppress(NoFork):
            return await self.manifests.fork(recipe, environment, frames)
        return None

    def learn(self, python: str, adapter: str) -> None:
        """A run of this interpreter uses that adapter: its templates should have it, too."""
        for key, template in self._templates.items():
            if key.python == python:
                template.import_adapter(adapter)

    def run_ended(self, recipe: Recipe | None) -> None:
        """One that was, or was not, forked from a template of that."""
        if self.manifests is not None and recipe is not None:
            self.manifests.run_ended(recipe)

    def pids(self) -> list[int]:
        """Of the templates that runs can be forked from."""
        return [each.pid for each in self._templates.values() if each.is_ready]

    def pids_by_start(self) -> dict[str, list[int]]:
        """By what a run is called that is forked from them."""
        return {"warm": self.pids(), "manifest": self.manifests.pids() if self.manifests else []}

    def declined(self) -> dict[tuple[str, str], int]:
        """Runs that were not forked from a template of that kind, by why."""
        manifests = self.manifests.stats.declined if self.manifests else {}
        return {
            **{("warm", reason): count for reason, count in self.stats.cold.items()},
            **{("manifest", reason): count for reason, count in manifests.items()},
        }

    # Which one.

    def _find(
        self, python: str, environment: Mapping[str, str], secret_names: Collection[str]
    ) -> Template:
        """Raises NoFork, and then sees to it that there is one the next time."""
        key = self._key(python, environment, secret_names)
        template = self._templates.get(key)
        if template is None:
            self._begin_if_wanted(key)
            raise NoFork(self._why_none(key))
        self._templates.move_to_end(key)
        if not template.is_ready:
            raise NoFork("starting")
        return template

    def _key(
        self, python: str, environment: Mapping[str, str], secret_names: Collection[str]
    ) -> Key:
        wanted = import_environment(environment, self._reads.get(python, ()))
        for name in wanted:
            if name in secret_names or name.startswith(SECRET_PREFIX):
                raise NoFork("environment", f"imports read the secret {name}")
        if any(not part.startswith("/") for part in _parts(wanted.get("PYTHONPATH", ""))):
            raise NoFork("environment", "PYTHONPATH has relative paths")
        return Key(python, tuple(sorted(wanted.items())))

    def _begin_if_wanted(self, key: Key) -> None:
        """The first of an interpreter at once; another one only when it is asked for again, so
        that a variable which changes with every run does not begin a template each time."""
        others = any(each.python == key.python for each in self._templates)
        if others and key not in self._asked:
            self._asked[key] = None
            while len(self._asked) > ASKED_KEPT:
                self._asked.popitem(last=False)
            return
        pause = self._pauses.get(key)
        if pause is None or asyncio.get_running_loop().time() >= pause.not_before:
            self._begin(key)

    def _why_none(self, key: Key) -> str:
        if key in self._templates:
            return "starting"
        pause = self._pauses.get(key)
        return pause.reason if pause is not None else "other_environment"

    # Their lives.

    def _begin(self, key: Key) -> None:
        if self._is_closing or key in self._templates:
            return
        while len(self._templates) >= self._max_templates:
            _, oldest = self._templates.popitem(last=False)
            oldest.retire("room")
        template = self._templates[key] = Template(key, self._note_reads)
        life = asyncio.create_task(self._live(template), name=f"template of {key.python}")
        self._lives.add(life)
        life.add_done_callback(self._lives.discard)

    async def _live(self, template: Template) -> None:
        """From its start to the end of its last run, and what follows it."""
        try:
            end = await self._serve(template)
            self._leave_out(template)
            if self.manifests is not None:
                self.manifests.retire_children(template)
            if end.reason in REPLACED:
                self._begin(template.key)
            pause_s = self._judge(template, end)
            await template.last_run_ended()
        finally:
            self._leave_out(template)
            await asyncio.shield(template.close())
        if end.reason in DEATHS and template.was_ready:
            await asyncio.sleep(pause_s)
            self._begin(template.key)

    async def _serve(self, template: Template) -> NoFork:
        """Until no run can be forked from it any more: why."""
        if await asyncio.to_thread(_is_script, template.key):
            return NoFork("script", "it may do something else for each run")
        try:
            async with self._one_at_a_time:  # dbt that runs needs the machine, too
                self.stats.started += 1
                await template.start(self._max_runs)
        except NoFork as problem:
            return problem
        logger.info(
            "template ready",
            extra={
                "action": "template.ready",
                "python": template.key.python,
                "pid": template.pid,
                "start_s": round(template.start_s, 3),
            },
        )
        return await template.no_more()

    def _leave_out(self, template: Template) -> None:
        if self._templates.get(template.key) is template:
            del self._templates[template.key]

    def _judge(self, template: Template, end: NoFork) -> float:
        """Count an end, and keep the next one of this key waiting: how long."""
        if end.reason in REPLACED or end.reason == "room":
            self.stats.replaced[end.reason] += 1
            self._pauses.pop(template.key, None)
            return 0.0
        pause = self._pauses.setdefault(template.key, _Pause())
        pause.failures = 1 if template.forks else pause.failures + 1
        pause.reason = end.reason
        pause_s = UNFIT_S
        if end.reason in DEATHS:
            self.stats.died += 1
            pause_s = min(2.0 ** (pause.failures - 1), MAX_PAUSE_S)
        pause.not_before = asyncio.get_running_loop().time() + pause_s
        self._say(template.key.python, end)
        return pause_s

    def _note_reads(self, key: Key, names: Iterable[str]) -> None:
        self._reads.setdefault(key.python, set()).update(names)

    def _say(self, python: str, cold: NoFork) -> None:
        """Once per interpreter and reason; that a template is on its way is no news."""
        if cold.reason in QUIET or (python, cold.reason) in self._said:
            return
        self._said.add((python, cold.reason))
        logger.warning(
            "dbt starts cold, not from a template",
            extra={
                "action": "template.cold",
                "python": python,
                "reason": cold.reason,
                "detail": cold.detail,
            },
        )


def import_environment(environment: Mapping[str, str], reads: Iterable[str]) -> dict[str, str]:
    """What of an environment imports may depend on, where they are known to read these names."""
    names = [*DEFAULT_PASS_ENV, *reads]
    exact = frozenset(names)
    prefixes = tuple(name[:-1] for name in names if name.endswith("*")) + READ_BY_LIBRARIES
    return {
        name: value
        for name, value in environment.items()
        if name in exact or name.startswith(prefixes)
    }


def _is_script(key: Key) -> bool:
    """Whether the interpreter is a wrapper around one. Blocking."""
    path = shutil.which(key.python, path=dict(key.environment).get("PATH"))
    try:
        with open(path or key.python, "rb") as file:
            return file.read(2) == b"#!"
    except OSError:
        return False


def _parts(path: str) -> list[str]:
    return path.split(os.pathsep) if path else []
