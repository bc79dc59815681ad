"""One template process, from the daemon's side: start it, have it fork, hear how forks ended.

Layer 2. `templates` decides which templates there are; the other side is `dbt_child.template`.
It is a process of its own, begun by exec, or, where it has a parsed project too, a fork of one
that was; and we speak over a socket that keeps messages apart. A run's descriptors go to it that
way; what the run is about goes past it, into the run's own control pipe, when the kernel has told
that the fork is there.
"""

import array
import asyncio
import contextlib
import itertools
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from dbtstream.forked_process import ForkedProcess

CHILD = Path(__file__).parent / "dbt_child"
READY_S = 120.0
PARSE_S = 900.0
MAX_ANSWER_BYTES = 64 * 1024
MAX_MESSAGE_BYTES = 64 * 1024
TAIL_BYTES = 4096
MAX_DETAIL = 300

FORK_S = 5.0
"""A template does nothing but wait for us, so one that does not answer for so long hangs."""

_LENGTH = struct.Struct(">I")
_FD_BYTES = array.array("i").itemsize


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="ready"):
    reads: list[str]  # names in the environment that imports have read; a final * is any ending
    adapters: list[str]  # that are imported


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="refused"):
    """It is of no use, and leaves."""

    reason: str
    detail: str


class Forked(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="forked"):
    """Comes with a descriptor of the process. `last`: why no other one follows."""

    id: int
    pid: int
    last: str | None


class Cold(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="cold"):
    """It has not forked, and this is why; where `last`, it will not fork again."""

    id: int
    reason: str
    detail: str
    last: bool


