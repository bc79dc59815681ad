"""Expressions of one SELECT: which columns their values come from, and on which ways.

Part of the SQL reader (`reader`), so in its process only. Brings together what an expression
does (`expressions`) and what its names mean (`scope`).
"""

from typing import Protocol

from sqlglot import exp

from dbtstream.sql_child.expressions import QUERIES, uses
from dbtstream.sql_child.relations import unknown
from dbtstream.sql_child.scope import Clause, Scope
from dbtstream.sql_child.traces import (
    IDENTITY,
    TRANSFORMATION,
    Gathering,
    Relation,
    Step,
    Trace,
    all_rows,
    gather,
    then,
)

Environment = dict[str, Relation]
"""Common table expressions that can be seen, by folded name."""


class Query(Protocol):
    """`binder.Binder.query`: what a query gives."""

    def __call__(
        self, node: exp.Expr, env: Environment, outer: Scope | None, *, final: bool = False
    ) -> Relation: ...


class Reader:
    """Expressions of one SELECT, read in its scope."""

    def __init__(
        self,
        query: Query,
        scope: Scope,
        env: Environment,
        result: Relation,
        windows: dict[str, exp.Expr],
    ) -> None:
        self.scope, self.result = scope, result
        self._query, self._env, self._windows = query, env, windows

    def trace(
        self, node: exp.Expr, clause: Clause, base: Step = IDENTITY
    ) -> tuple[Trace, str | None]:
        """Where a value comes from. What decides on a subquery's rows decides on the value."""
        into: Gathering = {}
        problems: list[str] = []
        for used, step in uses(node, base, self._windows):
            if isinstance(used, exp.Column) and not isinstance(used.this, exp.Star):
                out, is_field = self.scope.column(used, clause)
                gather(into, out.trace, _field(step) if is_field else step)
                problems += [out.problem] if out.problem else []
            elif isinstance(used, (exp.Exists, *QUERIES)):
                relation, valued = self._subquery(used)
                rows, rows_problems = all_rows(relation)
                gather(into, rows, step)
                problems += rows_problems
                if valued:
                    self._value(relation, step, into, problems)
            else:
                self._all(used, step, into, problems)
        return into, problems[0] if problems else None

    def decide(self, node: exp.Expr, step: Step, clause: Clause) -> None:
        """The result's rows depend on it. What decides on a subquery's rows keeps its own step."""
        rows, problems = self.result.rows, self.result.problems
        for used, how in uses(node, step, self._windows):
            if isinstance(used, exp.Column) and not isinstance(used.this, exp.Star):
                out, _ = self.scope.column(used, clause)
                if out.problem:
                    problems.append(out.problem)
                else:
                    gather(rows, out.trace, how)
            elif isinstance(used, (exp.Exists, *QUERIES)):
                relation, valued = self._subquery(used)
                self.result.feeds.append(relation)
                if valued:
                    self._value(relation, how, rows, problems)
            else:
                self._all(used, how, rows, problems)

    def all_of(self, relation: Relation) -> tuple[Trace, str | None]:
        into: Gathering = {}
        problems: list[str] = []
        self._value(relation, _field(IDENTITY), into, problems)
        return into, problems[0] if problems else None

    def _subquery(self, node: exp.Expr) -> tuple[Relation, bool]:
        asked = node.this if isinstance(node, exp.Exists) else node
        relation = self._query(asked, self._env, self.scope)
        return relation, not isinstance(node, exp.Exists)

    def _value(self, of: Relation, step: Step, into: Gathering, problems: list[str]) -> None:
        for out in of.outs:
            if out.problem:
                problems.append(out.problem)
            else:
                gather(into, out.trace, step)
        problems += [unknown(end) for end in of.ends]

    def _all(self, node: exp.Expr, step: Step, into: Gathering, problems: list[str]) -> None:
        """A star inside an expression: of one source, of all, or some of them."""
        found = self.scope.star(node)
        star = node if isinstance(node, exp.Star) else node.this
        if found is None or not isinstance(star, exp.Star) or star.args.get("ilike"):
            problems.append("which columns a star stands for is not known")
            return
        names = self.scope.names
        left_out = {names.of(it.this if isinstance(it, exp.Column) else it)
                    for it in star.args.get("except_") or ()}  # fmt: skip
        outs, ends = found
        kept = Relation((out for out in outs if out.name not in left_out), ends)
        self._value(kept, step, into, problems)


def _field(step: Step) -> Step:
    return then(step, TRANSFORMATION)
