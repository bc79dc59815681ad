"""Runs that are forked from a template: the same as ones of their own, and what goes wrong.

Most of it with a dbt that is imported in no time, so that a test can afford a few templates; the
dbt child's own tests run on real dbt with forked children, too.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dbtstream import forked_process
from dbtstream.config import NatsConfig
from dbtstream.dbt_process import DbtProcess, Exit
from dbtstream.errors import ChildNotStarted
from dbtstream.events import RunFinished, RunStarted
from dbtstream.frames import AnyFrame, Cancelling, Hello, Result, Start, clock_s
from dbtstream.template import NoFork
from dbtstream.templates import Templates
from tests.daemons import daemon_config, serving
from tests.fake_dbt import FACTS, FakeDbt, fake_dbt, surroundings

Until = Callable[[Callable[[], object]], Awaitable[None]]

SLOW = "import time\nopen('begun', 'w').close()\nwhile not os.path.exists('go'): time.sleep(0.01)"
SLOW = f"import os\n{SLOW}"


@pytest.fixture
def dbt(tmp_path: Path) -> FakeDbt:
    return fake_dbt(tmp_path / "venv")


class Runs:
    """Runs of one interpreter in one folder."""

    def __init__(self, dbt: FakeDbt, folder: Path, templates: Templates, until: Until) -> None:
        self.dbt, self.folder, self.templates, self.until = dbt, folder, templates, until
        self.environment = dict(surroundings(folder))

    @asynccontextmanager
    async def begin(self, code: str, **start: Any) -> AsyncIterator[DbtProcess]:
        child = await DbtProcess.start(
            self.dbt.python,
            Start(args=["code", code], project_dir=str(self.folder), **start),
            environment=self.environment,
            templates=self.templates,
        )
        try:
            yield child
        finally:
            await child.close()

    async def run(self, code: str = "", **start: Any) -> tuple[Hello, list[AnyFrame], Exit]:
        async with self.begin(code, **start) as child:
            return await to_end(child)

    async def facts(self) -> dict[str, Any]:
        hello, _, exited = await self.run(FACTS)
        assert exited.code == 0, exited
        text = await asyncio.to_thread((self.folder / "facts.json").read_text)
        facts: dict[str, Any] = json.loads(text)
        return {"start": hello.start, **facts}

    async def ready(self) -> int:
        """Have a template, and wait for it: its pid."""
        with contextlib.suppress(NoFork):  # it has begun with this
            self.templates._find(self.dbt.python, self.environment, ())
        await self.until(self.templates.pids)
        return self.templates.pids()[-1]


async def to_end(child: DbtProcess) -> tuple[Hello, list[AnyFrame], Exit]:
    hello = await child.hello(timeout_s=60)
    frames = [frame async for frame in child.frames()]
    return hello, frames, await child.wait(60)


@pytest.fixture
async def runs(dbt: FakeDbt, tmp_path: Path, until: Until) -> AsyncIterator[Runs]:
    (tmp_path / "project").mkdir()
    async with Templates("imports") as templates:
        yield Runs(dbt, tmp_path / "project", templates, until)


# The same as a process of its own.


async def test_a_forked_run_finds_what_a_cold_one_finds(runs: Runs) -> None:
    cold = await runs.facts()
    template = await runs.ready()
    warm = await runs.facts()
    again = await runs.facts()
    assert (cold.pop("start"), warm.pop("start"), again.pop("start")) == ("cold", "warm", "warm")
    assert warm["ppid"] == again["ppid"] == template
    assert len({each["pid"] for each in (cold, warm, again)}) == 3
    for facts in (warm, again):
        assert facts["session"] == facts["group"] == facts["pid"]
        assert facts["inheritable"] == []
        assert not [path for path in facts["fds"].values() if "facts" in path]
    for facts in (cold, warm, again):
        for name in ("pid", "session", "group", "ppid", "fds", "inheritable"):
            facts.pop(name)
        # What a shell of the run's sees is what Python sees.
        facts["shell"] = sorted(set(facts["shell"]) - {"", "_=/usr/bin/env"})
    assert warm == again == cold
    assert runs.templates.stats.warm == 2
    assert runs.templates.stats.cold == {"starting": 1}


async def test_nothing_of_one_run_reaches_the_next_or_the_template(runs: Runs) -> None:
    template = await runs.ready()
    runs.environment |= {"SECRET": "canary-" + "7f3a91", "DBT_ENV_CUSTOM_ENV_A": "1"}
    first = await runs.facts()
    assert first["start"] == "warm"
    assert first["environ"]["SECRET"] == "canary-7f3a91"
    runs.environment = dict(surroundings(runs.folder))
    second = await runs.facts()
    assert second["start"] == "warm"
    assert not {"SECRET", "DBT_ENV_CUSTOM_ENV_A"} & set(second["environ"])
    assert b"canary-" + b"7f3a91" not in await asyncio.to_thread(memory, template)


async def test_its_output_exit_code_and_control_are_its_own(runs: Runs) -> None:
    await runs.ready()
    _, frames, exited = await runs.run("print('told'); raise SystemExit(3)")
    assert isinstance(frames[-1], Result)
    assert exited.code == frames[-1].exit_code == 2
    assert "told" in exited.output_tail

    async with runs.begin(SLOW) as child:
        await child.hello(timeout_s=60)
        os.kill(child.pid, signal.SIGKILL)
        assert [frame async for frame in child.frames()] == []
        assert (await child.wait(60)).code == -signal.SIGKILL

    async with runs.begin(SLOW) as child:
        assert (await child.hello(timeout_s=60)).pid == child.pid
        await child.cancel()
        _, exited = [frame async for frame in child.frames()], await child.wait(60)
        assert exited.code == 2


async def test_cancel_deadline_signals_and_stacks_work(runs: Runs, until: Until) -> None:
    await runs.ready()
    slow = SLOW.replace("import os", "import os\ndef waits():\n    pass")
    for stop in ("deadline", "terminate", "close"):
        (runs.folder / "begun").unlink(missing_ok=True)
        async with runs.begin(slow, stack_file=str(runs.folder / "stacks")) as child:
            assert (await child.hello(timeout_s=60)).start == "warm"
            await until((runs.folder / "begun").exists)
            assert "<run>" in (await child.stack(timeout_s=60) or "")
            if stop == "deadline":
                child.set_deadline(clock_s(), clock_s() + 60)
            elif stop == "terminate":
                child.terminate()
            else:
                assert child._process.stdin is not None
                child._process.stdin.close()
            frames = [frame async for frame in child.frames()]
            assert (await child.wait(60)).code == 2
        told = {"deadline": "deadline", "terminate": "sigterm", "close": "eof"}[stop]
        assert [each.by for each in frames if isinstance(each, Cancelling)] == [told]
    deaf = "import time\nwhile True:\n  try: time.sleep(9)\n  except: pass"
    async with runs.begin(deaf) as child:
        await child.hello(timeout_s=60)
        child.set_deadline(clock_s(), clock_s() + 1)
        assert (await child.wait(60)).code == -signal.SIGKILL


async def test_a_kill_reaches_what_it_started(runs: Runs, until: Until) -> None:
    await runs.ready()
    code = "import subprocess, os\nprint(subprocess.Popen(['sleep', '600']).pid, flush=True)\n"
    async with runs.begin(code + SLOW) as child:
        await child.hello(timeout_s=60)
        await until(lambda: child.output_tail.endswith("\n"))
        grandchild = int(child.output_tail)
        assert (await child.wait(0.01)).code == -signal.SIGKILL
    await until(lambda: not alive(grandchild))
    # And one that a run left behind goes with its end.
    _, _, exited = await runs.run(code)
    grandchild = int(exited.output_tail)
    await until(lambda: not alive(grandchild))


async def test_a_folder_that_is_missing_is_told_as_ever(runs: Runs) -> None:
    await runs.ready()
    runs.folder.rmdir()
    with pytest.raises(ChildNotStarted, match="No such file"):
        await runs.run()
    assert runs.templates.stats.cold == {}


# Nothing is left.

LOCK = """
import multiprocessing
lock = multiprocessing.get_context("spawn").RLock()
print(lock._semlock.name)
"""


async def test_forty_runs_eight_at_once_leave_nothing(runs: Runs, until: Until) -> None:
    template = await runs.ready()
    await runs.run(LOCK)
    before = left(template), left(os.getpid())

    async def some() -> list[tuple[Hello, Exit]]:
        return [(hello, exited) for hello, _, exited in [await runs.run(LOCK) for _ in range(5)]]

    ended = [each for five in await asyncio.gather(*(some() for _ in range(8))) for each in five]
    assert {(hello.start, exited.code) for hello, exited in ended} == {("warm", 0)}
    assert runs.templates.pids() == [template]
    # The template's one child is the resource tracker.
    of_template, ours = before
    await until(lambda: left(template) == of_template and left(os.getpid()) <= ours)
    locks = {exited.output_tail.strip().lstrip("/") for _, exited in ended}
    assert len(locks) == 40
    assert not {f"sem.{lock}" for lock in locks} & set(os.listdir("/dev/shm"))


def left(pid: int) -> tuple[int, int]:
    """Open files and children, zombies among them."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return len(os.listdir(f"/proc/{pid}/fd")), len(children)


