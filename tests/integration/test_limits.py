"""`[limits]`: how many dbt processes share what goes by a name, over all workers."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dbtstream.config import Config, NatsConfig, ProjectConfig, WorkerConfig
from dbtstream.events import AnyEvent, RunFinished, RunLeased, RunStarted
from dbtstream.statuses import RunStatus
from tests.daemons import Served, project_folder, serving
from tests.dbt_projects import PYTHON, write_project
from tests.guarantees import check_run
from tests.scripted_child import scripted_child

NOTED = """
    lines, go = %r, %r

    def note(edge):
        with open(lines, "a") as file:
            file.write(f"{edge} {where} {os.getpid()}\\n")

    start = start_line()
    words = start["args"]
    where = f"{os.path.basename(start['project_dir'])}.{words[words.index('--target') + 1]}"
    where += f" {words[words.index('--select') + 1]}"
    note("begin")
    hello()
    plan(model("orders"))
    started("orders")
    if not where.startswith("free."):
        wait_for(go)
    finished("orders")
    result(0, [("orders", "success")])
    note("end")
"""
"""Writes down when it begins and, as its last act, when it ends. In between it waits for the
test's word, unless its project is `free`."""


@dataclass(frozen=True)
class Noted:
    """What the children wrote: `[edge, "<project>.<target>", what was selected, pid]` in order."""

    path: Path
    go: Path

    @property
    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.path.read_text().splitlines()]

    def begun(self) -> list[str]:
        return [where for edge, where, *_ in self.lines if edge == "begin"]

    def most_at_once(self) -> int:
        now = most = 0
        for edge, *_ in self.lines:
            now += 1 if edge == "begin" else -1
            most = max(most, now)
        return most

    def let_go(self) -> None:
        self.go.touch()


@pytest.fixture
def noted(tmp_path: Path) -> Noted:
    noted = Noted(tmp_path / "lines", tmp_path / "go")
    noted.path.touch()
    return noted


def worker(
    tmp_path: Path,
    nats: NatsConfig,
    noted: Noted,
    name: str,
    serves: Sequence[str],
    *,
    limit: int = 1,
    **settings: Any,
) -> Config:
    """One that serves these `<project>.<target>`; all but `free` take the limit `warehouse`."""
    child = scripted_child(tmp_path / "child", NOTED % (str(noted.path), str(noted.go)))
    targets: dict[str, list[str]] = {}
    for each in serves:
        project, target = each.split(".")
        targets.setdefault(project, []).append(target)
    graces = {"cancel_grace_s": 0.1, "kill_grace_s": 0.1}  # these children hear nothing
    state_dir = str(tmp_path / f"state-{name}")
    return Config(
        nats=nats,
        worker=WorkerConfig(name=name, state_dir=state_dir, **graces | settings),
        limits={"warehouse": limit},
        projects={
            project: ProjectConfig(
                path=str(project_folder(tmp_path, project)),
                targets=tuple(of_project),
                python=child,
                limits=() if project == "free" else ("warehouse",),
            )
            for project, of_project in targets.items()
        },
        source="test",
    )


@asynccontextmanager
async def workers(*configs: Config) -> AsyncIterator[list[Served]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(serving(config)) for config in configs]


async def submit(served: Served, where: str, selected: str = "all") -> str:
    project, target = where.split(".")
    args = ["build", "--select", selected]
    return (await served.client.submit(project, args, target=target)).run_id


async def first(served: Served, run_id: str, kind: type[AnyEvent]) -> AnyEvent:
    async with asyncio.timeout(60):
        async for event in served.client.events(run_id=run_id):
            if isinstance(event, kind):
                return event
    raise AssertionError(f"the run ended without {kind.__name__}")


async def verdict(served: Served, run_id: str) -> RunFinished:
    events = await served.events(run_id)
    check_run(events)
    assert isinstance(events[-1], RunFinished)
    return events[-1]


async def ended_well(served: Served, *run_ids: str) -> None:
    for run_id in run_ids:
        assert (await verdict(served, run_id)).status is RunStatus.SUCCESS


async def until_waiting(caplog: pytest.LogCaptureFixture, count: int = 1) -> None:
    """Until so many runs wait for a place, as their workers say."""

    def waiting() -> int:
        records = caplog.records
        return sum(getattr(each, "action", "") == "claim.limit_wait" for each in records)

    async with asyncio.timeout(60):
        while waiting() < count:  # noqa: ASYNC110  # a log line tells nobody
            await asyncio.sleep(0.005)


async def until_begun(noted: Noted, count: int) -> None:
    async with asyncio.timeout(60):
        while len(noted.begun()) < count:  # noqa: ASYNC110  # nor does a file
            await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def info_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "dbtstream")


async def test_no_more_dbt_than_the_limit_at_once_over_all_workers(
    tmp_path: Path, nats_config: NatsConfig, noted: Noted, caplog: pytest.LogCaptureFixture
) -> None:
    """Two workers, four targets, a limit of two; by the children's own lines."""
    wheres = ["shop.dev", "shop.prod", "mart.dev", "mart.prod"]
    configs = [worker(tmp_path, nats_config, noted, name, wheres, limit=2) for name in ("w1", "w2")]
    async with workers(*configs) as (served, other):
        runs = [await submit(served, where, "1") for where in wheres]
        await until_waiting(caplog, 2)
        await until_begun(noted, 2)
        runs += [await submit(other, where, turn) for turn in "23" for where in wheres]
        noted.let_go()
        await ended_well(served, *runs)

    assert noted.most_at_once() == 2
    assert len(noted.lines) == 2 * len(runs)
    for where in wheres:
        of_target = [(edge, turn) for edge, at, turn, _ in noted.lines if at == where]
        assert of_target == [(edge, turn) for turn in "123" for edge in ("begin", "end")]


