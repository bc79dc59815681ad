"""Templates that have a parsed project: which there are, and that none is older than its project.

Layer 2, asked by `templates`. A run is forked from one only if it would parse what that has: the
same project, profile, target and vars, the same environment (all of it, but for what each run
has its own value of), and files of which the template has just made sure. Where that is not so,
the run is forked from an import template and parses for itself, and a new one is made for the
runs to come: when that run has ended, or ahead of the next one as soon as a file has changed.

A project is parsed by a process that ends then (`dbt_child.parse`), one at a time. The
environment, with the secrets, is made for it anew and goes to it only; of what it was parsed
with we keep a salted hash.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dbtstream.forked_process import ForkedProcess
from dbtstream.project_watch import Places, ProjectWatch
from dbtstream.template import FORK_S, NoFork, Template
from dbtstream.workspace import PARSE_CACHE, RUN_VARIABLES, make_private, offer_parse_cache

logger = logging.getLogger(__name__)

MAX_MANIFESTS = 8
"""At one time; each takes some 60 MB for a project of 1,000 models."""

MAX_RUNS = 200
SETTLE_S = 0.3
"""After a change, before the project is parsed: an editor or a checkout may not be done."""

MAX_PAUSE_S = 60.0
ASKED_KEPT = 64
FOLDERS_KEPT = 16
PLACES = "places.json"

AGAIN = frozenset(
    {"project_changed", "runs", "memory", "stale", "parent", "environment", "died", "hung"}
    | {"starting", "other_environment"}  # of what it is to be forked from
)
"""Ends after which the next one is made ahead of the run that will want it."""

UNFIT = frozenset({"plugins", "catalogs", "run_variables", "parse_wanted", "not_kept"})
"""Projects of which no parse can be kept; looked at again when they change, or after UNFIT_S."""

UNFIT_S = 600.0
QUIET = (AGAIN - {"died", "hung"}) | {"other_vars", "room", "own_parse"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a project is parsed with, for a run. `environment` is blocking, and makes it anew."""

    python: str
    folder: str
    args: tuple[str, ...]  # of dbt's `parse`: target, profile, vars
    where: tuple[str, str]  # project and target
    secret_names: tuple[str, ...]
    cache: Path  # the parse cache that runs of this project and target share
    environment: Callable[[], dict[str, str]]

    @property
    def key(self) -> tuple[str, str, tuple[str, ...]]:
        return (self.python, self.folder, self.args)

    @property
    def kept_in(self) -> Path:
        """The folder of its own that it is parsed into."""
        digest = hashlib.sha256(json.dumps(self.key).encode()).hexdigest()[:16]
        return self.cache.parent / "templates" / digest


FindImports = Callable[[str, Mapping[str, str], tuple[str, ...]], Template]


@dataclass(slots=True)
class ManifestStats:
    """`declined` are runs that were not forked from a manifest template, by why."""

    forked: int = 0
    declined: Counter[str] = field(default_factory=Counter)
    parsed: int = 0
    ended: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Project:
    """One recipe: its template, if there is one, and what is known of those before."""

    recipe: Recipe
    template: Template | None = None
    parent: Template | None = None
    parsed_with: bytes = b""
    wanted: asyncio.Event = field(default_factory=asyncio.Event)
    failures: int = 0
    not_before: float = 0.0
    reason: str = "starting"
    watch: ProjectWatch | None = None
    life: asyncio.Task[None] | None = None


