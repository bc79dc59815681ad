"""One dbt child: start it, read its frames, stop it, say how it ended.

The other side is `dbt_child/`, started by path in the project's interpreter, in a session of
its own, or forked from a template that has imported dbt (`templates`), maybe with the project
parsed. Frames come over a
pipe that only we and the child hold; stdout and stderr are text, of which the last bytes are
kept and nothing is parsed. Control is lines on the child's stdin; closing it (or dying) tells
the child to cancel dbt, and so does a deadline that passes: the child keeps it by itself,
however long we are not there to ask.
"""

import asyncio
import contextlib
import os
import re
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec

from dbtstream.errors import ChildCrashed, ChildNotStarted, EngineRefused, HandshakeTimeout
from dbtstream.event_base import MAX_TEXT_BYTES
from dbtstream.forked_process import ForkedProcess
from dbtstream.frames import (
    CONTROL_CANCEL,
    LENGTH_BYTES,
    AnyFrame,
    Cancelling,
    Hello,
    Refused,
    Start,
    deadline_line,
    decode_frame,
    frame_length,
)
from dbtstream.manifest_templates import Recipe
from dbtstream.templates import Templates

CHILD = Path(__file__).parent / "dbt_child"
TAIL_BYTES = 64 * 1024
PIPE_BUFFER_BYTES = 1024 * 1024
EXIT_S = 30.0
"""After its last frame the child only has to leave; longer than this and it is killed."""

MAX_UNREAD_BYTES = 80 * 1024
"""Of control lines in our memory: what may be left of a long `Start` (64 KiB), and then some."""

STACK_LOOK_S = 0.1
"""A stack dump has no end mark; one that has not grown for so long is whole."""

