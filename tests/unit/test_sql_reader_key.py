# ruff: noqa: S608 - nobody runs this SQL
"""The key under which an answer is kept: what it must not tell apart, and what it must."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbtstream.column_lineage import AnalysisRequest, KnownColumn, SourceTable, analysis_key
from dbtstream.sql_child.reader import read_sql
from dbtstream.sql_literals import MAX_STRIPPED_BYTES, without_literals
from dbtstream.statuses import ColumnLineageStatus
from tests.unit.column_lineage_cases import CASES, Case
from tests.unit.test_sql_reader_cases import request

QUESTION = AnalysisRequest(
    unique_id="model.shop.a",
    sql="select id from shop.main.orders",
    dialect="duckdb",
    sources=[
        SourceTable(ref="o", relation_name="shop.main.orders", columns=[KnownColumn(name="id")])
    ],
)


@pytest.mark.parametrize(
    "sql",
    [
        "select a from t where d >= '{date}'",
        "select a from t where d >= '{time}' and d < '{time}'",
        "select a from t where d between '{date}' and '{date}' and n > {number}",
        "select a from t where n between {number} and {number}",
        "select a from t where d > cast('{time}' as timestamp) and e = timestamp '{time}'",
        "select a, '{time}' as run_at, '{uuid}'::uuid as run_id from t",
        "with x as (select a from t where n <> {number}) select '{date}' as d, a from x",
        # As dbt renders a batch of a microbatch model.
        """select * from (select * from "db"."main"."t"
           where ts >= '{time}+00:00' and ts < '{time}+00:00') as t""",
    ],
)
def test_bounds_of_a_run_do_not_miss_the_cache(sql: str) -> None:
    one = sql.format(date="2024-01-01", time="2024-01-01 00:00:00", number=5,
                     uuid="01890a5d-ac96-774b-bcce-b302099a8057")  # fmt: skip
    other = sql.format(date="2025-12-31", time="2025-12-31T23:59:59.123456", number=1234.5,
                       uuid="ffffffff-ac96-774b-bcce-b302099a8057")  # fmt: skip

    assert key(one) == key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("select a, b from t order by 1", "select a, b from t order by 2"),
        ("select a, b from t group by 1", "select a, b from t group by 2"),
        (
            "select * from t pivot (sum(a) for d in ('2024-01-01'))",
            "select * from t pivot (sum(a) for d in ('2024-01-02'))",
        ),
        (
            "select * from t pivot (sum(a) for d in ('x')) where d = '2024-01-01'",
            "select * from t pivot (sum(a) for d in ('x')) where d = '2024-01-02'",
        ),
        ("select a from 'x.parquet'", "select a from 'y.parquet'"),
        ("select a from '2024-01-01'", "select a from '2024-01-02'"),
        ("select a from t, '2024-01-01' as x", "select a from t, '2024-01-02' as x"),
        ("select a from read_csv('2024-01-01')", "select a from read_csv('2024-01-02')"),
        ("select a from read_csv('f', skip = 1)", "select a from read_csv('f', skip = 2)"),
        ("select a -> 'x' as v from t", "select a -> 'y' as v from t"),
        ("select a['x'] as v from t", "select a['y'] as v from t"),
        (
            "select cast(a as decimal(10, 2)) as v from t",
            "select cast(a as decimal(12, 4)) as v from t",
        ),
        ("select 'a' as v from t", "select 'b' as v from t"),
        ("select columns('2024-01-01') from t", "select columns('2024-01-02') from t"),
        ("select a as '2024-01-01' from t", "select a as '2024-01-02' from t"),
        ("select \"= '2024-01-01'\" from t", "select \"= '2024-01-02'\" from t"),
        ("select $$ = '2024-01-01' $$ as v", "select $$ = '2024-01-02' $$ as v"),
        ("select 'it\\'s' as a, x = '2024-01-01'", "select 'it\\'s' as a, x = '2024-01-02'"),
        ("select a from t -- x = '2024-01-01'", "select a from t -- x = '2024-01-02'"),
    ],
)
def test_what_may_matter_has_a_key_of_its_own(one: str, other: str) -> None:
    assert key(one) != key(other)


@pytest.mark.parametrize(
    "changed",
    [
        {"dialect": "postgres"},
        {"added_columns": ["dbt_scd_id"]},
        {"sources": []},
        {"sources": [msgspec.structs.replace(QUESTION.sources[0], ref="p")]},
        {"sources": [msgspec.structs.replace(QUESTION.sources[0], columns=None)]},
        {"sources": [msgspec.structs.replace(QUESTION.sources[0], columns=[])]},
        {
            "sources": [
                msgspec.structs.replace(
                    QUESTION.sources[0], columns=[KnownColumn(name="id", type="INT")]
                )
            ]
        },
    ],
)
def test_the_key_has_all_that_was_asked(changed: dict[str, object]) -> None:
    assert analysis_key(msgspec.structs.replace(QUESTION, **changed)) != analysis_key(QUESTION)


def test_the_node_is_not_part_of_the_key() -> None:
    other = msgspec.structs.replace(QUESTION, unique_id="model.shop.b")

    assert analysis_key(other) == analysis_key(QUESTION)


def test_literals_stay_where_a_source_is_a_call() -> None:
    """The text of the call is the source's name, and has literals."""
    one, other = (
        msgspec.structs.replace(
            QUESTION,
            sql=f"select a from f(x = {number})",
            sources=[SourceTable(ref="o", relation_name="f(x = 1)")],
        )
        for number in (1, 2)
    )

    assert analysis_key(one) != analysis_key(other)
    assert read_sql(one) != read_sql(other)


