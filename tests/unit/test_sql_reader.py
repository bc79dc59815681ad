# ruff: noqa: S608 - nobody runs this SQL
"""The SQL reader beside its cases: types, names of tables, bad input, cost."""

import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median

import pytest
import sqlglot
from hypothesis import given, settings
from hypothesis import strategies as st

from dbtstream.column_lineage import (
    MAX_SQL_BYTES,
    Analysis,
    AnalysisRequest,
    KnownColumn,
    SourceTable,
)
from dbtstream.sql_child.names import DIALECTS
from dbtstream.sql_child.reader import MAX_MESSAGE, read_sql
from dbtstream.statuses import ColumnLineageStatus
from tests.unit.column_lineage_cases import CASES, Case


def read(sql: str, *sources: SourceTable, dialect: str = "duckdb") -> Analysis:
    return read_sql(
        AnalysisRequest(unique_id="model.shop.x", sql=sql, dialect=dialect, sources=list(sources))
    )


def table(relation_name: str, *columns: str, ref: str = "model.shop.t") -> SourceTable:
    """Columns as `name type`."""
    known = [KnownColumn(name=name, type=type_ or None) for name, _, type_ in
             (it.partition(" ") for it in columns)]  # fmt: skip
    return SourceTable(ref=ref, relation_name=relation_name, columns=known or None)


def refs(analysis: Analysis, column: str) -> list[tuple[str | None, str | None, str]]:
    assert analysis.fields is not None, analysis.message
    return [(it.ref, it.relation_name, it.field) for it in analysis.fields[column]]


def types(analysis: Analysis) -> dict[str, str | None]:
    return {column.name: column.type for column in analysis.columns or []}


# Types.


def test_a_type_is_told_only_where_it_is_sure() -> None:
    """Of a column passed on, the source's; of a cast, what it casts to; else none."""
    orders = table('"db"."s"."orders"', "id BIGINT", "amount DECIMAL(10,2)", "note")

    analysis = read(
        """
        with o as (select * from db.s.orders)
        select id as key, amount + 1 as more, cast(id as varchar) as text, (amount) as amount,
            note, try_cast(note as date) as day, count(*) as n
        from o group by all
        """,
        orders,
    )

    assert types(analysis) == {
        "key": "BIGINT",
        "more": None,
        "text": "TEXT",
        "amount": "DECIMAL(10,2)",
        "note": None,
        "day": "DATE",
        "n": None,
    }


def test_a_union_has_a_type_where_all_its_parts_agree() -> None:
    sources = [
        table('"db"."s"."a"', "id INT", "x INT", ref="a"),
        table('"db"."s"."b"', "id INT", "x DOUBLE", ref="b"),
    ]

    analysis = read("select id, x from db.s.a union all select id, x from db.s.b", *sources)

    assert types(analysis) == {"id": "INT", "x": None}


@pytest.mark.parametrize(
    ("dialect", "written", "told"),
    [
        ("bigquery", "cast(a as int64)", "INT64"),
        ("snowflake", "a::varchar(10)", "VARCHAR(10)"),
        ("postgres", "a::timestamptz", "TIMESTAMPTZ"),
    ],
)
def test_a_cast_is_told_in_the_dialect(dialect: str, written: str, told: str) -> None:
    analysis = read(f"select {written} as x from raw.t", dialect=dialect)

    assert list(types(analysis).values()) == [told]


# Names of tables.

LONG = "x" * 200


