"""`dbt-ol`, OpenLineage's own dbt integration: running it, and comparing its edges with ours.

It is installed for development only. What it reports is taken as a claim about tables: an edge to
or from a table that is not there (it makes up some, see `test_openlineage_known_errors`) is
traced to the tables that are, by dbt's own manifest.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.openlineage_events import Json, edges


@dataclass
class Tables:
    """Of a manifest, by `database.schema.name`."""

    real: set[str] = field(default_factory=set)
    ephemeral: dict[str, set[str]] = field(default_factory=dict)  # -> the tables behind it
    called: dict[str, str] = field(default_factory=dict)  # a source by its logical name
    parents: dict[str, set[str]] = field(default_factory=dict)  # of what dbt builds

    @classmethod
    def of(cls, manifest: Json) -> "Tables":
        tables = cls()
        nodes: dict[str, Json] = manifest["nodes"] | manifest["sources"]
        for unique_id, node in nodes.items():
            if node["resource_type"] not in ("model", "seed", "snapshot", "source"):
                continue
            behind = {_name(nodes[each]) for each in _behind(manifest, nodes, unique_id)}
            if _ephemeral(node):
                tables.ephemeral[_name(node)] = behind
                continue
            if node["resource_type"] != "source":
                tables.parents[_name(node)] = behind
            tables.real.add(_name(node))
            if node["resource_type"] == "source":
                logical = f"{node['database']}.{node['schema']}.{node['name']}"
                tables.called[logical] = _name(node)
        return tables

    def behind(self, name: str) -> set[str]:
        name = self.called.get(name, name)
        return self.ephemeral.get(name) or ({name} & self.real)


def _ephemeral(node: Json) -> bool:
    return bool(node.get("config", {}).get("materialized") == "ephemeral")


def _name(node: Json) -> str:
    last = node.get("identifier") if node["resource_type"] == "source" else node.get("alias")
    return ".".join(filter(None, (node.get("database"), node.get("schema"), last)))


def _behind(manifest: Json, nodes: dict[str, Json], unique_id: str) -> set[str]:
    found: set[str] = set()
    for parent in manifest["parent_map"].get(unique_id, []):
        if parent in nodes:
            deeper = _ephemeral(nodes[parent])
            found |= _behind(manifest, nodes, parent) if deeper else {parent}
    return found


def missing_edges(ours: Iterable[Json], theirs: Iterable[Json], tables: Tables) -> set[Any]:
    """(input, output) that they report between tables that exist, and we do not."""
    claimed = {
        (real, output)
        for name, output in edges(theirs)
        if output in tables.real
        for real in tables.behind(name)
    }
    return claimed - edges(ours)


def missing_tested(ours: Iterable[Json], theirs: Iterable[Json], tables: Tables) -> set[str]:
    """Tables that tests of theirs have read, and none of ours."""

    def tested(messages: Iterable[Json]) -> set[str]:
        return {
            real
            for message in messages
            if message.get("eventType") in ("COMPLETE", "FAIL")
            and message["job"]["facets"].get("jobType", {}).get("jobType") == "TEST"
            for each in message["inputs"]
            for real in tables.behind(each["name"])
        }

    return tested(theirs) - tested(ours)


def run_dbt_ol(project: Path, *flags: str) -> list[Json]:
    """`dbt-ol build` with a file for its messages; what is in it afterwards. Blocking."""
    messages = project / "dbt-ol.jsonl"
    messages.unlink(missing_ok=True)
    (project / "openlineage.yml").write_text(
        f"transport:\n  type: file\n  log_file_path: {messages}\n  append: true\n",
        encoding="utf-8",
    )
    binaries = Path(sys.executable).parent
    done = subprocess.run(
        [binaries / "dbt-ol", "build", *flags],
        cwd=project,
        env={
            **os.environ,
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "OPENLINEAGE_CONFIG": str(project / "openlineage.yml"),
            "DBT_PROFILES_DIR": str(project),
            "DBT_SEND_ANONYMOUS_USAGE_STATS": "0",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert messages.is_file(), done.stdout + done.stderr
    return [json.loads(line) for line in messages.read_text(encoding="utf-8").splitlines()]
