"""What the daemon's gauges said when they were last looked at, as plain data. Pure.

Layer 1. The daemon's loop takes a reading about once a second (`gauges`); threads that answer a
scrape or export metrics look at the last one, so that none of them touches what the loop works
with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

Where = tuple[str, str]
"""Project and target."""


@dataclass(slots=True)
class Flow:
    """What passed through a stage. The four names are the same at every stage."""

    received: int = 0
    sent: int = 0
    dropped: int = 0
    failed: int = 0

    def add(self, other: "Flow") -> None:
        self.received += other.received
        self.sent += other.sent
        self.dropped += other.dropped
        self.failed += other.failed


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """Of one project and target. `oldest_at` is the Unix time at which the first request was
    stored that is in nobody's hands; None without one."""

    pending: int
    oldest_at: float | None


@dataclass(frozen=True, slots=True)
class Queues:
    """What JetStream said of the requests at `read_at` (Unix time)."""

    read_at: float
    depths: Mapping[Where, QueueDepth]
    dead_letters: int


@dataclass(frozen=True, slots=True)
class Outboxes:
    """All that are open. `oldest_at`: Unix time of the oldest event that is not stored."""

    events: int
    bytes: int
    oldest_at: float | None


@dataclass(frozen=True, slots=True)
class TemplateReadings:
    """Of all that are there, by what a run forked from them is called (warm, manifest)."""

    count: Mapping[str, int]
    rss_bytes: Mapping[str, int]
    pss_bytes: Mapping[str, int]
    declined: Mapping[tuple[str, str], int]  # and by why


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """One look at the daemon."""

    active: Mapping[tuple[str, str, str], int]  # project, target, status -> runs
    slot_limit: int
    slot_used: int
    nats_connections: int
    nats_reconnects: int
    outboxes: Outboxes
    outbox_limit: int
    queues: Queues | None  # None until JetStream has answered, and when it has not for long
    templates: TemplateReadings | None = None
    flows: Mapping[str, Flow] = field(default_factory=dict)  # of each stage
