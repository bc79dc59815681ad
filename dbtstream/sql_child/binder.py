"""From a query's tree to its columns' traces: each SELECT is read once, inner ones first.

Part of the SQL reader (`reader`), so in its process only. `from_clause` makes the sources of a
SELECT, `scope` says what its names mean, `expressions` what its expressions do. Nothing
here copies or rewrites the tree, which is why the cost is linear in its size.
"""

from sqlglot import exp

from dbtstream.sql_child.expressions import QUERIES, has_aggregate
from dbtstream.sql_child.from_clause import Sources
from dbtstream.sql_child.names import Names, Tables
from dbtstream.sql_child.relations import (
    around,
    decided_by,
    decided_by_all,
    renamed,
    united,
    unknown,
)
from dbtstream.sql_child.scope import Clause, Scope, Source
from dbtstream.sql_child.traces import (
    FILTER,
    GROUP_BY,
    SORT,
    End,
    Out,
    Relation,
    Step,
    Unknown,
    Without,
    gather,
)
from dbtstream.sql_child.values import Environment, Reader

MAX_ROUNDS = 20
"""Of a recursive query, until nothing is added any more."""

SELF_RECURSIVE = frozenset({"tsql", "oracle", "teradata"})
"""They have no word RECURSIVE."""

CAST_KEEPS_NAME = frozenset({"postgres", "redshift", "materialize", "risingwave"})
"""`select id::int` gives a column named id."""

GROUPINGS = (exp.Tuple, exp.Paren, exp.GroupingSets, exp.Cube, exp.Rollup, exp.Group)


