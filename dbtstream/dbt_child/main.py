"""One invocation from first byte to last. Read `main`, then `Child.run`.

Whatever happens, the parent gets a last frame (`refused` or `result`); where even that cannot
be, an exit code of 70 and a line on stderr.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import multiprocessing.util
import os
import platform
import signal
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any, Callable, Dict, List, NoReturn, Optional

from . import engine, speedups
from .callback import EventCallback, MeasuredCallback
from .channel import Channel
from .control import Control, die_with_parent, take_stdin
from .plan import Wanted
from .results import artifact_frames, error_info, result_frame, results_frames, stats
from .retry import prepare
from .scrub import Scrubber, secret_values
from .stop import Stop

if TYPE_CHECKING:
    from .manifest import Parsed

PROTOCOL = 1
EXIT_REFUSED = 69  # EX_UNAVAILABLE
EXIT_BROKEN = 70  # EX_SOFTWARE
FLUSH_S = 30.0
END_S = 60.0  # for everything after dbt's return


def main(argv: List[str]) -> NoReturn:
    """A process of its own: `python dbt_child --fd N`."""
    invoke_dbt(lambda: Child(_frame_fd(argv)))


def invoke_dbt(make_child: Callable[[], "Child"]) -> NoReturn:
    code = EXIT_BROKEN
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what is printed must not die with us
            stream.reconfigure(line_buffering=True)
    try:
        code = make_child().run()
    except BaseException:
        traceback.print_exc()
    leave(code)


class Child:
    """The parts, wired; `run` uses them in the order in which things happen.

    `start` is what its process was before: nothing (cold), a template that has imported dbt
    (warm), or one that has the project `parsed` as well (manifest).
    """

    def __init__(self, frame_fd: int, start: str = "cold", parsed: Optional[Parsed] = None) -> None:
        self._start = start
        self._parsed = parsed
        self._channel = Channel(frame_fd, Scrubber(secret_values(os.environ)))
        self._stop = Stop(self._channel)
        self._control = Control(take_stdin(), self._stop)
        self._channel.on_broken = self._control.orphaned
        self._callback: Optional[EventCallback] = None
        self._measured: Optional[MeasuredCallback] = None
        self._began = time.time()

    def run(self) -> int:
        """The exit code of the process."""
        self._stop.install()
        if self._start == "cold":
            die_with_parent()  # of a fork, the template is: its death is nothing to the run
        _as_batch_work()
        try:
            start = self._control.read_start()
            _tell_stacks(start.get("stack_file"))
            names = start.get("secret_env", [])
            self._channel.scrubber = Scrubber(secret_values(os.environ, names))
            self._channel.start()
            self._control.watch()
            last = self._invoke(start)
        except engine.Refusal as refusal:
            last = _refused(refusal)
        except BaseException as error:
            traceback.print_exc()
            last = _failed(error, stats(self._callback, None))
        self._channel.start()
        self._control.finishing(END_S)
        self._channel.emit(last)
        if not self._channel.close(FLUSH_S):
            sys.stderr.write("dbtstream: the parent did not take the last frames\n")
        return int(last.get("exit_code", EXIT_REFUSED))

    def _invoke(self, start: Dict[str, Any]) -> Dict[str, Any]:
        """Import dbt, say hello, run it, tell what came of it; returns the last frame."""
        version = engine.installed_dbt()
        os.chdir(start["project_dir"])
        args: List[str] = start["args"]
        sys.argv = ["dbt", *args]  # dbt writes it into its artifacts
        runner_class, result_class = import_dbt(version)
        faster = speedups.apply(version) if start.get("speedups", True) else []
        self._channel.emit(_hello(version, args, self._start, faster))

        callback = self._make_callback(start)
        if self._parsed is None:
            runner = runner_class(callbacks=[callback])
        else:
            runner = self._parsed.runner(runner_class, callback)
        prepared = prepare(args, start.get("retry"))
        sys.argv = ["dbt", *prepared.args]
        outcome = self._stop.invoke(lambda: runner.invoke(prepared.args, **prepared.keywords))
        if outcome is None:
            outcome = result_class(success=False, exception=KeyboardInterrupt())
        return self._conclude(outcome, version)

    def _make_callback(self, start: Dict[str, Any]) -> Any:
        self._callback = EventCallback(
            self._channel.emit,
            self._stop,
            log_level=start.get("log_level", "warn"),
            queries=start.get("queries", False),
            query_sql=start.get("query_sql", False),
            wanted=Wanted(
                graph=start.get("graph", False),
                known_manifest=start.get("known_manifest"),
                selectors=start.get("selectors") or {},
                compiled_code=start.get("compiled_code", False),
                adapter_columns=start.get("adapter_columns", False),
            ),
        )
        if start.get("measure"):
            self._measured = MeasuredCallback(self._callback)
        return self._measured or self._callback

    def _conclude(self, outcome: Any, version: str) -> Dict[str, Any]:
        callback = self._callback
        assert callback is not None  # noqa: S101 - made before invoke
        callback.close()
        count, frames = results_frames(outcome.result)
        for frame in frames:
            self._channel.emit(frame)
        search = None
        if version.startswith("1.8."):
            search = callback.target_path or os.environ.get("DBT_TARGET_PATH") or "target"
        for frame in artifact_frames(callback.artifacts, search, self._began):
            self._channel.emit(frame)
        callback_s = self._measured.total_s if self._measured else None
        return result_frame(outcome, count, stats(callback, callback_s))


def _frame_fd(argv: List[str]) -> int:
    if len(argv) != 2 or argv[0] != "--fd" or not argv[1].isdigit():
        raise SystemExit("usage: python dbt_child --fd N  (started by dbtstream, not by hand)")
    fd = int(argv[1])
    os.set_inheritable(fd, False)
    os.set_blocking(fd, True)
    return fd


def _as_batch_work() -> None:
    """dbt keeps its share of the CPU, but the kernel lets the daemon that reads our frames run
    as soon as it can (Linux, SCHED_BATCH: no preemption at wake-up). With more threads than
    cores the 99th percentile from callback to commit fell from 126 to 37 ms.
    """
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or not allowed here
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _tell_stacks(path: Optional[str]) -> None:
    """From now on SIGUSR1 appends the stacks of all threads to that file.

    Done in C, so also while an adapter's native code holds the interpreter.
    """
    if path is None:
        return
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)  # not inheritable
    except OSError as error:  # the signal's own effect would be our death
        sys.stderr.write(f"dbtstream: no stacks in {path}: {error.strerror}\n")
        fd = os.open(os.devnull, os.O_WRONLY)
    faulthandler.register(signal.SIGUSR1, file=fd, all_threads=True)


def import_dbt(version: str) -> Any:
    """dbt's runner and its result. Raises engine.Refusal."""
    try:
        from dbt.cli.main import dbtRunner, dbtRunnerResult
    except Exception as error:
        traceback.print_exc()
        raise engine.Refusal(
            "import_failed",
            f"dbt-core {version} is installed but cannot be imported: "
            f"{type(error).__name__}: {error}",
            f"dbt-core {version}",
        ) from error
    return dbtRunner, dbtRunnerResult


