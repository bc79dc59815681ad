"""From a model's SQL to its columns and where each comes from. Read `read_sql`.

Pure, and run in a process of its own (`sql_child`): it takes milliseconds of Python per
model, and whatever SQL it is given, sqlglot may take long, fail, or eat the stack. With its parts
(`binder`, which is read next, `from_clause`, `pivot`, `scope`, `values`, `relations`,
`expressions`, `names`) it is all that imports sqlglot.

sqlglot parses; we resolve names ourselves, instead of by its `qualify` and `lineage`: those give
up a whole statement where the columns of one source are not known (with dbt's sources, the usual
case), rewrite the tree, and know nothing of joins, filters and kinds of transformation. What is
not known becomes status partial and a message; what is in `fields` is certain.
"""

import logging
import re
import traceback
from pathlib import Path

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

from dbtstream.column_lineage import (
    MAX_SQL_BYTES,
    PARSER,
    Analysis,
    AnalysisRequest,
    ColumnRef,
    KnownColumn,
    sql_bytes,
    too_large,
)
from dbtstream.lineage_events import FieldTransformation
from dbtstream.sql_child.binder import Binder
from dbtstream.sql_child.names import DIALECTS, Names, Tables
from dbtstream.sql_child.traces import Out, Relation, Step, Trace, all_rows, readable
from dbtstream.sql_literals import has_jinja
from dbtstream.statuses import ColumnLineageStatus

MAX_MESSAGE = 500
_CLASS = re.compile(r"<class '[\w.]*\.(\w+)'>")

logging.getLogger("sqlglot").disabled = True  # what it warns of is in the status, if it matters


def read_sql(request: AnalysisRequest) -> Analysis:
    """Never raises: what goes wrong is the status and a short message."""
    dialect = DIALECTS.get(request.dialect)
    if dialect is None:
        return _without(
            ColumnLineageStatus.UNSUPPORTED, f"SQL of the adapter {request.dialect!r} is not read"
        )
    try:
        if (size := sql_bytes(request.sql)) > MAX_SQL_BYTES:
            return too_large(size)
        if has_jinja(request.sql):
            message = "there is Jinja in the SQL: it is not compiled"
            return _without(ColumnLineageStatus.ERROR, message)
        return _read(request, dialect)
    except SqlglotError as error:
        return _without(ColumnLineageStatus.ERROR, f"cannot parse: {_said(error)}")
    except RecursionError:
        return _without(ColumnLineageStatus.ERROR, "the SQL is nested too deeply to be read")
    except MemoryError:
        return _without(ColumnLineageStatus.ERROR, "it takes more memory than the SQL reader has")
    except Exception as error:  # noqa: BLE001 - sqlglot's own mistakes, and ours, are one model's
        return _without(ColumnLineageStatus.ERROR, f"cannot be read: {_raised(error)}")


def _read(request: AnalysisRequest, dialect: str) -> Analysis:
    parsed = sqlglot.parse(request.sql, dialect=dialect)
    # A comment after the last `;` is a statement to sqlglot.
    statements = [it for it in parsed if not isinstance(it, exp.Semicolon | None)]
    if len(statements) != 1:
        count = "no statement" if not statements else f"{len(statements)} statements"
        return _without(ColumnLineageStatus.ERROR, f"{count} where a query was expected")
    statement = statements[0]
    if not isinstance(statement, exp.Query | exp.Values | exp.Pivot):
        return _without(
            ColumnLineageStatus.ERROR,
            f"a statement of type {statement.key.upper()} where a query was expected",
        )
    names = Names(dialect)
    tables = Tables(request.sources, names)
    relation = Binder(names, tables, statement).query(statement, {}, None, final=True)
    if not (relation.outs or relation.ends):
        return _without(ColumnLineageStatus.ERROR, "a query without columns")
    return _told(relation, request, tables)


def _told(relation: Relation, request: AnalysisRequest, tables: Tables) -> Analysis:
    rows, problems = all_rows(relation)
    for end in relation.ends:
        problems.append(f"the columns of {end.whose} are not all known, so * cannot be expanded")
    outs = _named(relation.outs, problems)
    fields = {name: _refs(out.trace, tables) for name, out in outs.items() if not out.problem}
    problems += [out.problem for out in outs.values() if out.problem]
    certain = not relation.ends and len(outs) == len(relation.outs)
    columns = [KnownColumn(name=name, type=out.type) for name, out in outs.items()]
    for added in request.added_columns:
        if added not in outs:
            columns.append(KnownColumn(name=added))
            fields[added] = []
    return Analysis(
        status=ColumnLineageStatus.PARTIAL if problems else ColumnLineageStatus.COMPLETE,
        message=_message(problems),
        columns=columns if certain else None,
        fields=fields,
        dataset_inputs=_refs(rows, tables),
        parser=PARSER,
    )


def _named(outs: list[Out], problems: list[str]) -> dict[str, Out]:
    """By the database's spelling. A name that it makes up, or that is there twice, is not told."""
    named: dict[str, Out] = {}
    twice: set[str] = set()
    for place, out in enumerate(outs, 1):
        if out.spelled is None:
            problems.append(f"column {place} has no name")
        elif out.spelled in named:
            twice.add(out.spelled)
            problems.append(f"there are several columns named {out.spelled}")
        else:
            named[out.spelled] = out
    return {name: out for name, out in named.items() if name not in twice}


def _refs(trace: Trace, tables: Tables) -> list[ColumnRef]:
    refs = []
    for (number, field), steps in trace.items():
        table = tables.numbered[number]
        refs.append(
            ColumnRef(
                ref=table.ref,
                relation_name=None if table.ref else table.whose,
                field=field,
                transformations=[_told_step(step) for step in readable(steps)],
            )
        )
    return refs


def _told_step(step: Step) -> FieldTransformation:
    return FieldTransformation(type=step.type, subtype=step.subtype, masking=step.masking)


def _message(problems: list[str]) -> str | None:
    """The first ones, each once."""
    different = list(dict.fromkeys(problems))
    if not different:
        return None
    text = "; ".join(different[:3])
    if len(different) > 3:
        text += f"; and {len(different) - 3} more"
    return _cut(text)


def _said(error: SqlglotError) -> str:
    """sqlglot's own words and the place, without the SQL around it: that may be secret."""
    details = getattr(error, "errors", None)
    if not details:
        return str(error).partition("'")[0].strip().lower() or type(error).__name__
    first = details[0]
    words = str(first.get("description", "")).partition("<Token")[0].rstrip()
    words = _CLASS.sub(r"\1", words.removesuffix(" but got").rstrip("."))
    return f"{words} at line {first.get('line')}, column {first.get('col')}"


def _raised(error: Exception) -> str:
    """Which exception and where, for a bug report; its text may quote the SQL."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"


def _without(status: ColumnLineageStatus, message: str) -> Analysis:
    return Analysis(status=status, message=_cut(message), parser=PARSER)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"
