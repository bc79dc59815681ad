"""One message in, every node out: the daemon as a user runs it, on real dbt and real NATS."""

import asyncio
import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from dbtstream.client import Client
from dbtstream.embedded import NatsServer
from dbtstream.events import (
    AnyEvent,
    LogLine,
    NodeFinished,
    NodeStarted,
    RunCancel,
    RunFinished,
    RunPlanned,
    RunQueued,
    RunStarted,
    encode_event,
)
from dbtstream.messages import OnLost
from dbtstream.statuses import NodeStatus, Reason, RunStatus
from tests import dbt_projects
from tests.acceptance.conftest import serve, whole_run, write_config
from tests.dbt_projects import Files, write_project
from tests.guarantees import check_run


def verdict(events: list[AnyEvent]) -> RunFinished:
    assert isinstance(events[-1], RunFinished)
    return events[-1]


def ends(events: list[AnyEvent]) -> dict[str, NodeStatus]:
    return {
        event.node.name: event.status
        for event in events
        if isinstance(event, NodeFinished) and event.node.resource_type != "operation"
    }


async def run(
    tmp_path: Path, server: NatsServer, files: Files, args: list[str], **config: str
) -> list[AnyEvent]:
    """One run of a small project, from submit to verdict."""
    project = write_project(tmp_path / "shop", files)
    async with (
        serve(write_config(tmp_path, server.url, project, **config)),
        Client.connect(server.url) as client,
    ):
        accepted = await client.submit("shop", args, target="dev")
        return await whole_run(client, accepted.run_id)