class Binder:
    def __init__(self, names: Names, tables: Tables, statement: exp.Expr) -> None:
        self.names = names
        self.tables = tables
        self._sources = Sources(self)
        self._patterns = statement.find(exp.Columns) is not None  # DuckDB's columns('a.*')

    def query(
        self, node: exp.Expr, env: Environment, outer: Scope | None, *, final: bool = False
    ) -> Relation:
        """What a query gives. Of the statement itself (`final`) the order counts, too."""
        env = self._with(node, env, outer)
        match node:
            case exp.Select():
                return self._select(node, env, outer, final=final)
            case exp.SetOperation():
                relation = self._set_operation(node, env, outer)
            case exp.Subquery() if isinstance(node.this, QUERIES):
                relation = self.query(node.this, env, outer, final=final)
                if _has_modifiers(node):
                    relation = around(relation)
            case exp.Values():
                relation = self._sources.values(node, Scope(self.names, outer), env)
            case _:
                return Relation(ends=[Unknown(f"a {_what(node)}")])
        if final or _is_limited(node):
            self._sort(node, relation, Scope(self.names, outer), env)
        return relation

    # The parts of a SELECT, in the order of their evaluation.

    def _select(
        self, node: exp.Select, env: Environment, outer: Scope | None, *, final: bool
    ) -> Relation:
        scope = Scope(self.names, outer)
        result = Relation()
        self._sources.read(node, scope, env, result)
        windows = {it.name: it for it in node.args.get("windows") or ()}
        reader = Reader(self.query, scope, env, result, windows)
        made_by: list[exp.Expr] = []
        for projection in node.expressions:
            outs, ends = self._projection(projection, reader)
            result.outs += outs
            result.ends += ends
            made_by += [projection] * len(outs)
            for out in outs:
                scope.aliases.setdefault(out.name, out)
        self._rows(node, reader, made_by, sorted_=final or _is_limited(node))
        result.problems += scope.notes
        _exclude(node, result, self.names)
        if node.args.get("kind"):  # BigQuery's SELECT AS STRUCT: one column, no name
            trace, problem = reader.all_of(result)
            result.outs, result.ends = [Out("", None, trace, problem=problem)], []
        return result

    def _projection(self, node: exp.Expr, reader: Reader) -> tuple[list[Out], list[End]]:
        inner = node.unalias()
        if isinstance(node, exp.Star | exp.Column | exp.Dot) and node.is_star:
            return self._star(node, reader)
        if isinstance(inner, exp.QueryTransform) or (self._patterns and inner.find(exp.Columns)):
            return [], [Unknown(f"a {_what(inner)}")]
        if isinstance(node, exp.Aliases):
            trace, problem = reader.trace(node.this, Clause.SELECT)
            return [
                Out(self.names.of(it), self.names.spelled(it), trace, problem=problem)
                for it in node.expressions
            ], []
        return [self._column(node, reader)], []

    def _column(self, node: exp.Expr, reader: Reader) -> Out:
        value = node.unalias()
        while isinstance(value, exp.Paren):
            value = value.this
        if isinstance(value, exp.Column):
            found, is_field = reader.scope.column(value, Clause.SELECT)
            if not is_field:
                name, spelled = self._name(node, value, found)
                return Out(name, spelled, found.trace, found.type, found.problem)
        trace, problem = reader.trace(value, Clause.SELECT)
        type_ = value.to.sql(dialect=self.names.name) if isinstance(value, exp.Cast) else None
        name, spelled = self._name(node, value, None)
        return Out(name, spelled, trace, type_, problem)

    def _name(self, node: exp.Expr, value: exp.Expr, found: Out | None) -> tuple[str, str | None]:
        """Folded, and as the database will have it: None if it makes one up."""
        alias = node.args.get("alias") if isinstance(node, exp.Alias | exp.Subquery) else None
        if isinstance(alias, exp.TableAlias):
            alias = alias.this
        if alias is None and isinstance(value, exp.Cast) and self.names.name in CAST_KEEPS_NAME:
            value = value.this
        if alias is None and isinstance(value, exp.Column):
            if found is not None and self.names.as_defined:
                return self.names.of(value.this), found.spelled
            alias = value.this
        if alias is None and isinstance(value, exp.Dot):
            alias = value.expression
        if not isinstance(alias, exp.Identifier):
            return "", None
        return self.names.of(alias), self.names.spelled(alias)

    def _star(self, node: exp.Expr, reader: Reader) -> tuple[list[Out], list[End]]:
        star = node.this if isinstance(node, exp.Column) else node
        found = None
        if not isinstance(node, exp.Dot) and not star.args.get("ilike"):
            found = reader.scope.star(node)
        if found is None:  # of a struct, or picked by a pattern
            return [], [Unknown("a star over a struct or with a pattern")]
        outs, ends = found
        left_out = {self.names.of(_last(it)) for it in star.args.get("except_") or ()}
        replaced = {out.name: out for it in star.args.get("replace") or ()
                    for out in [self._column(it, reader)]}  # fmt: skip
        renamed_to = {
            self.names.of(_last(it.this)): it.args["alias"] for it in star.args.get("rename") or ()
        }
        if not (left_out or replaced or renamed_to):
            return outs, ends
        result = []
        for out in outs:
            if out.name in left_out:
                continue
            kept = replaced.get(out.name, out)._replace(spelled=out.spelled)
            if (new := renamed_to.get(out.name)) is not None:
                kept = kept._replace(name=self.names.of(new), spelled=self.names.spelled(new))
            result.append(kept)
        changed = frozenset(left_out) | replaced.keys() | renamed_to.keys()
        if ends:  # their place among the unknown is not known, but they are there
            have = {out.name for out in outs}
            result += [out for name, out in replaced.items() if name not in have]
            for name, new in renamed_to.items():
                if name not in have and (old := Relation(ends=ends).opened(name, name)):
                    out = old._replace(name=self.names.of(new), spelled=self.names.spelled(new))
                    result.append(out)
        return result, [Without(end, changed) for end in ends]

    def _rows(
        self, node: exp.Select, reader: Reader, made_by: list[exp.Expr], *, sorted_: bool
    ) -> None:
        """What decides which rows there are."""
        for key, clause in (
            ("prewhere", Clause.WHERE),
            ("where", Clause.WHERE),
            ("having", Clause.HAVING),
            ("qualify", Clause.QUALIFY),
        ):
            if (condition := node.args.get(key)) is not None:
                reader.decide(condition.this, FILTER, clause)
        if (connect := node.args.get("connect")) is not None:
            for key in ("start", "connect"):
                if connect.args.get(key) is not None:
                    reader.decide(connect.args[key], FILTER, Clause.WHERE)
        if node.args.get("match"):
            reader.result.problems.append("MATCH_RECOGNIZE is not followed")
            reader.result.ends.append(Unknown("a MATCH_RECOGNIZE"))
        if (group := node.args.get("group")) is not None:
            self._group(group, reader, made_by)
        if (distinct := node.args.get("distinct")) is not None:
            on = distinct.args.get("on")
            if on is None:
                decided_by_all(reader.result, GROUP_BY)
            for key in (on.expressions or [on]) if on is not None else ():
                self._key(key, reader, GROUP_BY, Clause.ORDER)
        if sorted_ or (distinct is not None and distinct.args.get("on") is not None):
            self._sort_keys(node, reader)

    def _group(self, group: exp.Expr, reader: Reader, made_by: list[exp.Expr]) -> None:
        result = reader.result
        if group.args.get("all") or _is_word(group.expressions, "ALL"):
            for out, projection in zip(result.outs, made_by, strict=True):
                if not has_aggregate(projection):
                    decided_by(result, out, GROUP_BY)
            result.problems += [unknown(end) for end in result.ends]
            return
        waiting = [group]
        while waiting:
            node = waiting.pop()
            if isinstance(node, GROUPINGS):
                waiting += reversed(list(node.iter_expressions()))
            else:
                self._key(node, reader, GROUP_BY, Clause.GROUP)

    def _sort(self, node: exp.Expr, relation: Relation, scope: Scope, env: Environment) -> None:
        """ORDER BY after a set operation: its names are those of the result."""
        scope.aliases = {out.name: out for out in relation.outs}
        scope.add(Source("", relation))
        self._sort_keys(node, Reader(self.query, scope, env, relation, {}))

    def _sort_keys(self, node: exp.Expr, reader: Reader) -> None:
        order = node.args.get("order")
        for ordered in order.expressions if order is not None else ():
            key = ordered.this if isinstance(ordered, exp.Ordered) else ordered
            if _is_word([key], "ALL"):
                decided_by_all(reader.result, SORT)
            else:
                self._key(key, reader, SORT, Clause.ORDER)

    def _key(self, node: exp.Expr, reader: Reader, step: Step, clause: Clause) -> None:
        """A key of GROUP BY or ORDER BY: a column of the result by its number, or anything."""
        if not (isinstance(node, exp.Literal) and node.is_int):
            if clause is Clause.ORDER and not isinstance(node, exp.Column):
                clause = Clause.HAVING  # inside an expression, a source's column hides an alias
            reader.decide(node, step, clause)
            return
        number = int(node.this)
        if reader.result.ends or not 0 < number <= len(reader.result.outs):
            reader.result.problems.append(f"which column {number} is, is not known")
            return
        decided_by(reader.result, reader.result.outs[number - 1], step)

    # Several queries.

    def _with(self, node: exp.Expr, env: Environment, outer: Scope | None) -> Environment:
        with_ = node.args.get("with_")
        if with_ is None:
            return env
        env = dict(env)
        for cte in with_.expressions:
            alias = cte.args["alias"]
            name = self.names.of(alias.this)
            recursive = with_.args.get("recursive") or self.names.name in SELF_RECURSIVE
            if not isinstance(cte.this, (*QUERIES, exp.Values)):
                env[name] = Relation(ends=[Unknown(f"the common table expression {name}")])
            elif recursive and isinstance(cte.this, exp.SetOperation):
                env[name] = self._recursive(cte, name, alias.columns, env, outer)
            else:
                env[name] = renamed(self.names, self.query(cte.this, env, outer), alias.columns)
        return env

    def _recursive(
        self,
        cte: exp.Expr,
        name: str,
        columns: list[exp.Expr],
        env: Environment,
        outer: Scope | None,
    ) -> Relation:
        """Begin with what is not recursive, then add until nothing new comes."""
        if not any(self.names.of(it.this) == name for it in cte.this.find_all(exp.Table)
                   if isinstance(it.this, exp.Identifier)):  # fmt: skip
            return renamed(self.names, self.query(cte.this, env, outer), columns)
        union = cte.this
        env = self._with(union, env, outer)
        relation = renamed(self.names, self.query(union.this, env, outer), columns)
        for _ in range(MAX_ROUNDS):
            step = self.query(union.expression, {**env, name: relation}, outer)
            following = renamed(self.names, united([relation, step], by_name=False), columns)
            following.feeds = [*relation.feeds, *(it for it in step.feeds if it is not relation)]
            following.rows = dict(relation.rows)
            gather(following.rows, step.rows)
            following.problems = list(dict.fromkeys(relation.problems + step.problems))
            if _summary(following) == _summary(relation):
                return following
            relation = following
        relation.problems.append(f"the recursion of {name} was not followed to its end")
        return relation

    def _set_operation(
        self, node: exp.SetOperation, env: Environment, outer: Scope | None
    ) -> Relation:
        """A chain of unions is a tree as deep as it is long: no recursion along it."""
        chain = [node]
        while isinstance(chain[-1].this, exp.SetOperation) and not _has_modifiers(chain[-1].this):
            chain.append(chain[-1].this)
        relation = self.query(chain[-1].this, env, outer)
        waiting = list(reversed(chain))
        while waiting:
            first = waiting[0]
            alike = 1
            while alike < len(waiting) and _alike(first, waiting[alike]):
                alike += 1
            arms = [self.query(it.expression, env, outer) for it in waiting[:alike]]
            relation = self._combined(first, [relation, *arms])
            waiting = waiting[alike:]
        return relation

    def _combined(self, node: exp.SetOperation, arms: list[Relation]) -> Relation:
        distinct = bool(node.args.get("distinct"))
        if isinstance(node, exp.Except):
            relation = Relation(arms[0].outs, arms[0].ends)
        else:
            relation = united(arms, by_name=bool(node.args.get("by_name")))
        if node.args.get("side") or node.args.get("kind") or node.args.get("on"):
            relation.outs = self._matched(node, arms, relation.outs)
        relation.feeds = list(arms)
        if isinstance(node, exp.Except | exp.Intersect):
            for arm in arms:
                decided_by_all(relation, FILTER, of=arm)
        elif distinct:
            decided_by_all(relation, GROUP_BY)
        return relation

    def _matched(self, node: exp.SetOperation, arms: list[Relation], outs: list[Out]) -> list[Out]:
        """BigQuery's INNER and LEFT unions by name leave columns out."""
        left, right = ({out.name for out in arm.outs} for arm in (arms[0], arms[-1]))
        if node.args.get("on"):
            kept = {self.names.of(_last(it)) for it in node.args["on"]}
        elif (node.args.get("side") or "").upper() == "LEFT":
            kept = left
        elif (node.args.get("kind") or "").upper() == "INNER":
            kept = left & right
        else:
            return outs
        return [out for out in outs if out.name in kept]