class Exited(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", tag="exited"):
    pid: int
    code: int


class _Answer(msgspec.Struct, frozen=True):
    """Of a parser; without a reason, it is done."""

    reason: str
    detail: str


Message = Ready | Refused | Forked | Cold | Exited
decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


@dataclass(frozen=True, slots=True)
class Key:
    """An interpreter, and that of an environment which its imports may depend on."""

    python: str
    environment: tuple[tuple[str, str], ...]


class NoFork(Exception):
    """A run has to start cold. `detail` is for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


@dataclass(frozen=True, slots=True)
class _Asked:
    """Our ends of what a fork is to be given."""

    answer: asyncio.Future[ForkedProcess]
    stdin: asyncio.StreamWriter
    stdout: asyncio.StreamReader
    output: asyncio.BaseTransport

    def close(self) -> None:
        self.stdin.close()
        self.output.close()


class Template:
    """`start` once, `close` always. `note_reads` hears what imports read of the environment."""

    def __init__(self, key: Key, note_reads: Callable[[Key, Iterable[str]], None]) -> None:
        self.key = key
        self.pid = 0
        self.start_s = 0.0
        self.forks = 0
        self.was_ready = False
        self._note_reads = note_reads
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._no_more: asyncio.Future[NoFork] = self._loop.create_future()
        self._last_ended = asyncio.Event()
        self._last_ended.set()
        self._numbers = itertools.count(1)
        self._asked: dict[int, _Asked] = {}
        self._forked: dict[int, ForkedProcess] = {}
        self._adapters: set[str] = set()
        self._channel: socket.socket | None = None
        self._process: asyncio.subprocess.Process | ForkedProcess | None = None
        self._output: asyncio.BaseTransport | None = None
        self._drain: asyncio.Task[None] | None = None
        self._tail = b""

    @property
    def is_ready(self) -> bool:
        return self._ready.done() and not self._no_more.done()

    async def start(self, max_runs: int, *, parent: "Template | None" = None, of: str = "") -> None:
        """Until runs can be forked from it; with a `parent`, as a fork of that which has what was
        parsed into the folder `of`. Raises NoFork."""
        began = time.monotonic()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._channel = ours
        with theirs:
            if parent is None:
                self._process = await self._exec(theirs.fileno(), max_runs)
            else:
                wish = {"folder": of, "max_runs": max_runs}
                process = await parent.fork_as("template", theirs.fileno(), _line(wish), FORK_S)
                self._process = process
                self._follow_output(process.stdout)
        self.pid = self._process.pid
        self._loop.add_reader(ours, self._hear)
        either: set[asyncio.Future[Any]] = {self._ready, self._no_more}
        await asyncio.wait(either, timeout=READY_S, return_when=asyncio.FIRST_COMPLETED)
        if self._no_more.done():
            raise self._no_more.result()
        if not self._ready.done():
            raise NoFork("not_ready", f"within {READY_S:g} s")
        self.was_ready = True
        self.start_s = time.monotonic() - began

    async def _exec(self, channel: int, max_runs: int) -> asyncio.subprocess.Process:
        # A pipe of ours: what it leaves behind for its runs may hold the other end for longer.
        reading, writing = os.pipe()
        said = asyncio.StreamReader()
        self._output, _ = await self._loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(said), os.fdopen(reading, "rb", 0)
        )
        with os.fdopen(writing, "wb", 0) as output:
            try:
                process = await asyncio.create_subprocess_exec(
                    self.key.python,
                    str(CHILD),
                    "--template",
                    str(channel),
                    str(max_runs),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=asyncio.subprocess.STDOUT,
                    pass_fds=(channel,),
                    cwd="/",
                    env=dict(self.key.environment),
                    start_new_session=True,
                )
            except OSError as error:
                raise NoFork("not_started", error.strerror or str(error)) from error
        self._follow_output(said)
        return process

    async def no_more(self) -> NoFork:
        """Wait until no run can be forked from it: why."""
        return await asyncio.shield(self._no_more)

    async def last_run_ended(self) -> None:
        """Those that are forked from it; it is there to tell how they ended."""
        await self._last_ended.wait()

    def retire(self, reason: str) -> None:
        """No more runs, please."""
        self._end(NoFork(reason))

    def import_adapter(self, adapter: str) -> None:
        if self.is_ready and adapter not in self._adapters:
            self._adapters.add(adapter)
            self._ready = self._loop.create_future()
            self._send({"t": "import", "adapter": adapter})

    def look(self) -> None:
        """Something may have changed: it ends if that is so."""
        if self.is_ready:
            with contextlib.suppress(NoFork):
                self._send({"t": "check"})

    async def fork(
        self, folder: str, environment: Mapping[str, str], frames: int, limit_s: float
    ) -> ForkedProcess:
        """A process with that environment that writes to `frames`. Raises NoFork."""
        return await self.fork_as("run", frames, surroundings(folder, environment), limit_s)

    async def parse(
        self, folder: str, environment: Mapping[str, str], wish: dict[str, object]
    ) -> None:
        """Have a project parsed by a fork that ends then (`dbt_child.parse`). Raises NoFork."""
        reading, writing = os.pipe()
        answer = asyncio.StreamReader()
        pipe, _ = await self._loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(answer), os.fdopen(reading, "rb", 0)
        )
        try:
            try:
                about = surroundings(folder, environment) + _line(wish)
                process = await self.fork_as("parser", writing, about, FORK_S)
            finally:
                os.close(writing)
            try:
                await _parsed(process, answer)
            finally:
                process.kill_group()
                await asyncio.shield(process.wait())
                _let_go(process)
        finally:
            pipe.close()

    async def fork_as(self, role: str, fd: int, about: bytes, limit_s: float) -> ForkedProcess:
        """A process that has `fd`, and reads what it is about. Raises NoFork."""
        control, ours = os.pipe()
        theirs, output = os.pipe()
        try:
            asked = await self._ask_for(ours, theirs)
            number = next(self._numbers)
            self._asked[number] = asked
            try:
                self._send({"t": "fork", "id": number, "as": role}, (control, fd, output))
                async with asyncio.timeout(limit_s):
                    process = await asked.answer
            except BaseException as error:
                asked.close()  # a fork that is on its way finds its control pipe closed
                if isinstance(error, TimeoutError):
                    self._end(NoFork("hung", f"no answer within {limit_s:g} s"))
                    self._kill()
                    raise NoFork("hung") from None
                raise
            finally:
                del self._asked[number]
        finally:
            os.close(control)
            os.close(output)
        asked.stdin.write(about)
        self.forks += 1
        return process

    async def close(self) -> None:
        """It is gone afterwards; its runs, if there are any, go on without it."""
        self._end(NoFork("closed"))
        self._kill()
        if self._process is not None:
            await self._process.wait()
        if self._drain is not None:
            self._drain.cancel()
            await asyncio.wait({self._drain})
        if self._output is not None:
            self._output.close()
        if isinstance(self._process, ForkedProcess):
            _let_go(self._process)
        self._hang_up()

    # What it says.

    def _hear(self) -> None:
        """All messages that are there."""
        while self._channel is not None:
            try:
                data, fds = self._receive(self._channel)
            except BlockingIOError:
                return
            except OSError:
                data, fds = b"", []
            if not data:
                self._hang_up()
                return
            try:
                self._take(decoder.decode(data), fds)
            except msgspec.DecodeError as error:
                self._end(NoFork("died", f"it makes no sense: {error}"))
                self._kill()
            finally:
                for fd in fds:
                    os.close(fd)

    def _receive(self, channel: socket.socket) -> tuple[bytes, list[int]]:
        data, ancillary, _, _ = channel.recvmsg(
            MAX_MESSAGE_BYTES, socket.CMSG_SPACE(_FD_BYTES), socket.MSG_CMSG_CLOEXEC
        )
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % _FD_BYTES])
        return data, list(fds)

    def _take(self, message: Message, fds: list[int]) -> None:
        match message:
            case Ready():
                self._note_reads(self.key, message.reads)
                self._adapters.update(message.adapters)
                if not self._ready.done():
                    self._ready.set_result(None)
            case Refused():
                self._end(NoFork(message.reason, message.detail))
            case Forked():
                self._take_fork(message, fds.pop())
            case Cold():
                problem = NoFork(message.reason, message.detail)
                if (asked := self._asked.get(message.id)) and not asked.answer.done():
                    asked.answer.set_exception(problem)
                if message.last:
                    self._end(problem)
            case Exited():
                if process := self._forked.pop(message.pid, None):
                    process.exited(message.code)
                if not self._forked:
                    self._last_ended.set()

    def _take_fork(self, message: Forked, pidfd: int) -> None:
        asked = self._asked.get(message.id)
        if asked is None or asked.answer.done():  # given up; it finds its control pipe closed
            os.close(pidfd)
        else:
            process = ForkedProcess(message.pid, pidfd, asked.stdin, asked.stdout, asked.output)
            self._forked[message.pid] = process
            self._last_ended.clear()
            asked.answer.set_result(process)
        if message.last is not None:
            self._end(NoFork(message.last))

    # Smaller things.

    async def _ask_for(self, ours: int, theirs: int) -> _Asked:
        """Streams of our ends of the control and output pipes."""
        protocol = asyncio.StreamReaderProtocol(asyncio.StreamReader())
        control, _ = await self._loop.connect_write_pipe(lambda: protocol, os.fdopen(ours, "wb", 0))
        stdin = asyncio.StreamWriter(control, protocol, None, self._loop)
        stdout = asyncio.StreamReader()
        output, _ = await self._loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stdout), os.fdopen(theirs, "rb", 0)
        )
        return _Asked(self._loop.create_future(), stdin, stdout, output)

    def _send(self, message: dict[str, object], fds: tuple[int, ...] = ()) -> None:
        """Raises NoFork."""
        if self._channel is None or self._no_more.done():
            raise NoFork("died")
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._channel.sendmsg([msgspec.json.encode(message)], rights)
        except OSError as error:
            reason = "hung" if isinstance(error, BlockingIOError) else "died"
            self._end(NoFork(reason, str(error)))
            raise NoFork(reason, str(error)) from error

    def _end(self, why: NoFork) -> None:
        """The first reason counts. Whoever waits for a fork starts cold."""
        if not self._no_more.done():
            self._no_more.set_result(why)

    def _hang_up(self) -> None:
        """It has closed its end, which it does by ending."""
        if self._channel is None:
            return
        self._loop.remove_reader(self._channel)
        self._channel.close()
        self._channel = None
        self._end(NoFork("died", self._tail.decode("utf-8", "replace")[-300:]))
        for asked in self._asked.values():
            if not asked.answer.done():
                asked.answer.set_exception(NoFork("died"))
        forked, self._forked = self._forked, {}
        for process in forked.values():
            process.orphaned()
        self._last_ended.set()

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)

    def _follow_output(self, said: asyncio.StreamReader | None) -> None:
        if said is not None:
            self._drain = asyncio.create_task(self._keep_tail(said), name="output of a template")

    async def _keep_tail(self, said: asyncio.StreamReader) -> None:
        while chunk := await said.read(4096):
            self._tail = (self._tail + chunk)[-TAIL_BYTES:]


async def _parsed(process: ForkedProcess, answer: asyncio.StreamReader) -> None:
    """Its answer, when it has one. Raises NoFork."""
    output = asyncio.create_task(_pass_over(process.stdout), name="output of a parser")
    try:
        async with asyncio.timeout(PARSE_S):
            said = await answer.read(MAX_ANSWER_BYTES)
            while part := await answer.read(MAX_ANSWER_BYTES):
                said += part
        if not said:
            raise NoFork("parser_died")  # its output is not scrubbed of secrets
    except TimeoutError:
        raise NoFork("parse_hung", f"not done within {PARSE_S:g} s") from None
    finally:
        output.cancel()
        await asyncio.wait({output})
    no = msgspec.json.decode(said, type=_Answer)
    if no.reason:
        raise NoFork(no.reason, no.detail[:MAX_DETAIL])


async def _pass_over(output: asyncio.StreamReader | None) -> None:
    """Keep reading, whatever dbt prints: a full pipe would stop it."""
    while output is not None and await output.read(65536):
        pass


def _let_go(process: ForkedProcess) -> None:
    """Of our ends of its pipes."""
    if process.stdin is not None:
        process.stdin.close()
    process.close()


def _line(wish: Mapping[str, object]) -> bytes:
    return msgspec.json.encode(wish) + b"\n"


def surroundings(folder: str, environment: Mapping[str, str]) -> bytes:
    """What a fork reads before its `Start`."""
    pairs = [f"{name}={value}" for name, value in environment.items()]
    body = b"\0".join(map(os.fsencode, [folder, *pairs]))
    return _LENGTH.pack(len(body)) + body
