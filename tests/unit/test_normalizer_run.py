"""The run's own events: envelope, plan, progress, log lines, gaps, and misuse."""

from datetime import timedelta
from itertools import pairwise

import pytest

from dbtstream import frames
from dbtstream.endings import Ended, Ending
from dbtstream.events import (
    MAX_PLAN_BYTES,
    AnyEvent,
    ArtifactWritten,
    Gap,
    LogLine,
    QueryFinished,
    RunPlanned,
    RunPlanPart,
    RunProgress,
    RunQueued,
    RunRejected,
    RunStarted,
    decode_event,
    encode_event,
    event_type,
)
from dbtstream.normalizer import Normalizer
from dbtstream.statuses import RunStatus
from dbtstream.trace import span_id_of, trace_id_of
from tests.stories import BEGIN, RUN_ID, Story, context, node

RAW, ORDERS = "model.shop.raw", "model.shop.orders"


def whole_run(**changes: object) -> Story:
    story = Story(**changes)
    story.plan(node(RAW))
    story.run(RAW)
    story.result(0)
    story.end()
    return story


def test_every_event_has_its_place_and_its_address() -> None:
    story = whole_run(labels={"team": "core"}, first_seq=5, attempt=2)

    assert [e.seq for e in story.events] == list(range(5, 5 + len(story.events)))
    for event in story.events:
        assert event.event_id == f"{RUN_ID}.2.{event.seq}"
        assert (event.project, event.target, event.worker) == ("shop", "prod", "w1")
        assert (event.attempt, event.fence, event.labels) == (2, 7, {"team": "core"})
        assert event.trace_id == trace_id_of(RUN_ID)
    assert story.normalizer.last_seq == story.events[-1].seq


def test_a_requesters_trace_is_kept() -> None:
    story = whole_run(trace_id="4bf92f3577b34da6a3ce929d0e0e4736")

    assert {e.trace_id for e in story.events} == {"4bf92f3577b34da6a3ce929d0e0e4736"}


def test_events_of_a_node_are_in_its_span_and_others_in_the_runs() -> None:
    story = Story()
    story.plan(node(RAW))
    for unique_id in (RAW, None, "model.shop.not_selected"):
        story.tell(
            frames.Log, level="warn", code="Z1", name="Noted", message="hm", unique_id=unique_id
        )
    story.run(RAW)
    story.result(0)
    story.end()

    run, raw = span_id_of(RUN_ID, 1, "run"), span_id_of(RUN_ID, 1, "node", RAW)
    # What is not selected has no span of its own.
    assert [e.span_id for e in story.all(LogLine)] == [raw, run, run]
    assert {e.span_id for e in story.events if event_type(e).startswith("node.")} == {raw}
    assert {e.span_id for e in story.events if event_type(e).startswith("run.")} == {run}
    assert len(story.ends()) == 1, "a line about a node does not select it"


def test_engine_and_invocation_are_null_until_they_are_known() -> None:
    story = Story()
    story.events += story.normalizer.queued(BEGIN)
    assert (story.events[-1].engine, story.events[-1].invocation_id) == (None, None)
    story.plan(node(RAW))
    story.run(RAW)
    story.result(0)
    story.end()

    _, started, planned, *_ = story.events
    assert (started.engine, started.invocation_id) == ("dbt-core 1.11.16", None)
    assert planned.invocation_id == "8317a821-dee1-4702-a582-11bab356968d"
    assert story.normalizer.engine == "dbt-core 1.11.16"
    assert story.normalizer.invocation_id == planned.invocation_id


def test_every_event_survives_the_wire() -> None:
    story = whole_run()

    for event in story.events:
        assert decode_event(encode_event(event)) == event
        assert event.time.tzinfo is not None


def test_a_queued_run_says_who_wants_what() -> None:
    normalizer = Normalizer(
        context(request_id="r-1", requested_by="ann", reason="why not", position=3)
    )
    (event,) = normalizer.queued(BEGIN)

    assert isinstance(event, RunQueued)
    assert (event.args, event.request_id, event.position) == (["build"], "r-1", 3)
    assert (event.requested_by, event.reason, event.time) == ("ann", "why not", BEGIN)


def test_a_rejected_run_has_no_other_event() -> None:
    normalizer = Normalizer(context(request_id="r-1"))
    (event,) = normalizer.rejected("usage_error", "no such option", "args", at=BEGIN)

    assert isinstance(event, RunRejected)
    assert (event.code, event.field, event.request_id) == ("usage_error", "args", "r-1")
    with pytest.raises(RuntimeError, match="nothing can come after it"):
        normalizer.queued(BEGIN)


def test_the_status_follows_the_child() -> None:
    normalizer = Normalizer(context())
    seen = [normalizer.status]
    normalizer.spawned(BEGIN)
    seen.append(normalizer.status)
    story = Story()
    story.hello()
    seen.append(story.normalizer.status)
    story.end(Ended.CRASHED)
    seen.append(story.normalizer.status)

    assert seen == [RunStatus.QUEUED, RunStatus.STARTING, RunStatus.RUNNING, RunStatus.ERROR]


