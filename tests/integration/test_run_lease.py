"""Leases on a real server: taken, kept, given up, lost; and what its outages do to them."""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from dbtstream import lease_renewal, run_lease
from dbtstream.config import NatsConfig, StreamsConfig
from dbtstream.embedded import NatsServer
from dbtstream.errors import NatsUnavailable
from dbtstream.frames import clock_s
from dbtstream.kv_bucket import MARKER_TTL_S, Bucket
from dbtstream.lease_keys import limit_key
from dbtstream.nats_link import NatsLink
from dbtstream.run_lease import Held, Leases, RunLease, Vacancy, settle_s
from dbtstream.streams import LEASES_BUCKET, ensure_streams

TTL_S = 3  # the shortest that the config takes
RENEW_S = 0.3
KEY = "run.shop.prod"

Until = Callable[[Callable[[], object]], Awaitable[None]]


@pytest.fixture(autouse=True)
async def streams(link: NatsLink) -> None:
    await ensure_streams(link, StreamsConfig())


@pytest.fixture
async def other_link(nats_config: NatsConfig) -> AsyncIterator[NatsLink]:
    async with NatsLink(nats_config, name="other") as link:
        await link.wait_connected(10)
        yield link


def leases_of(link: NatsLink, worker: str = "ada", **terms: Any) -> Leases:
    return Leases(link, worker=worker, **({"ttl_s": TTL_S, "renew_s": RENEW_S} | terms))


@pytest.fixture
def leases(link: NatsLink) -> Leases:
    return leases_of(link)


@pytest.fixture
def others(other_link: NatsLink) -> Leases:
    return leases_of(other_link, "bob")


async def taken(leases: Leases, run_id: str = "r1", target: str = "prod") -> RunLease:
    lease = await leases.acquire_target("shop", target, run_id)
    assert lease is not None
    return lease


async def eventually(fact: Callable[[], Awaitable[object]]) -> None:
    """As the fixture `until`, for what must be asked."""
    async with asyncio.timeout(60):
        while not await fact():  # noqa: ASYNC110  # there is no event to wait for
            await asyncio.sleep(0.02)


def vacant(leases: Leases, wanted: Vacancy) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        return await leases.vacancy("shop", "prod") is wanted

    return look


class Deadlines:
    """What a child would be told."""

    def __init__(self, lease: RunLease) -> None:
        self.told: list[tuple[float, float]] = []
        lease.on_deadline(lambda stop_at, kill_at: self.told.append((stop_at, kill_at)))

    def later_than(self, stop_at: float) -> Callable[[], bool]:
        return lambda: self.told[-1][0] > stop_at


# -- taking and giving up --------------------------------------------------------------------


async def test_one_of_two_workers_gets_a_target_until_it_is_given_up(
    leases: Leases, others: Leases
) -> None:
    assert await leases.vacancy("shop", "prod") is Vacancy.ABSENT
    assert await leases.holder("shop", "prod") is None
    async with await taken(leases) as lease:
        assert await others.acquire_target("shop", "prod", "r2") is None
        assert await others.vacancy("shop", "prod") is Vacancy.HELD
        assert await others.holder("shop", "prod") == Held(
            worker="ada", run_id="r1", token=lease.token
        )
        async with await taken(others, "r3", "dev"):
            pass
    assert await others.vacancy("shop", "prod") is Vacancy.GIVEN_UP
    async with await taken(others, "r2") as second:
        assert second.fence > lease.fence
        assert second.token != lease.token


async def test_of_many_takers_at_once_one_wins(leases: Leases, others: Leases) -> None:
    tries = [(leases, others)[n % 2].acquire_target("shop", "prod", f"r{n}") for n in range(10)]
    assert len([lease for lease in await asyncio.gather(*tries) if lease]) == 1


async def test_the_marker_of_what_was_given_up_goes_away_by_itself(
    leases: Leases, link: NatsLink
) -> None:
    async with await taken(leases):
        pass
    message = await link.js.get_last_msg(f"KV_{LEASES_BUCKET}", f"$KV.{LEASES_BUCKET}.{KEY}")
    assert message.headers is not None
    assert message.headers["KV-Operation"] == "DEL"
    assert message.headers["Nats-TTL"] == f"{MARKER_TTL_S}s"


