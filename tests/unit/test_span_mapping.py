"""What spans and log records say: attributes, names, times, texts."""

import itertools
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dbtstream.dbt_values import utc
from dbtstream.endings import Ended, Ending
from dbtstream.event_base import Relation
from dbtstream.events import NodeBlock, QueryFinished, TraceBlock
from dbtstream.frames import AnyFrame, decode_frame
from dbtstream.log_records import log_record_of
from dbtstream.normalizer import Normalizer
from dbtstream.span_attributes import OUTCOMES, RESULTS, query_operation
from dbtstream.span_texts import MAX_LIST, attributes, text, unix_ns
from dbtstream.spans import MAX_ATTRIBUTES, MAX_LINKS, MAX_STATUS_TEXT, MAX_TEXT, Span
from dbtstream.statuses import NodeStatus, RunStatus
from tests.span_trees import check_spans, spans_of, tree
from tests.stories import BEGIN, Story, context, node

ORDERS, TEST = "model.shop.orders", "test.shop.unique_orders.1a2b3c"
RECORDS = sorted((Path(__file__).parent / "frames").glob("*/*.jsonl"))


def named(spans: list[Span], name: str) -> Span:
    (span,) = [span for span in spans if span.name == name]
    return span


def run_of(spans: list[Span]) -> Span:
    (span,) = [span for span in spans if span.kind == "consumer"]
    return span


def story(**changes: Any) -> Story:
    told = Story(**changes)
    told.plan(
        node(ORDERS, tags=["nightly"], owners=["ada"], group="sales", path="models/orders.sql"),
        node(TEST, ORDERS),
    )
    told.run(
        ORDERS,
        adapter_response={"rows_affected": 12.0, "query_id": "01b2"},
        relation=Relation(relation_name='"db"."main"."orders"'),
    )
    told.run(TEST, "fail", message="Got 2 results, configured to fail if != 0", failures=2)
    told.result(1)
    told.now += timedelta(seconds=1)
    told.end(exit_code=1, pid=4711, exited_at=told.now)
    return told


def test_a_run_says_what_it_is_and_what_became_of_it() -> None:
    of_run = context(request_id="req-1", labels={"team": "data"})
    run = run_of(spans_of(story(request_id="req-1").events, of_run))

    assert run.name == "dbt build shop"
    assert run.error == "1 nodes did not pass"
    expected = {
        "dbt.project.name": "shop",
        "dbt.target.name": "prod",
        "dbt.command": "build",
        "dbt.version": "1.11.16",
        "dbt.adapter.type": "duckdb",
        "dbt.invocation_id": "8317a821-dee1-4702-a582-11bab356968d",
        "dbtstream.run.attempt": 1,
        "dbtstream.run.status": "failure",
        "dbtstream.label.team": "data",
        "cicd.pipeline.name": "shop",
        "cicd.pipeline.result": "failure",
        "messaging.system": "nats",
        "messaging.destination.name": "dbt.runs.shop.prod",
        "messaging.message.id": "req-1",
        "dbt.run.nodes.success": 1,
        "dbt.run.nodes.fail": 1,
        "error.type": "nodes_failed",
    }
    assert {key: run.attributes.get(key) for key in expected} == expected


def test_a_node_says_what_it_is_and_what_became_of_it() -> None:
    model = named(spans_of(story().events, context()), "model orders")

    expected = {
        "dbt.node.unique_id": ORDERS,
        "dbt.node.name": "orders",
        "dbt.node.type": "model",
        "dbt.node.materialization": "view",
        "dbt.node.status": "success",
        "dbt.node.outcome": "success",
        "dbt.node.relation": '"db"."main"."orders"',
        "dbt.node.path": "models/orders.sql",
        "dbt.node.group": "sales",
        "dbt.node.owner": ["ada"],
        "dbt.node.tags": ["nightly"],
        "dbt.node.rows_affected": 12,
        "dbt.node.thread": "Thread-1 (worker)",
        "dbt.query.id": "01b2",
        "cicd.pipeline.task.run.result": "success",
        "cicd.pipeline.task.type": "build",
    }
    assert {key: model.attributes.get(key) for key in expected} == expected
    assert model.error is None
    assert "error.type" not in model.attributes


