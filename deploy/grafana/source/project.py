"""*Project*: one project and target. Is it fresh, how long does it take, what got slower, who
has to look at what?"""

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models.dashboard import Dashboard

from dbtstream.instruments import (
    CHILD_CPU,
    CHILD_EXITS,
    CHILD_MEMORY,
    CHILD_STARTS,
    NODE_DURATION,
    NODE_PROBLEMS,
    NODE_ROWS,
    PHASE_DURATION,
    QUEUE_OLDEST_AGE,
    RUN_DURATION,
    RUN_LAST_COMPLETION,
    RUN_LAST_DURATION,
    SLOWEST,
    SOURCE_AGE,
    SOURCES,
    SOURCES_CHECKED,
    TEST_FAILURES,
)
from dbtstream.statuses import NodeStatus, RunStatus
from deploy.grafana.source import frame, traceql
from deploy.grafana.source.colours import (
    FRESHNESS_COLOURS,
    NODE_COLOURS,
    RUN_CODES,
    RUN_COLOURS,
)
from deploy.grafana.source.panels import (
    BAD_ABOVE_ZERO,
    Column,
    Query,
    bars,
    heat,
    lines,
    ranking,
    stat_panel,
    table_panel,
    timeline,
)
from deploy.grafana.source.promql import (
    COMMAND,
    FINISHED_RUNS,
    FRESHNESS,
    INSTANCE,
    JOB,
    JUDGED_RUNS,
    NODE_STATUS,
    NODE_TYPE,
    OWNER,
    PHASE,
    PROJECT,
    REASON,
    RUN_STATUS,
    SEVERITY,
    START,
    TARGET,
    UNIQUE_ID,
    by,
    growth,
    increase,
    newest,
    of_newest,
    quantile,
    runs_ended,
    shown,
)

runs = frame.BY_TARGET
TROUBLE = f"{NodeStatus.FAIL}|{NodeStatus.ERROR}|{NodeStatus.PARTIAL_SUCCESS}"
NEEDS_NODE_METRICS = " Needs `telemetry.node_metrics = true`."


def build() -> Dashboard:
    page = frame.page(
        frame.PROJECT_UID,
        "Project",
        "One dbt project: runs and how long they take, nodes, tests, sources, owners.",
        since="now-7d",
    )
    page = page.with_variable(frame.prometheus_variable()).with_variable(frame.tempo_variable())
    page = page.with_variable(frame.job_variable())
    page = page.with_variable(frame.project_variable()).with_variable(frame.target_variable())
    for section in (_now, _runs, _nodes, _tests, _processes):
        page = section(page)
    return frame.finished(page)


def _last_duration() -> str:
    return of_newest(
        runs(RUN_LAST_DURATION),
        runs(RUN_LAST_COMPLETION, RUN_STATUS=FINISHED_RUNS),
        PROJECT,
        TARGET,
        COMMAND,
    )


def _sources() -> str:
    """Of the worker that checked them last."""
    return of_newest(runs(SOURCES), runs(SOURCES_CHECKED), PROJECT, TARGET)


