"""Where OpenLineage messages can go: a subject of NATS, or an HTTP endpoint. One at a time.

`openlineage` decides what follows from an answer; here it is only told apart whether a message
may be tried again (`NotNow`) or will never be taken (`Refused`).

HTTP is spoken by the standard library, in a thread of its own over a connection that is kept:
there is never more than one POST under way, and no client library would do it with less.
"""

import asyncio
import contextlib
import http.client
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

import dbtstream
from dbtstream.config import OpenLineageConfig
from dbtstream.errors import NatsError
from dbtstream.nats_errors import JetStreamRefused, NobodyListens
from dbtstream.nats_link import NatsLink
from dbtstream.subjects import H_CONTENT_TYPE, H_MSG_ID

MAX_ANSWER = 64 * 1024
MAX_SAID = 300
LONGEST_RETRY_AFTER_S = 300.0
CLOSE_S = 1.0

ABOUT_US = frozenset({401, 402, 403, 404, 405, 407, 408, 421, 423, 425, 426, 429, 451})
"""4xx that say who or where we are, or when to come: a person or time can mend that, so the
message waits. All others are about the message, which would be refused for ever."""


class NotNow(Exception):
    """Nothing is wrong with the message."""

    def __init__(self, problem: str, retry_after_s: float = 0.0) -> None:
        self.problem, self.retry_after_s = problem, retry_after_s
        super().__init__(problem)


class Refused(Exception):
    """This message will never be taken."""


class Sink(Protocol):
    name: str
    address: str

    async def send(self, message_id: str, body: bytes) -> None:
        """Raises NotNow, Refused. The same message may be sent again."""

    async def close(self) -> None: ...


class NatsSink:
    """Stored by whatever stream has the subject; that is the user's own."""

    name = "nats"

    def __init__(self, link: NatsLink, subject: str) -> None:
        self.address = subject
        self._link = link

    async def send(self, message_id: str, body: bytes) -> None:
        headers = {H_MSG_ID: message_id, H_CONTENT_TYPE: "application/json"}
        try:
            await self._link.publish(self.address, body, headers)
        except NobodyListens:
            raise NotNow(
                f"no stream takes {self.address} (make one: "
                f"nats stream add OPENLINEAGE --subjects {self.address})"
            ) from None
        except JetStreamRefused as error:
            if error.about_message:
                raise Refused(str(error)) from error
            raise NotNow(str(error)) from error
        except NatsError as error:
            raise NotNow(str(error)) from error

    async def close(self) -> None:
        """The link is the daemon's."""


class _Answer(NamedTuple):
    status: int
    text: str
    retry_after_s: float


class HttpSink:
    name = "http"

    def __init__(self, config: OpenLineageConfig, api_key: str | None) -> None:
        base = (config.url or "").rstrip("/")
        self.address = f"{base}/{config.endpoint.lstrip('/')}"
        self._config = config
        self._headers = {
            "Content-Type": "application/json",
            "User-Agent": f"dbtstream/{dbtstream.__version__}",
            **({"Authorization": f"Bearer {api_key}"} if api_key else {}),
            **config.headers,
        }
        self._connection: http.client.HTTPConnection | None = None
        self._call = 0  # of what is waited for; the thread may still be in an earlier one
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="openlineage")

    async def send(self, message_id: str, body: bytes) -> None:
        loop = asyncio.get_running_loop()
        limit_s = self._config.timeout_s
        self._call += 1
        try:
            async with asyncio.timeout(limit_s):
                answer = await loop.run_in_executor(self._thread, self._post, body, self._call)
        except TimeoutError:
            self._hang_up()
            raise NotNow(f"no answer within {limit_s:g} s") from None
        except asyncio.CancelledError:
            self._hang_up()
            raise
        except (OSError, http.client.HTTPException) as error:
            raise NotNow(str(error) or type(error).__name__) from error
        if 200 <= answer.status < 300:
            return
        problem = f"HTTP {answer.status} {answer.text}".strip()
        if 400 <= answer.status < 500 and answer.status not in ABOUT_US:
            raise Refused(problem)
        if 300 <= answer.status < 400:
            problem += " (redirects are not followed: set `url` to where it leads)"
        raise NotNow(problem, answer.retry_after_s)

    async def close(self) -> None:
        self._hang_up()
        dropped = asyncio.get_running_loop().run_in_executor(self._thread, self._drop)
        await asyncio.wait({dropped}, timeout=CLOSE_S)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _hang_up(self) -> None:
        """Wakes the thread, if it waits for the server."""
        self._call += 1
        connection = self._connection
        if connection is not None and connection.sock is not None:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    # In the thread.

    def _post(self, body: bytes, call: int) -> _Answer:
        kept = self._connection is not None
        try:
            return self._exchange(body)
        except (OSError, http.client.HTTPException):
            self._drop()
            if not kept or call != self._call:
                raise
        # The server has closed a connection that was idle: that is no outage.
        try:
            return self._exchange(body)
        except BaseException:
            self._drop()
            raise

    def _exchange(self, body: bytes) -> _Answer:
        if self._connection is None:
            self._connection = self._connect()
        path = urlsplit(self.address).path
        self._connection.request("POST", path, body, self._headers)
        response = self._connection.getresponse()
        text = response.read(MAX_ANSWER).decode("utf-8", "replace")
        if not response.isclosed() or response.will_close:
            self._drop()  # more follows, or nothing ever will
        said = " ".join(text.split())[:MAX_SAID] or response.reason
        return _Answer(response.status, said, _seconds(response.headers.get("Retry-After")))

    def _connect(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.address)
        host, timeout = parts.hostname or "", self._config.timeout_s
        if parts.scheme == "http":
            return http.client.HTTPConnection(host, parts.port, timeout=timeout)
        context = ssl.create_default_context(cafile=self._config.tls_ca_file)
        return http.client.HTTPSConnection(host, parts.port, timeout=timeout, context=context)

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _seconds(retry_after: str | None) -> float:
    """A date is not understood, and then it is our own pace."""
    if retry_after is None or not retry_after.strip().isdecimal():
        return 0.0
    return min(float(retry_after), LONGEST_RETRY_AFTER_S)