def test_what_a_worker_may_look_at_is_as_of_now() -> None:
    story = Story()
    story.plan(node(RAW), node(ORDERS))
    story.run(RAW)
    story.start(ORDERS)

    assert story.normalizer.in_flight == [ORDERS]
    assert story.normalizer.counts == {"model": {"success": 1}}


def test_waits_and_starts_are_measured() -> None:
    story = Story()  # spawned two seconds after it was queued
    story.hello()
    story.end(Ended.CRASHED)

    (started,) = story.all(RunStarted)
    assert started.queue_wait_s == 2.0
    assert started.start_s == pytest.approx(0.1)
    assert (started.host, started.pid, started.start) == ("host-1", 4711, "cold")
    assert story.finished.elapsed_s == pytest.approx(0.3)


def test_the_plan_names_every_selected_node() -> None:
    hook = "operation.shop.shop-on-run-end-0"
    story = Story(expected_s=30.0)
    story.plan(node(RAW), node(ORDERS, RAW), node("test.shop.t.1", RAW), others=(node(hook),))
    story.end(Ended.CRASHED)

    (plan,) = story.all(RunPlanned)
    assert plan.nodes is not None
    assert [(n.unique_id, n.depends_on) for n in plan.nodes] == [
        (RAW, []),
        (ORDERS, [RAW]),
        ("test.shop.t.1", [RAW]),
    ]
    assert (plan.node_count, plan.nodes_status, plan.expected_s) == (3, "complete", 30.0)


def test_a_plan_too_large_for_an_event_comes_in_parts() -> None:
    many = [node(f"model.shop.{'long_' * 30}{i}") for i in range(2500)]
    story = Story()
    story.plan(*many)
    story.end(Ended.CRASHED)

    (plan,) = story.all(RunPlanned)
    assert (plan.nodes, plan.nodes_status, plan.node_count) == (None, "in_parts", 2500)
    parts = story.all(RunPlanPart)
    assert plan.parts == len(parts) > 1
    assert all(len(encode_event(part)) < MAX_PLAN_BYTES * 1.1 for part in parts)
    assert len({entry.unique_id for part in parts for entry in part.nodes}) == 2500
    assert len(encode_event(plan)) < 2000
    assert len(story.ends()) == 2500


def test_a_plan_that_is_not_to_be_had_says_why() -> None:
    story = Story()
    story.hello()
    story.tell(frames.Plan, node_count=17, status="unavailable: no frame found")
    story.end(Ended.CRASHED)

    (plan,) = story.all(RunPlanned)
    assert (plan.nodes, plan.node_count) == (None, 17)
    assert plan.nodes_status == "unavailable: no frame found"


def test_progress_comes_at_most_once_a_second_and_only_when_something_ended() -> None:
    names = [f"model.shop.m{i}" for i in range(12)]
    story = Story()
    story.plan(*[node(name) for name in names])
    for name in names[:-1]:
        story.run(name)  # three frames, 0.3 s
    story.start(names[-1])
    for _ in range(30):
        story.tell(frames.Log, level="info", code="Z1", name="Noted", message="still at it")
    story.finish(names[-1])
    story.result(0)
    story.end()

    told = story.all(RunProgress)
    gaps = [b.time - a.time for a, b in pairwise(told)]
    assert len(told) >= 3
    assert all(gap >= timedelta(seconds=1) for gap in gaps)
    dones = [p.counts.done for p in told]
    assert dones == sorted(set(dones)), "each tells something new"
    first = told[0]
    assert first.counts.total == 12
    assert first.counts.by_status == {"success": first.counts.done}
    assert first.eta_s is not None
    planned_at = story.all(RunPlanned)[0].time
    per_node_s = (first.time - planned_at).total_seconds() / first.counts.done
    assert first.eta_s == pytest.approx(per_node_s * (12 - first.counts.done))


def test_progress_counts_what_is_running_and_no_hooks() -> None:
    hook = "operation.shop.shop-on-run-start-0"
    story = Story()
    story.plan(*[node(f"model.shop.m{i}") for i in range(4)], others=(node(hook),))
    story.hook(hook)
    story.start("model.shop.m0")
    story.start("model.shop.m1")
    story.finish("model.shop.m0")
    for _ in range(10):
        story.tell(frames.Log, level="info", code="Z1", name="Noted", message="still at it")
    story.end(Ended.CRASHED)

    (progress,) = story.all(RunProgress)
    assert (progress.counts.done, progress.counts.running) == (1, 1)


