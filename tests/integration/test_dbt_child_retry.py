"""dbt's retry through the child: of an attempt that was cut off, and of a run with its own file.

Real dbt on DuckDB. What is to be retried is told as the daemon tells it: from the frames of
the attempt that was cut off.
"""

import json
import shutil
import signal
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dbtstream import frames
from dbtstream.frames import EarlierResult, Retry
from tests import dbt_projects as projects
from tests.dbt_projects import PYTHON, Child, finished, planned, results, rows
from tests.dbt_projects import Starting as Start
from tests.warm_children import WarmChildren

VERSION = projects.dbt_release(PYTHON)
since_1_9 = pytest.mark.skipif(VERSION < (1, 9), reason="dbt 1.8 has no microbatch")


@pytest.fixture
def start(tmp_path: Path, warm: WarmChildren | None) -> Iterator[Start]:
    with projects.children(tmp_path, warm) as begin:
        yield begin


def resume(args: list[str], state: Path, **statuses: str) -> dict[str, Any]:
    """The options of a child that retries; statuses by a model's name or by unique_id."""
    earlier = [
        EarlierResult(unique_id=name if "." in name else f"model.shop.{name}", status=status)
        for name, status in statuses.items()
    ]
    state.mkdir(exist_ok=True)
    began_at = "2026-03-01T12:00:00.000000Z"
    return {"retry": Retry(args=args, results=earlier, state_dir=str(state), began_at=began_at)}


def statuses_of(child: Child) -> dict[str, str]:
    """As the daemon builds them: what began and did not end is an error, the rest never began."""
    ended = {finish.unique_id: finish.status for finish in child.of(frames.NodeFinish)}
    begun = {begin.unique_id for begin in child.of(frames.NodeStart)}
    return {
        unique_id: ended.get(unique_id, "error" if unique_id in begun else "skipped")
        for unique_id in planned(child)
    }


# An attempt that was cut off.

VARS = {"nothing": None, "path": "a\\b \"c\" 'd'", "wanted": True}


def cut_off(slow: str) -> projects.Files:
    """quick -> slow -> late, tests on the first two, a seed beside them."""
    return {
        "models/quick.sql": "{{ config(materialized='table') }} select uuid() as id",
        "models/slow.sql": slow,
        "models/late.sql": "{{ config(materialized='incremental') }} select "
        "{{ 'null' if var('nothing') is none else 1 }} as nothing, "
        "'{{ var('path') | replace(\"'\", \"''\") }}' as path, '{{ target.name }}' as target "
        "from {{ ref('slow') }}",
        "models/middle.sql": "{{ config(materialized='ephemeral') }} "
        "select * from {{ ref('slow') }}",
        "models/end.sql": "select * from {{ ref('middle') }}",
        "models/models.yml": projects.properties(
            models=[
                {"name": name, "columns": [{"name": "id", "data_tests": ["not_null"]}]}
                for name in ("quick", "slow")
            ]
        ),
        "seeds/countries.csv": "code,name\nde,Germany\n",
    }


