"""When dbt is to stop, and how it is made to: the reasons, and the ladder.

`execution` runs one per child. A reason is a cancel, the run's time limit, too long a silence,
or that the run is handed over; the first one counts. Then the ladder: ask for KeyboardInterrupt
in dbt's main thread, SIGTERM, SIGKILL to the group, with the config's graces between. Each rung
is told; what a rung means for the run's events is not decided here.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from dbtstream.config import WorkerConfig
from dbtstream.dbt_process import DbtProcess
from dbtstream.statuses import Reason

logger = logging.getLogger(__name__)

STACK_S = 3.0
"""How long a silent dbt is given to say where its threads are."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Why dbt is to stop."""

    reason: Reason  # CANCELLED, TIMEOUT or HANDED_OVER
    by: str
    text: str | None = None


class Watchdog:
    """`tell` gets each rung: its name, why, and for a silence the stacks of dbt's threads."""

    def __init__(
        self,
        run_id: str,
        config: WorkerConfig,
        *,
        timeout_s: float | None,
        silence_s: float | None,
        tell: Callable[[str, Stop, str | None], None],
    ) -> None:
        self._run_id, self._config, self._tell = run_id, config, tell
        self._timeout_s, self._silence_s = timeout_s, silence_s
        self._loop = asyncio.get_running_loop()
        self._stop: asyncio.Future[Stop] = self._loop.create_future()
        self._heard_s = 0.0

    @property
    def stop(self) -> Stop | None:
        return self._stop.result() if self._stop.done() else None

    def ask(self, stop: Stop) -> None:
        """The first reason counts."""
        if not self._stop.done():
            self._stop.set_result(stop)

    async def asked(self) -> Stop:
        """Wait until somebody asks; time limits are those of `run` only."""
        return await asyncio.shield(self._stop)

    def heard(self) -> None:
        """dbt has said something."""
        self._heard_s = self._loop.time()

    async def run(self, process: DbtProcess) -> None:
        """Wait for a reason; then ask, insist, and end it."""
        stop = await self._reason()
        silent = stop.by == "silence_timeout_s"
        stack = await process.stack(timeout_s=STACK_S) if silent else None
        self.ask(stop)
        self.rung("requested", stop, stack)
        await process.cancel()  # the child tells of `interrupting` itself
        await asyncio.sleep(self._config.cancel_grace_s)
        self.rung("terminating", stop)
        process.terminate()
        await asyncio.sleep(self._config.kill_grace_s)
        self.rung("killing", stop)
        process.kill()

    def rung(self, step: str, stop: Stop, stack: str | None = None) -> None:
        logger.info(
            "stopping dbt",
            extra={
                "action": "run.cancel",
                "run_id": self._run_id,
                "step": step,
                "by": stop.by,
                "reason": stop.text,
            },
        )
        self._tell(step, stop, stack)

    async def _reason(self) -> Stop:
        limit_s, silence_s = self._timeout_s, self._silence_s
        begun = self._heard_s = self._loop.time()
        while not self._stop.done():
            now = self._loop.time()
            if limit_s and now >= begun + limit_s:
                return Stop(Reason.TIMEOUT, "timeout_s", f"ran longer than {limit_s:g} s")
            if silence_s and now >= self._heard_s + silence_s:
                return Stop(Reason.TIMEOUT, "silence_timeout_s", f"no event for {silence_s:g} s")
            ends = [begun + limit_s] if limit_s else []
            ends += [self._heard_s + silence_s] if silence_s else []
            await asyncio.wait({self._stop}, timeout=min(ends) - now if ends else None)
        return self._stop.result()
