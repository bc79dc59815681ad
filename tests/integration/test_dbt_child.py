"""The dbt child with real dbt on DuckDB, spoken to as the daemon does.

`DBTSTREAM_TEST_PYTHON` names the interpreter whose dbt is tested (default: this one); what a
dbt release does not have yet is skipped there and says so.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dbtstream import frames
from tests import dbt_projects as projects
from tests.dbt_projects import PYTHON, Child, finished, planned, results
from tests.dbt_projects import Starting as Start
from tests.warm_children import WarmChildren

VERSION = projects.dbt_release(PYTHON)
since_1_9 = pytest.mark.skipif(VERSION < (1, 9), reason="dbt 1.8 has no microbatch")
since_1_10 = pytest.mark.skipif(VERSION < (1, 10), reason="before dbt 1.10 no exposure is built")

pytestmark = pytest.mark.parametrize("warm", ["cold", "warm"], indirect=True)


@pytest.fixture
def start(tmp_path: Path, warm: WarmChildren | None) -> Iterator[Start]:
    with projects.children(tmp_path, warm) as begin:
        yield begin


# A run from its first frame to its last.


def test_a_build_is_told_whole_and_in_order(start: Start, warm: WarmChildren | None) -> None:
    """Hello first, result last, no hole; plan, finishes and results name the same nodes."""
    child = start(projects.shop(), ["build"])
    assert child.end() == 0

    assert [frame.n for frame in child.frames] == list(range(1, len(child.frames) + 1))
    hello = child.frames[0]
    assert isinstance(hello, frames.Hello)
    assert hello.protocol == frames.PROTOCOL
    assert hello.pid == child.process.pid
    assert tuple(int(part) for part in hello.dbt_version.split(".")[:2]) == VERSION
    assert hello.adapter_type == "duckdb"
    assert hello.adapter_version
    assert hello.start == ("warm" if warm else "cold")

    nodes = planned(child)
    assert {node.name for node in nodes.values()} == {
        "orders",
        "daily",
        "unique_orders_id",
        "not_null_orders_id",
    }
    assert set(finished(child)) == set(nodes) == set(results(child))
    assert {start.unique_id for start in child.of(frames.NodeStart)} == set(nodes)
    assert {work.unique_id for work in child.of(frames.NodeWork)} == set(nodes)
    assert sorted(work.index or 0 for work in child.of(frames.NodeWork)) == [1, 2, 3, 4]
    (plan,) = child.of(frames.Plan)
    assert (plan.status, plan.node_count, plan.threads, plan.target_name) == (
        "complete",
        4,
        2,
        "dev",
    )
    assert plan.manifest_hash
    assert len(child.of(frames.Invocation)) == 1

    result = child.result
    assert (result.success, result.exit_code, result.result_count) == (True, 0, 4)
    assert (result.error, result.interrupted) == (None, False)
    stats = result.stats
    assert stats.frames == len(child.frames)
    assert stats.events > stats.frames
    assert (stats.callback_errors, stats.callback_error, stats.callback_s) == (0, None, None)
    assert (stats.cpu_s or 0) > 0.1
    assert (stats.max_rss_bytes or 0) > 50_000_000


def test_a_node_is_described_as_the_manifest_of_this_very_run_has_it(start: Start) -> None:
    child = start(projects.shop(), ["build"])
    child.end()
    nodes = planned(child)
    orders = nodes["model.shop.orders"]
    assert orders.resource_type == "model"
    assert orders.materialized == "table"
    assert orders.path == "models/orders.sql"
    assert orders.fqn == ["shop", "orders"]
    assert orders.tags == ["core"]
    assert orders.group == "finance"
    assert orders.access == "protected"
    assert orders.owners == ["ada@example.com", "finance@example.com", "Finance"]
    assert orders.meta == {"owner": "ada@example.com", "tier": 1}
    assert isinstance(orders.meta["tier"], int)
    assert orders.relation is not None
    assert orders.relation.relation_name == '"shop"."main"."orders"'
    manifest = json.loads((child.project / "target" / "manifest.json").read_bytes())
    assert orders.checksum == manifest["nodes"]["model.shop.orders"]["checksum"]["checksum"]
    assert nodes["model.shop.daily"].upstream == ["model.shop.orders"]

    (unique,) = [node for node in nodes.values() if node.name == "unique_orders_id"]
    assert unique.test is not None
    assert unique.test.attached_node == "model.shop.orders"
    assert (unique.test.column, unique.test.test_name) == ("id", "unique")
    assert (unique.test.severity, unique.test.warn_if) == ("error", "!= 0")
    assert unique.relation is None


def test_times_and_answers_of_a_node_are_kept_as_dbt_gave_them(start: Start) -> None:
    child = start(projects.seeds_snapshots(), ["build"])
    assert child.end() == 0
    nodes = planned(child)
    assert {node.resource_type for node in nodes.values()} == {"seed", "snapshot"}
    finish = next(f for f in child.of(frames.NodeFinish) if "seed" in f.unique_id)
    result = results(child)[finish.unique_id]
    assert [step.name for step in finish.timing] == ["compile", "execute"]
    assert finish.timing == result.timing
    assert finish.started_at is not None
    assert finish.finished_at is not None
    assert finish.started_at <= (finish.timing[0].started_at or "") <= finish.finished_at
    assert finish.adapter_response == result.adapter_response
    # A protobuf Struct made a float of it on its way.
    assert isinstance(finish.adapter_response["rows_affected"], int)
    assert finish.relation == nodes[finish.unique_id].relation


def test_artifacts_are_told_with_what_lies_in_their_files(start: Start) -> None:
    child = start(projects.shop(), ["build"])
    child.end()
    artifacts = {artifact.kind: artifact for artifact in child.of(frames.Artifact)}
    assert {"manifest", "run_results"} <= set(artifacts)
    for artifact in artifacts.values():
        content = Path(artifact.path).read_bytes()
        assert artifact.sha256 == hashlib.sha256(content).hexdigest()
        assert artifact.size == len(content)
    run_results = json.loads(Path(artifacts["run_results"].path).read_bytes())
    (invocation,) = child.of(frames.Invocation)
    assert run_results["metadata"]["invocation_id"] == invocation.invocation_id
    assert run_results["args"]["invocation_command"] == "dbt build"
    compiled = {each["unique_id"]: each["compiled_code"] for each in run_results["results"]}
    for unique_id, result in results(child).items():
        expected = hashlib.sha256(compiled[unique_id].encode()).hexdigest()
        assert result.compiled_code_hash == expected


# What nodes can do.


def test_a_failing_node_has_its_exceptions_class_and_code_and_the_exit_code_is_1(
    start: Start,
) -> None:
    child = start({**projects.node_failure(), **projects.node_compile_error()}, ["run"])
    assert child.end() == 1
    errors = {error.unique_id: error for error in child.of(frames.NodeError)}
    assert errors["model.shop.broken"].error_class == "DbtRuntimeError"
    assert "no_such_table" in errors["model.shop.broken"].message
    assert errors["model.shop.unlucky"].error_class == "CompilationError"
    assert errors["model.shop.unlucky"].code == "10004"
    assert finished(child) == {
        "model.shop.broken": "error",
        "model.shop.unlucky": "error",
        "model.shop.orders": "success",
        "model.shop.daily": "success",
    }
    assert child.result.error is None


def test_a_failing_test_has_its_failures_and_skips_what_is_downstream(start: Start) -> None:
    child = start(projects.test_failure(), ["build"])
    assert child.end() == 1
    failed = next(f for f in child.of(frames.NodeFinish) if "unique" in f.unique_id)
    assert (failed.status, failed.failures) == ("fail", 1)
    assert failed.message == "Got 1 result, configured to fail if != 0"
    assert [skip.unique_id for skip in child.of(frames.NodeSkip)] == ["model.shop.daily"]
    assert finished(child)["model.shop.daily"] == "skipped"
    assert "model.shop.daily" not in {work.unique_id for work in child.of(frames.NodeWork)}


def test_a_warning_test_that_stores_its_failures_says_where(start: Start) -> None:
    child = start(projects.test_warn(), ["build"])
    assert child.end() == 0
    (test,) = [node for node in planned(child).values() if node.test]
    assert finished(child)[test.unique_id] == "warn"
    assert test.test is not None
    assert test.test.severity == "warn"
    assert test.test.failures_relation == '"shop"."main_dbt_test__audit"."unique_orders_id"'


def test_nodes_skipped_by_fail_fast_are_in_the_results_only(start: Start) -> None:
    """dbt fires no event for them: the parent needs plan and results to tell their end."""
    child = start(projects.skip_chain(), ["build", "--fail-fast"], threads=1)
    assert child.end() == 1
    silent = set(planned(child)) - set(finished(child))
    assert silent == {"model.shop.middle", "model.shop.last"}
    assert {results(child)[unique_id].status for unique_id in silent} == {"skipped"}


def test_an_ephemeral_model_works_without_index_and_has_no_result(start: Start) -> None:
    child = start(projects.ephemeral(), ["build"])
    assert child.end() == 0
    assert finished(child) == {"model.shop.base": "success", "model.shop.uses": "success"}
    assert set(planned(child)) == set(finished(child))
    assert set(results(child)) == {"model.shop.uses"}
    work = {each.unique_id: each.index for each in child.of(frames.NodeWork)}
    assert work == {"model.shop.base": None, "model.shop.uses": 1}


def test_unit_tests_are_in_the_plan_and_their_difference_has_no_colours(start: Start) -> None:
    child = start(projects.unit_tests(), ["build"])
    assert child.end() == 1
    nodes = planned(child)
    unit_tests = {u: n for u, n in nodes.items() if n.resource_type == "unit_test"}
    assert {n.name: n.upstream for n in unit_tests.values()} == {
        "keeps_amount": ["model.shop.daily"],
        "doubles_amount": ["model.shop.weekly"],
    }
    assert set(finished(child)) == set(nodes)
    failed = next(f for f in child.of(frames.NodeFinish) if "doubles" in f.unique_id)
    assert failed.status == "fail"
    assert "actual differs from expected" in (failed.message or "")
    assert b"\\u001b" not in child.raw
    assert b"\x1b" not in child.raw
    assert finished(child)["model.shop.weekly"] == "skipped"


def test_hooks_are_told_and_known_though_not_selected(start: Start) -> None:
    hooks = {"on-run-start": ["select 1"], "on-run-end": ["select 2", "select 3"]}
    child = start(projects.shop(), ["build"], config=hooks)
    assert child.end() == 0
    (plan,) = child.of(frames.Plan)
    others = {node.unique_id: node for node in plan.others}
    assert [hook.unique_id for hook in child.of(frames.HookFinish)] == [
        "operation.shop.shop-on-run-start-0",
        "operation.shop.shop-on-run-end-0",
        "operation.shop.shop-on-run-end-1",
    ]
    assert {hook.unique_id for hook in child.of(frames.HookStart)} == set(others)
    assert {node.resource_type for node in others.values()} == {"operation"}
    assert {hook.status for hook in child.of(frames.HookFinish)} == {
        "success" if VERSION >= (1, 9) else "OK"
    }


def test_a_failing_start_hook_is_told_and_its_nodes_are_skipped_where_asked(
    start: Start,
) -> None:
    """dbt 1.8 has no such flag and no result for a hook, so there the frame has the words."""
    flags = {"send_anonymous_usage_stats": False}
    if VERSION >= (1, 9):
        flags["skip_nodes_if_on_run_start_fails"] = True
    hooks = {"on-run-start": ["select 1", "select * from no_such_table"]}
    child = start(projects.shop(), ["build"], config={**hooks, "flags": flags})
    assert child.end() == 1
    good, bad = child.of(frames.HookFinish)
    assert good.status in ("success", "OK")
    assert bad.status == "error"
    order = [type(frame) for frame in child.frames]
    assert order.index(frames.Plan) < order.index(frames.HookStart)
    if VERSION >= (1, 9):
        assert "no_such_table" in (results(child)[bad.unique_id].message or "")
        assert {skip.unique_id for skip in child.of(frames.NodeSkip)} == set(planned(child))
        assert not child.of(frames.NodeStart)
    else:
        assert "no_such_table" in (bad.message or "")
        assert set(finished(child)) == set(planned(child)) == set(results(child))


def test_a_versioned_model_has_its_version_as_text(start: Start) -> None:
    child = start(projects.version_model(), ["build"])
    child.end()
    nodes = planned(child)
    assert nodes["model.shop.customers.v2"].version == "2"
    assert nodes["model.shop.customers.v2"].access == "public"
    assert nodes["model.shop.uses"].version is None
    assert nodes["model.shop.uses"].upstream == ["model.shop.customers.v2"]


@since_1_10
def test_an_exposure_is_planned_with_its_owner_and_ends_as_no_op(start: Start) -> None:
    child = start(projects.exposure(), ["build"])
    assert child.end() == 0
    board = planned(child)["exposure.shop.board"]
    assert board.owners == ["grace@example.com", "Grace"]
    assert board.upstream == ["model.shop.daily"]
    assert finished(child)["exposure.shop.board"] == "no-op"


EVENT_TIMES = ["--event-time-start", "2024-01-01", "--event-time-end", "2024-01-04"]
FIRST_DAY = ("2024-01-01T00:00:00+00:00", "2024-01-02T00:00:00+00:00")


@since_1_9
def test_each_batch_is_told_with_its_times_and_the_model_with_all_of_them(start: Start) -> None:
    child = start(projects.microbatch(fail_on_day=2), ["build", *EVENT_TIMES], threads=1)
    assert child.end() == 1
    batches = child.of(frames.BatchFinish)
    assert [(b.index, b.total, b.status) for b in batches] == [
        (1, 3, "success"),
        (2, 3, "error"),
        (3, 3, "success"),
    ]
    assert (batches[0].event_time_start, batches[0].event_time_end) == FIRST_DAY
    assert [start.index for start in child.of(frames.BatchStart)] == [1, 2, 3]
    assert finished(child)["model.shop.batched"] == "partial success"
    parts = results(child)["model.shop.batched"].batch_results
    assert parts is not None
    assert (len(parts.successful), len(parts.failed)) == (2, 1)
    assert tuple(parts.successful[0]) == FIRST_DAY


def test_freshness_has_ages_and_thresholds_where_the_query_went_well(start: Start) -> None:
    start(projects.freshness(), ["run"]).end()
    child = start(projects.freshness(), ["source", "freshness"])
    assert child.end() == 1
    by_name = {unique_id.rsplit(".", 1)[1]: each for unique_id, each in results(child).items()}
    assert {name: each.status for name, each in by_name.items()} == {
        "fresh": "pass",
        "late": "warn",
        "stale": "error",
        "missing": "runtime error",
    }
    late = by_name["late"].freshness
    assert late is not None
    assert (late.warn_after_s, late.error_after_s) == (3600, 172800)
    assert 5 * 3600 <= (late.age_s or 0) < 6 * 3600
    assert late.max_loaded_at is not None
    assert by_name["missing"].freshness is None
    assert set(finished(child)) == set(planned(child)) == set(results(child))
    assert "sources" in {artifact.kind for artifact in child.of(frames.Artifact)}


def test_retry_plans_only_what_it_will_run(start: Start) -> None:
    start(projects.node_failure(), ["build"]).end()
    mended = {**projects.node_failure(), "models/broken.sql": "select 1 as id"}
    child = start(mended, ["retry"])
    assert child.end() == 0
    assert set(planned(child)) == {"model.shop.broken"}
    assert finished(child) == {"model.shop.broken": "success"}


# Commands without nodes, and runs that never begin.


def test_an_operation_has_output_but_no_results(start: Start) -> None:
    args = ["run-operation", "tidy", "--args", "{word: up}"]
    child = start(projects.run_operation(), args)
    assert child.end() == 0
    lines = [(line.level, line.message) for line in child.of(frames.Log)]
    assert ("info", "tidied up") in lines
    if VERSION >= (1, 9):  # 1.8 prints past its events
        assert ("info", "printed up") in lines
    assert "printed up" in child.output()
    (warning,) = [text for level, text in lines if level == "warn"]
    assert warning.endswith("mind up")  # 1.12 puts "[WARNING]: " in front
    assert child.result.result_count == -1
    assert len(child.of(frames.Parsed)) == 1, "when its work begins"
    assert not child.of(frames.Plan)


def test_list_prints_what_it_found(start: Start) -> None:
    child = start(projects.shop(), ["list", "--resource-type", "model"])
    assert child.end() == 0
    told = {line.message for line in child.of(frames.Log)}
    if VERSION < (1, 9):  # prints past its events
        told = set(child.output().splitlines())
    assert {"shop.orders", "shop.daily"} <= told


def test_an_empty_selection_is_a_success_that_says_so(start: Start) -> None:
    child = start(projects.shop(), ["build", "--select", "nothing_like_it"])
    assert child.end() == 0
    names = [line.name for line in child.of(frames.Log)]
    assert "NoNodesForSelectionCriteria" in names
    assert "NothingToDo" in names
    assert child.result.result_count == 0


@pytest.mark.parametrize(
    ("files", "args", "config", "error_class", "text"),
    [
        (projects.shop(), ["build", "--no-such-flag"], {}, "DbtUsageException", "--no-such-flag"),
        (projects.shop(), ["bake"], {}, "DbtUsageException", "bake"),
        (projects.compile_error(), ["build"], {}, "TargetNotFoundError", "nowhere"),
        (projects.shop(), ["build"], {"profile": "nobody"}, "DbtProjectError", "nobody"),
    ],
    ids=["bad-flag", "bad-command", "compile-error", "bad-profile"],
)
def test_a_run_that_cannot_begin_has_dbts_words_and_exit_code_2(
    start: Start,
    files: projects.Files,
    args: list[str],
    config: dict[str, Any],
    error_class: str,
    text: str,
) -> None:
    child = start(files, args, config=config)
    assert child.end() == 2
    assert isinstance(child.frames[0], frames.Hello)
    error = child.result.error
    assert error is not None
    assert error.error_class == error_class
    assert text in error.message
    assert not child.result.interrupted


# Secrets.


def test_no_byte_on_the_pipe_holds_a_secret(start: Start) -> None:
    """Through --vars it reaches SQL, logs, errors and results; dbt's own events carry it raw."""
    secrets = {"DBT_ENV_SECRET_CANARY": "canary-7f3a\"q'", "WAREHOUSE_KEY": "gold-99e1"}
    files = {
        "models/said.sql": "{% do log('it is ' ~ var('a') ~ var('b'), info=True) %}"
        "select $q${{ var('a') }}$q$ as a, '{{ var('b') }}' as b",
        "models/thrown.sql": "{{ config(materialized='table', meta={'key': var('b')}) }}"
        "{% if execute %}{{ exceptions.raise_compiler_error('bad ' ~ var('a')) }}{% endif %}",
    }
    values = {"a": secrets["DBT_ENV_SECRET_CANARY"], "b": secrets["WAREHOUSE_KEY"]}
    child = start(
        files,
        ["build", "--vars", json.dumps(values)],
        env=secrets,
        secret_env=["WAREHOUSE_KEY"],
        log_level="debug",
        queries=True,
        query_sql=True,
    )
    assert child.end() == 1
    assert b"canary-7f3a" not in child.raw
    assert b"gold-99e1" not in child.raw
    assert child.result.stats.scrubbed > 5
    assert "it is **********" in {line.message for line in child.of(frames.Log)}
    assert any("*****" in (query.sql or "") for query in child.of(frames.Query))
    assert planned(child)["model.shop.thrown"].meta == {"key": "*****"}


