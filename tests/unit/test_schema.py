"""The committed `schemas/` say what the code does, and v1 keeps what it promised."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from jsonschema.protocols import Validator

from dbtstream import asyncapi_facts, commands, events, messages, statuses, subjects
from dbtstream.schema import (
    CONTRACT,
    DIALECT,
    EVENTS,
    MESSAGES,
    check_schemas,
    incompatibilities,
    schema_of,
    write_schemas,
)
from dbtstream.schema_examples import EXAMPLES

SCHEMAS = Path(__file__).parents[2] / "schemas"


def committed(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def example_bytes(name: str) -> bytes:
    return (SCHEMAS / "examples" / f"{name}.json").read_bytes()


def schema_name(example: str) -> str:
    """`event.node.finished.skipped` is one more example of `event.node.finished`."""
    return example if example in CONTRACT else example.rpartition(".")[0]


def validator(name: str) -> Validator:
    return jsonschema.Draft202012Validator(committed(name))


def decode(name: str, data: bytes) -> Any:
    """As whoever receives it does: events and replies are told apart by their `type`."""
    match name.partition(".")[0]:
        case "event":
            return events.decode_event(data)
        case "reply":
            return messages.decode_reply(data)
        case _:
            return msgspec.json.decode(data, type=CONTRACT[name])


def test_the_committed_folder_is_what_the_code_generates() -> None:
    """Mend it with `dbtstream schema --output schemas`, and read the difference."""
    assert check_schemas(SCHEMAS) == []


@pytest.mark.parametrize("name", CONTRACT)
def test_no_committed_schema_is_broken_by_the_code(name: str) -> None:
    assert incompatibilities(committed(name), schema_of(name)) == []


def test_every_event_and_message_of_the_code_has_a_schema_and_an_example() -> None:
    replies = set(messages.Reply.__args__)
    assert replies <= set(MESSAGES.values())
    assert set(events.AnyEvent.__args__) == set(EVENTS.values())
    assert {schema_name(example) for example in EXAMPLES} == set(CONTRACT)


@pytest.mark.parametrize("name", CONTRACT)
def test_each_schema_is_valid_2020_12_names_itself_and_says_what_it_is(name: str) -> None:
    schema = committed(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == DIALECT
    assert schema["$id"] == f"urn:dbtstream:v1:{name}"
    assert schema["title"] == CONTRACT[name].__name__
    assert schema["description"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_example_validates_and_decodes_to_what_made_it(name: str) -> None:
    data = example_bytes(name)
    validator(schema_name(name)).validate(json.loads(data))
    assert decode(schema_name(name), data) == EXAMPLES[name]


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.startswith("event.")])
def test_each_event_example_says_the_same_as_messagepack(name: str) -> None:
    event = events.decode_event(example_bytes(name))
    packed = events.encode_event(event, events.MSGPACK)
    assert events.decode_event(packed, events.MSGPACK) == event


def test_the_run_request_example_is_within_our_limits() -> None:
    messages.decode_run_request(example_bytes("request.run"))
    messages.decode_submit(example_bytes("request.submit"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_that_lacks_a_required_field_or_has_a_wrong_type_is_refused(name: str) -> None:
    """By the schema as by our decoder: an outsider's check is as good as ours."""
    check = validator(schema_name(name))
    for field in committed(schema_name(name)).get("required", []):
        rest = {
            key: value for key, value in json.loads(example_bytes(name)).items() if key != field
        }
        for bad in (rest, {**rest, field: [{"no": "sense"}, 1]}):
            assert not check.is_valid(bad), field
            with pytest.raises(msgspec.ValidationError):
                decode(schema_name(name), json.dumps(bad).encode())


@pytest.mark.parametrize("name", CONTRACT)
def test_requests_forbid_unknown_keys_and_what_we_say_allows_them(name: str) -> None:
    extended = {**json.loads(example_bytes(name)), "invented_later": 1}
    accepted = validator(name).is_valid(extended)
    assert accepted == (not name.startswith("request."))


def test_an_event_with_fields_of_a_newer_version_decodes() -> None:
    value = json.loads(example_bytes("event.node.finished"))
    value["node"]["invented_later"] = value["invented_later"] = {"a": 1}
    assert events.decode_event(json.dumps(value).encode()) == EXAMPLES["event.node.finished"]


def test_statuses_are_closed_lists() -> None:
    definitions = committed("event.node.finished")["$defs"]
    assert set(definitions["NodeStatus"]["enum"]) == set(statuses.NodeStatus)
    assert set(definitions["Reason"]["enum"]) == set(statuses.Reason)
    run = committed("event.run.finished")["$defs"]["RunStatus"]
    assert set(run["enum"]) == set(statuses.RunStatus)
    value = {**json.loads(example_bytes("event.node.finished")), "status": "pass"}
    assert not validator("event.node.finished").is_valid(value)


