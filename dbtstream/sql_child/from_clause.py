"""The FROM of a SELECT: tables, subqueries, joins, table functions and pivots become sources.

Part of the SQL reader (`reader`), so in its process only. `binder` calls `read` before
it looks at anything else of the SELECT.
"""

from collections.abc import Sequence
from typing import Protocol

from sqlglot import exp

from dbtstream.sql_child.expressions import QUERIES
from dbtstream.sql_child.names import Names, Tables
from dbtstream.sql_child.pivot import pivoted
from dbtstream.sql_child.relations import renamed
from dbtstream.sql_child.scope import Clause, Scope, Source
from dbtstream.sql_child.traces import (
    JOIN,
    TRANSFORMATION,
    Anything,
    Gathering,
    Out,
    Relation,
    Unknown,
    Without,
    gather,
)
from dbtstream.sql_child.values import Environment, Query, Reader

FILES = (
    "read_",
    "scan_",
    "iceberg_scan",
    "delta_scan",
    "parquet_scan",
    "external_query",
    "openrowset",
)
"""Functions that stand for data elsewhere; others make rows of nothing but their arguments."""

FILE_NODES = (exp.ReadCSV, exp.ReadParquet)


class Binder(Protocol):
    """`binder.Binder`, which has us."""

    names: Names
    tables: Tables

    @property
    def query(self) -> Query: ...