def memory(pid: int) -> bytes:
    """All that a process may write to."""
    parts = []
    with open(f"/proc/{pid}/maps", encoding="ascii") as maps, open(f"/proc/{pid}/mem", "rb") as mem:
        for line in maps:
            where, mode = line.split()[:2]
            if mode.startswith("rw"):
                begin, end = (int(part, 16) for part in where.split("-"))
                mem.seek(begin)
                parts.append(mem.read(end - begin))
    return b"".join(parts)


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


# What it must not fork.


THREAD = "import threading as t; t.Thread(target=t.Event().wait, daemon=True).start()"


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        (THREAD, "threads"),
        ("import socket; kept = socket.socket()", "open_files"),
        ("raise RuntimeError('torn wheel')", "import_failed"),
        ("import os; os._exit(1)", "died"),
    ],
    ids=["threads", "open-files", "broken", "dies"],
)
async def test_what_cannot_be_forked_starts_cold_and_that_is_said_once(
    runs: Runs, until: Until, caplog: pytest.LogCaptureFixture, adapter: str, reason: str
) -> None:
    runs.dbt.write("dbt/adapters/fake/__init__.py", adapter)
    for _ in range(3):
        hello, _, exited = await runs.run()
        assert (hello.start, exited.code) == ("cold", 0)
        await until(lambda: runs.templates._pauses)
    assert runs.templates.stats.cold["starting"] + runs.templates.stats.cold[reason] == 3
    assert runs.templates.stats.cold[reason] >= 1
    said = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert [(each.message, each.__dict__["reason"]) for each in said] == [
        ("dbt starts cold, not from a template", reason)
    ]
    assert runs.templates.pids() == []


