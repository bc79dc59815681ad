"""What a name in a SELECT means: its sources, its own aliases, the query around it.

Part of the SQL reader (`reader`), so in its process only. Where what is known does not say
which of two readings is meant, the answer is an `Out` with a problem, never a guess.
"""

from dataclasses import dataclass, field
from enum import Enum, auto

from sqlglot import exp

from dbtstream.sql_child.names import Names, Table
from dbtstream.sql_child.traces import (
    TRANSFORMATION,
    End,
    Gathering,
    Out,
    Relation,
    Without,
    gather,
)


class Clause(Enum):
    """Where a name stands: its own aliases are seen in some places only."""

    SOURCE = auto()  # FROM, JOIN … ON: no alias exists yet
    SELECT = auto()
    WHERE = auto()
    GROUP = auto()
    HAVING = auto()
    QUALIFY = auto()
    ORDER = auto()


ALIASES_IN_SELECT = frozenset(
    ("snowflake", "duckdb", "redshift", "databricks", "spark", "clickhouse", "teradata")
)
"""`select a + 1 as b, b * 2 as c`: a later column may use an earlier one's alias."""

ALIASES_IN_WHERE = frozenset(("snowflake", "duckdb", "clickhouse", "teradata"))
ALIASES_FIRST = frozenset({"clickhouse"})
"""Everywhere else a source's column hides an alias, but in ORDER BY."""


@dataclass
class Source:
    """An item of FROM. `path` is the table's full name, for `schema.table.column`."""

    alias: str
    relation: Relation
    path: tuple[str, ...] = ()
    table: Table | None = None
    one_value: bool = False  # a table function: its alias is the column, too
    hidden: frozenset[str] = frozenset()  # of a USING: the left side has them


