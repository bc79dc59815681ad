"""*Fleet*: all projects and all workers at a glance. Is anything red, does anything wait?"""

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models.dashboard import Dashboard

from dbtstream.instruments import (
    DEAD_LETTERS,
    EVENT_LAG,
    MEMORY,
    NATS_CONNECTIONS,
    QUEUE_OLDEST_AGE,
    QUEUE_PENDING,
    REQUESTS_REJECTED,
    RUN_ACTIVE,
    RUN_DURATION,
    RUN_LAST_COMPLETION,
    RUN_LAST_DURATION,
    RUN_QUEUE_DURATION,
    RUN_TAKEOVERS,
    SLOT_LIMIT,
    SLOT_USED,
)
from dbtstream.statuses import RunStatus
from deploy.grafana.source import frame
from deploy.grafana.source.colours import RUN_COLOURS
from deploy.grafana.source.panels import (
    BAD_ABOVE_ZERO,
    Column,
    Query,
    bars,
    lines,
    ranking,
    stat_panel,
    table_panel,
)
from deploy.grafana.source.promql import (
    BAD_RUNS,
    COMMAND,
    FINISHED_RUNS,
    INSTANCE,
    JOB,
    JUDGED_RUNS,
    PROJECT,
    REASON,
    RUN_STATUS,
    TARGET,
    by,
    growth,
    increase,
    newest,
    of_newest,
    quantile,
    runs_ended,
    shown,
)

all_runs = frame.BY_PROJECT
workers = frame.JOBS
ago = ((None, "green"), (93_600, "yellow"), (180_000, "red"))
wait = ((None, "green"), (300, "yellow"), (1800, "red"))


def build() -> Dashboard:
    page = frame.page(
        frame.FLEET,
        "Fleet",
        "All projects and workers: what runs, what waits, what failed.",
        since="now-24h",
    )
    page = page.with_variable(frame.prometheus_variable())
    page = page.with_variable(frame.job_variable()).with_variable(frame.project_variable())
    for section in (_now, _runs, _projects, _queue, _workers):
        page = section(page)
    return frame.finished(page)


def _now(page: dashboard.Dashboard) -> dashboard.Dashboard:
    bad = newest(
        all_runs(RUN_LAST_COMPLETION, RUN_STATUS=BAD_RUNS),
        PROJECT,
        TARGET,
        COMMAND,
        among=all_runs(RUN_LAST_COMPLETION, RUN_STATUS=JUDGED_RUNS),
    )
    good = f"sum({runs_ended(all_runs, '$__range', status=RunStatus.SUCCESS)})"
    judged = f"sum({runs_ended(all_runs, '$__range', status=JUDGED_RUNS)})"
    pending = f"max {by(JOB, PROJECT, TARGET)} ({all_runs(QUEUE_PENDING)})"
    return (
        page.with_row(dashboard.Row("Now"))
        .with_panel(
            stat_panel(
                "Workers",
                f"count({workers(SLOT_LIMIT)})",
                "Daemons that report. Fewer than you started: one is gone.",
                steps=((None, "red"), (1, "green")),
                no_value="none",
            )
        )
        .with_panel(
            stat_panel(
                "Slots in use",
                f"sum({workers(SLOT_USED)}) / sum({workers(SLOT_LIMIT)})",
                "dbt processes that run, of those that may. At 100 % for long, requests wait for "
                "a slot: add workers or raise worker.slots.",
                unit="percentunit",
                steps=((None, "green"), (0.8, "yellow"), (1, "orange")),
            )
        )
        .with_panel(
            stat_panel(
                "Running",
                f"sum({all_runs(RUN_ACTIVE, RUN_STATUS=RunStatus.RUNNING)}) or vector(0)",
                "Runs whose dbt is at work.",
                spark=True,
            )
        )
        .with_panel(
            stat_panel(
                "Requests in the queue",
                f"sum({pending}) or vector(0)",
                "Requests that are waited for, those that run included.",
                spark=True,
            )
        )
        .with_panel(
            stat_panel(
                "Oldest wait",
                f"max({all_runs(QUEUE_OLDEST_AGE)})",
                "How long the first request has waited that nobody runs. Runs of one project and "
                "target go one after the other, so a long run makes the next one wait.",
                unit="s",
                steps=wait,
            )
        )
        .with_panel(
            stat_panel(
                "Last run not good",
                f"count({bad}) or vector(0)",
                "Combinations of project, target and command whose last run failed, ended in an "
                "error, ran out of time or was lost. The table below says which.",
                steps=BAD_ABOVE_ZERO,
            )
        )
        .with_panel(
            stat_panel(
                "Success rate",
                f"{good} / {judged}",
                "Of the runs that ended in the time shown. Cancelled ones do not count.",
                unit="percentunit",
                steps=((None, "red"), (0.9, "yellow"), (0.99, "green")),
                no_value="no runs",
            )
        )
        .with_panel(
            stat_panel(
                "Dead letters",
                f"max({workers(DEAD_LETTERS)})",
                "Requests that could not be run, in DBT_DEAD. See `dbtstream dead ls`.",
                steps=((None, "green"), (1, "orange")),
            )
        )
    )


