"""What waits behind a run that is under way, and says what it wants: `on_busy`."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dbtstream.config import Config, NatsConfig, StreamsConfig
from dbtstream.consumer import RequestConsumer
from dbtstream.events import (
    AnyEvent,
    NodeFinished,
    NodeStarted,
    RunCancel,
    RunFinished,
    RunRejected,
    RunStarted,
)
from dbtstream.messages import OnBusy, RunView
from dbtstream.nats_link import NatsLink
from dbtstream.statuses import RunStatus
from dbtstream.store import Store
from dbtstream.stored_message import stored_message
from dbtstream.streams import ensure_streams
from dbtstream.subjects import DEAD_STREAM, H_RUN_ID, RUNS_STREAM, new_run_id
from tests.daemons import Served, daemon_config, serving
from tests.guarantees import check_run

SUBJECT = "dbt.runs.shop.dev"

UNTIL_TOLD = """
    go = %r
    start = start_line()
    cancelled = threading.Event()
    threading.Thread(target=lambda: (control_line(), cancelled.set()), daemon=True).start()
    hello()
    plan(model("orders"))
    started("orders")
    while not os.path.exists(go) and not cancelled.wait(0.005):
        pass
    if cancelled.is_set():
        send("cancelling", by="control")
        finished("orders", "error", message="INTERRUPT Error: Interrupted!")
        result(2, [], interrupted=True, error={"error_class": "KeyboardInterrupt", "message": ""})
    else:
        finished("orders")
        result(0, [("orders", "success")])
"""
"""Builds until the test has made a file, or until it is cancelled."""


class Go:
    """Said, all dbt ends well."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def say(self) -> None:
        self.path.touch()


@pytest.fixture
def go(tmp_path: Path) -> Go:
    return Go(tmp_path / "go")


@pytest.fixture
async def served(tmp_path: Path, nats_config: NatsConfig, go: Go) -> AsyncIterator[Served]:
    async with serving(daemon_config(tmp_path, nats_config, UNTIL_TOLD % str(go.path))) as served:
        yield served


async def submitted(served: Served, request: dict[str, Any]) -> None:
    """Through the control service."""
    await served.client.submit(
        "shop", request["args"], target="dev", on_busy=OnBusy(request["on_busy"])
    )


async def published(served: Served, request: dict[str, Any]) -> None:
    """As `nats pub` does it."""
    await served.publish(SUBJECT, json.dumps(request).encode())


Ask = Callable[[Served, dict[str, Any]], Awaitable[None]]
both_ways = pytest.mark.parametrize("ask", [submitted, published])


async def first(served: Served, kind: type[AnyEvent], run_id: str | None = None) -> AnyEvent:
    """The first event of a kind, of one run or of any."""
    async with asyncio.timeout(60):
        async for event in served.client.events(run_id=run_id, since="all"):
            if isinstance(event, kind):
                return event
    raise AssertionError(f"the run ended without {kind.__name__}")


async def under_way(served: Served) -> str:
    """A run that is building, and goes on until the test has said so."""
    run = await served.client.submit("shop", ["build"], target="dev")
    await first(served, NodeStarted, run.run_id)
    return run.run_id


async def rejections(served: Served, count: int) -> list[RunRejected]:
    found: list[RunRejected] = []
    async with asyncio.timeout(60):
        async for event in served.client.events(family="run", since="all"):
            if isinstance(event, RunRejected):
                found.append(event)
                if len(found) == count:
                    return found
    raise AssertionError("unreachable: it is followed")


async def statuses(served: Served) -> dict[str, RunStatus]:
    return {view.run_id: view.status for view in (await served.client.list()).runs}


async def whole_log(served: Served) -> list[AnyEvent]:
    """All that is stored, of all runs."""
    return [event async for event in served.client.events(since="all", follow=False)]


def order_of_starts(events: list[AnyEvent]) -> list[str]:
    return [event.run_id for event in events if isinstance(event, RunStarted)]


async def ended_well(served: Served, *run_ids: str) -> None:
    for run_id in run_ids:
        events = await served.events(run_id)
        check_run(events)
        assert isinstance(events[-1], RunFinished)
        assert events[-1].status is RunStatus.SUCCESS