async def test_no_slot_is_held_while_a_run_waits_for_a_limit(
    tmp_path: Path, nats_config: NatsConfig, noted: Noted, caplog: pytest.LogCaptureFixture
) -> None:
    """With one slot, another project's run begins and ends meanwhile."""
    configs = [
        worker(tmp_path, nats_config, noted, "w1", ["shop.dev"]),
        worker(tmp_path, nats_config, noted, "w2", ["shop.prod", "free.dev"], slots=1),
    ]
    async with workers(*configs) as (_, served):
        holder = await submit(served, "shop.dev")
        await first(served, holder, RunStarted)
        waiting = await submit(served, "shop.prod")
        await until_waiting(caplog)
        await ended_well(served, await submit(served, "free.dev"))
        assert noted.begun() == ["shop.dev", "free.dev"]
        noted.let_go()
        await ended_well(served, holder, waiting)
    assert noted.most_at_once() == 2


async def test_a_place_waits_for_a_slot_and_a_slot_for_a_place_on_one_worker(
    tmp_path: Path, nats_config: NatsConfig, noted: Noted
) -> None:
    """One slot, one place, and more runs than either: all of them end."""
    wheres = ["shop.dev", "shop.prod", "mart.dev", "free.dev"]
    noted.let_go()
    config = worker(tmp_path, nats_config, noted, "w1", wheres, slots=1)
    async with workers(config) as (served,):
        runs = [await submit(served, where, turn) for turn in "12" for where in wheres]
        await ended_well(served, *runs)
        await served.queue_empty()
    assert noted.most_at_once() == 1


async def test_a_cancel_of_a_run_that_waits_for_a_limit_ends_it_at_once(
    tmp_path: Path, nats_config: NatsConfig, noted: Noted, caplog: pytest.LogCaptureFixture
) -> None:
    config = worker(tmp_path, nats_config, noted, "w1", ["shop.dev", "shop.prod"])
    async with workers(config) as (served,):
        holder = await submit(served, "shop.dev")
        await first(served, holder, RunStarted)
        waiting = await submit(served, "shop.prod")
        await until_waiting(caplog)
        await served.client.cancel(waiting, by="ada")
        cancelled = await verdict(served, waiting)
        assert cancelled.status is RunStatus.CANCELLED
        assert noted.begun() == ["shop.dev"]
        noted.let_go()
        await ended_well(served, holder, await submit(served, "shop.prod"))


async def test_a_drain_gives_a_run_that_waits_for_a_limit_to_another_worker(
    tmp_path: Path, nats_config: NatsConfig, noted: Noted, caplog: pytest.LogCaptureFixture
) -> None:
    configs = [
        worker(tmp_path, nats_config, noted, "w1", ["shop.dev"]),
        worker(tmp_path, nats_config, noted, "w2", ["shop.prod"]),
        worker(tmp_path, nats_config, noted, "w3", ["shop.prod"]),
    ]
    async with workers(*configs[:2]) as (served, drained):
        holder = await submit(served, "shop.dev")
        await first(served, holder, RunStarted)
        waiting = await submit(served, "shop.prod")
        await until_waiting(caplog)
        drained.daemon.stop()
        async with serving(configs[2]):
            noted.let_go()
            await ended_well(served, holder, waiting)
            events = await served.events(waiting)
    assert [(e.worker, e.cause) for e in events if isinstance(e, RunLeased)] == [
        ("w2", "first"),
        ("w3", "handed_over"),
    ]
    assert {event.worker for event in events if isinstance(event, RunStarted)} == {"w3"}
    assert noted.most_at_once() == 1


def duckdb_project(root: Path, name: str, database: Path) -> ProjectConfig:
    """A real dbt project that writes to that file."""
    sql = "{{ config(materialized='table') }} select sum(range % 7) as n from range(30000000)"
    folder = write_project(root / name, {f"models/{name}.sql": sql})
    outputs = {"dev": {"type": "duckdb", "path": str(database), "threads": 1}}
    profiles = {"shop": {"target": "dev", "outputs": outputs}}
    (folder / "profiles.yml").write_text(json.dumps(profiles))
    quiet = {"DBT_SEND_ANONYMOUS_USAGE_STATS": "0"}
    return ProjectConfig(path=str(folder), targets=("dev",), python=PYTHON, env=quiet)


async def test_one_dbt_at_a_time_on_one_duckdb_file_without_a_word_in_the_config(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    """Two projects, two workers, two names of the file: a second process on it would die."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    projects = {
        "shop": duckdb_project(tmp_path, "shop", tmp_path / "real" / "shared.duckdb"),
        "mart": duckdb_project(tmp_path, "mart", tmp_path / "link" / "shared.duckdb"),
    }
    configs = [
        Config(
            nats=nats_config,
            worker=WorkerConfig(name=name, state_dir=str(tmp_path / f"state-{name}")),
            projects=projects,
            source="test",
        )
        for name in ("w1", "w2")
    ]
    async with workers(*configs) as (served, _):
        runs = [(await served.client.submit(name, ["run"])).run_id for name in projects]
        histories = [await served.events(run) for run in runs]
    lives = []
    for events in histories:
        check_run(events)
        end = events[-1]
        assert isinstance(end, RunFinished)
        assert end.status is RunStatus.SUCCESS, end.error
        (started,) = (event for event in events if isinstance(event, RunStarted))
        lives.append((started.time, end.time))
    lives.sort()
    assert all(before[1] < after[0] for before, after in pairwise(lives)), lives