@dataclass
class Scope:
    """The names of one SELECT, while it is read from FROM to ORDER BY."""

    names: Names
    outer: "Scope | None" = None
    sources: list[Source] = field(default_factory=list)
    merged: dict[str, Out] = field(default_factory=dict)  # USING
    merged_order: list[str] = field(default_factory=list)
    aliases: dict[str, Out] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What contradicts the columns that we know."""
    _by_alias: dict[str, Source] = field(default_factory=dict)

    def add(self, source: Source) -> None:
        self.sources.append(source)
        if source.alias:
            self._by_alias.setdefault(source.alias, source)

    def branch(self) -> "Scope":
        """The same names now; what is added to it stays there."""
        branch = Scope(self.names, self.outer, merged=dict(self.merged))
        for source in self.sources:
            branch.add(source)
        return branch

    def source(self, alias: str) -> Source | None:
        return self._by_alias.get(alias)

    def column(self, column: exp.Column, clause: Clause) -> tuple[Out, bool]:
        """What it is, and whether it is only a field of it: `struct_column.field`."""
        parts = column.parts
        if len(parts) == 1:
            return self.plain(parts[0], clause), False
        scope: Scope | None = self
        while scope is not None:
            for source, used in scope.matching(parts):
                return scope.of(source, parts[used]), len(parts) > used + 1
            scope = scope.outer
        return self.plain(parts[0], clause), True

    def star(self, column: exp.Expr | None = None) -> tuple[list[Out], list[End]] | None:
        """All columns, or those of `t.*`; None where there is no such source: it is a struct."""
        if isinstance(column, exp.Column):
            parts = column.parts
            for source, used in self.matching(parts):
                if used == len(parts) - 1:
                    return source.relation.outs, source.relation.ends
            return None
        outs: list[Out] = []
        ends: list[End] = []
        for source in self.sources:
            mine, my_ends = source.relation.outs, source.relation.ends
            if self.merged:
                kept = (out for out in mine if out.name not in source.hidden)
                mine = [self.merged.get(out.name, out) for out in kept]
                my_ends = [Without(end, frozenset(self.merged)) for end in my_ends]
            outs += mine
            ends += my_ends
        return (self._using_order(outs) if self.merged else outs), ends

    def matching(self, parts: list[exp.Expr]) -> list[tuple[Source, int]]:
        """The source that the first parts name, and how many they are."""
        if len(parts) > 2:
            for source in self.sources:
                for count in range(len(parts) - 1, 1, -1):
                    path = tuple(self.names.table(part) for part in parts[:count])
                    if source.path[-count:] == path and len(source.path) >= count:
                        return [(source, count)]
        named = self._by_alias.get(self.names.of(parts[0]))
        return [(named, 1)] if named is not None else []

    def of(self, source: Source, identifier: exp.Expr) -> Out:
        name, spelled = self.names.of(identifier), self.names.spelled(identifier)
        out = source.relation.find(name, spelled)
        if out is not None:
            return out
        if source.table is not None:  # then what we know of the table is not all
            self.notes.append(f"{spelled} is not a known column of {source.table.whose}")
            return source.table.unlisted(name, spelled)
        return _not_found(name, spelled, f"{source.alias} has no column {spelled}")

    def plain(self, identifier: exp.Expr, clause: Clause) -> Out:
        name, spelled = self.names.of(identifier), self.names.spelled(identifier)
        alias = self.aliases.get(name)
        if alias is not None and (clause is Clause.ORDER or self.names.name in ALIASES_FIRST):
            return alias
        return (
            self.certain(name)
            or self._alias_or_open(name, spelled, alias, clause)
            or self._row(name, spelled)
            or (self.outer.plain(identifier, Clause.SOURCE) if self.outer else None)
            or self._invented(name, spelled)
        )

    def certain(self, name: str) -> Out | None:
        if name in self.merged:
            return self.merged[name]
        found = [out for it in self.sources if (out := it.relation.exactly(name)) is not None]
        found = found or [out for it in self.sources if (out := it.relation.loosely(name))]
        if len(found) > 1:
            where = f"{name} is a column of several tables"
            return found[0]._replace(problem=found[0].problem or where)
        if found:
            return found[0]
        source = self._by_alias.get(name)
        return source.relation.find(name, name) if source and source.one_value else None

    def _alias_or_open(
        self, name: str, spelled: str, alias: Out | None, clause: Clause
    ) -> Out | None:
        opened = self.open(name, spelled)
        if alias is None or opened is None:
            return alias or opened
        if clause is Clause.SELECT and self.names.name not in ALIASES_IN_SELECT:
            return opened
        if clause is Clause.WHERE and self.names.name not in ALIASES_IN_WHERE:
            return opened
        # A statement that groups by, or picks by window, is only valid with the alias.
        if clause not in (Clause.SELECT, Clause.WHERE) or _same_columns(alias, opened):
            return alias
        problem = f"{spelled} may be an alias or a column of a table whose columns are not known"
        return alias._replace(problem=alias.problem or problem)

    def open(self, name: str, spelled: str) -> Out | None:
        found = [
            (source, out)
            for source in self.sources
            if source.relation.ends and (out := source.relation.opened(name, spelled))
        ]
        if not found:
            return None
        if len(found) > 1:
            whose = " or ".join(end.whose for source, _ in found for end in source.relation.ends)
            return _not_found(name, spelled, f"{spelled} may be a column of {whose}")
        (source, out) = found[0]
        outside = self.outer
        while outside is not None:
            if outside.certain(name) or outside.open(name, spelled):
                whose = source.relation.ends[0].whose
                problem = f"{spelled} may be a column of {whose} or of the query around it"
                return out._replace(problem=out.problem or problem)
            outside = outside.outer
        return out

    def _row(self, name: str, spelled: str) -> Out | None:
        """A source's name as a value: its whole row, as in `to_json(t)`."""
        source = self._by_alias.get(name)
        if source is None:
            return None
        trace, problem = _whole(source.relation.outs, source.relation.ends)
        return Out(name, spelled, trace, problem=problem)

    def _invented(self, name: str, spelled: str) -> Out:
        if name.upper() in self.names.dialect.PSEUDOCOLUMNS:
            return Out(name, spelled, {})
        return _not_found(name, spelled, f"there is no column {spelled} where it is used")

    def _using_order(self, outs: list[Out]) -> list[Out]:
        """Where a USING's columns go in a star. Other dialects leave them where they are."""
        order = self.names.dialect.USING_COLUMN_ORDER.name
        if order == "IN_PLACE":
            return outs
        first = [self.merged[name] for name in self.merged_order]
        if order == "LEFT_TABLE":
            first = [out for out in outs if out.name in self.merged]
        return first + [out for out in outs if out.name not in self.merged]


def _whole(outs: list[Out], ends: list[End]) -> tuple[Gathering, str | None]:
    trace: Gathering = {}
    for out in outs:
        gather(trace, out.trace, TRANSFORMATION)
    problems = [f"the columns of {end.whose} are not known" for end in ends]
    problems += [out.problem for out in outs if out.problem]
    return trace, problems[0] if problems else None


def _same_columns(one: Out, other: Out) -> bool:
    return one.problem is None and other.problem is None and set(one.trace) == set(other.trace)


def _not_found(name: str, spelled: str, problem: str) -> Out:
    return Out(name, spelled, {}, problem=problem)
