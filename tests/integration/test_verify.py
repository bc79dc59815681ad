"""`dbtstream verify` on real runs: it agrees with them, and names each thing that was changed."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dbtstream.config import NatsConfig
from dbtstream.errors import RunNotFound
from dbtstream.events import (
    AnyEvent,
    NodeFinished,
    RunFinished,
    RunRejected,
    RunStarted,
    encode_event,
)
from dbtstream.kv_bucket import Bucket
from dbtstream.statuses import NodeStatus, RunStatus
from dbtstream.store import Store
from dbtstream.streams import ARTIFACTS_BUCKET
from dbtstream.subjects import (
    EVENTS_STREAM,
    STATE_BUCKET,
    event_headers,
    event_subject,
    new_run_id,
    node_key,
    run_key,
)
from dbtstream.verification import Difference
from dbtstream.verify_run import NotEnded, Unreadable, Verification
from tests.daemons import Served, daemon_config, serving
from tests.scripted_child import GOOD_RUN

ORDERS = "model.shop.orders"
CUSTOMERS = "model.shop.customers"


@pytest.fixture
async def served(tmp_path: Path, nats_config: NatsConfig) -> AsyncIterator[Served]:
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN)) as served:
        yield served


async def good_run(served: Served) -> list[AnyEvent]:
    """A run of which verify finds nothing; its events."""
    events = await served.run()
    found = await served.client.verify(events[0].run_id)
    assert found.differences == []
    return events


async def differences(served: Served, run_id: str) -> list[Difference]:
    """What verify finds in what a test has spoilt: that will not come right by waiting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dbtstream.verify_run.BEHIND_S", 0.0)
        found: Verification = await served.client.verify(run_id)
    assert found.agrees == (not found.differences)
    return found.differences


def ends(events: list[AnyEvent]) -> dict[str, NodeFinished]:
    return {event.node.unique_id: event for event in events if isinstance(event, NodeFinished)}


async def publish(served: Served, event: AnyEvent) -> None:
    await served.publish(event_subject(event), encode_event(event), **event_headers(event))


async def overwrite_run(served: Served, run_id: str, **facts: Any) -> None:
    known = await Store(served.link).get_run(run_id)
    assert known is not None
    await Store(served.link).update_run(msgspec.structs.replace(known[0], **facts), known[1])


async def store_results(served: Served, run_id: str, results: dict[str, str], **more: Any) -> None:
    """As another client of the Object Store would."""
    document = {
        "metadata": more,
        "results": [{"unique_id": name, "status": word} for name, word in results.items()],
    }
    objects = await served.link.js.object_store(ARTIFACTS_BUCKET)
    await objects.put(f"{run_id}/run_results.json", json.dumps(document).encode())


# -- what agrees -----------------------------------------------------------------------------


async def test_a_run_that_just_ended_agrees_with_its_state_and_its_nodes(served: Served) -> None:
    """Also at once, when its states are still being written."""
    events = await served.run()
    found = await served.client.verify(events[0].run_id)
    assert found == Verification(
        run_id=events[0].run_id,
        agrees=True,
        events=len(events),
        nodes=2,
        run_results="not stored",
        differences=[],
    )


async def test_a_run_agrees_after_a_later_one_has_overwritten_its_nodes(served: Served) -> None:
    first = await good_run(served)
    second = await good_run(served)
    for events in (first, second):
        assert await differences(served, events[0].run_id) == []


async def test_a_rejected_request_agrees_though_it_has_no_state(served: Served) -> None:
    await served.publish("dbt.runs.shop.dev", b"no json")
    async with asyncio.timeout(30):
        async for event in served.client.events(family="run", since="all"):
            if isinstance(event, RunRejected):
                break
    found = await served.client.verify(event.run_id)
    assert (found.agrees, found.events, found.nodes) == (True, 1, 0)


async def test_a_cancelled_run_agrees(tmp_path: Path, nats_config: NatsConfig) -> None:
    body = """
        start_line()
        hello()
        plan(model("orders"), model("customers", "orders"))
        started("orders")
        control_line()
        send("cancelling", by="control")
        finished("orders", "error", message="INTERRUPT Error: Interrupted!")
        result(2, [], interrupted=True, error={"error_class": "KeyboardInterrupt", "message": ""})
    """
    async with serving(daemon_config(tmp_path, nats_config, body)) as served:
        accepted = await served.client.submit("shop", ["build"], target="dev")
        async with asyncio.timeout(30):
            async for event in served.client.events(run_id=accepted.run_id):
                if isinstance(event, RunStarted):
                    with pytest.raises(NotEnded, match=r"it is (running|starting); verify it then"):
                        await served.client.verify(accepted.run_id)
                    await served.client.cancel(accepted.run_id)
        assert (await served.client.verify(accepted.run_id)).differences == []


