"""Run, request and node states on a real server."""

import asyncio
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from dbtstream.config import StreamsConfig
from dbtstream.embedded import NatsServer
from dbtstream.errors import NatsUnavailable
from dbtstream.events import NodeBlock, NodeFinished
from dbtstream.messages import RunView
from dbtstream.nats_link import NatsLink
from dbtstream.statuses import NodeStatus, RunStatus
from dbtstream.store import NodeState, NodeStates, RevisionConflict, Store
from dbtstream.streams import ensure_streams
from dbtstream.subjects import STATE_BUCKET, new_run_id, node_key, run_key
from dbtstream.write_behind import BATCH_KEYS

AT = datetime(2025, 3, 1, tzinfo=UTC)


@pytest.fixture
async def store(link: NatsLink) -> Store:
    await ensure_streams(link, StreamsConfig())
    return Store(link)


def view(n: int = 0, **more: object) -> RunView:
    """The n-th run; later ones are newer."""
    run = RunView(
        run_id=new_run_id(AT + timedelta(seconds=n)),
        project="shop",
        target="prod",
        status=RunStatus.QUEUED,
    )
    return msgspec.structs.replace(run, **more)


def finished(
    name: str, status: NodeStatus = NodeStatus.SUCCESS, run_id: str = "r1", seq: int = 1
) -> NodeFinished:
    return NodeFinished(
        event_id=f"{run_id}.1.{seq}",
        time=AT,
        seq=seq,
        project="shop",
        target="prod",
        run_id=run_id,
        attempt=1,
        fence=1,
        worker="w",
        node=NodeBlock(unique_id=f"model.shop.{name}", resource_type="model", name=name),
        status=status,
        message="m" * 600,
    )


async def test_a_run_is_created_read_and_moved_on(store: Store) -> None:
    run = view()
    revision = await store.create_run(run)
    assert await store.get_run(run.run_id) == (run, revision)
    moved = msgspec.structs.replace(run, status=RunStatus.STARTING)
    assert await store.update_run(moved, revision) > revision
    found = await store.get_run(run.run_id)
    assert found is not None
    assert found[0] == moved


async def test_an_unknown_run_is_none(store: Store) -> None:
    assert await store.get_run(view().run_id) is None


async def test_two_writers_of_one_revision_cannot_both_win(store: Store) -> None:
    run = view()
    revision = await store.create_run(run)
    await store.update_run(msgspec.structs.replace(run, worker="a"), revision)
    with pytest.raises(RevisionConflict) as caught:
        await store.update_run(msgspec.structs.replace(run, worker="b"), revision)
    assert caught.value.revision == revision
    with pytest.raises(RevisionConflict):
        await store.create_run(msgspec.structs.replace(run, worker="c"))


async def test_our_own_write_whose_answer_was_lost_is_no_conflict(store: Store) -> None:
    run = view()
    revision = await store.create_run(run)
    assert await store.create_run(run) == revision
    moved = msgspec.structs.replace(run, worker="a")
    second = await store.update_run(moved, revision)
    assert await store.update_run(moved, revision) == second


async def test_a_deleted_run_is_none_and_may_be_created_again(store: Store, link: NatsLink) -> None:
    run = view()
    await store.create_run(run)
    await (await link.js.key_value(STATE_BUCKET)).purge(run_key(run.run_id))
    assert await store.get_run(run.run_id) is None
    assert await store.list_runs() == []
    revision = await store.create_run(run)
    assert await store.get_run(run.run_id) == (run, revision)


async def test_the_list_is_newest_first_filtered_and_limited(store: Store) -> None:
    assert await store.list_runs() == []
    runs = [
        view(n, target="dev" if n % 2 else "prod", project="lab" if n == 4 else "shop")
        for n in range(6)
    ]
    runs[0] = msgspec.structs.replace(runs[0], status=RunStatus.SUCCESS)
    for run in reversed(runs):
        await store.create_run(run)
    assert await store.list_runs() == runs[::-1]
    assert await store.list_runs(limit=2) == [runs[5], runs[4]]
    assert await store.list_runs(project="shop", target="prod") == [runs[2], runs[0]]
    assert await store.list_runs(project="shop", target="prod", active=True) == [runs[2]]


async def test_the_list_looks_through_many_pages_for_a_rare_run(store: Store) -> None:
    rare = view(0, project="rare")
    await store.create_run(rare)
    for start in range(1, 251, 50):
        await asyncio.gather(*(store.create_run(view(n)) for n in range(start, start + 50)))
    assert await store.list_runs(project="rare") == [rare]
    assert len(await store.list_runs(limit=500)) == 251


async def test_a_request_id_belongs_to_the_run_that_had_it_first(store: Store) -> None:
    odd = "order 7 / ü.*>"
    answers = await asyncio.gather(
        *(store.remember_request("shop", "prod", odd, f"run-{n}") for n in range(8))
    )
    assert len(set(answers)) == 1
    assert await store.remember_request("shop", "prod", odd, "late") == answers[0]
    assert await store.remember_request("shop", "dev", odd, "other") == "other"


