"""Runs that are forked from a process which has the project parsed: the same as cold ones, whatever
was changed between two of them; and what goes wrong. Real dbt on DuckDB.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dbtstream.config import NatsConfig
from dbtstream.dbt_process import DbtProcess
from dbtstream.events import RunFinished, RunStarted
from dbtstream.frames import AnyFrame, Log, NodeFinish, Result, Start
from dbtstream.manifest_templates import Recipe
from dbtstream.templates import Templates
from tests import dbt_projects as projects
from tests.daemons import daemon_config, serving
from tests.dbt_projects import PYTHON, properties, write_project
from tests.scrapes import ANY_PORT, Scrape, scrape

Until = Callable[[Callable[[], object]], Awaitable[None]]
VERSION = projects.dbt_release(PYTHON)


def shop() -> dict[str, str]:
    """A project in which each kind of thing that may be edited has an effect on what is built."""
    return {
        "models/orders.sql": "{{ config(materialized='table', "
        "tags=[env_var('SHOP_TAG', 'plain')]) }} select 1 as id, {{ cents('10') }} as amount",
        "models/daily.sql": "select id, amount, '{{ target.schema }}' as made_in, "
        "{{ var('factor', 1) }} as factor from {{ ref('open') }}",
        "models/open.sql": "{{ config(materialized='ephemeral') }} "
        "select * from {{ ref('orders') }}",
        "models/counted.sql": "{{ config(materialized='incremental') }} select 1 as id "
        "{% if is_incremental() %} union all select 2 {% endif %}",
        "models/of_vars.sql": "{{ config(alias='vars_' ~ var('factor', 1)) }} select 1 as id",
        "models/coded.sql": "select code from {{ ref('countries') }}, {{ ref('of_package') }}",
        "models/models.yml": properties(
            models=[{"name": "orders", "columns": [{"name": "id", "data_tests": ["unique"]}]}]
        ),
        "macros/cents.sql": "{% macro cents(x) %}{{ x }}{% endmacro %}",
        "seeds/countries.csv": "code,name\nde,Germany\n",
        "selectors.yml": json.dumps(
            {"selectors": [{"name": "some", "definition": {"method": "fqn", "value": "orders"}}]}
        ),
        "packages.yml": json.dumps({"packages": [{"local": "../lib"}]}),
        "../lib/dbt_project.yml": json.dumps(
            {"name": "lib", "version": "1.0", "config-version": 2}
        ),
        "../lib/macros/twice.sql": "{% macro twice(x) %}{{ x }}{% endmacro %}",
        "../lib/models/of_package.sql": "select {{ lib.twice('1') }} as doubled",
    }


PROFILE = {"type": "duckdb", "threads": 2, "schema": "{{ env_var('SHOP_SCHEMA', 'main') }}"}


def make_project(root: Path) -> Path:
    project = write_project(root / "shop", shop())
    (project / "dbt_packages").mkdir()
    (project / "dbt_packages" / "lib").symlink_to(Path("../../lib"))
    outputs = {
        target: {**PROFILE, "path": str(root / f"{target}.duckdb")} for target in ("dev", "prod")
    }
    profiles = {"shop": {"target": "dev", "outputs": outputs}}
    (project / "profiles.yml").write_text(json.dumps(profiles))
    return project


@dataclass
class Ran:
    start: str
    code: int | None
    frames: list[AnyFrame]
    target: Path
    output: str

    @property
    def statuses(self) -> dict[str, str]:
        return {f.unique_id: f.status for f in self.frames if isinstance(f, NodeFinish)}

    @property
    def warnings(self) -> list[str]:
        return [f.message for f in self.frames if isinstance(f, Log)]


@dataclass
class Shop:
    """Runs of one project, from templates or, `cold`, on its own in the same place."""

    root: Path
    templates: Templates
    until: Until
    environment: dict[str, str] = field(default_factory=dict)
    runs: int = 0

    @property
    def project(self) -> Path:
        return self.root / "shop"

    def env(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.root),
            "DBT_PROFILES_DIR": str(self.project),
            "DBT_SEND_ANONYMOUS_USAGE_STATS": "0",
            **self.environment,
        }

    def recipe(self, target: str, variables: dict[str, Any]) -> Recipe:
        return Recipe(
            python=PYTHON,
            folder=str(self.project),
            args=("--target", target, *_vars(variables)),
            where=("shop", target),
            secret_names=(),
            cache=self.root / "state" / target / "partial_parse.msgpack",
            environment=self.env,
        )

    async def run(
        self,
        *args: str,
        target: str = "dev",
        variables: dict[str, Any] | None = None,
        cold: bool = False,
    ) -> Ran:
        async with asyncio.timeout(120):
            return await self._run(args, target, variables or {}, cold)

    async def _run(
        self, args: tuple[str, ...], target: str, variables: dict[str, Any], cold: bool
    ) -> Ran:
        self.runs += 1
        recipe = self.recipe(target, variables)
        recipe.cache.parent.mkdir(parents=True, exist_ok=True)
        folder = self.root / "runs" / str(self.runs)
        environment = {
            **self.env(),
            "DBT_TARGET_PATH": str(folder / "target"),
            "DBT_LOG_PATH": str(folder / "logs"),
            "DBT_ENV_CUSTOM_ENV_DBTSTREAM_RUN_ID": str(self.runs),
        }
        child = await DbtProcess.start(
            PYTHON,
            Start(
                args=[args[0], "--target", target, *_vars(variables), *args[1:]],
                project_dir=str(self.project),
            ),
            environment=environment,
            templates=None if cold else self.templates,
            recipe=None if cold else recipe,
        )
        try:
            hello = await child.hello(timeout_s=60)
            frames = [frame async for frame in child.frames()]
            exited = await child.wait(60)
        finally:
            await child.close()
        return Ran(hello.start, exited.code, frames, folder / "target", exited.output_tail)

    async def ready(self, count: int = 1) -> None:
        manifests = self.templates.manifests
        assert manifests is not None
        await self.until(lambda: len(manifests.pids()) >= count)


def _vars(variables: dict[str, Any]) -> tuple[str, ...]:
    return ("--vars", json.dumps(variables)) if variables else ()


@pytest.fixture
async def shop_runs(tmp_path: Path, until: Until) -> AsyncIterator[Shop]:
    make_project(tmp_path)
    async with Templates("manifest") as templates:
        yield Shop(tmp_path, templates, until)


# The same as cold, whatever is edited.


def edit(name: str, old: str, new: str) -> Callable[[Shop], None]:
    def change(shop: Shop) -> None:
        path = shop.project / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


def write(name: str, text: str) -> Callable[[Shop], None]:
    def change(shop: Shop) -> None:
        (shop.project / name).write_text(text)

    return change


def remove(name: str) -> Callable[[Shop], None]:
    return lambda shop: (shop.project / name).unlink()


def config(**more: Any) -> Callable[[Shop], None]:
    def change(shop: Shop) -> None:
        path = shop.project / "dbt_project.yml"
        path.write_text(json.dumps({**json.loads(path.read_text()), **more}))

    return change


def setting(**variables: str) -> Callable[[Shop], None]:
    return lambda shop: shop.environment.update(variables)


DESCRIBED = properties(models=[{"name": "orders", "config": {"materialized": "view"}}])
TWO = json.dumps({"selectors": [{"name": "some", "definition": {"method": "fqn", "value": "*"}}]})
LIB = "../lib/macros/twice.sql"

EDITS: dict[str, Callable[[Shop], None]] = {
    "model": edit("models/orders.sql", "as amount", "as amount, 5 as more"),
    "new file": write("models/fresh.sql", "select * from {{ ref('daily') }}"),
    "deleted file": remove("models/of_vars.sql"),
    "macro": edit("macros/cents.sql", "{{ x }}", "{{ x }} * 100"),
    "package macro": edit(LIB, "{{ x }}", "{{ x }} * 2"),
    "yaml": write("models/models.yml", DESCRIBED),
    "seed header": write("seeds/countries.csv", "code,label\nde,Germany\n"),
    "seed data": write("seeds/countries.csv", "code,name\nfr,France\n"),
    "project config": config(models={"shop": {"+materialized": "table"}}),
    "project hook": config(**{"on-run-end": ["create or replace table hooked as select 1 as id"]}),
    "profile schema": edit("profiles.yml", "'main'", "'other'"),
    "env_var in a model": setting(SHOP_TAG="fancy"),
    "env_var in a profile": setting(SHOP_SCHEMA="elsewhere"),
    "selectors.yml": write("selectors.yml", TWO),
}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("part", [0, 1])
async def test_a_run_after_an_edit_is_as_a_cold_one(
    tmp_path: Path, shop_runs: Shop, part: int
) -> None:
    """Each kind of edit between two runs: the next run finds it, in a process that parses for
    itself or in a template that is as new; both do what a cold run does in a project of its own."""
    shop = shop_runs
    make_project(tmp_path / "other")
    other = Shop(tmp_path / "other", shop.templates, shop.until)
    first, cold = await asyncio.gather(shop.run("build"), other.run("build", cold=True))
    assert (first.start, first.code) == ("cold", 0), first.output
    assert differences(told(first), told(cold)) == []
    await shop.ready()
    starts = Counter[str]()
    names = list(EDITS)[part::2]
    for name in names:
        change = EDITS[name]
        change(shop)
        change(other)
        running = asyncio.create_task(other.run("build", cold=True))
        keep(shop)
        after_edit = await shop.run("build")
        await shop.ready()
        restore(shop)
        from_template = await shop.run("build")
        assert from_template.start == "manifest", name
        cold = await running
        assert cold.code == 0, (name, cold.output)
        for run in (after_edit, from_template):
            assert differences(told(run), told(cold)) == [], name
        starts[after_edit.start] += 1
    # The watch is not quicker than a run that follows at once; most often it has not even begun.
    assert starts["warm"] + starts["manifest"] == len(names)
    assert starts["warm"] >= len(names) / 2
    manifests = shop.templates.manifests
    assert manifests is not None
    assert manifests.stats.declined.keys() <= {"starting", "project_changed", "environment"}


COMMANDS: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (("build",), {"target": "prod"}),
    (("build", "--full-refresh"), {}),
    (("run", "--selector", "some"), {}),
    (("docs", "generate"), {}),
    (("show", "--select", "daily"), {}),
]


async def test_targets_and_commands_are_as_cold_ones(tmp_path: Path, shop_runs: Shop) -> None:
    shop = shop_runs
    make_project(tmp_path / "other")
    other = Shop(tmp_path / "other", shop.templates, shop.until)

    async def alike(*args: str, target: str = "dev") -> Ran:
        run, cold = await asyncio.gather(
            shop.run(*args, target=target), other.run(*args, target=target, cold=True)
        )
        assert (run.code, cold.code) == (0, 0), (args, run.output, cold.output)
        assert differences(told(run), told(cold)) == [], (args, target)
        return run

    await alike("build")
    await alike("build", target="prod")
    await shop.ready(2)
    for args, of in COMMANDS:
        assert (await alike(*args, **of)).start == "manifest", args


async def test_another_target_and_other_vars_are_other_templates(shop_runs: Shop) -> None:
    """Vars that are new each time get none; those that come again do."""
    shop = shop_runs
    await shop.run("build")
    await shop.ready()
    assert (await shop.run("build", target="prod")).start == "warm"
    await shop.ready(2)
    assert (await shop.run("build", target="prod")).start == "manifest"
    assert (await shop.run("build")).start == "manifest"
    for factor in (2, 3):
        assert (await shop.run("build", variables={"factor": factor})).start == "warm"
    manifests = shop.templates.manifests
    assert manifests is not None
    assert manifests.stats.declined["other_vars"] == 2
    assert (await shop.run("build", variables={"factor": 3})).start == "warm"
    await shop.ready(3)
    assert (await shop.run("build", variables={"factor": 3})).start == "manifest"


async def test_defer_and_state_are_those_of_the_run(shop_runs: Shop) -> None:
    shop = shop_runs
    state = (await shop.run("build")).target
    await shop.ready()
    edit("models/orders.sql", "as amount", "as amount, 5 as more")(shop)
    await shop.run("parse")
    await shop.ready()
    args = ("build", "--select", "state:modified+", "--defer", "--state", str(state))
    run = await shop.run(*args)
    while run.start != "manifest":  # the template of before the edit was still there
        await shop.ready()
        run = await shop.run(*args)
    assert run.code == 0, run.output
    assert differences(told(run), told(await shop.run(*args, cold=True))) == []
    assert "model.shop.counted" not in run.statuses
    assert "model.shop.orders" in run.statuses


def keep(shop: Shop) -> None:
    """So that two runs find the same databases."""
    kept = shop.root / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    for part in shop.root.glob("*.duckdb*"):  # with what is in the log only
        shutil.copy(part, kept)


def restore(shop: Shop) -> None:
    for part in shop.root.glob("*.duckdb*"):
        part.unlink()
    for part in (shop.root / "kept").iterdir():
        shutil.copy(part, shop.root)


VARYING = frozenset(
    {"generated_at", "invocation_id", "invocation_started_at", "run_started_at", "created_at"}
    | {
        "_invocation_id",
        "timing",
        "execution_time",
        "elapsed_time",
        "thread_id",
        "env",
        "completed_at",
        "started_at",
    }
)


def told(run: Ran) -> dict[str, Any]:
    """What a run has told and left, without what no two runs have in common."""
    files = {}
    for path in sorted(run.target.rglob("*")):
        name = str(path.relative_to(run.target))
        if path.is_dir() or name.endswith((".msgpack", ".gpickle")) or name == "perf_info.json":
            continue
        text = path.read_text().replace(str(run.target.parents[2]), "ROOT")
        text = re.sub(r"__dbt_tmp\d+", "__dbt_tmpN", re.sub(r"runs/\d+/", "runs/N/", text))
        if name.endswith(".json"):
            document = json.loads(text)
            assert_of_this_run(name, document, run)
            files[name] = edges(document) if name == "graph_summary.json" else plain(document)
        else:
            files[name] = text
    statuses = [(f.unique_id, f.status) for f in run.frames if isinstance(f, NodeFinish)]
    last = run.frames[-1]
    assert isinstance(last, Result)
    return {"files": files, "statuses": sorted(statuses), "success": last.success}


def assert_of_this_run(name: str, document: Any, run: Ran) -> None:
    """Artifacts of one run can be joined, and say which run they are of."""
    if name in ("manifest.json", "run_results.json"):
        other = json.loads((run.target / "run_results.json").read_text())
        assert document["metadata"]["invocation_id"] == other["metadata"]["invocation_id"]
        assert document["metadata"]["env"] == {"DBTSTREAM_RUN_ID": run.target.parent.name}


def edges(summary: dict[str, Any]) -> Any:
    """By name: dbt numbers nodes in the order in which it happens to have parsed them."""
    return {
        part: {
            n["name"]: sorted(nodes[str(s)]["name"] for s in n.get("succ", ()))
            for n in nodes.values()
        }
        for part, nodes in summary.items()
        if isinstance(nodes, dict)
    }


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items() if name not in VARYING}
    if isinstance(value, list):
        items = [plain(item) for item in value]
        by_node = all(isinstance(item, dict) and "unique_id" in item for item in items)
        return sorted(items, key=lambda item: item["unique_id"]) if by_node else items
    return value


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        names = sorted({*one, *other})
        missing = [
            f"{where}/{name} is only in one" for name in names if (name in one) != (name in other)
        ]
        both = [name for name in names if name in one and name in other]
        return missing + [d for n in both for d in differences(one[n], other[n], f"{where}/{n}")]
    return [] if one == other else [f"{where}: {one!r:.300} != {other!r:.300}"]


# Nothing is left, and what may go wrong.


async def test_ten_runs_leave_nothing(shop_runs: Shop) -> None:
    """Ephemeral models are right in each; no lock, file, thread or child stays in the template."""
    shop = shop_runs
    await shop.run("build")
    await shop.ready()
    manifests = shop.templates.manifests
    assert manifests is not None
    (template,) = manifests.pids()
    await shop.run("build")
    before, locks = left(template), set(os.listdir("/dev/shm"))
    for _ in range(10):
        run = await shop.run("build", "--select", "+daily")
        assert (run.start, run.code) == ("manifest", 0), run.output
        assert "__dbt__cte__open as (" in (
            run.target / "compiled/shop/models/daily.sql"
        ).read_text().replace("  ", " ")
    assert manifests.pids() == [template]
    await shop.until(lambda: left(template) == before)
    assert before[0] == 1
    assert not await asyncio.to_thread(left_behind, set(os.listdir("/dev/shm")) - locks)
    assert manifests.stats.forked == 11


def left_behind(names: set[str]) -> set[str]:
    """Of semaphores, those that no process has any more."""
    maps = ""
    for process in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            maps += process.read_text()
    return {name for name in names if name.startswith("sem.mp-") and name not in maps}


def left(pid: int) -> tuple[int, int, int]:
    """Threads, open files and children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    threads = len(os.listdir(f"/proc/{pid}/task"))
    return threads, len(os.listdir(f"/proc/{pid}/fd")), len(children)


