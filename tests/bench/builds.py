"""One `dbt build` of a generated project, in three ways, and what its process used.

    plain      dbt's own command line
    observed   the dbt child, started as `execution` starts it; its frames are thrown away
    submitted  a request to a daemon that has the same config

All three have the folders and the environment that `workspace` gives them, the parse that
one warm-up left, a database that is not there yet, and the same measure: a tiny process
stands in for the interpreter, starts the real one and writes down what the kernel says that
it used, when it has ended. What the observer costs outside of dbt's process is not in it.
"""

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from dbtstream.config import DEFAULT_TARGET, Config, ProjectConfig, WorkerConfig
from dbtstream.dbt_process import EXIT_S, DbtProcess
from dbtstream.frames import AnyFrame, ChildStats, NodeFinish, NodeWork, Result, Start
from dbtstream.statuses import RunStatus
from dbtstream.subjects import new_run_id
from dbtstream.workspace import Workspace, keep_parse_cache, prepare_workspace, runs_dir
from tests.bench.projects import write_layered_project
from tests.bench.served import Served, run_to_end

PROJECT = "shop"
BUILD = ["build"]
HELLO_S = 120.0
USAGE = "usage.json"
RESOURCE_REPORT = "Resource report: "  # then JSON; dbt's event ResourceReport in dbt.log
DBT = "import sys; from dbt.cli.main import cli; sys.exit(cli())"
"""The `dbt` command. `-m dbt.cli.main` would load that module twice, which plain dbt does not."""

NOT_PLAIN = ("TRACEPARENT", "DBT_ENV_CUSTOM_ENV_DBTSTREAM_RUN_ID")
"""What a dbt that nobody observes does not have in its environment."""

METERED_PYTHON = """\
#!{python} -S
import json, os, sys, time

began = time.monotonic()
pid = os.fork()
if pid == 0:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
os.closerange(3, 256)  # the frame pipe ends with dbt, not with us
status, usage = os.wait4(pid, 0)[1:]
used = {{
    "cpu_s": usage.ru_utime + usage.ru_stime,
    "wall_s": time.monotonic() - began,
    "max_rss_bytes": usage.ru_maxrss * 1024,
}}
with open(os.path.join(os.environ["DBT_LOG_PATH"], {usage!r}), "w") as file:
    json.dump(used, file)
sys.exit(os.waitstatus_to_exitcode(status) & 255)
"""


class Build(msgspec.Struct, frozen=True, kw_only=True):
    """What one build used: dbt's process and whatever that had started and waited for."""

    cpu_s: float
    wall_s: float
    max_rss_bytes: int
    reported_cpu_s: float = 0.0  # by dbt of itself, at the end of its command
    run_id: str = ""
    stats: ChildStats = ChildStats()  # of `observed` only
    frame_lags_ms: list[float] = []  # of `observed` only: callback to our end of the pipe


class Builds:
    """A project in `folder` and its builds, one at a time."""

    def __init__(self, folder: Path, *, models: int, tests: int) -> None:
        self.folder = write_layered_project(folder / "project", models=models, tests=tests)
        self.models, self.tests = models, tests
        self.config = Config(
            worker=WorkerConfig(name="bench", state_dir=str(folder / "state")),
            projects={
                PROJECT: ProjectConfig(
                    path=str(self.folder),
                    targets=(DEFAULT_TARGET,),
                    python=_metered_python(folder / "python"),
                    profiles_dir=str(self.folder),
                    env={"DBT_SEND_ANONYMOUS_USAGE_STATS": "0"},
                )
            },
            source="bench",
        )

    @property
    def _project(self) -> ProjectConfig:
        return self.config.projects[PROJECT]

    async def warm_up(self) -> None:
        """Parse once: the builds then find the parse, and dbt's modules compiled and cached."""
        workspace = self._workspace()
        await self._command(workspace, ["parse"])
        keep_parse_cache(workspace)

    async def plain(self) -> Build:
        return await self._command(self._workspace(), BUILD)

    async def observed(
        self,
        *,
        measure: bool = False,
        lineage: bool = False,
        selectors: Mapping[str, str] | None = None,
    ) -> Build:
        """With `lineage` the child tells the whole manifest and all compiled SQL, too."""
        workspace = self._workspace()
        start = Start(
            args=BUILD,
            project_dir=str(self.folder),
            measure=measure,
            graph=lineage,
            compiled_code=lineage,
            selectors=dict(selectors or {}),
        )
        child = await DbtProcess.start(
            self._project.python, start, environment=workspace.environment
        )
        last: AnyFrame | None = None
        lags_ms: list[float] = []
        try:
            await child.hello(timeout_s=HELLO_S)
            async for frame in child.frames():
                last = frame
                if isinstance(frame, NodeWork | NodeFinish):
                    lags_ms.append((time.time() - frame.at) * 1000)
            exited = await child.wait(EXIT_S)
        finally:
            await child.close()
        if not isinstance(last, Result) or exited.code:
            raise RuntimeError(f"the observed build ended with {last}: {exited.output_tail}")
        build = used(workspace.log_path)
        return msgspec.structs.replace(build, stats=last.stats, frame_lags_ms=lags_ms)

    async def submitted(self, served: Served) -> Build:
        self.forget_database()
        finished = await run_to_end(served.client, PROJECT, BUILD)
        if finished.status is not RunStatus.SUCCESS:
            raise RuntimeError(f"the submitted build ended with {finished}")
        run_dir = runs_dir(self.config, PROJECT, DEFAULT_TARGET) / finished.run_id
        return msgspec.structs.replace(used(run_dir / "logs"), run_id=finished.run_id)

    def _workspace(self) -> Workspace:
        self.forget_database()
        run_id = new_run_id(datetime.now(UTC))
        return prepare_workspace(self.config, PROJECT, self._project, DEFAULT_TARGET, run_id, "")

    def forget_database(self) -> None:
        for path in self.folder.glob("*.duckdb*"):
            path.unlink()

    async def _command(self, workspace: Workspace, args: Sequence[str]) -> Build:
        """dbt's command line. Its output goes into a pipe, as that of the child does."""
        environment = {
            name: value for name, value in workspace.environment.items() if name not in NOT_PLAIN
        }
        process = await asyncio.create_subprocess_exec(
            self._project.python,
            *("-c", DBT, *args),
            cwd=self.folder,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"dbt {args[0]} ended with {process.returncode}: {output[-4000:]!r}")
        return used(workspace.log_path)


def _metered_python(path: Path) -> str:
    path.write_text(METERED_PYTHON.format(python=sys.executable, usage=USAGE), encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def used(log_path: Path) -> Build:
    """What the build used that logged there."""
    build = msgspec.json.decode((log_path / USAGE).read_bytes(), type=Build)
    log = (log_path / "dbt.log").read_text(encoding="utf-8")
    report = json.JSONDecoder().raw_decode(log.rpartition(RESOURCE_REPORT)[2])[0]
    reported_s = report["process_user_time"] + report["process_kernel_time"]
    return msgspec.structs.replace(build, reported_cpu_s=reported_s)
