"""Subscribers that nobody would wish for, each a process: one that never reads, one that dies.

They speak to nats-server over a bare socket with a tiny buffer, and subscribe to all there is:
live events, the events as they are published, and a consumer that pushes what is stored.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from dbtstream.nats_link import NatsLink
from dbtstream.subjects import EVENTS, EVENTS_STREAM, LIVE

SUBSCRIBER = """
import socket, sys, time

host, port, *subjects = sys.argv[1:]
nats = socket.socket()
nats.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # the kernel doubles it
nats.connect((host, int(port)))
nats.sendall(b'CONNECT {"verbose": false, "name": "subscriber"}\\r\\n')
for number, subject in enumerate(subjects):
    nats.sendall(b"SUB %s %d\\r\\n" % (subject.encode(), number))
nats.sendall(b"PING\\r\\n")
told = b""
while b"PONG" not in told:
    told += nats.recv(4096)
print("subscribed", flush=True)
while True:
    time.sleep(3600)
"""


class Subscriber:
    """It has subscribed, and reads no more."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    def freeze(self) -> None:
        """SIGSTOP: its socket stays, and nobody is there."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    async def die(self) -> None:
        self.process.kill()
        await self.process.wait()


@asynccontextmanager
async def subscriber(link: NatsLink, url: str, name: str) -> AsyncIterator[Subscriber]:
    """Subscribed when the context begins."""
    pushed = f"pushed.{name}"
    await link.js.add_consumer(
        EVENTS_STREAM,
        ConsumerConfig(
            name=name,
            deliver_subject=pushed,
            deliver_policy=DeliverPolicy.NEW,
            ack_policy=AckPolicy.NONE,
            inactive_threshold=60.0,
        ),
    )
    host, _, port = url.removeprefix("nats://").rpartition(":")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-c", SUBSCRIBER, host, port),
        *(f"{LIVE}.>", f"{EVENTS}.>", pushed),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        if not await process.stdout.readline():
            raise RuntimeError("the subscriber did not get as far as a subscription")
        yield Subscriber(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def bad_subscribers(link: NatsLink, url: str) -> AsyncIterator[Subscriber]:
    """One that never reads; and the one that is to `die` when it is time."""
    async with subscriber(link, url, "frozen") as frozen, subscriber(link, url, "dying") as dying:
        frozen.freeze()
        yield dying
