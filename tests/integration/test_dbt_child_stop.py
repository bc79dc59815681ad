"""How a dbt child ends when it is told to, or when its time is over: real dbt on DuckDB.

The slow model would take minutes, and what does not listen would never end: that these tests
end is half of what they show.
"""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dbtstream import frames
from dbtstream.frames import clock_s, deadline_line
from tests import dbt_projects as projects
from tests.dbt_projects import Child, finished
from tests.dbt_projects import Starting as Start
from tests.warm_children import WarmChildren

pytestmark = pytest.mark.parametrize("warm", ["cold", "warm"], indirect=True)


@pytest.fixture
def start(tmp_path: Path, warm: WarmChildren | None) -> Iterator[Start]:
    with projects.children(tmp_path, warm) as begin:
        yield begin


def assert_interrupted(child: Child, by: str) -> None:
    assert child.end() == 2
    assert [frame.by for frame in child.of(frames.Cancelling)] == [by]
    assert child.result.interrupted
    assert child.result.error is not None
    assert child.result.error.error_class == "KeyboardInterrupt"


def begin_slow(start: Start, **options: Any) -> Child:
    child = start(projects.slow(), ["build"], **options)
    child.until(frames.NodeWork, unique_id="model.shop.slow")
    return child


def test_a_cancel_interrupts_dbt_once_however_often_it_is_asked(start: Start) -> None:
    """dbt cleans up as after Ctrl-C: finished nodes are in run_results, the query is cancelled."""
    child = begin_slow(start)
    child.control(frames.CONTROL_CANCEL * 3)
    assert_interrupted(child, "control")
    assert "model.shop.slow" in {each.connection for each in child.of(frames.QueryCancelled)}
    assert finished(child) == {"model.shop.before": "success", "model.shop.slow": "error"}
    written = json.loads((child.project / "target" / "run_results.json").read_bytes())
    assert [each["unique_id"] for each in written["results"]] == ["model.shop.before"]
    assert "run_results" in {artifact.kind for artifact in child.of(frames.Artifact)}


def test_a_cancel_before_dbt_is_even_imported_is_not_lost(start: Start) -> None:
    child = start(projects.slow(), ["build"])
    child.control(frames.CONTROL_CANCEL)
    assert_interrupted(child, "control")
    assert not child.of(frames.NodeStart)


def test_a_query_that_began_after_the_cancel_is_cancelled_too(start: Start) -> None:
    """dbt cancels open queries once and would wait for this one to its end."""
    child = start(projects.late_query(), ["run"])
    child.until(frames.NodeWork, unique_id="model.shop.slow")
    child.control(frames.CONTROL_CANCEL)
    assert_interrupted(child, "control")
    assert finished(child) == {"model.shop.slow": "error"}


def test_a_cancel_that_hits_a_hooks_query_still_ends_the_run(start: Start) -> None:
    """DuckDB and dbt make a failed hook of the interrupt; the nodes must not be built for that."""
    query = projects.SLOW.split("}}")[1]
    config = {"on-run-start": [query]}
    child = start(projects.shop(), ["build"], config=config, log_level="debug")
    while "range(" not in child.until(frames.Log, name="SQLQuery").message:
        pass
    child.control(frames.CONTROL_CANCEL)
    assert_interrupted(child, "control")
    assert not child.of(frames.NodeStart)


SWALLOWER = """
import time
from dbt_common.events.base_types import EventLevel
from dbt_common.events.functions import fire_event
from dbt_common.events.types import Note
fire_event(Note(msg="not listening"), EventLevel.WARN)
try:
    time.sleep(600)
except KeyboardInterrupt:
    pass
"""


def test_an_interrupt_that_somebody_swallows_is_repeated(start: Start, tmp_path: Path) -> None:
    files = {**projects.shop(), **projects.plugin("swallower", SWALLOWER)}
    child = start(files, ["build"], env={"PYTHONPATH": str(tmp_path)})
    child.until(frames.Log, message="not listening")
    child.control(frames.CONTROL_CANCEL)
    assert_interrupted(child, "control")
    assert not child.of(frames.NodeStart)


def test_the_parents_death_cancels_dbt(start: Start) -> None:
    child = begin_slow(start)
    child.hang_up()
    assert_interrupted(child, "eof")


def test_a_closed_frame_pipe_cancels_dbt(start: Start) -> None:
    """Found at the next frame: with query frames there always is one."""
    child = start(projects.slow(), ["build"], queries=True, log_level="debug")
    child.until(frames.NodeWork, unique_id="model.shop.before")
    child.stop_reading()
    assert child.process.wait() == 2


def test_sigterm_cancels_as_cleanly(start: Start) -> None:
    child = begin_slow(start)
    child.process.send_signal(signal.SIGTERM)
    assert_interrupted(child, "sigterm")
    assert finished(child)["model.shop.before"] == "success"