def test_a_test_that_failed_did_its_work() -> None:
    test = named(spans_of(story().events, context()), "test unique_orders")

    expected = {
        "dbt.node.status": "fail",
        "dbt.node.outcome": "success",
        "dbt.test.outcome": "failed",
        "dbt.test.failures": 2,
        "dbt.test.attached_node": ORDERS,
        "cicd.pipeline.task.run.result": "failure",
        "cicd.pipeline.task.type": "test",
        "error.type": "test_failed",
    }
    assert {key: test.attributes.get(key) for key in expected} == expected
    assert test.error == "Got 2 results, configured to fail if != 0"


def test_a_skipped_node_names_its_causes() -> None:
    told = Story()
    told.plan(node(ORDERS), node("model.shop.daily", ORDERS))
    told.fail(ORDERS)
    told.skip("model.shop.daily")
    told.result(1)
    told.end()
    daily = named(spans_of(told.events, context()), "model daily")

    assert daily.attributes["dbt.node.outcome"] == "skipped"
    assert daily.attributes["dbt.node.skip_reason"] == "upstream"
    assert daily.attributes["dbt.node.skip_upstream"] == [ORDERS]
    assert daily.error is None


def test_every_status_has_words_of_others() -> None:
    assert set(OUTCOMES) == set(NodeStatus)
    assert set(RESULTS) == {status for status in RunStatus if status.is_terminal}


def test_the_process_is_in_its_span() -> None:
    told = Story()
    told.plan(node(ORDERS))
    told.start(ORDERS)
    told.now += timedelta(seconds=1)
    told.end(Ended.CRASHED, exit_code=-11, pid=4711, exited_at=told.now)
    child = named(spans_of(told.events, context()), "dbt")

    assert (child.kind, child.attributes["process.pid"]) == ("client", 4711)
    assert child.attributes["dbtstream.process.signal"] == "SIGSEGV"
    assert "process.exit.code" not in child.attributes
    assert told.finished.process is not None
    assert child.end_ns == unix_ns(told.finished.process.finished_at)


def test_phases_follow_each_other_without_a_hole() -> None:
    told = story()
    spans = spans_of(told.events, context())
    phases = [named(spans, name) for name in ("queue", "startup", "parse", "execute", "finalize")]

    assert [span.attributes["dbt.phase"] for span in phases] == [span.name for span in phases]
    assert all(a.end_ns == b.start_ns for a, b in itertools.pairwise(phases))
    assert phases[0].start_ns == run_of(spans).start_ns == unix_ns(BEGIN)
    assert phases[-1].end_ns == named(spans, "dbt").end_ns


def test_the_times_of_a_node_are_dbts() -> None:
    told = Story()
    told.plan(node(ORDERS))
    told.start(ORDERS)
    told.finish(
        ORDERS, started_at="2026-03-01T12:00:02.5", finished_at="2026-03-01T12:00:04.123456"
    )
    told.result(0)
    told.end()
    model = named(spans_of(told.events, context()), "model orders")

    assert model.start_ns == 1772366402500000000
    assert model.end_ns == 1772366404123456000


def test_a_clock_that_is_set_back_makes_no_span_that_ends_before_it_begins() -> None:
    told = Story()
    told.plan(node(ORDERS))
    told.start(ORDERS)
    told.finish(ORDERS, started_at="2026-03-01T12:00:09", finished_at="2026-03-01T12:00:04")
    told.now -= timedelta(seconds=30)
    told.result(0)
    told.end()
    spans = spans_of(told.events, context())

    check_spans(told.events, spans)
    model = named(spans, "model orders")
    assert model.start_ns == model.end_ns


def test_spans_may_be_named_by_type_only() -> None:
    spans = spans_of(story().events, context(), span_names="type")

    assert {"model", "test"} <= {span.name for span in spans}


def test_baggage_is_on_the_run_and_does_not_pass_for_something_else() -> None:
    block = TraceBlock(baggage={"tenant": "acme", "dbt.project.name": "other"})
    spans = spans_of(story().events, context(trace=block))

    assert run_of(spans).attributes["tenant"] == "acme"
    assert run_of(spans).attributes["dbt.project.name"] == "shop"
    assert "tenant" not in named(spans, "model orders").attributes


def test_datadog_may_have_names_of_its_own() -> None:
    spans = spans_of(story().events, context(), datadog=True)

    keys = ("operation.name", "resource.name", "span.type")
    told = {span.name: tuple(span.attributes[key] for key in keys) for span in spans}
    assert told["dbt build shop"] == ("dbt.run", "dbt build shop", "queue")
    assert told["model orders"] == ("dbt.node", "model orders", "custom")
    assert told["parse"] == ("dbt.phase", "parse", "custom")
    plain = spans_of(story().events, context())
    assert not any(key in span.attributes for span in plain for key in keys)


