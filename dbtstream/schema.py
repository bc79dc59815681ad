"""The contract as JSON Schema: what `schemas/` holds, generated from the Structs themselves.

One schema (2020-12) and one example per message of `messages` and event of `events`, and the
document of `asyncapi`; the examples come from `schema_examples`. `check_schemas` says where the
folder and the code have drifted apart, and `incompatibilities` whether a drift breaks v1: a
field of v1 is never removed or retyped. Pure, except that the directory functions touch the
directory that they are given. It never fetches anything: a `$id` is a name.
"""

import inspect
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import msgspec

from dbtstream import asyncapi, events, messages
from dbtstream.event_base import VERSION
from dbtstream.schema_examples import EXAMPLES
from dbtstream.yaml_text import to_yaml

DIALECT = "https://json-schema.org/draft/2020-12/schema"
ID_PREFIX = f"urn:dbtstream:v{VERSION}:"
EXAMPLES_DIR = "examples"

MESSAGES: dict[str, type[msgspec.Struct]] = {
    "request.run": messages.RunRequest,
    "request.submit": messages.SubmitRequest,
    "request.cancel": messages.CancelRequest,
    "request.get": messages.GetRequest,
    "request.list": messages.ListRequest,
    "request.worker_status": messages.WorkerStatusRequest,
    "reply.run_accepted": messages.RunAccepted,
    "reply.run_rejected": messages.RunRejected,
    "reply.cancel_accepted": messages.CancelAccepted,
    "reply.run_view": messages.RunView,
    "reply.run_list": messages.RunList,
    "reply.worker_status": messages.WorkerStatus,
    "reply.error": messages.ControlError,
}

EVENTS: dict[str, type[msgspec.Struct]] = {
    f"event.{kind.__struct_config__.tag}": kind for kind in get_args(events.AnyEvent)
}

CONTRACT = MESSAGES | EVENTS
"""File name without its ending -> the Struct that the file describes."""

_LIMITS: dict[type[msgspec.Struct], dict[str, dict[str, Any]]] = {
    messages.RunRequest: {
        "args": {"minItems": 1, "maxItems": messages.MAX_ARGS},
        "labels": {"maxProperties": messages.MAX_LABELS},
        "timeout_s": {"exclusiveMinimum": 0},
        "silence_timeout_s": {"exclusiveMinimum": 0},
    },
}
"""Of `messages.check_limits`, those that JSON Schema can say (it counts characters, not bytes)."""

Schema = dict[str, Any]


def schema_of(name: str) -> Schema:
    """The schema of one message or event, complete in itself."""
    kind = CONTRACT[name]
    _, components = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    structs = {found.cls.__name__: found for found in _structs(msgspec.inspect.type_info(kind))}
    for component, schema in components.items():
        if "description" in schema:
            schema["description"] = inspect.cleandoc(schema["description"])
        if component in structs:
            _refine(schema, structs[component])
    root = components.pop(kind.__name__)
    schema = {"$schema": DIALECT, "$id": f"{ID_PREFIX}{name}", **root}
    # Said, not only implied: a reader must let unknown fields of an event or reply pass.
    schema.setdefault("additionalProperties", True)
    if components:
        schema["$defs"] = dict(sorted(components.items()))
    return schema


def write_schemas(directory: Path) -> list[Path]:
    """Make the folder what the code says; the paths that were written. README.md is not ours."""
    written = []
    for relative, text in _files().items():
        path = directory / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def check_schemas(directory: Path) -> list[str]:
    """Each drift between the folder and the code as a sentence; [] if there is none."""
    wanted = _files()
    found = {
        path.relative_to(directory).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted([*directory.rglob("*.json"), *directory.rglob("*.yaml")])
    }
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} describes nothing in the code" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        if wanted[name] == found[name]:
            continue
        problems.append(f"{name} is not what the code generates")
        if name.removesuffix(".json") in CONTRACT:
            problems += _breaks(name, found[name], wanted[name])
    return sorted(problems)


def broken_promises(directory: Path) -> list[str]:
    """What in the schemas there the code breaks, as sentences: not to be written over."""
    problems = []
    for name in CONTRACT:
        path = directory / f"{name}.json"
        if path.is_file():
            old = path.read_text(encoding="utf-8")
            problems += _breaks(path.name, old, _pretty(schema_of(name)))
    return problems


def incompatibilities(old: Schema, new: Schema) -> list[str]:
    """What in `new` breaks those who rely on `old`, as sentences; [] if nothing does.

    A request (a schema that forbids unknown keys) must still be accepted, an event or reply
    must still be understood, and old ones must still decode: no field goes, changes its type
    or its default, or comes without one; a closed list only grows where we are who reads it.
    """
    before, now = _flatten(old, old), _flatten(new, new)
    request = old.get("additionalProperties") is False
    problems = []
    for path, field in before.items():
        if path not in now:
            problems.append(f"{path} is gone")
        else:
            problems += [f"{path} {p}" for p in _field_breaks(field, now[path], request=request)]
    for path, field in now.items():
        parent = path.rpartition(".")[0] or _ROOT
        if path not in before and parent in before and field.required:
            problems.append(f"{path} is new and has no default")
    return problems


