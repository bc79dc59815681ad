"""`dbtstream run`, `demo` and the commands that look at runs, as a person types them."""

import asyncio
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dbtstream.client import Client
from dbtstream.embedded import NatsServer
from dbtstream.statuses import RunStatus
from tests.acceptance.conftest import COMMAND, ENVIRONMENT, serve, write_config
from tests.dbt_projects import PYTHON, node_failure, shop, skip_chain, slow, write_project

LIMIT_S = 100

needs_own_dbt = pytest.mark.skipif(
    sys.executable != PYTHON, reason="these run the dbt of dbtstream's own interpreter"
)


class Typed:
    """A command that was started; read its lines, or its whole end."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []

    async def until(self, text: str) -> str:
        """The first line of stdout that has it."""
        assert self.process.stdout is not None
        async with asyncio.timeout(LIMIT_S):
            while line := (await self.process.stdout.readline()).decode():
                self.lines.append(line.rstrip("\n"))
                if text in line:
                    return line
        raise AssertionError(f"no line with {text!r} in {self.lines}")

    async def end(self) -> tuple[int, str, str]:
        """(exit code, the rest of stdout, stderr)"""
        async with asyncio.timeout(LIMIT_S):
            out, err = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, out.decode(), err.decode()

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)


@asynccontextmanager
async def typed(*argv: str, env: Mapping[str, str] | None = None) -> AsyncIterator[Typed]:
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=ENVIRONMENT | dict(env or {}),
        limit=1024 * 1024,
    )
    try:
        yield Typed(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def output_of(*argv: str, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    async with typed(*argv, env=env) as command:
        return await command.end()


def in_folder(folder: Path, *args: str) -> list[str]:
    return ["run", "--project-dir", str(folder), "--profiles-dir", str(folder), *args]


def events_of(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


@needs_own_dbt
async def test_a_project_folder_runs_without_daemon_server_or_config(tmp_path: Path) -> None:
    """And leaves what dbt would leave, and nothing else."""
    project = write_project(tmp_path / "shop", shop())
    temporary = tmp_path / "tmp"
    temporary.mkdir()

    code, out, err = await output_of(
        *in_folder(project, "--", "build"), env={"TMPDIR": str(temporary)}
    )

    assert (code, err) == (0, "")
    assert "shop/default started: dbt build" in out
    assert re.search(r"OK +model +orders", out)
    assert re.search(r"│ model +│ +2 │", out)
    assert "success in" in out
    assert (project / "target" / "run_results.json").is_file()
    assert list(temporary.iterdir()) == []


@needs_own_dbt
async def test_a_failing_build_exits_as_dbt_does_and_says_what_it_kept_from_running(
    tmp_path: Path,
) -> None:
    project = write_project(tmp_path / "shop", skip_chain())

    code, out, _ = await output_of(*in_folder(project, "--", "build"))

    assert code == 1
    row = next(line for line in out.splitlines() if "│ model.shop.broken" in line)
    assert row.rstrip("│ ").endswith("2")
    assert "no_such_table" in out


@needs_own_dbt
async def test_the_shell_s_environment_and_the_given_target_reach_dbt(tmp_path: Path) -> None:
    files = {"models/who.sql": "select '{{ env_var('WHO') }}' as who, '{{ target.name }}' as t"}
    project = write_project(tmp_path / "shop", files)
    command = in_folder(project, "--target", "dev", "--var", "x=1", "--json", "--", "build")

    code, out, err = await output_of(*command, env={"WHO": "ada"})

    assert (code, err) == (0, "")
    events = events_of(out)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert {event["target"] for event in events} == {"dev"}
    compiled = project / "target" / "run" / "shop" / "models" / "who.sql"
    assert "'ada' as who, 'dev' as t" in compiled.read_text(encoding="utf-8")


@needs_own_dbt
async def test_the_text_of_list_is_all_that_stdout_gets(tmp_path: Path) -> None:
    project = write_project(tmp_path / "shop", shop())

    code, out, err = await output_of(*in_folder(project, "--", "list", "--resource-type", "model"))

    assert code == 0
    assert sorted(out.splitlines()) == ["shop.daily", "shop.orders"]
    assert "success in" in err


@needs_own_dbt
async def test_words_that_dbt_does_not_know_exit_with_dbts_usage_code(tmp_path: Path) -> None:
    project = write_project(tmp_path / "shop", shop())
    command = in_folder(project, "--", "build", "--no-such-flag")
    code, _, err = await output_of(*command)

    assert code == 2
    assert err.startswith("dbtstream: flag_not_allowed: --no-such-flag")
    assert len(err.splitlines()) == 1


@needs_own_dbt
async def test_ctrl_c_cancels_the_run_and_shows_it_to_its_end(tmp_path: Path) -> None:
    project = write_project(tmp_path / "shop", slow())
    async with typed(*in_folder(project, "--json", "--", "run")) as command:
        while '"slow"' not in await command.until('"type":"node.started"'):
            pass
        command.interrupt()
        code, out, err = await command.end()

    assert code == 2
    assert "Cancelling the run" in err
    last = events_of(out)[-1]
    assert (last["type"], last["status"]) == ("run.finished", "cancelled")


async def test_a_second_ctrl_c_leaves_and_the_run_goes_on_being_cancelled(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """With a daemon: the run is not ours to wait for."""
    project = write_project(tmp_path / "shop", slow())
    config = write_config(tmp_path, nats_server.url, project)
    async with serve(config), Client.connect(nats_server.url) as client:
        async with typed("--nats", nats_server.url, "run", "shop", "--", "run") as command:
            line = await command.until("queued")
            await command.until("START    model      slow")
            command.interrupt()
            await command.until("Cancelling the run")
            command.interrupt()
            code, out, _ = await command.end()
        run_id = line.split(" run ")[1].split()[0]
        verdict = await client.wait(run_id, timeout_s=LIMIT_S)

    # Either it left, or dbt was as fast as the second key.
    assert code == 130 or "finished: cancelled" in out
    assert verdict.status is RunStatus.CANCELLED


async def test_runs_are_found_looked_at_replayed_and_cancelled(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    project = write_project(tmp_path / "shop", node_failure())
    config = str(write_config(tmp_path, nats_server.url, project))

    async def done(*argv: str) -> tuple[int, str]:
        code, out, err = await output_of("--config", config, *argv)
        assert err == ""
        return code, out

    async with serve(Path(config)):
        labels = ["--label", "team=finance", "--reason", "late data"]
        code, out = await done("run", "shop", *labels, "--detach", "--", "build")
        run_id = out.strip()
        assert code == 0

        # To its end, though it began before.
        code, out = await done("tail", "--run", run_id, "--json")
        events = events_of(out)
        assert {event["run_id"] for event in events} == {run_id}
        assert (events[-1]["type"], events[-1]["status"]) == ("run.finished", "failure")
        assert events[-1]["labels"] == {"team": "finance"}

        code, out = await done("ps")
        assert out.startswith("nothing runs or waits")
        code, out = await done("ps", "--all", "--project", "shop")
        assert run_id in out
        for name in ("last", run_id, run_id[:13], run_id[-6:]):
            code, out = await done("show", name)
            assert code == 0
            assert run_id in out
            assert "model.shop.broken" in out
            assert "late data" in out
        code, out = await done("show", "last", "--json")
        assert json.loads(out)["finished"]["failed"][0]["unique_id"] == "model.shop.broken"
        code, out = await done("cancel", "last")
        assert (code, out) == (0, f"run {run_id} had already ended: failure\n")
        code, out, err = await output_of("--config", config, "show", "beef")
        assert (code, out) == (1, "")
        assert err.startswith("dbtstream: no run beef is known")


@needs_own_dbt
async def test_the_demo_shows_everything_and_its_hints_work(tmp_path: Path) -> None:
    temporary = {"TMPDIR": str(tmp_path)}
    async with typed("demo", "--keep", env=temporary) as demo:
        await demo.until("finished: success")
        await demo.until("In another terminal")
        hint = await demo.until("tail --since")
        words = shlex.split(hint, comments=True)
        assert words[0] == "dbtstream"
        code, out, err = await output_of(*words[1:3], "tail", "--run", "last", "--json")
        assert (code, err) == (0, "")
        assert events_of(out)[-1]["status"] == "success"
        again = shlex.split(await demo.until("run flights"), comments=True)
        code, out, err = await output_of(*again[1:])
        assert (code, err) == (0, "")
        demo.interrupt()
        code, _, err = await demo.end()

    assert (code, err) == (0, "")
    assert any(re.search(r"│ model +│ ", line) for line in demo.lines)
    assert os.listdir(tmp_path) == []