async def test_a_run_of_which_nothing_is_stored_is_not_found(served: Served) -> None:
    with pytest.raises(RunNotFound):
        await served.client.verify(new_run_id(datetime.now(UTC)))


# -- what differs ----------------------------------------------------------------------------


async def test_an_event_after_the_end_is_found(served: Served) -> None:
    events = await good_run(served)
    late = msgspec.structs.replace(
        ends(events)[ORDERS],
        seq=events[-1].seq + 1,
        event_id=f"{events[0].run_id}.1.{events[-1].seq + 1}",
    )
    await publish(served, late)

    found = await differences(served, events[0].run_id)

    assert f"node.finished 1.{late.seq}: place: the events say after the run's end, " in str(
        found[0]
    )
    assert [(d.what, d.field, d.left_says) for d in found[1:2]] == [
        (f"node {ORDERS} in attempt 1", "node.finished", "2 times")
    ]
    assert any(d.right == "the node's KV state" and d.field == "seq" for d in found)


async def test_a_missing_event_is_found(served: Served) -> None:
    """The end of a node, taken out of the stream."""
    events = await good_run(served)
    gone = ends(events)[CUSTOMERS]
    message = await served.link.js.get_last_msg(EVENTS_STREAM, event_subject(gone))
    assert message.seq is not None
    await served.link.js.delete_msg(EVENTS_STREAM, message.seq)

    found = {(d.what, d.field): d for d in await differences(served, events[0].run_id)}

    after = events[gone.seq]
    hole = found.pop((f"{type_of(after)} 1.{after.seq}", "seq"))
    assert (hole.left_says, hole.right_says) == (str(after.seq), str(gone.seq))
    end = found.pop((f"node {CUSTOMERS} in attempt 1", "node.finished"))
    assert (end.left_says, end.right_says) == ("nothing", "once")
    counts = found.pop(("the run", "counts"))
    assert (counts.left, counts.left_says) == ("run.finished", '{"model":{"success":2}}')
    assert counts.right_says == '{"model":{"success":1}}'
    assert not found


def type_of(event: AnyEvent) -> str:
    return str(event.__struct_config__.tag)


async def test_a_second_end_of_a_node_under_an_older_fence_is_found(served: Served) -> None:
    """What a stale worker would leave, were it not shut out."""
    events = await good_run(served)
    run_id, last = events[0].run_id, events[-1]
    assert isinstance(last, RunFinished)
    again = msgspec.structs.replace(
        ends(events)[ORDERS], event_id=f"{run_id}.1.{last.seq}x", fence=last.fence - 1
    )
    await publish(served, again)
    found = {(d.what, d.field) for d in await differences(served, run_id)}
    event = f"node.finished 1.{again.seq}"
    assert {(event, "event_id"), (event, "fence"), (event, "seq"), (event, "place")} <= found


async def test_a_node_state_that_says_something_else_is_found(served: Served) -> None:
    events = await good_run(served)
    state = await Store(served.link).get_node("shop", "dev", ORDERS)
    assert state is not None
    bucket = Bucket(served.link, STATE_BUCKET, retry_for_s=10)
    wrong = msgspec.structs.replace(state, status=NodeStatus.ERROR, seq=99)
    await bucket.write(node_key("shop", "dev", ORDERS), msgspec.json.encode(wrong), None)

    found = await differences(served, events[0].run_id)

    seq = ends(events)[ORDERS].seq
    assert [str(difference) for difference in found] == [
        f"node {ORDERS}: status: the events say success, the node's KV state says error",
        f"node {ORDERS}: seq: the events say {seq}, the node's KV state says 99",
    ]


async def test_a_node_state_of_an_earlier_run_and_none_at_all_are_found(served: Served) -> None:
    events = await good_run(served)
    run_id = events[0].run_id
    state = await Store(served.link).get_node("shop", "dev", ORDERS)
    assert state is not None
    assert state.finished_at is not None
    bucket = Bucket(served.link, STATE_BUCKET, retry_for_s=10)
    earlier = msgspec.structs.replace(
        state,
        run_id=(other := new_run_id(datetime.now(UTC))),
        finished_at=state.finished_at - timedelta(hours=1),
    )
    await bucket.write(node_key("shop", "dev", ORDERS), msgspec.json.encode(earlier), None)
    value = await bucket.read(node_key("shop", "dev", CUSTOMERS))
    assert value is not None
    await bucket.delete(node_key("shop", "dev", CUSTOMERS), value.revision)

    found = await differences(served, run_id)

    assert [(d.what, d.field, d.left_says, d.right_says) for d in found] == [
        (f"node {ORDERS}", "run_id", run_id, other),
        (f"node {CUSTOMERS}", "state", "success", "nothing"),
    ]