async def test_a_lease_that_is_not_renewed_expires(leases: Leases, others: Leases) -> None:
    before = clock_s()
    await taken(leases)  # and not entered
    await eventually(vacant(others, Vacancy.ABSENT))
    assert clock_s() - before >= TTL_S
    async with await taken(others, "r2"):
        pass


async def test_renewals_keep_a_lease_beyond_its_ttl(
    leases: Leases, others: Leases, until: Until
) -> None:
    async with await taken(leases) as lease:
        deadlines, fence = Deadlines(lease), lease.fence
        await until(deadlines.later_than(lease.stop_at + TTL_S + 1))
        assert await others.acquire_target("shop", "prod", "r2") is None
        assert lease.fence == fence
        assert not lease.expired
        stop_at, kill_at = deadlines.told[-1]
        assert clock_s() < stop_at < clock_s() + 0.7 * TTL_S
        assert kill_at - stop_at == pytest.approx(0.15 * TTL_S)


async def test_a_predecessors_lease_is_given_up_by_its_token_only(
    leases: Leases, others: Leases
) -> None:
    lease = await taken(leases)
    assert not await others.release_of(KEY, "another")
    assert await others.vacancy("shop", "prod") is Vacancy.HELD
    assert await others.release_of(KEY, lease.token)
    assert await others.vacancy("shop", "prod") is Vacancy.GIVEN_UP
    assert not await others.release_of(KEY, lease.token)


async def test_a_marker_of_the_servers_own_means_expired(
    leases: Leases, link: NatsLink, until: Until
) -> None:
    """An operator may have the bucket keep such markers; nobody gave the key up then."""
    config = (await link.js.stream_info(f"KV_{LEASES_BUCKET}")).config
    await link.js.update_stream(config.evolve(subject_delete_marker_ttl=60))
    async with await taken(leases_of(link, renew_s=60)) as lease:
        bucket = Bucket(link, LEASES_BUCKET, retry_for_s=10)
        await eventually(vacant(leases, Vacancy.ABSENT))
        value = await bucket.read(KEY)
        assert value is not None
        assert (value.data, value.deleted) == (None, False)
        assert await lease.confirm()
        assert await leases.vacancy("shop", "prod") is Vacancy.HELD
    assert await leases.vacancy("shop", "prod") is Vacancy.GIVEN_UP


# -- losing ----------------------------------------------------------------------------------


async def test_a_holder_whose_lease_another_has_is_told(leases: Leases, others: Leases) -> None:
    lease = await taken(leases)
    await eventually(vacant(others, Vacancy.ABSENT))
    async with await taken(others, "r2") as second:
        async with lease, asyncio.timeout(60):
            lost = await lease.lost
        assert (lost.key, lost.holder) == (KEY, "bob")
        assert not await lease.confirm()
        assert await second.confirm()  # the loser has given up nothing that is not its own
        assert not second.lost.done()


async def test_a_lease_that_another_had_and_gave_up_is_lost_too(
    leases: Leases, others: Leases
) -> None:
    async with await taken(leases) as lease:
        assert await others.release_of(KEY, lease.token)
        async with asyncio.timeout(60):
            lost = await lease.lost
        assert lost.holder is None


async def test_confirm_asks_the_leader_now(leases: Leases, others: Leases, link: NatsLink) -> None:
    async with await taken(leases_of(link, renew_s=60)) as lease:
        assert await lease.confirm()
        await others.release_of(KEY, lease.token)
        await taken(others, "r2")
        assert not lease.lost.done()
        assert not await lease.confirm()
        assert (await lease.lost).holder == "bob"


# -- limits ----------------------------------------------------------------------------------


