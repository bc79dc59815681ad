"""Names in SQL: which dialect an adapter speaks, how it folds case, which table is meant.

Part of the SQL reader (`reader`), so in its process only. Knows nothing of queries.
"""

from functools import lru_cache

from sqlglot import exp, parse_one
from sqlglot.dialects.dialect import Dialect, NormalizationStrategy
from sqlglot.errors import SqlglotError

from dbtstream.column_lineage import SourceTable
from dbtstream.sql_child.traces import IDENTITY, Out, Relation

DIALECTS = {
    # dbt's adapter type    sqlglot's dialect
    "athena": "athena",
    "bigquery": "bigquery",
    "clickhouse": "clickhouse",
    "databricks": "databricks",
    "doris": "doris",
    "dremio": "dremio",
    "duckdb": "duckdb",
    "exasol": "exasol",
    "fabric": "tsql",
    "glue": "spark",
    "hive": "hive",
    "impala": "hive",
    "materialize": "materialize",
    "mysql": "mysql",
    "oracle": "oracle",
    "postgres": "postgres",
    "redshift": "redshift",
    "risingwave": "risingwave",
    "singlestore": "singlestore",
    "snowflake": "snowflake",
    "spark": "spark",
    "sqlite": "sqlite",
    "sqlserver": "tsql",
    "starrocks": "starrocks",
    "synapse": "tsql",
    "teradata": "teradata",
    "trino": "trino",
}

LOWERS_ALL = frozenset({"redshift", "trino", "presto", "athena"})
"""Insensitive to case, and what is stored is lower case, whatever was written."""

NAMES_AS_DEFINED = frozenset({"duckdb"})
"""`select ID from t` gives a column spelled as t's own definition spells it (seen in 2.0)."""


class Names:
    """How one dialect compares and spells identifiers."""

    def __init__(self, dialect: str) -> None:
        self.name = dialect
        self.dialect = Dialect.get_or_raise(dialect)
        strategy = self.dialect.normalization_strategy
        if dialect == "mysql":  # tables are as the file system has them; columns never are
            strategy = NormalizationStrategy.CASE_INSENSITIVE
        self._upper = strategy is NormalizationStrategy.UPPERCASE
        self._lower = strategy is NormalizationStrategy.LOWERCASE
        self._exact = strategy is NormalizationStrategy.CASE_SENSITIVE
        self._exact_tables = self._exact or dialect in ("bigquery", "mysql")
        self.as_defined = dialect in NAMES_AS_DEFINED

    def fold(self, name: str, quoted: bool = True) -> str:
        """Equal for names of columns and aliases that mean the same."""
        if self._exact or (quoted and (self._upper or self._lower)):
            return name
        return name.upper() if self._upper else name.lower()

    def of(self, identifier: exp.Expr) -> str:
        return self.fold(identifier.name, bool(identifier.args.get("quoted")))

    def spelled(self, identifier: exp.Expr) -> str:
        """As the database will have a column that this names."""
        if self._upper or self._lower or self.name in LOWERS_ALL:
            return self.of(identifier)
        return identifier.name

    def table(self, identifier: exp.Expr) -> str:
        return identifier.name if self._exact_tables else self.of(identifier)


TableKey = tuple[str, ...]


def table_key(table: exp.Table, names: Names) -> TableKey:
    """Equal for tables that are the same: the folded parts, or a function's text."""
    if isinstance(table.this, exp.Identifier | exp.Dot):
        return tuple(names.table(part) for part in table.parts)
    return ("()", table.this.sql(dialect=names.name))


@lru_cache(maxsize=4096)
def _relation_key(relation_name: str, dialect: str) -> TableKey | None:
    try:
        table = parse_one(f"select * from {relation_name}", dialect=dialect).find(exp.Table)  # noqa: S608
    except (SqlglotError, RecursionError, ValueError):
        return None  # then no table of the statement is this one
    return table_key(table, Names(dialect)) if table else None


class Table:
    """A table that the statement reads, with a number for traces."""

    def __init__(
        self, number: int, whose: str, names: Names, source: SourceTable | None = None
    ) -> None:
        self.number = number
        self.whose = whose
        self.ref = source.ref if source else None
        self._names = names
        self._asked: dict[str, Out] = {}
        known = (source.columns if source else None) or []
        is_whole = source is not None and source.columns is not None and not source.partial
        self.relation = Relation(
            (self._out(it.name, it.name, it.type) for it in known), () if is_whole else [self]
        )

    def find(self, name: str, spelled: str) -> Out | None:
        """A column that nobody has told us of (`traces.End`)."""
        return self.unlisted(name, spelled)

    def unlisted(self, name: str, spelled: str) -> Out:
        """A column that the statement says is there. The first spelling stays."""
        return self._asked.setdefault(name, self._out(name, spelled, None))

    def _out(self, name: str, spelled: str, type_: str | None) -> Out:
        trace = {(self.number, spelled): frozenset([IDENTITY])}
        return Out(self._names.fold(name), spelled, trace, type_)


class Tables:
    """The sources that were named in the request, and those that turn up."""

    def __init__(self, sources: list[SourceTable], names: Names) -> None:
        self._names = names
        self._sources: dict[TableKey, SourceTable | None] = {}
        self._tables: dict[TableKey, Table] = {}
        self.numbered: list[Table] = []
        for source in sources:
            key = _relation_key(source.relation_name, names.name)
            if key is not None:
                self._sources.setdefault(key, source)
        for key, maybe in list(self._sources.items()):
            # `include(database=false)` leaves the database out; the name alone says too little.
            if maybe is not None and len(key) == 3 and key[0] != "()":
                short = key[1:]
                taken = short in self._sources
                self._sources[short] = None if taken else maybe

    def get(self, table: exp.Table) -> Table:
        key = table_key(table, self._names)
        source = self._sources.get(key)
        if source is not None:
            key = ("source", source.ref)
        found = self._tables.get(key)
        if found is None:
            whose = source.relation_name if source else self._text(table)
            found = Table(len(self.numbered), whose, self._names, source)
            self._tables[key] = found
            self.numbered.append(found)
        return found

    def has(self, table: exp.Table) -> bool:
        return self._sources.get(table_key(table, self._names)) is not None

    def _text(self, table: exp.Table) -> str:
        """Without alias and joins. Copies, since a node can have only one parent."""
        parts = {name: table.args.get(name) for name in exp.TABLE_PARTS}
        bare = exp.Table(**{name: part.copy() for name, part in parts.items() if part})
        return bare.sql(dialect=self._names.name)
