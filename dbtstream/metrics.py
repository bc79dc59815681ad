"""dbtstream's metrics as OpenTelemetry's SDK has them. The SDK is imported by `telemetry` only.

Layer 2. An observer of runs: what `measurements` makes of their events goes into histograms of
the SDK, and into totals of our own that the SDK asks for when it is read: recording a counter
costs it 10 to 20 us, and us 1. Gauges of the daemon come from its last `Readings`.

The SDK asks from threads of its own (a scrape, an export). It is shown copies.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path

from nats.js.api import PubAck
from opentelemetry.metrics import CallbackOptions, Histogram, Meter, Observation

from dbtstream import instruments as i
from dbtstream.envelope import RunContext
from dbtstream.events import DROPPABLE, AnyEvent
from dbtstream.instruments import INSTRUMENTS, Instrument, Kind
from dbtstream.measurements import AttemptMeasurements, Attributes, Known, Measurement
from dbtstream.observers import AttemptObserver
from dbtstream.outbox import Record
from dbtstream.readings import Readings

STALE_S = 60.0
"""What JetStream said of the queue longer ago than this is not told any more."""

LAG_EVERY_S = 0.05
"""Of the events that are stored in so short a time only the first tells its lag; it is the oldest
of its batch. A histogram costs 20 us for each reader, and a run may have many thousand events."""

FAMILIES = ("run", "node", "batch", "artifact", "lineage", "asset", "log", "query", "gap")
DROPS = ("outbox_full", "child_queue_full")

Label = frozenset[tuple[str, str]]
Told = Iterable[tuple[Attributes, float]]


class Metrics:
    """All instruments of one daemon. `look` gives the last readings."""

    def __init__(
        self,
        meter: Meter,
        known: Known,
        *,
        look: Callable[[], Readings | None],
        node_metrics: bool,
    ) -> None:
        self._known, self._look = known, look
        self._totals: dict[str, dict[Label, float]] = {}
        self._histograms: dict[str, Histogram] = {}
        self._lag_told_at: dict[str, float] = {}
        self._observed: dict[str, Callable[[], Told]] = {
            **_of_readings(self._readings),
            i.CPU_TIME.name: _cpu_time,
            i.MEMORY.name: _memory,
            i.SOURCE_AGE.name: self._source_ages,
            i.SLOWEST.name: self._slowest,
        }
        for instrument in INSTRUMENTS:
            if node_metrics or not instrument.per_node:
                self._create(meter, instrument)
        self.record(known.at_zero())
        self.record(_zeros())

    # -- an observer of runs -------------------------------------------------------------------

    def attempt(self, context: RunContext, *, earlier: Sequence[AnyEvent] = ()) -> AttemptObserver:
        measured = AttemptMeasurements.of(
            self._known, context.project, context.target, context.command
        )
        return _Attempt(self, measured)

    def record(self, measurements: Iterable[Measurement]) -> None:
        for instrument, value, attributes in measurements:
            if instrument.kind is Kind.HISTOGRAM:
                self._histograms[instrument.name].record(value, attributes)
                continue
            values, label = self._totals[instrument.name], frozenset(attributes.items())
            added = instrument.kind is Kind.COUNTER
            values[label] = values.get(label, 0) + value if added else value

    def recall(self, measurements: Iterable[Measurement]) -> None:
        """Of before our time: only where nothing newer is known."""
        for instrument, value, attributes in measurements:
            self._totals[instrument.name].setdefault(frozenset(attributes.items()), value)

    def stored(self, record: Record, ack: PubAck | None) -> None:
        """JetStream has the event."""
        name = record.subject.split(".", 5)[4]
        published, label = self._totals[i.EVENT_PUBLISHED.name], _family(name)
        published[label] = published.get(label, 0) + 1
        now = time.time()
        if now - self._lag_told_at.get(name, 0.0) >= LAG_EVERY_S:
            self._lag_told_at[name] = now
            lag_s = max(now - _told_at(record), 0.0)
            self.record([Measurement(i.EVENT_LAG, lag_s, {i.FAMILY: name})])

    def loop_lag(self, lag_s: float) -> None:
        self.record([Measurement(i.LOOP_LAG, lag_s, {})])

    # -- what the SDK asks for -----------------------------------------------------------------

    def _create(self, meter: Meter, instrument: Instrument) -> None:
        facts = {"unit": instrument.unit, "description": instrument.description}
        match instrument.kind:
            case Kind.HISTOGRAM:
                self._histograms[instrument.name] = meter.create_histogram(
                    instrument.name,
                    explicit_bucket_boundaries_advisory=instrument.buckets,
                    **facts,
                )
                return
            case Kind.COUNTER | Kind.GAUGE:
                if instrument.name not in _FLOWS:
                    self._totals[instrument.name] = {}
                    self._observed[instrument.name] = partial(self._total, instrument.name)
        callback = _callback(self._observed[instrument.name])
        if instrument.kind in (Kind.COUNTER, Kind.OBSERVED_COUNTER):
            meter.create_observable_counter(instrument.name, [callback], **facts)
        else:
            meter.create_observable_gauge(instrument.name, [callback], **facts)

    def _total(self, name: str) -> Told:
        return [(dict(label), value) for label, value in self._totals[name].copy().items()]

    def _readings(self) -> Readings | None:
        return self._look()

    def _source_ages(self) -> Told:
        for (project, target), checks in self._known.sources.copy().items():
            for unique_id, check in checks.items():
                if check.age_s is not None:
                    where = {i.PROJECT: project, i.TARGET: target}
                    yield where | {i.UNIQUE_ID: unique_id, i.FRESHNESS: check.outcome}, check.age_s

    def _slowest(self) -> Told:
        for (project, target), nodes in self._known.slowest.copy().items():
            for unique_id, elapsed_s in nodes.items():
                where = {i.PROJECT: project, i.TARGET: target}
                yield where | {i.UNIQUE_ID: unique_id}, elapsed_s


class _Attempt:
    """One attempt's events into the instruments."""

    def __init__(self, metrics: Metrics, measured: AttemptMeasurements) -> None:
        self._metrics, self._measured = metrics, measured

    def take(self, event: AnyEvent) -> None:
        self._metrics.record(self._measured.take(event))


