"""What a dbt process finds around it: private folders, and only the environment it may see."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from dbtstream.artifacts import LOG_TAIL_BYTES, artifact_files
from dbtstream.config import Config, ProjectConfig, SecretRef, WorkerConfig
from dbtstream.errors import ConfigError
from dbtstream.scrub import Scrubber
from dbtstream.workspace import (
    PARSE_CACHE,
    Workspace,
    child_environment,
    forget_old_runs,
    keep_parse_cache,
    prepare_workspace,
    runs_dir,
)

RUN_ID = "019b2f3c-8a10-7c4e-9f21-5b0d6c7e8f90"
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

Prepare = Callable[..., Workspace]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(worker=WorkerConfig(state_dir=str(tmp_path / "state"), keep_runs=2))


@pytest.fixture
def project(tmp_path: Path) -> ProjectConfig:
    (tmp_path / "shop").mkdir()
    return ProjectConfig(path=str(tmp_path / "shop"), targets=("prod",))


@pytest.fixture
def prepare(config: Config, project: ProjectConfig) -> Prepare:
    def prepared(run_id: str = RUN_ID, attempt: int = 1, **changes: object) -> Workspace:
        changed = msgspec.structs.replace(project, **changes)
        return prepare_workspace(
            config, "shop", changed, "prod", run_id, TRACEPARENT, attempt=attempt
        )

    return prepared


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class TestFolders:
    @pytest.mark.parametrize("umask", [0, 0o022, 0o277])
    def test_each_run_has_its_own_and_nobody_else_can_look_into_it(
        self, prepare: Prepare, config: Config, umask: int
    ) -> None:
        """Nor into any of those on the way; and its owner can, whatever the umask."""
        config.state_dir.mkdir(mode=0o750)
        before = os.umask(umask)
        try:
            workspace = prepare()
            prepare(attempt=2)
        finally:
            os.umask(before)
        assert workspace.run_dir == config.state_dir / "runs" / "shop" / "prod" / RUN_ID
        assert workspace.target_path.parent == workspace.log_path.parent == workspace.run_dir
        folders = [path for path in config.state_dir.rglob("*") if path.is_dir()]
        assert {workspace.target_path, workspace.log_path, workspace.parse_cache.parent} < {
            *folders
        }
        assert {mode(folder) for folder in folders} == {0o700}
        assert mode(config.state_dir) == 0o750  # whoever made it has decided

    def test_a_state_directory_that_is_not_there_is_made_for_us_only(
        self, prepare: Prepare, config: Config
    ) -> None:
        before = os.umask(0)
        try:
            prepare()
        finally:
            os.umask(before)
        assert mode(config.state_dir) == 0o700

    def test_each_attempt_has_its_own_too(self, prepare: Prepare) -> None:
        """What an earlier one left in its target path would be taken for this one's."""
        first, second = prepare(), prepare(attempt=2)
        assert first.attempt_dir == first.run_dir == second.run_dir
        assert second.attempt_dir == first.run_dir / "attempt-2"
        for workspace in (first, second):
            inside = {workspace.target_path, workspace.log_path, workspace.state_path}
            inside |= {workspace.stack_file, workspace.retry_path}
            assert {path.parent for path in inside} == {workspace.attempt_dir}
            assert not workspace.state_path.exists()
        assert second.retry_path.is_dir()
        for name in ("TARGET_PATH", "LOG_PATH"):
            assert first.environment[f"DBT_{name}"] != second.environment[f"DBT_{name}"]
        shared = prepare(attempt=2, target_path="target").target_path
        assert shared == prepare(target_path="target").target_path

    def test_it_can_be_prepared_again(self, prepare: Prepare) -> None:
        """As after a crash before dbt began."""
        (prepare().target_path / "run_results.json").touch()
        assert (prepare().target_path / "run_results.json").exists()

    def test_a_project_may_have_its_artifacts_in_one_place(
        self, prepare: Prepare, project: ProjectConfig
    ) -> None:
        prepare().parse_cache.touch()
        workspace = prepare(target_path="target")
        assert workspace.target_path == Path(project.path) / "target"
        assert workspace.log_path == workspace.run_dir / "logs"
        assert "DBT_PARTIAL_PARSE_FILE_PATH" not in workspace.environment