class Sources:
    def __init__(self, binder: Binder) -> None:
        self._binder = binder
        self._names: Names = binder.names

    def read(self, node: exp.Select, scope: Scope, env: Environment, into: Relation) -> None:
        """All sources of the SELECT into `scope`; what their joins decide into `into`."""
        reader = self._reader(scope, env, into)
        if (from_ := node.args.get("from_")) is not None:
            self._item(from_.this, reader, env)
        for join in node.args.get("joins") or ():
            self._join(join, reader, env)
        for lateral in node.args.get("laterals") or ():
            self._item(lateral, reader, env)

    def values(self, node: exp.Values, scope: Scope, env: Environment) -> Relation:
        """`values (1, a), (2, b)`, named as the alias says or as the dialect does."""
        rows = [it.expressions if isinstance(it, exp.Tuple) else [it] for it in node.expressions]
        alias = node.args.get("alias")
        columns = (alias.columns if alias else None) or self._names.dialect.generate_values_aliases(
            node
        )
        result = Relation()
        reader = self._reader(scope, env, result)
        for place, column in enumerate(columns):
            trace: Gathering = {}
            problem = None
            for row in rows:
                if place < len(row):
                    part, wrong = reader.trace(row[place], Clause.SOURCE)
                    gather(trace, part)
                    problem = problem or wrong
            name, spelled = self._names.of(column), self._names.spelled(column)
            result.outs.append(Out(name, spelled, trace, problem=problem))
        return result

    def _reader(self, scope: Scope, env: Environment, into: Relation) -> Reader:
        return Reader(self._binder.query, scope, env, into, {})

    def _item(self, node: exp.Expr, reader: Reader, env: Environment) -> list[Source]:
        """One item of FROM and what is joined to it inside its parentheses."""
        if isinstance(node, exp.Final):  # ClickHouse
            node = node.this
        if isinstance(node, exp.Subquery) and not isinstance(node.this, (*QUERIES, exp.Pivot)):
            made = self._parenthesis(node, reader, env)
        else:
            source = self._source(node, reader, env)
            made = [self._added(node, source, reader)]
        for join in node.args.get("joins") or ():
            made += self._join(join, reader, env)
        for lateral in node.args.get("laterals") or ():
            made += self._item(lateral, reader, env)
        return made

    def _parenthesis(self, node: exp.Subquery, reader: Reader, env: Environment) -> list[Source]:
        """`(a join b on …)`: the same as without, unless it has an alias."""
        alias = node.args.get("alias")
        if alias is None and not node.args.get("pivots"):
            return self._item(node.this, reader, env)
        inner = self._reader(Scope(self._names, reader.scope.outer), env, reader.result)
        self._item(node.this, inner, env)
        found = inner.scope.star()
        source = Source(self._alias(node), renamed(self._names, Relation(*(found or ())),
                        alias.columns if alias else ()))  # fmt: skip
        return [self._added(node, source, reader)]

    def _added(self, node: exp.Expr, source: Source, reader: Reader) -> Source:
        source.relation = pivoted(node, source, self._names, self._binder.query)
        reader.result.feeds.append(source.relation)
        reader.scope.add(source)
        return source

    def _source(self, node: exp.Expr, reader: Reader, env: Environment) -> Source:
        alias = self._alias(node)
        tabular = node.args.get("alias")
        columns = tabular.columns if isinstance(tabular, exp.TableAlias) else []
        match node:
            case exp.Table():
                return self._table(node, alias, columns, reader, env)
            case exp.Subquery() if not isinstance(node.this, exp.Pivot):
                relation = self._binder.query(node, env, reader.scope.outer)
                return Source(alias, renamed(self._names, relation, columns))
            case exp.Lateral() if isinstance(node.this, QUERIES):
                relation = self._binder.query(node.this, env, reader.scope)
                return Source(alias, renamed(self._names, relation, columns))
            case exp.Values():
                return Source(alias, self.values(node, reader.scope, env))
            case exp.Unnest():
                return self._unnest(node, alias, columns, reader)
            case exp.UDTF():
                return self._function(node.this, alias, columns, reader)
            case exp.Func():
                return self._function(node, alias, columns, reader)
            case _:
                return Source(alias, Relation(ends=[Unknown(f"a {node.key.upper()}")]))

    def _table(
        self,
        node: exp.Table,
        alias: str,
        columns: list[exp.Expr],
        reader: Reader,
        env: Environment,
    ) -> Source:
        plain = isinstance(node.this, exp.Identifier)
        if plain and not node.args.get("db") and (cte := env.get(self._names.of(node.this))):
            return Source(alias, renamed(self._names, cte, columns))
        if isinstance(node.this, exp.Func) and not self._is_data(node):
            return self._function(node.this, alias, columns, reader)
        path = tuple(self._names.table(part) for part in node.parts) if plain else ()
        array = self._array_of(node, reader) if plain and node.args.get("db") else None
        if array is not None:
            return self._function(array, alias, columns, reader)
        table = self._binder.tables.get(node)
        relation = renamed(self._names, table.relation, columns)
        own = table if relation is table.relation else None
        return Source(alias, relation, path, own)

    def _is_data(self, node: exp.Table) -> bool:
        function = node.this
        name = function.name if isinstance(function, exp.Anonymous) else function.sql_name()
        return (
            isinstance(function, FILE_NODES)
            or name.lower().startswith(FILES)
            or self._binder.tables.has(node)
        )

    def _array_of(self, node: exp.Table, reader: Reader) -> exp.Expr | None:
        """BigQuery and Redshift: `from t, t.items` goes through an array of each row."""
        first = self._names.of(node.parts[0])
        if reader.scope.source(first) is None or self._binder.tables.has(node):
            return None
        keys = ("this", "table", "db", "catalog")
        parts = zip(keys, reversed(node.parts), strict=False)
        return exp.Column(**{key: part.copy() for key, part in parts})

    def _function(
        self, node: exp.Expr, alias: str, columns: list[exp.Expr], reader: Reader
    ) -> Source:
        """Each of its columns is made of all its arguments."""
        trace, problem = reader.trace(node, Clause.SOURCE, TRANSFORMATION)
        gather(reader.result.rows, trace, JOIN)  # it says how many rows come of each
        reader.result.problems += [problem] if problem else []
        whose = f"the function {node.name if isinstance(node, exp.Anonymous) else node.key}"
        if columns:
            outs = [
                Out(self._names.of(it), self._names.spelled(it), trace, problem=problem)
                for it in (_identifier(column) for column in columns)
            ]
            return Source(alias, Relation(outs))
        return Source(alias, Relation(ends=[Anything(whose, trace, problem)]), one_value=True)

    def _unnest(
        self, node: exp.Unnest, alias: str, columns: list[exp.Expr], reader: Reader
    ) -> Source:
        arrays = node.expressions
        offset = node.args.get("offset")
        if len(arrays) == 1 or len(columns) != len(arrays):
            source = self._function(node, alias, columns, reader)
        else:
            source = Source(alias, Relation())
            for array, column in zip(arrays, columns, strict=True):
                source.relation.outs += self._function(array, "", [column], reader).relation.outs
        if isinstance(offset, exp.Identifier):
            name = self._names.of(offset)
            source.relation = Relation(
                [*source.relation.outs, Out(name, self._names.spelled(offset), {})],
                [Without(end, frozenset({name})) for end in source.relation.ends],
            )
        return source

    def _join(self, join: exp.Join, reader: Reader, env: Environment) -> list[Source]:
        scope = reader.scope
        if (join.kind or "").upper() == "ARRAY":  # ClickHouse: arrays of the row, not tables
            return self._array_join(join, reader)
        if join.kind in ("SEMI", "ANTI") or join.side in ("SEMI", "ANTI"):
            # Its columns are seen in its condition only.
            scope = scope.branch()
            reader = self._reader(scope, env, reader.result)
        before = list(scope.sources)
        made = self._item(join.this, reader, env)
        for key in ("on", "match_condition"):
            if (condition := join.args.get(key)) is not None:
                reader.decide(condition, JOIN, Clause.SOURCE)
        if join.args.get("using"):
            names = [it.this if isinstance(it, exp.Column) else it for it in join.args["using"]]
            self._using(join, names, before, made, reader)
        elif (join.method or "").upper() == "NATURAL":
            self._natural(join, before, made, reader)
        return made

    def _array_join(self, join: exp.Join, reader: Reader) -> list[Source]:
        made = []
        for node in (join.this, *(join.args.get("expressions") or ())):
            inner = exp.Column(this=node.this.copy()) if isinstance(node, exp.Table) else node
            alias = node.args.get("alias") or node
            name = exp.to_identifier(alias.name)
            made.append(self._function(inner.unalias(), "", [name], reader))
            reader.scope.add(made[-1])
        return made

    def _natural(
        self, join: exp.Join, before: list[Source], made: list[Source], reader: Reader
    ) -> None:
        sides = [[source.relation for source in side] for side in (before, made)]
        if any(relation.ends for side in sides for relation in side):
            reader.result.problems.append("what a NATURAL JOIN joins by is not known")
            reader.scope.add(Source("", Relation(ends=[Unknown("a NATURAL JOIN")])))
            return
        left, right = ([out for it in side for out in it.outs] for side in sides)
        names = {out.name for out in right}
        common = {out.name: out for out in left if out.name in names}
        keys = [exp.to_identifier(name, quoted=True) for name in common]
        self._using(join, keys, before, made, reader)

    def _using(
        self,
        join: exp.Join,
        keys: Sequence[exp.Expr],
        before: list[Source],
        made: list[Source],
        reader: Reader,
    ) -> None:
        """One column for both sides: the left's value, or the right's, or whichever is there."""
        scope, result = reader.scope, reader.result
        names = []
        for key in keys:
            name, spelled = self._names.of(key), self._names.spelled(key)
            left = scope.merged.get(name) or _found(before, name, spelled)
            right = _found(made, name, spelled)
            for out in (left, right):
                gather(result.rows, out.trace, JOIN)
                result.problems += [out.problem] if out.problem else []
            if (join.side or "").upper() == "FULL":
                trace: Gathering = {}
                gather(trace, left.trace, TRANSFORMATION)
                gather(trace, right.trace, TRANSFORMATION)
                scope.merged[name] = Out(
                    name, left.spelled, trace, left.type, left.problem or right.problem
                )
            elif (join.side or "").upper() == "RIGHT":
                scope.merged[name] = right._replace(name=name)
            else:
                scope.merged[name] = left._replace(name=name)
            names.append(name)
        scope.merged_order = [*names, *(it for it in scope.merged_order if it not in names)]
        for source in made:
            source.hidden |= frozenset(names)

    def _alias(self, node: exp.Expr) -> str:
        """Folded; a table's own name where it has no other."""
        alias = node.args.get("alias")
        if isinstance(alias, exp.TableAlias) and alias.this is not None:
            return self._names.of(alias.this)
        if isinstance(node, exp.Table) and isinstance(node.this, exp.Identifier):
            return self._names.of(node.this)
        if isinstance(node, exp.Table) and isinstance(node.this, exp.Func):
            return self._names.fold(node.this.name or node.this.sql_name(), quoted=False)
        return ""


def _found(side: list[Source], name: str, spelled: str) -> Out:
    known = [out for it in side if (out := it.relation.known(name))]
    opened = [] if known else [out for it in side if (out := it.relation.opened(name, spelled))]
    found = known or opened
    if not found:
        return Out(name, spelled, {}, problem=f"there is no column {spelled} to join by")
    if len(found) > 1 and opened:
        return found[0]._replace(problem=f"{spelled} may be a column of several tables")
    return found[0]


def _identifier(node: exp.Expr) -> exp.Expr:
    return node.this if isinstance(node, exp.ColumnDef) else node
