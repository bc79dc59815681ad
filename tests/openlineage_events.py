"""A run of ours told event by event, and what of it must hold as OpenLineage.

The specification's schemas lie beside the clone (`../shared/openlineage-spec`); nothing of them
is in the repository.
"""

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
from jsonschema import Draft202012Validator, FormatChecker
from referencing import Registry, Resource

from dbtstream.event_base import Event
from dbtstream.events import (
    AnyEvent,
    NodeBatch,
    NodeBlock,
    NodeFinished,
    NodeStarted,
    RunFinished,
    RunQueued,
    RunStarted,
)
from dbtstream.lineage_events import (
    AssetChecked,
    AssetFailed,
    AssetMaterialized,
    AssetObserved,
    AssetSkipped,
    CheckBlock,
    FieldInput,
    FieldLineage,
    FieldTransformation,
    Identity,
    InputVersion,
    LineageDeclared,
    LineageInput,
    LineageObserved,
    LineageOutput,
    SkipCause,
)
from dbtstream.openlineage import OpenLineageMessage, encode
from dbtstream.openlineage_mapping import RunMapping
from dbtstream.statuses import ColumnLineageStatus, NodeStatus, RunStatus

SPEC = Path(__file__).parents[2] / "shared" / "openlineage-spec"

NEEDS_SPEC = pytest.mark.skipif(
    not SPEC.is_dir(), reason=f"the OpenLineage schemas are not in {SPEC}"
)

RUN_ID = "0195512b-8a00-7000-8000-000000000001"
BEGIN = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
NAMESPACE = "duckdb:///data/shop.duckdb"

E = TypeVar("E", bound=Event)
Json = dict[str, Any]


class RunStory:
    """One run of project `shop`. Each method tells the next event, a second later."""

    def __init__(self, run_id: str = RUN_ID, **envelope: Any) -> None:
        self.events: list[AnyEvent] = []
        self.run_id = run_id
        self.attempt = 1
        self._envelope = envelope

    def tell(self, kind: type[E], **fields: Any) -> E:
        seq = len(self.events) + 1
        facts: dict[str, Any] = {
            "event_id": f"{self.run_id}.{self.attempt}.{seq}",
            "time": BEGIN + timedelta(seconds=seq),
            "seq": seq,
            "project": "shop",
            "target": "prod",
            "run_id": self.run_id,
            "attempt": self.attempt,
            "fence": 7,
            "worker": "w1",
            "engine": "dbt-core 1.11.16",
            "invocation_id": "8317a821-dee1-4702-a582-11bab356968d",
        }
        event: Any = kind(**(facts | self._envelope | fields))
        self.events.append(event)
        return event  # type: ignore[no-any-return]

    # the run

    def begin(self, *args: str) -> "RunStory":
        """Queued and started."""
        words = list(args or ("build",))
        self.tell(RunQueued, args=words, engine=None, invocation_id=None)
        self.tell(
            RunStarted,
            args=words,
            dbt_version="1.11.16",
            adapter_type="duckdb",
            python_version="3.11.7",
            host="h",
            pid=1,
            queue_wait_s=0.1,
            start="cold",
            start_s=1.0,
        )
        return self

    def end(self, status: RunStatus = RunStatus.SUCCESS, **fields: Any) -> "RunStory":
        facts = {"status": status, "exit_code": 0 if status is RunStatus.SUCCESS else 1}
        self.tell(RunFinished, **(facts | {"elapsed_s": 3.0} | fields))
        return self

    # nodes

    def start(self, unique_id: str, **node: Any) -> NodeStarted:
        return self.tell(NodeStarted, node=block(unique_id, **node))

    def finish(
        self, unique_id: str, status: NodeStatus = NodeStatus.SUCCESS, **fields: Any
    ) -> NodeFinished:
        node = fields.pop("node", {})
        return self.tell(NodeFinished, node=block(unique_id, **node), status=status, **fields)

    def batch(self, unique_id: str, index: int, status: NodeStatus) -> NodeBatch:
        day = datetime(2024, 1, index, tzinfo=UTC)
        return self.tell(
            NodeBatch,
            unique_id=unique_id,
            resource_type="model",
            name=unique_id.split(".")[2],
            index=index,
            total=3,
            status=status,
            execute_s=0.25,
            event_time_start=day,
            event_time_end=day + timedelta(days=1),
        )

    # assets

    def materialized(self, unique_id: str, *inputs: str, **fields: Any) -> AssetMaterialized:
        facts: dict[str, Any] = {
            **asset(unique_id),
            "status": NodeStatus.SUCCESS,
            "dataset_version": f"{self.run_id}.{self.attempt}",
            "input_versions": [
                InputVersion(namespace=NAMESPACE, name=dataset(each), unique_id=each)
                for each in inputs
            ],
        }
        return self.tell(AssetMaterialized, **(facts | fields))

    def failed(self, unique_id: str, status: NodeStatus, **fields: Any) -> AssetFailed:
        return self.tell(AssetFailed, **asset(unique_id), status=status, **fields)

    def skipped(self, unique_id: str, *causes: str, **fields: Any) -> AssetSkipped:
        named = [SkipCause(unique_id=cause, status=NodeStatus.ERROR) for cause in causes]
        facts = {"status": NodeStatus.SKIPPED, "causes": named}
        return self.tell(AssetSkipped, **asset(unique_id), **(facts | fields))

    def checked(self, test: str, of: str, status: str, **check: Any) -> AssetChecked:
        facts: dict[str, Any] = {
            "unique_id": test,
            "name": test.split(".")[2],
            "kind": test.split(".", maxsplit=1)[0],
            "status": status,
            "severity": "ERROR",
        }
        return self.tell(AssetChecked, **asset(of), check=CheckBlock(**(facts | check)))

    def source(self, unique_id: str, status: str, **fields: Any) -> AssetObserved:
        return self.tell(AssetObserved, **asset(unique_id), status=status, **fields)

    # lineage

    def observed(self, unique_id: str, *inputs: str, **fields: Any) -> LineageObserved:
        return self.tell(LineageObserved, **(lineage(unique_id, *inputs) | fields))

    def declared(self, unique_id: str, *inputs: str, **fields: Any) -> LineageDeclared:
        facts = lineage(unique_id, *inputs) | {
            "fields": None,
            "dataset_inputs": None,
            "column_lineage_status": ColumnLineageStatus.NOT_COMPILED,
        }
        return self.tell(LineageDeclared, **(facts | fields))

    # shortcuts

    def build(self, unique_id: str, *inputs: str, **fields: Any) -> "RunStory":
        """Started, finished, materialized."""
        self.start(unique_id)
        self.finish(unique_id)
        self.materialized(unique_id, *inputs, **fields)
        return self

    def test(self, test: str, of: str, status: str = "pass", **check: Any) -> "RunStory":
        self.start(test)
        ends = {"pass": NodeStatus.SUCCESS, "warn": NodeStatus.WARN, "fail": NodeStatus.FAIL}
        self.finish(test, ends.get(status, NodeStatus.ERROR))
        self.checked(test, of, status, **check)
        return self