async def test_node_states_are_written_behind_the_runs_back(store: Store) -> None:
    states = NodeStates(store)
    for n in range(30):
        states.put(finished(f"m{n}", seq=n))
    states.close()
    async with asyncio.timeout(60):
        await states.run()
    assert await store.get_node("shop", "prod", "model.shop.m29") == NodeState(
        unique_id="model.shop.m29",
        status=NodeStatus.SUCCESS,
        run_id="r1",
        attempt=1,
        seq=29,
        fence=1,
        finished_at=AT,
        resource_type="model",
        name="m29",
        message="m" * 500,
    )
    assert (states.counts["received"], states.counts["sent"]) == (30, 30)


async def test_only_the_newest_state_of_a_node_is_written_and_it_knows_the_run_before(
    store: Store, link: NatsLink
) -> None:
    async def run(*events: NodeFinished) -> NodeState:
        states = NodeStates(store)
        for event in events:
            states.put(event)
        states.close()
        async with asyncio.timeout(60):
            await states.run()
        state = await store.get_node("shop", "prod", "model.shop.m")
        assert state is not None
        return state

    first = await run(finished("m", NodeStatus.ERROR, "r1", 1))
    assert (first.status, first.previous_status) == (NodeStatus.ERROR, None)
    events = [finished("m", NodeStatus.FAIL, "r2", 1), finished("m", NodeStatus.SUCCESS, "r2", 2)]
    second = await run(*events)
    assert (second.status, second.previous_status) == (NodeStatus.SUCCESS, NodeStatus.ERROR)
    again = await run(finished("m", NodeStatus.WARN, "r2", 3))
    assert (again.status, again.previous_status) == (NodeStatus.WARN, NodeStatus.ERROR)
    key = node_key("shop", "prod", "model.shop.m")
    kv = await link.js.key_value(STATE_BUCKET)
    assert (await kv.get(key)).revision == 3  # three writes for four events


async def test_what_a_frozen_worker_knew_does_not_replace_a_later_end(store: Store) -> None:
    """Its fence is lower, though its seq may be higher by what it has never published."""

    def end(run_id: str, fence: int, seq: int, status: NodeStatus) -> NodeFinished:
        at = AT + timedelta(seconds=seq)
        event = finished("m", status, run_id, seq)
        return msgspec.structs.replace(event, fence=fence, finished_at=at)

    later = [end("r2", 7, 20, NodeStatus.SUCCESS), end("r2", 9, 30, NodeStatus.FAIL)]
    stale = [later[0], end("r2", 7, 35, NodeStatus.LOST), end("r1", 5, 10, NodeStatus.ERROR)]
    for event in [*later, *stale]:
        await store.put_nodes([event])
    state = await store.get_node("shop", "prod", "model.shop.m")
    assert state is not None
    assert (state.run_id, state.seq, state.status) == ("r2", 30, NodeStatus.FAIL)
    # The streams were made anew, and with them the fences.
    await store.put_nodes([end("r3", 1, 40, NodeStatus.WARN)])
    state = await store.get_node("shop", "prod", "model.shop.m")
    assert state is not None
    assert (state.run_id, state.previous_status) == ("r3", NodeStatus.FAIL)


async def test_who_asks_is_told_when_the_states_of_a_target_are_written(store: Store) -> None:
    states = NodeStates(store)
    async with asyncio.timeout(60):
        await states.written("shop", "prod")  # nothing was put
    writing = asyncio.create_task(states.run())
    for n in range(BATCH_KEYS + 50):
        states.put(finished(f"m{n}", seq=n))
    async with asyncio.timeout(60):
        await states.written("shop", "prod")
    for n in (0, BATCH_KEYS + 49):
        assert await store.get_node("shop", "prod", f"model.shop.m{n}") is not None
    assert states.counts["sent"] == BATCH_KEYS + 50
    states.close()
    await writing


async def test_many_states_of_several_targets_are_written_in_batches(store: Store) -> None:
    """The same unique_id in two targets is two nodes."""
    states = NodeStates(store)
    for n in range(450):
        states.put(finished(f"m{n}", seq=n))
        states.put(msgspec.structs.replace(finished(f"m{n}", NodeStatus.ERROR), target="dev"))
    states.close()
    async with asyncio.timeout(60):
        await states.run()
    for n in (0, 199, 200, 449):
        prod = await store.get_node("shop", "prod", f"model.shop.m{n}")
        dev = await store.get_node("shop", "dev", f"model.shop.m{n}")
        assert prod is not None
        assert dev is not None
        assert (prod.status, prod.seq, dev.status) == (NodeStatus.SUCCESS, n, NodeStatus.ERROR)
    assert states.counts["sent"] == 900


async def test_states_survive_a_restart_of_the_server(
    store: Store, nats_server: NatsServer
) -> None:
    run = view()
    states = NodeStates(store)
    task = asyncio.create_task(states.run())
    await nats_server.kill()
    create = asyncio.create_task(store.create_run(run))
    for n in range(20):
        states.put(finished(f"m{n}"))
    states.close()
    await nats_server.restart()
    async with asyncio.timeout(60):
        revision = await create
        await task
    assert await store.get_run(run.run_id) == (run, revision)
    assert await store.get_node("shop", "prod", "model.shop.m19") is not None


async def test_an_outage_beyond_the_limit_is_told(
    store: Store, link: NatsLink, nats_server: NatsServer
) -> None:
    await nats_server.kill()
    with pytest.raises(NatsUnavailable, match=r"127\.0\.0\.1"):
        await Store(link, retry_for_s=0.3).get_run(view().run_id)
