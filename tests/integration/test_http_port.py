"""The HTTP port: what lives, what is ready, and that nobody can make it do more than answer."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from dbtstream import health, http_port
from dbtstream.config import HttpConfig, NatsConfig
from dbtstream.daemon import Daemon
from dbtstream.embedded import NatsServer
from dbtstream.errors import ConfigError
from dbtstream.http_port import Answer, HttpPort
from tests.daemons import Served, daemon_config, serving
from tests.scrapes import ANY_PORT, fetch, get, parsed
from tests.scripted_child import GOOD_RUN

Until = Callable[[Callable[[], object]], Awaitable[None]]


async def ready(served: Served) -> dict[str, str]:
    """What is not as it should be; empty when the daemon is ready."""
    fetched = await get(served, "/readyz")
    told = json.loads(fetched.text)
    assert (fetched.status == 200) is told["ready"]
    return {name: text for name, text in told["checks"].items() if text != "ok"}


async def until_ready(served: Served, *problems: str) -> dict[str, str]:
    async with asyncio.timeout(60):
        while (found := await ready(served)).keys() != set(problems):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return found


async def test_a_daemon_that_serves_lives_and_is_ready(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN, listen=ANY_PORT)) as served:
        await until_ready(served)
        assert (await get(served, "/livez")).text == "ok\n"


async def test_without_nats_it_lives_and_is_not_ready(
    tmp_path: Path, nats_config: NatsConfig, nats_server: NatsServer
) -> None:
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN, listen=ANY_PORT)) as served:
        await until_ready(served)
        await nats_server.kill()
        problems = await until_ready(served, "nats")
        assert (await get(served, "/livez")).status == 200
        await nats_server.restart()
        await until_ready(served)

    assert problems["nats"] == "0 of 2 connections are up"


async def test_before_nats_is_there_it_says_what_it_waits_for(
    tmp_path: Path, nats_config: NatsConfig, nats_server: NatsServer, until: Until
) -> None:
    await nats_server.kill()
    daemon = Daemon(daemon_config(tmp_path, nats_config, GOOD_RUN, listen=ANY_PORT))
    running = asyncio.create_task(daemon.run())
    await until(lambda: daemon.http is not None)
    assert daemon.http is not None

    fetched = await asyncio.to_thread(fetch, daemon.http.address, "/readyz")
    metrics = await asyncio.to_thread(fetch, daemon.http.address, "/metrics")
    daemon.stop()
    await running

    assert fetched.status == 503
    found = parsed(metrics.text)
    assert found.value("dbtstream_nats_connections") == 0
    assert found.value("dbtstream_slot_limit") == 4
    checks = json.loads(fetched.text)["checks"]
    del checks["disk"]  # its folder is made when NATS is there
    assert checks == {
        "serving": "starting",
        "loop": "ok",
        "nats": "0 of 2 connections are up",
        "jetstream": "has not answered yet",
    }


async def test_jetstream_that_does_not_answer_is_told(
    tmp_path: Path, nats_config: NatsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN, listen=ANY_PORT)) as served:
        await until_ready(served)
        monkeypatch.setattr(health, "UNANSWERED_S", -1.0)
        assert list(await ready(served)) == ["jetstream"]


async def test_a_full_disk_is_told(
    tmp_path: Path, nats_config: NatsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN, listen=ANY_PORT)) as served:
        await until_ready(served)
        monkeypatch.setattr(health, "MIN_FREE_BYTES", 2**62)
        problems = await ready(served)
        assert list(problems) == ["disk"]
        assert "MiB left" in problems["disk"]


async def test_while_it_drains_it_is_not_ready(tmp_path: Path, nats_config: NatsConfig) -> None:
    body = """
        start_line()
        hello()
        plan(model("orders"))
        started("orders")
        control_line()
        result(2, interrupted=True)
    """
    async with serving(daemon_config(tmp_path, nats_config, body, listen=ANY_PORT)) as served:
        accepted = await served.client.submit("shop", ["build"], target="dev")
        async for event in served.client.events(run_id=accepted.run_id):
            if event.__struct_config__.tag == "node.started":
                break
        served.daemon.stop()
        problems = await until_ready(served, "serving")
        assert problems == {"serving": "draining"}
        assert (await get(served, "/livez")).status == 200


async def test_a_loop_that_hangs_is_told_by_livez(
    tmp_path: Path, nats_config: NatsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer comes while the loop hangs: this test's own code is what holds it up."""
    monkeypatch.setattr(health, "HANGS_S", 0.2)
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN, listen=ANY_PORT)) as served:
        assert served.daemon.http is not None
        address = served.daemon.http.address
        answer = fetch(address, "/livez")
        give_up_at = time.monotonic() + 30
        while answer.status == 200 and time.monotonic() < give_up_at:
            answer = fetch(address, "/livez")  # blocks the loop, and that is the point

    assert answer.status == 503
    assert answer.text.startswith("the event loop has been silent for")