async def test_an_interpreter_that_is_a_script_starts_cold(runs: Runs, until: Until) -> None:
    script = runs.folder / "python"
    script.write_text(f'#!/bin/sh\nexec {runs.dbt.python} "$@"\n')
    script.chmod(0o755)
    runs.dbt = FakeDbt(str(script), runs.dbt.folder)
    for _ in range(2):
        assert (await runs.run())[0].start == "cold"
        await until(lambda: runs.templates._pauses)
    assert runs.templates.stats.cold == {"starting": 1, "script": 1}
    assert runs.templates.stats.started == 0


READING = "import os; found = os.environ.get('FLAVOUR'), os.getenv('KEY'), 'MODE' in os.environ"


async def test_a_template_serves_only_runs_whose_imports_would_read_the_same(
    runs: Runs, until: Until
) -> None:
    """Each value that imports read has a template of its own, once it is asked for again."""
    runs.dbt.write("dbt/adapters/fake/__init__.py", READING)
    plain = await runs.ready()
    assert {"FLAVOUR", "KEY", "MODE"} <= runs.templates._reads[runs.dbt.python]
    runs.environment |= {"FLAVOUR": "sweet", "OTHER": "of no matter"}
    starts = [(await runs.run())[0].start for _ in range(2)]
    assert starts == ["cold", "cold"]
    assert runs.templates.stats.cold == {"other_environment": 1, "starting": 1}
    await until(lambda: len(runs.templates.pids()) == 2)
    code = "import dbt.adapters.fake as fake, sys; print(fake.found)"
    hello, _, exited = await runs.run(code)
    assert (hello.start, exited.output_tail) == ("warm", "('sweet', None, False)\n")
    del runs.environment["FLAVOUR"]
    assert (await runs.facts())["ppid"] == plain


async def test_a_secret_that_imports_read_is_in_no_template(runs: Runs) -> None:
    runs.dbt.write("dbt/adapters/fake/__init__.py", READING)
    await runs.ready()
    runs.environment["KEY"] = "canary"
    for _ in range(3):
        assert (await runs.run(secret_env=["KEY"]))[0].start == "cold"
    assert runs.templates.stats.cold == {"environment": 3}
    assert runs.templates.stats.started == 1


