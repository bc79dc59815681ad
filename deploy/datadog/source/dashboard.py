"""The dashboard: fleet, project, queue and slots, daemon health, and the traces of runs.

Datadog has no clock in its formulas, so "hours since the last success" cannot be shown; the table
counts successes instead, and a monitor watches for their absence.
"""

from typing import Any

from dbtstream.instruments import (
    CHILD_CPU,
    CHILD_EXITS,
    CHILD_MEMORY,
    CHILD_STARTS,
    COMMAND,
    CPU_TIME,
    DEAD_LETTERS,
    ERROR_TYPE,
    EVENT_DROPPED,
    EVENT_LAG,
    EVENT_PUBLISHED,
    FAMILY,
    FRESHNESS,
    LOOP_LAG,
    MATERIALIZATION,
    MEMORY,
    NATS_CONNECTIONS,
    NATS_RECONNECTS,
    NODE_DURATION,
    NODE_PROBLEMS,
    NODE_ROWS,
    NODE_STATUS,
    NODE_TYPE,
    OUTBOX_EVENTS,
    OUTBOX_LIMIT,
    OUTBOX_OLDEST_AGE,
    OUTBOX_SIZE,
    OWNER,
    PHASE,
    PHASE_DURATION,
    PROJECT,
    QUEUE_OLDEST_AGE,
    QUEUE_PENDING,
    REASON,
    REQUESTS_REJECTED,
    RUN_ACTIVE,
    RUN_DURATION,
    RUN_LAST_DURATION,
    RUN_QUEUE_DURATION,
    RUN_STATUS,
    RUN_TAKEOVERS,
    RUNS_ENDED,
    SEVERITY,
    SLOT_LIMIT,
    SLOT_USED,
    SLOWEST,
    SOURCE_AGE,
    SOURCES,
    STAGE,
    STAGE_DROPPED,
    STAGE_FAILED,
    START,
    TARGET,
    TEST_FAILURES,
    UNIQUE_ID,
    Instrument,
)
from dbtstream.statuses import NodeStatus, RunStatus
from deploy.datadog.source.queries import (
    ENV,
    INSTANCE,
    SERVICE,
    VERSION,
    how_many,
    mean,
    only,
    percentile,
    together,
    value,
)
from deploy.datadog.source.widgets import (
    BYTE,
    NONE_IS_BAD,
    NONE_IS_GOOD,
    SECOND,
    Json,
    Series,
    Widget,
    bars,
    count_of,
    group,
    lines,
    note,
    number,
    place,
    ranking,
    series,
    spans,
    table,
)

TITLE = "dbtstream"

FLEET = ("$env", "$service", "$version")
WORKER = (*FLEET, "$worker")
RUNS = (*FLEET, "$project", "$target")
IN_PROJECT = (*FLEET, "$project")

BAD = only(RUN_STATUS, RunStatus.FAILURE, RunStatus.ERROR, RunStatus.TIMED_OUT, RunStatus.LOST)
GOOD = only(RUN_STATUS, RunStatus.SUCCESS)
TROUBLE = only(NODE_STATUS, NodeStatus.FAIL, NodeStatus.ERROR, NodeStatus.PARTIAL_SUCCESS)
STALE = only(FRESHNESS, "failed", "error")

RUN_ID = "dbtstream.run.id"
RUN_SPANS = (
    "$env $service @span.kind:consumer "
    f"@{PROJECT}:$project.value @{TARGET}:$target.value @{RUN_ID}:$run.value"
)
NODE_SPANS = f"$env $service @{UNIQUE_ID}:* @{RUN_ID}:$run.value"


def build() -> dict[str, Any]:
    widgets, _ = place([_fleet(), _project(), _queue(), _daemon(), _traces()])
    return {
        "title": TITLE,
        "description": "dbt runs and the daemons that run them, from dbtstream's OTLP.",
        "layout_type": "ordered",
        "reflow_type": "fixed",
        "template_variables": _variables(),
        "widgets": widgets,
    }


def _variables() -> list[Json]:
    """`@` is an attribute of a span; the others are tags of metrics."""
    chosen = {
        "env": (ENV, "*"),
        "service": (SERVICE, "dbtstream"),
        "version": (VERSION, "*"),
        "worker": (INSTANCE, "*"),
        "project": (PROJECT, "*"),
        "target": (TARGET, "*"),
        "run": (f"@{RUN_ID}", "*"),
    }
    return [
        {"name": name, "prefix": prefix, "available_values": [], "defaults": [default]}
        for name, (prefix, default) in chosen.items()
    ]


def _share(alias: str, part: str, whole: str) -> Series:
    return Series(
        alias=alias,
        queries={"part": part, "whole": whole},
        formula="{part} / {whole} * 100",
        unit="percent",
        over_time="sum",
    )


