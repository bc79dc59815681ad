"""`DBTSTREAM__…` variables: they win over the file, pass the same checks, and get the blame."""

from pathlib import Path

import pytest

from dbtstream.config import Config, SecretRef, load_config
from dbtstream.errors import ConfigError

PROJECT = '[projects.shop]\npath = "shop"\ntargets = ["prod"]\n'


@pytest.fixture(autouse=True)
def project(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "dbt_project.yml").touch()


def load(tmp_path: Path, text: str, environ: dict[str, str]) -> Config:
    path = tmp_path / "dbtstream.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, environ)


def refused(tmp_path: Path, text: str, environ: dict[str, str]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, environ)
    return caught.value


def test_it_wins_over_the_file_in_any_case_of_the_key(tmp_path: Path) -> None:
    environ = {
        "DBTSTREAM__WORKER__SLOTS": "8",
        "DBTSTREAM__NATS__SERVERS": '["nats://a:1", "nats://b:2"]',
        "DBTSTREAM__STREAMS__MANAGE": "false",
        "DBTSTREAM__NATS__USER": "dbt.stream",
        "DBTSTREAM__NATS__PASSWORD__ENV": "NATS_PW",
        "DBTSTREAM__PROJECTS__SHOP__LOG_LEVEL": "info",
        "OTHER__WORKER__SLOTS": "9",
        "DBTSTREAM_CONFIG": "x",
    }
    loaded = load(tmp_path, "[worker]\nslots = 2\nname = 'w'\n" + PROJECT, environ)
    assert (loaded.worker.slots, loaded.worker.name) == (8, "w")
    assert loaded.nats.servers == ("nats://a:1", "nats://b:2")
    assert loaded.nats.password == SecretRef(env="NATS_PW")
    assert loaded.nats.user == "dbt.stream"
    assert loaded.streams.manage is False
    assert loaded.projects["shop"].log_level == "info"


def test_project_names_keep_the_spelling_of_the_file(tmp_path: Path) -> None:
    text = PROJECT.replace("projects.shop", "projects.Shop-EU")
    environ = {"DBTSTREAM__PROJECTS__SHOP-EU__QUERIES": "true"}
    assert load(tmp_path, text, environ).projects["Shop-EU"].queries is True


def test_a_whole_project_may_come_from_it(tmp_path: Path) -> None:
    environ = {
        "DBTSTREAM__PROJECTS__SHOP__PATH": "shop",
        "DBTSTREAM__PROJECTS__SHOP__TARGETS": '["prod"]',
    }
    assert load(tmp_path, "", environ).projects["shop"].targets == ("prod",)
    assert load_config(None, {"DBTSTREAM__LOG__LEVEL": "debug"}).log.level == "debug"


def test_the_names_of_a_childs_variables_keep_their_case(tmp_path: Path) -> None:
    environ = {
        "DBTSTREAM__PROJECTS__SHOP__ENV__DBT_SCHEMA": "ci",
        "DBTSTREAM__PROJECTS__SHOP__SECRETS__DB_PW__FILE": "/run/secrets/pw",
    }
    shop = load(tmp_path, PROJECT, environ).projects["shop"]
    assert shop.env == {"DBT_SCHEMA": "ci"}
    assert shop.secrets == {"DB_PW": SecretRef(file="/run/secrets/pw")}


def test_text_that_only_begins_as_toml_is_text(tmp_path: Path) -> None:
    environ = {"DBTSTREAM__PROJECTS__SHOP__ENV__A": "1\nb = 2"}
    assert load(tmp_path, PROJECT, environ).projects["shop"].env == {"A": "1\nb = 2"}


def test_a_mistake_in_it_is_blamed_on_the_variable(tmp_path: Path) -> None:
    environ = {"DBTSTREAM__WORKER__SLOTS": "many"}
    error = refused(tmp_path, "[worker]\nslots = 2", environ)
    assert str(error) == (
        "environment DBTSTREAM__WORKER__SLOTS: worker.slots: Expected `int`, got `str`"
    )
    error = refused(tmp_path, "", {"DBTSTREAM__LOG__LEVEL": "loud"})
    assert error.source == "environment DBTSTREAM__LOG__LEVEL"
    assert error.hint == "accepted: debug, info, warning, error"
    error = refused(tmp_path, "", {"DBTSTREAM__WORKER__SLOTS": "0"})
    assert error.source == "environment DBTSTREAM__WORKER__SLOTS"


def test_an_unknown_key_in_it_is_refused_too(tmp_path: Path) -> None:
    assert "`slotz`" in refused(tmp_path, "", {"DBTSTREAM__WORKER__SLOTZ": "1"}).problem
    assert refused(tmp_path, "", {"DBTSTREAM__WORKERS__SLOTS": "1"}).key == "workers"


def test_a_table_below_a_value(tmp_path: Path) -> None:
    error = refused(tmp_path, PROJECT, {"DBTSTREAM__PROJECTS__SHOP__PATH__X": "1"})
    assert error.source == "environment DBTSTREAM__PROJECTS__SHOP__PATH__X"
    assert error.key == "projects.shop.path"
