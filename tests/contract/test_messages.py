"""The schemas mean the same to Ajv, on Node, as to jsonschema."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from dbtstream.schema import CONTRACT
from dbtstream.schema_examples import EXAMPLES
from tests.contract.validators import SCHEMAS, validate, validate_events


def example(name: str) -> Any:
    return json.loads((SCHEMAS / "examples" / f"{name}.json").read_text("utf-8"))


def schema_name(name: str) -> str:
    return name if name in CONTRACT else name.rpartition(".")[0]


def test_every_example_is_valid_to_both() -> None:
    assert validate((schema_name(name), example(name)) for name in EXAMPLES) == []


def test_events_are_validated_by_their_type() -> None:
    events = [name for name in EXAMPLES if name.startswith("event.")]
    payloads = [(SCHEMAS / "examples" / f"{name}.json").read_bytes() for name in events]
    assert validate_events(payloads) == []

    unheard_of = json.dumps({**example("event.gap"), "type": "invented"}).encode()
    assert validate_events([unheard_of]) == [
        "jsonschema: message 0: there is no schema event.invented",
        "ajv: message 0, event.invented: there is no schema event.invented",
    ]


def spoilt() -> Iterator[tuple[str, Any]]:
    """Every required field of every message left out, and every event with a wrong type in it."""
    for name in CONTRACT:
        schema = json.loads((SCHEMAS / f"{name}.json").read_text("utf-8"))
        for field in schema.get("required", []):
            value = example(name)
            del value[field]
            yield name, value
            yield name, {**example(name), field: [{"no": "sense"}, 1]}


def test_what_is_wrong_is_found_by_both() -> None:
    bad = list(spoilt())
    problems = validate(bad)
    for tool in ("jsonschema", "ajv"):
        found = {int(p.split()[2].rstrip(",:")) for p in problems if p.startswith(f"{tool}:")}
        assert found == set(range(len(bad))), tool


@pytest.mark.parametrize(
    ("name", "path", "wrong"),
    [
        ("event.lineage.observed", ["column_lineage_status"], "mostly"),
        ("event.lineage.observed", ["fields", "paid", "inputs", 0, "field"], 7),
        ("event.asset.materialized", ["input_versions", 0, "dataset_version"], 4),
        ("event.asset.materialized", ["schema_change", "added"], None),
        ("event.asset.checked", ["check", "failures"], "two"),
        ("event.asset.failed", ["status"], "broken"),
        ("event.asset.skipped", ["causes", 0, "status"], "pass"),
    ],
)
def test_wrong_deep_inside_is_found_by_both(name: str, path: list[Any], wrong: Any) -> None:
    value = copy.deepcopy(example(name))
    inner = value
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = wrong
    assert {problem.partition(":")[0] for problem in validate([(name, value)])} == {
        "jsonschema",
        "ajv",
    }


def test_times_that_are_no_times_are_found_by_ajv() -> None:
    """jsonschema looks at formats only with packages that we do not ask for."""
    problems = validate([("event.gap", {**example("event.gap"), "time": "yesterday"})])
    assert problems == ['ajv: message 0, event.gap: /time must match format "date-time"']