def _now(page: dashboard.Dashboard) -> dashboard.Dashboard:
    success = runs(RUN_LAST_COMPLETION, RUN_STATUS=RunStatus.SUCCESS)
    stale = _sources().replace(runs(SOURCES), runs(SOURCES, FRESHNESS="warned|failed|error"), 1)
    ended = f"sum({runs_ended(runs, '$__range', status=RunStatus.SUCCESS)})"
    judged = f"sum({runs_ended(runs, '$__range', status=JUDGED_RUNS)})"
    failures = increase(runs(TEST_FAILURES), "$__range")
    problems = growth(runs(NODE_DURATION, "count", NODE_STATUS=TROUBLE), "$__range")
    return (
        page.with_row(dashboard.Row("Now"))
        .with_panel(
            stat_panel(
                "Last success",
                f"time() - max({success})",
                "Since the last run that succeeded, of any command of the projects chosen.",
                unit="s",
                steps=((None, "green"), (93_600, "yellow"), (180_000, "red")),
                width=4,
                no_value="never",
            )
        )
        .with_panel(
            stat_panel(
                "Last run took",
                f"max({_last_duration()})",
                "The longest of the last runs: of several commands, the slowest one.",
                unit="s",
                width=4,
            )
        )
        .with_panel(
            stat_panel(
                "Success rate",
                f"{ended} / {judged}",
                "Of the runs that ended in the time shown.",
                unit="percentunit",
                steps=((None, "red"), (0.9, "yellow"), (0.99, "green")),
                width=4,
                no_value="no runs",
            )
        )
        .with_panel(
            stat_panel(
                "Node problems",
                f"round(sum({problems})) or vector(0)",
                "Nodes that failed or ended in an error in the time shown, once for each run.",
                steps=((None, "green"), (1, "orange")),
                width=4,
            )
        )
        .with_panel(
            stat_panel(
                "Stale sources",
                f"sum({stale}) or vector(0)",
                "Sources that warned, failed or could not be checked, at the last freshness check.",
                steps=BAD_ABOVE_ZERO,
                width=4,
            )
        )
        .with_panel(
            stat_panel(
                "Rows that fail tests",
                f"round(sum({failures})) or vector(0)",
                "Rows that tests returned in the time shown, all runs added up.",
                steps=((None, "green"), (1, "orange")),
                width=4,
            )
        )
    )


def _standing() -> str:
    """For each command a number for the status of its last run: what a timeline can show."""
    stamps = runs(RUN_LAST_COMPLETION)
    keys = (PROJECT, TARGET, COMMAND)
    return " or ".join(
        f"(0 * max {by(*keys)} "
        f"({newest(runs(RUN_LAST_COMPLETION, RUN_STATUS=status), *keys, among=stamps)}) + {code})"
        for status, code in RUN_CODES.items()
    )


def _runs(page: dashboard.Dashboard) -> dashboard.Dashboard:
    name = shown(PROJECT, TARGET, COMMAND)
    phase_sum = growth(runs(PHASE_DURATION, "sum"), "$__rate_interval")
    phase_count = growth(runs(PHASE_DURATION, "count"), "$__rate_interval")
    return (
        page.with_row(dashboard.Row("Runs"))
        .with_panel(
            timeline(
                "Run history",
                [Query(_standing(), name)],
                "How the last run of each command ended, as it stood at each time.",
                words={
                    code: (str(status), RUN_COLOURS[status]) for status, code in RUN_CODES.items()
                },
            )
        )
        .with_panel(
            lines(
                "Duration of the last run",
                [Query(f"max {by(PROJECT, TARGET, COMMAND)} ({_last_duration()})", name)],
                "A step for each run that succeeded or failed. A staircase that goes up: the "
                "project grows slower.",
                unit="s",
                stepped=True,
            )
        )
        .with_panel(
            bars(
                "Runs by status",
                [
                    Query(
                        f"sum by (dbtstream_run_status) ({runs_ended(runs, '$__rate_interval')})",
                        shown(RUN_STATUS),
                    )
                ],
                "Runs that ended, by how.",
                colours=RUN_COLOURS,
            )
        )
        .with_panel(
            lines(
                "Where a run's time goes",
                [
                    Query(
                        f"sum {by(PHASE)} ({phase_sum}) / sum {by(PHASE)} ({phase_count} > 0)",
                        shown(PHASE),
                    )
                ],
                "Mean length of the parts of an attempt: the wait, dbt's start, its parsing, the "
                "nodes, the end. A tall `parse`: turn on partial parsing or warm starts.",
                unit="s",
                stacked=True,
                stepped=True,
            )
        )
        .with_panel(
            heat(
                "Durations",
                Query(
                    f"sum {by('le')} ({growth(runs(RUN_DURATION, 'bucket'), '$__rate_interval')})",
                    "{{le}}",
                ),
                "How many runs took how long.",
            )
        )
        .with_panel(traceql.last_runs())
    )


