"""`dbtstream check` on real servers, interpreters and projects: what is wrong, how to mend it."""

import sys
from pathlib import Path

import msgspec
import pytest

from dbtstream import checks
from dbtstream.checks import Check, run_checks
from dbtstream.cli import _main
from dbtstream.config import Config, NatsConfig, ProjectConfig, SecretRef, StreamsConfig
from dbtstream.embedded import NatsServer
from dbtstream.nats_link import NatsLink
from dbtstream.streams import ensure_streams
from tests.dbt_projects import PYTHON, shop, write_project


async def found(config: Config) -> dict[str, Check]:
    return {check.subject: check async for check in run_checks(config)}


def project(path: Path, **settings: object) -> ProjectConfig:
    base = ProjectConfig(path=str(path), targets=("dev",), python=PYTHON, profiles_dir=str(path))
    return msgspec.structs.replace(base, **settings)


def script(path: Path, body: str) -> str:
    """An interpreter that is not one."""
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


async def test_all_is_well_on_a_server_and_with_a_project_that_are(
    nats_server: NatsServer, nats_config: NatsConfig, tmp_path: Path
) -> None:
    folder = write_project(tmp_path / "shop", shop())
    targets = ("dev", "default")  # `default` means: the profile's own
    config = Config(nats=nats_config, projects={"shop": project(folder, targets=targets)})

    all_checks = await found(config)

    assert [check.subject for check in all_checks.values() if not check.ok] == []
    assert nats_server.url in all_checks["nats"].found
    assert "file store" in all_checks["jetstream"].found
    assert "dbt-core 1." in all_checks["project shop dbt"].found
    for target in targets:
        line = all_checks[f"project shop target {target}"].found
        assert line.startswith(f"shop.dev of {folder / 'profiles.yml'}, dbt-duckdb ")


async def test_each_trouble_of_a_project_is_named_and_can_be_mended(
    nats_config: NatsConfig, tmp_path: Path
) -> None:
    """One config with a project for each; none of them keeps the others from being checked."""
    good = write_project(tmp_path / "good", shop())
    without_profile = write_project(tmp_path / "no_profile", shop())
    (without_profile / "profiles.yml").write_text("other: {}", encoding="utf-8")
    secret = write_project(tmp_path / "secret", shop())
    profiles = (secret / "profiles.yml").read_text(encoding="utf-8")
    needs = profiles.replace('"threads": 2', '"threads": 2, "schema": "{{ env_var(\'SCHEMA\') }}"')
    (secret / "profiles.yml").write_text(needs, encoding="utf-8")
    config = Config(
        nats=nats_config,
        source="dbtstream.toml",
        projects={
            "target": project(good, targets=("dev", "nightly")),
            "profile": project(without_profile),
            "envvar": project(secret),
            "envset": project(secret, env={"SCHEMA": "main"}),
            "nowhere": project(good, python=str(tmp_path / "no" / "python")),
            "nodbt": project(
                good, python=script(tmp_path / "p1", f'exec {sys.executable} -I -S "$@"')
            ),
            "nopython": project(good, python=script(tmp_path / "p2", "echo not me >&2; exit 3")),
            "hidden": project(good, secrets={"PASSWORD": SecretRef(env="NOT_SET_ANYWHERE")}),
        },
    )

    all_checks = await found(config)
    bad = {subject: check for subject, check in all_checks.items() if not check.ok}

    assert all(check.mend for check in bad.values())
    facts = {subject: check.found for subject, check in bad.items()}
    assert facts.keys() == {
        "project target target nightly",
        "project profile target dev",
        "project envvar target dev",
        "project nowhere python",
        "project nodbt dbt",
        "project nopython python",
        "project hidden",
    }
    assert "does not have a target named 'nightly'" in facts["project target target nightly"]
    assert "Could not find profile named 'shop'" in facts["project profile target dev"]
    assert "SCHEMA" in facts["project envvar target dev"]
    assert "No such file" in facts["project nowhere python"]
    assert "dbt-core is not installed" in facts["project nodbt dbt"]
    assert "not me" in facts["project nopython python"]
    assert "NOT_SET_ANYWHERE is not set" in facts["project hidden"]


async def test_an_interpreter_that_does_not_answer_is_given_up(
    nats_config: NatsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "PROBE_S", 0.3)
    folder = write_project(tmp_path / "shop", shop())
    slow = project(folder, python=script(tmp_path / "slow", "exec sleep 1000"))

    all_checks = await found(Config(nats=nats_config, projects={"shop": slow}))

    assert "did not answer within 0.3 s" in all_checks["project shop python"].found


async def test_no_server_is_told_with_its_address_and_the_projects_are_checked_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "CONNECT_S", 0.3)
    folder = write_project(tmp_path / "shop", shop())
    nats = NatsConfig(servers=("nats://127.0.0.1:1",))

    all_checks = await found(Config(nats=nats, projects={"shop": project(folder)}))

    assert not all_checks["nats"].ok
    assert "nats://127.0.0.1:1" in all_checks["nats"].found
    assert "nats-server -js" in all_checks["nats"].mend
    assert "jetstream" not in all_checks
    assert all_checks["project shop target dev"].ok


async def test_an_account_without_jetstream_is_told(tmp_path: Path) -> None:
    accounts = "accounts { A { users: [ { user: a, password: b } ] } }\nno_auth_user: a"
    async with NatsServer.start(tmp_path / "nats", config_extra=accounts) as server:
        all_checks = await found(Config(nats=NatsConfig(servers=(server.url,))))

    assert all_checks["nats"].ok
    assert not all_checks["jetstream"].ok
    assert "jetstream" in all_checks["jetstream"].mend
    assert "streams" not in all_checks


async def test_streams_that_nobody_will_create_are_a_failure_until_setup_did(
    nats_config: NatsConfig, link: NatsLink
) -> None:
    by_serve = Config(nats=nats_config)
    by_hand = Config(nats=nats_config, streams=StreamsConfig(manage=False))

    assert (await found(by_serve))["streams"].ok
    streams = (await found(by_hand))["streams"]
    assert not streams.ok
    assert "DBT_RUNS" in streams.found
    assert "dbtstream setup" in streams.mend

    await ensure_streams(link, StreamsConfig())
    assert (await found(by_hand))["streams"].ok


async def test_a_config_without_projects_is_not_enough_to_serve(nats_config: NatsConfig) -> None:
    projects = (await found(Config(nats=nats_config)))["projects"]
    assert not projects.ok
    assert "[projects." in projects.mend


def test_the_command_says_it_line_by_line_and_as_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "CONNECT_S", 0.3)
    path = tmp_path / "dbtstream.toml"
    path.write_text('[nats]\nservers = ["nats://127.0.0.1:1"]\n', encoding="utf-8")

    assert _main(["--config", str(path), "check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"✓ config: {path}"
    assert lines[1].startswith("✗ nats: no answer from NATS at nats://127.0.0.1:1")
    assert lines[2].startswith("    → ")
    assert lines[-1] == "2 of 3 checks failed"

    assert _main(["--config", str(path), "check", "--json"]) == 1
    decoded = msgspec.json.decode(capsys.readouterr().out, type=list[Check])
    assert [check.ok for check in decoded] == [True, False, False]
