"""asyncapi.yaml is a valid AsyncAPI 3 document, and says of NATS what the code does."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import nats.micro.service
import pytest
import yaml  # type: ignore[import-untyped]  # dbt brings it

from dbtstream import dead_letters, events, subjects
from dbtstream.asyncapi import FILE, asyncapi_breaks, asyncapi_document
from dbtstream.asyncapi_facts import BROADCASTS, JETSTREAM
from dbtstream.config import StreamsConfig
from dbtstream.schema import CONTRACT, EVENTS
from dbtstream.schema_examples import EXAMPLES
from dbtstream.streams import wanted_streams
from dbtstream.yaml_text import to_yaml
from tests.contract.validators import HERE, SCHEMAS
from tests.node import run_script

Document = dict[str, Any]
DOCUMENT = asyncapi_document(CONTRACT, EXAMPLES)

HARMLESS = {"asyncapi-latest-version": "3.0.0 is what most tools read"}
"""What the parser may say of our document, and why it stays."""


def diagnostics(*paths: Path) -> list[list[dict[str, str]]]:
    """Of each document, what @asyncapi/parser says."""
    said = json.loads(run_script(HERE / "asyncapi.mjs", *map(str, paths)))
    return [each["diagnostics"] for each in said]


def test_the_committed_document_is_what_the_code_says_and_what_yaml_readers_read() -> None:
    assert yaml.safe_load((SCHEMAS / FILE).read_text("utf-8")) == DOCUMENT


def test_the_parser_has_nothing_against_it() -> None:
    (said,) = diagnostics(SCHEMAS / FILE)
    assert [each for each in said if each["code"] not in HARMLESS] == []
    assert {each["severity"] for each in said} <= {"info"}


def without_a_parameter(document: Document) -> None:
    del document["channels"]["events"]["parameters"]["kind"]


def with_a_wrong_action(document: Document) -> None:
    document["operations"]["tellEvent"]["action"] = "publish"


def with_an_unknown_binding(document: Document) -> None:
    document["operations"]["submit"]["bindings"]["nats"]["stream"] = "DBT_EVENTS"


def without_a_payload_file(document: Document) -> None:
    document["components"]["messages"]["event.gap"]["payload"]["schema"]["$ref"] = "./lost.json"


def with_a_message_that_is_nowhere(document: Document) -> None:
    messages = document["channels"]["events"]["messages"]
    messages["event.gap"]["$ref"] = "#/components/messages/event.lost"


BREAKAGES = [
    without_a_parameter,
    with_a_wrong_action,
    with_an_unknown_binding,
    without_a_payload_file,
    with_a_message_that_is_nowhere,
]


def test_the_parser_finds_what_is_wrong_so_its_silence_means_something(tmp_path: Path) -> None:
    paths = []
    for number, breakage in enumerate(BREAKAGES):
        broken = copy.deepcopy(DOCUMENT)
        breakage(broken)
        folder = tmp_path / str(number)
        shutil.copytree(SCHEMAS, folder)
        paths.append(folder / FILE)
        paths[-1].write_text(to_yaml(broken), "utf-8")
    for breakage, said in zip(BREAKAGES, diagnostics(*paths), strict=True):
        assert "error" in {each["severity"] for each in said}, breakage.__name__


# -- what it says of NATS ----------------------------------------------------------------------


def test_every_message_of_the_contract_is_in_a_channel() -> None:
    channels = DOCUMENT["channels"]
    assert {name for each in channels.values() for name in each["messages"]} == {
        *CONTRACT,
        "dead_request",
    }
    for name in ("events", "live"):
        assert set(channels[name]["messages"]) == set(EVENTS)


def test_addresses_are_those_that_the_code_makes() -> None:
    channels = DOCUMENT["channels"]
    assert channels["runs"]["address"] == subjects.runs_subject("{project}", "{target}")
    for channel in channels.values():
        tokens = re.findall(r"{(\w+)}", channel["address"] or "")
        assert tokens == list(channel.get("parameters", ()))
    for name in ("events", "live"):
        assert channels[name]["address"].count(".") == 7


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.startswith("event.")])
def test_an_event_is_published_where_its_x_subject_says(name: str) -> None:
    event: Any = EXAMPLES[name]
    message = DOCUMENT["components"]["messages"][f"event.{events.event_type(event)}"]
    pattern = re.sub(r"{\w+}", "[^.]+", message["x-subject"].replace(".", r"\."))
    for command in ("build", "_"):
        assert re.fullmatch(pattern, subjects.event_subject(event, command=command))
    # What is in braces is what the payload says.
    value = json.loads(events.encode_event(event))
    value = {**value.get("node", {}), **value, "command": "build"}
    told = re.sub(r"{(\w+)}", lambda found: subjects.token(value[found[1]]), message["x-subject"])
    assert told == subjects.event_subject(event, command="build")


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.startswith("event.")])
def test_the_headers_of_an_event_are_those_of_the_trait(name: str) -> None:
    event: Any = EXAMPLES[name]
    components = DOCUMENT["components"]
    trait = components["messageTraits"]["cloudEvent"]["headers"]
    own = components["messages"][f"event.{events.event_type(event)}"]["headers"]
    headers = subjects.event_headers(event, tracestate="a=b")
    for schema in (trait, own):
        jsonschema.Draft202012Validator(schema).validate(headers)
    assert set(headers) <= set(trait["properties"])
    if name == "event.asset.failed":
        assert set(headers) == set(trait["properties"])


def test_headers_of_dead_letters_are_those_that_the_code_writes() -> None:
    written = {
        value
        for name, value in vars(dead_letters).items()
        if name.startswith("H_") and name not in ("H_MSG_ID", "H_TRACEPARENT", "H_TRACESTATE")
    }
    assert set(DOCUMENT["components"]["messages"]["dead_request"]["headers"]["properties"]) == (
        written
    )


def test_control_operations_answer_in_the_queue_of_the_micro_service() -> None:
    queue = nats.micro.service.DEFAULT_QUEUE_GROUP
    for verb in ("submit", "cancel", "get", "list"):
        operation = DOCUMENT["operations"][verb]
        assert DOCUMENT["channels"][verb]["address"] == f"dbt.control.{verb}"
        assert operation["bindings"]["nats"]["queue"] == queue
        assert len(operation["reply"]["messages"]) > 1


def test_what_is_asked_of_all_workers_is_answered_in_no_queue() -> None:
    """So every one of them gets it (`integration/test_top.py`)."""
    assert {name: subject for name, (subject, _, _) in BROADCASTS.items()} == {
        "worker_status": subjects.CONTROL_STATUS
    }
    operation = DOCUMENT["operations"]["worker_status"]
    assert DOCUMENT["channels"]["worker_status"]["address"] == subjects.CONTROL_STATUS
    assert "bindings" not in operation
    assert operation["reply"]["messages"] == [
        {"$ref": "#/channels/replies/messages/reply.worker_status"}
    ]


def test_streams_are_what_setup_makes_by_default() -> None:
    wanted = {each.name: each.needed | each.sized for each in wanted_streams(StreamsConfig())}
    for name, told in JETSTREAM["streams"].items():
        for key, value in told.items():
            if key == "message_id":
                continue
            if key.endswith("_s"):
                assert wanted[name][key.removesuffix("_s")] == value * 1_000_000_000, (name, key)
            else:
                assert wanted[name][key] == value, (name, key)
    graph = wanted.get(f"KV_{subjects.LINEAGE_BUCKET}", {})
    assert not graph.get("max_age"), "the graph is kept for as long as the bucket is there"
    state = wanted[f"KV_{subjects.STATE_BUCKET}"]
    told = JETSTREAM["buckets"][subjects.STATE_BUCKET]
    assert state["max_age"] == told["max_age_s"] * 1_000_000_000


def test_keys_of_the_lineage_bucket_are_those_of_the_code() -> None:
    names = ("<project>", "<target>", "model.shop.orders")
    told = {
        key.replace("<unique_id>", "model.shop.orders")
        for key in JETSTREAM["buckets"][subjects.LINEAGE_BUCKET]["keys"]
    }
    assert told == {subjects.declared_key(*names), subjects.observed_key(*names)}
    assert {
        kind for bucket in JETSTREAM["buckets"].values() for kind in bucket["keys"].values()
    } <= set(CONTRACT)


# -- what may not change -----------------------------------------------------------------------


def gone_channel(document: Document) -> None:
    del document["channels"]["dead"]


def moved_channel(document: Document) -> None:
    document["channels"]["live"]["address"] = "dbt.now.{project}"
    del document["channels"]["live"]["parameters"]["kind"]


def gone_message(document: Document) -> None:
    del document["channels"]["events"]["messages"]["event.asset.failed"]


def other_payload(document: Document) -> None:
    messages = document["components"]["messages"]
    messages["event.gap"]["payload"]["schema"]["$ref"] = "./event.log.json"
    messages["event.log"]["x-subject"] = "dbt.events.log"


def gone_headers(document: Document) -> None:
    headers = document["components"]["messageTraits"]["cloudEvent"]["headers"]
    del headers["properties"]["dbtstream-matches"]
    headers["required"].remove("ce-id")


def gone_operation(document: Document) -> None:
    del document["operations"]["get"]
    document["operations"]["list"]["reply"]["messages"].pop()


def other_streams(document: Document) -> None:
    document["x-jetstream"]["streams"]["DBT_EVENTS"]["retention"] = "interest"
    del document["x-jetstream"]["buckets"]["dbt_lineage"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (gone_channel, ["channel dead is gone", "message dead_request of channel dead is gone"]),
        (
            moved_channel,
            ["channel live was dbt.live.{project}", "parameter kind of channel live is gone"],
        ),
        (gone_message, ["message event.asset.failed of channel events is gone"]),
        (
            other_payload,
            ["the payload of message event.gap was", "the x-subject of message event.log was"],
        ),
        (
            gone_headers,
            ["header dbtstream-matches of cloudEvent is gone", "header ce-id of every cloudEvent"],
        ),
        (gone_operation, ["operation get is gone", "of operation list is gone"]),
        (
            other_streams,
            ["stream DBT_EVENTS was limits", "key declared.<project>.<target>.<unique_id> of"],
        ),
    ],
)
def test_what_breaks_a_reader_of_the_document_is_told(
    change: Callable[[Document], None], told: list[str]
) -> None:
    new = copy.deepcopy(DOCUMENT)
    change(new)
    problems = asyncapi_breaks(DOCUMENT, new)
    for sentence in told:
        assert any(sentence in problem for problem in problems), problems


def test_what_is_new_and_better_words_break_nobody() -> None:
    new = copy.deepcopy(DOCUMENT)
    new["channels"]["events"]["messages"]["event.new"] = {"$ref": "#/components/messages/event.gap"}
    new["channels"]["more"] = {"address": "dbt.more", "messages": {}}
    new["components"]["messageTraits"]["cloudEvent"]["headers"]["properties"]["ce-x"] = {}
    new["channels"]["events"]["description"] = "Said better."
    assert asyncapi_breaks(DOCUMENT, new) == []
    assert asyncapi_breaks(DOCUMENT, DOCUMENT) == []
