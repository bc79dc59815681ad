"""What our events are in OpenLineage: each message is valid, and says what happened.

`mapped` validates every message against the specification, where that lies beside the clone.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dbtstream.event_base import ErrorBlock, FreshnessBlock
from dbtstream.events import BatchResults, FailedNode
from dbtstream.lineage_events import Column, InputVersion, OtherDataset
from dbtstream.openlineage import encode, message_id
from dbtstream.openlineage_mapping import RunMapping
from dbtstream.statuses import ColumnLineageStatus, NodeStatus, Reason, RunStatus
from tests.openlineage_events import (
    BEGIN,
    NAMESPACE,
    NEEDS_SPEC,
    RUN_ID,
    SPEC,
    Json,
    RunStory,
    dataset,
    edges,
    end_of,
    kinds,
    mapped,
)

ORDERS = "model.shop.orders"
STG = "model.shop.stg_orders"
DAILY = "model.shop.daily"
RAW = "source.shop.raw.raw_orders"
NOT_NULL = "test.shop.not_null_orders_id.c5b3f0a1d2"
PARENT_ID = "0195512b-0000-7000-8000-00000000000a"
ROOT_ID = "0195512b-0000-7000-8000-00000000000b"

PARENT_LABELS = {
    "openlineage.parent.run_id": PARENT_ID,
    "openlineage.parent.job_namespace": "airflow",
    "openlineage.parent.job_name": "daily.dbt",
}
ROOT_LABELS = {
    "openlineage.root.run_id": ROOT_ID,
    "openlineage.root.job_namespace": "airflow",
    "openlineage.root.job_name": "daily",
}
COLUMNS = [
    Column(name="id", type="INTEGER", description="The key", tags=["pii"]),
    Column(name="amount", type="DOUBLE"),
]


@NEEDS_SPEC
def test_the_schemas_are_there_to_check_against() -> None:
    """Without them the other tests check what is written here, and no more."""
    assert (SPEC / "OpenLineage.json").is_file()


class TestARun:
    def test_has_one_start_and_one_end_and_its_nodes_between(self) -> None:
        story = RunStory().begin().build(STG, RAW).build(ORDERS, STG).end()
        messages = mapped(story.events)
        assert kinds(messages) == [
            "START shop.prod.build",
            f"START {STG}",
            f"COMPLETE {STG}",
            f"START {ORDERS}",
            f"COMPLETE {ORDERS}",
            "COMPLETE shop.prod.build",
        ]
        assert {m["job"]["namespace"] for m in messages} == {"dbt"}
        assert messages[0]["run"]["runId"] == RUN_ID
        assert messages[0]["job"]["facets"]["jobType"] | {"_producer": "", "_schemaURL": ""} == {
            "_producer": "",
            "_schemaURL": "",
            "processingType": "BATCH",
            "integration": "DBT",
            "jobType": "JOB",
        }

    def test_of_two_attempts_is_one_run_with_other_runs_of_its_nodes(self) -> None:
        story = RunStory().begin("build", "--select", "orders")
        story.start(ORDERS)
        story.finish(ORDERS, NodeStatus.LOST, reason=Reason.WORKER_LOST)
        story.attempt = 2
        story.begin("retry").build(ORDERS, STG).end()
        messages = mapped(story.events)
        assert kinds(messages) == [
            "START shop.prod.build",
            f"START {ORDERS}",
            f"FAIL {ORDERS}",
            f"START {ORDERS}",
            f"COMPLETE {ORDERS}",
            "COMPLETE shop.prod.build",
        ]
        assert messages[1]["run"]["runId"] == messages[2]["run"]["runId"]
        assert messages[3]["run"]["runId"] == messages[4]["run"]["runId"]
        assert messages[1]["run"]["runId"] != messages[3]["run"]["runId"]

    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (RunStatus.SUCCESS, "COMPLETE"),
            (RunStatus.FAILURE, "FAIL"),
            (RunStatus.ERROR, "FAIL"),
            (RunStatus.LOST, "FAIL"),
            (RunStatus.TIMED_OUT, "FAIL"),
            (RunStatus.CANCELLED, "ABORT"),
        ],
    )
    def test_ends_as_it_ended(self, status: RunStatus, kind: str) -> None:
        assert kinds(mapped(RunStory().begin().end(status).events))[-1] == f"{kind} shop.prod.build"

    def test_that_failed_says_which_nodes_did_not_pass(self) -> None:
        failed = [FailedNode(unique_id=ORDERS, status=NodeStatus.ERROR, message="no table")]
        story = RunStory().begin().end(RunStatus.FAILURE, failed=failed, failed_count=3)
        error = mapped(story.events)[-1]["run"]["facets"]["errorMessage"]
        assert error["message"] == f"did not pass: {ORDERS} (error), and 2 more"

    def test_that_crashed_says_how_and_shows_the_end_of_stderr(self) -> None:
        block = ErrorBlock(class_="ChildCrashed", message="dbt's process ended (signal 9)")
        story = RunStory().begin().end(RunStatus.ERROR, error=block, stderr_tail="Killed")
        error = mapped(story.events)[-1]["run"]["facets"]["errorMessage"]
        assert (error["message"], error["stackTrace"]) == (block.message, "Killed")

    def test_that_was_cancelled_in_the_queue_has_both_ends(self) -> None:
        story = RunStory()
        story.begin()
        del story.events[1]  # dbt was never started
        story.end(RunStatus.CANCELLED)
        messages = mapped(story.events)
        assert kinds(messages) == ["START shop.prod.build", "ABORT shop.prod.build"]
        assert messages[0]["eventTime"] < messages[1]["eventTime"]

    def test_of_two_words_is_called_by_both(self) -> None:
        story = RunStory().begin("source", "freshness", "--select", "x").end()
        assert kinds(mapped(story.events))[0] == "START shop.prod.source_freshness"

    def test_names_the_engine_and_the_labels(self) -> None:
        start = mapped(RunStory(labels={"team": "ops"}).begin().end().events)[0]
        engine, tags = (start["run"]["facets"][name] for name in ("processing_engine", "tags"))
        assert (engine["name"], engine["version"]) == ("dbt", "1.11.16")
        assert tags["tags"] == [{"key": "team", "value": "ops", "source": "DBTSTREAM"}]

    def test_jobs_are_in_the_configured_namespace(self) -> None:
        messages = mapped(RunStory().begin().build(ORDERS).end().events, namespace="warehouse")
        assert {m["job"]["namespace"] for m in messages} == {"warehouse"}


class TestParents:
    @staticmethod
    def parents(labels: dict[str, str]) -> tuple[Any, Any]:
        """The `parent` facets of a run and of a node in it."""
        messages = mapped(RunStory(labels=labels).begin().build(ORDERS).end().events)
        run, node = messages[0], messages[1]
        return run["run"]["facets"].get("parent"), node["run"]["facets"]["parent"]

    def test_without_labels_the_run_is_the_root_of_its_nodes(self) -> None:
        run, node = self.parents({})
        assert run is None
        assert node["run"]["runId"] == node["root"]["run"]["runId"] == RUN_ID
        assert node["job"] == node["root"]["job"] == {"namespace": "dbt", "name": "shop.prod.build"}

    def test_a_parent_and_root_from_the_request_are_those_of_the_run(self) -> None:
        run, node = self.parents(PARENT_LABELS | ROOT_LABELS)
        assert (run["run"]["runId"], run["root"]["run"]["runId"]) == (PARENT_ID, ROOT_ID)
        assert (node["run"]["runId"], node["root"]["run"]["runId"]) == (RUN_ID, ROOT_ID)

    def test_a_parent_alone_is_the_root_too(self) -> None:
        run, node = self.parents(PARENT_LABELS)
        assert run["root"]["run"]["runId"] == node["root"]["run"]["runId"] == PARENT_ID

    def test_these_labels_are_no_tags(self) -> None:
        messages = mapped(RunStory(labels=PARENT_LABELS).begin().end().events)
        assert "tags" not in messages[0]["run"]["facets"]

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"openlineage.parent.run_id": "manual__2026"}, "no UUID"),
            ({"openlineage.parent.job_name": " "}, "job_name is missing"),
        ],
    )
    def test_labels_that_name_no_run_are_left_out_and_said(
        self, change: dict[str, str], problem: str
    ) -> None:
        labels = PARENT_LABELS | change
        run, node = self.parents(labels)
        assert run is None
        assert node["root"]["run"]["runId"] == RUN_ID
        mapping = RunMapping("dbt", RunStory(labels=labels).begin().events[0])
        assert problem in (mapping.problem or "")


class TestABuild:
    def message(self, **fields: Any) -> Json:
        story = RunStory().begin()
        story.start(ORDERS)
        story.finish(ORDERS, query_id="01b2", node={"owners": ["Ada"], "tags": ["core"]})
        story.materialized(ORDERS, STG, **fields)
        return end_of(mapped(story.end().events), ORDERS)

    def test_reads_its_inputs_in_the_versions_that_it_saw(self) -> None:
        version = InputVersion(namespace=NAMESPACE, name=dataset(STG), dataset_version="run-7")
        (read,) = self.message(input_versions=[version])["inputs"]
        assert (read["namespace"], read["name"]) == (NAMESPACE, "shop.main.stg_orders")
        assert read["facets"]["version"]["datasetVersion"] == "run-7"

    def test_makes_its_output_with_all_that_is_known_of_it(self) -> None:
        message = self.message(
            columns=COLUMNS,
            description="One row per order",
            owners=["Ada"],
            tags=["core"],
            lifecycle="OVERWRITE",
            rows_affected=113,
        )
        (output,) = message["outputs"]
        facets = {name: strip(facet) for name, facet in output["facets"].items()}
        assert facets == {
            "dataSource": {"name": NAMESPACE, "uri": NAMESPACE},
            "datasetType": {"datasetType": "TABLE"},
            "schema": {
                "fields": [
                    {
                        "name": "id",
                        "type": "INTEGER",
                        "description": "The key",
                        "ordinal_position": 1,
                    },
                    {"name": "amount", "type": "DOUBLE", "ordinal_position": 2},
                ]
            },
            "documentation": {"description": "One row per order"},
            "ownership": {"owners": [{"name": "Ada"}]},
            "tags": {
                "tags": [
                    {"key": "core", "value": "true", "source": "DBT"},
                    {"key": "pii", "value": "true", "source": "DBT", "field": "id"},
                ]
            },
            "version": {"datasetVersion": f"{RUN_ID}.1"},
            "lifecycleStateChange": {"lifecycleStateChange": "OVERWRITE"},
        }
        assert strip(output["outputFacets"]["outputStatistics"]) == {"rowCount": 113}
        job = {name: strip(facet) for name, facet in message["job"]["facets"].items()}
        assert job == {
            "jobType": {"processingType": "BATCH", "integration": "DBT", "jobType": "MODEL"},
            "ownership": {"owners": [{"name": "Ada"}]},
            "tags": {"tags": [{"key": "core", "value": "true", "source": "DBT"}]},
            "documentation": {"description": "One row per order"},
        }
        query = strip(message["run"]["facets"]["externalQuery"])
        assert query == {"externalQueryId": "01b2", "source": "duckdb"}

    def test_says_nothing_of_what_is_not_known(self) -> None:
        message = self.message()
        (output,) = message["outputs"]
        assert output["facets"].keys() == {"dataSource", "datasetType", "version"}
        assert "outputFacets" not in output

    def test_without_dbt_words_it_keeps_our_status(self) -> None:
        """A warning and a success are both COMPLETE there."""
        facet = strip(self.message()["run"]["facets"]["dbtstream_node"])
        assert facet == {
            "status": "success",
            "attempt": 1,
            "invocation_id": "8317a821-dee1-4702-a582-11bab356968d",
        }

    def test_a_namespace_that_is_no_uri_is_no_data_source(self) -> None:
        story = RunStory().begin()
        story.start(ORDERS)
        story.finish(ORDERS)
        version = InputVersion(namespace="bigquery", name="p.d.t")
        story.materialized(ORDERS, input_versions=[version])
        (read,) = end_of(mapped(story.end().events), ORDERS)["inputs"]
        assert read == {"namespace": "bigquery", "name": "p.d.t"}

    @pytest.mark.parametrize("unique_id", ["seed.shop.raw_orders", "snapshot.shop.history"])
    def test_seeds_and_snapshots_are_jobs_like_models(self, unique_id: str) -> None:
        message = end_of(mapped(RunStory().begin().build(unique_id).end().events), unique_id)
        assert message["job"]["facets"]["jobType"]["jobType"] == unique_id.partition(".")[0].upper()
        assert message["outputs"][0]["name"] == dataset(unique_id)

    def test_its_end_is_when_it_ended_though_it_was_told_later(self) -> None:
        story = RunStory().begin()
        story.start(ORDERS)
        story.finish(ORDERS, started_at=BEGIN, finished_at=BEGIN + timedelta(seconds=3.5))
        story.materialized(ORDERS)
        message = end_of(mapped(story.end().events), ORDERS)
        assert message["eventTime"] == "2026-03-01T12:00:03.500000Z"

    def test_a_build_whose_asset_event_never_comes_ends_with_the_run(self) -> None:
        story = RunStory().begin()
        story.start(ORDERS)
        story.finish(ORDERS)
        assert kinds(mapped(story.end().events))[-2:] == [
            f"COMPLETE {ORDERS}",
            "COMPLETE shop.prod.build",
        ]

    def test_a_build_whose_meta_wants_no_asset_event_is_not_held(self) -> None:
        story = RunStory().begin()
        story.finish(ORDERS, node={"meta": {"dbtstream": {"asset": False}}})
        story.start(DAILY)
        assert kinds(mapped(story.events))[-2:] == [f"COMPLETE {ORDERS}", f"START {DAILY}"]

    def test_nodes_that_are_no_assets_end_at_once(self) -> None:
        hook, board, base = "operation.shop.on-run-end-0", "exposure.shop.board", "model.shop.base"
        story = RunStory().begin()
        story.finish(hook)
        story.finish(board, NodeStatus.NO_OP)
        story.finish(base, node={"materialized": "ephemeral"})
        story.start(DAILY)
        messages = mapped(story.events)
        assert kinds(messages)[1:] == [
            *(f"{kind} {name}" for name in (hook, board, base) for kind in ("START", "COMPLETE")),
            f"START {DAILY}",
        ]
        assert all(not m["outputs"] for m in messages), "ephemeral models are no tables"


class TestColumnLineage:
    def test_new_lineage_comes_with_the_end_in_both_facets(self) -> None:
        story = RunStory().begin().build(ORDERS, STG, lineage_hash=f"hash of {ORDERS}")
        story.observed(ORDERS, STG)
        message = end_of(mapped(story.end().events), ORDERS)
        source = {"namespace": NAMESPACE, "name": "shop.main.stg_orders", "field": "id"}
        direct = [{"type": "DIRECT", "subtype": "IDENTITY", "masking": False}]
        join = [{"type": "INDIRECT", "subtype": "JOIN", "masking": False}]
        (output,) = message["outputs"]
        assert strip(output["facets"]["columnLineage"]) == {
            "fields": {"id": {"inputFields": [source | {"transformations": direct}]}},
            "dataset": [source | {"transformations": join}],
        }
        typed = source | {"type": "DATASET"}
        assert strip(message["job"]["facets"]["lineage"])["entries"] == [
            {
                "namespace": NAMESPACE,
                "name": "shop.main.orders",
                "type": "DATASET",
                "inputs": [
                    {"namespace": NAMESPACE, "name": "shop.main.stg_orders", "type": "DATASET"},
                    typed | {"transformations": join},
                ],
                "fields": {"id": {"inputs": [typed | {"transformations": direct}]}},
            }
        ]
        assert [field["name"] for field in output["facets"]["schema"]["fields"]] == ["id"]

    def test_the_end_waits_for_lineage_that_the_asset_event_announces(self) -> None:
        story = RunStory().begin().build(ORDERS, STG, lineage_hash=f"hash of {ORDERS}")
        story.start(DAILY)
        assert kinds(mapped(story.events))[-1] == f"START {DAILY}", "orders is held"
        story.observed(ORDERS, STG)
        assert kinds(mapped(story.events))[-1] == f"COMPLETE {ORDERS}"

    def test_unchanged_lineage_is_taken_from_what_an_earlier_run_observed(self) -> None:
        earlier = RunStory().observed(ORDERS, STG)
        story = RunStory().begin().build(ORDERS, STG, lineage_hash=earlier.lineage_hash)
        story.start(DAILY)
        messages = mapped(story.events, earlier)
        assert kinds(messages)[-2:] == [f"COMPLETE {ORDERS}", f"START {DAILY}"], "not held"
        assert "columnLineage" in messages[-2]["outputs"][0]["facets"]

    def test_older_lineage_is_not_taken_for_the_present_one(self) -> None:
        earlier = RunStory().observed(ORDERS, STG, lineage_hash="another")
        story = RunStory().begin().build(ORDERS, STG, lineage_hash=f"hash of {ORDERS}")
        message = end_of(mapped(story.end().events, earlier), ORDERS)
        assert "columnLineage" not in message["outputs"][0]["facets"]
        assert message["inputs"], "what was read is known all the same"

    def test_lineage_that_comes_after_the_end_is_added_to_the_run(self) -> None:
        columns = [Column(name="ID", type="INTEGER")]
        story = (
            RunStory().begin().build(ORDERS, STG, columns=columns)
        )  # no hash: nothing to wait for
        story.observed(ORDERS, STG)
        messages = mapped(story.end().events)
        end, added = end_of(messages, ORDERS), messages[-2]
        assert added["eventType"] == "OTHER"
        assert added["run"]["runId"] == end["run"]["runId"]
        facets = added["outputs"][0]["facets"]
        assert list(facets["columnLineage"]["fields"]) == ["ID"], "as the database writes it"
        assert facets["schema"]["fields"] == end["outputs"][0]["facets"]["schema"]["fields"]

    def test_lineage_that_was_told_is_not_told_again(self) -> None:
        story = RunStory().begin().build(ORDERS, STG, lineage_hash=f"hash of {ORDERS}")
        story.observed(ORDERS, STG)
        once = len(mapped(story.events))
        story.observed(ORDERS, STG)
        assert len(mapped(story.events)) == once

    def test_lineage_without_columns_is_still_lineage(self) -> None:
        """Of a Python model, or SQL that could not be read."""
        story = RunStory().begin().build(ORDERS, lineage_hash=f"hash of {ORDERS}")
        story.observed(
            ORDERS,
            STG,
            fields=None,
            dataset_inputs=None,
            column_lineage_status=ColumnLineageStatus.UNSUPPORTED,
        )
        message = end_of(mapped(story.end().events), ORDERS)
        assert edges([message]) == {("shop.main.stg_orders", "shop.main.orders")}
        assert "columnLineage" not in message["outputs"][0]["facets"]
        assert "fields" not in message["job"]["facets"]["lineage"]["entries"][0]

    def test_two_columns_that_differ_in_case_only_are_kept_apart(self) -> None:
        columns = [Column(name="Id"), Column(name="ID")]
        story = RunStory().begin()
        story.build(ORDERS, STG, columns=columns, lineage_hash=f"hash of {ORDERS}")
        story.observed(ORDERS, STG)
        facets = end_of(mapped(story.end().events), ORDERS)["outputs"][0]["facets"]
        assert list(facets["columnLineage"]["fields"]) == ["id"]

    def test_of_a_project_without_asset_events_it_is_all_that_is_said(self) -> None:
        story = RunStory().begin()
        story.start(ORDERS)
        story.finish(ORDERS)
        story.observed(ORDERS, STG)
        story.start(DAILY)
        messages = mapped(story.events)
        assert kinds(messages)[-2:] == [f"COMPLETE {ORDERS}", f"START {DAILY}"]
        assert edges(messages) == {("shop.main.stg_orders", "shop.main.orders")}


class TestFailures:
    def test_a_model_that_failed_says_why_and_made_nothing(self) -> None:
        story = RunStory().begin()
        story.start(ORDERS)
        block = ErrorBlock(class_="DbtRuntimeError", message="no such table: x")
        story.finish(ORDERS, NodeStatus.ERROR, error=block)
        story.failed(ORDERS, NodeStatus.ERROR)
        message = end_of(mapped(story.end(RunStatus.FAILURE).events), ORDERS)
        error = strip(message["run"]["facets"]["errorMessage"])
        assert error == {"message": "no such table: x", "programmingLanguage": "SQL"}
        assert message["outputs"] == []

    def test_of_a_python_model_the_language_is_python(self) -> None:
        story = RunStory().begin()
        story.finish(ORDERS, NodeStatus.ERROR, node={"path": "models/orders.py"}, message="boom")
        story.failed(ORDERS, NodeStatus.ERROR)
        message = end_of(mapped(story.events), ORDERS)
        assert message["run"]["facets"]["errorMessage"]["programmingLanguage"] == "PYTHON"

    @pytest.mark.parametrize("status", [NodeStatus.LOST, NodeStatus.ERROR, NodeStatus.FAIL])
    def test_a_failure_without_a_message_gets_one(self, status: NodeStatus) -> None:
        story = RunStory().begin()
        story.start(ORDERS)
        story.finish(ORDERS, status, reason=Reason.OOM)
        story.failed(ORDERS, status)
        message = end_of(mapped(story.end(RunStatus.ERROR).events), ORDERS)
        assert message["run"]["facets"]["errorMessage"]["message"] == f"orders: {status} (oom)"

    def test_what_was_skipped_is_aborted_and_names_whose_failure_it_was(self) -> None:
        story = RunStory().begin()
        story.start(ORDERS)
        story.finish(ORDERS, NodeStatus.ERROR, message="x")
        story.failed(ORDERS, NodeStatus.ERROR)
        story.finish(
            DAILY, NodeStatus.SKIPPED, reason=Reason.UPSTREAM_FAILED, root_causes=[ORDERS, STG]
        )
        story.skipped(DAILY, ORDERS)
        messages = mapped(story.end(RunStatus.FAILURE).events)
        skipped = end_of(messages, DAILY)
        assert kinds(messages).count(f"START {DAILY}") == 0, "it never began"
        assert skipped["eventType"] == "ABORT"
        known, unknown = skipped["run"]["facets"]["jobDependencies"]["upstream"]
        assert known["job"] == {"namespace": "dbt", "name": ORDERS}
        assert known["run"]["runId"] == end_of(messages, ORDERS)["run"]["runId"]
        assert unknown["job"]["name"] == STG
        assert "run" not in unknown, "it has no run in this attempt"

    @pytest.mark.parametrize("status", [NodeStatus.NEVER_STARTED, NodeStatus.CANCELLED])
    def test_what_was_stopped_is_aborted(self, status: NodeStatus) -> None:
        story = RunStory().begin()
        story.finish(ORDERS, status, reason=Reason.CANCELLED)
        message = end_of(mapped(story.end(RunStatus.CANCELLED).events), ORDERS)
        assert message["eventType"] == "ABORT"
        assert message["run"]["facets"]["dbtstream_node"]["status"] == status
        assert "jobDependencies" not in message["run"]["facets"]


class TestMicrobatch:
    def story(self) -> RunStory:
        story = RunStory().begin()
        story.start(ORDERS)
        for index, status in enumerate(
            (NodeStatus.SUCCESS, NodeStatus.ERROR, NodeStatus.SUCCESS), start=1
        ):
            story.batch(ORDERS, index, status)
        results = BatchResults(successful=[["a", "b"], ["c", "d"]], failed=[["b", "c"]])
        story.finish(ORDERS, NodeStatus.PARTIAL_SUCCESS, batch_results=results)
        story.failed(ORDERS, NodeStatus.PARTIAL_SUCCESS)
        return story.end(RunStatus.FAILURE)

    def test_batches_are_runs_below_the_run_of_their_model(self) -> None:
        messages = mapped(self.story().events)
        model = end_of(messages, ORDERS)["run"]["runId"]
        batches = [m for m in messages if m["job"]["name"] == f"{ORDERS}.batch"]
        assert [m["eventType"] for m in batches] == [
            *("START", "COMPLETE"),
            *("START", "FAIL"),
            *("START", "COMPLETE"),
        ]
        assert len({m["run"]["runId"] for m in batches}) == 3
        assert {m["run"]["facets"]["parent"]["run"]["runId"] for m in batches} == {model}
        assert {m["run"]["facets"]["parent"]["root"]["run"]["runId"] for m in batches} == {RUN_ID}
        assert strip(batches[0]["run"]["facets"]["nominalTime"]) == {
            "nominalStartTime": "2024-01-01T00:00:00Z",
            "nominalEndTime": "2024-01-02T00:00:00Z",
        }

    def test_partial_success_is_a_failure_that_says_how_much(self) -> None:
        message = end_of(mapped(self.story().events), ORDERS)
        assert message["eventType"] == "FAIL"
        assert message["run"]["facets"]["errorMessage"]["message"] == "1 of 3 batches failed"


class TestChecks:
    def message(self, status: str, **check: Any) -> Json:
        facts = {"assertion": "not_null", "columns": ["id"], "error_if": "!= 0", "failures": 0}
        story = RunStory().begin().test(NOT_NULL, ORDERS, status, **(facts | check))
        return end_of(mapped(story.end().events), NOT_NULL)

    @staticmethod
    def verdict(message: Json) -> Json | None:
        facets = message["inputs"][0].get("inputFacets", {})
        found = facets.get("dataQualityAssertions", {}).get("assertions", [None])
        assert len(found) == 1
        return found[0]  # type: ignore[no-any-return]

    def test_a_test_that_passes_says_so_of_the_dataset_that_it_read(self) -> None:
        message = self.message("pass", params={"column_name": "id"})
        assert message["eventType"] == "COMPLETE"
        assert message["inputs"][0]["name"] == "shop.main.orders"
        assert message["outputs"] == []
        assert self.verdict(message) == {
            "assertion": "not_null",
            "name": "not_null_orders_id",
            "column": "id",
            "success": True,
            "severity": "error",
            "expected": "0",
            "actual": "0",
            "params": {"column_name": "id"},
        }
        (execution,) = message["run"]["facets"]["test"]["tests"]
        assert (execution["status"], execution["type"]) == ("pass", "not_null")

    def test_a_test_that_fails_has_found_something(self) -> None:
        message = self.message("fail", failures=2, message="Got 2 results")
        verdict = self.verdict(message) or {}
        assert message["eventType"] == "FAIL"
        assert (verdict["success"], verdict["severity"], verdict["actual"]) == (False, "error", "2")
        assert message["run"]["facets"]["test"]["tests"][0]["status"] == "fail"

    def test_a_test_that_warns_has_found_something_and_blocks_nothing(self) -> None:
        message = self.message("warn", failures=2, warn_if="> 1", severity="WARN")
        verdict = self.verdict(message) or {}
        assert message["eventType"] == "COMPLETE"
        assert (verdict["success"], verdict["severity"]) == (False, "warn")
        assert (verdict["expected"], verdict["actual"]) == ("> 1", "2")

    @pytest.mark.parametrize("status", ["error", "lost"])
    def test_a_test_that_could_not_run_has_no_verdict(self, status: str) -> None:
        message = self.message(status, failures=None)
        assert message["eventType"] == "FAIL"
        assert self.verdict(message) is None
        assert "test" not in message["run"]["facets"]

    @pytest.mark.parametrize(
        ("status", "ours"),
        [
            ("skipped", NodeStatus.SKIPPED),
            ("cancelled", NodeStatus.CANCELLED),
            ("never_started", NodeStatus.NEVER_STARTED),
        ],
    )
    def test_a_test_that_was_not_run_is_skipped_not_failed(
        self, status: str, ours: NodeStatus
    ) -> None:
        story = RunStory().begin()
        story.finish(NOT_NULL, ours, root_causes=[ORDERS])
        story.checked(NOT_NULL, ORDERS, status, assertion="not_null")
        message = end_of(mapped(story.end(RunStatus.FAILURE).events), NOT_NULL)
        assert message["eventType"] == "ABORT"
        assert self.verdict(message) is None
        assert message["run"]["facets"]["test"]["tests"][0]["status"] == "skip"

    def test_a_relationship_has_both_its_sides(self) -> None:
        other = OtherDataset(namespace=NAMESPACE, name="shop.main.customers", column="id")
        message = self.message("pass", assertion="relationships", other_datasets=[other])
        assert [each["name"] for each in message["inputs"]] == [
            "shop.main.orders",
            "shop.main.customers",
        ]
        assert "inputFacets" not in message["inputs"][1]

    def test_a_singular_test_and_a_unit_test_have_kinds_of_their_own(self) -> None:
        assert (self.verdict(self.message("pass", assertion=None)) or {})["assertion"] == (
            "custom_sql"
        )
        unit = "unit_test.shop.daily.keeps_amount"
        story = RunStory().begin().test(unit, DAILY, "fail", kind="unit_test")
        message = end_of(mapped(story.end().events), unit)
        assert message["job"]["facets"]["jobType"]["jobType"] == "UNIT_TEST"
        assert (self.verdict(message) or {})["assertion"] == "unit_test"

    def test_a_check_of_several_columns_is_of_none_of_them(self) -> None:
        assert "column" not in (self.verdict(self.message("pass", columns=["a", "b"])) or {})

    def test_a_test_starts_when_it_starts(self) -> None:
        story = RunStory().begin().test(NOT_NULL, ORDERS).end()
        messages = mapped(story.events)
        start = next(m for m in messages if m["job"]["name"] == NOT_NULL)
        assert start["eventType"] == "START"
        assert start["eventTime"] < end_of(messages, NOT_NULL)["eventTime"]


class TestFreshness:
    LOADED = datetime(2026, 3, 1, 6, 0, tzinfo=UTC)

    def message(self, status: str, node_status: NodeStatus, **fields: Any) -> Json:
        block = FreshnessBlock(
            max_loaded_at=self.LOADED, age_s=21600.0, warn_after_s=3600.0, error_after_s=86400.0
        )
        story = RunStory().begin("source", "freshness")
        story.finish(RAW, node_status, freshness=block)
        story.source(RAW, status, **({"freshness": block} | fields))
        return end_of(mapped(story.end().events), f"{RAW}.freshness")

    def test_of_a_fresh_source(self) -> None:
        message = self.message("pass", NodeStatus.SUCCESS)
        assert message["eventType"] == "COMPLETE"
        assert message["job"]["facets"]["jobType"]["jobType"] == "FRESHNESS"
        (source,) = message["inputs"]
        (verdict,) = source["inputFacets"]["dataQualityAssertions"]["assertions"]
        assert (verdict["assertion"], verdict["success"]) == ("freshness", True)
        assert verdict["actual"] == "21600 s old"
        metrics = source["inputFacets"]["dataQualityMetrics"]
        assert metrics["lastUpdated"] == "2026-03-01T06:00:00Z"

    @pytest.mark.parametrize(
        ("status", "node_status", "kind", "expected"),
        [
            ("warn", NodeStatus.WARN, "COMPLETE", "at most 3600 s old"),
            ("error", NodeStatus.ERROR, "FAIL", "at most 86400 s old"),
        ],
    )
    def test_of_a_source_that_is_late_or_stale(
        self, status: str, node_status: NodeStatus, kind: str, expected: str
    ) -> None:
        message = self.message(status, node_status)
        assert message["eventType"] == kind
        (verdict,) = message["inputs"][0]["inputFacets"]["dataQualityAssertions"]["assertions"]
        assert (verdict["success"], verdict["severity"]) == (False, status)
        assert verdict["expected"] == expected

    def test_that_could_not_be_looked_at_has_no_verdict(self) -> None:
        message = self.message("runtime error", NodeStatus.ERROR, freshness=None)
        assert message["eventType"] == "FAIL"
        assert "inputFacets" not in message["inputs"][0]


class TestDeclared:
    def test_a_model_is_a_job_that_reads_and_makes(self) -> None:
        story = RunStory().begin()
        story.declared(ORDERS, STG, owners=["Ada"])
        message = mapped(story.events)[-1]
        assert kinds([message]) == [f"JobEvent {ORDERS}"]
        assert edges([message]) == {("shop.main.stg_orders", "shop.main.orders")}
        (entry,) = message["job"]["facets"]["lineage"]["entries"]
        assert "fields" not in entry, "nothing is compiled yet"
        assert message["outputs"][0]["facets"]["ownership"]["owners"] == [{"name": "Ada"}]

    def test_documented_columns_are_told_of_sources_and_contracts_only(self) -> None:
        columns = [Column(name="id", description="The key")]
        story = RunStory().begin()
        story.declared(ORDERS, columns=columns)
        story.declared(DAILY, columns=columns, contract_enforced=True)
        story.declared(RAW, columns=columns)
        model, contract, source = mapped(story.events)[-3:]
        assert "schema" not in model["outputs"][0]["facets"]
        assert contract["outputs"][0]["facets"]["schema"]["fields"][0]["name"] == "id"
        assert source["dataset"]["facets"]["schema"]["fields"][0]["description"] == "The key"

    def test_a_source_is_a_dataset_with_its_owners(self) -> None:
        story = RunStory().begin()
        story.declared(RAW, owners=["Loader"])
        message = mapped(story.events)[-1]
        assert kinds([message]) == ["DatasetEvent shop.main.raw_orders"]
        assert message["dataset"]["facets"]["ownership"]["owners"] == [{"name": "Loader"}]

    def test_an_exposure_is_a_job_that_only_reads(self) -> None:
        story = RunStory().begin()
        story.declared("exposure.shop.board", DAILY, outputs=[])
        message = mapped(story.events)[-1]
        (entry,) = message["job"]["facets"]["lineage"]["entries"]
        assert (entry["type"], entry["inputs"][0]["name"]) == ("JOB", "shop.main.daily")
        assert message["outputs"] == []

    def test_an_ephemeral_model_is_nothing_by_itself(self) -> None:
        story = RunStory().begin()
        story.declared("model.shop.base", STG, outputs=[], materialized="ephemeral")
        assert kinds(mapped(story.events)) == ["START shop.prod.build"]


class TestIds:
    def whole(self) -> RunStory:
        story = RunStory().begin()
        story.declared(ORDERS, STG)
        story.declared(RAW)
        story.build(ORDERS, STG, lineage_hash=f"hash of {ORDERS}")
        story.observed(ORDERS, STG)
        return story.test(NOT_NULL, ORDERS).end()

    def bodies(self, story: RunStory, *, silent: int = 0) -> list[tuple[str, bytes]]:
        mapping = RunMapping("dbt", story.events[0])
        out = []
        for number, event in enumerate(story.events):
            messages = mapping.take(event)
            if number >= silent:
                out += [(message_id(m, body := encode(m)), body) for m in messages]
        return out

    def test_the_same_events_make_the_same_bytes_and_ids(self) -> None:
        assert self.bodies(self.whole()) == self.bodies(self.whole())

    def test_whoever_takes_over_goes_on_where_the_first_one_stopped(self) -> None:
        """At every event: what has been sent, and what follows, is the whole."""
        story = self.whole()
        whole = self.bodies(story)
        for taken_over in range(len(story.events) + 1):
            before = RunStory()
            before.events = story.events[:taken_over]
            sent = self.bodies(before) if before.events else []
            assert sent + self.bodies(story, silent=taken_over) == whole

    def test_ids_follow_the_transport_that_is_proposed_for_nats(self) -> None:
        ids = [identity for identity, _ in self.bodies(self.whole())]
        assert ids[0].startswith(f"{RUN_ID}:START:")
        assert [i.partition(":")[0] for i in ids[1:3]] == ["job", "dataset"]
        assert all(len(i.rpartition(":")[2]) == 64 for i in ids)
        assert len(set(ids)) == len(ids)


def strip(facet: Json) -> Json:
    """Without what all facets have."""
    return {key: value for key, value in facet.items() if not key.startswith("_")}