def test_a_killed_build_goes_on_with_what_had_not_succeeded_where_and_as_it_was_begun(
    start: Start, tmp_path: Path
) -> None:
    """Same target, --full-refresh and vars; what was built is left alone, hooks run again."""
    config = {
        "on-run-start": ["create table if not exists hooks (target varchar)"],
        "on-run-end": ["insert into hooks values ('{{ target.name }}')"],
        # Rendered before dbt's retry has read anything of the earlier attempt.
        "models": {"shop": {"enabled": "{{ var('wanted') }}"}},
    }
    args = ["build", "--target", "prod", "--vars", json.dumps(VARS), "--threads", "1"]
    quick = "{{ config(materialized='table') }} select 1 as id"
    zero = start(cut_off(quick), args, config=config)
    assert zero.end() == 0, zero.output()
    prod = tmp_path / "prod.duckdb"
    assert rows(prod, "select count(*) from late") == [(1,)]

    args = [*args, "--full-refresh"]
    first = start(cut_off(projects.SLOW), args, config=config)
    first.until(frames.NodeWork, unique_id="model.shop.slow")
    first.process.kill()
    assert first.end() == -signal.SIGKILL
    built = rows(prod, "select id from quick")  # no lock outlives the process
    statuses = statuses_of(first)
    wanted = {
        unique_id for unique_id, status in statuses.items() if status not in ("success", "pass")
    }
    assert {"model.shop.slow", "model.shop.late", "model.shop.end"} <= wanted
    assert "model.shop.quick" not in wanted

    second = start(
        cut_off(quick), args, config=config, **resume(args, tmp_path / "state", **statuses)
    )
    assert second.end() == 0, second.output()
    assert set(planned(second)) == set(finished(second)) == wanted
    ended = {unique_id for unique_id in results(second) if not unique_id.startswith("operation.")}
    assert ended == wanted - {"model.shop.middle"}  # ephemeral: it has no result
    (plan,) = second.of(frames.Plan)
    assert (plan.status, plan.target_name, plan.threads) == ("complete", "prod", 1)
    assert len(second.of(frames.HookFinish)) == 2
    assert {"manifest", "run_results"} <= {each.kind for each in second.of(frames.Artifact)}
    assert len(second.of(frames.Invocation)) == 1
    assert rows(prod, "select id from quick") == built
    assert rows(prod, "select * from late") == [(None, VARS["path"], "prod")]
    assert rows(prod, "select count(*) from hooks where target = 'prod'") == [(2,)]
    assert not (tmp_path / "shop.duckdb").exists()
    written = json.loads((tmp_path / "target" / "run_results.json").read_bytes())
    assert (written["args"]["which"], written["args"]["vars"]) == ("build", VARS)
    assert (tmp_path / "state" / "run_results.json").stat().st_mode & 0o777 == 0o600


def test_a_resumed_attempt_can_be_cut_off_and_resumed_itself(start: Start, tmp_path: Path) -> None:
    args = ["run", "--target=prod"]
    files = projects.slow()
    second = start(
        files, args, **resume(args, tmp_path / "2", before="success", slow="error", after="skipped")
    )
    second.until(frames.NodeWork, unique_id="model.shop.slow")
    second.control(frames.CONTROL_CANCEL)
    assert second.end() == 2
    assert second.result.interrupted
    mended = {**files, "models/slow.sql": "select 1 as total"}
    third = start(
        mended, args, **resume(args, tmp_path / "3", before="success", **statuses_of(second))
    )
    assert third.end() == 0
    assert finished(third) == {"model.shop.slow": "success", "model.shop.after": "success"}


def test_where_everything_had_succeeded_dbt_says_so_and_that_is_a_success(
    start: Start, tmp_path: Path
) -> None:
    """No plan and no hook then: dbt returns before its first node."""
    config = {"on-run-end": ["select 1"]}
    options = resume(["build"], tmp_path / "state", orders="success", daily="success")
    child = start(projects.shop(), ["build"], config=config, **options)
    assert child.end() == 0
    assert "NothingToDo" in {line.name for line in child.of(frames.Log)}
    assert not child.of(frames.Plan)
    assert not child.of(frames.HookFinish)
    assert (child.result.success, child.result.result_count) == (True, 0)


def test_a_test_that_had_failed_runs_again_and_nothing_else(start: Start, tmp_path: Path) -> None:
    first = start(projects.test_failure(), ["build"])
    assert first.end() == 1
    statuses = statuses_of(first) | {"model.shop.daily": "success"}
    second = start(
        projects.test_failure(), ["build"], **resume(["build"], tmp_path / "s", **statuses)
    )
    assert second.end() == 1
    assert list(finished(second).values()) == ["fail"]


def test_a_snapshot_is_retried_and_its_seed_is_not(start: Start, tmp_path: Path) -> None:
    first = start(projects.seeds_snapshots(), ["build"])
    assert first.end() == 0
    statuses = statuses_of(first) | {"snapshot.shop.countries_history": "error"}
    options = resume(["build"], tmp_path / "state", **statuses)
    second = start(projects.seeds_snapshots(), ["build"], **options)
    assert second.end() == 0
    assert finished(second) == {"snapshot.shop.countries_history": "success"}