# Texts that were asked for.


def test_log_lines_come_from_the_wanted_level_on_and_name_their_node(start: Start) -> None:
    talk = "{{ exceptions.warn('mind') }}{% if execute %}{{ log('hear', info=True) }}{% endif %}"
    files = {**projects.shop(), "models/daily.sql": talk + " select 1 as id"}
    warn = start(files, ["build"])
    warn.end()
    lines = {(line.name, line.level, line.unique_id) for line in warn.of(frames.Log)}
    assert lines == {
        ("JinjaLogWarning", "warn", None),
        ("JinjaLogInfo", "info", "model.shop.daily"),  # output: whatever the level
    }
    debug = start(files, ["build"], log_level="debug")
    debug.end()
    assert {"debug", "info"} <= {line.level for line in debug.of(frames.Log)}
    names = {line.name for line in debug.of(frames.Log)}
    assert "SQLQuery" in names
    assert not names & {"NodeStart", "NodeFinished", "LogModelResult", "ConcurrencyLine"}


def test_queries_are_told_only_where_asked_and_their_sql_only_then(start: Start) -> None:
    told: list[frames.Query] = []
    for options in ({}, {"queries": True}, {"queries": True, "query_sql": True}):
        child = start(projects.shop(), ["run"], **options)
        child.end()
        told = child.of(frames.Query)
        assert bool(told) == ("queries" in options)
        assert any(query.sql for query in told) == ("query_sql" in options)
    mine = [query for query in told if query.unique_id == "model.shop.orders"]
    assert any("create" in (query.sql or "") for query in mine)
    assert all(query.elapsed_s >= 0 for query in mine)