class TestEnvironment:
    def test_dbt_is_pointed_to_its_folders_its_run_and_its_trace(self, prepare: Prepare) -> None:
        workspace = prepare(profiles_dir="/etc/dbt")
        ours = {
            "DBT_TARGET_PATH": str(workspace.target_path),
            "DBT_LOG_PATH": str(workspace.log_path),
            "DBT_PROFILES_DIR": "/etc/dbt",
            "DBT_ENV_CUSTOM_ENV_DBTSTREAM_RUN_ID": RUN_ID,
            "DBT_ENV_CUSTOM_ENV_DBTSTREAM_ATTEMPT": "1",
            "TRACEPARENT": TRACEPARENT,
        }
        assert workspace.environment | ours == workspace.environment

    def test_of_the_daemons_own_only_what_is_listed_gets_through(
        self, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        monkeypatch.setenv("DBT_TARGET", "other")
        monkeypatch.setenv("PYTHONPATH", "/somewhere")
        monkeypatch.setenv("TZ", "Europe/Berlin")
        environment = prepare().environment
        assert environment["TZ"] == "Europe/Berlin"
        assert environment["PATH"] == os.environ["PATH"]
        assert environment.keys().isdisjoint({"AWS_SECRET_ACCESS_KEY", "DBT_TARGET", "PYTHONPATH"})

    def test_a_project_may_ask_for_more_by_name_or_beginning(self, project: ProjectConfig) -> None:
        daemon = {"SNOWFLAKE_USER": "u", "SNOWFLAKE_ROLE": "r", "SNOW": "s", "PGHOST": "h"}
        asking = msgspec.structs.replace(project, pass_env=("SNOWFLAKE_*", "PGHOST"))
        assert child_environment(asking, daemon) == {
            "SNOWFLAKE_USER": "u",
            "SNOWFLAKE_ROLE": "r",
            "PGHOST": "h",
        }

    def test_the_daemons_credentials_do_not_get_through_even_if_all_is_asked_for(
        self, project: ProjectConfig
    ) -> None:
        daemon = {
            "NATS_PASSWORD": "x",
            "NATS_URL": "x",
            "OTEL_EXPORTER_OTLP_HEADERS": "x",
            "DBTSTREAM__NATS__PASSWORD__ENV": "x",
            "DBTSTREAM_CONFIG": "x",
            "MY_NATS_URL": "passes",
        }
        for asked in (("*",), tuple(daemon), ("NATS_*", "OTEL*", "D*", "MY_*")):
            everything = msgspec.structs.replace(project, pass_env=asked)
            assert child_environment(everything, daemon) == {"MY_NATS_URL": "passes"}

    def test_the_projects_own_wins_over_the_daemons(self, project: ProjectConfig) -> None:
        own = msgspec.structs.replace(project, env={"TZ": "UTC", "DBT_SCHEMA": "ci"})
        assert child_environment(own, {"TZ": "CET"}) == {"TZ": "UTC", "DBT_SCHEMA": "ci"}

    def test_what_we_set_wins_over_what_the_project_sets(self, prepare: Prepare) -> None:
        workspace = prepare(env={"DBT_TARGET_PATH": "/elsewhere", "TRACEPARENT": "x"})
        assert workspace.environment["DBT_TARGET_PATH"] == str(workspace.target_path)
        assert workspace.environment["TRACEPARENT"] == TRACEPARENT

    def test_secrets_are_read_now_and_named_for_scrubbing(
        self, prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DAEMON_PW", "hunter2")
        (tmp_path / "key").write_text("k3y\n", encoding="utf-8")
        refs = {
            "SHOP_PW": SecretRef(env="DAEMON_PW"),
            "SHOP_KEY": SecretRef(file=str(tmp_path / "key")),
        }
        workspace = prepare(secrets=refs)
        assert workspace.environment["SHOP_PW"] == "hunter2"
        assert workspace.environment["SHOP_KEY"] == "k3y"
        assert "DAEMON_PW" not in workspace.environment
        assert workspace.secret_names == ("SHOP_KEY", "SHOP_PW")

    def test_a_secret_that_is_not_there_is_named_by_its_key(self, prepare: Prepare) -> None:
        with pytest.raises(ConfigError, match=r"projects\.shop\.secrets\.SHOP_PW.*NOT_SET"):
            prepare(secrets={"SHOP_PW": SecretRef(env="NOT_SET")})


class TestParseCache:
    def test_what_a_run_parsed_is_offered_to_the_next(self, prepare: Prepare) -> None:
        workspace = prepare()
        (workspace.target_path / PARSE_CACHE).write_bytes(b"parsed")
        keep_parse_cache(workspace)
        later = prepare(run_id=RUN_ID.replace("8f90", "8f91"))
        assert later.environment["DBT_PARTIAL_PARSE_FILE_PATH"] == str(later.parse_cache)
        assert later.parse_cache.read_bytes() == b"parsed"
        assert mode(later.parse_cache) == 0o600

    def test_dbt_is_not_pointed_to_one_that_is_not_there(self, prepare: Prepare) -> None:
        """It refuses such a path."""
        assert "DBT_PARTIAL_PARSE_FILE_PATH" not in prepare().environment

    def test_a_reader_keeps_what_it_opened_while_it_is_replaced(self, prepare: Prepare) -> None:
        """Not written in place: dbt takes half a file for a broken one and parses all."""
        workspace = prepare()
        workspace.parse_cache.write_bytes(b"old")
        with workspace.parse_cache.open("rb") as reading:
            (workspace.target_path / PARSE_CACHE).write_bytes(b"much newer")
            keep_parse_cache(workspace)
            assert reading.read() == b"old"
        assert workspace.parse_cache.read_bytes() == b"much newer"
        assert os.listdir(workspace.parse_cache.parent) == [PARSE_CACHE]

    def test_a_run_that_parsed_nothing_leaves_the_old_one(self, prepare: Prepare) -> None:
        workspace = prepare()
        workspace.parse_cache.write_bytes(b"old")
        keep_parse_cache(workspace)
        assert workspace.parse_cache.read_bytes() == b"old"


class TestArtifacts:
    def find(self, workspace: Workspace, *secrets: str) -> dict[str, Path]:
        return artifact_files(
            workspace.target_path, workspace.log_path, workspace.attempt_dir, Scrubber(secrets)
        )

    def test_are_those_that_are_there(self, prepare: Prepare) -> None:
        workspace = prepare()
        assert self.find(workspace) == {}
        for name in ("manifest.json", "sources.json", "graph.gpickle"):
            (workspace.target_path / name).touch()
        (workspace.log_path / "dbt.log").write_text("a line\n")
        assert self.find(workspace) == {
            "manifest": workspace.target_path / "manifest.json",
            "sources": workspace.target_path / "sources.json",
            "log": workspace.attempt_dir / "dbt.log",
        }
        assert (workspace.attempt_dir / "dbt.log").read_text() == "a line\n"

    def test_the_log_is_cut_to_its_last_whole_lines_in_a_file_that_is_private(
        self, prepare: Prepare
    ) -> None:
        workspace = prepare()
        lines = [f"line {number} é\n" for number in range(20_000)]
        (workspace.log_path / "dbt.log").write_text("".join(lines))
        before = os.umask(0)
        try:
            tail = self.find(workspace)["log"]
        finally:
            os.umask(before)
        kept = tail.read_text().splitlines(keepends=True)
        assert kept == lines[-len(kept) :]
        assert LOG_TAIL_BYTES - 20 < tail.stat().st_size <= LOG_TAIL_BYTES
        assert mode(tail) == 0o600

    def test_a_log_of_one_endless_line_is_cut_within_it(self, prepare: Prepare) -> None:
        workspace = prepare()
        (workspace.log_path / "dbt.log").write_text("x" * LOG_TAIL_BYTES * 3)
        assert self.find(workspace)["log"].read_text() == "x" * LOG_TAIL_BYTES

    def test_a_secret_through_which_the_log_is_cut_leaves_no_rest(self, prepare: Prepare) -> None:
        workspace = prepare()
        secret = "begin\n" + "key\n" * 20 + "end"
        after = "x" * (LOG_TAIL_BYTES - 20) + "\n"
        (workspace.log_path / "dbt.log").write_text("y\n" * 99 + secret + "\n" + after)
        tail = self.find(workspace, secret)["log"].read_text()
        assert tail.endswith(after)
        assert "key" not in tail


class TestOldRuns:
    IDS = tuple(f"019b2f3c-8a10-7c4e-9f21-5b0d6c7e8f9{n}" for n in range(5))

    def forget(self, config: Config, *running: str) -> tuple[int, list[str]]:
        deleted = forget_old_runs(config, "shop", "prod", running=set(running))
        return deleted, sorted(path.name for path in runs_dir(config, "shop", "prod").iterdir())

    def test_all_but_the_newest_are_deleted(self, prepare: Prepare, config: Config) -> None:
        for run_id in reversed(self.IDS):
            (prepare(run_id).target_path / "manifest.json").touch()
        assert self.forget(config) == (3, list(self.IDS[3:]))

    def test_running_ones_neither_go_nor_count(self, prepare: Prepare, config: Config) -> None:
        for run_id in self.IDS:
            prepare(run_id)
        kept = [self.IDS[0], self.IDS[3], self.IDS[4]]
        assert self.forget(config, self.IDS[0]) == (2, kept)

    def test_few_runs_all_stay_and_none_at_all_is_fine(
        self, prepare: Prepare, config: Config
    ) -> None:
        assert forget_old_runs(config, "shop", "prod", running=set()) == 0
        prepare(self.IDS[0])
        assert self.forget(config) == (0, [self.IDS[0]])

    def test_those_of_another_target_are_not_touched(
        self, prepare: Prepare, config: Config
    ) -> None:
        for run_id in self.IDS:
            prepare(run_id)
        assert forget_old_runs(config, "shop", "ci", running=set()) == 0
        assert self.forget(config)[0] == 3
