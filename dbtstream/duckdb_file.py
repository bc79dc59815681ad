"""Which DuckDB file a project's target writes to, told before its dbt is started.

A second process on one DuckDB file dies at its first statement, so `worker` has a run take a limit
of one place by the file's name. A small script in the project's interpreter reads profiles.yml
as dbt would, with the YAML and Jinja libraries that dbt brings; dbt itself is not imported,
which would take seconds. What it cannot read is for dbt to complain of, a moment later.
"""

import asyncio
import logging
import os
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from dbtstream.config import DEFAULT_TARGET, ProjectConfig
from dbtstream.project_python import PRINT_ANSWER, NoAnswer, ask_python

logger = logging.getLogger(__name__)

LIMIT_S = 30.0

# The environment's names and the files that it looks at are part of the answer, which holds for
# as long as they do. Values of variables are not: they may be secrets.
_SCRIPT = (
    r"""
import json, os, re, sys

out = {"file": None, "files": {}, "variables": []}

def variable(name):
    out["variables"].append(name)
    return os.environ.get(name)

def option(name):
    return variable("DBT_ENGINE_" + name) or variable("DBT_" + name)

def stamp(path):
    try:
        found = os.stat(path)
        out["files"][path] = [found.st_mtime_ns, found.st_size]
    except OSError:
        out["files"][path] = None
    return out["files"][path]

def load(path):
    import yaml
    stamp(path)
    with open(path, encoding="utf-8") as file:
        return yaml.safe_load(file)

def env_var(name, default=None):
    value = variable(name)
    if value is None and default is None:
        raise LookupError(name)
    return default if value is None else value

def var(name, default=None):
    if default is None:
        raise LookupError(name)
    return default

def render(value):
    if not isinstance(value, str) or "{" not in value:
        return value
    import jinja2
    jinja = jinja2.Environment(undefined=jinja2.StrictUndefined)
    for name in ("as_text", "as_native", "as_bool", "as_number"):
        jinja.filters[name] = lambda given: given
    return jinja.from_string(value).render(env_var=env_var, var=var)

def profiles_file():
    folder = option("PROFILES_DIR")
    if folder:
        return os.path.join(folder, "profiles.yml")
    beside = os.path.abspath("profiles.yml")
    if stamp(beside):
        return beside
    return os.path.join(variable("HOME") or os.path.expanduser("~"), ".dbt", "profiles.yml")

def find(profile, target):
    profile = profile or option("PROFILE")
    if not profile:
        profile = render(load(os.path.abspath("dbt_project.yml"))["profile"])
    chosen = load(os.path.abspath(profiles_file()))[profile]
    target = target or option("TARGET") or render(chosen.get("target", "default"))
    output = chosen["outputs"][target]
    if render(output["type"]) != "duckdb":
        return None
    path = render(output.get("path", ":memory:"))
    # :memory:, :memory:name; md:, motherduck:, ducklake:, s3:// and the like.
    if not path or re.match(r":memory:|[A-Za-z][A-Za-z0-9+.-]+:", path):
        return None
    if path.startswith("~"):
        variable("HOME")
    return os.path.realpath(os.path.expanduser(path))

try:
    out["file"] = find(*sys.argv[1:])
except Exception as error:
    out["error"] = type(error).__name__
"""
    + PRINT_ANSWER
)


class _Found(msgspec.Struct, frozen=True):
    """What the script prints. `files`: mtime in ns and size, or None for one that is not there."""

    file: str | None
    files: dict[str, tuple[int, int] | None]
    variables: list[str]
    error: str | None = None


class _Known(NamedTuple):
    found: _Found
    variables: dict[str, str | None]

    def holds(self, environment: Mapping[str, str]) -> bool:
        """Whether the script would say the same again. Blocking."""
        same = (environment.get(name) == value for name, value in self.variables.items())
        return all(same) and all(_stamp(path) == at for path, at in self.found.files.items())


_known: dict[tuple[str, str, str | None, str], _Known] = {}


async def duckdb_file(
    project: ProjectConfig, target: str, environment: Mapping[str, str]
) -> str | None:
    """Its real path; None if it is none, or lives in memory or elsewhere, or cannot be told.

    `environment` is what dbt would get. Asked again, it costs next to nothing.
    """
    key = (project.python, project.path, project.profile, target)
    known = _known.get(key)
    if known is not None and await asyncio.to_thread(known.holds, environment):
        return known.found.file
    try:
        found = await ask_python(
            project,
            _SCRIPT,
            project.profile or "",
            "" if target == DEFAULT_TARGET else target,
            environment=environment,
            limit_s=LIMIT_S,
            answer=_Found,
        )
    except NoAnswer as error:
        _complain(project, target, str(error))
        return None
    if found.error is not None:
        _complain(project, target, found.error)
    _known[key] = _Known(found, {name: environment.get(name) for name in found.variables})
    return found.file


def _complain(project: ProjectConfig, target: str, problem: str) -> None:
    logger.debug(
        "cannot tell which file a target writes to",
        extra={
            "action": "duckdb_file.unknown",
            "path": project.path,
            "target": target,
            "problem": problem,
        },
    )


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