async def test_plain_nats_pub_builds_a_project(tmp_path: Path, nats_server: NatsServer) -> None:
    """The promise of the README, with nothing of ours on the sending side."""
    project = write_project(tmp_path / "shop", dbt_projects.shop())
    async with (
        serve(write_config(tmp_path, nats_server.url, project)) as daemon,
        Client.connect(nats_server.url) as client,
        client.events(project="shop", family="run") as stream,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", nats_server.port)
        body = b'{"args":["build"]}'
        writer.write(b"CONNECT {}\r\nPUB dbt.runs.shop.dev %d\r\n%s\r\n" % (len(body), body))
        await writer.drain()
        first = await asyncio.wait_for(anext(aiter(stream)), 60)
        events = await whole_run(client, first.run_id)
        writer.close()
        await reader.read()
        daemon.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(daemon.process.wait(), 60) == 0

    check_run(events)
    assert isinstance(first, RunQueued)
    end = verdict(events)
    assert (end.status, end.exit_code, end.verified) == (RunStatus.SUCCESS, 0, True)
    (started,) = (event for event in events if isinstance(event, RunStarted))
    assert (started.adapter_type, started.start) == ("duckdb", "cold")
    (planned,) = (event for event in events if isinstance(event, RunPlanned))
    assert planned.node_count == len(ends(events))
    assert {artifact.kind for artifact in end.artifacts} >= {"manifest", "run_results"}


@pytest.mark.parametrize(
    ("scenario", "args", "status", "counts"),
    [
        ("node_failure", ["build"], "failure", {"error": 1}),
        ("test_failure", ["build"], "failure", {"fail": 1}),
        ("test_warn", ["build"], "success", {"warn": 1}),
        ("skip_chain", ["build"], "failure", {"error": 1, "skipped": 2}),
        ("ephemeral", ["build"], "success", {}),
        ("seeds_snapshots", ["build"], "success", {}),
        ("unit_tests", ["build"], "failure", {"fail": 1}),
    ],
)
async def test_every_way_a_build_can_end(
    tmp_path: Path,
    nats_server: NatsServer,
    scenario: str,
    args: list[str],
    status: str,
    counts: dict[str, int],
) -> None:
    events = await run(tmp_path, nats_server, getattr(dbt_projects, scenario)(), args)

    check_run(events)
    assert verdict(events).status == status
    assert verdict(events).verified
    told = Counter(str(status) for status in ends(events).values())
    assert {name: told[name] for name in counts} == counts


async def test_a_skipped_node_names_its_root_cause(tmp_path: Path, nats_server: NatsServer) -> None:
    events = await run(tmp_path, nats_server, dbt_projects.skip_chain(), ["build"])
    (failed,) = (name for name, status in ends(events).items() if status is NodeStatus.ERROR)
    skipped = [e for e in events if isinstance(e, NodeFinished) and e.status == "skipped"]
    assert skipped
    for event in skipped:
        assert event.reason is Reason.UPSTREAM_FAILED
        assert [cause.split(".")[2] for cause in event.root_causes] == [failed]


async def test_fail_fast_tells_of_what_never_started(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """dbt itself fires no event for these nodes."""
    args = ["build", "--fail-fast", "--threads", "1"]
    events = await run(tmp_path, nats_server, dbt_projects.skip_chain(), args)
    check_run(events)
    left = [e for e in events if isinstance(e, NodeFinished) and e.status == "never_started"]
    assert left
    assert {event.reason for event in left} == {Reason.FAIL_FAST}


async def test_a_cancel_interrupts_the_query_that_runs(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    project = write_project(tmp_path / "shop", dbt_projects.slow())
    async with (
        serve(write_config(tmp_path, nats_server.url, project)),
        Client.connect(nats_server.url) as client,
    ):
        accepted = await client.submit("shop", ["build"], target="dev")
        async for event in client.events(run_id=accepted.run_id):
            if isinstance(event, NodeStarted) and event.node.name == "slow":
                break
        await client.cancel(accepted.run_id, by="ada", reason="wrong day")
        events = await whole_run(client, accepted.run_id)

    check_run(events)
    assert verdict(events).status is RunStatus.CANCELLED
    assert ends(events)["slow"] is NodeStatus.CANCELLED
    steps = [event.step for event in events if isinstance(event, RunCancel)]
    assert steps[:2] == ["requested", "interrupting"]
    assert "terminating" not in steps


async def test_a_killed_dbt_ends_the_run_and_every_node(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    project = write_project(tmp_path / "shop", dbt_projects.slow())
    async with (
        serve(write_config(tmp_path, nats_server.url, project)),
        Client.connect(nats_server.url) as client,
    ):
        accepted = await client.submit("shop", ["build"], target="dev")
        pid = 0
        async for event in client.events(run_id=accepted.run_id):
            if isinstance(event, RunStarted):
                pid = event.pid
            if isinstance(event, NodeStarted) and event.node.name == "slow":
                break
        os.kill(pid, signal.SIGKILL)
        events = await whole_run(client, accepted.run_id)

    check_run(events)
    end = verdict(events)
    assert (end.status, end.exit_code) == (RunStatus.ERROR, 2)
    assert end.error is not None
    assert "signal 9" in end.error.message
    assert ends(events)["slow"] is NodeStatus.LOST


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["build", "--threads", "many"], "'many' is not a valid integer"),
        (["show", "--limit", "5", "--resource-type", "model"], "No such option"),
        (["build", "--select", "nothing_like_this", "--selector", "x"], "Could not find selector"),
    ],
)
async def test_what_dbts_own_command_line_rejects_is_told_in_dbts_words(
    tmp_path: Path, nats_server: NatsServer, args: list[str], says: str
) -> None:
    events = await run(tmp_path, nats_server, dbt_projects.shop(), args)
    check_run(events)
    end = verdict(events)
    assert (end.status, end.exit_code) == (RunStatus.ERROR, 2)
    assert end.error is not None
    assert says in end.error.message


async def test_a_project_that_does_not_parse_is_told_in_dbts_words(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    events = await run(tmp_path, nats_server, dbt_projects.compile_error(), ["build"])
    check_run(events)
    end = verdict(events)
    assert (end.status, end.exit_code) == (RunStatus.ERROR, 2)
    assert end.error is not None
    assert "Compilation Error" in end.error.message


async def test_a_missing_profile_is_told_in_dbts_words(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    events = await run(tmp_path, nats_server, dbt_projects.shop(), ["build"], profile='"not_there"')
    check_run(events)
    end = verdict(events)
    assert end.status is RunStatus.ERROR
    assert end.error is not None
    assert "not_there" in end.error.message


async def test_what_show_prints_comes_as_log_events(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    project = write_project(tmp_path / "shop", dbt_projects.shop())
    async with (
        serve(write_config(tmp_path, nats_server.url, project)),
        Client.connect(nats_server.url) as client,
    ):
        await whole_run(client, (await client.submit("shop", ["build"])).run_id)
        shown = await client.submit("shop", ["show", "--select", "orders"])
        events = await whole_run(client, shown.run_id)
    check_run(events)
    text = "\n".join(event.message for event in events if isinstance(event, LogLine))
    assert "| id | amount |" in text


async def test_no_secret_leaves_the_daemon(tmp_path: Path, nats_server: NatsServer) -> None:
    """Canaries in dbt's own secret variable and in a configured one, used in vars and SQL."""
    canaries = ["canary-of-dbt-7e1", "canary-of-ours-9c4"]
    project = write_project(
        tmp_path / "shop",
        {
            "models/leaky.sql": (
                "{{ log('using ' ~ var('token') ~ env_var('SHOP_PASSWORD'), info=True) }}"
                "select '{{ var('token') }}' as token, no_such_column_{{ env_var('SHOP_PASSWORD')"
                " | replace('-', '_') }}, '{{ env_var('SHOP_PASSWORD') }}' as password"
            )
        },
    )
    config = write_config(
        tmp_path,
        nats_server.url,
        project,
        secrets='{ SHOP_PASSWORD = { env = "VAULT" } }',
        pass_env='["DBT_ENV_SECRET_*"]',
        log_level='"debug"',
        queries="true",
        query_sql="true",
    )
    secret = {"DBT_ENV_SECRET_TOKEN": canaries[0], "VAULT": canaries[1]}
    async with serve(config, secret) as daemon, Client.connect(nats_server.url) as client:
        run = await client.submit("shop", ["build"], vars={"token": canaries[0]})
        events = await whole_run(client, run.run_id)
        view = await client.get(run.run_id)
        log = daemon.log
    check_run(events, secrets=canaries)
    assert verdict(events).status is RunStatus.FAILURE
    assert any("*****" in encode_event(event).decode() for event in events)
    for canary in canaries:
        assert canary not in str(view)
        assert canary not in log


async def test_a_killed_daemon_takes_dbt_with_it_and_its_run_is_lost_where_that_is_asked_for(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    project = write_project(tmp_path / "shop", dbt_projects.slow())
    config = write_config(tmp_path, nats_server.url, project)
    async with Client.connect(nats_server.url) as client:
        pid = 0
        async with serve(config) as daemon:
            accepted = await client.submit("shop", ["build"], target="dev", on_lost=OnLost.FAIL)
            async for event in client.events(run_id=accepted.run_id):
                if isinstance(event, RunStarted):
                    pid = event.pid
                if isinstance(event, NodeStarted) and event.node.name == "slow":
                    break
            await daemon.kill()
        async with asyncio.timeout(60):
            while await asyncio.to_thread(Path(f"/proc/{pid}").exists):
                pass
        async with serve(config):
            events = await whole_run(client, accepted.run_id)
            again = await client.submit("shop", ["run", "--select", "orders"], target="dev")
            check_run(await whole_run(client, again.run_id))

    check_run(events)
    assert verdict(events).status is RunStatus.LOST
    assert ends(events)["slow"] is NodeStatus.LOST
    assert [event.seq for event in events] == list(range(1, len(events) + 1))


async def test_the_log_of_a_daemon_is_json_lines_where_nobody_watches(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    project = write_project(tmp_path / "shop", dbt_projects.shop())
    async with serve(write_config(tmp_path, nats_server.url, project)) as daemon:
        lines = [json.loads(line) for line in daemon.log.splitlines()]
    assert [line["action"] for line in lines if line["action"].startswith("daemon.")] == [
        "daemon.start",
        "daemon.http",
        "daemon.ready",
    ]
