"""The monitors: what Prometheus' alerts watch, as far as Datadog can.

One monitor is for all environments: `env` is a group. Its message says what happened, what it means
and what to do; `@your-team` is to be replaced. Thresholds are for jobs that run once a day.
"""

from collections.abc import Callable
from typing import Any

from dbtstream.error_types import ErrorType
from dbtstream.instruments import (
    COMMAND,
    ERROR_TYPE,
    EVENT_DROPPED,
    FAMILY,
    NODE_DURATION,
    NODE_TYPE,
    OUTBOX_OLDEST_AGE,
    PROJECT,
    QUEUE_OLDEST_AGE,
    RUN_LAST_COMPLETION,
    RUN_LAST_DURATION,
    RUN_STATUS,
    RUNS_ENDED,
    SLOT_LIMIT,
    STAGE,
    STAGE_DROPPED,
    STAGE_FAILED,
    TARGET,
)
from dbtstream.statuses import RunStatus
from deploy.datadog.source.queries import ENV, INSTANCE, SERVICE, how_many, only, value

NOTIFY = "@your-team"

Json = dict[str, Any]

ALL = (ENV, SERVICE)
WORKER = (*ALL, INSTANCE)
RUNS = (*ALL, PROJECT, TARGET)
JOBS = (*RUNS, COMMAND)

FINDS_NOTHING = "default"
"""A count without data is 0, a gauge keeps its last state."""
TELL = "show_and_notify_no_data"


def run_failed() -> Json:
    bad = only(RUN_STATUS, RunStatus.FAILURE, RunStatus.ERROR, RunStatus.TIMED_OUT, RunStatus.LOST)
    return _monitor(
        f"dbt of {_tag(PROJECT)} did not succeed ({_tag(TARGET)})",
        f"sum(last_10m):{how_many(RUNS_ENDED, bad, by=(*RUNS, RUN_STATUS))} > 0",
        critical=0,
        priority=2,
        happened=f"A run of {_tag(PROJECT)}, target {_tag(TARGET)}, ended as {_tag(RUN_STATUS)}.",
        to_do="`dbtstream ps --all` lists runs, `dbtstream show RUN` what is known of one, and "
        "`dbtstream tail --status error` its nodes. In APM: spans with this project and status "
        "error. `dbtstream run PROJECT -- retry` runs again only what did not succeed.",
        over="No run of it failed in the last ten minutes. That does not say that one succeeded.",
    )


def no_success() -> Json:
    """Datadog cannot subtract a time from now. But if the time of the last success is the same as
    a day before, for two hours on end, there was none for 26 hours."""
    last = value(
        RUN_LAST_COMPLETION,
        only(RUN_STATUS, RunStatus.SUCCESS),
        only(COMMAND, "build", "run"),
        by=JOBS,
        space="max",
    )
    return _monitor(
        f"no successful dbt {_tag(COMMAND)} of {_tag(PROJECT)} for 26 hours ({_tag(TARGET)})",
        f"change(max(last_2h),last_1d):{last} < 1",
        critical=1,
        priority=2,
        happened=f"The data of {_tag(PROJECT)}, target {_tag(TARGET)}, are as old as the last "
        f"success of `dbt {_tag(COMMAND)}`. It may also be that nobody asked for a run.",
        to_do="If the last run failed, mend that. If there was none: what sends the requests, its "
        "schedule and its connection to NATS, and `dbtstream dead ls`. Jobs that do not run "
        "every day: leave their targets out of this monitor's query.",
        over="It succeeded.",
    )


def queue_stuck() -> Json:
    return _monitor(
        f"requests of {_tag(PROJECT)} wait ({_tag(TARGET)})",
        f"min(last_10m):{value(QUEUE_OLDEST_AGE, by=RUNS, space='max')} > 3600",
        critical=3600,
        warning=1800,
        priority=2,
        happened=f"The first request of {_tag(PROJECT)}, target {_tag(TARGET)}, that nobody runs "
        "has waited for {{value}} s.",
        to_do="`dbtstream ps` shows what runs. Runs of one project and target go one after the "
        "other: a long run makes the next one wait. If none runs: are all slots or a limit "
        "taken, does any worker have this project in its config (`dbtstream check`)?",
        over="Nothing waits for so long any more.",
    )


def worker_gone() -> Json:
    """A worker has one slot at least: this is about data that do not come."""
    return _monitor(
        f"worker {_tag(INSTANCE)} does not report",
        f"max(last_10m):{value(SLOT_LIMIT, by=WORKER, space='max')} < 1",
        critical=1,
        priority=1,
        no_data=TELL,
        happened=f"Nothing came from {_tag(INSTANCE)} for ten minutes. Either the daemon is gone, "
        "or its telemetry has no way out. Other workers take over its runs when its leases end.",
        to_do="Look at the process or the pod and its last log lines, at /livez and /readyz, then "
        "at the Agent beside it. A worker that was taken away for good leaves this monitor "
        "after six hours.",
        over="It reports again.",
        more={"group_retention_duration": "6h", "new_group_delay": 60},
    )


