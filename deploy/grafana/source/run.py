"""*Run*: one run by its id, from its trace in Tempo. Metrics never hold the id of a run."""

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models.dashboard import Dashboard

from dbtstream.instruments import EVENT_LAG, LOOP_LAG, SLOT_LIMIT, SLOT_USED
from deploy.grafana.source import frame, traceql
from deploy.grafana.source.panels import Query, lines, words
from deploy.grafana.source.promql import quantile

workers = frame.JOBS
HOW = (
    "Put a run's id into **Run** above: it is in the answer to the request, in every event, in "
    "the daemon's log lines and in `dbtstream ps`. Then click the run's name in the first table, "
    "and the timeline draws its trace. The time range must hold the run."
)


def build() -> Dashboard:
    page = frame.page(
        frame.RUN_UID,
        "Run",
        "One run by its id: attempts, phases, nodes, timeline.",
        since="now-24h",
    ).refresh("")
    page = page.with_variable(frame.tempo_variable()).with_variable(frame.prometheus_variable())
    page = page.with_variable(frame.job_variable())
    page = page.with_variable(frame.text_variable("run", "Run", "The run's id"))
    page = page.with_variable(frame.text_variable("trace", "Trace", "Set by a click on a run"))
    for section in (_run, _nodes, _timeline, _meanwhile):
        page = section(page)
    return frame.finished(page)


def _run(page: dashboard.Dashboard) -> dashboard.Dashboard:
    return page.with_panel(words("", HOW)).with_panel(traceql.of_run())


def _nodes(page: dashboard.Dashboard) -> dashboard.Dashboard:
    return (
        page.with_row(dashboard.Row("Nodes"))
        .with_panel(traceql.phases_of_run())
        .with_panel(
            traceql.nodes_of_run(
                "Problems",
                "status = error",
                "Nodes that did not pass, with the kind of error. Its text is in the span.",
                height=9,
            ).span(14)
        )
        .with_panel(
            traceql.nodes_of_run(
                "All nodes",
                "",
                "Every node of the run, the longest first. The span id leads to it in the trace.",
                height=14,
            )
        )
    )


def _timeline(page: dashboard.Dashboard) -> dashboard.Dashboard:
    return page.with_row(dashboard.Row("Timeline")).with_panel(
        traceql.waterfall(
            "Timeline",
            "trace",
            "The trace that the run is part of: who asked for it, the wait, dbt's process, its "
            "phases and nodes, and what reacted to its events.",
        )
    )


def _meanwhile(page: dashboard.Dashboard) -> dashboard.Dashboard:
    return (
        page.with_row(dashboard.Row("The workers meanwhile"))
        .with_panel(
            lines(
                "Slots",
                [
                    Query(f"sum({workers(SLOT_USED)})", "used"),
                    Query(f"sum({workers(SLOT_LIMIT)})", "limit"),
                ],
                "Did the run share the machine with others?",
                colours={"used": "blue", "limit": "#8e8e8e"},
                stepped=True,
                width=8,
            )
        )
        .with_panel(
            lines(
                "Lag of events, 99 %",
                [Query(quantile(0.99, workers(EVENT_LAG, "bucket")), "99 %")],
                "Were its events late?",
                unit="s",
                width=8,
            )
        )
        .with_panel(
            lines(
                "Loop lag, 99 %",
                [Query(quantile(0.99, workers(LOOP_LAG, "bucket")), "99 %")],
                "Was a daemon short of CPU?",
                unit="s",
                width=8,
            )
        )
    )
