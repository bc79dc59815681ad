"""What the queue may hold: each request is run once, or rejected with a code and kept."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dbtstream.config import NatsConfig
from dbtstream.errors import RequestRejected
from dbtstream.events import AnyEvent, RunFinished, RunRejected
from dbtstream.messages import MAX_REQUEST_BYTES
from dbtstream.statuses import RunStatus
from tests.daemons import Served, daemon_config, serving
from tests.guarantees import check_run
from tests.scripted_child import GOOD_RUN


@pytest.fixture
async def served(tmp_path: Path, nats_config: NatsConfig) -> AsyncIterator[Served]:
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN)) as served:
        yield served


async def next_ends(served: Served, count: int = 1) -> list[AnyEvent]:
    """The next `count` runs' ends: rejected or finished."""
    ends: list[AnyEvent] = []
    async with asyncio.timeout(60):
        async for event in served.client.events(family="run", since="all"):
            if isinstance(event, RunRejected | RunFinished):
                ends.append(event)
                if len(ends) == count:
                    break
    return ends


async def test_a_plainly_published_request_runs(served: Served) -> None:
    """What `nats pub dbt.runs.shop.dev '{"args":["build"]}'` sends: no header, no client."""
    await served.link.client.publish("dbt.runs.shop.dev", b'{"args":["build"]}')
    (end,) = await next_ends(served)
    assert isinstance(end, RunFinished)
    events = await served.events(end.run_id)

    check_run(events)
    assert end.status is RunStatus.SUCCESS
    assert end.counts == {"model": {"success": 2}}
    assert end.verified
    await served.queue_empty()


@pytest.mark.parametrize(
    ("payload", "code", "says"),
    [
        (b"build", "bad_message", "malformed"),
        (b"", "bad_message", "truncated"),
        (b"\xff\xfe\x00", "bad_message", "malformed"),
        (b"[]", "bad_message", "Expected `object`"),
        (b'{"args":"build"}', "bad_message", "Expected `array`"),
        (b'{"args":[]}', "bad_message", "args is empty"),
        (b'{"args":["build"],"selct":"x"}', "bad_message", "unknown field `selct`"),
        (b'{"args":["build"],"timeout_s":-1}', "bad_message", "must be above 0"),
        (b'{"args":["build"],"retry_of":"x"}', "usage_error", "retry_of"),
        (b'{"retry_of":"01a20128-5ce6-7645-b4b6-65c379964c39"}', "usage_error", "retry_of"),
        (b'{"args":["build"],"state":{"from":"yesterday"}}', "bad_message", "state.from"),
        (b'{"retry_of":"x","state":{"from":"last_success"}}', "bad_message", "state"),
        (b'{"args":["clean"]}', "command_not_allowed", "does not allow `dbt clean`"),
        (b'{"args":["run-operation","drop"]}', "command_not_allowed", "run-operation"),
        (b'{"args":["build","--target","x"]}', "flag_not_allowed", "--target"),
        (b'{"args":["build","--profiles-dir=/etc"]}', "flag_not_allowed", "--profiles-dir"),
        (b'{"args":["dbt","build"]}', "usage_error", "must begin with dbt's command"),
        (b'{"args":["build"],"labels":{"k":"' + b"x" * 200 + b'"}}', "too_large", "labels.k"),
        (b'{"args":["' + b"x" * MAX_REQUEST_BYTES + b'"]}', "too_large", "the limit is"),
    ],
    ids=lambda value: value[:40].decode("latin-1") if isinstance(value, bytes) else None,
)
async def test_what_cannot_run_is_rejected_and_kept_with_its_bytes(
    served: Served, payload: bytes, code: str, says: str
) -> None:
    await served.publish("dbt.runs.shop.dev", payload)
    (rejected,) = await next_ends(served)

    assert isinstance(rejected, RunRejected)
    assert (rejected.code, rejected.project, rejected.target) == (code, "shop", "dev")
    assert says in rejected.message
    check_run(await served.events(rejected.run_id))
    ((subject, headers, body),) = await served.dead_letters()
    assert (subject, body) == ("dbt.dead.shop.dev", payload)
    assert headers["dbtstream-code"] == code
    assert headers["dbtstream-subject"] == "dbt.runs.shop.dev"
    assert headers["dbtstream-run-id"] == rejected.run_id
    assert isinstance((await served.run())[-1], RunFinished)  # it goes on serving
    await served.queue_empty()