async def test_a_variable_that_is_new_each_time_begins_no_template(runs: Runs) -> None:
    runs.dbt.write("dbt/adapters/fake/__init__.py", READING)
    await runs.ready()
    for number in range(5):
        runs.environment["KEY"] = str(number)
        assert (await runs.run())[0].start == "cold"
    assert runs.templates.stats.cold == {"other_environment": 5}
    assert runs.templates.stats.started == 1


async def test_switched_off_there_is_no_template(
    dbt: FakeDbt, tmp_path: Path, until: Until
) -> None:
    async with Templates("off") as templates:
        runs = Runs(dbt, tmp_path, templates, until)
        assert (await runs.run())[0].start == "cold"
        assert (templates.stats.started, templates.stats.cold) == (0, {})


async def test_of_several_adapters_those_are_imported_that_runs_use(
    runs: Runs, until: Until
) -> None:
    runs.dbt.write("dbt_other-1.0.dist-info/METADATA", "Name: dbt-other\nVersion: 1.0\n")
    runs.dbt.write("dbt/adapters/other/__init__.py", "")
    runs.dbt.write("yaml.py", "import json\nsafe_load = json.load\n")
    outputs = {"dev": {"type": "other"}}
    profiles = {"shop": {"target": "dev", "outputs": outputs}}
    (runs.folder / "profiles.yml").write_text(json.dumps(profiles))
    (runs.folder / "dbt_project.yml").write_text(json.dumps({"profile": "shop"}))
    template = await runs.ready()
    code = "import sys; print([name for name in sys.modules if name.startswith('dbt.adapters.')])"
    hello, _, exited = await runs.run(code)
    assert (hello.start, hello.adapter_type, exited.output_tail) == ("warm", "other", "[]\n")
    await until(runs.templates.pids)
    hello, _, exited = await runs.run(code)
    assert (hello.start, exited.output_tail) == ("warm", "['dbt.adapters.other']\n")
    assert runs.templates.pids() == [template]


# Templates come and go.


async def test_after_so_many_runs_another_template_takes_over(
    dbt: FakeDbt, tmp_path: Path, until: Until
) -> None:
    async with Templates("imports", max_runs=2) as templates:
        runs = Runs(dbt, tmp_path, templates, until)
        first = await runs.ready()
        await runs.run()
        async with runs.begin(SLOW) as child:
            assert (await child.hello(timeout_s=60)).start == "warm"
            second = await runs.ready()
            assert second != first
            assert (await runs.facts())["ppid"] == second
            (tmp_path / "go").touch()
            # The old one is still there to tell how its last run ended.
            assert [type(frame) for frame in [f async for f in child.frames()]] == [Result]
            assert (await child.wait(60)).code == 0
        await until(lambda: not alive(first))
        assert templates.stats.replaced == {"runs": 1}


@pytest.mark.parametrize("what", ["a package", "an adapter's module on PYTHONPATH"])
async def test_other_packages_make_another_template(runs: Runs, tmp_path: Path, what: str) -> None:
    changed = runs.dbt.record
    if what != "a package":
        changed = tmp_path / "loose" / "loose_module.py"
        changed.parent.mkdir()
        changed.touch()
        runs.environment["PYTHONPATH"] = str(changed.parent)
        runs.dbt.write("dbt/adapters/fake/__init__.py", "import loose_module")
    first = await runs.ready()
    assert (await runs.facts())["ppid"] == first
    changed.write_text("# another one\n")
    assert (await runs.run())[0].start == "cold"
    assert await runs.ready() != first
    assert (await runs.run())[0].start == "warm"
    assert runs.templates.stats.cold == {"stale": 1}
    assert runs.templates.stats.replaced == {"stale": 1}


async def test_there_are_only_so_many(tmp_path: Path, until: Until) -> None:
    one, other = fake_dbt(tmp_path / "one"), fake_dbt(tmp_path / "other")
    async with Templates("imports", max_templates=1) as templates:
        first = await Runs(one, tmp_path, templates, until).ready()
        second = Runs(other, tmp_path, templates, until)
        with pytest.raises(NoFork, match="starting"):
            templates._find(other.python, second.environment, ())
        await until(lambda: not alive(first))
        assert await second.ready() != first
        assert templates.stats.replaced == {"room": 1}