def _fleet() -> Widget:
    where = (PROJECT, TARGET)
    succeeded = _share("succeeded", how_many(RUNS_ENDED, *RUNS, GOOD), how_many(RUNS_ENDED, *RUNS))
    return group(
        "Fleet",
        number(
            "Slots of all workers",
            series("slots", value(SLOT_LIMIT, *FLEET, space="sum")),
            colours=NONE_IS_BAD,
        ),
        number(
            "Running",
            series(
                "runs",
                value(RUN_ACTIVE, *RUNS, only(RUN_STATUS, RunStatus.RUNNING), space="sum"),
            ),
        ),
        number("Longest queue", series("requests", _everywhere(QUEUE_PENDING))),
        number(
            "Did not succeed",
            count_of("runs", how_many(RUNS_ENDED, *RUNS, BAD)),
            colours=NONE_IS_GOOD,
        ),
        number("Succeeded, % of those that ended", succeeded, precision=1),
        number(
            "Dead letters",
            series("requests", value(DEAD_LETTERS, *FLEET, space="max")),
            colours=NONE_IS_GOOD,
        ),
        bars(
            "Runs that ended, by status",
            series("runs", how_many(RUNS_ENDED, *RUNS, by=(RUN_STATUS,))),
        ),
        bars(
            "Runs that did not succeed, by project",
            series("runs", how_many(RUNS_ENDED, *RUNS, BAD, by=(PROJECT, TARGET))),
        ),
        lines(
            "Slots",
            series("taken", value(SLOT_USED, *FLEET, space="sum")),
            series("all", value(SLOT_LIMIT, *FLEET, space="sum")),
        ),
        table(
            "Projects",
            series("succeeded", how_many(RUNS_ENDED, *RUNS, GOOD, by=where), over_time="sum"),
            series("did not", how_many(RUNS_ENDED, *RUNS, BAD, by=where), over_time="sum"),
            series(
                "last took",
                value(RUN_LAST_DURATION, *RUNS, by=where, space="max"),
                unit=SECOND,
            ),
            series("waits", _everywhere(QUEUE_OLDEST_AGE, by=where), unit=SECOND),
            series("stale sources", value(SOURCES, *RUNS, STALE, by=where, space="max")),
        ),
    )


def _project() -> Widget:
    return group(
        "Project",
        note(
            "Choose one with `$project`. The lines marked p95 are empty until percentiles are "
            "enabled for their metric (Metrics > Summary); see the README beside this file."
        ),
        lines(
            "What runs take",
            series("mean", mean(RUN_DURATION, *RUNS, by=(COMMAND,)), unit=SECOND),
            series("p95", percentile(RUN_DURATION, 95, *RUNS, by=(COMMAND,)), unit=SECOND),
        ),
        lines(
            "What phases take, mean",
            series("phase", mean(PHASE_DURATION, *IN_PROJECT, by=(PHASE,)), unit=SECOND),
        ),
        ranking(
            "Kinds of nodes that take the most time",
            series(
                "seconds",
                together(NODE_DURATION, *RUNS, by=(NODE_TYPE, MATERIALIZATION)),
                unit=SECOND,
                over_time="sum",
            ),
        ),
        bars(
            "Nodes and tests, by status",
            series("nodes", how_many(NODE_DURATION, *RUNS, by=(NODE_STATUS,))),
        ),
        bars(
            "What went wrong with nodes",
            series("nodes", how_many(NODE_DURATION, *RUNS, TROUBLE, by=(ERROR_TYPE,))),
        ),
        lines(
            "What nodes take, p95",
            series("p95", percentile(NODE_DURATION, 95, *RUNS, by=(NODE_TYPE,)), unit=SECOND),
        ),
        ranking(
            "Owners with problems",
            series(
                "nodes",
                how_many(NODE_PROBLEMS, *RUNS, TROUBLE, by=(OWNER, PROJECT)),
                over_time="sum",
            ),
        ),
        bars(
            "Rows that tests returned",
            series("rows", how_many(TEST_FAILURES, *RUNS, by=(SEVERITY,))),
        ),
        bars(
            "Rows affected",
            series("rows", how_many(NODE_ROWS, *RUNS, by=(NODE_TYPE,))),
        ),
        lines(
            "Sources, by their last freshness check",
            series("sources", value(SOURCES, *RUNS, by=(FRESHNESS,), space="max")),
        ),
        ranking(
            "Oldest sources (needs telemetry.node_metrics)",
            series("age", value(SOURCE_AGE, *RUNS, by=(UNIQUE_ID,), space="min"), unit=SECOND),
        ),
        ranking(
            "Slowest nodes of the last run (needs telemetry.node_metrics)",
            series("took", value(SLOWEST, *RUNS, by=(UNIQUE_ID,), space="max"), unit=SECOND),
        ),
    )