async def test_of_five_takers_four_get_the_four_places(link: NatsLink, others: Leases) -> None:
    async with contextlib.AsyncExitStack() as stack:
        runs = [
            await stack.enter_async_context(await taken(others, f"r{n}", f"t{n}")) for n in range(5)
        ]
        got = [await run.take_limits({"warehouse": 4}) for run in runs]
        assert got == [True, True, True, True, False]
        assert [run.keys[1:] for run in runs] == [
            *([limit_key("warehouse", n)] for n in range(4)),
            [],
        ]
        await runs[1].__aexit__(None, None, None)
        assert await runs[4].take_limits({"warehouse": 4})
        assert runs[4].keys[1:] == [limit_key("warehouse", 1)]


async def test_limits_are_taken_all_or_none_and_given_up_with_the_lease(
    leases: Leases, others: Leases
) -> None:
    file = "duckdb:/srv/shop with a blank/.shop..duckdb"
    long = "duckdb:/" + "deep/" * 900 + "shop.duckdb"
    async with await taken(leases) as lease, await taken(others, "r2", "dev") as second:
        assert await lease.take_limits({"b": 1, file: 1, long: 1})
        assert not await second.take_limits({"a": 1, "b": 1, "c": 1})
        assert second.keys == ["run.shop.dev"]
        assert await lease.take_limits({"a": 1})  # was given back
        assert not await second.take_limits({file: 1})
        assert not await second.take_limits({long: 1})
        assert len(lease.keys) == 5
    async with await taken(others, "r3") as third:
        assert await third.take_limits({"a": 1, "b": 1, file: 1, long: 1})


async def test_a_place_whose_holder_vanished_is_free_after_the_settling_time(
    leases: Leases, nats_config: NatsConfig
) -> None:
    """Its child may go on while no server was there, see lease_renewal; a connection that is
    younger than that cannot know. A place that nobody ever had is free at once."""
    lost = await taken(leases)
    assert await lost.take_limits({"b": 1})
    await eventually(vacant(leases, Vacancy.ABSENT))
    async with NatsLink(nats_config, name="young") as link:
        await link.wait_connected(10)
        began = asyncio.get_running_loop().time()
        async with await taken(leases_of(link, "cyd"), "r2") as lease:
            assert not await lease.take_limits({"b": 1})
            assert await lease.take_limits({"a": 1})
            await eventually(lambda: lease.take_limits({"b": 1}))
            # The connection is up to some ms older than `began`.
            assert asyncio.get_running_loop().time() - began > settle_s(TTL_S) - 0.5


async def test_a_lost_limit_ends_the_run_too(leases: Leases, others: Leases) -> None:
    async with await taken(leases) as lease:
        assert await lease.take_limits({"b": 1})
        assert await others.release_of(limit_key("b", 0), lease.token)
        async with asyncio.timeout(60):
            assert (await lease.lost).key == limit_key("b", 0)


# -- outages ---------------------------------------------------------------------------------


