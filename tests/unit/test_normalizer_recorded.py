"""What real dbt said, recorded (`tests/record_frames.py`), becomes the events that it should.

One test per record and dbt version: the guarantees hold, at its end and wherever it is cut
off, and the outcome is the expected one.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dbtstream.endings import Ended, Ending
from dbtstream.event_base import ErrorBlock
from dbtstream.events import (
    AnyEvent,
    LogLine,
    NodeBatch,
    NodeFinished,
    NodeStarted,
    QueryFinished,
    RunCancel,
    RunFinished,
    RunPlanned,
    RunStarted,
)
from dbtstream.frames import AnyFrame, NodeFinish, Nodes, Result, Results, decode_frame
from dbtstream.normalizer import Normalizer
from tests.guarantees import check_run
from tests.stories import context

FRAMES = Path(__file__).parent / "frames"
RECORDS = sorted(FRAMES.glob("*/*.jsonl"))

ORDERS_OK = {
    "orders": "success",
    "daily": "success",
    "unique_orders_id": "success",
    "not_null_orders_id": "success",
}
HOOKS_FAILED = {"shop-on-run-start-0": "success", "shop-on-run-start-1": "error"}
NOT_STARTED = "never_started/on_run_start_failed"


@dataclass(frozen=True)
class Outcome:
    run: str
    nodes: dict[str, str] = field(default_factory=dict)
    verified: str = "equal"
    causes: dict[str, list[str]] = field(default_factory=dict)


OUTCOMES = {
    "success": Outcome("success", ORDERS_OK),
    "success_info_queries": Outcome("success", ORDERS_OK),
    "version_model": Outcome("success", {"customers": "success", "uses": "success"}),
    "node_failure": Outcome("failure", ORDERS_OK | {"broken": "error"}),
    "node_compile_error": Outcome("failure", ORDERS_OK | {"unlucky": "error"}),
    "test_failure": Outcome(
        "failure",
        ORDERS_OK | {"unique_orders_id": "fail", "daily": "skipped/upstream_failed"},
        causes={"daily": ["test.shop.unique_orders_id.1360ecc70e"]},
    ),
    "test_warn": Outcome(
        "success", {"orders": "success", "daily": "success", "unique_orders_id": "warn"}
    ),
    "skip_chain": Outcome(
        "failure",
        {
            "aside": "success",
            "broken": "error",
            "middle": "skipped/upstream_failed",
            "last": "skipped/upstream_failed",
        },
        causes={"middle": ["model.shop.broken"], "last": ["model.shop.broken"]},
    ),
    "fail_fast": Outcome(
        "failure",
        {
            "aside": "success",
            "broken": "error",
            "middle": "never_started/fail_fast",
            "last": "never_started/fail_fast",
        },
    ),
    "on_run_start_failure": Outcome("failure", ORDERS_OK | HOOKS_FAILED),
    "on_run_start_failure_skip": Outcome(
        "failure", dict.fromkeys(ORDERS_OK, NOT_STARTED) | HOOKS_FAILED
    ),
    "on_run_end_hook": Outcome(
        "success",
        ORDERS_OK
        | {
            "shop-on-run-start-0": "success",
            "shop-on-run-end-0": "success",
            "shop-on-run-end-1": "success",
        },
    ),
    "compile_error": Outcome("error", verified="no_results"),
    "bad_profile": Outcome("error", verified="no_results"),
    "usage_error": Outcome("error", verified="no_results"),
    "cancelled": Outcome(
        "cancelled",
        {
            "before": "success",
            "slow": "cancelled/cancelled",
            "after": "never_started/cancelled",
        },
        verified="no_results",
    ),
    "killed": Outcome(
        "error",
        {
            "before": "success",
            "slow": "lost/child_killed",
            "after": "never_started/child_killed",
        },
        verified="no_results",
    ),
    "ephemeral": Outcome("success", {"base": "success", "uses": "success"}),
    "seeds_snapshots": Outcome("success", {"countries": "success", "countries_history": "success"}),
    "unit_tests": Outcome(
        "failure",
        {
            "orders": "success",
            "keeps_amount": "success",
            "daily": "success",
            "doubles_amount": "fail",
            "weekly": "skipped/upstream_failed",
        },
        causes={"weekly": ["unit_test.shop.weekly.doubles_amount"]},
    ),
    "freshness": Outcome(
        "failure", {"fresh": "success", "late": "warn", "stale": "error", "missing": "error"}
    ),
    "microbatch": Outcome("success", {"events": "success", "batched": "success"}),
    "microbatch_partial": Outcome("failure", {"events": "success", "batched": "partial_success"}),
    "microbatch_concurrent": Outcome("success", {"events": "success", "batched": "success"}),
    "exposure": Outcome("success", ORDERS_OK | {"board": "no_op"}),
    "no_nodes": Outcome("success"),
    "run_operation": Outcome("success", verified="no_results"),
    "list": Outcome("success", verified="no_results"),
}

# Where another dbt does otherwise.
ELSEWHERE: dict[tuple[str, str], Outcome] = {
    ("1.8", "on_run_start_failure"): Outcome("failure", ORDERS_OK | HOOKS_FAILED),
    # 1.12 skips nodes after a failed start hook unless told otherwise.
    ("1.12", "on_run_start_failure"): OUTCOMES["on_run_start_failure_skip"],
    # Exposures are no part of `build` before 1.10.
    ("1.8", "exposure"): Outcome("success", ORDERS_OK),
    ("1.9", "exposure"): Outcome("success", ORDERS_OK),
}


def name_of(record: Path) -> str:
    return f"{record.parent.name}-{record.stem}"


def load(record: Path) -> list[AnyFrame]:
    return [decode_frame(line) for line in record.read_bytes().splitlines()]


def told(frames: list[AnyFrame], *, crashed: bool = False) -> list[AnyEvent]:
    """All events of these frames, as if dbt's process had ended after them."""
    begin = datetime.fromtimestamp(frames[0].at if frames else 0, UTC) - timedelta(seconds=1)
    normalizer = Normalizer(context(queued_at=begin, target_path="/project/target"))
    events = normalizer.queued(begin)
    normalizer.spawned(begin)
    for frame in frames:
        events += normalizer.frame(frame)
    error = ErrorBlock(class_="ChildCrashed", message="dbt's process died")
    ending = (
        Ending(how=Ended.CRASHED, exit_code=-9, error=error)
        if crashed
        else Ending(how=Ended.RESULT)
    )
    end = datetime.fromtimestamp(frames[-1].at, UTC) if frames else begin
    events += normalizer.end(ending, at=end)
    return events


