"""The contract as an AsyncAPI 3 document: `schemas/asyncapi.yaml`. Pure.

Who sends what on which subject, with which headers, and what the server does with it. Payloads
are the JSON Schemas beside it, by reference; `schema` writes and compares the file. Operations
are told from dbtstream's side: it receives requests and sends events. What AsyncAPI has no words
for (streams, duplicates, buckets) is in `x-` extensions, from `asyncapi_facts`.
`asyncapi_breaks` says what in a newer document breaks those who rely on an older one.
"""

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from dbtstream import asyncapi_facts as facts
from dbtstream import events, subjects
from dbtstream.event_base import VERSION, Event
from dbtstream.schema_story import ARGS

Document = dict[str, Any]
Kinds = Mapping[str, type[msgspec.Struct]]
Examples = Mapping[str, msgspec.Struct]

FILE = "asyncapi.yaml"

_SCHEMA_FORMAT = "application/schema+json;version=2020-12"
_DEAD_REQUEST = "dead_request"


def asyncapi_document(kinds: Kinds, examples: Examples) -> Document:
    """`kinds` and `examples` are `schema.CONTRACT` and `schema_examples.EXAMPLES`."""
    return {
        "asyncapi": "3.0.0",
        "id": f"urn:dbtstream:v{VERSION}",
        "info": {
            "title": "dbtstream",
            "version": str(VERSION),
            "description": facts.DESCRIPTION,
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": events.JSON,
        "servers": {"nats": _server()},
        "channels": _channels(kinds),
        "operations": _operations(),
        "x-jetstream": facts.JETSTREAM,
        "components": {
            "securitySchemes": facts.SECURITY,
            "parameters": facts.PROJECT_TARGET | facts.EVENT_TOKENS,
            "messageTraits": {
                "cloudEvent": {"headers": _headers(facts.EVENT_HEADERS, needed=True)},
                "request": {"headers": _headers(facts.REQUEST_HEADERS)},
            },
            "messages": {name: _message(name, kinds, examples) for name in kinds}
            | {_DEAD_REQUEST: _dead_request()},
        },
    }


def _server() -> Document:
    return {
        "host": "127.0.0.1:4222",
        "protocol": "nats",
        "description": "Yours: nats-server 2.12 or newer with JetStream.",
        "security": [_ref("components/securitySchemes", name) for name in facts.SECURITY],
    }


def _channels(kinds: Kinds) -> Document:
    event_names = [name for name in kinds if name.startswith("event.")]
    place = facts.PROJECT_TARGET
    channels = {
        "runs": _channel(
            subjects.RUNS, facts.RUNS_CHANNEL, ["request.run"], place, subjects.RUNS_STREAM
        ),
        "events": _channel(
            subjects.EVENTS,
            facts.EVENTS_CHANNEL,
            event_names,
            place | facts.EVENT_TOKENS,
            subjects.EVENTS_STREAM,
        ),
        "live": _channel(
            subjects.LIVE, facts.LIVE_CHANNEL, event_names, place | facts.EVENT_TOKENS
        ),
        "dead": _channel(
            subjects.DEAD, facts.DEAD_CHANNEL, [_DEAD_REQUEST], place, subjects.DEAD_STREAM
        ),
    }
    for verb, (what, _) in facts.VERBS.items():
        channels[verb] = _channel(f"{subjects.CONTROL}.{verb}", what, [f"request.{verb}"])
    for name, (subject, what, _) in facts.BROADCASTS.items():
        channels[name] = _channel(subject, what, [f"request.{name}"])
    replies = [name for name in kinds if name.startswith("reply.")]
    channels["replies"] = _channel(None, facts.REPLIES_CHANNEL, replies)
    return channels


def _channel(
    begin: str | None,
    description: str,
    names: list[str],
    parameters: Mapping[str, Document] | None = None,
    stream: str = "",
) -> Document:
    """Its address is `begin` and a token for each parameter."""
    tokens = [f"{{{name}}}" for name in parameters or ()]
    channel: Document = {
        "address": None if begin is None else ".".join((begin, *tokens)),
        "description": description,
    }
    if parameters:
        channel["parameters"] = {name: _ref("components/parameters", name) for name in parameters}
    if stream:
        channel["x-jetstream-stream"] = stream
    channel["messages"] = {name: _ref("components/messages", name) for name in names}
    return channel


def _operations() -> Document:
    operations = {
        "runRequest": _operation("receive", "runs", "Run dbt: one request, one run."),
        "tellEvent": _operation("send", "events", "Say what a run or a node did."),
        "republishEvent": _operation("send", "live", "The server's copy of what it has stored."),
        "keepDeadRequest": _operation("send", "dead", "Keep what could not run."),
    }
    for verb, (what, replies) in facts.VERBS.items():
        queue = {"nats": {"queue": facts.CONTROL_QUEUE, "bindingVersion": "0.1.0"}}
        answered = {"bindings": queue, "reply": _reply(replies)}
        operations[verb] = _operation("receive", verb, what) | answered
    for name, (_, what, replies) in facts.BROADCASTS.items():
        operations[name] = _operation("receive", name, what) | {"reply": _reply(replies)}
    return operations


def _reply(names: Iterable[str]) -> Document:
    return {
        "channel": _ref("channels", "replies"),
        "messages": [_ref("channels/replies/messages", name) for name in names],
    }


def _operation(action: str, channel: str, summary: str) -> Document:
    return {"action": action, "channel": _ref("channels", channel), "summary": summary}


def _message(name: str, kinds: Kinds, examples: Examples) -> Document:
    kind = kinds[name]
    family, _, word = name.partition(".")
    message: Document = {
        "name": word if family == "event" else name,
        "title": kind.__name__,
        "summary": " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split()),
        "contentType": events.JSON,
    }
    if family == "event":
        message["traits"] = [_ref("components/messageTraits", "cloudEvent")]
        message["headers"] = {
            "type": "object",
            "properties": {"ce-type": {"const": f"dev.dbtstream.{word}.v{VERSION}"}},
        }
        message["x-subject"] = f"{subjects.EVENTS}.{{project}}.{{target}}.{facts.tail(word)}"
    elif name in ("request.run", "request.submit"):
        message["traits"] = [_ref("components/messageTraits", "request")]
    return message | {
        "payload": {"schemaFormat": _SCHEMA_FORMAT, "schema": {"$ref": f"./{name}.json"}},
        "examples": [
            _example(other, example)
            for other, example in examples.items()
            if other == name or (other not in kinds and other.rpartition(".")[0] == name)
        ],
    }


def _example(name: str, message: msgspec.Struct) -> Document:
    example: Document = {"name": name}
    if isinstance(message, Event):
        event: Any = message  # each Event is one of `events.AnyEvent`
        command = "_" if isinstance(event, events.RunRejected) else ARGS[0]
        example["summary"] = f"on {subjects.event_subject(event, command=command)}"
        example["headers"] = subjects.event_headers(event)
    return example | {"payload": json.loads(msgspec.json.encode(message))}


def _dead_request() -> Document:
    return {
        "name": _DEAD_REQUEST,
        "title": "DeadRequest",
        "summary": "The bytes of a request that could not run, whatever they are.",
        "contentType": "application/octet-stream",
        "headers": _headers(facts.DEAD_HEADERS),
    }


def _headers(described: Mapping[str, str], *, needed: bool = False) -> Document:
    properties = {name: {"type": "string", "description": text} for name, text in described.items()}
    schema: Document = {"type": "object", "properties": properties}
    if needed:
        schema["required"] = [name for name in described if name not in facts.SOMETIMES]
    return schema


def _ref(place: str, name: str) -> dict[str, str]:
    return {"$ref": f"#/{place}/{name}"}


def asyncapi_breaks(old: Document, new: Document) -> list[str]:
    """What somebody who has read `old` relies on and `new` has no longer, as sentences.

    New channels, messages, headers and keys are no break. Payloads are `incompatibilities`'.
    """
    now = dict(_promises(new))
    problems = []
    for what, value in _promises(old):
        if what not in now:
            problems.append(f"{what} is gone")
        elif now[what] != value:
            problems.append(f"{what} was {value} and is {now[what]}")
    return problems


def _promises(document: Document) -> Iterator[tuple[str, object]]:
    """What can be relied on, and with which value."""
    for key, channel in document["channels"].items():
        yield f"channel {key}", channel["address"]
        yield f"the stream of channel {key}", channel.get("x-jetstream-stream")
        for name in channel.get("parameters", ()):
            yield f"parameter {name} of channel {key}", "there"
        for name, message in channel["messages"].items():
            yield f"message {name} of channel {key}", message["$ref"]
    for key, operation in document["operations"].items():
        yield f"operation {key}", f"{operation['action']} {operation['channel']['$ref']}"
        for message in operation.get("reply", {}).get("messages", ()):
            yield f"reply {message['$ref']} of operation {key}", "there"
    components = document["components"]
    for name, message in components["messages"].items():
        yield f"the payload of message {name}", message.get("payload", {}).get("schema")
        for part in ("contentType", "x-subject", "traits"):
            yield f"the {part} of message {name}", message.get(part)
    for name, described in (components["messages"] | components["messageTraits"]).items():
        headers = described.get("headers", {})
        for header, schema in headers.get("properties", {}).items():
            yield f"header {header} of {name}", schema.get("const", schema.get("type"))
        for header in headers.get("required", ()):
            yield f"header {header} of every {name}", "there"
    for name, stream in document["x-jetstream"]["streams"].items():
        yield f"stream {name}", f"{stream['retention']} of {stream['subjects']}"
    for name, bucket in document["x-jetstream"]["buckets"].items():
        for key, value in bucket["keys"].items():
            yield f"key {key} of bucket {name}", value