def test_unit_tests_are_retried_after_their_models_as_dbt_does_it(
    start: Start, tmp_path: Path
) -> None:
    """In a retry dbt has unit tests in the graph like any other node: they hold nothing back."""
    first = start(projects.unit_tests(), ["build"])
    assert first.end() == 1
    statuses = statuses_of(first)
    assert statuses["unit_test.shop.weekly.doubles_amount"] == "fail"
    second = start(
        projects.unit_tests(), ["build"], **resume(["build"], tmp_path / "state", **statuses)
    )
    assert second.end() == 1
    assert finished(second) == {
        "model.shop.weekly": "success",
        "unit_test.shop.weekly.doubles_amount": "fail",
    }
    assert set(planned(second)) == set(finished(second))


@since_1_9
@pytest.mark.parametrize("command", ["run", "build"])
def test_only_the_batches_that_had_failed_run_again(
    start: Start, tmp_path: Path, command: str
) -> None:
    """dbt 1.9 does so under `run` only."""
    args = [command, "--event-time-start", "2024-01-01", "--event-time-end", "2024-01-04"]
    first = start(projects.microbatch(fail_on_day=2), args, threads=1)
    assert first.end() == 1
    earlier = [
        EarlierResult(
            unique_id=each.unique_id, status=each.status, batch_results=each.batch_results
        )
        for each in results(first).values()
    ]
    state = tmp_path / "state"
    state.mkdir()
    retry = Retry(args=args, results=earlier, state_dir=str(state))
    second = start(projects.microbatch(), args, threads=1, retry=retry)
    assert second.end() == 0
    expected = 3 if (VERSION, command) == ((1, 9), "build") else 1
    assert len(second.of(frames.BatchFinish)) == expected
    assert finished(second) == {"model.shop.batched": "success"}
    assert rows(tmp_path / "shop.duckdb", "select id from batched order by id") == [
        (1,),
        (2,),
        (3,),
    ]


def test_an_operation_runs_again_with_its_args(start: Start, tmp_path: Path) -> None:
    args = ["run-operation", "tidy", "--args", json.dumps({"word": "a\\b"})]
    operation = {"operation.shop.tidy": "error"}
    options = resume(args, tmp_path / "state", **operation)
    child = start(projects.run_operation(), args, **options)
    assert child.end() == 0, child.output()
    assert "tidied a\\b" in {line.message for line in child.of(frames.Log)}


@pytest.mark.parametrize(
    ("args", "error_class", "text"),
    [
        (["source", "freshness"], "CannotRetry", "dbt cannot retry `freshness`"),
        (["list"], "CannotRetry", "dbt cannot retry `list`"),
        (["retry", "--state", "gone"], "CannotRetry", "dbt cannot retry `None`"),
        (["bake"], "", "bake"),
        (["build", "--no-such-flag"], "NoSuchOption", "--no-such-flag"),
        (["--quiet"], "UsageError", "no command"),
    ],
)
def test_what_cannot_be_retried_is_an_error_and_nothing_runs(
    start: Start, tmp_path: Path, args: list[str], error_class: str, text: str
) -> None:
    child = start(projects.shop(), args, **resume(args, tmp_path / "state", orders="error"))
    assert child.end() == 2
    assert isinstance(child.frames[0], frames.Hello)
    assert child.result.error is not None
    assert error_class in child.result.error.error_class
    assert text in child.result.error.message
    assert not child.of(frames.Invocation)