# Robustness.

BREAKER = """
from dbt_common.events.event_manager_client import get_event_manager
class NodeFinishedMsg:
    info = property(lambda self: 1 / 0)
    data = property(lambda self: 1 / 0)
for callback in get_event_manager().callbacks:
    if type(callback).__name__ == "EventCallback":
        callback(NodeFinishedMsg())
        callback(NodeFinishedMsg())
"""


def test_an_event_that_breaks_the_callback_is_counted_and_the_run_unharmed(
    start: Start, tmp_path: Path
) -> None:
    files = {**projects.shop(), **projects.plugin("breaker", BREAKER)}
    child = start(files, ["build"], env={"PYTHONPATH": str(tmp_path)})
    assert child.end() == 0
    assert len(finished(child)) == 4
    stats = child.result.stats
    assert stats.callback_errors == 2
    assert "ZeroDivisionError" in (stats.callback_error or "")


SPY = """
import json, os, sys
facts = {
    "path": sys.path,
    "argv": sys.argv,
    "ours": sorted(name for name in sys.modules if name.startswith("dbtstream")),
    "bare": sorted({"callback", "channel", "control", "engine", "plan", "results", "scrub"}
                   & set(sys.modules)),
    "stdin": os.readlink("/proc/self/fd/0"),
    "inheritable": [fd for fd in range(3, 64)
                    if os.path.exists(f"/proc/self/fd/{fd}") and os.get_inheritable(fd)],
    "session": os.getsid(0) == os.getpid(),
}
with open("facts.json", "w") as file:
    json.dump(facts, file)
"""


