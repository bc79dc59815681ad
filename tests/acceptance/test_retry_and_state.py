"""A run that builds on another one: `retry_of` and `state`, with real dbt and nothing on S3."""

import asyncio
from pathlib import Path

import duckdb
import nats.js.errors

from dbtstream.client import Client
from dbtstream.config import NatsConfig
from dbtstream.embedded import NatsServer
from dbtstream.events import AnyEvent, ArtifactWritten, NodeFinished, RunFinished
from dbtstream.messages import StateFrom
from dbtstream.nats_link import NatsLink
from dbtstream.statuses import NodeStatus, RunStatus
from tests import dbt_projects
from tests.acceptance.conftest import serve, whole_run, write_config
from tests.dbt_projects import write_project
from tests.guarantees import check_run


def ends(events: list[AnyEvent]) -> dict[str, NodeStatus]:
    return {e.node.name: e.status for e in events if isinstance(e, NodeFinished)}


def verdict(events: list[AnyEvent]) -> RunFinished:
    assert isinstance(events[-1], RunFinished)
    return events[-1]


def both_targets(tmp_path: Path, server: NatsServer, project: Path) -> Path:
    config = write_config(tmp_path, server.url, project)
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('targets = ["dev"]', 'targets = ["dev", "prod"]'))
    return config


async def test_retry_of_runs_again_what_had_not_succeeded(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """Twice: the second retry is of the first one."""
    project = write_project(tmp_path / "shop", dbt_projects.skip_chain())
    async with (
        serve(both_targets(tmp_path, nats_server, project)),
        Client.connect(nats_server.url) as client,
    ):
        first = await client.submit("shop", ["build"], target="prod")
        failed = await whole_run(client, first.run_id)
        again = await client.submit("shop", [], target="prod", retry_of=first.run_id)
        still = await whole_run(client, again.run_id)
        (project / "models" / "broken.sql").write_text("select 1 as id")
        last = await client.submit("shop", ["retry"], target="prod", retry_of=again.run_id)
        mended = await whole_run(client, last.run_id)
    for events in (failed, still, mended):
        check_run(events)
    assert ends(failed)["aside"] is NodeStatus.SUCCESS
    assert ends(still) == {
        "broken": NodeStatus.ERROR,
        "middle": NodeStatus.SKIPPED,
        "last": NodeStatus.SKIPPED,
    }
    assert ends(mended) == dict.fromkeys(("broken", "middle", "last"), NodeStatus.SUCCESS)
    assert verdict(mended).status is RunStatus.SUCCESS
    with duckdb.connect(str(project / "prod.duckdb"), read_only=True) as database:
        assert database.sql("select count(*) from last").fetchall() == [(1,)]


async def test_a_ci_target_builds_what_has_changed_since_the_last_success_of_prod(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    project = write_project(tmp_path / "shop", dbt_projects.shop())
    async with (
        serve(both_targets(tmp_path, nats_server, project)),
        Client.connect(nats_server.url) as client,
    ):
        good = await client.submit("shop", ["build"], target="prod")
        await whole_run(client, good.run_id)
        (project / "models" / "broken.sql").write_text(dbt_projects.BROKEN)
        bad = await client.submit("shop", ["build"], target="prod")
        assert verdict(await whole_run(client, bad.run_id)).status is RunStatus.FAILURE
        (project / "models" / "broken.sql").unlink()
        daily = project / "models" / "daily.sql"
        daily.write_text(daily.read_text(encoding="utf-8") + " where id > 0", encoding="utf-8")
        select = ["compile", "--select", "state:modified", "--defer"]
        state = StateFrom(from_="last_success", target="prod")
        ci = await client.submit("shop", select, target="dev", state=state)
        by_target = await whole_run(client, ci.run_id)
        state = StateFrom(from_=good.run_id)
        ci = await client.submit("shop", select, target="dev", state=state)
        by_run = await whole_run(client, ci.run_id)
        # Of the unsuccessful run: there `broken` was, and nothing else has changed but `daily`.
        none = await client.submit("shop", select, target="dev", state=StateFrom(from_=bad.run_id))
        check_run(await whole_run(client, none.run_id))
    for events in (by_target, by_run):
        check_run(events)
        assert verdict(events).status is RunStatus.SUCCESS
        assert ends(events) == {"daily": NodeStatus.SUCCESS}


async def test_without_an_earlier_success_the_run_says_what_is_missing(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    project = write_project(tmp_path / "shop", dbt_projects.shop())
    async with (
        serve(write_config(tmp_path, nats_server.url, project)),
        Client.connect(nats_server.url) as client,
    ):
        run = await client.submit(
            "shop", ["build", "--select", "state:modified"], state=StateFrom(from_="last_success")
        )
        events = await whole_run(client, run.run_id)
    end = verdict(events)
    assert (end.status, end.exit_code) == (RunStatus.ERROR, 2)
    assert end.error is not None
    assert "manifest.json of a successful run of shop.dev" in end.error.message


async def test_artifacts_are_where_the_events_and_the_state_say(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    project = write_project(tmp_path / "shop", dbt_projects.shop())
    async with (
        serve(write_config(tmp_path, nats_server.url, project)),
        Client.connect(nats_server.url) as client,
        NatsLink(NatsConfig(servers=(nats_server.url,)), name="test") as link,
    ):
        await link.wait_connected(30)
        run = await client.submit("shop", ["build"])
        events = await whole_run(client, run.run_id)
        async with asyncio.timeout(60):
            while not (view := await client.get(run.run_id)).status.is_terminal:
                pass
        store = await link.js.object_store("dbt_artifacts")
        said = {e.object for e in events if isinstance(e, ArtifactWritten) and e.object}
        stored = {info.name for info in await store.list()}
        missing = []
        for name in [*view.artifacts.values(), "latest/shop/dev/manifest.json"]:
            try:
                assert (await store.get(name)).data
            except nats.js.errors.ObjectNotFoundError:
                missing.append(name)
    assert missing == []
    assert {"manifest", "run_results", "log"} <= set(view.artifacts)
    assert said <= {f"dbt_artifacts/{name}" for name in stored}
    assert said >= {f"dbt_artifacts/{run.run_id}/manifest.json"}
