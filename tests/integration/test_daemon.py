"""Runs from request to verdict, on a real nats-server, with children that behave as scripted."""

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dbtstream.client import Client
from dbtstream.config import NatsConfig
from dbtstream.daemon import Daemon
from dbtstream.embedded import NatsServer
from dbtstream.errors import ConfigError
from dbtstream.events import (
    AnyEvent,
    NodeFinished,
    NodeStarted,
    RunCancel,
    RunFinished,
    RunProgress,
    RunQueued,
    RunStarted,
    decode_event,
)
from dbtstream.statuses import NodeStatus, Reason, RunStatus
from dbtstream.store import Store
from dbtstream.trace import trace_id_of
from tests.daemons import Served, daemon_config, serving
from tests.guarantees import check_run
from tests.scripted_child import GOOD_RUN

WAITS_FOR_CANCEL = """
    start_line()
    hello()
    plan(model("orders"), model("customers", "orders"))
    started("orders")
    control_line()
    send("cancelling", by="control")
    finished("orders", "error", message="INTERRUPT Error: Interrupted!")
    result(2, [], interrupted=True, error={"error_class": "KeyboardInterrupt", "message": ""})
"""

DEAF = """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    start_line()
    hello()
    plan(model("orders"), model("customers", "orders"))
    started("orders")
    while True:
        signal.pause()
"""


@asynccontextmanager
async def served_by(
    tmp_path: Path, nats: NatsConfig, body: str, **config: Any
) -> AsyncIterator[Served]:
    async with serving(daemon_config(tmp_path, nats, body, **config)) as served:
        yield served


async def first(served: Served, run_id: str, kind: type[AnyEvent]) -> AnyEvent:
    """The first event of a kind, as soon as it is stored."""
    async with asyncio.timeout(30):
        async for event in served.client.events(run_id=run_id):
            if isinstance(event, kind):
                return event
    raise AssertionError(f"the run ended without {kind.__name__}")


def verdict(events: list[AnyEvent]) -> RunFinished:
    assert isinstance(events[-1], RunFinished)
    return events[-1]


def ends(events: list[AnyEvent]) -> dict[str, tuple[NodeStatus, Reason | None]]:
    return {
        event.node.name: (event.status, event.reason)
        for event in events
        if isinstance(event, NodeFinished)
    }


async def test_a_run_is_told_from_queue_to_verdict(tmp_path: Path, nats_config: NatsConfig) -> None:
    async with served_by(tmp_path, nats_config, GOOD_RUN) as served:
        events = await served.run(labels={"team": "core"}, requested_by="ada", reason="nightly")
        run_id = events[0].run_id
        await served.queue_empty()
        view = await served.client.get(run_id)
        node = None
        async with asyncio.timeout(30):
            while node is None:  # written behind the run's back
                node = await Store(served.link).get_node("shop", "dev", "model.shop.orders")

    check_run(events)
    assert [type(event).__name__ for event in events if not isinstance(event, RunProgress)] == [
        "RunQueued",
        "RunLeased",
        "RunStarted",
        "RunPlanned",
        "NodeStarted",
        "NodeFinished",
        "NodeStarted",
        "NodeFinished",
        "RunFinished",
    ]
    assert isinstance(events[0], RunQueued)
    assert (events[0].requested_by, events[0].reason) == ("ada", "nightly")
    assert {tuple(event.labels.items()) for event in events} == {(("team", "core"),)}
    assert (view.status, view.exit_code, view.attempt) == (RunStatus.SUCCESS, 0, 1)
    assert view.last_seq == events[-1].seq
    assert (node.status, node.run_id) == (NodeStatus.SUCCESS, run_id)