def test_log_lines_and_queries_go_through() -> None:
    story = Story()
    story.hello()
    story.tell(
        frames.Log, level="warn", code="D012", name="XDeprecation", message="\x1b[33mold\x1b[0m"
    )
    story.tell(
        frames.Query, unique_id=RAW, status="SELECT 1", elapsed_s=0.5, query_id="q", sql="select 1"
    )
    story.end(Ended.CRASHED)

    (line,) = story.all(LogLine)
    (query,) = story.all(QueryFinished)
    assert (line.level, line.code, line.name, line.message) == (
        "warn",
        "D012",
        "XDeprecation",
        "old",
    )
    assert (query.unique_id, query.elapsed_s, query.query_id) == (RAW, 0.5, "q")


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("/p/target/run_results.json", "run_results.json"),
        ("/p/target/compiled/x.json", "compiled/x.json"),
        ("/elsewhere/sources.json", "/elsewhere/sources.json"),
        ("target/manifest.json", "target/manifest.json"),
    ],
)
def test_an_artifact_is_named_relative_to_the_target_path_it_lies_in(
    written: str, told: str
) -> None:
    story = Story(target_path="/p/target")
    story.hello()
    story.tell(frames.Artifact, kind="manifest", path=written, sha256="ab", size=3)
    story.end(Ended.CRASHED)

    (event,) = story.all(ArtifactWritten)
    assert (event.path, event.kind, event.sha256, event.size) == (told, "manifest", "ab", 3)
    assert [a.path for a in story.finished.artifacts] == [told]


def test_what_was_dropped_is_told() -> None:
    """By the child without numbers; by the outbox with the numbers that are missing now."""
    story = Story()
    story.hello()
    story.tell(frames.Dropped, family="query", count=12)
    story.tell(frames.Log, level="info", code="Z1", name="Noted", message="not kept")
    lost = story.events.pop()
    story.events += story.normalizer.gap(
        "log", 1, "no room on disk", at=story.now, from_seq=lost.seq, to_seq=lost.seq
    )
    story.end(Ended.CRASHED)

    child, outbox = story.all(Gap)
    assert (child.dropped_family, child.count, child.from_seq) == ("query", 12, None)
    assert (outbox.dropped_family, outbox.from_seq, outbox.to_seq) == ("log", lost.seq, lost.seq)


def test_frames_that_are_missing_are_told_once_and_leave_the_run_unverified() -> None:
    story = Story()
    story.plan(node(RAW))
    story.run(RAW)
    story._n += 3
    story.tell(frames.Log, level="info", code="Z1", name="Noted", message="here")
    story._n += 1
    story.result(0)
    story.end()

    (line,) = [e for e in story.all(LogLine) if e.code == "dbtstream"]
    assert (line.level, line.name) == ("error", "FramesMissing")
    assert story.finished.verified_status == "frames_missing"


def test_events_that_dbts_process_could_not_read_are_told() -> None:
    story = Story()
    story.plan(node(RAW))
    story.run(RAW)
    story.result(0, stats=frames.ChildStats(callback_errors=2, callback_error="KeyError: 'x'"))
    story.end()

    (line,) = story.all(LogLine)
    assert (line.level, line.name) == ("warn", "CallbackErrors")
    assert "KeyError" in line.message


def test_the_failed_are_listed_up_to_fifty_and_counted_beyond() -> None:
    names = [f"model.shop.m{i:02}" for i in range(60)]
    story = Story()
    story.plan(*[node(name) for name in names])
    for name in names:
        story.fail(name)
    story.result(1)
    story.end()

    assert [f.unique_id for f in story.finished.failed] == names[:50]
    assert story.finished.failed_count == 60


def test_a_run_without_nodes_is_verified_by_its_empty_results() -> None:
    story = Story()
    story.hello()
    story.result(0)
    story.end()

    assert story.finished.status is RunStatus.SUCCESS
    assert story.finished.verified


def test_clone_may_begin_a_node_before_its_upstream_has_ended() -> None:
    """It works through the selection in no order; an open upstream is no sign of anything."""
    story = Story(command="clone", args=["clone"])
    story.plan(node(RAW), node(ORDERS, RAW))
    story.start(RAW)
    story.error(RAW, "no")
    story.run(ORDERS)
    story.finish(RAW, "error", message="told by its own finish")
    story.result(1)
    story.end()

    assert story.statuses() == {"orders": "success", "raw": "error"}
    assert story.end_of(RAW).message == "told by its own finish"


@pytest.mark.parametrize("call", ["frame", "end", "queued", "spawned", "cancel_step", "gap"])
def test_nothing_can_come_after_the_end(call: str) -> None:
    normalizer = Normalizer(context())
    normalizer.end(Ending(how=Ended.NOT_STARTED), at=BEGIN)

    def again() -> list[AnyEvent] | None:
        match call:
            case "frame":
                return normalizer.frame(frames.Cancelling(n=1, at=0.0, by="control"))
            case "end":
                return normalizer.end(Ending(how=Ended.RESULT), at=BEGIN)
            case "queued":
                return normalizer.queued(BEGIN)
            case "cancel_step":
                return normalizer.cancel_step("requested", at=BEGIN)
            case "gap":
                return normalizer.gap("log", 1, "full", at=BEGIN)
            case _:
                normalizer.spawned(BEGIN)
                return None

    with pytest.raises(RuntimeError, match="nothing can come after it"):
        again()
