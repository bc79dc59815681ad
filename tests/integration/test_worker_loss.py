"""A run survives its worker: daemons in processes of their own, killed and frozen for real."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dbtstream.client import Client
from dbtstream.embedded import NatsServer
from dbtstream.events import AnyEvent, NodeFinished, NodeStarted, RunFinished, RunLeased, RunStarted
from dbtstream.lineage_events import AssetMaterialized
from dbtstream.messages import OnLost, RunView
from dbtstream.statuses import NodeStatus, Reason, RunStatus
from tests.acceptance.conftest import Serve, serve, whole_run
from tests.daemons import project_folder
from tests.guarantees import check_run
from tests.scripted_child import scripted_child

DIAMOND = """
    start = start_line()
    names = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}
    done = {r["unique_id"].split(".")[-1] for r in (start.get("retry") or {}).get("results", [])
            if r["status"] == "success"}
    todo = [n for n in names if n not in done]
    hello()
    plan(*[model(n, *names[n]) for n in todo])
    for n in todo:
        started(n)
        if n == "b":
            wait_for(%r)
        finished(n)
    result(0, [(n, "success") for n in todo])
"""
"""`a` is built, `b` waits for the test's word; what a retry need not do is left out."""


@asynccontextmanager
async def worker(
    tmp_path: Path,
    server: NatsServer,
    name: str,
    flag: Path,
    *,
    body: str = DIAMOND,
    more: str = "",
    **settings: object,
) -> AsyncIterator[Serve]:
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    limits = {
        "ack_wait_s": 2.0,
        "lease_ttl_s": 3,
        "heartbeat_s": 0.3,
        "cancel_grace_s": 1.0,
        "kill_grace_s": 1.0,
        "drain_timeout_s": 0.0,
    } | settings
    lines = "\n".join(
        f"{key} = {f'{value!r}' if not isinstance(value, str) else f'{chr(34)}{value}{chr(34)}'}"
        for key, value in limits.items()
    )
    config = folder / "dbtstream.toml"
    config.write_text(
        f"""
[nats]
servers = ["{server.url}"]
reconnect_wait_s = 0.05
[worker]
name = "{name}"
state_dir = "{folder / "state"}"
{lines}
[projects.shop]
path = "{project_folder(tmp_path)}"
targets = ["dev"]
python = "{scripted_child(folder / "child", body % str(flag))}"
{more}
""",
        encoding="utf-8",
    )
    async with serve(config) as running:
        yield running


async def until(client: Client, run_id: str, fact: Callable[[AnyEvent], bool]) -> AnyEvent:
    async with asyncio.timeout(60):
        async for event in client.events(run_id=run_id):
            if fact(event):
                return event
    raise AssertionError("the run ended before")


async def ended(client: Client, run_id: str) -> RunView:
    """The run's last state, which is written after its last event."""
    async with asyncio.timeout(60):
        while not (view := await client.get(run_id)).status.is_terminal:
            pass
    return view


def b_started(event: AnyEvent, *, attempt: int = 1) -> bool:
    return isinstance(event, NodeStarted) and event.node.name == "b" and event.attempt == attempt


def ends(events: list[AnyEvent], attempt: int) -> dict[str, NodeStatus]:
    return {
        event.node.name: event.status
        for event in events
        if isinstance(event, NodeFinished) and event.attempt == attempt
    }


def leases(events: list[AnyEvent]) -> list[tuple[str, str | None]]:
    return [(e.cause, e.decision) for e in events if isinstance(e, RunLeased)]