# Queries, batches, hooks.


def test_queries_are_spans_below_their_node_where_they_are_asked_for() -> None:
    spans = {}
    for wanted in (True, False):
        events, of_run = recorded("success_info_queries")
        spans[wanted] = spans_of(events, of_run, query_spans=wanted)
        check_spans(events, spans[wanted])

    queries = [s for s in spans[True] if "db.system.name" in s.attributes]
    assert len(spans[True]) - len(spans[False]) == len(queries) > 5
    assert {q.attributes["db.system.name"] for q in queries} == {"duckdb"}
    assert all(q.kind == "client" for q in queries)
    model = named(spans[True], "model orders")
    assert any(q.parent_span_id == model.span_id for q in queries)


def test_a_query_has_its_id_in_the_warehouse_and_never_its_text() -> None:
    told = Story()
    told.plan(node(ORDERS))
    told.start(ORDERS)
    events = told.normalizer.frame(
        decode_frame(
            b'{"t":"query","n":99,"at":1772366403,"unique_id":"model.shop.orders","status":"OK",'
            b'"elapsed_s":0.25,"query_id":"01b2","sql":"/* x */ create table secret_thing"}'
        )
    )
    (event,) = [e for e in events if isinstance(e, QueryFinished)]
    told.events += events
    (query,) = spans_of(told.events, context(), query_spans=True)

    assert query.name == "CREATE"
    assert query.parent_span_id == event.span_id
    assert query.attributes["dbt.query.id"] == "01b2"
    assert query.end_ns - query.start_ns == 250_000_000
    assert "secret" not in str(query)


@pytest.mark.parametrize(
    ("sql", "operation"),
    [
        (None, None),
        ("select 1", "SELECT"),
        ('/* {"app": "dbt"} */\n\n  create or replace table x', "CREATE"),
        ("-- a line\n/* b */ -- c\nMERGE into x", "MERGE"),
        ("(select 1)", None),
        ("/**/" * 5000 + "(", None),
        (" " * 8000 + "(", None),
    ],
)
def test_the_operation_of_a_query(sql: str | None, operation: str | None) -> None:
    """The last two would take for ever by trying again."""
    event: Any = msgspec.json.decode(msgspec.json.encode({"sql": sql}), type=_Sql)

    assert query_operation(event) == operation


class _Sql(msgspec.Struct):
    sql: str | None


def test_batches_are_below_their_model() -> None:
    events, of_run = recorded("microbatch_partial")
    lines = tree(spans_of(events, of_run))

    at = next(i for i, line in enumerate(lines) if "model batched" in line)
    assert lines[at].strip() == "model batched [partial_success] ERROR partial_success"
    below = [line.strip() for line in lines[at + 1 :] if line.startswith(" " * 8)]
    assert "batch batched [success]" in below
    assert "batch batched [error] ERROR _OTHER" in below


def test_a_stale_source_was_checked() -> None:
    events, of_run = recorded("freshness")
    spans = spans_of(events, of_run)

    told = {
        name: (
            span.attributes.get("dbt.freshness.outcome"),
            span.attributes.get("error.type"),
            span.attributes["dbt.node.outcome"],
        )
        for name in ("fresh", "late", "stale", "missing")
        for span in [named(spans, f"source {name}")]
    }
    assert told["fresh"] == ("passed", None, "success")
    assert told["late"] == ("warned", None, "success")
    assert told["stale"] == ("failed", "source_stale", "success")
    assert told["missing"][2] == "error"


# Whatever real dbt has said.


def recorded(scenario: str, version: str = "1.11.16") -> tuple[list[Any], Any]:
    return told(load(Path(__file__).parent / "frames" / version / f"{scenario}.jsonl"))


def load(record: Path) -> list[AnyFrame]:
    return [decode_frame(line) for line in record.read_bytes().splitlines()]


