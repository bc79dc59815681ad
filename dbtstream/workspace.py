"""What a dbt process finds around it: its folders, its environment, its command line.

One folder per run under the state directory (`runs/<project>/<target>/<run_id>/`), so that no
two runs write to one target or log path, and one parse cache per project and target that dbt
reads and we replace atomically. Nothing here starts a process: that is `dbt_process`.

The environment is built from an allow-list. What a request says never reaches it.
"""

import contextlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dbtstream.config import (
    DEFAULT_PASS_ENV,
    NEVER_PASS_ENV,
    Config,
    ProjectConfig,
    read_secret,
)

PARSE_CACHE = "partial_parse.msgpack"


@dataclass(frozen=True, slots=True)
class Workspace:
    """Folders and environment of one run."""

    run_dir: Path
    target_path: Path
    log_path: Path
    parse_cache: Path
    environment: dict[str, str]
    secret_names: tuple[str, ...]


def prepare_workspace(
    config: Config, name: str, project: ProjectConfig, target: str, run_id: str, traceparent: str
) -> Workspace:
    """Make the run's folders (0700) and its environment. Blocking. Raises ConfigError, OSError."""
    run_dir = runs_dir(config, name, target) / run_id
    target_path = (
        Path(project.path) / project.target_path if project.target_path else run_dir / "target"
    )
    log_path = run_dir / "logs"
    cache = config.state_dir / "parse" / name / target / PARSE_CACHE
    for folder in (run_dir, target_path, log_path, cache.parent):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    environment = child_environment(project, os.environ)
    for variable, ref in project.secrets.items():
        key = f"projects.{name}.secrets.{variable}"
        environment[variable] = read_secret(ref, config.source, key)
    environment |= {
        "DBT_TARGET_PATH": str(target_path),
        "DBT_LOG_PATH": str(log_path),
        # dbt puts it into its artifacts' metadata, so a run can be found from run_results.json.
        "DBT_ENV_CUSTOM_ENV_DBTSTREAM_RUN_ID": run_id,
        "TRACEPARENT": traceparent,
    }
    if project.target_path is None and cache.is_file():  # dbt refuses a path that is not there
        environment["DBT_PARTIAL_PARSE_FILE_PATH"] = str(cache)
    if project.profiles_dir:
        environment["DBT_PROFILES_DIR"] = project.profiles_dir
    return Workspace(
        run_dir, target_path, log_path, cache, environment, tuple(sorted(project.secrets))
    )


def runs_dir(config: Config, project: str, target: str) -> Path:
    return config.state_dir / "runs" / project / target


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
    written = workspace.target_path / PARSE_CACHE
    if not written.is_file() or written.parent == workspace.parse_cache.parent:
        return
    fresh = workspace.parse_cache.with_name(f".{workspace.run_dir.name}.{PARSE_CACHE}")
    shutil.copyfile(written, fresh)
    fresh.replace(workspace.parse_cache)


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
