"""The parent's side of the frame pipe, against real processes that misbehave in one way each."""

import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dbtstream.dbt_process import TAIL_BYTES, DbtProcess
from dbtstream.errors import (
    ChildCrashed,
    ChildNotStarted,
    EngineRefused,
    FrameCorrupt,
    FrameTooLarge,
    HandshakeTimeout,
)
from dbtstream.frames import AnyFrame, Hello, NodeStart, NodeWork, Result, Start
from tests.scripted_child import GOOD_RUN, scripted_child

ENVIRONMENT = {"PATH": os.environ["PATH"]}


@asynccontextmanager
async def running(tmp_path: Path, body: str) -> AsyncIterator[DbtProcess]:
    python = scripted_child(tmp_path / "child", body)
    child = await DbtProcess.start(
        python, Start(args=["build"], project_dir=str(tmp_path)), environment=ENVIRONMENT
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


async def test_a_child_cancelled_while_it_imports_dbt_still_says_hello(tmp_path: Path) -> None:
    body = 'send("cancelling", by="control"); hello(); control_line()'
    async with running(tmp_path, body) as child:
        assert (await child.hello(timeout_s=30)).pid == child.pid


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


async def test_telling_a_child_that_has_gone_is_no_error(tmp_path: Path) -> None:
    async with running(tmp_path, "hello()") as child:
        await received(child)
        await child.wait(30)
        await child.cancel()
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