def test_sigint_cancels_even_where_the_parent_ignores_it(start: Start) -> None:
    """An ignored signal is inherited; dbt would never see the interrupt."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        child = begin_slow(start)
    finally:
        signal.signal(signal.SIGINT, previous)
    child.process.send_signal(signal.SIGINT)
    assert_interrupted(child, "sigint")


def test_a_killed_child_leaves_frames_without_a_result(start: Start) -> None:
    child = begin_slow(start)
    child.process.kill()
    assert child.end() == -signal.SIGKILL
    assert not child.of(frames.Result)
    assert finished(child) == {"model.shop.before": "success"}


# Deadlines.

LONG_S = 3600.0

NOTE = """
import os, sys, time
from dbt_common.events.base_types import EventLevel
from dbt_common.events.functions import fire_event
from dbt_common.events.types import Note
def note(text):
    fire_event(Note(msg=text), EventLevel.WARN)
control = sys.modules["dbtstream_child.control"]
"""

STUBBORN = (
    NOTE
    + """
control.ORPHAN_GRACE_S = 0.1
note("not listening")
while True:
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        pass
"""
)

HOLDER = (
    NOTE
    + """
import ctypes
note("not listening")
while not os.path.exists("go"):
    try:
        time.sleep(0.01)
    except KeyboardInterrupt:
        pass
# Waits for itself and, as a C extension may, without letting go of the interpreter.
lock, mutex = ctypes.PyDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
lock(mutex); lock(mutex)
"""
)


def begin_with(start: Start, code: str, **options: Any) -> Child:
    """A child in which a plugin of dbt's runs that code, and has said that it does not listen."""
    files = {**projects.shop(), **projects.plugin("plugin", code)}
    child = start(files, ["build"], env={"PYTHONPATH": "."}, **options)
    child.until(frames.Log, message="not listening")
    return child


def test_a_deadline_cancels_and_a_later_one_replaces_it(start: Start) -> None:
    child = start(projects.slow(), ["build"])
    child.control(deadline_line(clock_s() + LONG_S, clock_s() + 2 * LONG_S))
    child.until(frames.NodeWork, unique_id="model.shop.slow")
    child.control(deadline_line(clock_s(), clock_s() + LONG_S))
    assert_interrupted(child, "deadline")


def test_a_deadline_that_is_renewed_in_time_is_none(start: Start) -> None:
    """The first one passes while dbt works; the run ends well."""
    renewed_at = clock_s() + 0.5
    code = NOTE + f"while control.clock_s() < {renewed_at} + 0.6: time.sleep(0.01)"
    files = {**projects.shop(), **projects.plugin("plugin", code)}
    child = start(files, ["build"], env={"PYTHONPATH": "."})
    child.control(deadline_line(renewed_at, renewed_at))
    child.control(deadline_line(clock_s() + LONG_S, clock_s() + LONG_S))
    assert child.end() == 0
    assert not child.of(frames.Cancelling)


@pytest.mark.parametrize("how", ["deadline", "eof"])
def test_what_does_not_stop_is_killed_with_its_group(start: Start, how: str) -> None:
    child = begin_with(start, STUBBORN)
    if how == "eof":
        child.hang_up()
    else:
        child.control(deadline_line(clock_s(), clock_s() + 3))
    assert child.end() == -signal.SIGKILL
    assert [frame.by for frame in child.of(frames.Cancelling)] == [how]


def test_an_orphan_with_a_deadline_dies_of_whichever_is_first(start: Start) -> None:
    child = begin_with(start, STUBBORN.replace("= 0.1", "= 600"))
    child.control(deadline_line(clock_s() + LONG_S, clock_s() + 3))
    child.hang_up()
    assert child.end() == -signal.SIGKILL
    assert [frame.by for frame in child.of(frames.Cancelling)] == ["eof"]


def test_after_the_cancel_of_a_deadline_a_later_one_still_moves_the_kill(start: Start) -> None:
    """A lease that was renewed after all gives the clean-up its time; dbt is not cancelled anew."""
    waiting = """
said = False
note("not listening")
while True:
    try:
        time.sleep(0.01)
        if not said and control.clock_s() > float(open("first").read()) + 1:
            said = True
            note("alive")
    except (KeyboardInterrupt, OSError):
        pass
"""
    child = begin_with(start, NOTE + waiting)
    first = clock_s() + 5
    child.control(deadline_line(clock_s(), first))
    child.until(frames.Cancelling, by="deadline")
    child.control(deadline_line(clock_s(), clock_s() + LONG_S))
    (child.project / "first.new").write_text(str(first))
    (child.project / "first.new").rename(child.project / "first")
    child.until(frames.Log, message="alive")
    child.control(deadline_line(clock_s() + LONG_S, clock_s()))
    assert child.end() == -signal.SIGKILL
    assert len(child.of(frames.Cancelling)) == 1