def test_dbt_finds_the_process_as_its_own_command_would_make_it(
    start: Start, tmp_path: Path
) -> None:
    """No module of ours shadows another; nothing of the pipe reaches dbt or its children."""
    files = {**projects.shop(), **projects.plugin("spy", SPY)}
    child = start(files, ["list", "--quiet"], env={"PYTHONPATH": str(tmp_path)})
    assert child.end() == 0
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert str(projects.CHILD) not in facts["path"]
    assert "" not in facts["path"]
    assert facts["argv"] == ["dbt", "list", "--quiet"]
    assert "dbtstream_child.callback" in facts["ours"]
    assert "dbtstream" not in facts["ours"]
    assert facts["bare"] == []
    assert facts["stdin"] == os.devnull
    assert facts["inheritable"] == []
    assert facts["session"]


def test_the_callbacks_own_time_is_measured_only_where_asked(start: Start) -> None:
    child = start(projects.shop(), ["build"], measure=True)
    child.end()
    assert 0 < (child.result.stats.callback_s or 0) < (child.result.stats.cpu_s or 0)


@pytest.mark.parametrize("line", [b"nonsense\n", b"[]\n", b'{"project_dir": "/"}\n'])
def test_a_start_that_cannot_be_understood_still_has_a_result(start: Start, line: bytes) -> None:
    child = start(projects.shop(), ["build"], start_line=line)
    assert child.end() == 2
    assert child.result.error is not None
    assert child.result.error.error_class in ("JSONDecodeError", "TypeError", "KeyError")


