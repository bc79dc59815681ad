"""What is asked of the SQL reader and what it answers: the columns of one model's result.

Layer 0. `build_columns` asks, `sql_process` carries it to a process of its own, `sql_child` (all
that imports sqlglot) answers there. Tables are named by the `ref` that the asker gave them, so
that nobody has to compare spellings twice.
"""

import hashlib
import struct
from importlib.metadata import version

import msgspec

from dbtstream.lineage_events import FieldTransformation
from dbtstream.sql_literals import without_literals
from dbtstream.statuses import ColumnLineageStatus

MAX_SQL_BYTES = 1024 * 1024
LENGTH = struct.Struct("!I")
"""Before each frame between `sql_process` and `sql_child`."""

PARSER = f"sqlglot/{version('sqlglot')}"  # read off its metadata: nothing of it is imported
READER_REVISION = 1
"""Another answer to the same question needs another key: raise it when the reader has changed."""


class KnownColumn(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    type: str | None = None


class SourceTable(msgspec.Struct, frozen=True, kw_only=True):
    """A relation that the SQL may read. `columns` null: not known; `partial`: it may have more."""

    ref: str  # the asker's name for it: a unique_id
    relation_name: str  # as dbt renders it, quotes and all
    columns: list[KnownColumn] | None = None
    partial: bool = False


class AnalysisRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`added_columns` are made by dbt's materialization and not by the SQL: a snapshot's."""

    unique_id: str
    sql: str
    dialect: str  # dbt's adapter type
    sources: list[SourceTable] = []
    added_columns: list[str] = []


class ColumnRef(msgspec.Struct, frozen=True, kw_only=True):
    """A column of a source. `ref` is null for a table that is none of the sources; then
    `relation_name` has what the SQL says."""

    ref: str | None = None
    relation_name: str | None = None
    field: str
    transformations: list[FieldTransformation] = []


class Analysis(msgspec.Struct, frozen=True, kw_only=True):
    """`columns` is the result's, in order; null where a star could not be expanded. `fields` has
    each of them (with status partial: those that could be traced)."""

    status: ColumnLineageStatus
    message: str | None = None
    columns: list[KnownColumn] | None = None
    fields: dict[str, list[ColumnRef]] | None = None
    dataset_inputs: list[ColumnRef] | None = None
    parser: str | None = None  # "sqlglot/30.30.0"


def too_large(size: int) -> Analysis:
    return Analysis(
        status=ColumnLineageStatus.ERROR,
        message=f"the SQL has {size:,} bytes; more than {MAX_SQL_BYTES:,} are not read",
        parser=PARSER,
    )


def sql_bytes(sql: str) -> int:
    """Its size in UTF-8; without encoding it where the number of characters says enough."""
    return len(sql) if len(sql) > MAX_SQL_BYTES else len(sql.encode())


def analysis_key(request: AnalysisRequest) -> str:
    """Requests with the same key have the same `Analysis`, whichever node they are of.

    What of the SQL does not count is said in `sql_literals`. An analysis with status error quotes
    places in the SQL; it is the only kind that may differ.
    """
    sql = request.sql
    if not any("(" in source.relation_name for source in request.sources):
        sql = without_literals(sql)  # else its literals may be a source's name
    parts = (
        READER_REVISION,
        PARSER,
        request.dialect,
        sql,
        request.sources,
        request.added_columns,
    )
    return hashlib.sha256(_encode(parts)).hexdigest()


_encode = msgspec.msgpack.Encoder().encode