async def test_a_run_goes_on_when_its_template_is_killed(runs: Runs, until: Until) -> None:
    first = await runs.ready()
    async with runs.begin(SLOW) as child:
        await child.hello(timeout_s=60)
        await until((runs.folder / "begun").exists)
        os.kill(first, signal.SIGKILL)
        await until(lambda: first not in runs.templates.pids())
        (runs.folder / "go").touch()
        frames = [frame async for frame in child.frames()]
        exited = await child.wait(60)
    assert isinstance(frames[-1], Result)
    assert frames[-1].success
    assert (exited.code, exited.oom) == (None, False)  # nobody was there to see
    await until(runs.templates.pids)
    assert (await runs.run())[0].start == "warm"
    assert runs.templates.stats.died == 1


async def test_a_killed_run_of_a_killed_template_has_ended(runs: Runs) -> None:
    first = await runs.ready()
    async with runs.begin(SLOW) as child:
        await child.hello(timeout_s=60)
        os.kill(first, signal.SIGKILL)
        child.kill()
        assert [frame async for frame in child.frames()] == []
        assert (await child.wait(60)).code in (None, -signal.SIGKILL)


async def test_a_run_whose_template_hangs_ends_all_the_same(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forked_process, "REPORT_S", 0.2)
    template = await runs.ready()
    async with runs.begin(SLOW) as child:
        await child.hello(timeout_s=60)
        os.kill(template, signal.SIGSTOP)
        (runs.folder / "go").touch()
        frames = [frame async for frame in child.frames()]
        assert isinstance(frames[-1], Result)
        assert (await child.wait(60)).code is None


async def test_a_hung_template_costs_a_run_its_limit_and_no_more(
    dbt: FakeDbt, tmp_path: Path, until: Until
) -> None:
    async with Templates("imports", fork_s=0.3) as templates:
        runs = Runs(dbt, tmp_path, templates, until)
        first = await runs.ready()
        os.kill(first, signal.SIGSTOP)
        hellos = await asyncio.gather(*(runs.run() for _ in range(3)))
        assert {(hello.start, exited.code) for hello, _, exited in hellos} == {("cold", 0)}
        assert templates.stats.cold["hung"] >= 1
        await until(lambda: not alive(first))
        await until(templates.pids)
        assert (await runs.run())[0].start == "warm"


OWNER = """
import asyncio, sys
from dbtstream.dbt_process import DbtProcess
from dbtstream.frames import Start
from dbtstream.templates import Templates
from tests.fake_dbt import FakeDbt
from tests.integration.test_templates import SLOW, Runs
from pathlib import Path

async def until(fact):
    while not fact():
        await asyncio.sleep(0.005)

async def main(python, folder):
    async with Templates("imports") as templates:
        runs = Runs(FakeDbt(python, Path()), Path(folder), templates, until)
        template = await runs.ready()
        async with runs.begin(SLOW) as child:
            await child.hello(timeout_s=60)
            print(template, child.pid, flush=True)
            await child.wait()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_killed_daemon_takes_its_template_and_its_runs_with_it(
    dbt: FakeDbt, tmp_path: Path, until: Until
) -> None:
    owner = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", OWNER, dbt.python, str(tmp_path)),
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert owner.stdout is not None
    template, run = map(int, (await owner.stdout.readline()).split())
    assert alive(template)
    assert alive(run)
    owner.kill()
    await owner.wait()
    await until(lambda: not alive(template))
    await until(lambda: not alive(run))


# In the daemon.


async def test_the_daemon_forks_runs_and_says_so(
    tmp_path: Path, nats_config: NatsConfig, dbt: FakeDbt, until: Until
) -> None:
    config = daemon_config(
        tmp_path, nats_config, "", project={"python": dbt.python}, warm_starts="imports"
    )
    async with serving(config) as served:
        worker = served.daemon.worker
        assert worker is not None
        templates = worker._services.templates
        assert templates is not None
        await until(templates.pids)  # without having been asked for a run
        (template,) = templates.pids()
        events = await served.run(["build"])
        (started,) = [event for event in events if isinstance(event, RunStarted)]
        assert started.start == "warm"
        assert started.start_s >= 0
        assert isinstance(events[-1], RunFinished)
    assert not alive(template)
