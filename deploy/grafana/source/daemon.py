"""*Daemon health*: the daemon itself, and what stands between dbt and the outside."""

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models.dashboard import Dashboard

from dbtstream.instruments import (
    CHILD_EXITS,
    CHILD_STARTS,
    CPU_TIME,
    EVENT_DROPPED,
    EVENT_LAG,
    EVENT_PUBLISHED,
    LOOP_LAG,
    MEMORY,
    NATS_CONNECTIONS,
    NATS_RECONNECTS,
    OUTBOX_EVENTS,
    OUTBOX_LIMIT,
    OUTBOX_OLDEST_AGE,
    OUTBOX_SIZE,
    STAGE_DROPPED,
    STAGE_FAILED,
    STAGE_RECEIVED,
    STAGE_SENT,
    TEMPLATE_DECLINED,
    TEMPLATE_MEMORY,
    TEMPLATES,
)
from deploy.grafana.source import frame
from deploy.grafana.source.panels import (
    BAD_ABOVE_ZERO,
    Query,
    bars,
    heat,
    lines,
    stat_panel,
)
from deploy.grafana.source.promql import (
    ANSWER,
    ERROR_TYPE,
    EXPORTS,
    FAMILY,
    INSTANCE,
    MEMORY_OF,
    REASON,
    SPAN_QUEUE,
    SPAN_QUEUE_CAPACITY,
    STAGE,
    START,
    by,
    growth,
    increase,
    quantile,
    shown,
)

one = frame.BY_WORKER
WORKER = shown(INSTANCE)
LAG = ((None, "green"), (0.1, "yellow"), (1.0, "red"))
AGE = ((None, "green"), (30, "yellow"), (120, "red"))


def build() -> Dashboard:
    page = frame.page(
        frame.DAEMON,
        "Daemon health",
        "Event loop, memory, the way of events to NATS, dbt's processes, telemetry itself.",
        since="now-6h",
    )
    page = page.with_variable(frame.prometheus_variable())
    page = page.with_variable(frame.job_variable()).with_variable(frame.instance_variable())
    for section in (_now, _daemon, _events, _children, _telemetry):
        page = section(page)
    return frame.finished(page)


def _now(page: dashboard.Dashboard) -> dashboard.Dashboard:
    lost = growth(one(EVENT_DROPPED), "$__range")
    dropped = increase(one(STAGE_DROPPED, STAGE="telemetry"), "$__range")
    return (
        page.with_row(dashboard.Row("Now"))
        .with_panel(
            stat_panel(
                "Loop lag, 99 %",
                quantile(0.99, one(LOOP_LAG, "bucket")),
                "How late the event loop comes to its tasks. Above a second, leases are at risk.",
                unit="s",
                steps=LAG,
                spark=True,
            )
        )
        .with_panel(
            stat_panel(
                "Memory",
                f"max({one(MEMORY)})",
                "Resident memory of the daemon, without dbt's processes.",
                unit="bytes",
                spark=True,
            )
        )
        .with_panel(
            stat_panel(
                "CPU",
                f"max(sum {by(INSTANCE)} (rate({one(CPU_TIME)}[$__rate_interval])))",
                "Of one core, the busiest daemon.",
                unit="percentunit",
                steps=((None, "green"), (0.5, "yellow"), (0.9, "red")),
                spark=True,
            )
        )
        .with_panel(
            stat_panel(
                "NATS connections",
                f"min({one(NATS_CONNECTIONS)})",
                "A daemon has two, one for requests and one for events. Fewer: it is cut off, "
                "works on, and keeps events in its outbox.",
                steps=((None, "red"), (1, "orange"), (2, "green")),
            )
        )
        .with_panel(
            stat_panel(
                "Events in the outbox",
                f"sum({one(OUTBOX_EVENTS)})",
                "Events that JetStream has not stored yet.",
                steps=((None, "green"), (1000, "yellow"), (100_000, "red")),
                spark=True,
            )
        )
        .with_panel(
            stat_panel(
                "Oldest event in it",
                f"max({one(OUTBOX_OLDEST_AGE)})",
                "Consumers see events at least this late.",
                unit="s",
                steps=AGE,
            )
        )
        .with_panel(
            stat_panel(
                "Events not kept",
                f"round(sum({lost})) or vector(0)",
                "In the time shown. A gap event tells the consumers of each.",
                steps=BAD_ABOVE_ZERO,
            )
        )
        .with_panel(
            stat_panel(
                "Telemetry dropped",
                f"round(sum({dropped})) or vector(0)",
                "Spans and log records that were not sent, in the time shown. Runs and events "
                "are not affected.",
                steps=((None, "green"), (1, "orange")),
            )
        )
    )


