"""`dbtstream top` beside a real daemon and real dbt: a run that failed, one that runs, one that
waits. How it looks live is tried in `integration/test_top.py`."""

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec

from dbtstream.client import Client
from dbtstream.embedded import NatsServer
from dbtstream.fleet import FleetView
from dbtstream.statuses import RunStatus
from tests.acceptance.conftest import COMMAND, ENVIRONMENT, serve, write_config
from tests.dbt_projects import node_failure, slow, write_project

LIMIT_S = 100


async def typed(url: str, *words: str) -> tuple[int | None, str, str]:
    """Into a pipe: exit code, stdout, stderr."""
    process = await asyncio.create_subprocess_exec(
        *(*COMMAND, "--nats", url, *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=ENVIRONMENT,
    )
    async with asyncio.timeout(LIMIT_S):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_the_fleet_at_a_glance_and_as_json(tmp_path: Path, nats_server: NatsServer) -> None:
    project = write_project(tmp_path / "shop", node_failure() | slow())
    url = nats_server.url
    async with serve(write_config(tmp_path, url, project)), Client.connect(url) as client:
        failed = await client.submit("shop", ["run", "--select", "orders", "broken"])
        verdict = await client.wait(failed.run_id, timeout_s=LIMIT_S)
        assert verdict.status is RunStatus.FAILURE
        running = await client.submit("shop", ["run", "--select", "before+"])
        async with client.events(run_id=running.run_id) as events, asyncio.timeout(LIMIT_S):
            async for event in events:
                if getattr(getattr(event, "node", None), "name", "") == "slow":
                    break
        waiting = await client.submit("shop", ["build"])
        try:
            await look(url, failed.run_id, running.run_id)
        finally:  # the daemon would wait for them
            await client.cancel(waiting.run_id)
            await client.cancel(running.run_id)


async def look(url: str, failed: str, running: str) -> None:
    code, out, err = await typed(url, "top", "--once")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert ["tester", "1/4", "━━──────"] in [words[:3] for words in lines]
    assert ["shop.dev", "1"] in [words[:2] for words in lines]
    run = next(words for words in lines if words[:1] == [running[-8:]])
    assert run[1:5] == ["shop.dev", "running", "━━━━━───────────", "1/3"]
    assert any("model slow" in line for line in out.splitlines())
    assert any("model broken" in line and "no_such_table" in line for line in out.splitlines())
    assert "failure" in out

    code, again, err = await typed(url, "top")  # a pipe is no terminal
    assert (code, err) == (0, "")
    assert first_words(again)[3:] == first_words(out)[3:]

    code, out, err = await typed(url, "top", "--once", "--json", "--project", "shop")
    assert (code, err) == (0, "")
    assert_view(json.loads(out), failed, running)
    msgspec.json.decode(out, type=FleetView)
    code, out, _ = await typed(url, "top", "--json", "--target", "prod")
    assert [json.loads(out)[name] for name in ("queues", "runs", "failures")] == [[], [], []]


def first_words(out: str) -> list[str]:
    return [line.split()[0] for line in out.splitlines() if line]


def assert_view(view: dict[str, Any], failed: str, running: str) -> None:
    (worker,) = view["workers"]
    assert (worker["worker"], worker["slots"], worker["used"]) == ("tester", 4, 1)
    assert (worker["run_ids"], worker["draining"]) == ([running], False)
    (queue,) = view["queues"]
    assert (queue["project"], queue["target"], queue["waiting"]) == ("shop", "dev", 1)
    assert queue["running"] == running
    assert queue["oldest_wait_s"] > 0
    (run,) = view["runs"]
    assert (run["run_id"], run["status"]) == (running, "running")
    assert (run["done"], run["total"], run["by_status"]) == (1, 3, {"success": 1})
    assert [node["unique_id"] for node in run["nodes"]] == ["model.shop.slow"]
    assert [ended["run_id"] for ended in view["ended"]] == [failed]
    (failure,) = view["failures"]
    assert (failure["run_id"], failure["unique_id"]) == (failed, "model.shop.broken")
    assert "no_such_table" in failure["message"]


async def test_without_a_daemon_it_says_so(nats_server: NatsServer) -> None:
    code, out, err = await typed(nats_server.url, "top", "--once")

    assert (code, out) == (1, "")
    assert "no dbtstream daemon answers" in err
    assert len(err.splitlines()) == 1
