"""Runs forked from a template, spoken to without asyncio: for the tests of the dbt child.

A template is begun for each interpreter and environment that it may depend on, as the daemon
does, and serves all tests of the session. What they get is like a `subprocess.Popen`.
"""

import array
import json
import os
import socket
import subprocess
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from dbtstream.template import (
    CHILD,
    MAX_MESSAGE_BYTES,
    Exited,
    Forked,
    Message,
    Ready,
    decoder,
    surroundings,
)
from dbtstream.templates import import_environment

MAX_TEMPLATES = 2
FD_BYTES = array.array("i").itemsize


class RefusedToFork(Exception):
    """The daemon would start this run cold."""


class ForkedChild:
    """What the tests use of a Popen."""

    def __init__(self, template: "SyncTemplate", pid: int, stdin: BinaryIO) -> None:
        self._template, self.pid, self.stdin = template, pid, stdin

    def poll(self) -> int | None:
        return self._template.code_of(self.pid, block=False)

    def wait(self) -> int:
        code = self._template.code_of(self.pid, block=True)
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(9)


class SyncTemplate:
    def __init__(self, python: Sequence[str], environment: Mapping[str, str]) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._codes: dict[int, int] = {}
        with theirs:
            self._process = subprocess.Popen(
                [*python, str(CHILD), "--template", str(theirs.fileno()), "10000"],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                cwd="/",
                env=dict(environment),
                start_new_session=True,
            )
        first, _ = self._receive()
        if not isinstance(first, Ready):
            self.close()
            raise RefusedToFork(first)

    def fork(
        self, folder: Path, environment: Mapping[str, str], frames: int, output: int
    ) -> ForkedChild:
        control, ours = os.pipe()
        rights = array.array("i", [control, frames, output])
        message = json.dumps({"t": "fork", "id": 1}).encode()
        self._channel.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        os.close(control)
        answer, fds = self._receive()
        while isinstance(answer, Exited):
            self._codes[answer.pid] = answer.code
            answer, fds = self._receive()
        for fd in fds:
            os.close(fd)
        if not isinstance(answer, Forked):
            os.close(ours)
            raise RefusedToFork(answer)
        stdin = os.fdopen(ours, "wb")
        stdin.write(surroundings(str(folder), environment))
        return ForkedChild(self, answer.pid, stdin)

    def code_of(self, pid: int, *, block: bool) -> int | None:
        self._channel.setblocking(block)
        try:
            while pid not in self._codes:
                message, _ = self._receive()
                assert isinstance(message, Exited)
                self._codes[message.pid] = message.code
        except BlockingIOError:
            return None
        finally:
            self._channel.setblocking(True)
        return self._codes[pid]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._channel.close()

    def _receive(self) -> tuple[Message, list[int]]:
        data, ancillary, _, _ = self._channel.recvmsg(
            MAX_MESSAGE_BYTES, socket.CMSG_SPACE(FD_BYTES), socket.MSG_CMSG_CLOEXEC
        )
        fds = array.array("i")
        for _, _, payload in ancillary:
            fds.frombytes(payload)
        return decoder.decode(data), list(fds)


class WarmChildren:
    """The templates of a session; `close` at its end."""

    def __init__(self) -> None:
        self._templates: OrderedDict[str, SyncTemplate] = OrderedDict()
        self._old: list[SyncTemplate] = []

    def fork(
        self,
        python: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        frames: int,
        output: int,
    ) -> ForkedChild:
        """Raises RefusedToFork."""
        template = self._template(python, environment)
        try:
            return template.fork(folder, environment, frames, output)
        except RefusedToFork:  # somebody has installed something meanwhile
            self._old += self._templates.values()  # they have to tell how their children ended
            self._templates.clear()
            return self._template(python, environment).fork(folder, environment, frames, output)

    def _template(self, python: Sequence[str], environment: Mapping[str, str]) -> SyncTemplate:
        wanted = import_environment(environment, ())
        key = json.dumps([python, wanted], sort_keys=True)
        if key not in self._templates:
            while len(self._templates) >= MAX_TEMPLATES:
                # Not the first one: that is the plain one, which most tests use.
                self._templates.popitem(last=True)[1].close()
            self._templates[key] = SyncTemplate(python, wanted)
        return self._templates[key]

    def close(self) -> None:
        for template in (*self._templates.values(), *self._old):
            template.close()