# Refusals.


def refused(child: Child) -> frames.Refused:
    assert child.end() == 69
    (only,) = child.frames
    assert isinstance(only, frames.Refused)
    return only


def dist(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_an_interpreter_without_dbt_is_refused(start: Start) -> None:
    answer = refused(start(projects.shop(), ["build"], python=[sys.executable, "-I", "-S"]))
    assert answer.code == "no_dbt"
    assert "1.8 to 1.12" in answer.message


def test_dbt_2_is_refused_by_name(start: Start, tmp_path: Path) -> None:
    dist(tmp_path / "fake", "dbt-core", "2.0.1")
    path = {"PYTHONPATH": str(tmp_path / "fake")}
    answer = refused(start(projects.shop(), ["build"], env=path))
    assert (answer.code, answer.engine) == ("dbt_2x", "dbt-core 2.0.1")
    assert "1.8 to 1.12" in answer.message


def test_a_dbt_that_cannot_be_imported_is_refused_with_its_own_words(
    start: Start, tmp_path: Path
) -> None:
    dist(tmp_path / "fake", "dbt-core", "1.11.0")
    (tmp_path / "fake" / "dbt").mkdir()
    (tmp_path / "fake" / "dbt" / "__init__.py").write_text("raise RuntimeError('torn wheel')")
    path = {"PYTHONPATH": str(tmp_path / "fake")}
    answer = refused(start(projects.shop(), ["build"], env=path))
    assert answer.code == "import_failed"
    assert "torn wheel" in answer.message