@pytest.mark.parametrize(
    ("dialect", "known_as", "in_the_sql"),
    [
        ("duckdb", '"shop"."main"."orders"', "shop.main.ORDERS"),
        ("duckdb", '"shop"."main"."orders"', '"SHOP".main."Orders"'),
        ("duckdb", '"shop"."main"."or ""d"" .ers"', '"shop"."main"."or ""d"" .ers"'),
        ("duckdb", '"shop"."main"."Größe 数"', '"shop"."main"."Größe 数"'),
        ("duckdb", f'"shop"."main"."{LONG}"', f'"shop"."main"."{LONG}"'),
        ("duckdb", '"shop"."main"."orders"', "main.orders"),
        ("duckdb", "read_csv('in/*.csv', header=true)", "read_csv('in/*.csv', header=true)"),
        ("duckdb", "'in/orders.parquet'", "'in/orders.parquet'"),
        ("postgres", '"shop"."main"."Orders"', 'shop.main."Orders"'),
        ("postgres", '"shop"."main"."orders"', "Shop.Main.Orders"),
        ("snowflake", "SHOP.main.Orders", '"SHOP"."MAIN"."ORDERS"'),
        ("snowflake", 'shop.main."orders"', '"SHOP".main."orders"'),
        ("bigquery", "`my-p`.`d`.`t`", "`my-p.d.t`"),
        ("bigquery", "`my-p`.`d`.`t`", "my-p.d.t"),
        ("databricks", "`c`.`s`.`t`", "C.S.T"),
        ("redshift", '"shop"."main"."orders"', '"Shop"."Main"."Orders"'),
        ("sqlserver", '"shop"."main"."orders"', "[shop].[main].[Orders]"),
        ("clickhouse", "`main`.`Orders`", "main.Orders"),
        ("mysql", "`main`.`orders`", "main.orders"),
    ],
)
def test_a_table_is_known_however_it_is_quoted(
    dialect: str, known_as: str, in_the_sql: str
) -> None:
    analysis = read(f"select id as x from {in_the_sql}", table(known_as, "id"), dialect=dialect)

    assert [ref for name in analysis.fields or {} for ref, *_ in refs(analysis, name)] == [
        "model.shop.t"
    ], analysis


@pytest.mark.parametrize(
    ("dialect", "known_as", "in_the_sql"),
    [
        ("postgres", '"shop"."main"."Orders"', "shop.main.orders"),
        ("snowflake", '"shop"."main"."orders"', "shop.main.orders"),
        ("bigquery", "`p`.`d`.`T`", "`p`.`d`.`t`"),
        ("duckdb", '"shop"."main"."orders"', "orders"),
        ("duckdb", '"shop"."main"."orders"', "other.main.orders"),
    ],
)
def test_another_table_is_not_taken_for_a_source(
    dialect: str, known_as: str, in_the_sql: str
) -> None:
    """It has no ref; what the SQL calls it is told instead."""
    analysis = read(f"select id as x from {in_the_sql}", table(known_as, "id"), dialect=dialect)

    (found,) = [it for name in analysis.fields or {} for it in refs(analysis, name)]
    assert found[0] is None
    assert found[1] == in_the_sql.replace('"', "")


def test_of_two_sources_with_one_relation_the_first_is_told() -> None:
    sources = [table('"a"."b"."c"', "id", ref="first"), table("a.b.C", "id", ref="second")]

    assert refs(read("select id from a.b.c", *sources), "id") == [("first", None, "id")]


def test_a_name_without_database_stands_for_no_source_if_there_are_two() -> None:
    sources = [table('"a"."b"."c"', "id", ref="first"), table('"x"."b"."c"', "id", ref="second")]

    assert refs(read("select id from b.c", *sources), "id") == [(None, "b.c", "id")]


@pytest.mark.parametrize("relation_name", ["", "((((", "select", '"open', "a.b.c.d.e.f", "a b c;"])
def test_a_source_whose_name_is_no_name_harms_no_other(relation_name: str) -> None:
    sources = [table(relation_name, "x", ref="odd"), table("a.b.c", "id", ref="good")]

    assert refs(read("select id from a.b.c", *sources), "id") == [("good", None, "id")]


def test_a_field_is_spelled_as_the_source_spells_it() -> None:
    """A column list from a CSV file has other cases than Snowflake."""
    orders = table("SHOP.MAIN.ORDERS", "id", "Order_Total")

    analysis = read(
        "with o as (select * from shop.main.orders) select id, order_total as t from o",
        orders,
        dialect="snowflake",
    )

    assert refs(analysis, "ID") == [("model.shop.t", None, "id")]
    assert refs(analysis, "T") == [("model.shop.t", None, "Order_Total")]


