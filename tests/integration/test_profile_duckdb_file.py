"""The DuckDB file that is told of a project's target is the one that a real dbt makes."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dbtstream import duckdb_file as module
from dbtstream.config import DEFAULT_TARGET, ProjectConfig
from dbtstream.duckdb_file import duckdb_file
from dbtstream.project_python import ask_python
from tests.dbt_projects import PYTHON, write_project

MODEL = {"models/one.sql": "select 1 as id"}


def make(root: Path, outputs: Mapping[str, Any], **profile: Any) -> ProjectConfig:
    """A project with these outputs; the first of them is its profile's default target."""
    folder = write_project(root / "project", MODEL)
    content = {"target": next(iter(outputs)), "outputs": outputs, **profile}
    (folder / "profiles.yml").write_text(json.dumps({"shop": content}))
    return ProjectConfig(path=str(folder), targets=(*outputs, DEFAULT_TARGET), python=PYTHON)


def environment(**more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DBT_")}
    return {**inherited, "DBT_SEND_ANONYMOUS_USAGE_STATS": "0", **more}


def duckdb(path: str, **more: Any) -> dict[str, Any]:
    return {"type": "duckdb", "path": path, **more}


RUN_ALL = """
import sys
from dbt.cli.main import dbtRunner
for target in sys.argv[1:]:
    ran = dbtRunner().invoke(["run", *(["--target", target] if target != "default" else [])])
    assert ran.success, ran
"""


def run_dbt(project: ProjectConfig, targets: Sequence[str], env: Mapping[str, str]) -> None:
    dbt = [PYTHON, "-c", RUN_ALL, *targets]
    ran = subprocess.run(dbt, cwd=project.path, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def databases(root: Path) -> set[str]:
    """Of a real file, its name is its real path: the test's folder has no link above it."""
    found = (path for path in root.resolve().rglob("*") if path.suffix in (".duckdb", ".db"))
    return {str(path) for path in found if "link" not in path.relative_to(root.resolve()).parts}


async def test_it_is_the_file_that_dbt_makes(tmp_path: Path) -> None:
    """Relative, from variables with and without a default, through a link, in the home, and of
    the target that the profile chooses."""
    for folder in ("real", "home"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    project = make(
        tmp_path,
        {
            "dev": duckdb("data.duckdb"),
            "prod": duckdb("../{{ env_var('PLACE', 'real') }}/{{ env_var('NAME') }}.db"),
            "linked": duckdb(str(tmp_path / "link" / "linked.duckdb")),
            "secret": duckdb("{{ env_var('DBT_ENV_SECRET_FILE') | as_text }}"),
            "tilde": {"type": "{{ 'duck' ~ 'db' }}", "path": "~/tilde.duckdb"},
            "chosen": duckdb("{{ env_var('WHERE', 'x') }}.db"),
        },
        target="{{ env_var('WHERE', 'dev') }}",
    )
    env = environment(
        NAME="shop", WHERE="chosen", DBT_ENV_SECRET_FILE="s.db", HOME=str(tmp_path / "home")
    )
    targets = ["dev", "prod", "linked", "secret", "tilde", DEFAULT_TARGET]

    said = [await duckdb_file(project, target, env) for target in targets]
    assert databases(tmp_path) == set()
    run_dbt(project, targets, env)
    assert databases(tmp_path) == set(said)
    assert len(set(said)) == len(targets)


async def test_profiles_are_found_where_dbt_finds_them(tmp_path: Path) -> None:
    """In DBT_PROFILES_DIR, else beside the project, else in the home; by the profile's name."""
    project = make(tmp_path, {"dev": duckdb("beside.db")})
    beside = Path(project.path) / "profiles.yml"
    for folder in ("home/.dbt", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
        outputs = {"dev": duckdb(f"/{folder}/dev.db"), "prod": duckdb(f"/{folder}/prod.db")}
        content = {"shop": {"outputs": outputs}, "other": {"outputs": {"prod": duckdb("/o.db")}}}
        (tmp_path / folder / "profiles.yml").write_text(json.dumps(content))
    env = environment(HOME=str(tmp_path / "home"))
    elsewhere = env | {"DBT_PROFILES_DIR": str(tmp_path / "elsewhere")}
    other = ProjectConfig(path=project.path, targets=("prod",), python=PYTHON, profile="other")

    assert await duckdb_file(project, "dev", env) == f"{project.path}/beside.db"
    assert await duckdb_file(project, "dev", elsewhere) == "/elsewhere/dev.db"
    default = elsewhere | {"DBT_TARGET": "prod"}
    assert await duckdb_file(project, DEFAULT_TARGET, default) == "/elsewhere/prod.db"
    assert await duckdb_file(other, "prod", elsewhere) == "/o.db"
    named = elsewhere | {"DBT_PROFILE": "other"}
    assert await duckdb_file(project, "prod", named) == "/o.db"
    beside.unlink()
    assert await duckdb_file(project, "prod", env) == "/home/.dbt/prod.db"


async def test_what_is_no_file_of_duckdb_is_none(tmp_path: Path) -> None:
    outputs = {
        "postgres": {"type": "postgres", "host": "h", "path": "not.db"},
        "absent": {"type": "duckdb"},
        "memory": duckdb(":memory:"),
        "empty": duckdb(""),
        "motherduck": duckdb("md:shop"),
        "lake": duckdb("ducklake:sqlite:meta.sqlite"),
        "bucket": duckdb("s3://bucket/shop.db"),
        "unset": duckdb("{{ env_var('NOT_SET_ANYWHERE') }}.db"),
        "odd": duckdb("{{ nonsense }}.db"),
        "number": {"type": "duckdb", "path": 7},
    }
    project = make(tmp_path, outputs)
    for target in [*outputs, "no such target"]:
        assert await duckdb_file(project, target, environment()) is None, target


async def test_what_cannot_be_asked_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A project without profiles, without a folder, without an interpreter, with a hanging one."""
    project = make(tmp_path, {"dev": duckdb("data.db")})
    slow = tmp_path / "slow"
    slow.write_text(f"#!{sys.executable}\nimport signal\nsignal.pause()\n")
    slow.chmod(0o755)

    async def asked(**changed: str) -> str | None:
        settings = {"path": project.path, "python": PYTHON, **changed}
        return await duckdb_file(ProjectConfig(targets=("dev",), **settings), "dev", environment())  # type: ignore[arg-type]  # the strings among its fields

    assert await asked() is not None
    assert await asked(path=str(tmp_path / "nowhere")) is None
    assert await asked(python=str(tmp_path / "nothing")) is None
    monkeypatch.setattr(module, "LIMIT_S", 0.3)
    assert await asked(python=str(slow)) is None
    monkeypatch.undo()
    (Path(project.path) / "profiles.yml").write_text("shop: [")
    assert await asked() is None


async def test_it_is_asked_once_and_again_when_files_or_variables_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make(tmp_path, {"dev": duckdb("/{{ env_var('NAME', 'shop') }}.db")})
    profiles = Path(project.path) / "profiles.yml"
    asked = 0
    ask = ask_python

    async def counted(*args: Any, **more: Any) -> Any:
        nonlocal asked
        asked += 1
        return await ask(*args, **more)

    monkeypatch.setattr(module, "ask_python", counted)
    assert await duckdb_file(project, "dev", environment()) == "/shop.db"
    assert await duckdb_file(project, "dev", environment(TRACEPARENT="00-1")) == "/shop.db"
    assert asked == 1
    assert await duckdb_file(project, "dev", environment(NAME="lab")) == "/lab.db"
    assert asked == 2
    profiles.write_text(profiles.read_text().replace("/{{", "/x-{{"))
    assert await duckdb_file(project, "dev", environment(NAME="lab")) == "/x-lab.db"
    assert asked == 3
    assert await duckdb_file(project, "dev", environment(DBT_TARGET="dev", NAME="lab")) is not None
    assert asked == 3  # the target was given, so the variable does not count
