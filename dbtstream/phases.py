"""The parts of an attempt: waiting, starting, parsing, executing, going. Pure.

Layer 1. `normalizer` notes when something of interest was heard, with the times that dbt's process
took (or the events of an earlier worker have); `run.finished` carries what came of it, and
`span_mapping` uses it for attempts that have no such event.
"""

from dataclasses import dataclass
from datetime import datetime

from dbtstream.events import PhaseTiming
from dbtstream.statuses import Phase


@dataclass(slots=True)
class Phases:
    """When each thing was first (`worked_at`: last) heard of."""

    waits_since: datetime
    spawned_at: datetime | None = None
    invoked_at: datetime | None = None  # MainReportVersion, or as near as is known
    parsed_at: datetime | None = None
    planned_at: datetime | None = None  # nodes are selected; many commands select none
    worked_at: datetime | None = None  # the end of a node or hook
    returned_at: datetime | None = None  # dbt's invoke did

    def timings(self, ended_at: datetime) -> list[PhaseTiming]:
        """What began, in order; each part ends where the next one begins, the last at
        `ended_at`. Clocks may be moved, but no part ends before it began."""
        begun = [
            (phase, at)
            for phase, at in (
                (Phase.QUEUE, self.waits_since),
                (Phase.STARTUP, self.spawned_at),
                (Phase.PARSE, self.invoked_at),
                (Phase.EXECUTE, self.planned_at or self.parsed_at),
                (Phase.FINALIZE, self._done_at),
            )
            if at is not None
        ]
        ends = [at for _, at in begun[1:]] + [ended_at]
        timings: list[PhaseTiming] = []
        for (phase, at), end in zip(begun, ends, strict=True):
            started_at = max(at, timings[-1].finished_at) if timings else at
            timings.append(
                PhaseTiming(phase=phase, started_at=started_at, finished_at=max(started_at, end))
            )
        return timings

    @property
    def _done_at(self) -> datetime | None:
        """When nothing was left to do but to say so: only a dbt that returned got there."""
        if self.returned_at is None:
            return None
        if self.planned_at is None:
            return self.returned_at
        return max(self.worked_at or self.planned_at, self.planned_at)
