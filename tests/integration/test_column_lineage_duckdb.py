# ruff: noqa: S608 - SQL of our own
"""What the SQL reader says, held against a database that runs the same SQL.

The cases of `column_lineage_cases` were read by people; DuckDB has no opinion. It names the
columns, and shows which of them change when a source's column does: each of those must be
in the column's lineage or among what decides on the rows.
"""

from collections import Counter
from collections.abc import Iterator

import duckdb
import pytest

from dbtstream.column_lineage import Analysis
from dbtstream.sql_child.reader import read_sql
from tests.integration.column_lineage_statements import statement
from tests.unit.column_lineage_cases import CASES, SHOP, Case
from tests.unit.test_sql_reader_cases import request

TYPES = {
    "id": "integer",
    "customer_id": "integer",
    "order_id": "integer",
    "payment_id": "integer",
    "amount": "integer",
    "ordered_at": "timestamp",
    "order_date": "date",
    "tags": "varchar[]",
    "address": "struct(city varchar, zip varchar)",
}
VALUES = {
    "key": ("{row}", "({row} * 7 + 1) % 13"),  # one row each, so that no order is by chance
    "integer": ("{row} % 4 + {seed}", "({row} * 7 + 1) % 5 + {seed}"),
    "timestamp": (
        "timestamp '2024-01-01' + to_days({row} % 3)",
        "timestamp '2024-01-02' + to_days(({row} * 5) % 11)",
    ),
    "date": (
        "date '2024-01-01' + cast({row} % 3 as integer)",
        "date '2024-01-02' + cast(({row} * 5) % 11 as integer)",
    ),
    "varchar": (
        "case {row} % 3 when 0 then 'paid' when 1 then 'a' else 'coupon' end",
        "case {row} % 4 when 0 then 'credit_card' when 1 then null else 'paid' end",
    ),
    "varchar[]": ("['p', 'q']", "['x', null, 'z']"),
    "struct(city varchar, zip varchar)": (
        "{{'city': 'Bern', 'zip': '3000'}}",
        "{{'city': 'Genf', 'zip': '1200'}}",
    ),
}
RUN_HERE = [
    case
    for case in CASES
    if case.dialect == "duckdb"
    and case.partial is None
    and not case.added
    and "raw." not in case.sql
    and "parquet" not in case.sql
]
ROWS = 7
STATEMENTS = 40


@pytest.fixture
def shop() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as connection:
        connection.execute("attach ':memory:' as shop")
        connection.execute("set lambda_syntax = 'ENABLE_SINGLE_ARROW'")
        yield connection


@pytest.mark.parametrize("case", RUN_HERE, ids=lambda case: case.name)
def test_columns_have_the_names_that_the_database_gives_them(
    case: Case, shop: duckdb.DuckDBPyConnection
) -> None:
    for table in case.sources:
        _fill(shop, case, table, changed=None)

    analysis = read_sql(request(case))

    described = shop.execute(f"describe {case.sql}").fetchall()
    assert [column.name for column in analysis.columns or []] == [row[0] for row in described]


@pytest.mark.parametrize("case", RUN_HERE, ids=lambda case: case.name)
def test_what_changes_a_column_is_in_its_lineage(
    case: Case, shop: duckdb.DuckDBPyConnection
) -> None:
    """Each source column is changed alone; no case may hide a dependency."""
    for table in case.sources:
        _fill(shop, case, table, changed=None)

    assert not _missed(shop, case, read_sql(request(case)))


@pytest.mark.parametrize("first", range(0, STATEMENTS, 10))
def test_statements_made_by_chance(first: int, shop: duckdb.DuckDBPyConnection) -> None:
    """Both of the above, of statements that nobody has read."""
    shop.execute("set threads = 1")
    for table in SHOP:
        _fill(shop, Case("", "", ""), table, changed=None)
    for seed in range(first, first + 10):
        case = Case(f"seed {seed}", statement(seed), "")
        analysis = read_sql(request(case))
        described = [row[0] for row in shop.execute(f"describe {case.sql}").fetchall()]
        assert [column.name for column in analysis.columns or []] == described, case.sql
        assert analysis.status == "complete", (analysis.message, case.sql)
        assert not _missed(shop, case, analysis), case.sql


def test_enough_cases_run_here() -> None:
    assert len(RUN_HERE) >= 45


def _missed(
    shop: duckdb.DuckDBPyConnection, case: Case, analysis: Analysis
) -> list[tuple[str, str, set[str]]]:
    """Table, column, and what changed with it though the lineage does not say so."""
    before = _columns(shop, case)
    missed = []
    for table, names in case.sources.items():
        used = [name for name in (names or "").split() if name in case.sql or "*" in case.sql]
        for name in used if table in case.sql else ():
            _fill(shop, case, table, changed=name)
            after = _columns(shop, case)
            moved = {column for column in before if before[column] != after[column]}
            if unsaid := moved - _reached_by(analysis, table, name):
                missed.append((table, name, unsaid))
        if table in case.sql:
            _fill(shop, case, table, changed=None)
    return missed


def _reached_by(analysis: Analysis, table: str, name: str) -> set[str]:
    fields = analysis.fields or {}
    if any((it.ref, it.field) == (table, name) for it in analysis.dataset_inputs or []):
        return set(fields)
    return {
        column
        for column, refs in fields.items()
        if any((it.ref, it.field) == (table, name) for it in refs)
    }


def _fill(shop: duckdb.DuckDBPyConnection, case: Case, table: str, *, changed: str | None) -> None:
    """A few rows; of the column `changed` other values than otherwise."""
    items = []
    for seed, name in enumerate((case.sources[table] or "").split()):
        type_ = TYPES.get(name, "varchar")
        values = VALUES["key" if name == "id" else type_]
        expression = values[name == changed].format(row="r", seed=seed)
        items.append(f"cast({expression} as {type_}) as {name}")
    shop.execute(
        f'create or replace table shop.main."{table}" as '
        f"select {', '.join(items)} from range({ROWS}) as t(r)"
    )


def _columns(shop: duckdb.DuckDBPyConnection, case: Case) -> dict[str, Counter[str]]:
    """Each column's values, whatever the order of the rows."""
    result = shop.execute(case.sql)
    names = [column[0] for column in result.description or []]
    rows = result.fetchall()
    return {name: Counter(repr(row[place]) for row in rows) for place, name in enumerate(names)}