def _exclude(node: exp.Select, result: Relation, names: Names) -> None:
    """Redshift's `select * exclude a from t`."""
    excluded = frozenset(names.of(_last(it)) for it in node.args.get("exclude") or ())
    if excluded:
        result.outs = [out for out in result.outs if out.name not in excluded]
        result.ends = [Without(end, excluded) for end in result.ends]


def _summary(relation: Relation) -> tuple[object, ...]:
    return [(out.trace, out.problem) for out in relation.outs], relation.rows, len(relation.outs)


def _alike(one: exp.Expr, other: exp.Expr) -> bool:
    return (
        type(one) is exp.Union
        and type(other) is exp.Union
        and all(
            one.args.get(key) == other.args.get(key)
            for key in ("distinct", "by_name", "side", "kind", "on")
        )
    )


def _has_modifiers(node: exp.Expr) -> bool:
    return any(node.args.get(key) for key in ("with_", "order", "limit", "offset"))


def _is_limited(node: exp.Expr) -> bool:
    return bool(node.args.get("limit") or node.args.get("offset"))


def _is_word(nodes: list[exp.Expr], word: str) -> bool:
    return len(nodes) == 1 and isinstance(nodes[0], exp.Var) and nodes[0].name.upper() == word


def _last(node: exp.Expr) -> exp.Expr:
    return node.this if isinstance(node, exp.Column) else node


def _what(node: exp.Expr) -> str:
    return node.key.upper().replace("_", " ")