# Bad input.


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("", "no statement"),
        ("-- nothing here\n;", "no statement"),
        ("select 1 as a; select 2 as b", "2 statements"),
        ("create table x as select 1 as a", "a statement of type CREATE"),
        ("select a from t where", "cannot parse: "),
        ("select {{ ref('x') }} as a from t", "there is Jinja"),
        ("select a from t {% if x %} where b {% endif %}", "there is Jinja"),
        ("selec a frm t", "cannot parse: "),
        ("drop table t", "a statement of type DROP"),
        ("\x00\x01\ufffd", ""),
        ("select", "a query without columns"),
        ("select '\ud800' as a", "UnicodeEncodeError"),
        ("select 'a", "cannot parse: error tokenizing"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_says_why(sql: str, said: str) -> None:
    analysis = read(sql)

    assert analysis.status is ColumnLineageStatus.ERROR
    assert said in (analysis.message or "")
    assert analysis.fields is None


def test_a_semicolon_and_a_comment_at_the_end_do_not_count() -> None:
    assert read("select 1 as a; -- the end\n").status is ColumnLineageStatus.COMPLETE


def test_braces_in_strings_and_comments_are_no_jinja() -> None:
    assert read("select '{{ x }}' as a -- {% y %}\n").status is ColumnLineageStatus.COMPLETE


def test_a_parse_error_says_where_and_quotes_no_sql() -> None:
    """The SQL may have what nobody should read in a log."""
    message = read("select a,\n  from t where secret_value = 'x' and and").message or ""

    assert "line 2" in message
    assert "secret_value" not in message


def test_an_unknown_adapter_is_unsupported() -> None:
    analysis = read("select 1 as a", dialect="lakehouse9000")

    assert analysis.status is ColumnLineageStatus.UNSUPPORTED
    assert "lakehouse9000" in (analysis.message or "")


def test_every_dialect_is_one_that_sqlglot_has() -> None:
    assert all(sqlglot.Dialect.get(name) for name in DIALECTS.values())


@pytest.mark.parametrize("depth", [50, 500, 20_000])
def test_deep_nesting_is_read_or_an_error(depth: int) -> None:
    parentheses = read(f"select {'(' * depth}1{')' * depth} as x")
    subqueries = read(f"{'select * from (' * depth}select 1 as x{')' * depth}")

    for analysis in (parentheses, subqueries):
        assert analysis.status in (ColumnLineageStatus.COMPLETE, ColumnLineageStatus.ERROR)


def test_long_chains_are_not_deep() -> None:
    """Thousands of ANDs, of unions and of common table expressions."""
    conditions = read("select a from raw.t where " + " and ".join(["a = 1"] * 2000))
    unions = read(" union all ".join(f"select a, b from raw.t{i}" for i in range(500)))
    chain = "with c0 as (select * from raw.t)" + "".join(
        f", c{i} as (select * from c{i - 1})" for i in range(1, 300)
    )

    assert conditions.status is ColumnLineageStatus.COMPLETE
    assert len(refs(unions, "a")) == 500
    assert refs(read(f"{chain} select id from c299"), "id") == [(None, "raw.t", "id")]


def test_more_than_a_mebibyte_is_not_read() -> None:
    analysis = read(f"select '{'ä' * (MAX_SQL_BYTES // 2)}' as x")

    assert analysis.status is ColumnLineageStatus.ERROR
    assert "1,048,576" in (analysis.message or "")


def test_a_mebibyte_is_read() -> None:
    analysis = read(f"select id, '{'x' * (MAX_SQL_BYTES - 100)}' as x from raw.t")

    assert analysis.status is ColumnLineageStatus.COMPLETE


def test_an_alias_that_doubles_itself_costs_nothing() -> None:
    """`b1 = b0 + b0, b2 = b1 + b1 …`: written out it would be 2^200 columns."""
    items = ", ".join(f"b{i - 1} + b{i - 1} as b{i}" for i in range(1, 200))

    analysis = read(f"select a as b0, {items} from db.s.t", table("db.s.t", "a"))

    assert refs(analysis, "b199") == [("model.shop.t", None, "a")]


def test_messages_are_short() -> None:
    columns = ", ".join(f"column_number_{i}" for i in range(300))

    message = read(f"select {columns} from raw.a join raw.b using (id)").message or ""

    assert len(message) <= MAX_MESSAGE
    assert "and 297 more" in message


WORDS = (
    *("select", "from", "where", "join", "on", "using", "group", "by", "order", "with", "as"),
    *("recursive", "union", "all", "(", ")", ",", ".", "*", "a", "b", "t", "u", '"q"', "'x'", "1"),
    *("=", "+", "case", "when", "then", "end", "over", "partition", "lateral", "unnest", "pivot"),
    *("for", "in", "values", "qualify", "exists", "distinct", "null", "exclude", "replace"),
    *("struct", "[", "]", "{", "}", "::", ":", "->", ";", "--", "/*", "*/", "`", "$", "@", "%"),
)


@settings(max_examples=300, deadline=None)
@given(
    sql=st.one_of(
        st.text(max_size=200), st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join)
    ),
    dialect=st.sampled_from(sorted(DIALECTS)),
)
def test_no_text_makes_it_raise(sql: str, dialect: str) -> None:
    assert read(sql, table("a.b.t", "a", "b"), dialect=dialect).status in ColumnLineageStatus


