"""Which of dbt's artifacts are a target's state, and what another worker can retry from."""

import json

import pytest

from dbtstream.artifacts import FILES, latest_kinds, without_paths
from dbtstream.config import KNOWN_COMMANDS


@pytest.mark.parametrize("command", ["build", "run", "seed", "snapshot", "clone", "retry"])
def test_what_builds_nodes_gives_the_target_its_manifest_and_results(command: str) -> None:
    assert latest_kinds(command) == ("manifest", "run_results")


def test_a_test_does_not_make_its_manifest_the_targets_state() -> None:
    """What has been edited since the last build is not built by testing it."""
    assert latest_kinds("test") == ("run_results",)


def test_freshness_and_docs_give_their_own_file() -> None:
    assert latest_kinds("source freshness") == ("sources",)
    assert latest_kinds("docs generate") == ("catalog",)


def test_other_commands_give_nothing_and_all_kinds_are_files() -> None:
    for command in ("list", "compile", "show", "parse", "deps", "debug", "run-operation", "x"):
        assert latest_kinds(command) == ()
    assert {kind for command in KNOWN_COMMANDS for kind in latest_kinds(command)} <= FILES.keys()


def test_paths_of_the_worker_that_ran_it_do_not_travel_with_a_runs_results() -> None:
    ours = {"which": "build", "vars": {"a": None}, "select": ["x"], "threads": 4, "target": "prod"}
    paths = {
        "partial_parse_file_path": "/a/partial_parse.msgpack",
        "state": "/a/state",
        "defer_state": "/a/state",
        "profiles_dir": "/a",
        "project_dir": "/a",
        "target_path": "/a/target",
        "log_path": "/a/logs",
    }
    results = [{"unique_id": "model.shop.orders", "status": "error"}]
    written = json.dumps({"results": results, "args": ours | paths}).encode()
    assert json.loads(without_paths(written)) == {"results": results, "args": ours}
    assert json.loads(without_paths(b'{"results": []}')) == {"results": []}