def test_times_are_date_times_for_an_outsider_too() -> None:
    properties = committed("event.node.finished")["properties"]
    assert properties["time"]["format"] == "date-time"
    assert properties["started_at"]["anyOf"][0]["format"] == "date-time"


def test_the_limits_that_a_schema_can_say_are_said() -> None:
    check = validator("request.run")
    assert not check.is_valid({"args": []})
    assert not check.is_valid({"args": ["build"] * (messages.MAX_ARGS + 1)})
    assert not check.is_valid({"args": ["build"], "timeout_s": 0})


def test_check_names_every_kind_of_drift(tmp_path: Path) -> None:
    assert len(write_schemas(tmp_path)) == len(CONTRACT) + len(EXAMPLES) + 1
    assert check_schemas(tmp_path) == []

    (tmp_path / "request.get.json").unlink()
    (tmp_path / "event.invented.json").write_text("{}")
    (tmp_path / "examples" / "event.gap.json").write_text("{}")
    (tmp_path / "reply.error.json").write_text("not JSON")
    (tmp_path / "asyncapi.yaml").write_text("asyncapi: 2.6.0")
    older = schema_of("event.gap")
    older["properties"]["forgotten"] = {"type": "string"}
    (tmp_path / "event.gap.json").write_text(json.dumps(older))

    assert check_schemas(tmp_path) == [
        "asyncapi.yaml is not what the code generates",
        "event.gap.json breaks v1: forgotten is gone",
        "event.gap.json is not what the code generates",
        "event.invented.json describes nothing in the code",
        "examples/event.gap.json is not what the code generates",
        "reply.error.json is not JSON",
        "reply.error.json is not what the code generates",
        "request.get.json is missing",
    ]


class TestIncompatibilities:
    """Each change is made to a schema of ours and told; what is harmless is not."""

    def test_nothing_changed_is_nothing_broken(self) -> None:
        for name in CONTRACT:
            assert incompatibilities(schema_of(name), schema_of(name)) == []

    def test_a_removed_field_is_told_also_deep_inside(self) -> None:
        new = edited("event.node.finished")
        del new["properties"]["message"]
        del new["$defs"]["NodeBlock"]["properties"]["tags"]
        assert broken("event.node.finished", new) == [
            "node.tags is gone",
            "node.tags[] is gone",
            "message is gone",
        ]

    def test_a_retyped_field_is_told(self) -> None:
        new = edited("event.node.finished")
        new["properties"]["seq"] = {"type": "string"}
        new["properties"]["failures"]["anyOf"].pop()
        new["$defs"]["NodeBlock"]["properties"]["tags"]["items"] = {"type": "integer"}
        assert broken("event.node.finished", new) == [
            "seq was integer and is string",
            "node.tags[] was string and is integer",
            "failures was integer or null and is integer",
        ]

    @pytest.mark.parametrize("name", CONTRACT)
    def test_no_field_can_go_or_change_its_type_unseen_however_deep(self, name: str) -> None:
        for place, field in every_field(schema_of(name)):
            gone, retyped = edited(name), edited(name)
            del properties(gone, place)[field]
            assert broken(name, gone), (place, field)
            properties(retyped, place)[field] = {"type": "array", "items": {"type": "null"}}
            assert broken(name, retyped), (place, field)

    def test_a_field_of_an_event_that_may_become_absent_is_told(self) -> None:
        new = edited("event.gap")
        new["required"].remove("count")
        assert broken("event.gap", new) == ["count may now be absent"]

    def test_a_field_that_old_messages_may_lack_stays_optional(self) -> None:
        new = edited("event.gap")
        new["required"].append("from_seq")
        assert broken("event.gap", new) == ["from_seq must now be given"]

    def test_a_new_field_needs_a_default(self) -> None:
        new = edited("event.gap")
        new["properties"]["since"] = {"type": "string"}
        assert broken("event.gap", new) == []
        new["required"].append("since")
        assert broken("event.gap", new) == ["since is new and has no default"]

    def test_a_closed_list_of_an_event_stays_as_it_is(self) -> None:
        new = edited("event.node.finished")
        new["$defs"]["NodeStatus"]["enum"].append("meh")
        assert broken("event.node.finished", new) == [
            "status may now be meh, and its list was closed"
        ]
        new["$defs"]["NodeStatus"]["enum"][-2:] = []
        assert broken("event.node.finished", new) == ["status may no longer be warn"]

    def test_a_closed_list_of_a_request_may_grow(self) -> None:
        new = edited("request.run")
        new["$defs"]["OnBusy"]["enum"].append("wait")
        assert broken("request.run", new) == []

    def test_a_request_that_asks_for_more_is_told(self) -> None:
        new = edited("request.run")
        new["required"].append("reason")
        new["properties"]["args"]["maxItems"] = 10
        new["properties"]["on_busy"]["default"] = "skip"
        problems = " / ".join(broken("request.run", new))
        assert "reason must now be given" in problems
        assert "args followed the rules" in problems
        assert "on_busy had the default 'queue' and has 'skip'" in problems

    def test_events_that_begin_to_forbid_unknown_keys_are_told(self) -> None:
        new = edited("event.gap")
        new["additionalProperties"] = False
        assert len(broken("event.gap", new)) == 1

    def test_better_words_are_not_a_change(self) -> None:
        new = edited("event.gap")
        new["description"] = "Said better."
        assert broken("event.gap", new) == []