def block(unique_id: str, **fields: Any) -> NodeBlock:
    resource_type, package, name, *_ = unique_id.split(".")
    facts: dict[str, Any] = {
        "unique_id": unique_id,
        "resource_type": resource_type,
        "name": name,
        "package_name": package,
        "materialized": "table" if resource_type == "model" else resource_type,
    }
    return NodeBlock(**(facts | fields))


def dataset(unique_id: str) -> str:
    return f"shop.main.{unique_id.rsplit('.', maxsplit=1)[-1]}"


def asset(unique_id: str) -> dict[str, Any]:
    resource_type, package, *_, name = unique_id.split(".")
    return {
        "unique_id": unique_id,
        "resource_type": resource_type,
        "name": name,
        "package_name": package,
        "key": dataset(unique_id),
        "identity": Identity(
            namespace=NAMESPACE,
            name=dataset(unique_id),
            database="shop",
            schema="main",
            identifier=name,
            relation_type="view" if name.startswith("stg_") else "table",
        ),
    }


def column(
    upstream: str, field: str, subtype: str = "IDENTITY", type_: str = "DIRECT"
) -> FieldInput:
    return FieldInput(
        namespace=NAMESPACE,
        name=dataset(upstream),
        field=field,
        unique_id=upstream,
        transformations=[FieldTransformation(type=type_, subtype=subtype)],
    )


def lineage(unique_id: str, *inputs: str) -> dict[str, Any]:
    """Each has one column `id`, which comes from all the inputs' `id`."""
    resource_type, _, *_, name = unique_id.split(".")
    return {
        "unique_id": unique_id,
        "resource_type": resource_type,
        "name": name,
        "inputs": [
            LineageInput(namespace=NAMESPACE, name=dataset(each), unique_id=each) for each in inputs
        ],
        "outputs": [
            LineageOutput(namespace=NAMESPACE, name=dataset(unique_id), unique_id=unique_id)
        ],
        "fields": {"id": FieldLineage(inputs=[column(each, "id") for each in inputs])},
        "dataset_inputs": [column(each, "id", "JOIN", "INDIRECT") for each in inputs[:1]],
        "column_lineage_status": ColumnLineageStatus.COMPLETE,
        "lineage_hash": f"hash of {unique_id}",
    }