def _daemon(page: dashboard.Dashboard) -> dashboard.Dashboard:
    return (
        page.with_row(dashboard.Row("The daemon"))
        .with_panel(
            heat(
                "Loop lag",
                Query(
                    f"sum {by('le')} ({growth(one(LOOP_LAG, 'bucket'), '$__rate_interval')})",
                    "{{le}}",
                ),
                "How late the event loop came to its tasks. The bulk should be at a few ms.",
                width=8,
            )
        )
        .with_panel(
            lines(
                "Loop lag, 99 %",
                [Query(quantile(0.99, one(LOOP_LAG, "bucket"), INSTANCE), WORKER)],
                "By worker. Spikes: something blocks the loop, or the machine has no CPU left.",
                unit="s",
                steps=LAG,
                width=8,
            )
        )
        .with_panel(
            lines(
                "NATS reconnects",
                [
                    Query(
                        f"sum {by(INSTANCE)} (increase({one(NATS_RECONNECTS)}[$__rate_interval]))",
                        WORKER,
                    )
                ],
                "Connections made anew. Often, on all workers: look at the servers or the network.",
                width=8,
            )
        )
        .with_panel(
            lines(
                "Memory",
                [Query(f"max {by(INSTANCE)} ({one(MEMORY)})", WORKER)],
                "Resident memory by worker, without dbt's processes. Should be flat.",
                unit="bytes",
            )
        )
        .with_panel(
            lines(
                "CPU",
                [Query(f"sum {by(INSTANCE)} (rate({one(CPU_TIME)}[$__rate_interval]))", WORKER)],
                "Share of one core, by worker.",
                unit="percentunit",
                steps=((None, "green"), (0.9, "red")),
            )
        )
    )


def _events(page: dashboard.Dashboard) -> dashboard.Dashboard:
    return (
        page.with_row(dashboard.Row("Events on their way out"))
        .with_panel(
            lines(
                "Stored events",
                [
                    Query(
                        f"sum {by(FAMILY)} (rate({one(EVENT_PUBLISHED)}[$__rate_interval]))",
                        shown(FAMILY),
                    )
                ],
                "Events that JetStream has stored, a second, by family.",
                unit="eps",
                stacked=True,
                width=8,
            )
        )
        .with_panel(
            lines(
                "Publish lag",
                [
                    Query(quantile(0.5, one(EVENT_LAG, "bucket")), "half of them"),
                    Query(quantile(0.95, one(EVENT_LAG, "bucket")), "95 %"),
                    Query(quantile(0.99, one(EVENT_LAG, "bucket")), "99 %"),
                ],
                "From an event's time until JetStream has stored it.",
                unit="s",
                steps=((None, "green"), (1, "yellow"), (30, "red")),
                width=8,
            )
        )
        .with_panel(
            bars(
                "Events not kept",
                [
                    Query(
                        f"sum {by(REASON)} ({growth(one(EVENT_DROPPED), '$__rate_interval')})",
                        shown(REASON),
                    )
                ],
                "By reason. Should be empty, always.",
                width=8,
            )
        )
        .with_panel(
            lines(
                "Outbox",
                [Query(f"sum {by(INSTANCE)} ({one(OUTBOX_EVENTS)})", WORKER)],
                "Events that are not stored yet, by worker. Climbs while NATS is away, and falls "
                "quickly once it is back.",
                width=8,
            )
        )
        .with_panel(
            lines(
                "Outbox on disk",
                [
                    Query(f"sum {by(INSTANCE)} ({one(OUTBOX_SIZE)})", f"{WORKER}"),
                    Query(f"max({one(OUTBOX_LIMIT)})", "limit of one run"),
                ],
                "Bytes of all outboxes of a worker, and what one run's may have.",
                unit="bytes",
                colours={"limit of one run": "#8e8e8e"},
                width=8,
            )
        )
        .with_panel(
            lines(
                "Oldest event in the outbox",
                [Query(f"max {by(INSTANCE)} ({one(OUTBOX_OLDEST_AGE)})", WORKER)],
                "By worker.",
                unit="s",
                steps=AGE,
                width=8,
            )
        )
        .with_panel(
            lines(
                "What the stages pass on",
                [
                    Query(
                        f"sum {by(STAGE)} (rate({one(STAGE_RECEIVED)}[$__rate_interval]))",
                        f"{shown(STAGE)}: in",
                    ),
                    Query(
                        f"sum {by(STAGE)} (rate({one(STAGE_SENT)}[$__rate_interval]))",
                        f"{shown(STAGE)}: out",
                    ),
                ],
                "Items a second into and out of each stage. In without out: it holds something "
                "back.",
                unit="cps",
            )
        )
        .with_panel(
            bars(
                "What the stages left out",
                [
                    Query(
                        f"sum {by(STAGE)} ({increase(one(STAGE_DROPPED), '$__rate_interval')})",
                        f"{shown(STAGE)}: dropped",
                    ),
                    Query(
                        f"sum {by(STAGE)} ({increase(one(STAGE_FAILED), '$__rate_interval')})",
                        f"{shown(STAGE)}: failed",
                    ),
                ],
                "Dropped: left out on purpose or for want of room. Failed: refused for good by "
                "the other side.",
            )
        )
    )


