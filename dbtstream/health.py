"""Whether this daemon lives and is ready, for whoever may restart it or send it work.

Layer 4. `/livez` asks only whether the event loop turns: NATS away is no reason to restart a
daemon whose dbt goes on. `/readyz` asks for all that a new run needs. Both are called from the
HTTP port's threads, and look at what the loop has left for them.
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path

from dbtstream.gauges import QUEUE_LOOK_S, Gauges
from dbtstream.http_port import Answer
from dbtstream.nats_link import NatsLink
from dbtstream.pulse import Pulse

HANGS_S = 15.0
"""A loop that has not ticked for so long hangs."""
UNANSWERED_S = 3 * QUEUE_LOOK_S
"""JetStream is asked every QUEUE_LOOK_S; without an answer for so long it is not there."""
MIN_FREE_BYTES = 100 * 1024 * 1024


class Stage(StrEnum):
    """Where the daemon is in its life."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


class Health:
    """`daemon` fills in what it has as it goes on."""

    def __init__(self, pulse: Pulse, state_dir: Path) -> None:
        self.stage = Stage.STARTING
        self.links: Sequence[NatsLink] = ()
        self.gauges: Gauges | None = None  # none where nobody could ask
        self._pulse, self._state_dir = pulse, state_dir

    def livez(self, _: Mapping[str, str]) -> Answer:
        if (silent_s := self._pulse.silent_s) > HANGS_S:
            return Answer.text(503, f"the event loop has been silent for {silent_s:.0f} s")
        return Answer.text(200, "ok")

    def readyz(self, _: Mapping[str, str]) -> Answer:
        checks: dict[str, Callable[[], str | None]] = {
            "serving": self._serving,
            "loop": self._loop,
            "nats": self._nats,
            "jetstream": self._jetstream,
            "disk": self._disk,
        }
        problems = {name: check() for name, check in checks.items()}
        ready = not any(problems.values())
        told = {"ready": ready, "checks": {n: p or "ok" for n, p in problems.items()}}
        return Answer.json(200 if ready else 503, told)

    def _serving(self) -> str | None:
        return None if self.stage is Stage.SERVING else self.stage.value

    def _loop(self) -> str | None:
        silent_s = self._pulse.silent_s
        return f"silent for {silent_s:.0f} s" if silent_s > HANGS_S else None

    def _nats(self) -> str | None:
        up = sum(link.connected for link in self.links)
        return None if self.links and up == len(self.links) else f"{up} of 2 connections are up"

    def _jetstream(self) -> str | None:
        answered_at = self.gauges.answered_at if self.gauges else None
        if answered_at is None:
            return "has not answered yet"
        silent_s = time.monotonic() - answered_at
        return f"no answer for {silent_s:.0f} s" if silent_s > UNANSWERED_S else None

    def _disk(self) -> str | None:
        """Of worker.state_dir, where events wait for NATS."""
        try:
            with tempfile.TemporaryFile(dir=self._state_dir) as file:
                file.write(b"ready?")
                file.flush()
            found = os.statvfs(self._state_dir)
        except OSError as error:
            return f"{self._state_dir} cannot be written: {error.strerror}"
        free = found.f_bavail * found.f_frsize
        if free < MIN_FREE_BYTES:
            return f"{self._state_dir} has {free // 1024**2} MiB left"
        return None