HANG_AT_THE_END = (
    NOTE
    + """
main = sys.modules["dbtstream_child.main"]
def hang(*arguments):
    main.sys.stderr.write("hangs")
    while True:
        time.sleep(600)
main.results_frames = hang
"""
)


def test_what_follows_dbts_return_is_bounded_by_the_deadline_too(start: Start) -> None:
    files = {**projects.shop(), **projects.plugin("plugin", HANG_AT_THE_END)}
    child = start(files, ["build"], env={"PYTHONPATH": "."})
    while len(finished(child)) < 4:
        child.until(frames.NodeFinish)
    while not child.output().endswith("hangs"):
        os.sched_yield()
    child.control(deadline_line(clock_s() + LONG_S, clock_s()))
    assert child.end() == -signal.SIGKILL


def test_the_last_frames_have_the_deadline_beside_their_own_limit(start: Start) -> None:
    """`finishing` forgets when to cancel dbt, which has returned, but not when to be gone."""
    code = NOTE + "sys.modules['dbtstream_child.main'].Channel.close = lambda *_: time.sleep(600)"
    files = {**projects.shop(), **projects.plugin("plugin", code)}
    child = start(files, ["build"], env={"PYTHONPATH": "."})
    child.until(frames.Result)
    child.control(deadline_line(clock_s(), clock_s() + 1))
    assert child.end() == -signal.SIGKILL
    assert not child.of(frames.Cancelling)


def test_a_line_that_is_no_deadline_changes_nothing(start: Start) -> None:
    child = start(projects.shop(), ["build"])
    child.control(b"deadline\ndeadline 1\ndeadline nan nan\ndeadline 1 2 3\ndeadline x y\n")
    assert child.end() == 0
    assert child.output().count("not a deadline") == 5


# Time that passes while nobody looks.


def test_a_frozen_child_dies_at_its_deadline_without_ever_waking(start: Start) -> None:
    child = begin_with(start, STUBBORN)
    child.control(deadline_line(clock_s(), clock_s() + 3))
    child.until(frames.Cancelling)  # so it has read the line
    os.kill(child.process.pid, signal.SIGSTOP)
    assert child.end() == -signal.SIGKILL


def test_a_child_that_wakes_after_its_deadline_dies_at_once(start: Start) -> None:
    """Also where the kernel's timer is not to be had; it does not even cancel dbt first."""
    child = begin_with(start, NOTE + "control.KillTimer.arm = lambda *_: None\n" + STUBBORN)
    kill_at = clock_s() + 0.7
    child.control(deadline_line(clock_s() + LONG_S, kill_at))
    os.kill(child.process.pid, signal.SIGSTOP)
    while clock_s() < kill_at:
        os.sched_yield()
    assert child.process.poll() is None
    os.kill(child.process.pid, signal.SIGCONT)
    assert child.end() == -signal.SIGKILL
    assert not child.of(frames.Cancelling)


def test_a_child_that_wakes_to_a_renewed_deadline_goes_on(start: Start) -> None:
    """The parent said it while we were stopped: the lease is ours."""
    child = begin_slow(start)
    os.kill(child.process.pid, signal.SIGSTOP)
    child.control(deadline_line(clock_s(), clock_s()))
    child.control(deadline_line(clock_s() + LONG_S, clock_s() + LONG_S))
    os.kill(child.process.pid, signal.SIGCONT)
    child.control(frames.CONTROL_CANCEL)
    assert_interrupted(child, "control")


def test_code_that_never_lets_go_of_the_interpreter_dies_at_the_deadline(start: Start) -> None:
    child = begin_with(start, HOLDER)
    child.control(deadline_line(clock_s(), clock_s() + 5))
    child.until(frames.Cancelling, by="deadline")
    (child.project / "go").touch()
    assert child.end() == -signal.SIGKILL


# Where it is.


def test_a_signal_makes_it_tell_the_stacks_of_all_threads_and_go_on(
    start: Start, tmp_path: Path
) -> None:
    stacks = tmp_path / "stacks"
    child = begin_slow(start, stack_file=str(stacks))
    assert stacks.stat().st_mode & 0o777 == 0o600
    assert stacks.stat().st_size == 0
    # Again and again: a thread that runs while it is looked at may show no more than its top.
    while "execute_nodes" not in (text := stacks.read_text()):
        os.kill(child.process.pid, signal.SIGUSR1)
        os.sched_yield()
    child.control(frames.CONTROL_CANCEL)
    assert child.end() == 2
    assert child.result.interrupted
    assert "most recent call first" in text


def test_the_stacks_are_told_while_native_code_holds_the_interpreter(
    start: Start, tmp_path: Path
) -> None:
    stacks = tmp_path / "stacks"
    child = begin_with(start, HOLDER, stack_file=str(stacks))
    (child.project / "go").touch()
    line = len(HOLDER.splitlines())
    while f'dbt_plugin.py", line {line} in <module>' not in stacks.read_text():
        os.kill(child.process.pid, signal.SIGUSR1)
        os.sched_yield()