def _nodes(page: dashboard.Dashboard) -> dashboard.Dashboard:
    outcomes = growth(runs(NODE_DURATION, "count"), "$__rate_interval")
    buckets = runs(NODE_DURATION, "bucket", NODE_STATUS="success|warn|fail|error")
    finished = runs(RUN_LAST_COMPLETION, RUN_STATUS=FINISHED_RUNS)
    slowest = of_newest(runs(SLOWEST), finished, PROJECT, TARGET)
    of_run = f"max {by(PROJECT, TARGET)} ({_duration_of_last()})"
    share = f"{slowest} / on ({PROJECT}, {TARGET}) group_left () {of_run}"
    rows = growth(runs(NODE_ROWS), "$__rate_interval")
    return (
        page.with_row(dashboard.Row("Nodes"))
        .with_panel(
            ranking(
                "Slowest nodes, share of the last run",
                Query(f"sort_desc(max {by(UNIQUE_ID)} ({share}))", shown(UNIQUE_ID)),
                "What the slowest nodes took, as a share of the whole run. The place to begin "
                "when a run is too slow. Nodes run side by side, so shares may add up to more "
                "than 100 %." + NEEDS_NODE_METRICS,
                unit="percentunit",
                steps=((None, "green"), (0.25, "yellow"), (0.5, "red")),
                ceiling=1,
                height=9,
            )
        )
        .with_panel(traceql.slowest_nodes())
        .with_panel(
            bars(
                "Nodes by status",
                [Query(f"sum {by(NODE_STATUS)} ({outcomes})", shown(NODE_STATUS))],
                "Nodes and tests that ended. `skipped`: something upstream did not pass.",
                colours=NODE_COLOURS,
                width=8,
            )
        )
        .with_panel(
            ranking(
                "Duration by kind, 95 %",
                Query(
                    f"sort_desc({quantile(0.95, buckets, NODE_TYPE, window='$__range')})",
                    shown(NODE_TYPE),
                ),
                "95 % of the nodes of a kind took at most this long, in the time shown.",
                unit="s",
                width=8,
            )
        )
        .with_panel(
            bars(
                "Rows affected",
                [Query(f"sum {by(NODE_TYPE)} ({rows})", shown(NODE_TYPE))],
                "As the adapters say; some say nothing.",
                width=8,
            )
        )
    )


def _duration_of_last() -> str:
    """The duration of the very last run of a project and target, whatever its command."""
    stamps = runs(RUN_LAST_COMPLETION, RUN_STATUS=FINISHED_RUNS)
    keys = f"{JOB}, {INSTANCE}, {PROJECT}, {TARGET}, {COMMAND}"
    return f"({runs(RUN_LAST_DURATION)} and on ({keys}) {newest(stamps, PROJECT, TARGET)})"


