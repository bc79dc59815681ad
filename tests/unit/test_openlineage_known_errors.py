"""What OpenLineage's dbt integration gets wrong (1.54.0, seen in runs of it), and we must not.

Each test is one of its errors, told as a run of ours.
"""

import json
from typing import Any

from dbtstream.event_base import ErrorBlock
from dbtstream.events import BatchResults
from dbtstream.lineage_events import (
    Column,
    FieldLineage,
    LineageInput,
)
from dbtstream.openlineage import encode
from dbtstream.openlineage_mapping import RunMapping
from dbtstream.statuses import NodeStatus, Reason, RunStatus
from tests.openlineage_events import (
    NAMESPACE,
    Json,
    RunStory,
    column,
    dataset,
    edges,
    end_of,
    kinds,
    mapped,
)

SEED = "seed.shop.raw_orders"
HISTORY = "snapshot.shop.history"
STG = "model.shop.stg_orders"
ORDERS = "model.shop.orders"
DAILY = "model.shop.daily"
TEST = "test.shop.not_null_orders_id.c5b3f0a1d2"


def test_seeds_and_snapshots_are_inputs() -> None:
    """Its default mode drops both: staging models have no inputs at all there."""
    story = RunStory().begin().build(SEED).build(HISTORY, SEED).build(STG, SEED, HISTORY).end()
    assert edges(mapped(story.events)) == {
        (dataset(SEED), dataset(HISTORY)),
        (dataset(SEED), dataset(STG)),
        (dataset(HISTORY), dataset(STG)),
    }


def test_seeds_are_jobs_that_have_run() -> None:
    """Its default mode has no event of a seed."""
    assert f"COMPLETE {SEED}" in kinds(mapped(RunStory().begin().build(SEED).end().events))


def test_a_skipped_test_is_not_a_failed_one() -> None:
    """There: assertion success:false, and the job FAIL."""
    story = RunStory().begin()
    story.start(ORDERS)
    story.finish(ORDERS, NodeStatus.ERROR, message="no")
    story.failed(ORDERS, NodeStatus.ERROR)
    story.finish(TEST, NodeStatus.SKIPPED, root_causes=[ORDERS])
    story.checked(TEST, ORDERS, "skipped", assertion="not_null")
    message = end_of(mapped(story.end(RunStatus.FAILURE).events), TEST)
    assert message["eventType"] == "ABORT"
    assert '"success":false' not in json.dumps(message, separators=(",", ":"))


def test_a_skipped_model_is_told() -> None:
    """There it gives no event at all."""
    story = RunStory().begin()
    story.finish(DAILY, NodeStatus.SKIPPED, root_causes=[ORDERS])
    story.skipped(DAILY, ORDERS)
    assert f"ABORT {DAILY}" in kinds(mapped(story.end(RunStatus.FAILURE).events))


def test_tests_and_ephemeral_skipped_and_failed_models_make_no_dataset() -> None:
    """Its live mode invents a table for each."""
    story = RunStory().begin().test(TEST, ORDERS)
    story.finish("model.shop.base", node={"materialized": "ephemeral"})
    story.finish(ORDERS, NodeStatus.ERROR, message="no")
    story.failed(ORDERS, NodeStatus.ERROR)
    story.finish(DAILY, NodeStatus.SKIPPED, root_causes=[ORDERS])
    story.skipped(DAILY, ORDERS)
    messages = mapped(story.end(RunStatus.FAILURE).events)
    assert [m for m in messages if m.get("outputs")] == []


def test_one_partial_success_does_not_lose_the_run() -> None:
    """Its default mode raises on dbt's `partial success`, and sends nothing of the run."""
    story = RunStory().begin().build(STG)
    story.start(ORDERS)
    story.batch(ORDERS, 1, NodeStatus.SUCCESS)
    story.batch(ORDERS, 2, NodeStatus.ERROR)
    results = BatchResults(successful=[["a", "b"]], failed=[["b", "c"]])
    story.finish(ORDERS, NodeStatus.PARTIAL_SUCCESS, batch_results=results)
    story.failed(ORDERS, NodeStatus.PARTIAL_SUCCESS)
    told = kinds(mapped(story.build(DAILY, STG).end(RunStatus.FAILURE).events))
    assert {f"COMPLETE {STG}", f"FAIL {ORDERS}", f"COMPLETE {DAILY}"} <= set(told)


def test_a_run_id_never_starts_twice_and_always_ends() -> None:
    """Its live mode sends START five times and COMPLETE three under one id for a microbatch
    model, and ends with OTHER. `mapped` checks the states of every run id."""
    story = RunStory().begin()
    story.start(ORDERS)
    for index in (1, 2, 3):
        story.batch(ORDERS, index, NodeStatus.SUCCESS)
    story.finish(ORDERS)
    story.materialized(ORDERS)
    messages = mapped(story.end().events)
    assert len({m["run"]["runId"] for m in messages}) * 2 == len(messages)


def test_every_failure_says_why() -> None:
    """Its default mode has no message on any FAIL."""
    story = RunStory().begin()
    story.start(ORDERS)
    error = ErrorBlock(class_="CompilationError", message="no luck")
    story.finish(ORDERS, NodeStatus.ERROR, error=error)
    story.failed(ORDERS, NodeStatus.ERROR)
    story.test(TEST, STG, "fail", message="Got 1 result")
    failed = [m for m in mapped(story.end(RunStatus.FAILURE).events) if m["eventType"] == "FAIL"]
    assert len(failed) == 3
    assert all(m["run"]["facets"]["errorMessage"]["message"] for m in failed)


