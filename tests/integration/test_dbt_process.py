"""The parent's side of the frame pipe, against real processes that misbehave in one way each."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dbtstream.dbt_process import MAX_UNREAD_BYTES, TAIL_BYTES, DbtProcess, cut_stack
from dbtstream.errors import (
    ChildCrashed,
    ChildNotStarted,
    EngineRefused,
    FrameCorrupt,
    FrameTooLarge,
    HandshakeTimeout,
)
from dbtstream.frames import AnyFrame, Cancelling, Hello, Log, NodeStart, NodeWork, Result, Start
from tests.scripted_child import GOOD_RUN, scripted_child

ENVIRONMENT = {"PATH": os.environ["PATH"]}


@asynccontextmanager
async def running(tmp_path: Path, body: str, **options: Any) -> AsyncIterator[DbtProcess]:
    python = scripted_child(tmp_path / "child", body)
    child = await DbtProcess.start(
        python,
        Start(args=["build"], project_dir=str(tmp_path), **options),
        environment=ENVIRONMENT,
    )
    try:
        yield child
    finally:
        await child.close()


async def collect(child: DbtProcess, frames: list[AnyFrame]) -> None:
    """Into `frames`, so that what came before an error is kept."""
    async for frame in child.frames():
        frames.append(frame)  # noqa: PERF401 - see above


async def received(child: DbtProcess) -> list[AnyFrame]:
    frames: list[AnyFrame] = []
    await collect(child, frames)
    return frames


async def test_frames_come_in_order_and_the_exit_is_told(tmp_path: Path) -> None:
    async with running(tmp_path, GOOD_RUN) as child:
        hello = await child.hello(timeout_s=30)
        frames = await received(child)
        exited = await child.wait(30)

    assert hello.pid == child.pid
    assert [frame.n for frame in frames] == list(range(2, 2 + len(frames)))
    assert isinstance(frames[-1], Result)
    assert (exited.code, exited.oom) == (0, False)


async def test_the_start_line_carries_args_of_any_length(tmp_path: Path) -> None:
    """A selection of thousands of names does not fit into an argument vector."""
    python = scripted_child(
        tmp_path / "child",
        """
        words = start_line()["args"]
        hello(dbt_version=f"{len(words)} {words[-1]}")
        """,
    )
    args = ["build", "--select", *(f"model_{i:06}" * 10 for i in range(20_000))]
    child = await DbtProcess.start(
        python, Start(args=args, project_dir=str(tmp_path)), environment=ENVIRONMENT
    )
    try:
        hello = await child.hello(timeout_s=30)
    finally:
        await child.close()
    assert hello.dbt_version == f"20002 {args[-1]}"


async def test_an_interpreter_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ChildNotStarted, match="nowhere/python: No such file"):
        await DbtProcess.start(
            "/nowhere/python", Start(args=["build"], project_dir=str(tmp_path)), environment={}
        )


async def test_a_project_dir_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(ChildNotStarted, match="No such file"):
        await DbtProcess.start(
            sys.executable,
            Start(args=["build"], project_dir=str(tmp_path / "gone")),
            environment={},
        )


async def test_an_interpreter_that_is_no_interpreter_ends_before_it_was_ready() -> None:
    child = await DbtProcess.start(
        "/bin/false", Start(args=["build"], project_dir="/"), environment={}
    )
    try:
        with pytest.raises(ChildCrashed, match=r"before it was ready \(exit code 1\)"):
            await child.hello(timeout_s=30)
    finally:
        await child.close()


async def test_a_silent_child_is_a_handshake_timeout(tmp_path: Path) -> None:
    body = 'print("importing dbt, slowly", flush=True); control_line(); control_line()'
    async with running(tmp_path, body) as child:
        with pytest.raises(HandshakeTimeout, match=r"said nothing for 0\.2 s"):
            await child.hello(timeout_s=0.2)


async def test_a_child_cancelled_while_it_imports_dbt_says_hello_and_who_cancelled(
    tmp_path: Path,
) -> None:
    """Whether it was the lease's deadline decides if the run goes on elsewhere."""
    body = 'send("cancelling", by="deadline"); hello(); result(2, interrupted=True)'
    async with running(tmp_path, body) as child:
        assert (await child.hello(timeout_s=30)).pid == child.pid
        first, last = [frame async for frame in child.frames()]
    assert isinstance(first, Cancelling)
    assert first.by == "deadline"
    assert isinstance(last, Result)


async def test_a_refused_engine_is_named(tmp_path: Path) -> None:
    body = """
        send("refused", code="dbt_2x", engine="dbt-core 2.0.1",
            message="dbt-core 2.0.1 cannot run here")
    """
    async with running(tmp_path, body) as child:
        with pytest.raises(EngineRefused, match=r"dbt-core 2\.0\.1 cannot run"):
            await child.hello(timeout_s=30)


