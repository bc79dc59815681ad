"""A daemon and a NATS server for one project, in this process, for as long as a context lasts.

`dbtstream run --project-dir` and `dbtstream demo` are this plus `client` and `follow`: the
same messages take the same way as in production, only the broker is bundled (`embedded`) and
all state is in a folder that goes away. Nothing is read from a config file.
"""

import asyncio
import contextlib
import json
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from dbtstream.config import (
    DEFAULT_TARGET,
    KNOWN_COMMANDS,
    Config,
    HttpConfig,
    NatsConfig,
    ProjectConfig,
    StreamsConfig,
    WorkerConfig,
)
from dbtstream.errors import ConfigError, DbtstreamError
from dbtstream.subjects import NAME

if TYPE_CHECKING:
    from dbtstream.daemon import Daemon

DEMO_PROJECT = "flights"
DEMO_TARGET = "dev"

EVENTS_MAX_BYTES = 512 * 1024**2
DRAIN_S = 1.0

_TALKATIVE = frozenset({"debug", "deps", "clone"})
"""dbt commands that report in log lines of level info."""

_NAME_LINE = re.compile(r"""^name\s*:\s*["']?([^"'#\s]+)""", re.MULTILINE)


@contextlib.asynccontextmanager
async def local_daemon(
    name: str, project: ProjectConfig, *, port: int | None = None, source: str
) -> AsyncIterator[str]:
    """The URL of a NATS server on which a daemon serves `project`. Raises what they raise.

    Leaving it stops both; dbt that still runs is interrupted.
    """
    from dbtstream.daemon import Daemon
    from dbtstream.embedded import NatsServer

    with tempfile.TemporaryDirectory(prefix="dbtstream-", ignore_cleanup_errors=True) as folder:
        async with NatsServer.start(Path(folder) / "nats", port=port) as server:
            config = _config(server.url, Path(folder) / "state", name, project, source)
            async with _running(Daemon(config)):
                yield server.url


def _config(url: str, state: Path, name: str, project: ProjectConfig, source: str) -> Config:
    return Config(
        nats=NatsConfig(servers=(url,)),
        streams=StreamsConfig(events_max_bytes=EVENTS_MAX_BYTES),
        http=HttpConfig(listen=""),
        worker=WorkerConfig(
            name="local",
            slots=1,
            state_dir=str(state),
            drain_timeout_s=DRAIN_S,
            warm_starts="off",  # a template is for the runs to come, and there are few or none
        ),
        projects={name: project},
        source=source,
    )


@contextlib.asynccontextmanager
async def _running(daemon: "Daemon") -> AsyncIterator[None]:
    """The daemon serves inside; if it dies, so does the body, with the daemon's error."""
    body = asyncio.current_task()
    assert body is not None  # noqa: S101  # a coroutine always runs in a task
    serving = asyncio.create_task(daemon.run(), name="daemon")
    ready = asyncio.create_task(daemon.ready(), name="daemon is ready")
    await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        ready.cancel()
        await serving
        raise DbtstreamError("the daemon ended before it was ready")

    def died(_: asyncio.Task[None]) -> None:
        body.cancel()

    serving.add_done_callback(died)
    # A closed terminal: without this nothing would stop dbt or remove the folder.
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, body.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        serving.remove_done_callback(died)
        daemon.stop()
        await serving


def project_of_folder(
    folder: Path,
    args: Sequence[str],
    *,
    target: str | None,
    profiles_dir: Path | None,
    python: str | None,
) -> tuple[str, ProjectConfig]:
    """A dbt project as its owner would run it in a shell: its environment, its `target/`.

    Raises ConfigError when there is no project there.
    """
    macro = tuple(args[1:2]) if args[:1] == ["run-operation"] else ()
    talkative = bool(args) and args[0] in _TALKATIVE
    return project_name(folder), ProjectConfig(
        path=str(folder.absolute()),
        targets=(target or DEFAULT_TARGET,),
        python=python or sys.executable,
        profiles_dir=str(profiles_dir.absolute()) if profiles_dir else None,
        commands=KNOWN_COMMANDS,
        allow_inline=True,
        run_operations=macro,
        pass_env=("*",),
        target_path="target",
        log_level="info" if talkative else "warn",
    )


def project_name(folder: Path) -> str:
    """`name` in dbt_project.yml, without a YAML library: a line of its own, or JSON.

    Written in any other way, the project is called `project` here: it is only a label.
    """
    file = folder / "dbt_project.yml"
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            str(file), "", f"cannot be read: {problem}", "--project-dir must be a dbt project"
        ) from error
    found = _NAME_LINE.search(text)
    written = found[1] if found else _json_name(text)
    name = re.sub(r"[^A-Za-z0-9_-]", "_", written)[:64]
    return name if NAME.fullmatch(name) else "project"


def _json_name(text: str) -> str:
    try:
        return str(json.loads(text)["name"])
    except (ValueError, TypeError, LookupError):
        return ""


def copy_demo(folder: Path) -> ProjectConfig:
    """The sample project in a folder that dbt may write to. Blocking."""
    with resources.as_file(resources.files("dbtstream.demo") / "project") as shipped:
        shutil.copytree(shipped, folder, dirs_exist_ok=True)
    return ProjectConfig(
        path=str(folder),
        targets=(DEMO_TARGET,),
        python=sys.executable,
        profiles_dir=str(folder),
        env={"DBT_SEND_ANONYMOUS_USAGE_STATS": "0"},
    )
