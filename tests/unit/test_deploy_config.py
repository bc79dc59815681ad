"""The sample config loads as it stands, and mentions every key with its real default."""

import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dbtstream.config import (
    AssetsConfig,
    HttpConfig,
    LineageConfig,
    LogConfig,
    NatsConfig,
    OpenLineageConfig,
    OtlpConfig,
    ProjectConfig,
    Section,
    StreamsConfig,
    TelemetryConfig,
    WorkerConfig,
    load_config,
)

SAMPLE = Path(__file__).parents[2] / "deploy" / "dbtstream.toml"
TABLES: dict[str, type[Section]] = {
    "nats": NatsConfig,
    "streams": StreamsConfig,
    "worker": WorkerConfig,
    "log": LogConfig,
    "http": HttpConfig,
    "telemetry": TelemetryConfig,
    "telemetry.otlp": OtlpConfig,
    "openlineage": OpenLineageConfig,
    "projects.flights_prod": ProjectConfig,
    "projects.flights_prod.assets": AssetsConfig,
    "projects.flights_prod.lineage": LineageConfig,
}
EXAMPLES = {
    *("user", "password", "token", "profile", "target_path"),
    *("url", "api_key", "headers", "secret_headers", "endpoint", "resource"),
    *(field for field in NatsConfig.__struct_fields__ if field.endswith("_file")),
}
"""Keys without a default to show: the comment shows how a value looks."""


@pytest.fixture(scope="module")
def commented() -> dict[str, dict[str, Any]]:
    """By table: the values of lines like `# slots = 4`, each of them TOML of its own."""
    found: dict[str, dict[str, Any]] = {}
    table = ""
    for line in SAMPLE.read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"(?:# )?\[([\w.]+)\]", line):
            table = heading[1]
            if line.startswith("#"):
                parent, _, key = table.rpartition(".")
                found.setdefault(parent, {})[key] = {}
        elif re.match(r"# [a-z_]+ = ", line):
            found.setdefault(table, {}).update(tomllib.loads(line.removeprefix("# ")))
    return found


def uncommented() -> dict[str, Any]:
    return tomllib.loads(SAMPLE.read_text(encoding="utf-8"))


def test_it_loads_as_it_stands() -> None:
    config = load_config(SAMPLE, {})
    assert list(config.projects) == ["flights", "flights_prod"]
    for project in config.projects.values():
        assert Path(project.path, "dbt_project.yml").is_file()
    secrets = config.projects["flights_prod"].secrets
    assert {ref.env is None for ref in secrets.values()} == {True, False}


@pytest.mark.parametrize("table", TABLES)
def test_every_key_is_mentioned_and_no_other(
    table: str, commented: dict[str, dict[str, Any]]
) -> None:
    said: dict[str, Any] = uncommented()
    for name in table.split("."):
        said = said.get(name, {})  # a table that is commented out says nothing
    assert {*said, *commented.get(table, {})} == set(TABLES[table].__struct_fields__)


@pytest.mark.parametrize("table", TABLES)
def test_every_default_that_it_shows_is_the_default(
    table: str, commented: dict[str, dict[str, Any]]
) -> None:
    defaults = {field.name: field.default for field in msgspec.structs.fields(TABLES[table])}
    shown = {
        key: value
        for key, value in commented[table].items()
        if key not in EXAMPLES and defaults[key] is not None
    }
    assert shown
    assert shown == {
        key: list(default) if isinstance(default := defaults[key], tuple) else default
        for key in shown
    }


@pytest.mark.parametrize("table", TABLES)
def test_what_is_commented_out_can_be_put_in(
    table: str, commented: dict[str, dict[str, Any]]
) -> None:
    required = {"path": "x", "targets": ["x"]} if TABLES[table] is ProjectConfig else {}
    msgspec.convert(commented[table] | required, TABLES[table])