async def test_a_run_state_that_says_something_else_is_found(served: Served) -> None:
    events = await good_run(served)
    run_id, last = events[0].run_id, events[-1]
    await overwrite_run(
        served,
        run_id,
        status=RunStatus.FAILURE,
        exit_code=1,
        counts={"model": {"success": 1, "error": 1}},
        last_seq=last.seq - 1,
        attempt=2,
        finished_at=None,
    )

    found = await differences(served, run_id)

    assert {d.field: (d.what, d.right, d.right_says) for d in found} == {
        "status": ("the run", "the run's KV state", "failure"),
        "exit_code": ("the run", "the run's KV state", "1"),
        "counts": ("the run", "the run's KV state", '{"model":{"success":1,"error":1}}'),
        "last_seq": ("the run", "the run's KV state", str(last.seq - 1)),
        "attempt": ("the run", "the run's KV state", "2"),
        "finished_at": ("the run", "the run's KV state", "nothing"),
    }


async def test_a_run_that_ended_in_one_place_only_is_found(served: Served) -> None:
    events = await good_run(served)
    run_id = events[0].run_id
    await overwrite_run(served, run_id, status=RunStatus.RUNNING)
    (found,) = await differences(served, run_id)
    assert (found.field, found.left_says, found.right_says) == ("status", "success", "running")

    bucket = Bucket(served.link, STATE_BUCKET, retry_for_s=10)
    value = await bucket.read(run_key(run_id))
    assert value is not None
    await bucket.delete(run_key(run_id), value.revision)
    (found,) = await differences(served, run_id)
    assert (found.field, found.right_says) == ("state", "nothing")


async def test_dbts_own_results_are_compared_where_they_are_stored(served: Served) -> None:
    events = await good_run(served)
    run_id = events[0].run_id
    await store_results(served, run_id, {ORDERS: "success", CUSTOMERS: "success"})
    found = await served.client.verify(run_id)
    assert (found.agrees, found.run_results) == (True, "compared")

    stranger = "model.shop.stranger"
    await store_results(served, run_id, {ORDERS: "error", stranger: "success"})
    assert [str(difference) for difference in await differences(served, run_id)] == [
        f"node {ORDERS}: status: the events say success, run_results.json says error",
        f"node {stranger}: status: the events say nothing, run_results.json says success",
        f"node {CUSTOMERS}: status: the events say success, run_results.json says nothing",
    ]


async def test_results_that_the_state_names_and_nobody_finds_are_told(served: Served) -> None:
    events = await good_run(served)
    run_id = events[0].run_id
    name = f"{run_id}/run_results.json"
    await overwrite_run(served, run_id, artifacts={"run_results": name})
    (found,) = await differences(served, run_id)
    assert (found.field, found.left_says, found.right) == ("artifacts", name, "the Object Store")


async def test_results_that_are_none_are_an_error_that_names_them(served: Served) -> None:
    events = await good_run(served)
    objects = await served.link.js.object_store(ARTIFACTS_BUCKET)
    await objects.put(f"{events[0].run_id}/run_results.json", b"{}")
    with pytest.raises(Unreadable, match=r"run_results.json in the Object Store cannot be read"):
        await served.client.verify(events[0].run_id)


# -- the command -----------------------------------------------------------------------------


async def verify(nats: NatsConfig, *words: str) -> tuple[int | None, str, str]:
    """Exit code, stdout and stderr of `dbtstream verify`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from dbtstream.cli import main; main()"),
        *("--nats", nats.servers[0], "verify", *words),
        cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        output, problems = await process.communicate()
    return process.returncode, output.decode(), problems.decode()


async def test_the_command_says_each_difference_in_a_line_and_needs_no_daemon(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN)) as served:
        events = await good_run(served)
        run_id = events[0].run_id
        link_config = served.config.nats
    verdict = f"agrees: {len(events)} events, 2 nodes, run_results.json not stored\n"
    assert await verify(link_config, "last") == (0, verdict, "")
    assert await verify(link_config, run_id[-12:]) == (0, verdict, "")

    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN)) as served:
        await overwrite_run(served, run_id, exit_code=7)
    code, out, err = await verify(link_config, run_id)
    assert (code, err) == (1, "")
    assert out.splitlines() == [
        "the run: exit_code: the events say 0, the run's KV state says 7",
        f"1 difference: {len(events)} events, 2 nodes, run_results.json not stored",
    ]
    code, out, err = await verify(link_config, run_id, "--json")
    assert code == 1
    assert json.loads(out)["differences"][0]["right_says"] == "7"

    code, out, err = await verify(link_config, new_run_id(datetime.now(UTC)))
    assert (code, out) == (1, "")
    assert err.startswith("dbtstream: no run ")
