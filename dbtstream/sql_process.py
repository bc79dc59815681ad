"""The SQL reader as the daemon sees it: ask, and get an answer in time, whatever happens.

Layer 2. sqlglot runs in a process of its own (`sql_child`), begun with the first question, ended
when there are none for a while. One question at a time, in the order in which they came; one that
takes too long costs the process, and the next begins another. Answers are kept by
`analysis_key`, so that in the steady state nothing is read at all. Never imports sqlglot.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections import OrderedDict, deque
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from dbtstream.column_lineage import (
    LENGTH,
    MAX_SQL_BYTES,
    PARSER,
    Analysis,
    AnalysisRequest,
    analysis_key,
    sql_bytes,
    too_large,
)
from dbtstream.statuses import ColumnLineageStatus

logger = logging.getLogger(__name__)

CACHE_BYTES = 16 * 1024 * 1024
MEMORY_BYTES = 1024 * 1024 * 1024
IDLE_S = 300.0
START_S = 30.0
"""To import sqlglot: 0.2 s of CPU, but dbt and the daemon come first."""

MAX_BACK_OFF_S = 60.0
TOO_SLOW_S = 3600.0
"""SQL that took too long is not read again for so long: it would cost each run its time limit."""
MAX_TOO_SLOW = 1000
MAX_ANSWER_BYTES = 64 * 1024 * 1024
TAIL_BYTES = 4096
PASS_ENV = ("PATH", "LANG", "LC_", "TZ", "TMPDIR", "PYTHON", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
"""The process gets what Python needs to start. None of it is secret."""

_ROOT = Path(__file__).resolve().parent.parent
_KEPT = (
    ColumnLineageStatus.COMPLETE,
    ColumnLineageStatus.PARTIAL,
    ColumnLineageStatus.UNSUPPORTED,
)


@dataclass
class ReaderStats:
    """`sent` are answers of the process or from memory; `failed` those that we had to make up.
    Together they are `received`, but for questions that were cancelled (`dropped`) or wait."""

    received: int = 0
    sent: int = 0
    failed: int = 0
    dropped: int = 0
    hits: int = 0  # of `sent`
    restarts: int = 0  # a process begun after one that crashed, hung or did not start


class _NoAnswer(Exception):
    """The process cannot be used any more, and why."""


class SqlReader:
    """Use as an async context manager; afterwards the process is gone."""

    def __init__(
        self,
        *,
        idle_s: float = IDLE_S,
        start_s: float = START_S,
        memory_bytes: int = MEMORY_BYTES,
        cache_bytes: int = CACHE_BYTES,
        command: tuple[str, ...] = (sys.executable, "-P", "-m", "dbtstream.sql_child"),
    ) -> None:
        self.stats = ReaderStats()
        self._idle_s, self._start_s = idle_s, start_s
        self._command = (*command, str(memory_bytes))
        self._answers = _Answers(cache_bytes)
        self._too_slow: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """By key: the time limit that was not enough, and until when that is remembered."""
        self._turn = asyncio.Lock()
        self._process: _Process | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._failed_starts = 0
        self._not_before = 0.0
        self._broke = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._idle is not None:
            self._idle.cancel()
        process, self._process = self._process, None
        if process is not None:
            await process.kill()
        await asyncio.gather(*self._ending)

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return self._process.pid if self._process is not None else None

    async def read(self, request: AnalysisRequest, timeout_s: float) -> Analysis:
        """Raises nothing but CancelledError. `timeout_s` is for the reading itself: it begins
        when the questions before this one have been answered."""
        self.stats.received += 1
        try:
            answer = await self._answer(request, timeout_s)
        except asyncio.CancelledError:
            self.stats.dropped += 1
            raise
        except _NoAnswer as failure:
            return self._made_up(request, str(failure))
        except Exception as error:  # noqa: BLE001 - lineage must not be what a run dies of
            return self._made_up(request, f"{type(error).__name__}: {error}")
        self.stats.sent += 1
        return answer

    async def _answer(self, request: AnalysisRequest, timeout_s: float) -> Analysis:
        if (size := sql_bytes(request.sql)) > MAX_SQL_BYTES:
            return too_large(size)
        key = analysis_key(request)
        if (known := self._answers.get(key)) is not None:
            self.stats.hits += 1
            return known
        async with self._turn:
            if (known := self._answers.get(key)) is not None:  # asked by the one before us
                self.stats.hits += 1
                return known
            self._refuse_if_too_slow(key, timeout_s)
            process = await self._ready()
            try:
                async with asyncio.timeout(timeout_s):
                    frame = await process.ask(_encode(request))
                answer = _decode(frame)
            except BaseException as error:
                await self._lose(process)
                if isinstance(error, TimeoutError):
                    self._remember_as_too_slow(key, timeout_s)
                    raise _NoAnswer(f"took longer than {timeout_s:g} s") from None
                if isinstance(error, msgspec.DecodeError):
                    raise _NoAnswer(f"the SQL reader's answer makes no sense: {error}") from None
                raise
            self._retire_later()
            if answer.status in _KEPT:
                self._answers.keep(key, frame)
            return answer

    def _remember_as_too_slow(self, key: str, timeout_s: float) -> None:
        until = asyncio.get_running_loop().time() + TOO_SLOW_S
        self._too_slow[key] = (timeout_s, until)
        if len(self._too_slow) > MAX_TOO_SLOW:
            self._too_slow.popitem(last=False)

    def _refuse_if_too_slow(self, key: str, timeout_s: float) -> None:
        tried_s, until = self._too_slow.get(key, (0.0, 0.0))
        if timeout_s <= tried_s and asyncio.get_running_loop().time() < until:
            raise _NoAnswer(f"took longer than {tried_s:g} s when it was last read")

    async def _ready(self) -> "_Process":
        """The process, begun now if there is none."""
        if self._idle is not None:
            self._idle.cancel()
        process = self._process
        if process is not None and not process.has_ended:
            return process
        if process is not None:  # killed from outside, between two questions
            await self._lose(process)
        loop = asyncio.get_running_loop()
        if loop.time() < self._not_before:
            raise _NoAnswer(f"the SQL reader could not be started {self._failed_starts} times")
        self.stats.restarts += self._broke
        self._broke = False
        self._process = process = await _Process.start(self._command)
        try:
            async with asyncio.timeout(self._start_s):
                await process.hello()
        except BaseException as error:
            await self._lose(process)
            if isinstance(error, asyncio.CancelledError):
                raise
            self._failed_starts += 1
            self._not_before = loop.time() + min(2.0 ** (self._failed_starts - 1), MAX_BACK_OFF_S)
            raise _NoAnswer(f"the SQL reader could not be started: {process.output_tail}") from None
        self._failed_starts = 0
        return process

    async def _lose(self, process: "_Process") -> None:
        """It is of no use any more; also when we are cancelled, since then an answer is due that
        nobody would take."""
        self._process = None
        self._broke = True
        task = asyncio.create_task(process.kill(), name=f"end of SQL reader {process.pid}")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        await asyncio.shield(task)

    def _retire_later(self) -> None:
        self._idle = asyncio.get_running_loop().call_later(self._idle_s, self._retire)

    def _retire(self) -> None:
        """Nothing was asked for a while. The next question begins another process."""
        process = self._process
        if process is None or self._turn.locked():
            return
        self._process = None
        task = asyncio.create_task(process.end(), name=f"end of SQL reader {process.pid}")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def _made_up(self, request: AnalysisRequest, reason: str) -> Analysis:
        self.stats.failed += 1
        logger.warning(
            "a model's column lineage could not be read",
            extra={
                "action": "sql_reader.failed",
                "unique_id": request.unique_id,
                "reason": reason,
            },
        )
        return Analysis(status=ColumnLineageStatus.ERROR, message=reason, parser=PARSER)


class _Answers:
    """What was answered last, encoded, within a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._frames: OrderedDict[str, bytes] = OrderedDict()

    def get(self, key: str) -> Analysis | None:
        frame = self._frames.get(key)
        if frame is None:
            return None
        self._frames.move_to_end(key)
        return _decode(frame)

    def keep(self, key: str, frame: bytes) -> None:
        self._frames[key] = frame
        self._bytes += len(frame) + len(key)
        while self._bytes > self._limit:
            old, dropped = self._frames.popitem(last=False)
            self._bytes -= len(dropped) + len(old)