def test_dbt_1_11_is_recorded() -> None:
    """Without records the tests below would be none, and pass."""
    recorded = {path.stem for path in FRAMES.glob("1.11.*/*.jsonl")}
    assert recorded == set(OUTCOMES)


@pytest.mark.parametrize("record", RECORDS, ids=name_of)
def test_a_recorded_run_ends_as_it_did(record: Path) -> None:
    release = ".".join(record.parent.name.split(".")[:2])
    outcome = ELSEWHERE.get((release, record.stem), OUTCOMES[record.stem])
    frames = load(record)
    events = told(frames, crashed=not any(isinstance(frame, Result) for frame in frames))

    check_run(events)
    finished = events[-1]
    assert isinstance(finished, RunFinished)
    ends = {e.node.name: e for e in events if isinstance(e, NodeFinished)}
    statuses = {
        name: f"{e.status}/{e.reason}" if e.reason else str(e.status) for name, e in ends.items()
    }
    assert finished.status == outcome.run
    assert finished.verified_status == outcome.verified
    assert statuses == outcome.nodes
    causes = {name: end.root_causes for name, end in ends.items() if end.root_causes}
    assert causes == outcome.causes
    assert [e.message for e in events if isinstance(e, LogLine) and e.code == "dbtstream"] == []
    # Hooks of 1.8 begin before the plan.
    sparse = {name for name, end in ends.items() if end.node.block_status != "complete"}
    assert sparse <= ({n for n in ends if "on-run-start" in n} if release == "1.8" else set())


