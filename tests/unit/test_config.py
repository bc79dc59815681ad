"""`dbtstream.toml`: what is wrong is said with file, key path and what is accepted."""

import sys
from pathlib import Path

import pytest

from dbtstream import config
from dbtstream.config import Config, NatsConfig, SecretRef, load_config, read_secret
from dbtstream.errors import ConfigError
from dbtstream.subjects import NAME

PROJECT = '[projects.shop]\npath = "shop"\ntargets = ["prod"]\n'


@pytest.fixture(autouse=True)
def project(tmp_path: Path) -> Path:
    """What every config here may name: a folder with a dbt_project.yml."""
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "dbt_project.yml").touch()
    return folder


def load(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "dbtstream.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, {})


def refused(tmp_path: Path, text: str) -> ConfigError:
    """The error, which always begins with where it is: the file and the key path."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    error = caught.value
    assert str(error).startswith(f"{error.source}: {error.key}" if error.key else error.source)
    assert error.source == str(tmp_path / "dbtstream.toml")
    return error


class TestDefaults:
    def test_no_file_is_a_config_without_projects(self) -> None:
        loaded = load_config(None, {})
        assert loaded == Config()
        assert loaded.nats.servers == ("nats://127.0.0.1:4222",)

    def test_a_project_needs_its_path_and_targets_only(self, tmp_path: Path, project: Path) -> None:
        shop = load(tmp_path, PROJECT).projects["shop"]
        assert (shop.path, shop.targets) == (str(project), ("prod",))
        assert shop.python == sys.executable
        assert "run-operation" not in shop.commands
        assert "deps" not in shop.commands

    def test_the_worker_is_called_as_its_host_in_words_that_nats_accepts(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("socket.gethostname", lambda: "dbt.worker-1.example" + "x" * 80)
        assert Config().worker_name == ("dbt-worker-1-example" + "x" * 80)[:64]
        assert NAME.fullmatch(Config().worker_name)

    def test_the_state_directory_follows_xdg(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        assert Config().state_dir == tmp_path / "dbtstream"
        monkeypatch.delenv("XDG_STATE_HOME")
        monkeypatch.setenv("HOME", "/home/ada")
        assert Config().state_dir == Path("/home/ada/.local/state/dbtstream")


class TestFile:
    def test_one_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"none\.toml: there is no such file"):
            load_config(tmp_path / "none.toml", {})

    def test_one_that_is_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(tmp_path, {})

    def test_one_that_is_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
        with pytest.raises(ConfigError, match=r"x\.toml: cannot be read"):
            load_config(tmp_path / "x.toml", {})

    def test_one_that_is_not_toml_names_the_line(self, tmp_path: Path) -> None:
        assert "line 2" in str(refused(tmp_path, "[nats]\nservers = nats\n"))

    @pytest.mark.parametrize("text", ["nats = 1", 'worker = "w1"', "[[log]]\n"])
    def test_a_value_where_a_table_belongs(self, tmp_path: Path, text: str) -> None:
        assert "Expected `object`" in refused(tmp_path, text).problem

    def test_projects_must_be_tables(self, tmp_path: Path) -> None:
        assert refused(tmp_path, "projects = []").key == "projects"
        assert refused(tmp_path, '[projects]\nshop = "shop"').key == "projects.shop"


class TestSearch:
    @pytest.fixture(autouse=True)
    def elsewhere(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("DBTSTREAM_CONFIG", raising=False)
        etc = tmp_path / "etc" / "dbtstream.toml"
        monkeypatch.setattr(config, "SEARCH", (Path("dbtstream.toml"), etc))

    def test_option_then_variable_then_here_then_etc(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        assert config.find_config() is None
        etc = tmp_path / "etc" / "dbtstream.toml"
        etc.parent.mkdir()
        etc.touch()
        assert config.find_config() == etc
        Path("dbtstream.toml").touch()
        assert config.find_config() == Path("dbtstream.toml")
        monkeypatch.setenv("DBTSTREAM_CONFIG", "named.toml")
        assert config.find_config() == Path("named.toml")
        assert config.find_config("given.toml") == Path("given.toml")

    def test_a_file_that_was_named_is_not_replaced_by_one_that_exists(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Path("dbtstream.toml").touch()
        monkeypatch.setenv("DBTSTREAM_CONFIG", "absent.toml")
        with pytest.raises(ConfigError, match=r"absent\.toml: there is no such file"):
            load_config(config.find_config(), {})


class TestUnknownKeys:
    def test_of_the_file_name_the_tables(self, tmp_path: Path) -> None:
        error = refused(tmp_path, "[wroker]\nslots = 3\n")
        assert error.key == "wroker"
        assert error.hint == (
            "accepted: nats, streams, worker, log, openlineage, telemetry, http, limits, projects"
        )

    def test_the_internal_source_is_not_a_key(self, tmp_path: Path) -> None:
        assert refused(tmp_path, 'source = "x"').key == "source"

    @pytest.mark.parametrize(
        ("table", "known"),
        [
            ("nats", "servers"),
            ("streams", "events_max_age_s"),
            ("worker", "cancel_grace_s"),
            ("log", "level"),
            ("projects.shop", "query_sql"),
        ],
    )
    def test_of_a_table_name_the_key_and_those_that_are_known(
        self, tmp_path: Path, table: str, known: str
    ) -> None:
        text = f"{PROJECT}slotz = 3" if table == "projects.shop" else f"[{table}]\nslotz = 3"
        error = refused(tmp_path, text)
        assert error.key == table
        assert "`slotz`" in error.problem
        assert known in error.hint

    def test_of_a_secret(self, tmp_path: Path) -> None:
        error = refused(tmp_path, PROJECT + 'secrets.PW = { envv = "X" }')
        assert error.key == "projects.shop.secrets.PW"
        assert "`envv`" in error.problem
        assert error.hint == "accepted keys: env, file"


class TestValues:
    @pytest.mark.parametrize(
        ("text", "key", "hint"),
        [
            ('[log]\nlevel = "loud"', "log.level", "accepted: debug, info, warning, error"),
            ('[log]\nformat = "xml"', "log.format", "accepted: auto, console, json"),
            (
                PROJECT + 'log_level = "warning"',
                "projects.shop.log_level",
                "accepted: debug, info, warn, error, none",
            ),
            (
                PROJECT + 'content_type = "json"',
                "projects.shop.content_type",
                "accepted: application/json, application/msgpack",
            ),
        ],
    )
    def test_a_closed_list_is_told(self, tmp_path: Path, text: str, key: str, hint: str) -> None:
        error = refused(tmp_path, text)
        assert (error.key, error.hint) == (key, hint)

    @pytest.mark.parametrize(
        ("text", "key"),
        [
            ('[worker]\nslots = "4"', "worker.slots"),
            ("[nats]\nservers = 'nats://h:4222'", "nats.servers"),
            ("[nats]\nservers = [1]", "nats.servers[0]"),
            ('[projects.shop]\npath = "shop"\ntargets = "prod"', "projects.shop.targets"),
            (PROJECT + "queries = 1", "projects.shop.queries"),
            (PROJECT + "env.DEBUG = true", "projects.shop.env.DEBUG"),
            (PROJECT + "env.A = 'a'\nenv.DEBUG = true", "projects.shop.env.DEBUG"),
            (PROJECT + "labels.tier = 1", "projects.shop.labels.tier"),
            (PROJECT + "secrets.PW = 'plain'", "projects.shop.secrets.PW"),
        ],
    )
    def test_a_wrong_type_is_told_with_its_whole_path(
        self, tmp_path: Path, text: str, key: str
    ) -> None:
        error = refused(tmp_path, text)
        assert error.key == key
        assert "Expected" in error.problem

    @pytest.mark.parametrize("missing", ["path", "targets"])
    def test_what_a_project_must_have(self, tmp_path: Path, missing: str) -> None:
        text = "\n".join(line for line in PROJECT.splitlines() if not line.startswith(missing))
        error = refused(tmp_path, text)
        assert error.key == "projects.shop"
        assert f"`{missing}`" in error.problem

    @pytest.mark.parametrize(
        ("text", "key", "problem"),
        [
            ("[worker]\nslots = 0", "worker.slots", "at least 1"),
            ("[worker]\nkeep_runs = -1", "worker.keep_runs", "at least 0"),
            ("[worker]\noutbox_max_bytes = 1000", "worker.outbox_max_bytes", "at least 1048576"),
            ("[worker]\nheartbeat_s = 31", "worker.heartbeat_s", "a third of worker.ack_wait_s"),
            (
                "[worker]\nheartbeat_s = 2\nlease_ttl_s = 5",
                "worker.heartbeat_s",
                "a third of worker.lease_ttl_s",
            ),
            ("[worker]\nlease_ttl_s = 2", "worker.lease_ttl_s", "at least 3"),
            ("[worker]\nmax_attempts = 0", "worker.max_attempts", "at least 1"),
            ("[limits]\nwarehouse = 0", "limits.warehouse", "is 0; it must be 1 to 1000"),
            ('[limits]\nwarehouse = "many"', "limits", "Expected `int`"),
            (f'{PROJECT}limits = ["x"]', "projects.shop.limits", "there is no limit 'x'"),
            ("[worker]\nheartbeat_s = 0", "worker.heartbeat_s", "above 0"),
            ("[worker]\nhandshake_timeout_s = -1", "worker.handshake_timeout_s", "above 0"),
            ("[worker]\ndrain_timeout_s = -1", "worker.drain_timeout_s", "not be negative"),
            ("[nats]\nconnect_timeout_s = 0", "nats.connect_timeout_s", "above 0"),
            ("[streams]\nevents_max_age_s = 0", "streams.events_max_age_s", "above 0"),
            ("[nats]\nservers = []", "nats.servers", "is empty"),
            (PROJECT + "timeout_s = 0", "projects.shop.timeout_s", "above 0"),
            (PROJECT + "silence_timeout_s = -5", "projects.shop.silence_timeout_s", "above 0"),
        ],
    )
    def test_what_types_cannot_say(self, tmp_path: Path, text: str, key: str, problem: str) -> None:
        error = refused(tmp_path, text)
        assert error.key == key
        assert problem in error.problem

    def test_a_grace_of_zero_is_none_and_allowed(self, tmp_path: Path) -> None:
        text = "[worker]\ndrain_timeout_s = 0\ncancel_grace_s = 0\nkill_grace_s = 0\n"
        assert load(tmp_path, text).worker.kill_grace_s == 0


class TestProjects:
    @pytest.mark.parametrize("name", ["my.shop", "my shop", "*", ">", "", "x" * 65, "größe"])
    def test_a_name_that_no_subject_can_hold(self, tmp_path: Path, name: str) -> None:
        error = refused(tmp_path, PROJECT.replace("[projects.shop]", f'[projects."{name}"]'))
        assert error.key == f"projects.{name}"
        assert "letters, digits, - and _" in error.problem
        error = refused(tmp_path, PROJECT.replace('"prod"', f'"ok", "{name}"'))
        assert error.key == "projects.shop.targets"
        error = refused(tmp_path, f'[worker]\nname = "{name or "."}"')
        assert error.key == "worker.name"

    def test_no_target_and_the_same_target_twice(self, tmp_path: Path) -> None:
        error = refused(tmp_path, PROJECT.replace('["prod"]', "[]"))
        assert (error.key, error.hint) == ("projects.shop.targets", 'such as ["prod"]')
        error = refused(tmp_path, PROJECT.replace('["prod"]', '["prod", "ci", "prod"]'))
        assert "prod more than once" in error.problem

    def test_a_command_that_dbt_does_not_have_or_we_do_not_run(self, tmp_path: Path) -> None:
        for command in ("biuld", "clean", "init", "docs serve", "docs"):
            error = refused(tmp_path, PROJECT + f'commands = ["build", "{command}"]')
            assert error.key == "projects.shop.commands"
            assert command in error.problem
            assert "run-operation" in error.hint

    def test_macros_without_the_command_that_calls_them(self, tmp_path: Path) -> None:
        text = PROJECT + 'run_operations = ["grant_all"]\n'
        error = refused(tmp_path, text)
        assert error.key == "projects.shop.run_operations"
        assert load(tmp_path, text + 'commands = ["run-operation"]').projects

    def test_a_folder_without_a_dbt_project(self, tmp_path: Path) -> None:
        error = refused(tmp_path, PROJECT.replace('"shop"', '"nowhere"'))
        assert error.key == "projects.shop.path"
        assert error.problem == f"{tmp_path / 'nowhere'} holds no dbt_project.yml"

    def test_a_variable_that_is_both_plain_and_secret(self, tmp_path: Path) -> None:
        text = PROJECT + 'env.PW = "x"\nsecrets.PW = { env = "PW" }'
        error = refused(tmp_path, text)
        assert error.key == "projects.shop.env.PW"


class TestPaths:
    def test_they_are_relative_to_the_file_not_to_the_daemon(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)
        loaded = load(
            tmp_path,
            """
            [nats]
            creds_file = "a.creds"
            nkey_seed_file = "a.nk"
            tls_ca_file = "ca.pem"
            tls_cert_file = "cert.pem"
            tls_key_file = "/etc/key.pem"
            password = { file = "nats.pw" }
            token = { env = "NATS_TOKEN" }
            [worker]
            state_dir = "state"
            [projects.shop]
            path = "shop"
            targets = ["prod"]
            profiles_dir = "profiles"
            python = "venv/bin/python"
            target_path = "target"
            secrets.PW = { file = "shop.pw" }
            """,
        )
        assert loaded.nats == NatsConfig(
            creds_file=str(tmp_path / "a.creds"),
            nkey_seed_file=str(tmp_path / "a.nk"),
            tls_ca_file=str(tmp_path / "ca.pem"),
            tls_cert_file=str(tmp_path / "cert.pem"),
            tls_key_file="/etc/key.pem",
            password=SecretRef(file=str(tmp_path / "nats.pw")),
            token=SecretRef(env="NATS_TOKEN"),
        )
        assert loaded.state_dir == tmp_path / "state"
        shop = loaded.projects["shop"]
        assert shop.path == str(tmp_path / "shop")
        assert shop.profiles_dir == str(tmp_path / "profiles")
        assert shop.python == str(tmp_path / "venv/bin/python")
        assert shop.target_path == "target"  # dbt's: relative to the project
        assert shop.secrets["PW"].file == str(tmp_path / "shop.pw")

    def test_a_tilde_is_the_home_of_the_daemon(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        text = PROJECT.replace('"shop"', '"~/shop"') + 'profiles_dir = "~/.dbt"\n'
        loaded = load(tmp_path, text + '[worker]\nstate_dir = "~/state"')
        assert loaded.projects["shop"].path == str(tmp_path / "shop")
        assert loaded.projects["shop"].profiles_dir == str(tmp_path / ".dbt")
        assert loaded.state_dir == tmp_path / "state"

    def test_a_python_without_a_slash_is_looked_up_by_name(self, tmp_path: Path) -> None:
        assert load(tmp_path, PROJECT + 'python = "python3.12"').projects["shop"].python == (
            "python3.12"
        )

    def test_the_link_to_a_python_stays_a_link(self, tmp_path: Path) -> None:
        """Following it would leave the virtual environment that it belongs to."""
        (tmp_path / "python").symlink_to(sys.executable)
        loaded = load(tmp_path, PROJECT + 'python = "./python"')
        assert loaded.projects["shop"].python == str(tmp_path / "python")


class TestSecrets:
    @pytest.mark.parametrize("ref", ["{}", '{ env = "A", file = "b" }'])
    def test_both_or_neither_of_env_and_file(self, tmp_path: Path, ref: str) -> None:
        for text, key in (
            (f"[nats]\npassword = {ref}", "nats.password"),
            (
                f"{PROJECT}secrets.OK = {{ env = 'OK' }}\nsecrets.PW = {ref}",
                "projects.shop.secrets.PW",
            ),
        ):
            error = refused(tmp_path, text)
            assert error.key == key
            assert "one of env and file" in error.problem

    def test_loading_reads_none(self, tmp_path: Path) -> None:
        text = PROJECT + 'secrets.A = { env = "NOT_SET" }\nsecrets.B = { file = "/not/there" }'
        assert len(load(tmp_path, text).projects["shop"].secrets) == 2

    def test_one_comes_from_the_environment_or_a_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SHOP_PW", "hunter2")
        assert read_secret(SecretRef(env="SHOP_PW"), "f", "k") == "hunter2"
        (tmp_path / "pw").write_text("hunter2 \n", encoding="utf-8")
        assert read_secret(SecretRef(file=str(tmp_path / "pw")), "f", "k") == "hunter2 "

    def test_one_that_is_not_there_is_named_by_its_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("SHOP_PW", raising=False)
        with pytest.raises(ConfigError, match=r"^f: k: environment variable SHOP_PW is not set"):
            read_secret(SecretRef(env="SHOP_PW"), "f", "k")
        with pytest.raises(ConfigError, match=r"^f: k: secret file .*/absent cannot be read"):
            read_secret(SecretRef(file=str(tmp_path / "absent")), "f", "k")

    def test_a_file_that_is_no_text_does_not_show_its_bytes(self, tmp_path: Path) -> None:
        (tmp_path / "pw").write_bytes(b"hunter2\xff")
        with pytest.raises(ConfigError) as caught:
            read_secret(SecretRef(file=str(tmp_path / "pw")), "f", "k")
        assert "hunter2" not in str(caught.value)