async def test_garbage_is_a_crash(tmp_path: Path) -> None:
    """`Traceback…` read as a length is far above any frame's."""
    async with running(tmp_path, 'hello(); raw(b"Traceback (most recent call last):")') as child:
        await child.hello(timeout_s=30)
        with pytest.raises(FrameTooLarge, match="announced a frame of"):
            await received(child)


async def test_a_frame_that_is_not_ours_is_a_crash_with_its_first_bytes(tmp_path: Path) -> None:
    async with running(tmp_path, 'hello(); raw(struct.pack(">I", 9) + b"[1, 2, 3]")') as child:
        await child.hello(timeout_s=30)
        with pytest.raises(FrameCorrupt, match=r"\[1, 2, 3\]"):
            await received(child)


@pytest.mark.parametrize("kept", [1, 3, 4, 20])
async def test_a_child_that_dies_mid_frame_is_a_crash_not_a_hang(tmp_path: Path, kept: int) -> None:
    """Frames already received are kept; the rest is reported as ChildCrashed."""
    body = f'hello(); started("orders"); raw(pack("node_start", unique_id="x")[:{kept}])'
    frames: list[AnyFrame] = []
    async with running(tmp_path, body) as child:
        with pytest.raises(ChildCrashed, match="in the middle of a frame"):
            await collect(child, frames)
    assert [type(frame) for frame in frames] == [Hello, NodeStart, NodeWork]


async def test_a_flood_of_output_neither_stops_the_child_nor_fills_our_memory(
    tmp_path: Path,
) -> None:
    """10 MB on stderr and stdout; only the end is kept."""
    body = """
        hello()
        for i in range(160):
            sys.stderr.write(f"line {i:04} " * 6000)
            print("noise " * 1000)
        sys.stderr.write("the end")
        result(0)
    """
    async with running(tmp_path, body) as child:
        frames = await received(child)
        exited = await child.wait(30)
    assert isinstance(frames[-1], Result)
    assert "the end" in exited.output_tail
    assert len(exited.output_tail) <= TAIL_BYTES


async def test_cancel_reaches_the_child_as_a_line(tmp_path: Path) -> None:
    body = """
        start_line()
        hello()
        send("log", level="info", code="", name="got", message=control_line().decode())
    """
    async with running(tmp_path, body) as child:
        await child.hello(timeout_s=30)
        await child.cancel()
        (log,) = await received(child)
    assert getattr(log, "message", None) == "cancel\n"


async def test_a_deadline_reaches_the_child_as_a_line_also_before_it_is_ready(
    tmp_path: Path,
) -> None:
    body = """
        start_line()
        for told in (sys.stdin.buffer.readline(), sys.stdin.buffer.readline()):
            send("log", level="info", code="", name="got", message=told.decode())
    """
    async with running(tmp_path, body) as child:
        child.set_deadline(1.5, 2)
        child.set_deadline(3, 4.25)
        told = [frame.message for frame in await received(child) if isinstance(frame, Log)]
    assert told == ["deadline 1.500 2.000\n", "deadline 3.000 4.250\n"]


async def test_deadlines_for_a_child_that_does_not_read_do_not_pile_up(tmp_path: Path) -> None:
    async with running(tmp_path, "hello(); signal.pause()") as child:
        await child.hello(timeout_s=30)
        for _ in range(10_000):
            child.set_deadline(1, 2)
        stdin = child._process.stdin
        assert stdin is not None
        assert 0 < stdin.transport.get_write_buffer_size() < MAX_UNREAD_BYTES + 100


async def test_a_deadline_after_a_long_start_is_not_left_out(tmp_path: Path) -> None:
    """Part of such a Start may wait in our memory until the child has read the rest."""
    body = """
        wait_for("read")
        start_line()
        told = sys.stdin.buffer.readline().decode()
        send("log", level="info", code="", name="got", message=told)
    """
    async with running(tmp_path, body, secret_env=["x" * 120_000]) as child:
        child.set_deadline(1, 2)
        (tmp_path / "read").touch()
        (log,) = await received(child)
    assert getattr(log, "message", None) == "deadline 1.000 2.000\n"


BUSY = """
    start_line()
    begun = threading.Event()
    def waits_for_long():
        begun.set()
        control_line()
    threading.Thread(target=waits_for_long, daemon=True).start()
    begun.wait()
    def waits_too(greet):
        greet()
        signal.pause()
        waits_too(lambda: None)
    waits_too(hello)
"""


async def test_a_stack_shows_what_each_thread_is_at(tmp_path: Path) -> None:
    async with running(tmp_path, BUSY, stack_file=str(tmp_path / "stacks")) as child:
        await child.hello(timeout_s=30)
        stack = await child.stack(timeout_s=30)
        again = await child.stack(timeout_s=30)
    assert stack is not None
    assert again is not None
    assert stack.count("Current thread") == again.count("Current thread") == 1
    for each in (stack, again):
        assert "waits_for_long" in each
        assert "waits_too" in each


