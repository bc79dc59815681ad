"""Every metric that dbtstream has: name, kind, unit, attributes, buckets. The one list.

Layer 0. `measurements` and `telemetry` record by these names, the dashboards, alert rules and
monitors in `deploy/` are checked against them. Names follow OpenTelemetry's rules: dots, no unit
and no `_total` in the name, seconds and bytes, `{word}` for counts. No gauge has the unit 1, since
exporters do not agree on what to append.

Attributes have few values: projects, targets, statuses; what is beyond a list or a limit is
`_OTHER` (`measurements`). Names of nodes are on the instruments
marked `per_node` only, and those are off unless `telemetry.node_metrics` is on.
"""

from enum import StrEnum

import msgspec

METER = "dbtstream"

PROJECT = "dbt.project.name"
TARGET = "dbt.target.name"
COMMAND = "dbt.command"
RUN_STATUS = "dbtstream.run.status"
ERROR_TYPE = "error.type"
NODE_TYPE = "dbt.node.type"
MATERIALIZATION = "dbt.node.materialization"
NODE_STATUS = "dbt.node.status"
OWNER = "dbt.node.owner"
UNIQUE_ID = "dbt.node.unique_id"
SEVERITY = "dbt.test.severity"
FRESHNESS = "dbt.freshness.outcome"
PHASE = "dbt.phase"
FAMILY = "dbtstream.event.family"
REASON = "dbtstream.reason"
STAGE = "dbtstream.stage"
START = "dbtstream.child.start"
CPU_MODE = "cpu.mode"
MEMORY_KIND = "dbtstream.memory.kind"

RUN_BUCKETS_S = (1, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400)
NODE_BUCKETS_S = (0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600)
LAG_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30, 300)


class Kind(StrEnum):
    COUNTER = "counter"
    HISTOGRAM = "histogram"
    GAUGE = "gauge"  # set when something ends
    OBSERVED = "observed"  # a gauge that is asked for its value when it is read
    OBSERVED_COUNTER = "observed_counter"


