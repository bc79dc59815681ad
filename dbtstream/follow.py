"""Follow one run to its end, for `dbtstream run` and `demo`: events in, exit code out.

Ctrl-C (or SIGTERM) once asks the daemon to cancel the run and goes on following, since dbt
stops in its own time; a second one leaves. It talks to the daemon through `client` and shows
what it reads in a view of `screen`; it never starts or kills dbt itself.
"""

import asyncio
import contextlib
import getpass
import signal

from dbtstream.client import Client
from dbtstream.errors import DbtstreamError
from dbtstream.events import RunFinished, RunRejected
from dbtstream.messages import RejectCode, RunAccepted
from dbtstream.runs import exit_code_of
from dbtstream.screen import REFRESH_S, RunWatcher
from dbtstream.statuses import RunStatus

EXIT_LEFT = 130  # as a shell reports a command that Ctrl-C ended
EXIT_USAGE = 2
EXIT_ERROR = 1
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)

_USAGE_CODES = frozenset(set(RejectCode) - {RejectCode.EXPIRED, RejectCode.BUSY})


class Follower:
    """One run, one view, and what the person at the keyboard wants."""

    def __init__(
        self, client: Client, run: RunAccepted, view: RunWatcher, *, when_left: str
    ) -> None:
        self._client = client
        self._run = run
        self._view = view
        self._when_left = when_left
        self._interrupts = 0
        self._cancelling: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[int] | None = None

    @property
    def left(self) -> bool:
        """The run went on when we stopped looking."""
        return self._interrupts > 1

    async def run(self) -> int:
        """Show the run until it ends; returns what the command exits with."""
        loop = asyncio.get_running_loop()
        self._reading = asyncio.create_task(self._read(), name=f"follow {self._run.run_id}")
        ticking = asyncio.create_task(self._tick(), name="refresh of the view")
        for number in INTERRUPTS:
            loop.add_signal_handler(number, self._interrupt)
        try:
            return await self._reading
        except asyncio.CancelledError:
            if not self.left:
                raise
            self._view.note(self._when_left)
            return EXIT_LEFT
        finally:
            for number in INTERRUPTS:
                loop.remove_signal_handler(number)
            await _end(self._reading, ticking, self._cancelling)

    async def _read(self) -> int:
        run = self._run
        async with self._client.events(
            project=run.project, target=run.target, run_id=run.run_id
        ) as events:
            async for event in events:
                self._view.event(event)
                match event:
                    case RunFinished():
                        return exit_code_of(event.status, event.exit_code)
                    case RunRejected():
                        return exit_code_of_rejection(event.code)
                    case _:
                        pass
        return exit_code_of(RunStatus.LOST, None)

    async def _tick(self) -> None:
        while True:
            self._view.refresh()
            await asyncio.sleep(REFRESH_S)

    def _interrupt(self) -> None:
        self._interrupts += 1
        if self._interrupts == 1:
            self._view.note("Cancelling the run. Press Ctrl-C again to leave without waiting.")
            self._cancelling = asyncio.create_task(self._cancel(), name="cancel")
        elif self._reading is not None:
            self._reading.cancel()

    async def _cancel(self) -> None:
        try:
            await self._client.cancel(self._run.run_id, by=user_name(), reason="Ctrl-C")
        except DbtstreamError as error:
            self._view.note(f"The cancel did not arrive: {error}")


async def _end(*tasks: asyncio.Task[None] | asyncio.Task[int] | None) -> None:
    for task in tasks:
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, DbtstreamError):
                await task


def exit_code_of_rejection(code: str) -> int:
    """2, as dbt's own for a command that it cannot read; 1 if the request itself was fine."""
    return EXIT_USAGE if code in _USAGE_CODES else EXIT_ERROR


def user_name() -> str:
    """Who asks, for `requested_by` and `by`; a container may know no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return "unknown"