async def test_a_killed_daemon_that_comes_back_does_only_what_had_not_succeeded(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    flag = tmp_path / "go"
    async with Client.connect(nats_server.url) as client:
        # Long waits: the one that comes back settles its predecessor's affairs at once.
        patient: dict[str, Any] = {"ack_wait_s": 600.0, "lease_ttl_s": 600}
        async with worker(tmp_path, nats_server, "w1", flag, **patient) as first:
            run = await client.submit("shop", ["build"], target="dev")
            await until(client, run.run_id, b_started)
            await first.kill()
        flag.touch()
        async with worker(tmp_path, nats_server, "w1", flag, **patient):
            events = await whole_run(client, run.run_id)
            view = await ended(client, run.run_id)
    check_run(events)
    assert ends(events, 1) == {
        "a": NodeStatus.SUCCESS,
        "b": NodeStatus.LOST,
        "c": NodeStatus.NEVER_STARTED,
        "d": NodeStatus.NEVER_STARTED,
    }
    assert ends(events, 2) == dict.fromkeys("bcd", NodeStatus.SUCCESS)
    assert leases(events) == [("first", None), ("worker_lost", "resume")]
    verdict = events[-1]
    assert isinstance(verdict, RunFinished)
    assert (verdict.status, verdict.attempts) == (RunStatus.SUCCESS, 2)
    assert verdict.counts == {"model": {"success": 4}}
    assert (view.status, view.attempt) == (RunStatus.SUCCESS, 2)


async def test_another_worker_takes_over_when_the_lease_has_expired(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    flag = tmp_path / "go"
    async with (
        Client.connect(nats_server.url) as client,
        worker(tmp_path, nats_server, "w1", flag) as first,
    ):
        run = await client.submit("shop", ["build"], target="dev")
        await until(client, run.run_id, b_started)
        async with worker(tmp_path, nats_server, "w2", flag):
            await first.kill()
            flag.touch()
            events = await whole_run(client, run.run_id)
    check_run(events)
    assert {e.worker for e in events if e.attempt == 2} == {"w2"}
    assert ends(events, 2) == dict.fromkeys("bcd", NodeStatus.SUCCESS)
    (taken,) = (e for e in events if isinstance(e, RunLeased) and e.cause != "first")
    assert (taken.previous_worker, taken.decision) == ("w1", "resume")


@pytest.mark.parametrize("on_lost", [OnLost.RESTART, OnLost.FAIL])
async def test_a_lost_run_goes_on_as_its_request_says(
    tmp_path: Path, nats_server: NatsServer, on_lost: OnLost
) -> None:
    flag = tmp_path / "go"
    async with (
        Client.connect(nats_server.url) as client,
        worker(tmp_path, nats_server, "w1", flag) as first,
    ):
        run = await client.submit("shop", ["build"], target="dev", on_lost=on_lost)
        await until(client, run.run_id, b_started)
        await first.kill()
        flag.touch()
        async with worker(tmp_path, nats_server, "w1", flag):
            events = await whole_run(client, run.run_id)
    check_run(events)
    verdict = events[-1]
    assert isinstance(verdict, RunFinished)
    if on_lost is OnLost.FAIL:
        assert verdict.status is RunStatus.LOST
        assert {e.attempt for e in events} == {1}
    else:
        assert verdict.status is RunStatus.SUCCESS
        assert ends(events, 2) == dict.fromkeys("abcd", NodeStatus.SUCCESS)


async def test_a_frozen_worker_that_wakes_up_changes_nothing(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """Its dbt is stopped by the deadline, and its events, its verdict and its ack do not count."""
    flag = tmp_path / "go"
    async with (
        Client.connect(nats_server.url) as client,
        worker(tmp_path, nats_server, "w1", flag) as first,
    ):
        run = await client.submit("shop", ["build"], target="dev")
        await until(client, run.run_id, b_started)
        async with worker(tmp_path, nats_server, "w2", flag):
            first.process.send_signal(signal.SIGSTOP)
            await until(client, run.run_id, lambda e: isinstance(e, RunStarted) and e.attempt == 2)
            flag.touch()
            first.process.send_signal(signal.SIGCONT)
            await first.until_log("another worker has taken over this run")
            events = await whole_run(client, run.run_id)
            view = await ended(client, run.run_id)
    check_run(events)
    assert ends(events, 2) == dict.fromkeys("bcd", NodeStatus.SUCCESS)
    assert (view.status, view.worker, view.attempt) == (RunStatus.SUCCESS, "w2", 2)


async def test_a_drain_hands_the_run_over(tmp_path: Path, nats_server: NatsServer) -> None:
    flag = tmp_path / "go"
    async with (
        Client.connect(nats_server.url) as client,
        worker(tmp_path, nats_server, "w1", flag, on_drain="hand_over") as first,
    ):
        run = await client.submit("shop", ["build"], target="dev")
        await until(client, run.run_id, b_started)
        async with worker(tmp_path, nats_server, "w2", flag):
            first.process.terminate()
            async with asyncio.timeout(60):
                assert await first.process.wait() == 0
            flag.touch()
            events = await whole_run(client, run.run_id)
    check_run(events)
    assert leases(events) == [("first", None), ("handed_over", "resume")]
    reasons = {
        e.node.name: e.reason for e in events if isinstance(e, NodeFinished) and e.attempt == 1
    }
    assert reasons["b"] is Reason.HANDED_OVER
    assert ends(events, 2) == dict.fromkeys("bcd", NodeStatus.SUCCESS)
    verdict = events[-1]
    assert isinstance(verdict, RunFinished)
    assert (verdict.status, verdict.counts) == (RunStatus.SUCCESS, {"model": {"success": 4}})


async def test_a_run_whose_workers_all_die_ends(tmp_path: Path, nats_server: NatsServer) -> None:
    """It takes its worker with it each time, and after `max_attempts` nobody else gets it."""
    flag = tmp_path / "never"
    async with Client.connect(nats_server.url) as client:
        run_id = ""
        for attempt in (1, 2):
            async with worker(tmp_path, nats_server, "w1", flag, max_attempts=2) as daemon:
                if not run_id:
                    run_id = (await client.submit("shop", ["build"], target="dev")).run_id
                await until(client, run_id, partial(b_started, attempt=attempt))
                await daemon.kill()
        async with worker(tmp_path, nats_server, "w1", flag, max_attempts=2):
            events = await whole_run(client, run_id)
    check_run(events)
    assert leases(events) == [
        ("first", None),
        ("worker_lost", "resume"),
        ("worker_lost", "fail"),
    ]
    verdict = events[-1]
    assert isinstance(verdict, RunFinished)
    assert (verdict.status, verdict.attempts) == (RunStatus.LOST, 2)


TELLS_LATE = """
    start = start_line()
    todo = ["b"] if start.get("retry") else ["a", "b"]
    hello()
    names = [model(n, relation=table(n)) for n in ("a", "b")]
    plan(*[m for m in names if m["name"] in todo])
    if start.get("retry"):
        graph(*names)
    for n in todo:
        started(n)
        if n == "b" and not start.get("retry"):
            wait_for(%r)
        finished(n)
    result(0, [(n, "success") for n in todo])
"""
"""The first attempt ends before its child has told the manifest, so no asset could be told."""


async def test_assets_that_a_dead_worker_did_not_get_to_are_told_by_the_next(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """`a` is not built again, and its build is told all the same."""
    flag = tmp_path / "flag"
    async with Client.connect(nats_server.url) as client:
        async with worker(tmp_path, nats_server, "w", flag, body=TELLS_LATE) as first:
            accepted = await client.submit("shop", ["build"], target="dev")
            await until(client, accepted.run_id, b_started)
            await first.kill()
        async with worker(tmp_path, nats_server, "w", flag, body=TELLS_LATE):
            events = await whole_run(client, accepted.run_id)
    check_run(events)
    told = [(e.name, e.attempt) for e in events if isinstance(e, AssetMaterialized)]
    assert told == [("a", 2), ("b", 2)]