def told(frames: list[AnyFrame], *, crashed: bool = False) -> tuple[list[Any], Any]:
    of_run = context(queued_at=utc(frames[0].at - 2) if frames else datetime.now(UTC))
    normalizer = Normalizer(of_run)
    events = normalizer.queued(of_run.queued_at)
    normalizer.spawned(of_run.queued_at + timedelta(seconds=1))
    for frame in frames:
        events += normalizer.frame(frame)
    at = utc(frames[-1].at if frames else 0.0)
    how = Ended.CRASHED if crashed else Ended.RESULT
    return events + normalizer.end(Ending(how=how, pid=1, exited_at=at), at=at), of_run


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recorded_run_is_one_tree(record: Path) -> None:
    events, of_run = told(load(record))

    check_spans(events, spans_of(events, of_run, query_spans=True))


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recorded_run_that_is_cut_off_is_one_tree(record: Path) -> None:
    frames = load(record)
    for end in range(1, len(frames), max(1, len(frames) // 12)):
        events, of_run = told(frames[:end], crashed=True)
        check_spans(events, spans_of(events, of_run))


# Texts and limits.


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("orders", "orders"),
        ("größe ✓", "größe ✓"),
        ("a\nb\tc", "a\nb\tc"),
        ("a\x00b\x1b[31m\x85", "a\ufffdb\ufffd[31m\ufffd"),
        ("\ud800", "?"),
        ("x" * (MAX_TEXT + 1), "x" * (MAX_TEXT - 1) + "…"),
    ],
)
def test_a_text_is_one_that_an_encoder_takes(given: str, made: str) -> None:
    assert text(given) == made
    made.encode()


def test_attributes_are_bounded_and_never_empty() -> None:
    made = attributes({"a": None, "b": "", "c": [], "d": 0, "e": False, "f": ["x\x00"] * 1000})

    assert made == {"d": 0, "e": False, "f": ["x\ufffd"] * MAX_LIST}
    assert len(attributes({str(n): n for n in range(1000)})) == MAX_ATTRIBUTES


def test_links_and_status_texts_are_bounded() -> None:
    upstream = [f"model.shop.up{n}" for n in range(MAX_LINKS + 8)]
    told = Story()
    told.plan(*(node(name) for name in upstream), node(ORDERS, *upstream))
    for name in upstream:
        told.run(name)
    told.fail(ORDERS, "Database Error in model orders\n" + "x" * 10_000)
    told.result(1)
    told.end()
    orders = named(spans_of(told.events, context()), "model orders")

    assert len(orders.links) == MAX_LINKS
    assert orders.error is not None
    assert len(orders.error) == MAX_STATUS_TEXT


def test_times_are_exact() -> None:
    assert unix_ns(datetime(2026, 3, 1, 12, 0, 0, 1, tzinfo=UTC)) == 1772366400000001000
    assert unix_ns(datetime(1960, 1, 1, tzinfo=UTC)) == 0, "protobuf has no time before 1970"


# Log records.


def test_what_dbt_warns_of_is_a_record_in_the_span_that_it_is_about() -> None:
    told = Story()
    told.plan(node(ORDERS))
    told.normalizer.frame(
        decode_frame(
            b'{"t":"log","n":99,"at":1772366403,"unique_id":"model.shop.orders","level":"warn",'
            b'"code":"D012","name":"Deprecation","message":"use \\u001b[33mthat"}'
        )
    )
    (line,) = told.normalizer.warn("Noted", "hm", told.now)
    told.run(ORDERS, "warn", message="careful")
    record, end = log_record_of(line), log_record_of(told.end_of(ORDERS))

    assert record is not None
    assert end is not None
    assert (record.severity, record.event_name, record.body) == ("warn", "dbt.Noted", "hm")
    assert record.attributes["dbt.event.code"] == "dbtstream"
    assert (record.trace_id, record.span_id) == (line.trace_id, line.span_id)
    assert (end.severity, end.event_name, end.body) == ("warn", "dbt.NodeFinished", "careful")
    assert end.span_id == told.end_of(ORDERS).span_id


def test_what_went_well_is_no_record() -> None:
    told = Story()
    told.plan(node(ORDERS))
    told.run(ORDERS)
    told.result(0)
    told.end()

    assert [event for event in told.events if log_record_of(event) is not None] == []


def test_a_name_that_no_encoder_takes_is_mended_everywhere() -> None:
    told = Story()
    told.plan(node(ORDERS))
    told.fail(ORDERS)
    bad = NodeBlock(unique_id=ORDERS, resource_type="model", name="\udc80", tags=["\ud800"])
    event = msgspec.structs.replace(told.end_of(ORDERS), node=bad, message="\udfff")
    (span,) = spans_of([event], context())

    for value in (span.name, span.error, *map(str, span.attributes.values())):
        assert value is not None
        value.encode()
