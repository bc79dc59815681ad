"""One lasting connection to NATS: made, watched, made anew. `nats_link` asks over it.

What nats-py 2.16 does not do by itself, and this does:
* a first connect that waits for the server, and says so once;
* a new client when nats-py closed its own for good, which it does on any `-ERR` that is not
  about permissions, whatever `max_reconnect_attempts` (seen on an auth reload);
* a new client, with secrets and addresses read again, when the old one stays away too long;
* a request that was in flight when the connection broke fails then, not at its timeout;
* a denied publish fails with the server's words, not with a timeout;
* telling an outage of the servers from one of the network between (`refused_everywhere`).
"""

import asyncio
import contextlib
import logging
import random
import socket
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import nats.errors
from nats.aio.client import Client
from nats.js import JetStreamContext

from dbtstream.config import NatsConfig
from dbtstream.errors import ConfigError, NatsError, NatsUnavailable
from dbtstream.nats_auth import connect_options
from dbtstream.nats_client import NatsClient
from dbtstream.nats_errors import translate

logger = logging.getLogger(__name__)

PING_INTERVAL_S = 10
MAX_OUTSTANDING_PINGS = 2  # a frozen server is noticed after 20 to 30 s; nats-py's default: 6 min
CLOSE_LIMIT_S = 3.0  # for each of flush and close
REBUILD_AFTER_S = 30
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 5.0

_CONSEQUENCES = (ConnectionResetError, BrokenPipeError, nats.errors.UnexpectedEOF)
"""What follows a refusal that the server has put into words before; the words are kept."""

_DENIED_PUBLISH = 'permissions violation for publish to "'

_PORTS = {"ws": 80, "wss": 443}
_PORT = 4222


class Flight:
    """A request that waits for its answer, so that it can be told that none will come."""

    __slots__ = ("denied", "limit", "lost", "subject")

    def __init__(self, subject: str, limit: asyncio.Timeout) -> None:
        self.subject, self.limit = subject, limit
        self.lost = False
        self.denied: str | None = None

    def end_now(self) -> None:
        if not self.limit.expired():
            self.limit.reschedule(asyncio.get_running_loop().time())