WORDS = [
    ["build"],
    ["build", "--full-refresh", "--fail-fast", "--empty", "--store-failures", "-t", "prod"],
    ["run", "--defer", "--favor-state", "--state", "earlier", "--profile=shop", "--no-print"],
    ["--no-partial-parse", "build", "-s", "a", "tag:b,c+", "--exclude", "d e", "--threads=3"],
    ["build", "--select", "a", "--select", "b", "--resource-type", "model", "test"],
    ["build", "--exclude-resource-type", "test", "--indirect-selection", "cautious"],
    ["test", "--warn-error", "--vars", "{a: null, b: 'x\\y', c: [1, {d: \"'\"}]}"],
    ["snapshot", "--selector", "nightly", "--no-version-check", "--no-populate-cache"],
    ["compile", "--no-introspect", "--no-inject-ephemeral-ctes"],
    ["docs", "generate", "--no-compile", "--empty-catalog", "--static"],
    ["run-operation", "tidy", "--args", "{word: 'a\\b'}"],
    ["seed", "--show", "-f"],
    ["clone", "--state", "earlier", "--select", "x"],
    (
        ["build", "--warn-error-options", '{"include": ["NothingToDo"]}']
        if VERSION < (1, 10)
        else ["build", "--warn-error-options", '{"error": ["NothingToDo"], "silence": []}']
    ),
]
if VERSION >= (1, 9):
    WORDS.append(
        ["run", "--event-time-start", "2024-01-01T05:00:00", "--event-time-end", "2024-01-02"]
    )
if VERSION >= (1, 10):
    WORDS.append(["build", "--sample", "{'start': '2024-01-01', 'end': '2024-01-03'}"])

COMPARE = """
import importlib, json, os, sys
words = json.loads(sys.argv[2])
sys.path.insert(0, os.path.dirname(sys.argv[1]))
retry = importlib.import_module("dbt_child.retry")
from dbt.cli.flags import Flags, args_to_context
from dbt.task.retry import CMD_DICT, IGNORE_PARENT_FLAGS
for args in words:
    sys.argv = ["dbt"]
    command, options = retry.given_options(args)
    retry.write_run_results(".", {"which": command, **options}, [])
    with open("run_results.json") as file:
        written = json.load(file)["args"]
    kept = {name: each for name, each in written.items() if name not in IGNORE_PARENT_FLAGS}
    again = vars(Flags.from_dict(CMD_DICT[command], kept))
    # As dbt's own command line does it: options before the command belong to the group.
    at = next(i for i, word in enumerate(args) if not word.startswith("-"))
    first = vars(Flags(args_to_context(args[at:] + args[:at])))
    for flag in sorted(set(first) | set(again)):
        if flag.lower() in IGNORE_PARENT_FLAGS or flag == "deprecated_env_var_warnings":
            continue
        one, two = first.get(flag), again.get(flag)
        if not callable(one) and str(one) != str(two):
            print(args, flag, one, two)
"""


def test_every_flag_comes_back_from_the_file_as_it_was_given(tmp_path: Path) -> None:
    """What dbt makes of the words, and of what its retry makes of the file, is the same."""
    project = projects.write_project(tmp_path, projects.shop())
    told = subprocess.run(
        [PYTHON, "-c", textwrap.dedent(COMPARE), str(projects.CHILD), json.dumps(WORDS)],
        cwd=project,
        env=projects.child_env(project),
        capture_output=True,
        text=True,
    )
    assert (told.returncode, told.stdout) == (0, ""), told.stderr


# A run with a file of its own.


def broken_but(*, broken: bool) -> projects.Files:
    code = "select '{{ target.name }}' as target, '{{ var('path') }}' as path, "
    code += "{{ 1 if var('nothing') is none else 0 }} as kept"
    return {
        "models/fine.sql": "select 1 as id",
        "models/broken.sql": projects.BROKEN if broken else code,
    }