@both_ways
async def test_skip_is_rejected_while_a_run_is_under_way(served: Served, go: Go, ask: Ask) -> None:
    """It is told so at once, is in DBT_DEAD, and is gone from the queue and from `ps`."""
    current = await under_way(served)
    await ask(served, {"args": ["build"], "on_busy": "skip"})
    (rejected,) = await rejections(served, 1)
    async with asyncio.timeout(30):
        while (await served.link.js.stream_info(RUNS_STREAM)).state.messages != 1:
            pass
    listed = await served.client.list(active=True)
    letters = await served.dead_letters()
    view = await served.client.get(rejected.run_id)
    go.say()
    await ended_well(served, current)
    await served.queue_empty()

    assert (rejected.code, rejected.field) == ("busy", "on_busy")
    assert current in rejected.message
    assert [run.run_id for run in listed.runs] == [current]
    assert listed.waiting == {}
    ((subject, headers, body),) = letters
    assert subject == "dbt.dead.shop.dev"
    assert headers["dbtstream-code"] == "busy"
    assert headers["dbtstream-run-id"] == rejected.run_id
    assert json.loads(body)["on_busy"] == "skip"
    assert (view.status, view.exit_code) == (RunStatus.ERROR, 2)
    check_run(await served.events(rejected.run_id))
    assert order_of_starts(await whole_log(served)) == [current]


@both_ways
async def test_skip_runs_when_nothing_else_does(served: Served, go: Go, ask: Ask) -> None:
    go.say()
    await ask(served, {"args": ["build"], "on_busy": "skip"})
    finished = await first(served, RunFinished)
    await ended_well(served, finished.run_id)
    assert (await served.link.js.stream_info(DEAD_STREAM)).state.messages == 0


@both_ways
async def test_replace_cancels_the_run_that_is_under_way_and_runs(
    served: Served, go: Go, ask: Ask
) -> None:
    current = await under_way(served)
    await ask(served, {"args": ["build"], "on_busy": "replace"})
    events = await served.events(current)
    go.say()
    await served.queue_empty()
    starts = order_of_starts(await whole_log(served))

    check_run(events)
    verdict = events[-1]
    assert isinstance(verdict, RunFinished)
    assert verdict.status is RunStatus.CANCELLED
    requested = next(event for event in events if isinstance(event, RunCancel))
    assert (requested.step, requested.by) == ("requested", "on_busy")
    assert len(starts) == 2
    assert requested.reason == f"replaced by run {starts[1]}"
    await ended_well(served, starts[1])


@both_ways
async def test_of_equal_requests_that_wait_and_coalesce_one_runs(
    served: Served, go: Go, ask: Ask
) -> None:
    """The others are rejected and name it; one that asks for something else is not touched."""
    current = await under_way(served)
    same = {"args": ["build", "--select", "orders"], "on_busy": "coalesce"}
    for request in (same, same, {"args": ["test"], "on_busy": "coalesce"}, same):
        await ask(served, request)
    rejected = await rejections(served, 2)
    go.say()
    await served.queue_empty()
    starts = order_of_starts(await whole_log(served))

    assert {event.code for event in rejected} == {"duplicate"}
    assert len(starts) == 3
    assert starts[0] == current
    assert all(f"run {starts[1]} " in event.message for event in rejected)
    await ended_well(served, *starts)
    args = [event.args for event in await whole_log(served) if isinstance(event, RunStarted)]
    assert args == [["build"], ["build", "--select", "orders"], ["test"]]
    assert {headers["dbtstream-code"] for _, headers, _ in await served.dead_letters()} == {
        "duplicate"
    }


async def test_coalesce_waits_behind_an_equal_run_that_has_begun(served: Served, go: Go) -> None:
    """What that one has read already may have changed since."""
    current = await under_way(served)
    waiting = await served.client.submit("shop", ["build"], target="dev", on_busy=OnBusy.COALESCE)
    marker = await served.client.submit("shop", ["build"], target="dev", on_busy=OnBusy.SKIP)
    await first(served, RunRejected, marker.run_id)  # by now, both have been looked at
    go.say()
    await ended_well(served, current, waiting.run_id)


async def test_coalesce_does_not_rely_on_a_run_that_was_cancelled_while_it_waited(
    served: Served, go: Go
) -> None:
    current = await under_way(served)
    wish: dict[str, Any] = {"target": "dev", "on_busy": OnBusy.COALESCE}
    gone = await served.client.submit("shop", ["test"], **wish)
    same = await served.client.submit("shop", ["test"], **wish)
    await first(served, RunRejected, same.run_id)
    await served.client.cancel(gone.run_id)
    await first(served, RunFinished, gone.run_id)
    again = await served.client.submit("shop", ["test"], **wish)
    marker = await served.client.submit("shop", ["build"], target="dev", on_busy=OnBusy.SKIP)
    await first(served, RunRejected, marker.run_id)
    go.say()
    await ended_well(served, current, again.run_id)