def _tests(page: dashboard.Dashboard) -> dashboard.Dashboard:
    tests = growth(runs(NODE_DURATION, "count", NODE_TYPE="test|unit_test"), "$__rate_interval")
    failures = increase(runs(TEST_FAILURES), "$__rate_interval")
    problems = growth(runs(NODE_PROBLEMS), "$__range")
    ages = of_newest(runs(SOURCE_AGE), runs(SOURCES_CHECKED), PROJECT, TARGET)
    return (
        page.with_row(dashboard.Row("Tests, sources, owners"))
        .with_panel(
            bars(
                "Tests by status",
                [Query(f"sum {by(NODE_STATUS)} ({tests})", shown(NODE_STATUS))],
                "Tests and unit tests that ended.",
                colours=NODE_COLOURS,
                width=8,
            )
        )
        .with_panel(
            bars(
                "Rows that fail tests",
                [Query(f"sum {by(SEVERITY)} ({failures})", shown(SEVERITY))],
                "Rows that tests returned, by the tests' severity.",
                colours={"error": "orange", "warn": "yellow"},
                width=8,
            )
        )
        .with_panel(
            table_panel(
                "Problems by owner",
                [Query(f"round(sum {by(OWNER, PROJECT, TARGET, NODE_STATUS)} ({problems})) > 0")],
                [
                    Column(field=OWNER, title="Owner"),
                    Column(field=PROJECT, title="Project"),
                    Column(field=TARGET, title="Target"),
                    Column(
                        field=NODE_STATUS,
                        title="Status",
                        colours=NODE_COLOURS,
                    ),
                    Column(field="Value", title="Nodes"),
                ],
                "Nodes that warned, failed or ended in an error in the time shown, by those who "
                "own them: the group's owner or `meta.owner`.",
                width=8,
                sort_by="Nodes",
            )
        )
        .with_panel(
            lines(
                "Sources by freshness",
                [Query(f"sum {by(FRESHNESS)} ({_sources()})", shown(FRESHNESS))],
                "By how their last freshness check ended. `failed`: older than error_after; "
                "`error`: the check itself did not work.",
                colours=FRESHNESS_COLOURS,
                stacked=True,
                stepped=True,
            )
        )
        .with_panel(
            ranking(
                "Age of sources",
                Query(f"sort_desc(max {by(UNIQUE_ID)} ({ages}))", shown(UNIQUE_ID)),
                "Age of the newest row, at the last freshness check." + NEEDS_NODE_METRICS,
                unit="s",
                steps=((None, "green"), (86_400, "yellow"), (172_800, "red")),
            )
        )
    )


def _processes(page: dashboard.Dashboard) -> dashboard.Dashboard:
    projects = frame.BY_PROJECT
    memory = of_newest(runs(CHILD_MEMORY), runs(RUN_LAST_COMPLETION), PROJECT, TARGET)
    exits = increase(projects(CHILD_EXITS), "$__rate_interval")
    starts = increase(projects(CHILD_STARTS), "$__rate_interval")
    cpu = increase(projects(CHILD_CPU), "$__rate_interval")
    count = f"sum({increase(projects(CHILD_EXITS), '$__rate_interval')} > 0)"
    return (
        page.with_row(dashboard.Row("dbt's processes"))
        .with_panel(
            lines(
                "Memory, at most",
                [
                    Query(
                        f"max {by(PROJECT, TARGET)} ({memory})",
                        shown(PROJECT, TARGET),
                    )
                ],
                "The most that the last dbt process had. For the memory limit of a worker: this "
                "times its slots, and the daemon.",
                unit="bytes",
                stepped=True,
                width=6,
            )
        )
        .with_panel(
            lines(
                "CPU of a process",
                [Query(f"sum({cpu}) / {count}", "CPU seconds of a process")],
                "Mean CPU time of the dbt processes that ended. Far below their duration: they "
                "wait for the warehouse.",
                unit="s",
                stepped=True,
                width=6,
            )
        )
        .with_panel(
            bars(
                "Starts",
                [Query(f"sum {by(START)} ({starts})", shown(START))],
                "`cold`: a new interpreter. `warm`: forked from one that had dbt loaded. "
                "`manifest`: that had the parsed project as well.",
                colours={"cold": "blue", "warm": "orange", "manifest": "green"},
                width=6,
            )
        )
        .with_panel(
            bars(
                "Exits",
                [Query(f"sum {by(REASON)} ({exits})", shown(REASON))],
                "How dbt's processes ended. `oom`: the kernel killed it for memory.",
                colours={"ok": "green", "failure": "orange", "error": "red", "oom": "dark-red"},
                width=6,
            )
        )
        .with_panel(
            lines(
                "Oldest wait",
                [
                    Query(
                        f"max {by(PROJECT, TARGET)} ({runs(QUEUE_OLDEST_AGE)})",
                        shown(PROJECT, TARGET),
                    )
                ],
                "How long the first request has waited that nobody runs.",
                unit="s",
                width=24,
                height=6,
            )
        )
    )