class Mute:
    """A TCP proxy that, when told so, delivers what we say and keeps the answers to itself
    (`mute`), or ends every connection (`away`)."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._pipes: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self.mute = False
        self.away = False
        self.port = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def before(cls, port: int) -> "AsyncIterator[Mute]":
        proxy = cls(port)
        server = await asyncio.start_server(proxy._connected, "127.0.0.1", 0)
        proxy.port = server.sockets[0].getsockname()[1]
        try:
            yield proxy
        finally:
            server.close()
            proxy.cut()
            await asyncio.gather(*proxy._pipes, return_exceptions=True)
            closing = (writer.wait_closed() for writer in proxy._writers)
            await asyncio.gather(*closing, return_exceptions=True)
            await server.wait_closed()

    def cut(self) -> None:
        for writer in self._writers:
            writer.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        if self.away:
            writer.close()
            return
        try:
            their_reader, their_writer = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.close()
            return
        self._writers.append(their_writer)
        for source, sink, answers in (
            (reader, their_writer, False),
            (their_reader, writer, True),
        ):
            pipe = asyncio.create_task(self._pipe(source, sink, answers=answers))
            self._pipes.add(pipe)

    async def _pipe(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, answers: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                if answers and self.mute:
                    continue
                sink.write(data)
                await sink.drain()
        sink.close()


@pytest.fixture
def forgetful() -> Iterator[None]:
    """nats-py 2.16 forgets to close a connection over which no INFO came."""
    yield
    gc.collect()


no_info = pytest.mark.filterwarnings("ignore:unclosed <StreamWriter:ResourceWarning")


@pytest.fixture
async def mute(forgetful: None, nats_server: NatsServer) -> AsyncIterator[Mute]:
    async with Mute.before(nats_server.port) as proxy:
        yield proxy


@contextlib.asynccontextmanager
async def linked_by(proxy: Mute) -> AsyncIterator[NatsLink]:
    config = NatsConfig(
        servers=(f"nats://127.0.0.1:{proxy.port}",), reconnect_wait_s=0.05, request_timeout_s=0.3
    )
    async with NatsLink(config, name="by proxy") as link:
        await link.wait_connected(10)
        yield link


@no_info
async def test_a_renewal_that_was_stored_without_an_answer_is_found_to_be_ours(
    link: NatsLink, nats_server: NatsServer, mute: Mute, until: Until
) -> None:
    """Over a crash of the server. Until there is an answer, the child is promised nothing; and
    the first answer promises only what the write without one had given."""
    bucket = Bucket(link, LEASES_BUCKET, retry_for_s=10)

    async def stored_since() -> bool:
        value = await bucket.read(KEY)
        return value is not None and value.revision > revision

    async with linked_by(mute) as linked, await taken(leases_of(linked, ttl_s=20)) as lease:
        deadlines, fence = Deadlines(lease), lease.fence
        await until(deadlines.later_than(lease.stop_at))
        mute.mute = True
        value = await bucket.read(KEY)
        assert value is not None
        revision = value.revision
        await until(lambda: lease._failing)
        await eventually(stored_since)
        told = deadlines.told[-1]
        await nats_server.kill()
        await nats_server.restart()
        assert deadlines.told[-1] == told
        mute.mute = False
        mute.cut()
        await until(deadlines.later_than(told[0]))
        assert not lease.lost.done()
        assert lease.fence == fence
        assert await lease.confirm()


async def test_the_first_answer_after_one_that_was_lost_promises_no_more_than_is_sure(
    link: NatsLink, mute: Mute, until: Until
) -> None:
    """What is adopted lives from the time when it was sent at the earliest."""
    async with linked_by(mute) as linked:
        lease = await taken(leases_of(linked, ttl_s=20))
        key = lease._keys[KEY]
        mute.mute = True
        began = clock_s()
        with pytest.raises(NatsUnavailable):
            await lease._renew(KEY, lease._once)
        assert key.unanswered_since is not None
        assert began <= key.unanswered_since < began + 0.3
        mute.mute = False
        mute.cut()
        await until(lambda: linked.reconnects == 1)
        writes: list[float] = []
        write = lease._patient.write

        async def counted(*args: Any, **more: Any) -> int:
            revision = await write(*args, **more)
            writes.append(key.unanswered_since or 0.0)
            return revision

        lease._patient.write = counted  # type: ignore[method-assign]  # it watches only
        assert await lease.confirm()
        assert writes[0] < began + 0.3 < writes[1]
        assert key.renewed_at == writes[1]


async def test_a_lease_whose_answer_was_lost_is_found_by_the_next_try(
    mute: Mute, others: Leases, link: NatsLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And written anew, as nobody knows how old it is."""
    monkeypatch.setattr(run_lease, "RETRY_FOR_S", 0.5)
    async with linked_by(mute) as linked:
        leases = leases_of(linked, ttl_s=20)
        mute.mute = True
        with pytest.raises(NatsUnavailable):
            await leases.acquire_target("shop", "prod", "r1")
        before = await Bucket(link, LEASES_BUCKET, retry_for_s=10).read(KEY)
        assert before is not None
        assert await others.vacancy("shop", "prod") is Vacancy.HELD
        mute.mute = False
        mute.cut()
        monkeypatch.setattr(leases._bucket, "_retry_for_s", 20)
        async with await taken(leases) as lease:
            assert lease.fence > before.revision
            assert await lease.confirm()
            assert await others.holder("shop", "prod") == Held(
                worker="ada", run_id="r1", token=lease.token
            )
    assert await others.vacancy("shop", "prod") is Vacancy.GIVEN_UP