@pytest.mark.parametrize("record", RECORDS, ids=name_of)
def test_a_recorded_run_may_be_cut_off_anywhere(record: Path) -> None:
    """dbt's process dies after each of its frames in turn; every node has its end still."""
    frames = load(record)
    for length in range(len(frames) + 1):
        heard = frames[:length]
        selected = {n.unique_id for f in heard if isinstance(f, Nodes) for n in f.nodes}
        ended = {f.unique_id for f in heard if isinstance(f, NodeFinish)}
        events = told(heard, crashed=True)
        check_run(events)
        ends = {e.node.unique_id for e in events if isinstance(e, NodeFinished)}
        assert selected | ended <= ends


def recorded(scenario: str) -> list[AnyEvent]:
    (record,) = FRAMES.glob(f"1.11.*/{scenario}.jsonl")
    return told(load(record))


def end_in(events: list[AnyEvent], name: str) -> NodeFinished:
    (end,) = [e for e in events if isinstance(e, NodeFinished) and e.node.name == name]
    return end


def test_the_facts_of_a_model_are_in_its_events() -> None:
    events = recorded("success")
    (started,) = [e for e in events if isinstance(e, RunStarted)]
    (planned,) = [e for e in events if isinstance(e, RunPlanned)]
    (start,) = [
        e for e in events if isinstance(e, NodeStarted) and e.node.unique_id == "model.shop.daily"
    ]
    end = end_in(events, "daily")

    assert started.adapter_type == "duckdb"
    assert started.start_s == pytest.approx(1.0, abs=0.01)
    assert planned.manifest_hash
    assert planned.nodes is not None
    (entry,) = [n for n in planned.nodes if n.unique_id == "model.shop.daily"]
    assert (entry.materialized, entry.depends_on) == ("view", ["model.shop.orders"])
    assert (start.index, start.total) == (4, 4)
    assert start.thread
    assert start.ready_wait_s is not None
    assert start.ready_wait_s < 0.1, "its upstream's tests count, it waits for those"
    assert end.node is start.node
    assert end.node.path == "models/daily.sql"
    assert end.relation is not None
    assert end.relation.relation_name == '"shop"."main"."daily"'
    assert end.started_at is not None
    assert end.finished_at is not None
    assert end.execute_s is not None
    assert end.compile_s is not None
    assert 0 < end.compile_s < end.execute_s < (end.finished_at - end.started_at).total_seconds()
    assert end.adapter_response == {"_message": "OK"}
    assert end.failures is None


def test_the_facts_of_a_test_are_in_its_event() -> None:
    end = end_in(recorded("test_failure"), "unique_orders_id")

    assert end.failures == 1
    assert end.test is not None
    assert end.test.attached_node == "model.shop.orders"
    assert end.test.severity == "error"
    assert end.message == "Got 1 result, configured to fail if != 0"
    assert end.error is None, "a test that says no has not erred"


def test_the_error_of_a_node_has_its_class_and_code() -> None:
    error = end_in(recorded("node_failure"), "broken").error

    assert error is not None
    assert (error.class_, error.dbt_code) == ("DbtRuntimeError", "10001")
    assert "no_such_table" in error.message


def test_the_rows_of_a_seed_are_counted() -> None:
    assert end_in(recorded("seeds_snapshots"), "countries").rows_affected == 3