def test_column_lineage_comes_live_and_with_kinds_of_transformation() -> None:
    """Its live mode never has any; its default mode has none of `select *`, and no kinds."""
    fields = {"total": FieldLineage(inputs=[column(STG, "amount", "AGGREGATION")])}
    story = RunStory().begin().build(ORDERS, STG, lineage_hash=f"hash of {ORDERS}")
    story.observed(ORDERS, STG, fields=fields)
    (output,) = mapped(story.events)[-1]["outputs"]
    (traced,) = output["facets"]["columnLineage"]["fields"]["total"]["inputFields"]
    assert traced["transformations"] == [
        {"type": "DIRECT", "subtype": "AGGREGATION", "masking": False}
    ]


def test_columns_are_those_of_the_table_with_their_types() -> None:
    """There they are the documented ones, without types, of which some do not exist."""
    columns = [Column(name="customer_lifetime_value", type="DOUBLE")]
    story = RunStory().begin()
    story.declared(ORDERS, columns=[Column(name="total_order_amount")])
    story.build(ORDERS, columns=columns, documented_not_found=["total_order_amount"])
    outputs = [o for m in mapped(story.end().events) for o in m.get("outputs", [])]
    told = [o["facets"]["schema"]["fields"] for o in outputs if "schema" in o.get("facets", {})]
    assert told == [[{"name": "customer_lifetime_value", "type": "DOUBLE", "ordinal_position": 1}]]


def test_a_source_is_the_table_that_is_read() -> None:
    """There it has its logical name, so that the edge leads to a table that does not exist."""
    source = LineageInput(
        namespace=NAMESPACE,
        name="shop.raw.orders_v2",
        unique_id="source.shop.raw.logical_orders",
        resource_type="source",
    )
    story = RunStory().begin()
    story.declared(STG, inputs=[source])
    assert edges(mapped(story.events)) == {("shop.raw.orders_v2", dataset(STG))}


def test_ids_are_not_random() -> None:
    """There a message that is sent again cannot be matched with itself."""

    def ids() -> list[Any]:
        story = RunStory().begin().build(ORDERS, STG).test(TEST, ORDERS).end()
        return [m["run"]["runId"] for m in mapped(story.events)]

    assert ids() == ids()


def test_each_test_has_its_own_run_and_takes_the_time_that_it_took() -> None:
    """Its default mode has one job per model for all its tests, 20 us long, at parse time."""
    other = "test.shop.unique_orders_id.a1b2c3"
    messages = mapped(RunStory().begin().test(TEST, ORDERS).test(other, ORDERS).end().events)
    for name in (TEST, other):
        start, end = (m for m in messages if m["job"]["name"] == name)
        assert end["eventTime"] > start["eventTime"]


def test_unit_tests_and_hooks_and_freshness_are_told() -> None:
    """There: no unit test in one mode, a wrong facet in the other; hooks only as SQL without a
    parent; no freshness."""
    unit, hook, source = (
        "unit_test.shop.daily.keeps_amount",
        "operation.shop.on-run-end-0",
        "source.shop.raw.raw_orders",
    )
    story = RunStory().begin().test(unit, DAILY)
    story.start(hook)
    story.finish(hook)
    story.finish(source)
    story.source(source, "pass")
    told = kinds(mapped(story.end().events))
    assert {f"COMPLETE {unit}", f"COMPLETE {hook}", f"COMPLETE {source}.freshness"} <= set(told)


def test_commands_that_it_does_not_know_are_runs_like_others() -> None:
    """Its live mode does not even start dbt for them, and ends with exit code 0."""
    for words in (["compile"], ["docs", "generate"], ["source", "freshness"], ["clone"]):
        told = kinds(mapped(RunStory().begin(*words).end().events))
        assert told == [f"{kind} shop.prod.{'_'.join(words)}" for kind in ("START", "COMPLETE")]


def test_a_retried_run_is_one_run() -> None:
    """There a retry is another, random run; what was skipped stays unresolved."""
    story = RunStory().begin()
    story.finish(ORDERS, NodeStatus.LOST, reason=Reason.WORKER_LOST)
    story.attempt = 2
    story.begin("retry").build(ORDERS).end()
    runs = [m for m in mapped(story.events) if m["job"]["name"] == "shop.prod.build"]
    assert [m["eventType"] for m in runs] == ["START", "COMPLETE"]


def test_a_message_has_no_empty_facets_and_no_deprecated_ones() -> None:
    """Half of its bytes are empty values and repeated URLs."""
    story = RunStory().begin().build(ORDERS, STG).end()
    mapping = RunMapping("dbt", story.events[0])
    for event in story.events:
        for message in mapping.take(event):
            plain: Json = json.loads(encode(message))
            assert _empty(plain.get("run", {})) == []
            assert "dbt_version" not in plain.get("run", {}).get("facets", {})


def _empty(part: Any) -> list[str]:
    """Keys with nothing in them."""
    if not isinstance(part, dict):
        return []
    own = [k for k, v in part.items() if v in ({}, [], "", None) and k != "facets"]
    return own + [k for v in part.values() for k in _empty(v)]