def _runs(page: dashboard.Dashboard) -> dashboard.Dashboard:
    ended = runs_ended(all_runs, "$__rate_interval")
    return (
        page.with_row(dashboard.Row("Runs"))
        .with_panel(
            bars(
                "Runs by status",
                [Query(f"sum {by(RUN_STATUS)} ({ended})", shown(RUN_STATUS))],
                "Runs that ended, by how. `failure`: dbt finished and something did not pass. "
                "`error`: dbt did not finish. `lost`: its worker died and nobody could go on.",
                colours=RUN_COLOURS,
            )
        )
        .with_panel(
            bars(
                "Runs by project",
                [Query(f"sum {by(PROJECT, TARGET)} ({ended})", shown(PROJECT, TARGET))],
                "Runs that ended, by project and target.",
            )
        )
    )


def _projects(page: dashboard.Dashboard) -> dashboard.Dashboard:
    keys = (PROJECT, TARGET, COMMAND)
    stamps = all_runs(RUN_LAST_COMPLETION)
    finished = all_runs(RUN_LAST_COMPLETION, RUN_STATUS=FINISHED_RUNS)
    success = all_runs(RUN_LAST_COMPLETION, RUN_STATUS=RunStatus.SUCCESS)
    duration = of_newest(all_runs(RUN_LAST_DURATION), finished, *keys)
    counted = growth(all_runs(RUN_DURATION, "count"), "$__range")
    return page.with_panel(
        table_panel(
            "Last runs",
            [
                Query(f"time() - max {by(*keys, RUN_STATUS)} ({newest(stamps, *keys)})"),
                Query(f"time() - max {by(*keys)} ({success})"),
                Query(f"max {by(*keys)} ({duration})"),
                Query(f"round(sum {by(*keys)} ({counted}))"),
            ],
            [
                Column(
                    field=PROJECT,
                    title="Project",
                    link=frame.link_to_project("Project", "Target"),
                ),
                Column(field=TARGET, title="Target"),
                Column(field=COMMAND, title="Command"),
                Column(
                    field=RUN_STATUS,
                    title="Last status",
                    colours=RUN_COLOURS,
                ),
                Column(field="Value #A", title="Ended ago", unit="s"),
                Column(field="Value #B", title="Success ago", unit="s", steps=ago),
                Column(field="Value #C", title="Took", unit="s"),
                Column(field="Value #D", title="Runs in range"),
            ],
            "The last run of every project, target and command: how it ended, when one last "
            "succeeded, and how long it took. A project's name leads to its own dashboard.",
            sort_by="Success ago",
            height=9,
        )
    )