def documents() -> dict[str, Any]:
    """Relative path -> JSON value, of everything generated."""
    schemas = {f"{name}.json": schema_of(name) for name in CONTRACT}
    examples = {
        f"{EXAMPLES_DIR}/{name}.json": json.loads(msgspec.json.encode(example))
        for name, example in EXAMPLES.items()
    }
    return schemas | examples | {asyncapi.FILE: asyncapi.asyncapi_document(CONTRACT, EXAMPLES)}


def _files() -> dict[str, str]:
    """Relative path -> content."""
    return {
        path: to_yaml(value) if path == asyncapi.FILE else _pretty(value)
        for path, value in documents().items()
    }


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _breaks(name: str, old: str, new: str) -> list[str]:
    try:
        before = json.loads(old)
    except ValueError:
        return [f"{name} is not JSON"]
    broken = incompatibilities(before, json.loads(new))
    return [f"{name} breaks v{VERSION}: {problem}" for problem in broken]


def _structs(kind: msgspec.inspect.Type) -> Iterator[msgspec.inspect.StructType]:
    """A Struct and those inside it."""
    match kind:
        case msgspec.inspect.StructType():
            yield kind
            for field in kind.fields:
                yield from _structs(field.type)
        case msgspec.inspect.UnionType():
            for choice in kind.types:
                yield from _structs(choice)
        case msgspec.inspect.ListType():
            yield from _structs(kind.item_type)
        case msgspec.inspect.DictType():
            yield from _structs(kind.value_type)


def _refine(schema: Schema, struct: msgspec.inspect.StructType) -> None:
    """Say of a Struct what msgspec leaves out: the form of times, and our limits."""
    limits = _LIMITS.get(struct.cls, {})
    for field in struct.fields:
        property_ = schema["properties"][field.encode_name]
        choices = property_.get("anyOf", [property_])
        types = field.type.types if isinstance(field.type, msgspec.inspect.UnionType) else ()
        if any(isinstance(t, msgspec.inspect.DateTimeType) for t in (field.type, *types)):
            choices[0]["format"] = "date-time"
        choices[0].update(limits.get(field.name, {}))


@dataclass(frozen=True, slots=True)
class _Field:
    """What a sender or reader relies on, of one field."""

    types: frozenset[str]
    words: frozenset[str]  # the closed list, if it is one
    required: bool
    default: Any
    rules: dict[str, Any]


_ROOT = "the message"
_RULES = ("minItems", "maxItems", "maxProperties", "exclusiveMinimum", "format")


def _flatten(
    schema: Schema, root: Schema, path: str = _ROOT, *, required: bool = True
) -> dict[str, _Field]:
    """Every field by its path: `node.tags[]`, `counts.*.*`. Our schemas are not recursive."""
    schema = _resolve(schema, root)
    choices = [_resolve(choice, root) for choice in schema.get("anyOf", [schema])]
    fields = {
        path: _Field(
            types=frozenset(choice.get("type", "string") for choice in choices),
            words=frozenset(word for choice in choices for word in choice.get("enum", ())),
            required=required,
            default=schema.get("default"),
            rules={key: choice[key] for choice in choices for key in _RULES if key in choice}
            | {"unknown keys": choices[0].get("additionalProperties") is not False},
        )
    }
    for choice in choices:
        inner = "" if path == _ROOT else f"{path}."
        for name, sub in choice.get("properties", {}).items():
            is_required = name in choice.get("required", ())
            fields |= _flatten(sub, root, f"{inner}{name}", required=is_required)
        for key, label in (("items", "[]"), ("additionalProperties", ".*")):
            if isinstance(choice.get(key), dict):
                fields |= _flatten(choice[key], root, f"{path}{label}", required=False)
    return fields


def _resolve(schema: Schema, root: Schema) -> Schema:
    if "$ref" not in schema:
        return schema
    target: Schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    return target | schema


def _field_breaks(old: _Field, new: _Field, *, request: bool) -> Iterator[str]:
    if old.types != new.types:
        yield f"was {_or(old.types)} and is {_or(new.types)}"
    if bool(old.words) != bool(new.words):
        yield "became a closed list" if new.words else "is no longer a closed list"
    elif gone := old.words - new.words:
        yield f"may no longer be {_or(gone)}"
    elif (more := new.words - old.words) and not request:
        yield f"may now be {_or(more)}, and its list was closed"
    if new.required and not old.required:
        yield "must now be given"
    if not request and old.required and not new.required:
        yield "may now be absent"
    if not old.required and not new.required and old.default != new.default:
        yield f"had the default {old.default!r} and has {new.default!r}"
    if old.rules != new.rules:
        yield f"followed the rules {old.rules} and follows {new.rules}"


def _or(words: Iterable[str]) -> str:
    return " or ".join(sorted(words))