_NO_OOM_COUNTER = -1
_STACK_HEAD = re.compile(r"^(?=Thread 0x|Current thread 0x)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Exit:
    """How the process left. `code` is negative for a signal, as in subprocess; None where nobody
    knows, since the template that it was forked from died before it."""

    code: int | None
    at: datetime
    oom: bool
    output_tail: str


class DbtProcess:
    """A running child. Make it with `DbtProcess.start`; always `close` it."""

    def __init__(
        self,
        process: asyncio.subprocess.Process | ForkedProcess,
        frames: asyncio.StreamReader,
        pipe: asyncio.BaseTransport,
        stack_file: Path | None,
    ) -> None:
        self.pid = process.pid
        self._greeted = False
        self._early: list[AnyFrame] = []
        self._on_adapter: Callable[[str], None] = lambda _: None
        self._on_close: Callable[[], None] = lambda: None
        self._stack_file = stack_file
        self._process = process
        self._frames = frames
        self._pipe = pipe
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0
        self._drain = asyncio.create_task(self._drain_output(), name=f"output of {process.pid}")
        self._oom_kills = _NO_OOM_COUNTER

    @classmethod
    async def start(
        cls,
        python: str,
        start: Start,
        *,
        environment: dict[str, str],
        templates: Templates | None = None,
        recipe: Recipe | None = None,
    ) -> "DbtProcess":
        """Start the child and hand it its work; with a `recipe`, of a template that has parsed
        what that says, if there is one. Raises ChildNotStarted."""
        reading, writing = os.pipe()
        frames = asyncio.StreamReader(limit=PIPE_BUFFER_BYTES)
        process: asyncio.subprocess.Process | ForkedProcess | None = None
        pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(frames), os.fdopen(reading, "rb", 0)
        )
        try:
            if templates is not None:
                process = await templates.fork(
                    python, start.project_dir, environment, start.secret_env, writing, recipe
                )
            if process is None:
                process = await _begin(python, start.project_dir, environment, writing)
        except BaseException:
            pipe.close()
            raise
        finally:
            os.close(writing)
        stack_file = Path(start.stack_file) if start.stack_file else None
        child = cls(process, frames, pipe, stack_file)
        if templates is not None:
            child._on_adapter = partial(templates.learn, python)
            child._on_close = partial(templates.run_ended, recipe)
        try:
            child._oom_kills = await asyncio.to_thread(_oom_kills)
            await child._tell(msgspec.json.encode(start) + b"\n")
        except BaseException:
            await asyncio.shield(child.close())
            raise
        return child

    async def hello(self, *, timeout_s: float) -> Hello:
        """What comes first, and is the first frame but for a `Cancelling`, which `frames` tells.

        Raises HandshakeTimeout, EngineRefused, ChildCrashed.
        """
        try:
            async with asyncio.timeout(timeout_s):
                first = await self._next()
                while isinstance(first, Cancelling):  # asked to stop while dbt was imported
                    self._early.append(first)
                    first = await self._next()
        except TimeoutError:
            raise HandshakeTimeout(timeout_s, self.output_tail) from None
        match first:
            case Hello():
                self._greeted = True
                if first.adapter_type and first.adapter_version:  # else it is not installed
                    self._on_adapter(first.adapter_type)
                return first
            case Refused():
                raise EngineRefused(first.code, first.message, first.engine)
            case None:
                exited = await self.wait(EXIT_S)
                raise ChildCrashed(
                    "ended before it was ready",
                    exit_code=exited.code,
                    stderr_tail=exited.output_tail,
                )
            case _:
                raise ChildCrashed(f"began with {type(first).__name__} instead of Hello")

    async def frames(self) -> AsyncIterator[AnyFrame]:
        """Frames until the pipe ends. Raises ChildCrashed for anything that is not a frame.

        An end without a Result is not judged here: `normalizer` knows what was missing.
        """
        while self._early:
            yield self._early.pop(0)
        while (frame := await self._next()) is not None:
            yield frame

    async def cancel(self) -> None:
        """Ask for KeyboardInterrupt in dbt's main thread. Safe to call when it has gone."""
        await self._tell(CONTROL_CANCEL)

    def set_deadline(self, stop_at: float, kill_at: float) -> None:
        """When the child cancels dbt and when it kills itself, in times of `frames.clock_s`.

        Never waits, and may come before Hello and after the end. A child that does not read is
        frozen or gone, so lines that would pile up are left out.
        """
        stdin = self._process.stdin
        assert stdin is not None  # noqa: S101 - PIPE was asked for
        pipe = stdin.transport
        if pipe.is_closing() or pipe.get_write_buffer_size() > MAX_UNREAD_BYTES:
            return
        with contextlib.suppress(ConnectionError, RuntimeError):
            stdin.write(deadline_line(stop_at, kill_at))

    async def stack(self, *, timeout_s: float) -> str | None:
        """Where each of the child's threads is now; None if it does not say so in time.

        Only once Hello is there: before, the child may not know the signal and would die of it.
        """
        file = self._stack_file
        if file is None or not self._greeted or self._process.returncode is not None:
            return None
        before = await asyncio.to_thread(_size, file)
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                return cut_stack(await _settled(file, before))
        return None

    def terminate(self) -> None:
        """SIGTERM to the child: once more a clean cancel, by another road."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the child's process group: itself and whatever it started."""
        if isinstance(self._process, ForkedProcess):
            self._process.kill_group()
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    async def wait(self, timeout_s: float | None = None) -> Exit:
        """How it ended; killed if it has not within `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                code = await self._process.wait()
        except TimeoutError:
            self.kill()
            code = await self._process.wait()
        at = datetime.now(UTC)
        # Its own children may hold the output open; they are not waited for.
        self.kill()
        await asyncio.wait({self._drain}, timeout=1.0)
        oom_kills = await asyncio.to_thread(_oom_kills)
        return Exit(
            code=code,
            at=at,
            oom=code == -signal.SIGKILL and self._oom_kills not in (_NO_OOM_COUNTER, oom_kills),
            output_tail=self.output_tail,
        )

    async def close(self) -> None:
        """Nothing of the child is left afterwards. Safe to call twice."""
        self.kill()
        await self._process.wait()
        self._drain.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._drain
        self._pipe.close()
        if self._process.stdin is not None:
            self._process.stdin.close()
        if isinstance(self._process, ForkedProcess):
            self._process.close()
        self._on_close()

    @property
    def output_tail(self) -> str:
        """The end of stdout and stderr, unscrubbed."""
        return b"".join(self._tail)[-TAIL_BYTES:].decode("utf-8", "replace")

    async def _next(self) -> AnyFrame | None:
        head = await self._read(LENGTH_BYTES)
        if head is None:
            return None
        body = await self._read(frame_length(head))
        if body is None:
            raise ChildCrashed("stopped in the middle of a frame")
        return decode_frame(body)

    async def _read(self, count: int) -> bytes | None:
        try:
            return await self._frames.readexactly(count)
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise ChildCrashed("stopped in the middle of a frame") from None
            return None

    async def _tell(self, line: bytes) -> None:
        assert self._process.stdin is not None  # noqa: S101 - PIPE was asked for
        with contextlib.suppress(ConnectionError, RuntimeError):
            self._process.stdin.write(line)
            await self._process.stdin.drain()

    async def _drain_output(self) -> None:
        """Keep reading, whatever dbt prints: a full pipe would stop it."""
        assert self._process.stdout is not None  # noqa: S101 - PIPE was asked for
        while chunk := await self._process.stdout.read(65536):
            self._tail.append(chunk)
            self._tail_bytes += len(chunk)
            while self._tail_bytes - len(self._tail[0]) >= TAIL_BYTES:
                self._tail_bytes -= len(self._tail.popleft())


async def _begin(
    python: str, folder: str, environment: dict[str, str], frames: int
) -> asyncio.subprocess.Process:
    """A process of the interpreter's own. Raises ChildNotStarted."""
    try:
        return await asyncio.create_subprocess_exec(
            python,
            str(CHILD),
            "--fd",
            str(frames),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=(frames,),
            cwd=folder,
            env=environment,
            start_new_session=True,  # a Ctrl-C in our terminal is ours; and killpg works
        )
    except OSError as error:
        raise ChildNotStarted(python, error.strerror or str(error)) from error


