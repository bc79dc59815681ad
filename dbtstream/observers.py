"""Who is told of a run besides those that it is published for: spans and metrics.

Layer 2. `execution` and `recovery` tell each event once, when it is made; whether it is stored
already is not their business here. `publishers.otel` and `metrics` are observers, and do not know
each other.
"""

from collections.abc import Sequence
from typing import Protocol

from dbtstream.envelope import RunContext
from dbtstream.events import AnyEvent


class AttemptObserver(Protocol):
    """Of one attempt. Must not raise, block, or take longer than some 100 us an event."""

    def take(self, event: AnyEvent) -> None: ...


class Observer(Protocol):
    def attempt(self, context: RunContext, *, earlier: Sequence[AnyEvent] = ()) -> AttemptObserver:
        """`earlier`: what has been told of the run before: its earlier attempts, and of this one
        what its worker told, where another closes it in its stead."""


class Nobody:
    """Observes nothing: telemetry is off."""

    def attempt(self, context: RunContext, *, earlier: Sequence[AnyEvent] = ()) -> AttemptObserver:
        return self

    def take(self, event: AnyEvent) -> None:
        return