def _queue(page: dashboard.Dashboard) -> dashboard.Dashboard:
    keys = by(PROJECT, TARGET)
    waits = all_runs(RUN_QUEUE_DURATION, "bucket")
    return (
        page.with_row(dashboard.Row("Queue and slots"))
        .with_panel(
            lines(
                "Requests in the queue",
                [Query(f"max {keys} ({all_runs(QUEUE_PENDING)})", shown(PROJECT, TARGET))],
                "By project and target; the one that runs is in it.",
                stepped=True,
                width=8,
            )
        )
        .with_panel(
            lines(
                "Oldest wait",
                [Query(f"max {keys} ({all_runs(QUEUE_OLDEST_AGE)})", shown(PROJECT, TARGET))],
                "How long the first request has waited that nobody runs. A line that climbs "
                "without end, while nothing of the project runs: the queue is stuck.",
                unit="s",
                steps=wait,
                width=8,
            )
        )
        .with_panel(
            lines(
                "Slots",
                [
                    Query(f"sum({workers(SLOT_USED)})", "used"),
                    Query(f"sum({workers(SLOT_LIMIT)})", "limit"),
                ],
                "dbt processes at one time, over all workers.",
                colours={"used": "blue", "limit": "#8e8e8e"},
                stepped=True,
                width=8,
            )
        )
        .with_panel(
            lines(
                "Runs in hand",
                [Query(f"sum {by(RUN_STATUS)} ({all_runs(RUN_ACTIVE)})", shown(RUN_STATUS))],
                "Runs that workers hold, by state. Many in `starting`: dbt takes long to load.",
                colours=RUN_COLOURS,
                stacked=True,
                stepped=True,
                width=8,
            )
        )
        .with_panel(
            ranking(
                "Wait until dbt began, 95 % of the runs",
                Query(
                    f"sort_desc({quantile(0.95, waits, PROJECT, TARGET, window='$__range')})",
                    shown(PROJECT, TARGET),
                ),
                "From the request's storing to dbt's start: 95 % of the runs in the time shown "
                "waited at most this long.",
                unit="s",
                steps=wait,
                width=8,
            )
        )
        .with_panel(
            lines(
                "Lag of events",
                [
                    Query(quantile(0.5, workers(EVENT_LAG, "bucket")), "half of them"),
                    Query(quantile(0.99, workers(EVENT_LAG, "bucket")), "99 %"),
                ],
                "From an event's time in dbt until JetStream has stored it. Gaps: no events.",
                unit="s",
                steps=((None, "green"), (1, "yellow"), (30, "red")),
                width=8,
            )
        )
    )


def _workers(page: dashboard.Dashboard) -> dashboard.Dashboard:
    takeovers = increase(all_runs(RUN_TAKEOVERS), "$__rate_interval")
    rejected = increase(all_runs(REQUESTS_REJECTED), "$__rate_interval")
    version = "target_info{" + f'{JOB}=~"$job"' + "}"
    return (
        page.with_row(dashboard.Row("Workers"))
        .with_panel(
            table_panel(
                "Workers",
                [
                    Query(
                        f"sum {by(JOB, INSTANCE)} ({workers(SLOT_USED)})"
                        f" * on ({JOB}, {INSTANCE}) group_left (service_version) {version}"
                    ),
                    Query(f"sum {by(JOB, INSTANCE)} ({workers(SLOT_LIMIT)})"),
                    Query(f"sum {by(JOB, INSTANCE)} ({workers(NATS_CONNECTIONS)})"),
                    Query(f"sum {by(JOB, INSTANCE)} ({workers(MEMORY)})"),
                ],
                [
                    Column(
                        field=INSTANCE,
                        title="Worker",
                        link=f"/d/{frame.DAEMON}?var-instance=${{__value.raw}}"
                        "&${datasource:queryparam}&${job:queryparam}&${__url_time_range}",
                    ),
                    Column(field=JOB, title="Job"),
                    Column(field="service_version", title="Version"),
                    Column(field="Value #A", title="Slots used"),
                    Column(field="Value #B", title="Slots"),
                    Column(
                        field="Value #C",
                        title="NATS connections",
                        steps=((None, "red"), (2, "green")),
                    ),
                    Column(field="Value #D", title="Memory", unit="bytes"),
                ],
                "Every daemon that reports now. Its name leads to its health.",
                width=12,
            )
        )
        .with_panel(
            bars(
                "Taken over",
                [Query(f"sum {by(REASON)} ({takeovers})", shown(REASON))],
                "Runs that a worker went on with after another one was lost or handed them over.",
                width=6,
            )
        )
        .with_panel(
            bars(
                "Requests rejected",
                [
                    Query(
                        f"sum {by(PROJECT, REASON)} ({rejected})",
                        shown(PROJECT, REASON),
                    )
                ],
                "Requests that cannot run, by code: an unknown project, a forbidden argument. "
                "They are in DBT_DEAD, with the reason.",
                width=6,
            )
        )
    )
