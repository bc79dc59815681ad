"""The columns of a dataset: who says what they are, what has changed, how they are told. Pure.

Layer 1, used by `assets` and `build_columns`. A schema is as good as its source; documentation may
name only some columns, so it proves no change.
"""

import hashlib
from collections.abc import Iterable

import msgspec

from dbtstream.column_lineage import KnownColumn
from dbtstream.frames import PlannedNode
from dbtstream.lineage import documented
from dbtstream.lineage_events import Column, Retyped, SchemaChange

SOURCES = ("adapter", "catalog", "contract", "inferred", "documented")
"""Who says what columns there are, the best first."""


class Schema(msgspec.Struct, frozen=True, kw_only=True):
    """The columns of a dataset and who says so."""

    columns: list[KnownColumn]
    source: str


def schema_by_project(node: PlannedNode) -> Schema | None:
    """What the project itself says: its contract, a seed's header, or its documentation."""
    columns = [KnownColumn(name=c.name, type=c.data_type) for c in node.columns]
    if node.contract_enforced and columns:
        return Schema(columns=columns, source="contract")
    if node.header:
        types = {c.name.lower(): c.data_type for c in node.columns}
        header = [KnownColumn(name=name, type=types.get(name.lower())) for name in node.header]
        return Schema(columns=header, source="inferred")
    return Schema(columns=columns, source="documented") if columns else None


def weakest(sources: Iterable[str]) -> str | None:
    return max(sources, key=SOURCES.index, default=None)


def with_documentation(schema: Schema, node: PlannedNode) -> list[Column]:
    said = {column.name.lower(): column for column in documented(node) or ()}
    columns = []
    for column in schema.columns:
        words = said.get(column.name.lower())
        columns.append(
            Column(
                name=column.name,
                type=column.type,
                description=words.description if words else None,
                tags=words.tags if words else [],
            )
        )
    return columns


def documented_not_found(node: PlannedNode, schema: Schema) -> list[str]:
    """Columns that the YAML names and the dataset has not."""
    found = {column.name.lower() for column in schema.columns}
    return [column.name for column in node.columns if column.name.lower() not in found]


def schema_hash(schema: Schema) -> str:
    """SHA-256 over names and types in their order."""
    told = msgspec.json.encode([(c.name, (c.type or "").lower()) for c in schema.columns])
    return hashlib.sha256(told).hexdigest()


def schema_change(last: Schema, schema: Schema) -> SchemaChange | None:
    """Between two known schemas; documentation may name only some columns, so it tells nothing."""
    if "documented" in (last.source, schema.source):
        return None
    before = {column.name.lower(): column for column in last.columns}
    now = {column.name.lower(): column for column in schema.columns}
    # Each says types in words of its own: int and INTEGER are no change.
    comparable = last.source == schema.source
    change = SchemaChange(
        added=[column.name for key, column in now.items() if key not in before],
        removed=[column.name for key, column in before.items() if key not in now],
        retyped=[
            Retyped(name=column.name, before=was, after=column.type)
            for key, column in now.items()
            if comparable
            and column.type
            and (was := before[key].type if key in before else None)
            and was.lower() != column.type.lower()
        ],
    )
    return change if change.added or change.removed or change.retyped else None