@no_info
async def test_a_lease_that_expired_is_taken_again_by_its_holder_if_nobody_has_had_it(
    link: NatsLink, mute: Mute, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    """Each change is told once."""
    caplog.set_level("INFO", "dbtstream.lease_renewal")
    bucket = Bucket(link, LEASES_BUCKET, retry_for_s=10)

    async def gone() -> bool:
        return [await bucket.read(key) for key in lease.keys] == [None, None]

    async with linked_by(mute) as linked, await taken(leases_of(linked)) as lease:
        assert await lease.take_limits({"b": 1})
        fence = lease.fence
        mute.away = True
        mute.cut()
        await eventually(gone)
        assert lease.expired
        deadlines = Deadlines(lease)
        mute.away = False
        await until(lambda: len(deadlines.told) > 1)
        assert not lease.expired
        assert not lease.lost.done()
        assert lease.fence == fence
        held = await leases_of(link).holder("shop", "prod")
        assert held is not None
        assert held.token == lease.token
    said = [r.message for r in caplog.records if r.name == "dbtstream.lease_renewal"]
    assert said == [
        "lease not renewed, trying again",
        *["lease had expired, taken again"] * 2,
        "lease renewed again",
    ]


@no_info
async def test_a_server_that_was_away_for_longer_than_the_ttl_costs_no_lease(
    link: NatsLink, others: Leases, nats_server: NatsServer, until: Until, forgetful: None
) -> None:
    async with await taken(leases_of(link, cut_off="stop")) as lease:
        deadlines, fence = Deadlines(lease), lease.fence
        await nats_server.kill()
        told = deadlines.told[-1]
        await until(lambda: clock_s() > lease.kill_at + 0.3 * TTL_S)
        assert lease.expired
        assert deadlines.told[-1] == told
        await nats_server.restart()
        await until(deadlines.later_than(told[0]))
        assert not lease.expired
        assert not lease.lost.done()
        assert lease.fence == fence
        held = await others.holder("shop", "prod")
        assert held is not None
        assert held.token == lease.token


@pytest.mark.parametrize(("cut_off", "moves"), [("auto", True), ("go_on", True), ("stop", False)])
async def test_while_no_server_is_there_deadlines_move_as_cut_off_says(
    link: NatsLink,
    nats_server: NatsServer,
    until: Until,
    cut_off: Any,
    moves: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lease_renewal, "GIVE_UP_S", 0.1)
    async with await taken(leases_of(link, cut_off=cut_off)) as lease:
        deadlines = Deadlines(lease)
        await nats_server.kill()
        await until(lambda: lease._failing)
        renewed_at = lease._keys[KEY].renewed_at
        if not moves:
            await until(lambda: lease.expired)
            assert deadlines.told[-1][0] == pytest.approx(renewed_at + 0.7 * TTL_S)
            return
        await until(deadlines.later_than(renewed_at + 1.5 * TTL_S))
        assert not lease.expired
        if cut_off == "auto":
            assert deadlines.told[-1][1] < clock_s() + TTL_S / 3 < clock_s() + settle_s(TTL_S)
        assert lease._keys[KEY].renewed_at == renewed_at


@no_info
async def test_a_frozen_server_moves_no_deadline(
    link: NatsLink, nats_server: NatsServer, until: Until, forgetful: None
) -> None:
    """Its port answers, so others may be served behind it for all that we know."""
    async with await taken(leases_of(link, cut_off="auto")) as lease:
        deadlines = Deadlines(lease)
        nats_server.pause()
        await link.client.force_reconnect()
        await until(lambda: not link.connected)
        told = deadlines.told[-1]
        assert not await link.refused_everywhere(5)
        await until(lambda: lease.expired)
        assert not link.connected
        assert deadlines.told[-1] == told
        nats_server.resume()
        await until(deadlines.later_than(told[0]))
        assert not lease.lost.done()
