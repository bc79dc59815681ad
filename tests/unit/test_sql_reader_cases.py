"""Column lineage of SQL that was read by hand: `column_lineage_cases`."""

import pytest

from dbtstream.column_lineage import PARSER, AnalysisRequest, ColumnRef, KnownColumn, SourceTable
from dbtstream.sql_child.reader import read_sql
from tests.unit.column_lineage_cases import CASES, Case

UNTRACED = "?"
CONSTANT = "-"

Inputs = dict[str, frozenset[str]]


def request(case: Case) -> AnalysisRequest:
    return AnalysisRequest(
        unique_id="model.shop.x",
        sql=case.sql,
        dialect=case.dialect,
        sources=[
            SourceTable(
                ref=ref,
                relation_name=case.relation.format(ref),
                columns=None if names is None else [KnownColumn(name=it) for it in names.split()],
            )
            for ref, names in case.sources.items()
        ],
        added_columns=list(case.added),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_columns_come_from_where_the_sql_says(case: Case) -> None:
    """Names and their order, sources, kinds, and what decides on rows; and how sure that is."""
    expected = dict(line.split(maxsplit=1) for line in case.columns.strip().splitlines())

    analysis = read_sql(request(case))

    assert analysis.status == ("partial" if case.partial else "complete"), analysis.message
    assert (case.partial or "") in (analysis.message or "")
    names = [column.name for column in analysis.columns] if analysis.columns is not None else None
    assert names == (list(expected) if case.columns_known else None)
    assert {name: _told(refs) for name, refs in (analysis.fields or {}).items()} == {
        name: _wanted(inputs) for name, inputs in expected.items() if inputs != UNTRACED
    }
    assert _told(analysis.dataset_inputs or []) == _wanted(case.rows)
    assert analysis.parser == PARSER


def test_the_list_is_as_long_as_promised() -> None:
    assert sum(len(case.columns.strip().splitlines()) for case in CASES) >= 150


def _wanted(inputs: str) -> Inputs:
    parts = (it.partition(":") for it in inputs.split() if it != CONSTANT)
    return {name: frozenset((kinds or "IDENTITY").split("+")) for name, _, kinds in parts}


def _told(refs: list[ColumnRef]) -> Inputs:
    return {
        f"{it.ref or it.relation_name}.{it.field}": frozenset(
            step.subtype + "*" * step.masking for step in it.transformations
        )
        for it in refs
    }
