"""Looks at the running daemon for its gauges and its health: runs, slots, queue, outboxes, NATS.

Layer 4. `look` is called on the loop with each tick and leaves `last` for other threads;
`watch_queues` asks JetStream every few seconds, and is how `/readyz` knows that it answers.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

from dbtstream.config import Config
from dbtstream.errors import NatsError
from dbtstream.execution import Execution
from dbtstream.nats_link import NatsLink
from dbtstream.outbox import Outbox
from dbtstream.publishers.openlineage import OpenLineageSender
from dbtstream.queue_depth import read_queues
from dbtstream.readings import Flow, Outboxes, Queues, Readings, TemplateReadings
from dbtstream.statuses import RunStatus
from dbtstream.templates import Templates
from dbtstream.worker import Worker

logger = logging.getLogger(__name__)

QUEUE_LOOK_S = 5.0
TEMPLATE_LOOK_S = 15.0
FORKED = ("warm", "manifest")
STATES = (RunStatus.QUEUED, RunStatus.STARTING, RunStatus.RUNNING)


class Gauges:
    """Of one daemon, from its connections on; `daemon` adds what it has later."""

    def __init__(
        self, config: Config, links: Iterable[NatsLink], telemetry: Callable[[], Flow]
    ) -> None:
        self.worker: Worker | None = None
        self.openlineage: Sequence[OpenLineageSender] = ()
        self.templates: Templates | None = None
        self.leftovers: list[Outbox] = []  # of a predecessor, that are being published
        self.last: Readings | None = None
        self.answered_at: float | None = None  # by the monotonic clock; JetStream did
        self._config, self._links, self._telemetry = config, tuple(links), telemetry
        self._targets = [
            (name, target)
            for name, project in config.projects.items()
            for target in project.targets
        ]
        self._queues: Queues | None = None
        self._memory: dict[str, tuple[int, int]] = {}

    def look(self) -> None:
        self.last = Readings(
            active=self._active(),
            slot_limit=self._config.worker.slots,
            slot_used=self.worker.slots_used if self.worker else 0,
            nats_connections=sum(link.connected for link in self._links),
            nats_reconnects=sum(link.reconnects for link in self._links),
            outboxes=self._outboxes(),
            outbox_limit=self._config.worker.outbox_max_bytes,
            queues=self._queues,
            templates=self._of_templates(),
            flows=self._flows(),
        )

    async def watch_queues(self) -> None:
        """Until cancelled. Whatever goes wrong in here must not end the daemon."""
        link = self._links[0]
        while True:
            try:
                self._queues = await read_queues(link, self._targets)
                self.answered_at = time.monotonic()
            except NatsError as error:
                self._say(logging.DEBUG, error)
            except Exception as error:  # noqa: BLE001 - see above
                self._say(logging.ERROR, error)
            await asyncio.sleep(QUEUE_LOOK_S)

    async def watch_templates(self) -> None:
        """Until cancelled. How much memory they take, asked of the kernel now and then."""
        while True:
            if self.templates is not None:
                pids = self.templates.pids_by_start()
                self._memory = await asyncio.to_thread(_memory_of, pids)
            await asyncio.sleep(TEMPLATE_LOOK_S)

    def _of_templates(self) -> TemplateReadings:
        templates = self.templates
        pids = templates.pids_by_start() if templates is not None else {}
        return TemplateReadings(
            count={start: len(pids.get(start, ())) for start in FORKED},
            rss_bytes={start: self._memory.get(start, (0, 0))[0] for start in FORKED},
            pss_bytes={start: self._memory.get(start, (0, 0))[1] for start in FORKED},
            declined={
                **{(start, "starting"): 0 for start in FORKED},
                **(templates.declined() if templates is not None else {}),
            },
        )

    def _say(self, level: int, error: Exception) -> None:
        logger.log(
            level,
            "cannot look at the queues for now",
            extra={"action": "gauges.unseen", "error": f"{type(error).__name__}: {error}"},
        )

    @property
    def _executions(self) -> Iterable[Execution]:
        return self.worker.executions.values() if self.worker else ()

    def _active(self) -> Mapping[tuple[str, str, str], int]:
        counts = Counter(
            {(*where, status.value): 0 for where in self._targets for status in STATES}
        )
        for execution in self._executions:
            job, status = execution.job, execution.view.status
            if status in STATES:
                counts[job.project_name, job.target, status.value] += 1
        return counts

    def _outboxes(self) -> Outboxes:
        stats = [outbox.stats for outbox in self.leftovers]
        stats += [box for each in self._executions if (box := each.outbox) is not None]
        oldest_s = max((box.oldest_age_s for box in stats), default=0.0)
        return Outboxes(
            events=sum(box.waiting for box in stats),
            bytes=sum(box.waiting_bytes for box in stats),
            oldest_at=time.time() - oldest_s if oldest_s else None,
        )

    def _flows(self) -> dict[str, Flow]:
        openlineage = Flow()
        for sender in self.openlineage:
            received, sent, dropped, failed, *_ = astuple(sender.stats)
            openlineage.add(Flow(received, sent, dropped, failed))
        return {
            "requests": self.worker.requests if self.worker else Flow(),
            "events": self.worker.events if self.worker else Flow(),
            "openlineage": openlineage,
            "telemetry": self._telemetry(),
        }


def _memory_of(pids: Mapping[str, Iterable[int]]) -> dict[str, tuple[int, int]]:
    """RSS and PSS in bytes of those that are there. Blocking; the kernel walks their pages."""
    found = {}
    for start, each in pids.items():
        sizes = [_rss_and_pss(pid) for pid in each]
        found[start] = (sum(rss for rss, _ in sizes), sum(pss for _, pss in sizes))
    return found


def _rss_and_pss(pid: int) -> tuple[int, int]:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0, 0
    sizes = dict(line.split(":", 1) for line in text.splitlines()[1:])
    # Of a process that has just ended there may be nothing.
    rss, pss = (int(sizes.get(name, "0").split()[0]) * 1024 for name in ("Rss", "Pss"))
    return rss, pss