@pytest.mark.parametrize("target", ["dev", "prod"])
def test_a_restored_file_is_retried_on_the_target_that_is_asked_for_now(
    start: Start, tmp_path: Path, target: str
) -> None:
    """dbt itself would take the file's target, and its vars as something else than they were."""
    values = {"nothing": None, "path": "a\\b"}
    args = ["build", "--target", "prod", "--vars", json.dumps(values), "--full-refresh"]
    config = {"vars": {"nothing": 1, "path": "wrong"}}
    assert start(broken_but(broken=True), args, config=config).end() == 1
    restored = tmp_path / "restored"
    restored.mkdir()
    shutil.copy(tmp_path / "target" / "run_results.json", restored)
    shutil.rmtree(tmp_path / "target")

    words = ["retry", "--state", str(restored), "--target", target, "--threads", "1"]
    child = start(broken_but(broken=False), words, config=config)
    assert child.end() == 0, child.output()
    (plan,) = child.of(frames.Plan)
    assert (plan.target_name, plan.threads) == (target, 1)
    assert finished(child) == {"model.shop.broken": "success"}
    database = tmp_path / ("prod.duckdb" if target == "prod" else "shop.duckdb")
    assert rows(database, "select * from broken") == [(target, "a\\b", 1)]
    written = json.loads((tmp_path / "target" / "run_results.json").read_bytes())["args"]
    assert (written["which"], written["full_refresh"]) == ("build", True)


def test_a_retry_of_a_restored_file_that_was_cut_off_can_be_resumed(
    start: Start, tmp_path: Path
) -> None:
    """Its flags are in the file of the run before; which nodes are left is told by the parent."""
    given = ["--vars", json.dumps({"path": "a\\b", "nothing": None})]
    assert start(broken_but(broken=True), ["run", "--target", "prod", *given]).end() == 1
    target, restored = tmp_path / "target", tmp_path / "restored"
    restored.mkdir()
    shutil.move(target / "run_results.json", restored)
    words = ["retry", "--state", str(restored), "--target", "prod"]
    options = resume(words, tmp_path / "state", broken="error")
    child = start(broken_but(broken=False), words, **options)
    assert child.end() == 0, child.output()
    assert finished(child) == {"model.shop.broken": "success"}
    assert rows(tmp_path / "prod.duckdb", "select * from broken") == [("prod", "a\\b", 1)]
    written = json.loads((target / "run_results.json").read_bytes())
    assert written["args"]["which"] == "run"


def test_without_a_target_the_projects_default_is_retried_on_not_the_files(
    start: Start, tmp_path: Path
) -> None:
    """And vars that are given anew replace those of the file."""
    given = ["--vars", json.dumps({"path": "first", "nothing": 1})]
    assert start(broken_but(broken=True), ["run", "--target", "prod", *given]).end() == 1
    anew = ["--vars", json.dumps({"path": "second\\", "nothing": None})]
    child = start(broken_but(broken=False), ["retry", *anew])
    assert child.end() == 0
    assert rows(tmp_path / "shop.duckdb", "select * from broken") == [("dev", "second\\", 1)]


def test_a_file_that_docs_generate_has_overwritten_no_longer_knows_the_build(
    start: Start, tmp_path: Path
) -> None:
    """It writes run_results.json for its own compiling, and one that dbt cannot even read back."""
    assert start(projects.node_failure(), ["build"]).end() == 1
    assert start(projects.node_failure(), ["docs", "generate"]).end() == 0
    child = start(projects.node_failure(), ["retry"])
    assert child.end() == 2
    assert not child.of(frames.NodeStart)
    assert child.result.error is not None
    assert "No such option '--no-" in child.result.error.message


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (None, "Could not find previous run"),
        ({"which": "freshness"}, "dbt cannot retry `freshness`"),
        ({}, "dbt cannot retry `None`"),
    ],
)
def test_a_file_that_dbt_cannot_retry_is_an_error_that_says_so(
    start: Start, tmp_path: Path, written: dict[str, str] | None, text: str
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    if written is not None:
        schema = "https://schemas.getdbt.com/dbt/run-results/v6.json"
        metadata = {"dbt_schema_version": schema}
        content = {"metadata": metadata, "results": [], "elapsed_time": 0.0, "args": written}
        (state / "run_results.json").write_text(json.dumps(content))
    child = start(projects.shop(), ["retry", "--state", str(state)])
    assert child.end() == 2
    assert child.result.error is not None
    assert text in child.result.error.message


def test_a_word_that_retry_does_not_know_is_told_by_dbt(start: Start) -> None:
    child = start(projects.shop(), ["retry", "--select", "orders"])
    assert child.end() == 2
    assert child.result.error is not None
    assert child.result.error.error_class == "DbtUsageException"