async def _settled(file: Path, begin: int) -> str:
    """What a file has from there on, when it has something and has stopped growing."""
    dump = b""
    while True:
        await asyncio.sleep(STACK_LOOK_S)
        now = await asyncio.to_thread(_read, file, begin)
        if now and now == dump:
            return dump.decode("utf-8", "replace")
        dump = now


def cut_stack(text: str, limit: int = MAX_TEXT_BYTES) -> str:
    """A dump of faulthandler within `limit` bytes: of each thread the calls it made last.

    All threads lose equally many of their outer calls; if a line of each is still too much,
    those threads remain that were started last, which are dbt's workers.
    """
    shorter = text
    if len(shorter.encode()) <= limit:
        return shorter
    threads = [part.splitlines(keepends=True) for part in _STACK_HEAD.split(text) if part]
    for kept in range(max(map(len, threads)), 1, -1):
        shorter = "".join(_first_lines(lines, kept) for lines in threads)
        if len(shorter.encode()) <= limit:
            return shorter
    return shorter.encode()[:limit].decode("utf-8", "ignore")


def _first_lines(lines: list[str], count: int) -> str:
    return "".join(lines if len(lines) <= count else [*lines[:count], "  ...\n"])


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _read(file: Path, begin: int) -> bytes:
    try:
        with file.open("rb") as stacks:
            stacks.seek(begin)
            return stacks.read()
    except OSError:
        return b""


def _oom_kills() -> int:
    """How often the kernel killed for memory in our cgroup (v2) so far; -1 where unknown."""
    try:
        group = Path("/proc/self/cgroup").read_text(encoding="ascii").strip().rpartition("::")[2]
        events = Path(f"/sys/fs/cgroup{group}/memory.events").read_text(encoding="ascii")
        return int(dict(line.split() for line in events.splitlines())["oom_kill"])
    except (OSError, KeyError, ValueError):
        return _NO_OOM_COUNTER
