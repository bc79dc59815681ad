"""Queries of Tempo and the panels that show them, by the attributes of our spans.

Tempo cannot be had where this is tested. What a test does: every attribute that is named here is
on a span of a real run.
"""

from collections.abc import Sequence
from typing import Final

from grafana_foundation_sdk.builders import dashboard, table, tempo
from grafana_foundation_sdk.models.tempo import SearchTableType

from dbtstream.instruments import (
    COMMAND,
    ERROR_TYPE,
    NODE_STATUS,
    NODE_TYPE,
    PHASE,
    PROJECT,
    RUN_STATUS,
    TARGET,
    UNIQUE_ID,
)
from deploy.grafana.source import frame
from deploy.grafana.source.colours import NODE_COLOURS, RUN_COLOURS
from deploy.grafana.source.panels import Column, descending, plain_table

RUN_ID: Final = "dbtstream.run.id"
ATTEMPT: Final = "dbtstream.run.attempt"
ROWS: Final = "dbt.node.rows_affected"

# Columns that Grafana's Tempo data source makes of its own.
TRACE_ID: Final = "traceIdHidden"
NAME: Final = "name"
DURATION: Final = "duration"

ALL_SPANS: Final = 5000
"""A table of spans shows this many of a trace; Tempo's own default is three."""


def span(attribute: str) -> str:
    return f"span.{attribute}"


def equals(attribute: str, variable: str) -> str:
    return f'{span(attribute)} = "${variable}"'


def matches(attribute: str, variable: str) -> str:
    return f'{span(attribute)} =~ "${variable}"'


def has(attribute: str) -> str:
    return f"{span(attribute)} != nil"


def spans(conditions: Sequence[str], *selected: str) -> str:
    columns = ", ".join(span(attribute) for attribute in selected)
    return f"{{ {' && '.join(conditions)} }} | select({columns})"


def query(traceql: str, *, traces: int = 20) -> tempo.Dataquery:
    return (
        tempo.Dataquery()
        .ref_id("A")
        .datasource(frame.TEMPO)
        .query_type("traceql")
        .query(traceql)
        .table_type(SearchTableType.SPANS)
        .limit(traces)
        .spss(ALL_SPANS)
    )


def span_table(
    title: str,
    traceql: str,
    columns: Sequence[Column],
    description: str,
    *,
    width: int = 24,
    height: int = 9,
    sort_by: str = "",
    traces: int = 20,
) -> table.Panel:
    panel = (
        plain_table(title, columns, description, width=width, height=height)
        .datasource(frame.TEMPO)
        .with_target(query(traceql, traces=traces))
        .no_value("nothing found: is the time range right, and [telemetry.otlp] on?")
    )
    if sort_by:
        panel = panel.sort_by([descending(sort_by)])
    return panel


def waterfall(title: str, variable: str, description: str) -> dashboard.Panel:
    """A whole trace by its id. The SDK has no builder for this kind of panel."""
    return (
        dashboard.Panel()
        .type("traces")
        .title(title)
        .description(description)
        .datasource(frame.TEMPO)
        .targets([query(f"${variable}")])
        .height(20)
        .span(24)
    )


def run_columns() -> list[Column]:
    """A run's name opens it on the dashboard *Run*, where its trace is drawn."""
    return [
        Column(field=NAME, title=NAME, link=_link_to_run()),
        Column(
            field=RUN_STATUS,
            title=RUN_STATUS,
            colours=RUN_COLOURS,
        ),
        Column(field=DURATION, title=DURATION, unit="ns"),
        Column(field=RUN_ID, title=RUN_ID, width=280),
    ]


def node_columns() -> list[Column]:
    return [
        Column(
            field=NODE_STATUS,
            title=NODE_STATUS,
            colours=NODE_COLOURS,
            width=160,
        ),
        Column(field=DURATION, title=DURATION, unit="ns"),
    ]


def last_runs() -> table.Panel:
    return span_table(
        "Last runs",
        spans(
            ["kind = consumer", matches(PROJECT, "project"), matches(TARGET, "target")],
            RUN_ID,
            RUN_STATUS,
            COMMAND,
        ),
        run_columns(),
        "From the traces in Tempo: a run's name leads to its nodes and its timeline.",
        traces=50,
    )


def slowest_nodes() -> table.Panel:
    return span_table(
        "Slowest nodes, from the traces",
        spans(
            [
                matches(PROJECT, "project"),
                matches(TARGET, "target"),
                has(NODE_STATUS),
                "duration > 1s",
            ],
            UNIQUE_ID,
            NODE_TYPE,
            NODE_STATUS,
            RUN_ID,
        ),
        [*node_columns(), Column(field=RUN_ID, title=RUN_ID, link=_link_to_run())],
        "Nodes that took more than a second, of the last runs in Tempo, the longest first.",
        width=12,
        sort_by=DURATION,
    )


def of_run() -> table.Panel:
    return span_table(
        "The run",
        spans(
            [equals(RUN_ID, "run"), "kind = consumer"],
            RUN_STATUS,
            ATTEMPT,
            PROJECT,
            TARGET,
            COMMAND,
            ERROR_TYPE,
            RUN_ID,
        ),
        run_columns(),
        "Its attempts: more than one after a worker was lost. Click the name and the timeline "
        "below draws the trace; the span id leads to it in Explore.",
        height=5,
    )


def nodes_of_run(title: str, condition: str, description: str, *, height: int) -> table.Panel:
    conditions = [equals(RUN_ID, "run"), has(NODE_STATUS)]
    return span_table(
        title,
        spans(
            [*conditions, condition] if condition else conditions,
            UNIQUE_ID,
            NODE_TYPE,
            NODE_STATUS,
            ROWS,
            ERROR_TYPE,
        ),
        node_columns(),
        description,
        height=height,
        sort_by=DURATION,
    )


def phases_of_run() -> table.Panel:
    return span_table(
        "Phases",
        spans([equals(RUN_ID, "run"), has(PHASE)], PHASE, ATTEMPT),
        [Column(field=DURATION, title=DURATION, unit="ns")],
        "Where the time went: the queue, dbt's start, its parsing, the nodes, the end.",
        width=10,
    )


def _link_to_run() -> str:
    return (
        f'/d/{frame.RUN_UID}?var-run=${{__data.fields["{RUN_ID}"]}}'
        f"&var-trace=${{__data.fields.{TRACE_ID}}}"
        "&${tempo:queryparam}&${datasource:queryparam}&${__url_time_range}"
    )