def test_a_long_statement_is_its_own_key() -> None:
    """To read it would hold the event loop."""
    long = "select a from t where b = 5 -- " + "x" * MAX_STRIPPED_BYTES

    assert without_literals(long) == long


PIECES = st.sampled_from(
    [
        *("'2024-01-01'", "'2024-06-30 10:00:00'", "'x.csv'", "'a'", "5", "17", "1", "2", "3.5"),
        *(" = ", " < ", " between ", " and ", " as ", "::date ", " date ", " cast(", " in ("),
        *("select ", " from ", " join ", " where ", " on ", " group by ", " order by ", " having "),
        *("a", "b", "t", "u", "f(", "(", ")", ", ", "[", "]", " union all ", ' "q" ', "`q`"),
        *(" /* c */ ", " -- c\n", "''", "'", " pivot ", " limit ", " values (", "read_csv("),
    ]
)
DIALECT = st.sampled_from(["duckdb", "postgres", "snowflake", "bigquery", "mysql", "sqlserver"])


@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(PIECES, min_size=3, max_size=25), dialect=DIALECT, data=st.data())
def test_the_same_key_means_the_same_answer(
    pieces: list[str], dialect: str, data: st.DataObject
) -> None:
    """Of whatever text: its literals are exchanged, and if the key stays, so does the answer."""
    one = "".join(pieces)
    other = "".join(_exchanged(piece, data) for piece in pieces)

    _same_if_same_key(_question(one, dialect), _question(other, dialect))


@settings(max_examples=150, deadline=None)
@given(case=st.sampled_from(CASES), data=st.data())
def test_the_same_key_means_the_same_answer_for_real_statements(
    case: Case, data: st.DataObject
) -> None:
    """A literal is put somewhere into a statement, once with one value, once with another."""
    words = case.sql.split(" ")
    place = data.draw(st.integers(0, len(words)))
    before = data.draw(
        st.sampled_from(["", "= ", "and x > ", ", ", "as ", "date ", "from ", "by "])
    )
    after = data.draw(st.sampled_from(["", " as z", "::date", ",", " and", ")"]))
    literals = data.draw(
        st.sampled_from([("'2024-01-01'", "'2024-01-02'"), ("1", "2"), ("'2024-01-01'", "'a'")])
    )
    one, other = (
        msgspec.structs.replace(
            request(case),
            sql=" ".join([*words[:place], before + literal + after, *words[place:]]),
        )
        for literal in literals
    )

    _same_if_same_key(one, other)


def _same_if_same_key(one: AnalysisRequest, other: AnalysisRequest) -> None:
    if analysis_key(one) != analysis_key(other):
        return
    answers = [read_sql(one), read_sql(other)]
    if ColumnLineageStatus.ERROR in (answer.status for answer in answers):  # quotes places
        assert answers[0].status == answers[1].status
    else:
        assert answers[0] == answers[1]


OTHERS = {
    "5": "6",
    "17": "18",
    "1": "2",
    "3.5": "4",
    "'2024-01-01'": "'2023-02-02'",
    "'2024-06-30 10:00:00'": "'2023-01-01'",
    "'a'": "'b'",
    "'x.csv'": "'y.csv'",
}


def _exchanged(piece: str, data: st.DataObject) -> str:
    return OTHERS[piece] if piece in OTHERS and data.draw(st.booleans()) else piece


def _question(sql: str, dialect: str) -> AnalysisRequest:
    sources = [
        SourceTable(ref=name, relation_name=name, columns=[KnownColumn(name=it) for it in "ab"])
        for name in "tu"
    ]
    return AnalysisRequest(unique_id="model.shop.x", sql=sql, dialect=dialect, sources=sources)


def key(sql: str) -> str:
    return analysis_key(msgspec.structs.replace(QUESTION, sql=sql))