class NatsConnection:
    """Entering starts a supervisor and does not wait for the server; `wait_connected` does.

    Leaving flushes and closes within a limit, connected or not.
    """

    def __init__(
        self, config: NatsConfig, *, name: str, pending_size: int = 0, source: str = ""
    ) -> None:
        self._config = config
        self._name = name
        self._pending_size = pending_size
        self._source = source or "config"
        self._client: Client | None = None
        self._js: JetStreamContext | None = None
        self._up = asyncio.Event()
        self._closed_for_good = asyncio.Event()
        self._changed = asyncio.Condition()
        self._supervisor: asyncio.Task[None] | None = None
        self._crash: BaseException | None = None
        self._flights: set[Flight] = set()
        self._callbacks: list[Callable[[], None]] = []
        self._said_waiting = False
        self._was_up = False
        self._up_since = 0.0
        self._addresses: set[tuple[str, int]] = set()
        self.reconnects = 0
        """Grows with every connection after the first. Pull requests do not outlive one."""
        self.generation = 0
        """Grows with every new client; the subscriptions of the one before are gone."""
        self.last_problem: str | None = None
        """What the server or the library said last, such as a permissions violation."""

    async def __aenter__(self) -> Self:
        # Once now, so that a missing secret stops the start and not the first reconnect.
        await asyncio.to_thread(connect_options, self._config, self._source)
        self._supervisor = asyncio.create_task(self._supervise(), name=f"nats-link {self._name}")
        self._supervisor.add_done_callback(self._on_supervisor_end)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        supervisor, client = self._supervisor, self._client
        self._supervisor = self._client = self._js = None
        self._up.clear()
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.wait([supervisor])
        self._end_flights()
        if client is not None:
            await _close(client)

    # -- being connected ---------------------------------------------------------------

    @property
    def servers(self) -> tuple[str, ...]:
        """The configured URLs without user and password: for logs and errors."""
        return tuple(map(_without_userinfo, self._config.servers))

    @property
    def connected(self) -> bool:
        return self._up.is_set() and self._client is not None and self._client.is_connected

    @property
    def connected_since(self) -> float | None:
        """Loop time when this connection was made; None without one.

        After an answer over it: the server at its other end has run ever since.
        """
        return self._up_since if self.connected else None

    @property
    def client(self) -> Client:
        """nats-py's client. It changes when `generation` does. Raises NatsUnavailable."""
        if self._client is None:
            raise self._unavailable("not connected")
        return self._client

    @property
    def js(self) -> JetStreamContext:
        """Call it inside `translated(...)`. It changes when `generation` does."""
        client = self.client
        if self._js is None:
            self._js = client.jetstream(timeout=self._config.request_timeout_s)
        return self._js

    async def wait_connected(self, timeout_s: float | None = None) -> None:
        """Returns when there is a connection. Raises NatsUnavailable after `timeout_s`."""
        if not self._up.is_set() and not self._said_waiting:
            self._said_waiting = True
            logger.info(
                "waiting for NATS",
                extra={"action": "nats.waiting", "servers": self.servers, "link": self._name},
            )
        if self._supervisor is None:
            raise self._unavailable("the link is closed")
        try:
            async with asyncio.timeout(timeout_s):
                await self._up.wait()
        except TimeoutError:
            raise self._unavailable(f"no connection within {timeout_s:g} s") from None
        if self._crash is not None:
            raise self._crash

    def on_reconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback` called after each reconnect; returns what ends that.

        Subscriptions live on unless `generation` grew; outstanding pull requests never do.
        """
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    async def wait_reconnect(self, seen: int) -> int:
        """Wait until `reconnects` is above `seen`; returns it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.reconnects > seen)
        return self.reconnects

    async def refused_everywhere(self, timeout_s: float) -> bool:
        """Whether each known server, asked now, refuses a TCP connection: none is running.

        No answer, no such host, or one that accepts: False. The known servers are those of
        the config and all that have ever announced themselves; a list that has grown with
        the years makes this False more often, never True.
        """
        self._learn_addresses()
        probes = [_refuses(host, port) for host, port in self._addresses]
        try:
            async with asyncio.timeout(timeout_s):
                return all(await asyncio.gather(*probes))
        except TimeoutError:
            return False

    @contextlib.contextmanager
    def translated(self, operation: str) -> Iterator[None]:
        """`with link.translated("reading X"): await link.js…`: our errors for nats-py's."""
        try:
            yield
        except NatsError:
            raise
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise translate(error, operation, self.servers) from error

    def _unavailable(self, problem: str) -> NatsUnavailable:
        if self.last_problem:
            problem = f"{problem}; last problem: {self.last_problem}"
        return NatsUnavailable(self.servers, problem)

    # -- the supervisor ------------------------------------------------------------------

    async def _supervise(self) -> None:
        """One client after the other, for as long as the link is open."""
        attempt = 0
        while True:
            try:
                await self._live_one_client()
                attempt = 0
            except (nats.errors.Error, TimeoutError, OSError, ConfigError) as error:
                # Our own limit says less than what nats-py reported under it.
                if not (isinstance(error, TimeoutError) and self.last_problem):
                    self._note(error)
                attempt += 1
            await asyncio.sleep(backoff_s(attempt) if attempt else 0)

    async def _live_one_client(self) -> None:
        """Connect, and return when nats-py has closed the client for good."""
        options = await asyncio.to_thread(connect_options, self._config, self._source)
        client = NatsClient()
        self._closed_for_good.clear()

        async def on_disconnect() -> None:
            if self._client is client:
                self._down()

        async def on_reconnected() -> None:
            if self._client is client:
                await self._back()

        async def on_closed() -> None:
            if self._client is client:
                self._closed_for_good.set()

        try:
            # nats-py's own first connect would try for ever, with the same secrets and DNS.
            async with asyncio.timeout(4 * self._config.connect_timeout_s):
                await client.connect(
                    **options,
                    name=self._name,
                    error_cb=self._on_error,
                    disconnected_cb=on_disconnect,
                    reconnected_cb=on_reconnected,
                    closed_cb=on_closed,
                    max_reconnect_attempts=-1,
                    # Jittered: the workers of one broker must not come back in step.
                    reconnect_time_wait=self._config.reconnect_wait_s * random.uniform(0.7, 1.5),  # type: ignore[arg-type]  # noqa: S311  # any number does
                    ping_interval=PING_INTERVAL_S,
                    max_outstanding_pings=MAX_OUTSTANDING_PINGS,
                    pending_size=self._pending_size,
                )
            self._client, self._js = client, None
            self.generation += 1
            await self._back()
            await self._wait_useless(client)
            logger.warning(
                "making a new NATS connection",
                extra={"action": "nats.rebuild", "problem": self.last_problem},
            )
        finally:
            if self._client is client:
                self._down()
                self._client = self._js = None
                await _close(client)
            elif not client.is_connected:
                await _close(client)

    async def _wait_useless(self, client: Client) -> None:
        """Until nats-py closed the client, or could not bring it back for a while.

        The second, because it reconnects with the secrets of its first connect.
        """
        down_for = 0
        while not client.is_closed and down_for < REBUILD_AFTER_S:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._closed_for_good.wait()
            down_for = 0 if client.is_connected else down_for + 1

    def _learn_addresses(self) -> None:
        """Before a client goes, and with it what it was told of the cluster."""
        self._addresses |= set(map(_address, self._config.servers))
        if self._client is not None:
            self._addresses |= {_address(url.geturl()) for url in self._client.servers}

    def _down(self) -> None:
        self._learn_addresses()
        if self._up.is_set():
            logger.warning(
                "lost the NATS connection",
                extra={"action": "nats.down", "link": self._name, "servers": self.servers},
            )
        self._up.clear()
        self._end_flights()

    async def _back(self) -> None:
        url = self.client.connected_url
        logger.info(
            "connected to NATS",
            extra={
                "action": "nats.up",
                "link": self._name,
                "server": _without_userinfo(url.geturl()) if url else None,
            },
        )
        self.last_problem = None
        self._said_waiting = False
        self._up_since = asyncio.get_running_loop().time()
        self._up.set()
        if not self._was_up:
            self._was_up = True
            return
        self.reconnects += 1
        async with self._changed:
            self._changed.notify_all()
        for callback in list(self._callbacks):
            try:
                callback()
            except Exception:
                # nats-py's reconnecting runs us; it would stop half way.
                logger.exception("a reconnect callback failed", extra={"action": "nats.callback"})

    async def _on_error(self, error: Exception) -> None:
        self._note(error)
        text = str(error)
        at = text.lower().find(_DENIED_PUBLISH)
        if at >= 0:
            # nats-py lower-cases the server's words, the subject among them.
            subject = text[at + len(_DENIED_PUBLISH) :].rstrip('"').lower()
            for flight in self._flights:
                if flight.subject.lower() == subject:
                    flight.denied = text.removeprefix("nats: ")
                    flight.end_now()

    def _note(self, error: BaseException) -> None:
        if isinstance(error, _CONSEQUENCES) and self.last_problem:
            return
        text = str(error).removeprefix("nats: ") or type(error).__name__
        if text != self.last_problem:
            logger.warning(
                "NATS reports a problem",
                extra={"action": "nats.problem", "link": self._name, "problem": text},
            )
        self.last_problem = text

    def _end_flights(self) -> None:
        for flight in self._flights:
            flight.lost = True
            flight.end_now()

    def _on_supervisor_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (crash := task.exception()):
            logger.error("the NATS supervisor died", exc_info=crash, extra={"action": "nats.crash"})
            self._crash = crash
            self._up.set()


def backoff_s(attempt: int) -> float:
    """How long to wait after the `attempt`-th failure: doubling, capped, jittered."""
    full = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * float(2 ** min(attempt - 1, 10)))
    return full * random.uniform(0.7, 1.3)  # noqa: S311  # not for secrets


_CLOSE_ERRORS = (
    nats.errors.Error,
    OSError,
    TimeoutError,
    AssertionError,  # nats-py's answer when connect had not got far
    RuntimeError,  # uvloop's, when nats-py flushes to a transport that is closed already
)


async def _close(client: Client) -> None:
    """Send what is buffered if it can, close in any case, and never hang or raise.

    Not nats-py's drain: cut short, it leaves futures that nobody collects.
    """
    for end in (client.flush, client.close):
        if client.is_closed or (end == client.flush and not client.is_connected):
            continue
        with contextlib.suppress(*_CLOSE_ERRORS):
            async with asyncio.timeout(CLOSE_LIMIT_S):
                await end()


async def _refuses(host: str, port: int) -> bool:
    """Whether every address of this name answers that nobody listens there."""
    loop = asyncio.get_running_loop()
    try:
        # ADDRCONFIG: without an IPv6 route, an IPv6 address would not refuse but be unreachable.
        found = await loop.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
        )
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setblocking(False)
                try:
                    await loop.sock_connect(probe, address)
                except ConnectionRefusedError:
                    continue
            return False
    except OSError:
        return False
    return bool(found)


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    return parts.hostname or "", parts.port or _PORTS.get(parts.scheme, _PORT)


def _without_userinfo(url: str) -> str:
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