def mapped(
    events: Iterable[AnyEvent], *known: LineageObserved, namespace: str = "dbt"
) -> list[Json]:
    """All messages of a run as JSON, each valid; `known` is what the bucket would say."""
    told = list(events)
    mapping = RunMapping(namespace, told[0])
    messages: list[OpenLineageMessage] = []
    for event in told:
        for unique_id in mapping.lacks(event):
            for observed in known:
                if observed.unique_id == unique_id:
                    mapping.learn(observed)
        messages += mapping.take(event)
    plain = [json.loads(encode(message)) for message in messages]
    for message in plain:
        check(message)
    check_run_states(plain)
    return plain


def kinds(messages: Iterable[Json]) -> list[str]:
    """`START model.shop.orders` …"""
    return [
        f"{m.get('eventType', m['schemaURL'].rpartition('/')[2])} {_about(m)}" for m in messages
    ]


def _about(message: Json) -> str:
    return str(message["job"]["name"] if "job" in message else message["dataset"]["name"])


def end_of(messages: Iterable[Json], job: str) -> Json:
    """The terminal message of a job that has run once."""
    ends = ("COMPLETE", "FAIL", "ABORT")
    (found,) = [m for m in messages if m.get("eventType") in ends and m["job"]["name"] == job]
    return found


def edges(messages: Iterable[Json]) -> set[tuple[str, str]]:
    """(input, output) names of all that reports both."""
    return {
        (each["name"], output["name"])
        for message in messages
        for each in message.get("inputs", [])
        for output in message.get("outputs", [])
    }


# -- what must hold of each message ------------------------------------------------------------


def check_run_states(messages: Iterable[Json]) -> None:
    """One START and at most one end per runId, in this order; OTHER after both."""
    states: dict[str, list[str]] = {}
    for message in messages:
        if "run" in message:
            states.setdefault(message["run"]["runId"], []).append(message["eventType"])
    for run_id, seen in states.items():
        core = [kind for kind in seen if kind != "OTHER"]
        assert core in (["START"], ["ABORT"]) or (
            len(core) == 2 and core[0] == "START" and core[1] in ("COMPLETE", "FAIL", "ABORT")
        ), (run_id, seen)
        assert "OTHER" not in seen[: len(core)], (run_id, seen)


def check(message: Json) -> None:
    """Against the specification, where it is; and what it says in prose."""
    schema = message["schemaURL"]
    assert schema.startswith("https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/")
    assert datetime.fromisoformat(message["eventTime"]).tzinfo is not None
    if message.get("eventType") == "FAIL":
        assert message["run"]["facets"]["errorMessage"]["message"]
    for output in message.get("outputs", []):
        traced = output.get("facets", {}).get("columnLineage", {}).get("fields", {})
        fields = {f["name"] for f in output.get("facets", {}).get("schema", {}).get("fields", [])}
        assert traced.keys() <= fields, "Marquez refuses column lineage of unknown columns"
    if not SPEC.is_dir():
        return
    _validate(schema, message)
    for name, facet in _facets(message):
        if not facet["_schemaURL"].startswith("urn:dbtstream:"):
            _validate(facet["_schemaURL"], facet)
            # The name under which the facet's own file has it.
            file = facet["_schemaURL"].partition("#")[0]
            assert name in _registry().contents(file)["properties"], name
            _validate(file, {name: facet})
            # The schemas let every further property pass, and so a misspelt one.
            assert facet.keys() <= _properties(facet["_schemaURL"]), name


def _properties(url: str) -> set[str]:
    file, _, pointer = url.partition("#/$defs/")
    schema = _registry().contents(file)["$defs"][pointer]
    parts = [schema, *schema.get("allOf", [])]
    own = {name for part in parts for name in part.get("properties", {})}
    return own | {"_producer", "_schemaURL"}


def _facets(part: Any) -> Iterable[tuple[str, Json]]:
    if isinstance(part, dict):
        for name, value in part.items():
            if isinstance(value, dict) and "_schemaURL" in value:
                yield name, value
            yield from _facets(value)
    elif isinstance(part, list):
        for value in part:
            yield from _facets(value)


_loaded: list[Registry[Any]] = []


def _registry() -> "Registry[Any]":
    if not _loaded:
        files = [SPEC / "OpenLineage.json", *sorted((SPEC / "facets").glob("*.json"))]
        schemas = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        resources = [Resource.from_contents(schema) for schema in schemas]
        _loaded.append(Registry().with_resources((r.id() or "", r) for r in resources))
    return _loaded[0]


def _validate(url: str, value: Any) -> None:
    validator = Draft202012Validator(
        {"$ref": url}, registry=_registry(), format_checker=FormatChecker()
    )
    problems = [f"{e.json_path}: {e.message}" for e in validator.iter_errors(value)]
    assert not problems, (url, problems)