async def test_headers_say_what_the_payload_says(tmp_path: Path, nats_config: NatsConfig) -> None:
    """CloudEvents, the trace and our own: a subscriber may filter without decoding."""
    async with served_by(tmp_path, nats_config, GOOD_RUN) as served:
        live = await served.link.client.subscribe("dbt.live.shop.dev.node.model.orders.success")
        await served.link.client.flush()
        events = await served.run()
        message = await live.next_msg(timeout=30)

    (finished,) = (e for e in events if isinstance(e, NodeFinished) and e.node.name == "orders")
    assert decode_event(message.data) == finished
    headers = message.headers or {}
    assert headers["Nats-Msg-Id"] == headers["ce-id"] == finished.event_id
    assert headers["ce-type"] == "dev.dbtstream.node.finished.v1"
    assert headers["ce-subject"] == "model.shop.orders"
    assert headers["ce-source"] == "/dbtstream/tester"
    assert headers["dbtstream-run-id"] == finished.run_id
    assert headers["dbtstream-seq"] == str(finished.seq)
    assert headers["traceparent"] == f"00-{finished.trace_id}-{finished.span_id}-01"


async def test_the_requesters_trace_goes_through(tmp_path: Path, nats_config: NatsConfig) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    async with served_by(tmp_path, nats_config, GOOD_RUN) as served:
        await served.publish(
            "dbt.runs.shop.dev",
            b'{"args":["build"]}',
            traceparent=f"00-{trace_id}-b7ad6b7169203331-01",
        )
        async for event in served.client.events(family="run", since="all"):
            assert event.trace_id == trace_id
            if isinstance(event, RunFinished):
                break
        untraced = await served.run()
    # client.submit hands on a trace only where one is active
    assert untraced[0].trace_id == trace_id_of(untraced[0].run_id)


