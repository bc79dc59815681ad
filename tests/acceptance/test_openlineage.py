"""OpenLineage of real dbt, from `dbtstream serve` to a subject: valid, whole, and no edge less
than OpenLineage's own dbt integration reports of the same project."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from nats.js.api import StreamConfig

import dbtstream.demo
from dbtstream.client import Client
from dbtstream.config import NatsConfig
from dbtstream.embedded import NatsServer
from dbtstream.events import AnyEvent, NodeFinished
from dbtstream.lineage_events import Identity, InputVersion
from dbtstream.nats_link import NatsLink
from dbtstream.statuses import NodeStatus
from tests import dbt_projects
from tests.acceptance.conftest import serve, whole_run, write_config
from tests.dbt_projects import write_project
from tests.openlineage_events import (
    Json,
    RunStory,
    check,
    check_run_states,
    edges,
    end_of,
    kinds,
    mapped,
)
from tests.openlineage_wrapper import Tables, missing_edges, missing_tested, run_dbt_ol

SUBJECT = "openlineage.events"
DEMO = Path(dbtstream.demo.__file__).parent / "project"


async def run(
    tmp_path: Path, server: NatsServer, project: Path, args: list[str]
) -> tuple[list[AnyEvent], list[Json]]:
    """One run by a daemon: our events, and the OpenLineage messages, each of them valid."""
    config = write_config(tmp_path, server.url, project)
    with config.open("a", encoding="utf-8") as file:
        file.write(f'\n[openlineage]\nsubject = "{SUBJECT}"\n')
    nats = NatsConfig(servers=(server.url,))
    async with NatsLink(nats, name="test") as link:
        await link.wait_connected(20)
        await link.js.add_stream(StreamConfig(name="OPENLINEAGE", subjects=[SUBJECT]))
        async with serve(config) as daemon, Client.connect(server.url) as client:
            await daemon.until_log("leads")
            accepted = await client.submit("shop", args, target="dev")
            events = await whole_run(client, accepted.run_id)
            messages = await until_end_of(link, accepted.run_id)
    for message in messages:
        check(message)
    check_run_states(messages)
    return events, messages


async def until_end_of(link: NatsLink, run_id: str) -> list[Json]:
    """All messages, once the run's own end is among them."""
    reader = await link.js.pull_subscribe(SUBJECT)
    messages: list[Json] = []
    async with asyncio.timeout(60):
        while True:
            for message in await reader.fetch(1, timeout=30):
                messages.append(json.loads(message.data))
                last = messages[-1]
                ended = last.get("eventType") in ("COMPLETE", "FAIL", "ABORT")
                if ended and last["run"]["runId"] == run_id:
                    await reader.unsubscribe()
                    return messages


async def test_every_node_that_ran_has_its_run(tmp_path: Path, nats_server: NatsServer) -> None:
    """A failed test, and what is skipped behind it."""
    project = write_project(tmp_path / "shop", dbt_projects.test_failure())
    events, messages = await run(tmp_path, nats_server, project, ["build"])
    ends = {e.node.unique_id: e.status for e in events if isinstance(e, NodeFinished)}
    words = {
        NodeStatus.SUCCESS: "COMPLETE",
        NodeStatus.FAIL: "FAIL",
        NodeStatus.SKIPPED: "ABORT",
    }
    assert set(ends.values()) == set(words)
    for unique_id, status in ends.items():
        assert end_of(messages, unique_id)["eventType"] == words[status]
    assert kinds(messages)[-1] == "FAIL shop.dev.build"


def told(tables: Tables) -> list[AnyEvent]:
    """A run of ours as it must be told by this manifest, assembled without dbt."""
    story = RunStory().begin()
    for name, parents in tables.parents.items():
        unique_id = f"model.x.{name}"
        inputs = [InputVersion(namespace="duckdb://x", name=parent) for parent in parents]
        story.build(
            unique_id,
            identity=Identity(namespace="duckdb://x", name=name),
            input_versions=inputs,
        )
    return story.end().events


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """The sample project, which has seeds, a snapshot, sources, an ephemeral model, tests."""
    return shutil.copytree(DEMO, tmp_path / "demo")


@pytest.mark.parametrize("flags", [(), ("--consume-structured-logs",)], ids=["default", "live"])
async def test_every_edge_that_the_wrapper_reports_is_reported(
    tmp_path: Path, nats_server: NatsServer, demo: Path, flags: tuple[str, ...]
) -> None:
    theirs = await asyncio.to_thread(run_dbt_ol, demo, *flags)
    manifest = (demo / "target" / "manifest.json").read_text(encoding="utf-8")
    tables = Tables.of(json.loads(manifest))
    assert edges(theirs), "else there is nothing to compare with"
    assert missing_edges(mapped(told(tables)), theirs, tables) == set(), "what the manifest says"
    _, ours = await run(tmp_path, nats_server, demo, ["build"])
    assert missing_edges(ours, theirs, tables) == set()
    assert missing_tested(ours, theirs, tables) == set()
    phantoms = {name for edge in edges(ours) for name in edge} - tables.real
    assert phantoms == set(), "every dataset of ours is one that is there"


async def test_column_lineage_is_in_the_live_messages(
    tmp_path: Path, nats_server: NatsServer, demo: Path
) -> None:
    """Where the wrapper's live mode has none."""
    _, ours = await run(tmp_path, nats_server, demo, ["build"])
    traced = {
        output["name"]
        for message in ours
        for output in message.get("outputs", [])
        if "columnLineage" in output.get("facets", {})
    }
    assert "flights.marts.routes" in traced
