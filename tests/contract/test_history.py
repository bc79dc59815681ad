"""Nothing that was ever committed to `schemas/` is broken by the code, whoever writes it anew."""

import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import PurePath

import pytest
import yaml  # type: ignore[import-untyped]  # dbt brings it

from dbtstream.asyncapi import FILE, asyncapi_breaks, asyncapi_document
from dbtstream.schema import CONTRACT, incompatibilities, schema_of
from dbtstream.schema_examples import EXAMPLES
from tests.contract.validators import SCHEMAS

ROOT = SCHEMAS.parent

BEFORE_THE_FIRST_RELEASE = {
    "event.node.finished: reason may now be handed_over, and its list was closed",
}
"""What was changed while nobody could have read it yet."""


def git(*args: str) -> bytes:
    return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, check=True).stdout


def commits() -> list[str]:
    """Those that changed the schemas; of a shallow clone, those that are there."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository here: there is no history to compare with")
    return git("rev-list", "HEAD", "--", "schemas").decode().split()


def files(commit: str) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(git("archive", commit, "schemas"))) as archive:
        for member in archive.getmembers():
            found = archive.extractfile(member) if member.isfile() else None
            if found is not None and PurePath(member.name).parent.name == "schemas":
                yield PurePath(member.name).name, found.read()


def broken_by_the_code(name: str, data: bytes) -> list[str]:
    if name == FILE:
        document = asyncapi_document(CONTRACT, EXAMPLES)
        return [f"{FILE}: {each}" for each in asyncapi_breaks(yaml.safe_load(data), document)]
    stem, json_, _ = name.partition(".json")
    if not json_:
        return []
    if stem not in CONTRACT:
        return [f"{stem} is gone"]
    return [f"{stem}: {each}" for each in incompatibilities(json.loads(data), schema_of(stem))]


def test_no_schema_of_any_commit_is_broken() -> None:
    problems = {
        problem
        for commit in commits()
        for name, data in files(commit)
        for problem in broken_by_the_code(name, data)
    }
    assert problems - BEFORE_THE_FIRST_RELEASE == set()


def test_it_would_find_what_is_gone_or_another() -> None:
    """What an older commit might have had and the code has not."""
    older = schema_of("event.asset.checked")
    older["properties"]["verdict"] = {"type": "string"}
    older["$defs"]["CheckBlock"]["properties"]["failures"] = {"type": "string", "default": None}
    assert broken_by_the_code("event.asset.checked.json", json.dumps(older).encode()) == [
        "event.asset.checked: check.failures was string and is integer or null",
        "event.asset.checked: verdict is gone",
    ]
    assert broken_by_the_code("event.asset.lost.json", b"{}") == ["event.asset.lost is gone"]

    document = asyncapi_document(CONTRACT, EXAMPLES)
    document["channels"]["pulse"] = {"address": "dbt.pulse", "messages": {}}
    assert broken_by_the_code(FILE, json.dumps(document).encode())[0] == (
        "asyncapi.yaml: channel pulse is gone"
    )