_FLOWS = {
    i.STAGE_RECEIVED.name: "received",
    i.STAGE_SENT.name: "sent",
    i.STAGE_DROPPED.name: "dropped",
    i.STAGE_FAILED.name: "failed",
}


def _of_readings(look: Callable[[], Readings | None]) -> dict[str, Callable[[], Told]]:
    """Instrument -> what to tell of the last readings; nothing before the first."""

    def told(tell: Callable[[Readings], Told]) -> Callable[[], Told]:
        def ask() -> Told:
            readings = look()
            return () if readings is None else tell(readings)

        return ask

    one: Attributes = {}
    tells: dict[Instrument, Callable[[Readings], Told]] = {
        i.RUN_ACTIVE: _active,
        i.QUEUE_PENDING: _pending,
        i.QUEUE_OLDEST_AGE: _oldest,
        i.DEAD_LETTERS: lambda r: [(one, r.queues.dead_letters)] if r.queues else (),
        i.SLOT_LIMIT: lambda r: [(one, r.slot_limit)],
        i.SLOT_USED: lambda r: [(one, r.slot_used)],
        i.NATS_CONNECTIONS: lambda r: [(one, r.nats_connections)],
        i.NATS_RECONNECTS: lambda r: [(one, r.nats_reconnects)],
        i.OUTBOX_EVENTS: lambda r: [(one, r.outboxes.events)],
        i.OUTBOX_SIZE: lambda r: [(one, r.outboxes.bytes)],
        i.OUTBOX_LIMIT: lambda r: [(one, r.outbox_limit)],
        i.OUTBOX_OLDEST_AGE: lambda r: [(one, _age_s(r.outboxes.oldest_at))],
        i.TEMPLATES: _templates,
        i.TEMPLATE_MEMORY: _template_memory,
        i.TEMPLATE_DECLINED: _template_declined,
    }
    asked = {instrument.name: told(tell) for instrument, tell in tells.items()}
    for name, part in _FLOWS.items():
        asked[name] = told(partial(_flow, part))
    return asked


def _active(readings: Readings) -> Told:
    for (project, target, status), count in readings.active.items():
        yield {i.PROJECT: project, i.TARGET: target, i.RUN_STATUS: status}, count


def _pending(readings: Readings) -> Told:
    if readings.queues is not None and time.time() - readings.queues.read_at < STALE_S:
        for (project, target), depth in readings.queues.depths.items():
            yield {i.PROJECT: project, i.TARGET: target}, depth.pending


def _oldest(readings: Readings) -> Told:
    if readings.queues is not None and time.time() - readings.queues.read_at < STALE_S:
        for (project, target), depth in readings.queues.depths.items():
            yield {i.PROJECT: project, i.TARGET: target}, _age_s(depth.oldest_at)


def _templates(readings: Readings) -> Told:
    if (templates := readings.templates) is not None:
        for start, count in templates.count.items():
            yield {i.START: start}, count


def _template_memory(readings: Readings) -> Told:
    if (templates := readings.templates) is not None:
        kinds = {"rss": templates.rss_bytes, "pss": templates.pss_bytes}
        for kind, of_starts in kinds.items():
            for start, size in of_starts.items():
                yield {i.START: start, i.MEMORY_KIND: kind}, size


def _template_declined(readings: Readings) -> Told:
    if (templates := readings.templates) is not None:
        for (start, reason), count in templates.declined.items():
            yield {i.START: start, i.REASON: reason}, count


def _flow(part: str, readings: Readings) -> Told:
    for stage in i.STAGES:
        if (flow := readings.flows.get(stage)) is not None:
            yield {i.STAGE: stage}, getattr(flow, part)


def _age_s(since: float | None) -> float:
    return 0.0 if since is None else max(time.time() - since, 0.0)


def _cpu_time() -> Told:
    """Of this process without its children."""
    times = os.times()
    return [({i.CPU_MODE: "user"}, times.user), ({i.CPU_MODE: "system"}, times.system)]


def _memory() -> Told:
    """Linux only."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return ()
    return [({}, pages * os.sysconf("SC_PAGE_SIZE"))]


def _zeros() -> list[Measurement]:
    published = [Measurement(i.EVENT_PUBLISHED, 0, {i.FAMILY: family}) for family in FAMILIES]
    dropped = [
        Measurement(i.EVENT_DROPPED, 0, {i.FAMILY: family, i.REASON: reason})
        for family in DROPPABLE
        for reason in DROPS
    ]
    return published + dropped


@lru_cache(64)
def _family(name: str) -> Label:
    return frozenset({(i.FAMILY, name)})


def _callback(ask: Callable[[], Told]) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def observe(_: CallbackOptions) -> list[Observation]:
        return [Observation(value, attributes) for attributes, value in ask()]

    return observe


def _told_at(record: Record) -> float:
    """The event's own time, as its headers have it."""
    headers: Mapping[str, str] = record.headers
    return datetime.fromisoformat(headers["ce-time"]).timestamp()