class TestListen:
    async def test_a_port_that_is_taken_is_an_error_where_it_was_configured(
        self, tmp_path: Path, nats_config: NatsConfig
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            listen = f"127.0.0.1:{taken.getsockname()[1]}"
            daemon = Daemon(daemon_config(tmp_path, nats_config, GOOD_RUN, listen=listen))
            with pytest.raises(ConfigError, match=r"http.listen: cannot listen on 127\.0\.0\.1"):
                await daemon.run()

    async def test_the_default_port_may_be_another_daemon_s(
        self,
        tmp_path: Path,
        nats_config: NatsConfig,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            listen = f"127.0.0.1:{taken.getsockname()[1]}"
            default = msgspec.defstruct("HttpConfig", [("listen", str, listen)])
            monkeypatch.setattr("dbtstream.daemon.HttpConfig", default)
            config = daemon_config(tmp_path, nats_config, GOOD_RUN, listen=listen)
            async with serving(config) as served:
                assert served.daemon.http is None
        assert "the HTTP port is taken" in caplog.text

    async def test_off(self, tmp_path: Path, nats_config: NatsConfig) -> None:
        async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN)) as served:
            assert served.daemon.http is None
        assert HttpConfig().listen.startswith("127.0.0.1:")


@contextmanager
def port(**routes: http_port.Route) -> Iterator[str]:
    paths = {f"/{name}": route for name, route in routes.items()}
    opened = HttpPort("127.0.0.1", 0, paths)
    try:
        yield opened.address
    finally:
        opened.close()


def ok(_: object) -> Answer:
    return Answer.text(200, "ok")


def say(address: str, data: bytes) -> bytes:
    """All that comes back until the port hangs up."""
    host, _, number = address.rpartition(":")
    with socket.create_connection((host, int(number)), timeout=20) as connection:
        connection.sendall(data)
        with connection.makefile("rb") as answer:
            return answer.read()


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


class TestTheServer:
    @pytest.mark.parametrize(
        ("request_", "status"),
        [
            (b"GET /ok HTTP/1.1\r\n\r\n", 200),
            (b"GET /ok?verbose=1 HTTP/1.0\r\nHost: x\r\n\r\n", 200),
            (b"GET /other HTTP/1.1\r\n\r\n", 404),
            (b"GET /../ok HTTP/1.1\r\n\r\n", 404),
            (b"POST /ok HTTP/1.1\r\nContent-Length: 9\r\n\r\n", 405),
            (b"GET /ok HTTP/2.0\r\n\r\n", 400),
            (b"\x16\x03\x01 TLS\r\n\r\n", 400),
            (b"\r\n\r\n", 400),
        ],
    )
    def test_it_answers_what_it_knows(self, request_: bytes, status: int) -> None:
        with port(ok=ok) as address:
            assert status_of(say(address, request_)) == status

    def test_head_has_no_body(self) -> None:
        with port(ok=ok) as address:
            answer = say(address, b"HEAD /ok HTTP/1.1\r\n\r\n")
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b"Content-Length: 3" in head
        assert body == b""

    def test_a_head_that_is_too_long_is_not_read_to_its_end(self) -> None:
        with port(ok=ok) as address:
            try:
                answer = say(address, b"GET /ok HTTP/1.1\r\n" + b"X: y\r\n" * 20_000)
            except ConnectionError:
                answer = b""  # it hung up on what we were still sending
        assert answer == b""

    def test_who_says_nothing_is_hung_up_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(http_port, "READ_S", 0.1)
        with port(ok=ok) as address:
            assert say(address, b"GET /ok HT") == b""

    def test_a_few_are_served_at_one_time_and_the_port_recovers(self) -> None:
        enough = threading.Event()
        inside = threading.Semaphore(0)

        def slow(_: object) -> Answer:
            inside.release()
            enough.wait(20)
            return Answer.text(200, "at last")

        answers: list[bytes] = []
        with port(slow=slow, ok=ok) as address:
            callers = [
                threading.Thread(
                    target=lambda: answers.append(say(address, b"GET /slow HTTP/1.1\r\n\r\n"))
                )
                for _ in range(http_port.MAX_CONNECTIONS)
            ]
            for caller in callers:
                caller.start()
                assert inside.acquire(timeout=20)
            try:
                refused = say(address, b"GET /ok HTTP/1.1\r\n\r\n")
            except ConnectionError:
                refused = b""
            enough.set()
            for caller in callers:
                caller.join(20)
            assert refused == b""
            assert {status_of(answer) for answer in answers} == {200}
            assert recovers(address)

    def test_a_route_that_fails_is_a_500_and_no_more(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(_: object) -> Answer:
            raise RuntimeError("secret detail")

        with port(broken=broken) as address:
            answer = say(address, b"GET /broken HTTP/1.1\r\n\r\n")
        assert status_of(answer) == 500
        assert b"secret" not in answer
        assert "could not be answered" in caplog.text


def recovers(address: str) -> bool:
    """A place is given back just after its answer has gone out."""
    give_up_at = time.monotonic() + 20
    while time.monotonic() < give_up_at:
        try:
            if status_of(say(address, b"GET /ok HTTP/1.1\r\n\r\n")) == 200:
                return True
        except (ConnectionError, IndexError):
            continue
    return False