async def test_messagepack_where_the_project_asks_for_it(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    project = {"content_type": "application/msgpack"}
    async with served_by(tmp_path, nats_config, GOOD_RUN, project=project) as served:
        live = await served.link.client.subscribe("dbt.live.shop.dev.run.build._.queued")
        await served.link.client.flush()
        check_run(await served.run())
        message = await live.next_msg(timeout=30)
    assert (message.headers or {})["Content-Type"] == "application/msgpack"
    assert msgspec.msgpack.decode(message.data)["type"] == "run.queued"


async def test_requests_of_a_target_run_in_their_order_and_never_together(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    """Each child appends to one file when it begins and when it ends."""
    log = tmp_path / "log"
    body = f"""
        words = start_line()["args"]
        number = words[words.index("--threads") + 1]
        with open({str(log)!r}, "a") as log:
            log.write(f"begin {{number}}\\n")
        hello()
        plan(model("orders"))
        started("orders")
        finished("orders")
        with open({str(log)!r}, "a") as log:
            log.write(f"end {{number}}\\n")
        result(0, [("orders", "success")])
    """
    async with served_by(tmp_path, nats_config, body) as served:
        runs = [
            await served.client.submit("shop", ["build", "--threads", str(i)], target="dev")
            for i in range(8)
        ]
        positions = [run.position for run in runs]
        for run in runs:
            check_run(await served.events(run.run_id))
    lines = log.read_text(encoding="utf-8").splitlines()
    assert lines == [f"{edge} {number}" for number in range(8) for edge in ("begin", "end")]
    assert positions[0] == 0
    assert positions == sorted(positions)


async def test_one_slot_serves_two_targets_one_after_the_other(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    async with served_by(tmp_path, nats_config, GOOD_RUN, slots=1) as served:
        runs = [
            await served.client.submit("shop", ["build"], target=target)
            for target in ("dev", "prod") * 3
        ]
        for run in runs:
            events = await served.events(run.run_id)
            check_run(events)
            assert verdict(events).status is RunStatus.SUCCESS
        await served.queue_empty()


async def test_a_cancel_ends_dbt_and_every_node_is_told(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    async with served_by(tmp_path, nats_config, WAITS_FOR_CANCEL) as served:
        run = await served.client.submit("shop", ["build"], target="dev")
        await first(served, run.run_id, NodeStarted)
        accepted = await served.client.cancel(run.run_id, by="ada", reason="wrong day")
        events = await served.events(run.run_id)
        await served.queue_empty()
        view = await served.client.get(run.run_id)
        again = await served.client.cancel(run.run_id)

    check_run(events)
    assert accepted.status is RunStatus.RUNNING
    assert verdict(events).status is RunStatus.CANCELLED
    assert ends(events) == {
        "orders": (NodeStatus.CANCELLED, Reason.CANCELLED),
        "customers": (NodeStatus.NEVER_STARTED, Reason.CANCELLED),
    }
    steps = [e for e in events if isinstance(e, RunCancel)]
    assert [(e.step, e.by) for e in steps] == [("requested", "ada"), ("interrupting", "ada")]
    assert steps[0].reason == "wrong day"
    assert view.status is again.status is RunStatus.CANCELLED


async def test_a_waiting_run_that_is_cancelled_never_starts(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    async with served_by(tmp_path, nats_config, WAITS_FOR_CANCEL) as served:
        running = await served.client.submit("shop", ["build"], target="dev")
        await first(served, running.run_id, NodeStarted)
        waiting = await served.client.submit("shop", ["build"], target="dev")
        listed = await served.client.list(active=True)
        await served.client.cancel(waiting.run_id, by="ada")
        events = await served.events(waiting.run_id)
        await served.client.cancel(running.run_id)
        check_run(await served.events(running.run_id))
        await served.queue_empty()

    assert waiting.position == 1
    assert {(run.run_id, run.status) for run in listed.runs} == {
        (running.run_id, RunStatus.RUNNING),
        (waiting.run_id, RunStatus.QUEUED),
    }
    check_run(events)
    assert verdict(events).status is RunStatus.CANCELLED
    assert not [event for event in events if isinstance(event, RunStarted)]


async def test_a_child_that_hears_nothing_is_killed_rung_by_rung(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    limits = {"cancel_grace_s": 0.1, "kill_grace_s": 0.1}
    async with served_by(tmp_path, nats_config, DEAF, **limits) as served:
        run = await served.client.submit("shop", ["build"], target="dev")
        await first(served, run.run_id, NodeStarted)
        await served.client.cancel(run.run_id, by="ada")
        events = await served.events(run.run_id)

    check_run(events)
    assert [event.step for event in events if isinstance(event, RunCancel)] == [
        "requested",
        "terminating",
        "killing",
    ]
    assert verdict(events).status is RunStatus.CANCELLED
    assert ends(events) == {
        "orders": (NodeStatus.CANCELLED, Reason.CANCELLED),
        "customers": (NodeStatus.NEVER_STARTED, Reason.CANCELLED),
    }


@pytest.mark.parametrize("limit", ["timeout_s", "silence_timeout_s"])
async def test_a_run_over_its_limit_is_stopped_as_timed_out(
    tmp_path: Path, nats_config: NatsConfig, limit: str
) -> None:
    async with served_by(tmp_path, nats_config, WAITS_FOR_CANCEL) as served:
        timeout_s, silence_timeout_s = (0.5, None) if limit == "timeout_s" else (None, 0.5)
        run = await served.client.submit(
            "shop",
            ["build"],
            target="dev",
            timeout_s=timeout_s,
            silence_timeout_s=silence_timeout_s,
        )
        events = await served.events(run.run_id)

    check_run(events)
    assert verdict(events).status is RunStatus.TIMED_OUT
    assert ends(events)["orders"] == (NodeStatus.CANCELLED, Reason.TIMEOUT)
    (requested,) = (e for e in events if isinstance(e, RunCancel) and e.step == "requested")
    assert requested.by == limit


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('raw(b"Traceback (most recent call last)")', "announced a frame of"),
        ('raw(struct.pack(">I", 7) + b"garbage")', "not a frame"),
        ('raw(pack("node_finish", unique_id="x", status="y")[:9])', "in the middle of a frame"),
        ('print("Segmentation fault"); sys.exit(3)', r"ended without a result \(exit code 3\)"),
        ("sys.exit(0)", r"ended without a result \(exit code 0\)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", r"ended without a result \(signal 9\)"),
        ('sys.stderr.write("x" * 10_000_000); os.abort()', r"\(signal 6\)"),
    ],
)
async def test_a_child_that_breaks_ends_the_run_and_every_node(
    tmp_path: Path, nats_config: NatsConfig, body: str, says: str
) -> None:
    whole = f"""
    start_line()
    hello()
    plan(model("orders"), model("customers", "orders"), model("returns", "customers"))
    started("orders")
    finished("orders")
    started("customers")
    {body}
    """
    async with served_by(tmp_path, nats_config, whole) as served:
        events = await served.run()
        await served.queue_empty()

    check_run(events)
    end = verdict(events)
    assert (end.status, end.exit_code, end.verified) == (RunStatus.ERROR, 2, False)
    assert end.error is not None
    assert re.search(says, end.error.message)
    assert ends(events) == {
        "orders": (NodeStatus.SUCCESS, None),
        "customers": (NodeStatus.LOST, Reason.CHILD_KILLED),
        "returns": (NodeStatus.NEVER_STARTED, Reason.CHILD_KILLED),
    }


async def test_an_interpreter_that_is_missing_is_named_in_the_verdict(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    project = {"python": "/nowhere/python"}
    async with served_by(tmp_path, nats_config, "", project=project) as served:
        events = await served.run()
    check_run(events)
    end = verdict(events)
    assert end.status is RunStatus.ERROR
    assert end.error is not None
    assert "/nowhere/python: No such file" in end.error.message


async def test_nats_may_go_away_in_the_middle_of_a_run(
    tmp_path: Path, nats_server: NatsServer, nats_config: NatsConfig
) -> None:
    """kill -9 of the server while dbt works: dbt ends meanwhile, then all is stored, in order."""
    flag, done = tmp_path / "go", tmp_path / "done"
    body = f"""
        start_line()
        hello()
        nodes = [f"m{{i:03}}" for i in range(300)]
        plan(*map(model, nodes))
        started(nodes[0])
        wait_for({str(flag)!r})
        finished(nodes[0])
        for name in nodes[1:]:
            started(name)
            finished(name)
        result(0, [(name, "success") for name in nodes])
        open({str(done)!r}, "w").close()
    """
    async with served_by(tmp_path, nats_config, body) as served:
        run = await served.client.submit("shop", ["build"], target="dev")
        await first(served, run.run_id, NodeStarted)
        await nats_server.kill()
        flag.touch()
        async with asyncio.timeout(30):
            while not done.exists():
                await asyncio.to_thread(os.sched_yield)
        await nats_server.restart()
        events = await served.events(run.run_id)
        view = await served.client.wait(run.run_id, timeout_s=30)
        await served.queue_empty()

    check_run(events)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert len(ends(events)) == 300
    assert verdict(events) == view


async def test_a_daemon_waits_for_a_nats_that_is_not_there_yet(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with NatsServer.start(tmp_path / "nats") as server:
        await server.kill()
        daemon = Daemon(daemon_config(tmp_path, NatsConfig(servers=(server.url,)), GOOD_RUN))
        running = asyncio.create_task(daemon.run())
        async with asyncio.timeout(30):
            while "waiting for NATS" not in caplog.text:  # noqa: ASYNC110 - a log line has no event
                await asyncio.sleep(0)
        await server.restart()
        await asyncio.wait_for(daemon.ready(), 30)
        daemon.stop()
        await asyncio.wait_for(running, 30)


async def test_a_daemon_that_waits_for_nats_can_be_stopped(tmp_path: Path) -> None:
    daemon = Daemon(daemon_config(tmp_path, NatsConfig(servers=("nats://127.0.0.1:1",)), GOOD_RUN))
    running = asyncio.create_task(daemon.run())
    await asyncio.sleep(0)
    daemon.stop()
    await asyncio.wait_for(running, 30)


async def test_stopping_lets_a_run_finish(tmp_path: Path, nats_config: NatsConfig) -> None:
    flag = tmp_path / "go"
    body = f"""
        start_line()
        hello()
        plan(model("orders"))
        started("orders")
        wait_for({str(flag)!r})
        finished("orders")
        result(0, [("orders", "success")])
    """
    async with served_by(tmp_path, nats_config, body) as served:
        run = await served.client.submit("shop", ["build"], target="dev")
        await first(served, run.run_id, NodeStarted)
        served.daemon.stop()
        queued = await served.client.submit("shop", ["build"], target="dev")
        flag.touch()
        events = await served.events(run.run_id)
        assert queued.position == 1
    check_run(events)
    assert verdict(events).status is RunStatus.SUCCESS


async def test_a_second_stop_cancels_what_runs(tmp_path: Path, nats_config: NatsConfig) -> None:
    config = daemon_config(tmp_path, nats_config, WAITS_FOR_CANCEL)
    async with served_by(tmp_path, nats_config, WAITS_FOR_CANCEL) as served:
        run = await served.client.submit("shop", ["build"], target="dev")
        await first(served, run.run_id, NodeStarted)
        served.daemon.stop()
        served.daemon.stop()
        events = await served.events(run.run_id)
        await served.queue_empty()  # the fixture's own stops would be the third: to leave
    check_run(events)
    assert verdict(events).status is RunStatus.CANCELLED
    assert not list((config.state_dir / "outbox").iterdir())


async def test_a_daemon_that_leaves_in_a_hurry_keeps_the_end_for_its_successor(
    tmp_path: Path, nats_config: NatsConfig, nats_server: NatsServer
) -> None:
    """NATS is away, dbt is deaf, nobody waits: what is known goes out at the next start."""
    config = daemon_config(tmp_path, nats_config, DEAF, ack_wait_s=1.0, heartbeat_s=0.3)
    daemon = Daemon(config)
    running = asyncio.create_task(daemon.run())
    await asyncio.wait_for(daemon.ready(), 30)
    async with Client.connect(config=nats_config) as client:
        run = await client.submit("shop", ["build"], target="dev")
        async for event in client.events(run_id=run.run_id):
            if isinstance(event, NodeStarted):
                break
    await nats_server.kill()
    for _ in range(3):
        daemon.stop()
    await asyncio.wait_for(running, 60)
    await nats_server.restart()

    async with serving(config) as served:
        events = await served.events(run.run_id)
        await served.queue_empty()
        view = await served.client.get(run.run_id)
    check_run(events)
    assert verdict(events).status is view.status is RunStatus.CANCELLED
    assert ends(events)["orders"] == (NodeStatus.CANCELLED, Reason.CANCELLED)


async def test_a_run_that_is_delivered_again_while_its_worker_is_at_it_is_left_alone(
    tmp_path: Path, nats_config: NatsConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """Two workers; the server takes the first one's silence for a death, and is wrong."""
    caplog.set_level("INFO")
    flag = tmp_path / "go"
    body = f"""
        start_line()
        hello()
        plan(model("orders"))
        started("orders")
        wait_for({str(flag)!r})
        finished("orders")
        result(0, [("orders", "success")])
    """
    silent = daemon_config(
        tmp_path, nats_config, body, name="silent", ack_wait_s=1.0, heartbeat_s=0.3
    )
    silent = msgspec.structs.replace(
        silent, worker=msgspec.structs.replace(silent.worker, heartbeat_s=3600.0)
    )
    (tmp_path / "other").mkdir()
    other = daemon_config(
        tmp_path / "other", nats_config, GOOD_RUN, name="other", ack_wait_s=1.0, heartbeat_s=0.3
    )
    async with serving(silent) as served:
        run = await served.client.submit("shop", ["build"], target="dev")
        await first(served, run.run_id, NodeStarted)
        async with serving(other) as second:
            async with asyncio.timeout(30):
                while "waiting for the lease of another worker" not in caplog.text:
                    await second.client.get(run.run_id)
            flag.touch()
            events = await served.events(run.run_id)
            await served.queue_empty()
    check_run(events)
    assert {event.worker for event in events} == {"silent"}
    assert verdict(events).status is RunStatus.SUCCESS


async def test_a_second_daemon_on_one_state_dir_is_refused(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    """It would take the first one's live outboxes for a dead predecessor's."""
    config = daemon_config(tmp_path, nats_config, GOOD_RUN)
    async with serving(config):
        with pytest.raises(ConfigError, match="another daemon works in"):
            await Daemon(config).run()
    async with serving(config) as served:
        check_run(await served.run())


async def test_a_state_dir_that_cannot_be_made_is_named(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    (tmp_path / "file").touch()
    config = daemon_config(
        tmp_path, nats_config, GOOD_RUN, state_dir=str(tmp_path / "file" / "state")
    )
    with pytest.raises(ConfigError, match=r"worker\.state_dir: .*/file/state cannot be used"):
        await Daemon(config).run()