def _children(page: dashboard.Dashboard) -> dashboard.Dashboard:
    exits = increase(one(CHILD_EXITS), "$__rate_interval")
    starts = increase(one(CHILD_STARTS), "$__rate_interval")
    declined = increase(one(TEMPLATE_DECLINED), "$__rate_interval")
    of_templates = f"{shown(START)} {shown(MEMORY_OF)}"
    every = f"sum({increase(one(CHILD_STARTS), '$__range')})"
    warm = f"sum({increase(one(CHILD_STARTS, START='warm|manifest'), '$__range')})"
    return (
        page.with_row(dashboard.Row("dbt's processes"))
        .with_panel(
            bars(
                "Exits",
                [Query(f"sum {by(REASON)} ({exits})", shown(REASON))],
                "How dbt's processes ended. `signal` and `oom`: something killed them; "
                "`no_hello`: dbt could not be loaded; `protocol`: a bug, or another version.",
                colours={"ok": "green", "failure": "orange", "error": "red", "oom": "dark-red"},
                width=10,
            )
        )
        .with_panel(
            bars(
                "Starts",
                [Query(f"sum {by(START)} ({starts})", shown(START))],
                "`cold`: a new interpreter. `warm`: forked from one that had dbt loaded. "
                "`manifest`: that had the parsed project as well.",
                colours={"cold": "blue", "warm": "orange", "manifest": "green"},
                width=10,
            )
        )
        .with_panel(
            stat_panel(
                "Warm starts",
                f"(({warm}) or vector(0)) / {every}",
                "Share of dbt's processes that began from a template, in the time shown.",
                unit="percentunit",
                width=4,
                no_value="no starts",
            ).height(8)
        )
        .with_panel(
            lines(
                "Templates",
                [Query(f"sum {by(START)} ({one(TEMPLATES)})", shown(START))],
                "Processes that runs are forked from: `warm` ones have dbt loaded, `manifest` ones "
                "a parsed project as well.",
                width=6,
            )
        )
        .with_panel(
            lines(
                "Memory of templates",
                [Query(f"sum {by(START, MEMORY_OF)} ({one(TEMPLATE_MEMORY)})", of_templates)],
                "`rss`: resident. `pss`: what they share with each other and with runs is divided.",
                unit="bytes",
                width=8,
            )
        )
        .with_panel(
            bars(
                "Not forked, by why",
                [Query(f"sum {by(START, REASON)} ({declined})", f"{shown(START)} {shown(REASON)}")],
                "`warm`: dbt was loaded anew. `manifest`: the project was parsed in the run. "
                "`starting`: a template is on its way. `project_changed`: so it had to be.",
                width=10,
            )
        )
    )


def _telemetry(page: dashboard.Dashboard) -> dashboard.Dashboard:
    rates = [
        (STAGE_RECEIVED, "made"),
        (STAGE_SENT, "sent"),
        (STAGE_FAILED, "not taken"),
        (STAGE_DROPPED, "dropped"),
    ]
    requests = growth(one(EXPORTS, "count"), "$__rate_interval")
    # Neither a status nor an error is what the SDK says of a request that went well.
    joined = f'label_join(sum {by(ANSWER, ERROR_TYPE)} ({requests}), "answer", " ", '
    answers = f'label_replace({joined}"{ANSWER}", "{ERROR_TYPE}"), "answer", "ok", "answer", " ")'
    return (
        page.with_row(dashboard.Row("Telemetry itself (with [telemetry.otlp])"))
        .with_panel(
            lines(
                "Spans, log records, exports of metrics",
                [
                    Query(f"sum(rate({one(stage, STAGE='telemetry')}[$__rate_interval]))", name)
                    for stage, name in rates
                ],
                "A second. `not taken`: the collector refuses or is away. `dropped`: the queue "
                "was full, or the stop did not wait for it.",
                unit="cps",
                colours={"made": "blue", "sent": "green", "not taken": "orange", "dropped": "red"},
                width=8,
            )
        )
        .with_panel(
            lines(
                "Spans that wait",
                [
                    Query(f"sum {by(INSTANCE)} ({one(SPAN_QUEUE)})", WORKER),
                    Query(f"max({one(SPAN_QUEUE_CAPACITY)})", "room"),
                ],
                "The queue in the daemon. When it is full, the oldest span goes.",
                colours={"room": "#8e8e8e"},
                width=8,
            )
        )
        .with_panel(
            bars(
                "What the collector answers",
                [Query(answers, shown("answer"))],
                "Requests by HTTP status, or by what went wrong before there was one.",
                width=8,
            )
        )
    )
