"""A project's folders are watched, as far as the kernel lets us."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from dbtstream import project_watch
from dbtstream.project_watch import Places, ProjectWatch

Until = Callable[[Callable[[], object]], Awaitable[None]]


@pytest.fixture
def places(tmp_path: Path) -> Places:
    for folder in ("models/deep", "dbt_packages"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "dbt_project.yml").touch()
    return Places(
        files=[f"{tmp_path}/dbt_project.yml", f"{tmp_path}/packages.yml"],
        folders=[f"{tmp_path}/models", f"{tmp_path}/seeds"],
        listed=[f"{tmp_path}/dbt_packages"],
    )


@pytest.mark.parametrize(
    "name", ["models/deep/a.sql", "dbt_project.yml", "packages.yml", "dbt_packages/lib"]
)
async def test_a_change_is_heard_and_others_are_not(
    tmp_path: Path, places: Places, until: Until, name: str
) -> None:
    heard: list[int] = []
    watch = ProjectWatch(lambda: heard.append(1))
    try:
        watch.of(places)
        (tmp_path / "shop.duckdb").write_text("not of the project")
        count = 0
        async with asyncio.timeout(60):
            while not heard:  # until the threads have begun, nobody hears
                (tmp_path / name).write_text(str(count := count + 1))
                await asyncio.sleep(0.2)
    finally:
        await watch.close()
    heard.clear()
    (tmp_path / name).write_text("once more")
    await asyncio.sleep(2 * project_watch.STEP_MS / 1000)
    assert heard == []


async def test_without_watches_it_is_said_once_and_that_is_all(
    places: Places, until: Until, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_more_watches(*_: Any, **__: Any) -> None:
        raise OSError(28, "inotify watch limit reached")

    monkeypatch.setattr("watchfiles.watch", no_more_watches)
    project_watch._has_said.clear()
    for _ in range(2):
        watch = ProjectWatch(lambda: pytest.fail("nothing is watched"))
        watch.of(places)
        await until(lambda: caplog.records)
        await watch.close()
    (said,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert "inotify watch limit" in said.__dict__["error"]