def _queue() -> Widget:
    return group(
        "Queue and slots",
        lines(
            "Requests in the queue",
            series("requests", _everywhere(QUEUE_PENDING, by=(PROJECT, TARGET))),
        ),
        lines(
            "The first one has waited for",
            series("wait", _everywhere(QUEUE_OLDEST_AGE, by=(PROJECT, TARGET)), unit=SECOND),
        ),
        lines(
            "From the request to dbt's start",
            series("mean", mean(RUN_QUEUE_DURATION, *RUNS, by=(PROJECT, TARGET)), unit=SECOND),
            series(
                "p95", percentile(RUN_QUEUE_DURATION, 95, *RUNS, by=(PROJECT, TARGET)), unit=SECOND
            ),
        ),
        lines(
            "Runs in the workers' hands",
            series("runs", value(RUN_ACTIVE, *RUNS, by=(RUN_STATUS,), space="sum")),
        ),
        bars(
            "Requests that cannot run",
            series("requests", how_many(REQUESTS_REJECTED, *IN_PROJECT, by=(REASON,))),
        ),
        bars(
            "Runs taken over from another worker",
            series("runs", how_many(RUN_TAKEOVERS, *RUNS, by=(REASON,))),
        ),
    )


def _daemon() -> Widget:
    per_worker = (INSTANCE,)
    return group(
        "Daemon health",
        lines(
            "Connections to NATS, of two",
            series("up", value(NATS_CONNECTIONS, *WORKER, by=per_worker, space="min")),
            series("made anew", how_many(NATS_RECONNECTS, *WORKER, by=per_worker)),
        ),
        bars(
            "Events published, by family",
            series("events", how_many(EVENT_PUBLISHED, *WORKER, by=(FAMILY,))),
        ),
        lines(
            "From an event to its storing",
            series("mean", mean(EVENT_LAG, *WORKER), unit=SECOND),
            series("p99", percentile(EVENT_LAG, 99, *WORKER), unit=SECOND),
        ),
        lines(
            "Outbox, oldest event",
            series(
                "age", value(OUTBOX_OLDEST_AGE, *WORKER, by=per_worker, space="max"), unit=SECOND
            ),
        ),
        lines(
            "Outbox",
            series("on disk", value(OUTBOX_SIZE, *WORKER, by=per_worker, space="max"), unit=BYTE),
            series("one run may have", value(OUTBOX_LIMIT, *WORKER, space="max"), unit=BYTE),
            series("events", value(OUTBOX_EVENTS, *WORKER, by=per_worker, space="max")),
        ),
        bars(
            "Not kept, dropped, refused",
            series("events not kept", how_many(EVENT_DROPPED, *WORKER, by=(REASON,))),
            series("dropped", how_many(STAGE_DROPPED, *WORKER, by=(STAGE,))),
            series("refused", how_many(STAGE_FAILED, *WORKER, by=(STAGE,))),
        ),
        lines(
            "How late the event loop is",
            series("mean", mean(LOOP_LAG, *WORKER, by=per_worker), unit=SECOND),
            series("p99", percentile(LOOP_LAG, 99, *WORKER, by=per_worker), unit=SECOND),
        ),
        lines(
            "Memory",
            series("daemon", value(MEMORY, *WORKER, by=per_worker, space="max"), unit=BYTE),
            series(
                "dbt, the most of the last process",
                value(CHILD_MEMORY, *IN_PROJECT, by=(PROJECT,), space="max"),
                unit=BYTE,
            ),
        ),
        bars(
            "CPU time",
            series("daemon", how_many(CPU_TIME, *WORKER, by=per_worker), unit=SECOND),
            series("dbt", how_many(CHILD_CPU, *IN_PROJECT, by=(PROJECT,)), unit=SECOND),
        ),
        bars(
            "dbt processes begun",
            series("processes", how_many(CHILD_STARTS, *IN_PROJECT, by=(START,))),
        ),
        bars(
            "How dbt processes ended",
            series("processes", how_many(CHILD_EXITS, *IN_PROJECT, by=(REASON,))),
        ),
    )


def _traces() -> Widget:
    return group(
        "Traces",
        note("One run: copy its id from the first list into `$run`."),
        spans(
            "Runs",
            RUN_SPANS,
            (
                "timestamp",
                "status",
                "resource_name",
                "@duration",
                f"@{RUN_STATUS}",
                f"@{PROJECT}",
                f"@{TARGET}",
                f"@{COMMAND}",
                f"@{ERROR_TYPE}",
                f"@{RUN_ID}",
            ),
        ),
        spans(
            "Nodes and tests",
            NODE_SPANS,
            (
                "timestamp",
                "status",
                "resource_name",
                "@duration",
                f"@{NODE_STATUS}",
                f"@{NODE_TYPE}",
                f"@{ERROR_TYPE}",
                f"@{UNIQUE_ID}",
                f"@{RUN_ID}",
            ),
        ),
    )


def _everywhere(instrument: Instrument, *, by: tuple[str, ...] = ()) -> str:
    """Of what all workers see alike: each reports the same queues."""
    return value(instrument, *RUNS, by=by, space="max")
