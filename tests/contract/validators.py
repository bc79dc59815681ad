"""What two validators that know nothing of our code say of our messages."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema

from tests.node import run_script

HERE = Path(__file__).parent
SCHEMAS = HERE.parents[1] / "schemas"


def validate_events(payloads: Iterable[bytes]) -> list[str]:
    """What is wrong in stored events by the committed schemas of their types, as sentences."""
    values = [json.loads(payload) for payload in payloads]
    return validate((f"event.{value['type']}", value) for value in values)


def validate(messages: Iterable[tuple[str, Any]]) -> list[str]:
    """(name of a schema, JSON value): what jsonschema and ajv find wrong in each."""
    listed = list(messages)
    return [*_by_jsonschema(listed), *_by_ajv(listed)]


def _by_jsonschema(messages: list[tuple[str, Any]]) -> Iterable[str]:
    checks: dict[str, Any] = {}
    for number, (name, value) in enumerate(messages):
        if name not in checks:
            path = SCHEMAS / f"{name}.json"
            if not path.is_file():
                yield f"jsonschema: message {number}: there is no schema {name}"
                continue
            checks[name] = jsonschema.Draft202012Validator(json.loads(path.read_text("utf-8")))
        for error in checks[name].iter_errors(value):
            yield f"jsonschema: message {number}, {name}: {error.json_path} {error.message}"


def _by_ajv(messages: list[tuple[str, Any]]) -> Iterable[str]:
    """One Node process for all of them."""
    lines = (json.dumps({"schema": name, "value": value}) for name, value in messages)
    said = run_script(HERE / "ajv.mjs", str(SCHEMAS), stdin="\n".join(lines))
    for found in json.loads(said):
        name, _ = messages[found["line"]]
        yield f"ajv: message {found['line']}, {name}: {found['problem']}"