class _Process:
    """A running `sql_child`; `kill` or `end` it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid
        self._tail: deque[bytes] = deque(maxlen=TAIL_BYTES // 256)
        self._drain = asyncio.create_task(self._keep_tail(), name=f"stderr of {process.pid}")

    @classmethod
    async def start(cls, command: tuple[str, ...]) -> "_Process":
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                cwd="/",
                env=_environment(),
                start_new_session=True,  # a Ctrl-C in our terminal is ours
            )
        except OSError as error:
            raise _NoAnswer(f"the SQL reader could not be started: {error.strerror}") from error
        return cls(process)

    async def hello(self) -> None:
        await self._frame()

    async def ask(self, frame: bytes) -> bytes:
        stdin = self._process.stdin
        assert stdin is not None  # noqa: S101 - PIPE was asked for
        with contextlib.suppress(ConnectionError):  # then there is no answer, and `_frame` says why
            stdin.write(LENGTH.pack(len(frame)))
            stdin.write(frame)
            await stdin.drain()
        return await self._frame()

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._leave()

    async def end(self) -> None:
        """Ask it to leave, and insist after a while."""
        assert self._process.stdin is not None  # noqa: S101 - PIPE was asked for
        self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_S):
                await self._process.wait()
        await self.kill()

    @property
    def has_ended(self) -> bool:
        return self._process.returncode is not None

    @property
    def output_tail(self) -> str:
        """The last line that it wrote, if any: of a traceback the one that says what."""
        lines = b"".join(self._tail).decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"

    async def _frame(self) -> bytes:
        stdout = self._process.stdout
        assert stdout is not None  # noqa: S101 - PIPE was asked for
        try:
            (length,) = LENGTH.unpack(await stdout.readexactly(LENGTH.size))
            if length > MAX_ANSWER_BYTES:
                raise _NoAnswer(f"the SQL reader's answer has {length:,} bytes")
            return await stdout.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise _NoAnswer(await self._death()) from None

    async def _death(self) -> str:
        """It closed its stdout, which it does by ending."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await asyncio.gather(self._process.wait(), self._drain)
        code = self._process.returncode
        if code is None:
            return "the SQL reader stopped answering"
        if code < 0:
            return f"the SQL reader was killed by {signal.Signals(-code).name}"
        return f"the SQL reader ended with exit code {code}: {self.output_tail}"

    async def _leave(self) -> None:
        await self._process.wait()
        self._drain.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._drain
        if self._process.stdin is not None:
            self._process.stdin.close()

    async def _keep_tail(self) -> None:
        assert self._process.stderr is not None  # noqa: S101 - PIPE was asked for
        while chunk := await self._process.stderr.read(256):
            self._tail.append(chunk)


def _environment() -> dict[str, str]:
    """What Python needs, and where this very package is: it may not be installed."""
    passed = {name: value for name, value in os.environ.items() if name.startswith(PASS_ENV)}
    if _ROOT.name not in ("site-packages", "dist-packages"):
        given = passed.get("PYTHONPATH")
        passed["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *([given] if given else [])])
    return passed


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Analysis).decode
