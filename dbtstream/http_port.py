"""One small HTTP port: /livez, /readyz, /metrics, and nothing else.

Layer 2. It answers from threads of its own, so that /livez can say that the event loop hangs.
It is not behind anything: a request has one line and headers of some kilobytes, has to come and
to be taken within seconds, and only a few are served at one time. Whoever else connects is
hung up on. A connection serves one request.
"""

import contextlib
import http
import json
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 16 * 1024
MAX_CONNECTIONS = 8
READ_S = 5.0
WRITE_S = 10.0
POLL_S = 0.5
"""How often the accepting thread looks whether it is to end."""


@dataclass(frozen=True, slots=True)
class Answer:
    """`body` with its type."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"

    @classmethod
    def text(cls, status: int, text: str) -> "Answer":
        return cls(status, f"{text}\n".encode())

    @classmethod
    def json(cls, status: int, value: Any) -> "Answer":
        return cls(status, json.dumps(value).encode() + b"\n", "application/json")


Route = Callable[[Mapping[str, str]], Answer]
"""From the request's headers, with lower-case names. Called in a thread of the port."""


class HttpPort:
    """Listens from when it is made until `close`. Raises OSError when it cannot."""

    def __init__(self, host: str, port: int, routes: Mapping[str, Route]) -> None:
        self._server = _Server(host, port, routes)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(POLL_S,), name="http port", daemon=True
        )
        self._thread.start()

    @property
    def address(self) -> str:
        """As in a URL, with the port that the system chose for 0."""
        host, port, *_ = self._server.server_address
        text = host.decode() if isinstance(host, bytes | bytearray) else str(host)
        return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"

    def close(self) -> None:
        """No new connection; those that are served have their limits. Blocks, POLL_S at most."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(READ_S)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, host: str, port: int, routes: Mapping[str, Route]) -> None:
        self.routes = routes
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("an HTTP connection broke", extra={"action": "http.connection"})


class _Handler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        head = _read_head(self.request)
        if head is None:
            return
        method, answer = self._answer(head)
        reply = [
            f"HTTP/1.1 {answer.status} {http.HTTPStatus(answer.status).phrase}",
            f"Content-Type: {answer.content_type}",
            f"Content-Length: {len(answer.body)}",
            "Cache-Control: no-store",
            "Connection: close",
            *(["Allow: GET, HEAD"] if answer.status == http.HTTPStatus.METHOD_NOT_ALLOWED else []),
        ]
        self.request.settimeout(WRITE_S)  # of all of it
        body = b"" if method == "HEAD" else answer.body
        with contextlib.suppress(OSError):
            self.request.sendall("\r\n".join([*reply, "", ""]).encode() + body)

    def _answer(self, head: str) -> tuple[str, Answer]:
        line, *lines = head.split("\r\n")
        words = line.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return "", Answer.text(400, "this is not HTTP/1")
        method, path = words[0], words[1].partition("?")[0]
        if method not in ("GET", "HEAD"):
            return method, Answer.text(405, "only GET and HEAD")
        if (route := self.server.routes.get(path)) is None:
            return method, Answer.text(404, f"there are {', '.join(self.server.routes)}")
        pairs = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        try:
            return method, route(headers)
        except Exception:
            logger.exception(
                "an HTTP request could not be answered",
                extra={"action": "http.failed", "path": path},
            )
            return method, Answer.text(500, "something went wrong; the log says what")


def _read_head(connection: socket.socket) -> str | None:
    """To the empty line; None if it does not come in time, or is too long."""
    give_up_at = time.monotonic() + READ_S
    data = b""
    with contextlib.suppress(OSError):
        while (left_s := give_up_at - time.monotonic()) > 0 and len(data) < MAX_HEAD_BYTES:
            connection.settimeout(left_s)
            piece = connection.recv(4096)
            data += piece
            head, end, _ = data.partition(b"\r\n\r\n")
            if end:
                return head.decode("latin-1")
            if not piece:
                break
    return None
