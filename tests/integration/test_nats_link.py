"""The link against a real server that is late, killed, frozen, reconfigured or unwilling."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from nats.js.api import RawStreamMsg, StreamConfig

from dbtstream.config import NatsConfig, SecretRef
from dbtstream.embedded import NatsServer
from dbtstream.errors import ConfigError, NatsRefused, NatsUnavailable
from dbtstream.nats_errors import BATCH_DUPLICATE_ID, JetStreamRefused
from dbtstream.nats_link import NatsLink, NobodyListens
from dbtstream.subjects import H_MSG_ID

Until = Callable[[Callable[[], object]], Awaitable[None]]
Stored = Callable[[NatsLink, str], Awaitable[list[RawStreamMsg]]]


@dataclass(frozen=True)
class Message:
    subject: str
    payload: bytes
    headers: dict[str, str] = field(default_factory=dict)


def users(password: str, publish: str = ">") -> str:
    return (
        "authorization { users: [{ user: u, password: "
        f'"{password}", permissions: {{ publish: "{publish}", subscribe: ">" }} }}] }}'
    )


async def add_stream(link: NatsLink, **more: object) -> None:
    await link.js.add_stream(StreamConfig(name="S", subjects=["s.>"]).evolve(**more))


async def test_a_link_waits_for_a_server_that_comes_later(
    nats_server: NatsServer, until: Until
) -> None:
    await nats_server.stop()
    config = NatsConfig(servers=(nats_server.url,), reconnect_wait_s=0.05)
    async with NatsLink(config, name="early") as link:
        await until(lambda: link.last_problem)
        with pytest.raises(NatsUnavailable, match=r"no connection within 0\.2 s.*refused"):
            await link.wait_connected(0.2)
        assert not link.connected
        await nats_server.restart()
        await link.wait_connected(20)
        assert link.connected
        assert link.reconnects == 0


async def test_every_message_is_stored_once_and_in_order_over_two_crashes_of_the_server(
    nats_server: NatsServer, link: NatsLink, stored: Stored
) -> None:
    await add_stream(link, duplicate_window=60)
    reached = {50: asyncio.Event(), 120: asyncio.Event()}

    async def publish_all() -> None:
        for n in range(200):
            await link.publish_until_stored("s.x", str(n).encode(), {H_MSG_ID: f"id-{n}"})
            if n in reached:
                reached[n].set()

    async with asyncio.TaskGroup() as group:
        group.create_task(publish_all())
        for event in reached.values():
            await event.wait()
            await nats_server.kill()
            await nats_server.restart()
    assert [int(message.data or b"") for message in await stored(link, "S")] == list(range(200))
    assert link.reconnects >= 2


async def test_a_request_in_flight_fails_when_the_server_dies_and_not_at_its_timeout(
    nats_server: NatsServer, link: NatsLink
) -> None:
    asked = asyncio.Event()

    async def never_answer(message: object) -> None:
        asked.set()

    await link.client.subscribe("deaf", cb=never_answer)
    request = asyncio.create_task(link.request("deaf", timeout_s=300))
    await asked.wait()
    await nats_server.kill()
    async with asyncio.timeout(30):
        with pytest.raises(NatsUnavailable, match="the connection broke"):
            await request


async def test_a_frozen_server_is_a_timeout_and_the_link_goes_on_after_it(
    nats_server: NatsServer, link: NatsLink
) -> None:
    await add_stream(link)
    nats_server.pause()
    with pytest.raises(NatsUnavailable, match="no answer within"):
        await link.publish("s.x", b"1", {H_MSG_ID: "a"}, timeout_s=0.2)
    nats_server.resume()
    ack = await link.publish_until_stored("s.x", b"1", {H_MSG_ID: "a"}, give_up_after_s=30)
    assert ack.seq == 1


async def test_a_reconnect_wakes_callbacks_and_waiters(
    nats_server: NatsServer, link: NatsLink
) -> None:
    called = asyncio.Event()
    undo = link.on_reconnect(called.set)
    waiter = asyncio.create_task(link.wait_reconnect(link.reconnects))
    await nats_server.kill()
    await nats_server.restart()
    async with asyncio.timeout(30):
        await called.wait()
        assert await waiter == 1
    undo()
    assert link.generation == 1


async def test_when_the_server_ends_the_connection_for_good_a_new_client_is_made(
    tmp_path: Path,
) -> None:
    """nats-py closes itself on an auth reload; the new client reads the secret again."""
    secret = tmp_path / "password"
    secret.write_text("one")
    async with NatsServer.start(tmp_path / "nats", config_extra=users("one")) as server:
        config = NatsConfig(servers=(server.url,), user="u", password=SecretRef(file=str(secret)))
        async with NatsLink(config, name="rotating") as link:
            await link.wait_connected(10)
            first = link.client
            back = asyncio.Event()
            link.on_reconnect(back.set)
            secret.write_text("two")
            await server.reload(users("two"))
            async with asyncio.timeout(60):
                await back.wait()
            assert link.generation == 2
            assert link.client is not first
            await link.client.flush()


async def test_a_wrong_password_is_named_while_waiting(tmp_path: Path, until: Until) -> None:
    (tmp_path / "password").write_text("wrong")
    async with NatsServer.start(tmp_path / "nats", config_extra=users("right")) as server:
        config = NatsConfig(
            servers=(server.url,), user="u", password=SecretRef(file=str(tmp_path / "password"))
        )
        async with NatsLink(config, name="wrong") as link:
            await until(lambda: link.last_problem)
            with pytest.raises(NatsUnavailable, match="Authorization Violation"):
                await link.wait_connected(0.2)


async def test_a_denied_publish_is_refused_with_the_servers_words(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("one")
    extra = users("one", publish="allowed.>")
    async with NatsServer.start(tmp_path / "nats", config_extra=extra) as server:
        config = NatsConfig(
            servers=(server.url,), user="u", password=SecretRef(file=str(tmp_path / "password"))
        )
        async with NatsLink(config, name="denied") as link:
            await link.wait_connected(10)
            async with asyncio.timeout(30):
                with pytest.raises(NatsRefused, match=r"(?i)permissions violation.*Forbidden\.It"):
                    await link.publish("Forbidden.It", b"", timeout_s=300)


async def test_a_missing_secret_stops_the_start(nats_config: NatsConfig) -> None:
    config = NatsConfig(servers=nats_config.servers, token=SecretRef(env="NO_SUCH_VARIABLE"))
    with pytest.raises(ConfigError, match=r"nats\.token: environment variable NO_SUCH_VARIABLE"):
        async with NatsLink(config, name="x", source="f.toml"):
            pytest.fail("it started")


async def test_passwords_in_urls_are_in_no_message() -> None:
    config = NatsConfig(servers=("nats://u:s3cret@127.0.0.1:1",), connect_timeout_s=0.1)
    async with NatsLink(config, name="x") as link:
        with pytest.raises(NatsUnavailable) as caught:
            await link.wait_connected(0.3)
    assert "s3cret" not in str(caught.value)
    assert "nats://127.0.0.1:1" in str(caught.value)


async def test_a_message_over_the_servers_limit_is_refused_and_the_connection_lives(
    link: NatsLink,
) -> None:
    """The server counts headers too, and would close the connection over them."""
    await add_stream(link)
    payload = bytes(link.client.max_payload - 100)
    with pytest.raises(JetStreamRefused, match="the server takes 1048576") as caught:
        await link.publish("s.x", payload, {H_MSG_ID: "a", "long": "x" * 200})
    assert caught.value.about_message
    assert (await link.publish("s.x", b"", {H_MSG_ID: "b"})).seq == 1
    assert link.generation == 1


async def test_a_subject_without_stream_is_told_at_once_and_refused_in_the_end(
    link: NatsLink,
) -> None:
    with pytest.raises(NobodyListens):
        await link.publish("nowhere", b"", timeout_s=300)
    with pytest.raises(NatsRefused, match="dbtstream setup"):
        await link.publish_until_stored("nowhere", b"", {H_MSG_ID: "a"}, give_up_after_s=0.3)


async def test_a_full_stream_is_a_refusal_and_not_an_outage(link: NatsLink) -> None:
    await add_stream(link, max_msgs=1, discard="new")
    await link.publish("s.x", b"")
    with pytest.raises(JetStreamRefused, match="the stream is full"):
        await link.publish("s.x", b"")


async def test_only_messages_with_an_id_may_be_sent_twice(link: NatsLink) -> None:
    with pytest.raises(ValueError, match="Nats-Msg-Id"):
        await link.publish_until_stored("s.x", b"", {})


async def test_a_batch_is_stored_whole_and_its_repetition_says_that_it_was(
    link: NatsLink, stored: Stored
) -> None:
    await add_stream(link, allow_atomic=True, duplicate_window=60)
    batch = [Message(f"s.{n}", str(n).encode(), {H_MSG_ID: f"id-{n}"}) for n in range(100)]
    ack = await link.publish_batch(batch)
    assert ack.batch_size == 100
    with pytest.raises(JetStreamRefused) as caught:
        await link.publish_batch(batch)
    assert caught.value.err_code == BATCH_DUPLICATE_ID
    assert [int(message.data or b"") for message in await stored(link, "S")] == list(range(100))


async def test_closing_does_not_hang_on_a_dead_or_frozen_server(nats_server: NatsServer) -> None:
    config = NatsConfig(servers=(nats_server.url,))
    async with asyncio.timeout(60):
        async with NatsLink(config, name="frozen") as link:
            await link.wait_connected(10)
            nats_server.pause()
        nats_server.resume()
        async with NatsLink(config, name="dead") as link:
            await link.wait_connected(10)
            await nats_server.kill()


async def test_a_closed_link_says_so(nats_config: NatsConfig) -> None:
    async with NatsLink(nats_config, name="x") as link:
        await link.wait_connected(10)
    with pytest.raises(NatsUnavailable):
        await link.publish("s", b"")
    with pytest.raises(NatsUnavailable, match="closed"):
        await link.wait_connected(10)


async def test_a_request_that_is_denied_and_then_disconnected_ends_once(
    nats_server: NatsServer, link: NatsLink
) -> None:
    """Two reasons to end a request may come in one turn of the loop."""
    asked = asyncio.Event()

    async def never_answer(message: object) -> None:
        asked.set()

    await link.client.subscribe("deaf", cb=never_answer)
    request = asyncio.create_task(link.request("deaf", timeout_s=300))
    await asked.wait()
    link._end_flights()
    await asyncio.sleep(0)
    link._end_flights()
    with pytest.raises(NatsUnavailable, match="the connection broke"):
        await request
    await link.client.flush()
    assert link.generation == 1


async def test_a_callback_that_fails_stops_neither_the_link_nor_the_other_callbacks(
    nats_server: NatsServer, link: NatsLink
) -> None:
    called = asyncio.Event()

    def fail() -> None:
        raise ValueError("a bug of the caller")

    link.on_reconnect(fail)
    link.on_reconnect(called.set)
    await nats_server.kill()
    await nats_server.restart()
    async with asyncio.timeout(30):
        await called.wait()
    await link.client.flush()
