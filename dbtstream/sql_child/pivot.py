"""PIVOT and UNPIVOT after an item of FROM: rows become columns, columns become rows.

Part of the SQL reader (`reader`), so in its process only. Where the new columns' names depend
on the data (PIVOT … IN (ANY), DuckDB's PIVOT statement), they are not known.
"""

from collections.abc import Sequence

from sqlglot import exp

from dbtstream.sql_child.names import Names
from dbtstream.sql_child.relations import decided_by, renamed
from dbtstream.sql_child.scope import Clause, Scope, Source
from dbtstream.sql_child.traces import (
    CONDITIONAL,
    FILTER,
    GROUP_BY,
    Gathering,
    Out,
    Relation,
    Trace,
    Unknown,
    Without,
    gather,
)
from dbtstream.sql_child.values import Query, Reader

Traced = tuple[Trace, str | None]


def pivoted(node: exp.Expr, source: Source, names: Names, query: Query) -> Relation:
    """The source after all of its pivots; each works on what the one before it gives."""
    relation = source.relation
    for pivot in node.args.get("pivots") or ():
        change = _unpivot if pivot.args.get("unpivot") else _pivot
        relation = change(pivot, relation, names, query)
        alias = pivot.args.get("alias")
        if alias is not None:
            source.alias = names.of(alias.this) if alias.this else source.alias
            relation = renamed(names, relation, alias.columns)
        source.table, source.path = None, ()
    return relation


def _pivot(pivot: exp.Expr, relation: Relation, names: Names, query: Query) -> Relation:
    """Columns that neither are aggregated nor give names stay, and the rows are grouped by them;
    the new columns follow, for each value all aggregates."""
    result, reader = _over(relation, names, query)
    columns = pivot.args.get("columns") or ()
    used = frozenset(names.of(it.this) for it in pivot.find_all(exp.Column))
    result.outs = [out for out in relation.outs if out.name not in used]
    for out in result.outs:
        decided_by(result, out, GROUP_BY)
    if relation.ends:
        result.ends = [Without(end, used) for end in relation.ends]
        result.problems.append("which columns a PIVOT groups by is not known")
    if not columns or pivot.args.get("group"):
        result.ends = [Unknown("a PIVOT")]
        return result
    deciding = [reader.trace(it.this, Clause.SOURCE, CONDITIONAL) for it in pivot.args["fields"]]
    values = [reader.trace(it, Clause.SOURCE) for it in pivot.expressions]
    for place, column in enumerate(columns):
        result.outs.append(_made(column, [values[place % len(values)], *deciding], names))
    return result


def _unpivot(pivot: exp.Expr, relation: Relation, names: Names, query: Query) -> Relation:
    """Some columns become rows: one new column has their names, others their values."""
    result, reader = _over(relation, names, query)
    fields = pivot.args.get("fields")
    values = [it for node in pivot.expressions for it in node.find_all(exp.Identifier)]
    entries = [list(it.find_all(exp.Column)) for it in fields[0].expressions] if fields else []
    if not entries or not values or any(len(it) != len(values) for it in entries):
        return Relation(ends=[Unknown("an UNPIVOT")])
    used = frozenset(names.of(it.this) for entry in entries for it in entry)
    made = [
        _made(value, [reader.trace(entry[place], Clause.SOURCE) for entry in entries], names)
        for place, value in enumerate(values)
    ]
    if not pivot.args.get("include_nulls"):
        for out in made:
            decided_by(result, out, FILTER)
    field = pivot.args["fields"][0].this
    name = _made(field.this if isinstance(field, exp.Column) else field, [], names)
    first = pivot.args.get("value_columns_first")
    result.outs = [out for out in relation.outs if out.name not in used]
    result.outs += [*made, name] if first else [name, *made]
    result.ends = [Without(end, used) for end in relation.ends]
    return result


def _over(relation: Relation, names: Names, query: Query) -> tuple[Relation, Reader]:
    result = Relation()
    result.feeds = [relation]
    scope = Scope(names)
    scope.add(Source("", relation))
    return result, Reader(query, scope, {}, result, {})


def _made(identifier: exp.Expr, parts: Sequence[Traced], names: Names) -> Out:
    trace: Gathering = {}
    for part, _ in parts:
        gather(trace, part)
    problem = next((it for _, it in parts if it), None)
    return Out(names.of(identifier), names.spelled(identifier), trace, problem=problem)