WORDS = (
    *("manifest", "meta", "DIRECT", "INDIRECT", "IDENTITY", "TRANSFORMATION", "AGGREGATION"),
    *("JOIN", "GROUP_BY", "FILTER", "SORT", "WINDOW", "CONDITIONAL"),
    *("adapter", "catalog", "contract", "inferred", "documented"),
    *("code", "inputs", "relation", "materialized", "exposures", "added", "removed", "changed"),
    *("pass", "runtime error"),
)
"""Of lineage and asset events, where a field is a text and not a closed list."""


def test_the_readme_names_every_word_of_the_contract() -> None:
    """Statuses, codes, reasons, events, headers and limits are those of the code."""
    readme = (SCHEMAS / "README.md").read_text(encoding="utf-8")
    quoted = set(re.findall(r"`([^`\n]+)`", readme))
    wanted = {
        *statuses.NodeStatus,
        *statuses.RunStatus,
        *statuses.Reason,
        *messages.RejectCode,
        *statuses.ColumnLineageStatus,
        *(name.removeprefix("event.") for name in EVENTS),
        *asyncapi_facts.EVENT_HEADERS,
        *asyncapi_facts.JETSTREAM["streams"],
        subjects.LINEAGE_BUCKET,
        *(key for key in asyncapi_facts.JETSTREAM["buckets"][subjects.LINEAGE_BUCKET]["keys"]),
        *WORDS,
    }
    assert wanted - quoted == set()
    assert messages.MAX_REQUEST_BYTES == 256 * 1024
    assert "Limits: 256 KiB in all, 1000 args, 64 KiB of `vars`" in readme


def every_field(schema: dict[str, Any]) -> Iterator[tuple[str | None, str]]:
    """(the definition that has it, or None for the message itself; the field's name)."""
    for place, described in {None: schema, **schema.get("$defs", {})}.items():
        for field in described.get("properties", {}):
            yield place, field


def properties(schema: dict[str, Any], place: str | None) -> dict[str, Any]:
    described = schema if place is None else schema["$defs"][place]
    found: dict[str, Any] = described["properties"]
    return found


def edited(name: str) -> dict[str, Any]:
    return copy.deepcopy(schema_of(name))


def broken(name: str, new: dict[str, Any]) -> list[str]:
    return incompatibilities(schema_of(name), new)


# -- the command -------------------------------------------------------------------------------


def test_the_command_writes_nothing_over_schemas_that_the_code_breaks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that the committed schemas cannot lose a field by being generated anew."""
    older = schema_of("event.asset.failed")
    older["properties"]["verdict"] = {"type": "string"}
    path = tmp_path / "event.asset.failed.json"
    path.write_text(json.dumps(older))

    assert commands.schema(output=tmp_path, compare=None) == 1
    assert capsys.readouterr().out.splitlines()[0] == (
        "event.asset.failed.json breaks v1: verdict is gone"
    )
    assert [*tmp_path.iterdir()] == [path]

    path.unlink()
    assert commands.schema(output=tmp_path, compare=None) == 0
    assert commands.schema(output=None, compare=tmp_path) == 0


def test_printed_it_is_all_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.schema(output=None, compare=None) == 0
    rest, printed = capsys.readouterr().out, []
    while rest:
        value, end = json.JSONDecoder().raw_decode(rest)
        printed.append(value)
        rest = rest[end:].lstrip()
    assert len(printed) == len(CONTRACT) + len(EXAMPLES) + 1
    assert any(value.get("asyncapi") == "3.0.0" for value in printed)