class ManifestTemplates:
    """Those of a worker; `close` at the end. `find_imports` gives what they are forked from."""

    def __init__(
        self,
        find_imports: FindImports,
        one_at_a_time: asyncio.Lock,
        *,
        max_manifests: int = MAX_MANIFESTS,
        max_runs: int = MAX_RUNS,
        fork_s: float = FORK_S,
    ) -> None:
        self.stats = ManifestStats()
        self._find_imports, self._one_at_a_time = find_imports, one_at_a_time
        self._max_manifests, self._max_runs, self._fork_s = max_manifests, max_runs, fork_s
        self._projects: OrderedDict[tuple[str, str, tuple[str, ...]], _Project] = OrderedDict()
        self._asked: OrderedDict[tuple[str, str, tuple[str, ...]], None] = OrderedDict()
        self._salt = os.urandom(16)
        self._said: set[tuple[tuple[str, str], str]] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        for project in list(self._projects.values()):
            self._forget(project)
        while self._tasks:  # the end of one may begin another
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def fork(
        self, recipe: Recipe, environment: Mapping[str, str], frames: int
    ) -> ForkedProcess:
        """A process that has the project parsed. Raises NoFork: it has to parse for itself."""
        try:
            template = self._find(recipe, environment)
            process = await template.fork(recipe.folder, environment, frames, self._fork_s)
        except NoFork as declined:
            self.decline(recipe, declined)
            raise
        self.stats.forked += 1
        return process

    def decline(self, recipe: Recipe, why: NoFork) -> None:
        self.stats.declined[why.reason] += 1
        self._say(recipe, why)

    def run_ended(self, recipe: Recipe) -> None:
        """It has left its parse cache, and does not need the machine any more."""
        project = self._projects.get(recipe.key)
        if project is None or project.template is not None:
            return
        if asyncio.get_running_loop().time() >= project.not_before:
            project.wanted.set()

    def retire_children(self, parent: Template) -> None:
        """No more runs can be forked from `parent`, and what is forked from it goes with it."""
        for project in self._projects.values():
            if project.parent is parent and project.template is not None:
                project.template.retire("parent")

    def pids(self) -> list[int]:
        """Of those that runs can be forked from."""
        return [
            project.template.pid
            for project in self._projects.values()
            if project.template is not None and project.template.is_ready
        ]

    # Which one.

    def _find(self, recipe: Recipe, environment: Mapping[str, str]) -> Template:
        project = self._projects.get(recipe.key)
        if project is None:
            if not self._is_worth_one(recipe):
                raise NoFork("other_vars")
            project = self._begin(recipe)
        self._projects.move_to_end(recipe.key)
        project.recipe = recipe
        template = project.template
        if template is None or not template.is_ready:
            raise NoFork(project.reason)
        if self._digest(environment) != project.parsed_with:
            template.retire("environment")
            raise NoFork("environment")
        return template

    def _is_worth_one(self, recipe: Recipe) -> bool:
        """The first of a project and target; another one only when it is asked for again, so
        that vars which change with every run do not have the project parsed each time."""
        others = any(each.recipe.where == recipe.where for each in self._projects.values())
        if not others or recipe.key in self._asked:
            return True
        self._asked[recipe.key] = None
        while len(self._asked) > ASKED_KEPT:
            self._asked.popitem(last=False)
        return False

    def _begin(self, recipe: Recipe) -> _Project:
        while len(self._projects) >= self._max_manifests:
            oldest = next(iter(self._projects.values()))
            self.stats.ended["room"] += 1
            self._forget(oldest)
        project = self._projects[recipe.key] = _Project(recipe)
        project.life = self._spawn(self._live(project), f"project {recipe.where[0]}")
        return project

    def _forget(self, project: _Project) -> None:
        self._projects.pop(project.recipe.key, None)
        if project.life is not None:
            project.life.cancel()

    def _digest(self, environment: Mapping[str, str]) -> bytes:
        kept = sorted(each for each in environment.items() if each[0] not in RUN_VARIABLES)
        return hashlib.blake2b(json.dumps(kept).encode(), key=self._salt, digest_size=32).digest()

    # Their lives.

    async def _live(self, project: _Project) -> None:
        """One template after the other, for as long as the project is asked for."""
        project.watch = ProjectWatch(lambda: self._changed(project))
        try:
            while True:
                await project.wanted.wait()
                await asyncio.sleep(self._pause_s(project))
                project.wanted.clear()
                end = await self._serve(project)
                self._judge(project, end)
        finally:
            await asyncio.shield(project.watch.close())

    async def _serve(self, project: _Project) -> NoFork:
        """From its parsing until no run can be forked from it: why."""
        template: Template | None = None
        try:
            async with self._one_at_a_time:
                template = await self._make(project)
            end = await template.no_more()
        except NoFork as problem:
            end = problem
        finally:
            project.template = project.parent = None
            if template is not None:
                template.retire("closed")
                self._spawn(_see_out(template), "end of a template")
        if template is not None and template.forks:
            project.failures = 0
        return end

    async def _make(self, project: _Project) -> Template:
        """Raises NoFork."""
        recipe = project.recipe
        try:
            environment = await asyncio.to_thread(recipe.environment)
            folder = await asyncio.to_thread(_prepare, recipe, environment)
        except Exception as error:
            raise NoFork("not_prepared", f"{type(error).__name__}: {error}") from error
        parent = self._find_imports(recipe.python, environment, recipe.secret_names)
        wish: dict[str, object] = {
            "folder": str(folder),
            "args": ["parse", "--no-write-json", "--log-level-file", "none", *recipe.args],
            "unset": sorted(RUN_VARIABLES),
            "secrets": list(recipe.secret_names),
        }
        self.stats.parsed += 1
        try:
            await parent.parse(recipe.folder, environment, wish)
        finally:
            places = await asyncio.to_thread(_after_parse, recipe)
            if places is not None and project.watch is not None:
                project.watch.of(places)
        template = Template(parent.key, lambda _, __: None)
        try:
            await template.start(self._max_runs, parent=parent, of=str(folder))
        except BaseException:
            await asyncio.shield(template.close())
            raise
        project.template, project.parent = template, parent
        project.parsed_with = self._digest(environment)
        logger.info(
            "template ready",
            extra={
                "action": "template.ready",
                "kind": "manifest",
                "project": recipe.where[0],
                "target": recipe.where[1],
                "pid": template.pid,
                "start_s": round(template.start_s, 3),
            },
        )
        return template

    def _changed(self, project: _Project) -> None:
        """A file has: the template finds out whether it is one of those that it has read."""
        if project.template is not None:
            project.template.look()
        else:
            project.wanted.set()

    def _pause_s(self, project: _Project) -> float:
        now = asyncio.get_running_loop().time()
        return max(SETTLE_S, min(project.not_before - now, MAX_PAUSE_S))

    def _judge(self, project: _Project, end: NoFork) -> None:
        """Count an end, and have the next one made, now or when it is asked for."""
        self.stats.ended[end.reason] += 1
        project.reason = "starting" if end.reason in AGAIN else end.reason
        project.failures += 1
        pause_s = min(2.0 ** (project.failures - 2), MAX_PAUSE_S) if project.failures > 1 else 0.0
        if end.reason in UNFIT:
            pause_s = UNFIT_S
        project.not_before = asyncio.get_running_loop().time() + pause_s
        if end.reason in AGAIN:
            project.wanted.set()
        self._say(project.recipe, end)

    def _spawn(self, coroutine: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _say(self, recipe: Recipe, why: NoFork) -> None:
        """Once per project, target and reason; that a template is on its way is no news."""
        if why.reason in QUIET or (recipe.where, why.reason) in self._said:
            return
        self._said.add((recipe.where, why.reason))
        logger.warning(
            "dbt parses the project for each run",
            extra={
                "action": "template.no_manifest",
                "project": recipe.where[0],
                "target": recipe.where[1],
                "reason": why.reason,
                "detail": why.detail,
            },
        )


async def _see_out(template: Template) -> None:
    """It is there to tell how its last run ended."""
    try:
        await template.last_run_ended()
    finally:
        await asyncio.shield(template.close())


def _prepare(recipe: Recipe, environment: dict[str, str]) -> Path:
    """The folder that it is parsed into, named in the environment. Blocking."""
    folder = recipe.kept_in
    make_private(folder, below=recipe.cache.parent)
    os.utime(folder)
    siblings = sorted(folder.parent.iterdir(), key=lambda each: each.stat().st_mtime)
    for old in siblings[:-FOLDERS_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    environment |= {"DBT_TARGET_PATH": str(folder), "DBT_LOG_PATH": str(folder)}
    newest = max((folder / PARSE_CACHE, recipe.cache), key=_written_at)
    if newest.is_file():
        environment["DBT_PARTIAL_PARSE_FILE_PATH"] = str(newest)
    return folder


def _after_parse(recipe: Recipe) -> Places | None:
    """What was parsed is offered to runs that parse for themselves; and where it lies. Blocking."""
    folder = recipe.kept_in
    if _written_at(folder / PARSE_CACHE) > _written_at(recipe.cache):
        with contextlib.suppress(OSError):
            offer_parse_cache(folder / PARSE_CACHE, recipe.cache)
    try:
        files, folders, listed = json.loads((folder / PLACES).read_bytes())
        return Places(files, folders, listed)
    except (OSError, ValueError, TypeError):
        return None


def _written_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
