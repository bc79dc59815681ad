"""What a daemon really says is what `schemas/` says that it says: two validators of other people
look at every stored event and every reply of runs of real dbt."""

import json
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import jsonschema
from nats.js.api import RawStreamMsg
from nats.js.errors import NoKeysError, NotFoundError

from dbtstream import demo
from dbtstream.asyncapi import asyncapi_document
from dbtstream.asyncapi_facts import JETSTREAM
from dbtstream.client import Client
from dbtstream.embedded import NatsServer
from dbtstream.nats_link import NatsLink
from dbtstream.schema import CONTRACT
from dbtstream.schema_examples import EXAMPLES
from dbtstream.subjects import EVENTS_STREAM
from tests import dbt_projects
from tests.acceptance.conftest import serve, whole_run, write_config
from tests.contract.validators import validate, validate_events
from tests.dbt_projects import write_project

DEMO = Path(demo.__file__).parent / "project"
DOCUMENT = asyncapi_document(CONTRACT, EXAMPLES)

Stored = Callable[[NatsLink, str], Awaitable[list[RawStreamMsg]]]


def check_events(messages: list[RawStreamMsg]) -> set[str]:
    """Bodies by both validators, headers and subjects by asyncapi.yaml; the types in them."""
    bodies = [message.data or b"" for message in messages]
    assert validate_events(bodies) == []
    components = DOCUMENT["components"]
    trait = components["messageTraits"]["cloudEvent"]["headers"]
    types = set()
    for message, body in zip(messages, bodies, strict=True):
        event = json.loads(body)
        types.add(event["type"])
        described = components["messages"][f"event.{event['type']}"]
        headers = message.headers or {}
        for schema in (trait, described["headers"]):
            jsonschema.Draft202012Validator(schema).validate(headers)
        names = {name for name in headers if not name.startswith("Nats-Expected-")}
        assert names <= set(trait["properties"]), names
        wanted, actual = described["x-subject"].split("."), (message.subject or "").split(".")
        assert len(wanted) == len(actual)
        for token, told in zip(wanted, actual, strict=True):
            assert token == told or token.startswith("{"), (described["x-subject"], told)
    return types


async def bucket_values(link: NatsLink) -> list[tuple[str, Any]]:
    """Of every key that the document describes: (name of the schema, value)."""
    found = []
    for bucket, told in JETSTREAM["buckets"].items():
        try:
            values = await link.js.key_value(bucket)
            keys = await values.keys()
        except (NotFoundError, NoKeysError):
            continue
        for pattern, schema in told["keys"].items():
            begin = pattern.partition(".")[0] + "."
            found += [
                (schema, json.loads((await values.get(key)).value or b""))
                for key in keys
                if key.startswith(begin)
            ]
    return found


async def test_every_event_and_state_of_the_sample_project_is_valid(
    tmp_path: Path, nats_server: NatsServer, link: NatsLink, stored: Stored
) -> None:
    project = Path(shutil.copytree(DEMO, tmp_path / "flights"))
    config = write_config(
        tmp_path, nats_server.url, project, log_level='"info"', queries="true", query_sql="true"
    )
    async with serve(config), Client.connect(nats_server.url) as client:
        for args in (["build"], ["source", "freshness"]):
            accepted = await client.submit("shop", args, target="dev", labels={"by": "tests"})
            await whole_run(client, accepted.run_id)
        types = check_events(await stored(link, EVENTS_STREAM))
        states = await bucket_values(link)

    assert types >= {
        *("run.queued", "run.leased", "run.started", "run.planned", "run.finished"),
        *("node.started", "node.finished", "log", "query.finished", "artifact.written"),
    }
    assert "reply.run_view" in {name for name, _ in states}
    assert validate(states) == []


async def test_every_event_of_builds_that_go_wrong_is_valid(
    tmp_path: Path, nats_server: NatsServer, link: NatsLink, stored: Stored
) -> None:
    """Errors, skips, failing tests and unit tests, batches, cancels, refusals."""
    project = write_project(
        tmp_path / "shop",
        {
            **dbt_projects.microbatch(fail_on_day=2),
            **dbt_projects.skip_chain(),
            **dbt_projects.unit_tests(),
            **dbt_projects.test_failure(),
            **dbt_projects.exposure(),
            **dbt_projects.seeds_snapshots(),
            **dbt_projects.slow(),
        },
    )
    async with (
        serve(write_config(tmp_path, nats_server.url, project)),
        Client.connect(nats_server.url) as client,
    ):
        days = ["--event-time-start", "2024-01-01", "--event-time-end", "2024-01-04"]
        args = ["build", "--exclude", "slow+", *days]
        accepted = await client.submit("shop", args, target="dev")
        await whole_run(client, accepted.run_id)

        async with client.events(project="shop", name="slow", status="started") as starts:
            slow = await client.submit("shop", ["build", "--select", "slow+"], target="dev")
            await anext(aiter(starts))
            await client.cancel(slow.run_id, by="tests", reason="it is slow")
        await whole_run(client, slow.run_id)

        await link.publish("dbt.runs.shop.dev", b'{"args": ["build", "--target", "prod"]}')
        async with client.events(project="shop", status="rejected", after_seq=0) as refusals:
            await anext(aiter(refusals))
        types = check_events(await stored(link, EVENTS_STREAM))

    assert types >= {"node.batch", "run.cancel", "run.rejected", "run.finished"}


async def test_every_reply_of_control_is_valid(
    tmp_path: Path, nats_server: NatsServer, link: NatsLink
) -> None:
    project = write_project(tmp_path / "shop", dbt_projects.shop())

    async def ask(verb: str, request: dict[str, Any]) -> tuple[str, Any]:
        address = DOCUMENT["channels"][verb]["address"]
        answer = await link.request(address, json.dumps(request).encode(), timeout_s=10)
        value = json.loads(answer.data)
        allowed = {
            reply["$ref"].rpartition("/")[2]
            for reply in DOCUMENT["operations"][verb]["reply"]["messages"]
        }
        assert f"reply.{value['type']}" in allowed
        return f"reply.{value['type']}", value

    async with (
        serve(write_config(tmp_path, nats_server.url, project)),
        Client.connect(nats_server.url) as client,
    ):
        replies = [await ask("submit", {"project": "shop", "request": {"args": ["parse"]}})]
        run_id = replies[0][1]["run_id"]
        await whole_run(client, run_id)
        replies += [
            await ask("submit", {"project": "shop", "request": {"args": ["--nonsense"]}}),
            await ask("submit", {"misspelt": True}),
            await ask("get", {"run_id": run_id}),
            await ask("get", {"run_id": "unknown"}),
            await ask("cancel", {"run_id": run_id}),
            await ask("cancel", {}),
            await ask("list", {"project": "shop"}),
            await ask("list", {"limit": "many"}),
            await ask("worker_status", {}),
        ]

    assert validate(replies) == []
    assert {name for name, _ in replies} == {name for name in CONTRACT if name.startswith("reply.")}