def telemetry_dropping() -> Json:
    """default_zero: a sum with a part that has no data has none either."""
    telemetry = only(STAGE, "telemetry")
    dropped = how_many(STAGE_DROPPED, telemetry, by=WORKER)
    failed = how_many(STAGE_FAILED, telemetry, by=WORKER)
    return _monitor(
        f"worker {_tag(INSTANCE)} loses spans",
        f"sum(last_15m):default_zero({dropped}) + default_zero({failed}) > 0",
        critical=0,
        priority=4,
        happened="{{value}} spans or log records were not sent in a quarter of an hour. Runs and "
        "events are not touched by this; traces have holes.",
        to_do="Look at the Agent or collector under [telemetry.otlp]; the daemon's log has what "
        "it answers. While it is away altogether, this monitor hears nothing either.",
        over="All are sent again.",
    )


def outbox_growing() -> Json:
    """By age, not by number: a burst is written to JetStream within seconds."""
    return _monitor(
        f"events wait in the outbox of {_tag(INSTANCE)}",
        f"min(last_5m):{value(OUTBOX_OLDEST_AGE, by=WORKER, space='max')} > 120",
        critical=120,
        warning=60,
        priority=2,
        happened="The oldest event that JetStream has not stored is {{value}} s old. Events are "
        "safe on the worker's disk until the outbox is full; then log lines are dropped.",
        to_do="Look at the NATS servers: down, out of space, or DBT_EVENTS at its limit. Then at "
        "the worker's disk. `dbtstream check` says what it can reach.",
        over="The outbox is being emptied.",
    )


def events_not_kept() -> Json:
    return _monitor(
        f"worker {_tag(INSTANCE)} did not keep events of the family {_tag(FAMILY)}",
        f"sum(last_15m):{how_many(EVENT_DROPPED, by=(*WORKER, FAMILY))} > 0",
        critical=0,
        priority=2,
        happened="{{value}} events were left out. A gap event in the run's stream tells of each.",
        to_do="The gap event has the reason: a full outbox, or NATS that refuses. `dbtstream "
        "verify RUN` compares what is stored of a run.",
        over="Events are kept again.",
    )


def source_stale() -> Json:
    """Each check, not a state: with several workers, the state of one may be long past."""
    stale = how_many(
        NODE_DURATION, only(NODE_TYPE, "source"), only(ERROR_TYPE, ErrorType.SOURCE_STALE), by=RUNS
    )
    return _monitor(
        f"stale sources in {_tag(PROJECT)} ({_tag(TARGET)})",
        f"sum(last_2h):{stale} > 0",
        critical=0,
        priority=3,
        happened="{{value}} times in two hours, a freshness check found a source older than its "
        "error_after. Models on top of it are built from old rows.",
        to_do="Ask whoever loads it. `dbtstream tail --status fail` names the sources and their "
        "age.",
        over="No check of the last two hours found a stale source.",
    )


def run_slow() -> Json:
    """Against the same time of yesterday and of a week ago, and a minute at least: what a job
    takes depends on the hour and the weekday, and short ones vary. Of several workers, the slowest
    of their last runs."""
    last = value(RUN_LAST_DURATION, by=JOBS, space="max")
    usual = f"((day_before({last}) + week_before({last})) / 2)"
    return _monitor(
        f"dbt {_tag(COMMAND)} of {_tag(PROJECT)} is slower than usual ({_tag(TARGET)})",
        f"min(last_30m):({last} - 60) / {usual} > 1.5",
        critical=1.5,
        priority=4,
        happened=f"The last `dbt {_tag(COMMAND)}` of {_tag(PROJECT)} took more than one and a half "
        "times (and a minute) longer than the mean of the same hour yesterday and a week ago.",
        to_do="The dashboard says which phase takes the time, the run's trace which nodes.",
        over="It takes what it usually does.",
    )


MONITORS: dict[str, Callable[[], Json]] = {
    "run-failed": run_failed,
    "no-success": no_success,
    "queue-stuck": queue_stuck,
    "worker-gone": worker_gone,
    "telemetry-dropping": telemetry_dropping,
    "outbox-growing": outbox_growing,
    "events-not-kept": events_not_kept,
    "source-stale": source_stale,
    "run-slow": run_slow,
}


def _monitor(
    title: str,
    query: str,
    *,
    critical: float,
    priority: int,
    happened: str,
    to_do: str,
    over: str,
    warning: float | None = None,
    no_data: str = FINDS_NOTHING,
    more: Json | None = None,
) -> Json:
    thresholds = {"critical": critical} | ({} if warning is None else {"warning": warning})
    return {
        "name": f"[dbtstream] {title}",
        "type": "query alert",
        "query": query,
        "message": _message(happened, to_do, over),
        "tags": ["service:dbtstream", "integration:dbt"],
        "priority": priority,
        "options": {
            "thresholds": thresholds,
            "on_missing_data": no_data,
            "require_full_window": False,
            "include_tags": True,
            "notify_audit": False,
            "renotify_interval": 0,
        }
        | (more or {}),
    }


def _message(happened: str, to_do: str, over: str) -> str:
    where = f"env {_tag(ENV)}, service {_tag(SERVICE)}"
    return (
        f"{{{{^is_recovery}}}}\n{happened}\n\n**What to do:** {to_do}\n{{{{/is_recovery}}}}\n"
        f"{{{{#is_recovery}}}}\n{over}\n{{{{/is_recovery}}}}\n\n{where}\n\n{NOTIFY}"
    )


def _tag(key: str) -> str:
    """A group's value. A key with a dot has to be in brackets."""
    return f"{{{{[{key}].name}}}}" if "." in key else f"{{{{{key}.name}}}}"