async def test_no_secret_stays_in_a_template(shop_runs: Shop) -> None:
    """It is in the parser, which ends, and in runs."""
    shop = shop_runs
    shop.environment["DBT_ENV_SECRET_SCHEMA"] = "canary_" + "7f3a91"
    edit("profiles.yml", "env_var('SHOP_SCHEMA', 'main')", "env_var('DBT_ENV_SECRET_SCHEMA')")(shop)
    shop.environment["UNREAD_SECRET"] = "canary-" + "91ae55"
    await shop.run("compile")
    await shop.ready()
    assert (await shop.run("compile")).start == "manifest"
    manifests = shop.templates.manifests
    assert manifests is not None
    (template,) = manifests.pids()
    found = await asyncio.to_thread(memory, template)
    assert b"canary-" + b"91ae55" not in found


async def test_a_killed_or_hung_template_costs_a_run_nothing_but_time(
    shop_runs: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = shop_runs
    manifests = shop.templates.manifests
    assert manifests is not None
    monkeypatch.setattr(manifests, "_fork_s", 0.5)
    await shop.run("build")
    await shop.ready()
    (first,) = manifests.pids()
    os.kill(first, signal.SIGKILL)
    await shop.until(lambda: first not in manifests.pids())
    run = await shop.run("build")
    assert (run.start, run.code) == ("warm", 0), run.output
    await shop.ready()
    (second,) = manifests.pids()
    os.kill(second, signal.SIGSTOP)
    run = await shop.run("build")
    assert (run.start, run.code) == ("warm", 0), run.output
    await shop.ready()
    assert (await shop.run("build")).start == "manifest"
    assert (manifests.stats.ended["died"], manifests.stats.ended["hung"]) == (1, 1)


async def test_when_the_import_template_goes_its_manifests_go_too(shop_runs: Shop) -> None:
    shop = shop_runs
    await shop.run("build")
    await shop.ready()
    manifests = shop.templates.manifests
    assert manifests is not None
    (imports,), (template,) = shop.templates.pids(), manifests.pids()
    os.kill(imports, signal.SIGKILL)
    await shop.until(lambda: not Path(f"/proc/{template}").exists())
    run = await shop.run("build")
    assert (run.start, run.code) == ("cold", 0), run.output
    await shop.ready()
    assert (await shop.run("build")).start == "manifest"


async def test_a_project_that_does_not_parse_says_so_in_each_run_until_it_is_mended(
    shop_runs: Shop,
) -> None:
    shop = shop_runs
    await shop.run("build")
    await shop.ready()
    broken = shop.project / "models" / "lost.sql"
    broken.write_text("select * from {{ ref('nowhere') }}")
    for _ in range(2):
        run = await shop.run("build")
        last = run.frames[-1]
        assert isinstance(last, Result)
        assert last.error is not None
        assert (run.start, "nowhere" in last.error.message) == ("warm", True)
    broken.unlink()
    await shop.ready()  # without having been asked
    assert (await shop.run("build")).start == "manifest"


@pytest.mark.skipif(VERSION < (1, 10), reason="this warning came with dbt 1.10")
async def test_warnings_of_loading_are_told_by_every_run(shop_runs: Shop) -> None:
    """As a cold run does, also one that need not parse: to us, to dbt's log, in its summary."""
    shop = shop_runs
    config(models={"shop": {"nowhere": {"+enabled": True}}})(shop)
    await shop.run("compile")
    await shop.ready()
    for _ in range(2):
        run = await shop.run("compile")
        assert run.start == "manifest"
        (warning,) = run.warnings
        assert "unused configuration paths" in warning
        assert "unused configuration paths" in (run.target.parent / "logs" / "dbt.log").read_text()


# In the daemon.


async def test_the_daemon_forks_from_manifests_says_so_and_counts(
    tmp_path: Path, nats_config: NatsConfig, until: Until
) -> None:
    project = make_project(tmp_path / "real")
    config = daemon_config(
        tmp_path,
        nats_config,
        "",
        project={"path": str(project), "profiles_dir": str(project), "python": PYTHON},
        listen=ANY_PORT,
        warm_starts="manifest",
    )
    async with serving(config) as served:
        worker = served.daemon.worker
        assert worker is not None
        templates = worker._services.templates
        assert templates is not None
        manifests = templates.manifests
        assert manifests is not None
        started = []
        for args in (["build"], ["build"], ["list"]):
            events = await served.run(args)
            started += [event.start for event in events if isinstance(event, RunStarted)]
            assert isinstance(events[-1], RunFinished)
            assert events[-1].exit_code == 0
            await until(manifests.pids)
        assert started[0] in ("cold", "warm")
        assert started[1:] == ["manifest", "warm"]
        assert manifests.stats.declined == {"starting": 1, "own_parse": 1}
        async with asyncio.timeout(60):
            while not is_told(found := await scrape(served)):  # noqa: ASYNC110 - read now and then
                await asyncio.sleep(0.2)
        declined = found.by("dbtstream_reason", "dbtstream_template_declined_total")
        assert declined["own_parse"] == 1
        (template,) = manifests.pids()
    await until(lambda: not Path(f"/proc/{template}").exists())


def is_told(found: Scrape) -> bool:
    count = found.by("dbtstream_child_start", "dbtstream_template_ready")
    memory = found.by("dbtstream_memory_kind", "dbtstream_template_memory_usage_bytes")
    return count.get("manifest") == 1 and 0 < memory.get("pss", 0) <= memory["rss"]


def memory(pid: int) -> bytes:
    """All that a process may write to."""
    parts = []
    with open(f"/proc/{pid}/maps", encoding="ascii") as maps, open(f"/proc/{pid}/mem", "rb") as mem:
        for line in maps:
            where, mode = line.split()[:2]
            if mode.startswith("rw"):
                begin, end = (int(part, 16) for part in where.split("-"))
                mem.seek(begin)
                parts.append(mem.read(end - begin))
    return b"".join(parts)