@pytest.mark.parametrize(
    ("subject", "code", "says"),
    [
        ("dbt.runs.warehouse.dev", "unknown_project", "no worker serves project warehouse"),
        ("dbt.runs.shop.staging", "unknown_target", "it has dev, prod"),
        ("dbt.runs.shop", "bad_message", "is not dbt.runs.<project>.<target>"),
        ("dbt.runs.shop.dev.now", "bad_message", "is not dbt.runs.<project>.<target>"),
    ],
)
async def test_a_request_that_nobody_would_fetch_is_found_and_rejected(
    served: Served, monkeypatch: pytest.MonkeyPatch, subject: str, code: str, says: str
) -> None:
    monkeypatch.setattr("dbtstream.unknown_subjects.GRACE_S", 0.0)
    await served.publish(subject, b'{"args":["build"]}')
    (rejected,) = await next_ends(served)

    assert isinstance(rejected, RunRejected)
    assert rejected.code == code
    assert says in rejected.message
    ((_, headers, body),) = await served.dead_letters()
    assert (headers["dbtstream-subject"], body) == (subject, b'{"args":["build"]}')
    await served.queue_empty()


async def test_a_request_that_waited_too_long_is_expired(served: Served) -> None:
    past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    await served.publish(
        "dbt.runs.shop.dev", json.dumps({"args": ["build"], "not_after": past}).encode()
    )
    (rejected,) = await next_ends(served)
    assert isinstance(rejected, RunRejected)
    assert rejected.code == "expired"


async def test_the_same_request_id_in_two_messages_runs_once(served: Served) -> None:
    """Without a Nats-Msg-Id the stream cannot know them for one; the worker does."""
    for _ in range(2):
        await served.publish("dbt.runs.shop.dev", b'{"args":["build"],"request_id":"nightly"}')
    first, second = await next_ends(served, 2)

    assert isinstance(first, RunFinished)
    assert isinstance(second, RunRejected)
    assert second.code == "duplicate"
    assert first.run_id in second.message


async def test_submitting_the_same_request_id_again_gives_the_same_run(served: Served) -> None:
    first = await served.client.submit("shop", ["build"], target="dev", request_id="nightly")
    second = await served.client.submit("shop", ["build"], target="dev", request_id="nightly")
    await served.events(first.run_id)
    third = await served.client.submit("shop", ["build"], target="dev", request_id="nightly")

    assert {first.run_id} == {second.run_id, third.run_id}
    assert (first.duplicate, second.duplicate, third.duplicate) == (False, True, True)


async def test_submit_answers_at_once_what_the_queue_would_answer_later(served: Served) -> None:
    for project, target, args, code in [
        ("warehouse", "dev", ["build"], "unknown_project"),
        ("shop", "staging", ["build"], "unknown_target"),
        ("shop", "dev", ["clean"], "command_not_allowed"),
        ("shop", "dev", ["build", "-tprod"], "flag_not_allowed"),
    ]:
        with pytest.raises(RequestRejected) as rejected:
            await served.client.submit(project, args, target=target)
        assert rejected.value.code == code
    await served.queue_empty()


async def test_a_10_mb_request_is_refused_before_it_is_sent(served: Served) -> None:
    with pytest.raises(RequestRejected, match="the limit is"):
        await served.client.submit("shop", ["build", "x" * 10_000_000], target="dev")


async def test_one_request_id_means_one_run_in_each_target(served: Served) -> None:
    runs = [
        await served.client.submit("shop", ["build"], target=target, request_id="nightly")
        for target in ("dev", "prod")
    ]
    assert [run.duplicate for run in runs] == [False, False]
    for run in runs:
        check_run(await served.events(run.run_id))


async def test_a_run_id_in_a_header_cannot_touch_another_request(served: Served) -> None:
    """Neither end somebody's run nor hide behind one that has ended."""
    ended = (await served.run())[0].run_id
    await served.queue_empty()
    await served.publish("dbt.runs.shop.prod", b'{"args":["build"]}', **{"dbtstream-run-id": ended})
    _, second = await next_ends(served, 2)

    assert isinstance(second, RunFinished)
    assert second.run_id != ended
    assert (second.target, second.status) == ("prod", RunStatus.SUCCESS)


async def test_control_answers_to_inboxes_only(served: Served) -> None:
    """A reply subject is not checked against the asker's permissions, but ours would apply."""
    body = b'{"project":"shop","target":"dev","request":{"args":["build"]}}'
    for reply in ("dbt.runs.shop.prod", "$KV.dbt_state.run.x", "dbt.events.x"):
        await served.link.client.publish("dbt.control.list", b"", reply=reply)
    accepted = await served.link.request("dbt.control.submit", body)
    assert b"run_accepted" in accepted.data
    assert isinstance((await next_ends(served))[0], RunFinished)
    for stream in ("DBT_RUNS", "DBT_EVENTS", "KV_dbt_state"):
        info = await served.link.js.stream_info(stream, subjects_filter=">")
        subjects = set(info.state.subjects or {})
        assert not subjects & {"dbt.runs.shop.prod", "$KV.dbt_state.run.x", "dbt.events.x"}