class Instrument(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    kind: Kind
    unit: str
    description: str
    attributes: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    per_node: bool = False

    @property
    def prometheus_name(self) -> str:
        """As OpenTelemetry's Prometheus exporter writes it; a histogram has three names that
        begin so."""
        name = self.name.replace(".", "_")
        unit = {"s": "_seconds", "By": "_bytes"}.get(self.unit, "")
        total = "_total" if self.kind in (Kind.COUNTER, Kind.OBSERVED_COUNTER) else ""
        return f"{name}{unit}{total}"


def _counter(name: str, unit: str, description: str, *attributes: str) -> Instrument:
    return Instrument(
        name=name, kind=Kind.COUNTER, unit=unit, description=description, attributes=attributes
    )


def _observed(
    name: str, unit: str, description: str, *attributes: str, per_node: bool = False
) -> Instrument:
    return Instrument(
        name=name,
        kind=Kind.OBSERVED,
        unit=unit,
        description=description,
        attributes=attributes,
        per_node=per_node,
    )


def _gauge(name: str, unit: str, description: str, *attributes: str) -> Instrument:
    return Instrument(
        name=name, kind=Kind.GAUGE, unit=unit, description=description, attributes=attributes
    )


def _histogram(
    name: str, description: str, buckets: tuple[float, ...], *attributes: str
) -> Instrument:
    return Instrument(
        name=name,
        kind=Kind.HISTOGRAM,
        unit="s",
        description=description,
        attributes=attributes,
        buckets=buckets,
    )


# Runs.

RUN_DURATION = _histogram(
    "dbtstream.run.duration",
    "From dbt's first attempt to the run's end",
    RUN_BUCKETS_S,
    PROJECT,
    TARGET,
    COMMAND,
    RUN_STATUS,
    ERROR_TYPE,
)
RUN_QUEUE_DURATION = _histogram(
    "dbtstream.run.queue.duration",
    "From the request's storing to dbt's start",
    RUN_BUCKETS_S,
    PROJECT,
    TARGET,
)
RUNS_ENDED = _counter(
    "dbtstream.run.ended",
    "{run}",
    "Runs that ended; from 0 on for each project and target, as a histogram's count is not",
    PROJECT,
    TARGET,
    RUN_STATUS,
)
RUN_ACTIVE = _observed(
    "dbtstream.run.active",
    "{run}",
    "Runs in this worker's hands, by state (queued, starting, running)",
    PROJECT,
    TARGET,
    RUN_STATUS,
)
RUN_LAST_COMPLETION = _gauge(
    "dbtstream.run.last_completion.time",
    "s",
    "Unix time at which a run last ended so; after a restart from the stored runs",
    PROJECT,
    TARGET,
    COMMAND,
    RUN_STATUS,
)
RUN_LAST_DURATION = _gauge(
    "dbtstream.run.last.duration",
    "s",
    "How long the last run took that succeeded or failed",
    PROJECT,
    TARGET,
    COMMAND,
)
RUN_TAKEOVERS = _counter(
    "dbtstream.run.takeovers",
    "{run}",
    "Runs taken over from a worker that was lost or handed them over",
    PROJECT,
    TARGET,
    REASON,
)
REQUESTS_REJECTED = _counter(
    "dbtstream.request.rejected", "{request}", "Requests that cannot run, by code", PROJECT, REASON
)
PHASE_DURATION = _histogram(
    "dbtstream.phase.duration",
    "What the parts of an attempt took: queue, startup, parse, execute, finalize",
    RUN_BUCKETS_S,
    PROJECT,
    PHASE,
)

# Nodes.

NODE_DURATION = _histogram(
    "dbtstream.node.duration",
    "Of nodes and tests that ended, from start to end; skipped ones took 0",
    NODE_BUCKETS_S,
    PROJECT,
    TARGET,
    NODE_TYPE,
    MATERIALIZATION,
    NODE_STATUS,
    ERROR_TYPE,
)
NODE_ROWS = _counter(
    "dbtstream.node.rows_affected", "{row}", "As the adapters say", PROJECT, TARGET, NODE_TYPE
)
NODE_PROBLEMS = _counter(
    "dbtstream.node.problems",
    "{node}",
    "Nodes that warned, failed or ended in an error, for each of their owners, or none",
    PROJECT,
    TARGET,
    OWNER,
    NODE_STATUS,
)
TEST_FAILURES = _counter(
    "dbtstream.test.failures", "{row}", "Rows that tests returned", PROJECT, TARGET, SEVERITY
)
SOURCES = _gauge(
    "dbtstream.source.count",
    "{source}",
    "Sources by how their last freshness check ended: passed, warned, failed, error",
    PROJECT,
    TARGET,
    FRESHNESS,
)
SOURCES_CHECKED = _gauge(
    "dbtstream.source.check.time",
    "s",
    "Unix time at which this worker last ran a freshness check",
    PROJECT,
    TARGET,
)
SOURCE_AGE = _observed(
    "dbtstream.source.freshness.age",
    "s",
    "Age of the newest row at the last freshness check",
    PROJECT,
    TARGET,
    UNIQUE_ID,
    FRESHNESS,
    per_node=True,
)
SLOWEST = _observed(
    "dbtstream.run.slowest.duration",
    "s",
    "The ten slowest nodes of the last run that built or tested something",
    PROJECT,
    TARGET,
    UNIQUE_ID,
    per_node=True,
)

# The queue and its workers.

QUEUE_PENDING = _observed(
    "dbtstream.queue.pending",
    "{request}",
    "Requests in the queue, the running one included",
    PROJECT,
    TARGET,
)
QUEUE_OLDEST_AGE = _observed(
    "dbtstream.queue.oldest.age",
    "s",
    "How long the first request that is not being run has waited; 0 without one",
    PROJECT,
    TARGET,
)
DEAD_LETTERS = _observed("dbtstream.dead_letter.count", "{request}", "Requests in DBT_DEAD")
SLOT_LIMIT = _observed("dbtstream.slot.limit", "{slot}", "dbt processes at one time")
SLOT_USED = _observed("dbtstream.slot.used", "{slot}", "Slots that are taken")
NATS_CONNECTIONS = _observed(
    "dbtstream.nats.connections", "{connection}", "Connections to NATS that are up, of two"
)
NATS_RECONNECTS = Instrument(
    name="dbtstream.nats.reconnects",
    kind=Kind.OBSERVED_COUNTER,
    unit="{reconnect}",
    description="Connections to NATS that were made anew",
)

# Events on their way out.

EVENT_PUBLISHED = _counter(
    "dbtstream.event.published", "{event}", "Events that JetStream has stored", FAMILY
)
EVENT_DROPPED = _counter(
    "dbtstream.event.dropped",
    "{event}",
    "Events that were not kept; a gap event tells of each",
    FAMILY,
    REASON,
)
EVENT_LAG = _histogram(
    "dbtstream.event.publish.lag",
    "From the event's time to its storing; where many are stored at once, of the oldest",
    LAG_BUCKETS_S,
    FAMILY,
)
OUTBOX_EVENTS = _observed("dbtstream.outbox.events", "{event}", "Events that are not stored yet")
OUTBOX_SIZE = _observed("dbtstream.outbox.size", "By", "Of all outboxes on disk")
OUTBOX_LIMIT = _observed("dbtstream.outbox.limit", "By", "What one run's outbox may have")
OUTBOX_OLDEST_AGE = _observed(
    "dbtstream.outbox.oldest.age", "s", "Age of the oldest event that is not stored yet; 0 without"
)

STAGE_RECEIVED = _counter("dbtstream.stage.received", "{item}", "Taken in by a stage", STAGE)
STAGE_SENT = _counter("dbtstream.stage.sent", "{item}", "Passed on by a stage", STAGE)
STAGE_DROPPED = _counter("dbtstream.stage.dropped", "{item}", "Left out by a stage", STAGE)
STAGE_FAILED = _counter("dbtstream.stage.failed", "{item}", "Refused to a stage for good", STAGE)
STAGES = ("requests", "events", "openlineage", "telemetry")

# dbt's processes.

CHILD_STARTS = _counter(
    "dbtstream.child.starts", "{process}", "dbt processes: cold, warm or manifest", PROJECT, START
)
TEMPLATES = _observed(
    "dbtstream.template.ready",
    "{process}",
    "Processes that runs are forked from: dbt imported (warm), the project parsed (manifest)",
    START,
)
TEMPLATE_MEMORY = _observed(
    "dbtstream.template.memory.usage",
    "By",
    "Of those: resident (rss), and with what processes share divided among them (pss)",
    START,
    MEMORY_KIND,
)
TEMPLATE_DECLINED = Instrument(
    name="dbtstream.template.declined",
    kind=Kind.OBSERVED_COUNTER,
    unit="{process}",
    description="dbt processes that were not forked from such a one, by why",
    attributes=(START, REASON),
)
CHILD_EXITS = _counter(
    "dbtstream.child.exits",
    "{process}",
    "How the last one of a run ended: ok, failure, error, interrupted, signal, oom, timeout, "
    "no_hello, protocol",
    PROJECT,
    REASON,
)
CHILD_CPU = _counter(
    "dbtstream.child.cpu.time", "s", "CPU time of the last dbt process of each run", PROJECT
)
CHILD_MEMORY = _gauge(
    "dbtstream.child.memory.max",
    "By",
    "The most that the last dbt process had in memory",
    PROJECT,
    TARGET,
)

# The daemon itself.

LOOP_LAG = _histogram(
    "dbtstream.loop.lag", "How late the event loop comes to its tasks", LAG_BUCKETS_S
)
CPU_TIME = Instrument(
    name="process.cpu.time",
    kind=Kind.OBSERVED_COUNTER,
    unit="s",
    description="CPU time of the daemon",
    attributes=(CPU_MODE,),
)
MEMORY = _observed("process.memory.usage", "By", "Resident memory of the daemon")

INSTRUMENTS: tuple[Instrument, ...] = tuple(
    value for value in globals().values() if isinstance(value, Instrument)
)