def _hello(version: str, args: List[str], start: str, faster: List[str]) -> Dict[str, Any]:
    adapter_type, adapter_version = engine.adapter(args)
    return {
        "t": "hello",
        "at": time.time(),
        "protocol": PROTOCOL,
        "pid": os.getpid(),
        "python_version": platform.python_version(),
        "dbt_version": version,
        "adapter_type": adapter_type,
        "adapter_version": adapter_version,
        "start": start,
        "speedups": faster,
    }


def _refused(refusal: engine.Refusal) -> Dict[str, Any]:
    return {
        "t": "refused",
        "at": time.time(),
        "code": refusal.code,
        "message": refusal.message,
        "engine": refusal.engine,
    }


def _failed(error: BaseException, stats: Dict[str, Any]) -> Dict[str, Any]:
    """Something of ours raised: still a result, and dbt's exit code for the unhandled."""
    return {
        "t": "result",
        "at": time.time(),
        "success": False,
        "exit_code": 2,
        "result_count": -1,
        "error": error_info(error),
        "interrupted": False,
        "stats": stats,
    }


def leave(code: int) -> NoReturn:
    """End at once: a normal exit runs destructors of adapters that print and may hang."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        # Else each run leaks a named semaphore of dbt's locks, until the resource tracker ends.
        multiprocessing.util._exit_function()  # type: ignore[attr-defined]  # noqa: SLF001
    finally:
        os._exit(code)


faulthandler.enable()  # a crash in an adapter's native code leaves a stack on stderr
