"""`[openlineage]` in dbtstream.toml: off without it, and refused where it cannot mean anything."""

from pathlib import Path

import pytest

from dbtstream.config import Config, load_config, read_secret
from dbtstream.errors import ConfigError


def load(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "dbtstream.toml"
    path.write_text(f"[openlineage]\n{text}\n", encoding="utf-8")
    return load_config(path, {})


def test_without_the_table_nothing_is_sent() -> None:
    assert load_config(None, {}).openlineage is None


def test_a_url_is_enough(tmp_path: Path) -> None:
    section = load(tmp_path, 'url = "https://marquez.example:8443/base"').openlineage
    assert section is not None
    assert (section.namespace, section.endpoint) == ("dbt", "api/v1/lineage")
    assert section.subject is None


def test_a_subject_is_enough(tmp_path: Path) -> None:
    section = load(tmp_path, 'subject = "openlineage.events"').openlineage
    assert section is not None
    assert section.url is None


def test_files_count_from_the_folder_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret\n", encoding="utf-8")
    text = 'url = "https://m"\ntls_ca_file = "ca.pem"\napi_key = { file = "key" }'
    section = load(tmp_path, text).openlineage
    assert section is not None
    assert section.tls_ca_file == str(tmp_path / "ca.pem")
    assert section.api_key is not None
    assert read_secret(section.api_key, "x", "openlineage.api_key") == "s3cret"


def test_the_environment_can_switch_it_on() -> None:
    config = load_config(None, {"DBTSTREAM__OPENLINEAGE__URL": "http://marquez:5000"})
    assert config.openlineage is not None
    assert config.openlineage.url == "http://marquez:5000"


@pytest.mark.parametrize(
    ("text", "key", "problem"),
    [
        ("", "openlineage", "names no place to send to"),
        ('subject = "openlineage.*"', "openlineage.subject", "no subject to publish on"),
        ('subject = "a..b"', "openlineage.subject", "no subject to publish on"),
        ('subject = "dbt.events.x"', "openlineage.subject", "begins as ours"),
        ('subject = "$JS.API.x"', "openlineage.subject", "begins as ours"),
        ('url = "marquez:5000"', "openlineage.url", "is no address"),
        ('url = "http://marquez:port"', "openlineage.url", "is no address"),
        ('url = "http://user:pass@marquez"', "openlineage.url", "a token goes into api_key"),
        ('url = "http://m?x=1"', "openlineage.url", "has more than"),
        ('subject = "a"\napi_key = { env = "X" }', "openlineage.api_key", "there is no url"),
        ('url = "http://m"\nnamespace = " "', "openlineage.namespace", "is empty"),
        ('url = "http://m"\ntimeout_s = 0', "openlineage.timeout_s", "must be above 0"),
        ('url = "http://m"\nheaders = { "a b" = "x" }', "openlineage.headers.a b", "HTTP header"),
        ('url = "http://m"\nheaders = { a = "x\\ny" }', "openlineage.headers.a", "HTTP header"),
        ('url = "http://m"\nuri = "x"', "openlineage", "unknown field"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, text: str, key: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert caught.value.key == key
    assert problem in str(caught.value)


def test_a_secret_that_is_not_there_is_named(tmp_path: Path) -> None:
    section = load(tmp_path, 'url = "http://m"\napi_key = { file = "gone" }').openlineage
    assert section is not None
    assert section.api_key is not None
    with pytest.raises(ConfigError, match="gone"):
        read_secret(section.api_key, "x", "openlineage.api_key")
