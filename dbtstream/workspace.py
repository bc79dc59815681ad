"""What a dbt process finds around it: its folders, its environment, its command line.

One folder per run under the state directory (`runs/<project>/<target>/<run_id>/`), and in it
one per further attempt, so that no two runs or attempts write to one target or log path, and
one parse cache per project and target that dbt reads and we replace atomically. Nothing here
starts a process: that is `dbt_process`. What is found here after dbt, `artifact_store` keeps.

The environment is built from an allow-list. What a request says never reaches it.
"""

import contextlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dbtstream.config import (
    DEFAULT_PASS_ENV,
    NEVER_PASS_ENV,
    Config,
    ProjectConfig,
    read_secret,
)

PARSE_CACHE = "partial_parse.msgpack"

RUN_VARIABLES = frozenset(
    {
        "DBT_TARGET_PATH",
        "DBT_LOG_PATH",
        "DBT_PARTIAL_PARSE_FILE_PATH",
        "DBT_STATE",
        "DBT_DEFER_STATE",
        "DBT_ENV_CUSTOM_ENV_DBTSTREAM_RUN_ID",
        "DBT_ENV_CUSTOM_ENV_DBTSTREAM_ATTEMPT",
        "TRACEPARENT",
        "TRACESTATE",
    }
)
"""Of an environment, what each run has its own value of; the rest is the project's."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """Folders and environment of one attempt at a run."""

    run_dir: Path
    attempt_dir: Path
    target_path: Path
    log_path: Path
    parse_cache: Path
    environment: dict[str, str]
    secret_names: tuple[str, ...]

    @property
    def state_path(self) -> Path:
        """Where an earlier run's artifacts are restored to; who does that makes it."""
        return self.attempt_dir / "state"

    @property
    def retry_path(self) -> Path:
        """Where dbt's `retry` finds what the attempts before this one left to do."""
        return self.attempt_dir / "retry"

    @property
    def stack_file(self) -> Path:
        """Where the child writes its stacks when it is asked to."""
        return self.attempt_dir / "stacks.txt"


def prepare_workspace(
    config: Config,
    name: str,
    project: ProjectConfig,
    target: str,
    run_id: str,
    traceparent: str,
    *,
    tracestate: str = "",
    attempt: int = 1,
) -> Workspace:
    """Make the attempt's folders (0700) and its environment. Blocking. ConfigError, OSError."""
    run_dir = runs_dir(config, name, target) / run_id
    # dbt would take what an earlier attempt left there for its own.
    attempt_dir = run_dir if attempt == 1 else run_dir / f"attempt-{attempt}"
    log_path = attempt_dir / "logs"
    cache = config.state_dir / "parse" / name / target / PARSE_CACHE
    config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    for folder in (log_path, cache.parent):
        make_private(folder, below=config.state_dir)
    if attempt > 1:
        make_private(attempt_dir / "retry")
    if project.target_path:
        target_path = Path(project.path) / project.target_path
        target_path.mkdir(parents=True, exist_ok=True, mode=0o700)
    else:
        target_path = attempt_dir / "target"
        make_private(target_path)
    environment = project_environment(config, name, project)
    environment |= {
        "DBT_TARGET_PATH": str(target_path),
        "DBT_LOG_PATH": str(log_path),
        # dbt puts these into its artifacts' metadata, so a run can be found from run_results.json.
        "DBT_ENV_CUSTOM_ENV_DBTSTREAM_RUN_ID": run_id,
        "DBT_ENV_CUSTOM_ENV_DBTSTREAM_ATTEMPT": str(attempt),
        "TRACEPARENT": traceparent,
    }
    if tracestate:
        environment["TRACESTATE"] = tracestate
    if project.target_path is None and cache.is_file():  # dbt refuses a path that is not there
        environment["DBT_PARTIAL_PARSE_FILE_PATH"] = str(cache)
    return Workspace(
        run_dir=run_dir,
        attempt_dir=attempt_dir,
        target_path=target_path,
        log_path=log_path,
        parse_cache=cache,
        environment=environment,
        secret_names=tuple(sorted(project.secrets)),
    )


def runs_dir(config: Config, project: str, target: str) -> Path:
    return config.state_dir / "runs" / project / target


def project_environment(config: Config, name: str, project: ProjectConfig) -> dict[str, str]:
    """What all runs of a project have, secrets included. Blocking. ConfigError, OSError."""
    environment = child_environment(project, os.environ)
    for variable, ref in project.secrets.items():
        key = f"projects.{name}.secrets.{variable}"
        environment[variable] = read_secret(ref, config.source, key)
    if project.profiles_dir:
        environment["DBT_PROFILES_DIR"] = project.profiles_dir
    return environment


def child_environment(project: ProjectConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """The part of the daemon's environment that the project may see, and its own `env`."""
    wanted = [*DEFAULT_PASS_ENV, *project.pass_env]
    exact = {name for name in wanted if not name.endswith("*")}
    prefixes = tuple(name[:-1] for name in wanted if name.endswith("*"))
    passed = {
        name: value
        for name, value in environ.items()
        if (name in exact or name.startswith(prefixes)) and not name.startswith(NEVER_PASS_ENV)
    }
    return passed | project.env


def keep_parse_cache(workspace: Workspace) -> None:
    """Offer this run's parse to the next one. Blocking; atomic, as others may be reading."""
    offer_parse_cache(workspace.target_path / PARSE_CACHE, workspace.parse_cache)


def offer_parse_cache(written: Path, shared: Path) -> None:
    """The same of any parse; nothing where it was not written. Blocking; OSError."""
    if not written.is_file() or written.parent == shared.parent:
        return
    fresh = shared.with_name(f".{written.parent.parent.name}.{PARSE_CACHE}")
    with written.open("rb") as source, open_private(fresh) as copy:
        shutil.copyfileobj(source, copy)
    fresh.replace(shared)


def forget_old_runs(config: Config, project: str, target: str, *, running: set[str]) -> int:
    """Delete the folders of all but the newest `keep_runs` ended runs; how many. Blocking.

    Run ids are UUIDv7: their names sort by age.
    """
    folder = runs_dir(config, project, target)
    try:
        ended = sorted(path for path in folder.iterdir() if path.name not in running)
    except OSError:
        return 0  # no run got as far as a folder, or it cannot be read: nothing depends on it
    deleted = 0
    for path in ended[: max(0, len(ended) - config.worker.keep_runs)]:
        with contextlib.suppress(OSError):
            shutil.rmtree(path)
            deleted += 1
    return deleted


def open_private(path: Path) -> BinaryIO:
    """Write a file that only its owner may read, whatever the umask and whoever made it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    file = os.open(path, flags, 0o600)
    os.fchmod(file, 0o600)
    return os.fdopen(file, "wb")


def make_private(folder: Path, *, below: Path | None = None) -> None:
    """0700, and so are the folders between `below`, which stays as it is, and this one. Blocking.

    By chmod: mkdir gives its mode to the last of the folders only, and the umask counts.
    """
    below = below or folder.parent
    for path in [*reversed(folder.relative_to(below).parents), folder.relative_to(below)][1:]:
        (below / path).mkdir(exist_ok=True, mode=0o700)
        (below / path).chmod(0o700)