def test_the_freshness_of_a_source_comes_with_its_end() -> None:
    """A stale source is an `error` without an error; a check that failed has one."""
    events = recorded("freshness")
    stale, missing = end_in(events, "stale"), end_in(events, "missing")

    assert stale.freshness is not None
    assert stale.freshness.age_s is not None
    assert stale.freshness.error_after_s is not None
    assert stale.freshness.age_s > stale.freshness.error_after_s
    assert stale.freshness.max_loaded_at is not None
    assert (stale.dbt_status, stale.error) == ("error", None)
    assert missing.dbt_status == "runtime error"
    assert missing.error is not None
    assert missing.freshness is None


def test_the_batches_of_a_microbatch_model_are_told_one_by_one() -> None:
    events = recorded("microbatch_partial")
    batches = [e for e in events if isinstance(e, NodeBatch)]
    end = end_in(events, "batched")

    assert [(b.index, b.total) for b in batches] == [(1, 3), (2, 3), (3, 3)]
    assert [b.status for b in batches] == ["success", "error", "success"]
    assert batches[1].event_time_start == datetime(2024, 1, 2, tzinfo=UTC)
    assert batches[1].event_time_end == datetime(2024, 1, 3, tzinfo=UTC)
    assert end.batch_results is not None
    assert len(end.batch_results.successful) == 2
    assert [start[:10] for start, _ in end.batch_results.failed] == ["2024-01-02"]
    assert sum(isinstance(e, NodeStarted) and e.node.name == "batched" for e in events) == 1
    (record,) = FRAMES.glob("1.11.*/microbatch_partial.jsonl")
    returned = [r for f in load(record) if isinstance(f, Results) for r in f.results]
    assert [end.batch_results] == [r.batch_results for r in returned if r.batch_results]


def test_versions_of_a_model_are_nodes_of_their_own() -> None:
    ends = [e.node for e in recorded("version_model") if isinstance(e, NodeFinished)]

    assert {(node.unique_id, node.version) for node in ends} == {
        ("model.shop.customers.v1", "1"),
        ("model.shop.customers.v2", "2"),
        ("model.shop.uses", None),
    }


def test_a_cancelled_run_names_the_query_that_was_cut_short() -> None:
    rungs = [e for e in recorded("cancelled") if isinstance(e, RunCancel)]

    assert [rung.step for rung in rungs] == ["interrupting", "interrupting"]
    assert rungs[0].by == "control"
    assert "model.shop.slow" in rungs[1].cancelled_queries
    assert "model.shop.before" not in rungs[1].cancelled_queries


def test_queries_and_log_lines_are_told_where_asked_for() -> None:
    events = recorded("success_info_queries")

    assert any(isinstance(e, QueryFinished) and e.unique_id and e.sql for e in events)
    assert any(isinstance(e, LogLine) and e.name == "StatsLine" for e in events)


def test_a_command_without_nodes_has_no_plan() -> None:
    for scenario in ("run_operation", "list", "no_nodes"):
        assert not [e for e in recorded(scenario) if isinstance(e, RunPlanned | NodeFinished)]


def test_artifacts_are_named_within_the_target_path() -> None:
    finished = recorded("success")[-1]
    assert isinstance(finished, RunFinished)

    assert {a.kind: a.path for a in finished.artifacts} == {
        "manifest": "manifest.json",
        "semantic_manifest": "semantic_manifest.json",
        "run_results": "run_results.json",
    }
    assert all(artifact.sha256 and artifact.size for artifact in finished.artifacts)


def test_what_dbt_used_is_in_the_closing_event() -> None:
    finished = recorded("success")[-1]
    assert isinstance(finished, RunFinished)

    assert finished.resource.max_rss is not None
    assert finished.resource.max_rss > 50_000_000
    assert finished.resource.cpu_s
    assert {slow.unique_id for slow in finished.slowest} == {
        "model.shop.daily",
        "model.shop.orders",
        "test.shop.not_null_orders_id.84ef11d8fe",
        "test.shop.unique_orders_id.1360ecc70e",
    }
    elapsed = [slow.elapsed_s for slow in finished.slowest]
    assert elapsed == sorted(elapsed, reverse=True)