async def test_coalesce_does_not_rely_on_a_request_that_may_expire(served: Served, go: Go) -> None:
    current = await under_way(served)
    expires = await served.client.submit(
        "shop", ["test"], target="dev", not_after=datetime.now(UTC)
    )
    waiting = await served.client.submit("shop", ["test"], target="dev", on_busy=OnBusy.COALESCE)
    marker = await served.client.submit("shop", ["build"], target="dev", on_busy=OnBusy.SKIP)
    await first(served, RunRejected, marker.run_id)
    go.say()
    rejected = await first(served, RunRejected, expires.run_id)
    await ended_well(served, current, waiting.run_id)
    assert isinstance(rejected, RunRejected)
    assert rejected.code == "expired"


async def test_queue_waits_for_its_turn(served: Served, go: Go) -> None:
    current = await under_way(served)
    waiting = [
        (await served.client.submit("shop", ["build"], target="dev", on_busy=OnBusy.QUEUE)).run_id
        for _ in range(3)
    ]
    marker = await served.client.submit("shop", ["build"], target="dev", on_busy=OnBusy.SKIP)
    await first(served, RunRejected, marker.run_id)
    assert await statuses(served) == {
        current: RunStatus.RUNNING,
        **dict.fromkeys(waiting, RunStatus.QUEUED),
        marker.run_id: RunStatus.ERROR,
    }
    go.say()
    await ended_well(served, current, *waiting)
    assert order_of_starts(await whole_log(served)) == [current, *waiting]


async def test_a_malformed_request_in_between_hinders_nobody_and_is_rejected_at_its_turn(
    served: Served, go: Go
) -> None:
    current = await under_way(served)
    await served.publish(SUBJECT, b'{"args":')
    await served.publish(SUBJECT, b'{"args":["build"],"on_busy":"jump"}')
    busy = await served.client.submit("shop", ["build"], target="dev", on_busy=OnBusy.SKIP)
    rejected = await first(served, RunRejected, busy.run_id)
    assert isinstance(rejected, RunRejected)
    assert rejected.code == "busy"
    go.say()
    told = await rejections(served, 3)
    await ended_well(served, current)
    await served.queue_empty()
    assert [event.code for event in told] == ["busy", "bad_message", "bad_message"]
    assert len(await served.dead_letters()) == 3


async def test_other_targets_are_not_busy(served: Served, go: Go) -> None:
    current = await under_way(served)
    for wish in (OnBusy.SKIP, OnBusy.REPLACE, OnBusy.COALESCE):
        other = await served.client.submit("shop", ["build"], target="prod", on_busy=wish)
        await first(served, NodeStarted, other.run_id)
        await served.client.cancel(other.run_id)
        await first(served, NodeFinished, other.run_id)
    go.say()
    await ended_well(served, current)


async def test_a_rejection_that_a_worker_died_over_is_told_all_the_same(
    tmp_path: Path, link: NatsLink, nats_config: NatsConfig
) -> None:
    """The run's state says so already; the event, the dead letter and the queue did not yet."""
    await ensure_streams(link, StreamsConfig())
    run_id, now = new_run_id(datetime.now(UTC)), datetime.now(UTC)
    ack = await link.publish(SUBJECT, b'{"args":["build"],"on_busy":"skip"}', {H_RUN_ID: run_id})
    await Store(link).create_run(
        RunView(
            run_id=run_id,
            project="shop",
            target="dev",
            status=RunStatus.ERROR,
            request_seq=ack.seq,
            queued_at=now,
            finished_at=now,
            error="busy: run 1 is under way",
            exit_code=2,
        )
    )
    async with serving(daemon_config(tmp_path, nats_config, "sys.exit(1)")) as served:
        rejected = await first(served, RunRejected, run_id)
        await served.queue_empty()
        letters = await served.dead_letters()
    assert isinstance(rejected, RunRejected)
    assert (rejected.code, rejected.message) == ("busy", "run 1 is under way")
    assert [headers["dbtstream-run-id"] for _, headers, _ in letters] == [run_id]


async def test_a_delivered_request_and_the_same_one_read_from_the_stream_have_one_run_id(
    link: NatsLink, nats_config: NatsConfig
) -> None:
    """Two clients' ways to round the server's nanoseconds would give two."""
    await ensure_streams(link, StreamsConfig())
    consumer = RequestConsumer(link, Config(nats=nats_config), SUBJECT)
    for _ in range(20):
        await link.publish(SUBJECT, b"{}")
        delivered = await consumer.next()
        assert delivered is not None
        read = await stored_message(link, RUNS_STREAM, delivered.stream_seq)
        assert read is not None
        assert read.stored_at == delivered.stored_at
        await delivered.ack()
    await consumer.close()