async def test_a_frozen_child_has_no_stack_to_tell(tmp_path: Path) -> None:
    async with running(tmp_path, BUSY, stack_file=str(tmp_path / "stacks")) as child:
        await child.hello(timeout_s=30)
        os.kill(child.pid, signal.SIGSTOP)
        assert await child.stack(timeout_s=0.3) is None


async def test_a_child_that_is_not_ready_is_not_asked_for_its_stack(tmp_path: Path) -> None:
    """The signal would kill it: it has not said yet that it knows it."""
    body = """
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        wait_for("asked")
        hello()
        control_line()
        control_line()
    """
    async with running(tmp_path, body, stack_file=str(tmp_path / "stacks")) as child:
        assert await child.stack(timeout_s=30) is None
        (tmp_path / "asked").touch()
        await child.hello(timeout_s=30)


async def test_a_child_without_a_stack_file_and_one_that_has_gone_have_no_stack(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, "hello(); control_line(); control_line()") as child:
        await child.hello(timeout_s=30)
        assert await child.stack(timeout_s=30) is None
    async with running(tmp_path, "start_line(); hello()", stack_file=str(tmp_path / "s")) as child:
        await child.hello(timeout_s=30)
        await child.wait(30)
        assert await child.stack(timeout_s=30) is None


async def test_a_stack_is_read_without_holding_up_the_loop(tmp_path: Path) -> None:
    """blockbuster fails the test where a file is read on the loop; others get their turn."""
    async with running(tmp_path, BUSY, stack_file=str(tmp_path / "stacks")) as child:
        await child.hello(timeout_s=30)
        turns = 0
        asking = asyncio.create_task(child.stack(timeout_s=30))
        while not asking.done():
            turns += 1
            await asyncio.sleep(0)
        assert turns > 2


async def test_telling_a_child_that_has_gone_is_no_error(tmp_path: Path) -> None:
    async with running(tmp_path, "hello()") as child:
        await received(child)
        await child.wait(30)
        await child.cancel()
        for _ in range(10):
            child.set_deadline(1, 2)
        child.terminate()
        child.kill()


async def test_a_killed_child_has_its_signal(tmp_path: Path) -> None:
    async with running(tmp_path, "hello(); control_line(); control_line()") as child:
        await child.hello(timeout_s=30)
        os.kill(child.pid, signal.SIGKILL)
        assert await received(child) == []
        exited = await child.wait(30)
    assert exited.code == -signal.SIGKILL


async def test_waiting_has_a_limit_and_then_kills_the_whole_group(tmp_path: Path) -> None:
    """The child ignores every polite signal, and so does what it started."""
    body = """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        grandchild = os.fork()
        if grandchild:
            hello(dbt_version=str(grandchild))
        while True:
            signal.pause()
    """
    async with running(tmp_path, body) as child:
        grandchild = int((await child.hello(timeout_s=30)).dbt_version)
        child.terminate()
        exited = await child.wait(0.2)
    assert exited.code == -signal.SIGKILL
    assert gone(grandchild)


async def test_closing_leaves_nothing_behind(tmp_path: Path) -> None:
    async with running(tmp_path, "hello(); signal.pause()") as child:
        await child.hello(timeout_s=30)
        pid = child.pid
    assert gone(pid)


def gone(pid: int) -> bool:
    """No such process, or only its entry until its new parent reaps it."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state.split()[0] == "Z":
            return True
        os.sched_yield()
    return False


# Texts of stacks.


def dump(*depths: int) -> str:
    threads = [
        f"Thread 0x{thread:08x} (most recent call first):\n"
        + "".join(f'  File "f.py", line {line} in t{thread}\n' for line in range(depth))
        for thread, depth in enumerate(depths)
    ]
    return "\n".join(threads)


def test_a_long_dump_keeps_of_each_thread_the_calls_it_made_last() -> None:
    whole = dump(3, 90, 90)
    cut = cut_stack(whole, 1000)
    assert len(cut.encode()) <= 1000
    assert cut.count("most recent call first") == 3
    assert "line 2 in t0" in cut
    for thread in (1, 2):
        assert f"line 9 in t{thread}" in cut
        assert f"line 80 in t{thread}" not in cut
    assert cut.count("  ...\n") == 2
    assert cut_stack(whole, len(whole)) == whole


def test_of_too_many_threads_the_first_ones_are_kept() -> None:
    cut = cut_stack(dump(*[5] * 100), 1000)
    assert len(cut.encode()) <= 1000
    assert cut.startswith("Thread 0x00000000")
    assert cut_stack("no thread at all " * 100, 100) == ("no thread at all " * 100)[:100]