@settings(max_examples=200, deadline=None)
@given(case=st.sampled_from(CASES), data=st.data())
def test_no_damage_to_a_statement_makes_it_raise(case: Case, data: st.DataObject) -> None:
    """A piece cut out of SQL that is nearly right."""
    sql = case.sql
    begin = data.draw(st.integers(0, len(sql)))
    length = data.draw(st.integers(0, 30))

    assert read(sql[:begin] + sql[begin + length :]).status in ColumnLineageStatus


# Cost.


def test_the_cost_is_linear_in_columns() -> None:
    """Three times the columns cost about three times as much, and not nine. CPU of pairs that
    alternate, the best of several: a busy machine makes both slower."""
    ratios = []
    for _ in range(5):
        small, large = (_cpu_s(*wide(columns)) for columns in (100, 300))
        ratios.append(large / small)

    assert min(ratios) < 6
    assert median(ratios) < 9


def wide(columns: int) -> tuple[str, SourceTable, SourceTable]:
    """Stars, a join, a window and an expression for each column."""
    names = [f"c{i}" for i in range(columns)]
    items = ", ".join(f"coalesce({name}, 0) + {name}_b as {name}_sum" for name in names)
    sql = f"""
        with a as (select * from db.s.a),
        ranked as (select *, row_number() over (partition by c0 order by c1) as rn from a),
        joined as (select ranked.*, b.* from ranked left join db.s.b as b on b.c0_b = c0)
        select {items}, * from joined where rn = 1
    """
    return (
        sql,
        table("db.s.a", *names, ref="a"),
        table("db.s.b", *(f"{name}_b" for name in names), ref="b"),
    )


def _cpu_s(sql: str, *sources: SourceTable) -> float:
    began = time.process_time()
    assert read(sql, *sources).status is ColumnLineageStatus.COMPLETE
    return time.process_time() - began


def test_asking_does_not_import_sqlglot() -> None:
    """The daemon's side: 25 MB and 0.2 s of CPU that it does not pay."""
    modules: Sequence[str] = ("dbtstream.column_lineage", "dbtstream.sql_process")
    code = f"import sys, {', '.join(modules)}; sys.exit('sqlglot' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_source_that_may_have_more_columns_is_taken_at_its_word_and_no_further() -> None:
    """Documentation names some columns: a star over them is not all, a CTE of named ones is."""
    source = SourceTable(
        ref="raw",
        relation_name='"shop"."main"."raw"',
        columns=[KnownColumn(name="id"), KnownColumn(name="amount")],
        partial=True,
    )

    def read(sql: str) -> Analysis:
        request = AnalysisRequest(unique_id="m", sql=sql, dialect="duckdb", sources=[source])
        return read_sql(request)

    star = read('select * from "shop"."main"."raw"')
    assert star.status is ColumnLineageStatus.PARTIAL
    assert star.message is not None
    assert '"shop"."main"."raw" are not all known' in star.message
    assert star.columns is None
    assert star.fields is not None
    assert set(star.fields) == {"id", "amount"}

    named = read('with a as (select id, extra from "shop"."main"."raw") select * from a')
    assert named.status is ColumnLineageStatus.COMPLETE
    assert named.fields is not None
    assert {name: [ref.field for ref in refs] for name, refs in named.fields.items()} == {
        "id": ["id"],
        "extra": ["extra"],
    }
