"""What `dbtstream top` does: look at the fleet, again and again, and show it.

The facts come through `client`: what workers say of themselves, what control lists, the live
events in between and, once, the failures that are stored. `fleet` puts them together,
`fleet_screen` draws it. NATS being away is shown, never an end.
"""

import asyncio
import contextlib
import logging
import sys
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta

import msgspec
from rich.console import Console
from rich.live import Live

from dbtstream.client import Client
from dbtstream.commands import connect, console_of_stdout, say
from dbtstream.config import NatsConfig
from dbtstream.errors import NatsError
from dbtstream.events import AnyEvent
from dbtstream.fleet import Fleet
from dbtstream.fleet_screen import Connection, fleet_frame
from dbtstream.follow import INTERRUPTS
from dbtstream.logs import facts_of
from dbtstream.messages import RunList
from dbtstream.terminal import BAD

WORKERS_EVERY_S = 2.0
RUNS_EVERY_S = 5.0
RETRY_S = 1.0
RECENT_RUNS = 50
FAILURES_S = 5.0  # what reading stored failures may take
TICK_S = 0.25
REDRAW_S = 1.0  # without news: times go on
NOTICE = timedelta(seconds=15)  # how long a warning is shown


async def top(
    nats: NatsConfig, *, project: str | None, target: str | None, once: bool, as_json: bool
) -> int:
    async with connect(nats) as client:
        watch = FleetWatch(client, project=project, target=target)
        if not (once or as_json) and sys.stdout.isatty():
            await _show_live(watch)
            return 0
        await watch.look_once()
        view = watch.fleet.view(_now())
        if as_json:
            say(msgspec.json.encode(view).decode())
        else:
            console_of_stdout().print(fleet_frame(view, watch.connection()))
    return 0


class FleetWatch:
    """What is known of the fleet, and how that is kept up."""

    def __init__(self, client: Client, *, project: str | None, target: str | None) -> None:
        self.fleet = Fleet(project=project, target=target)
        self._client, self._project, self._target = client, project, target
        self._problems: dict[str, str] = {}
        self._away_since: datetime | None = None
        self._notice: str | None = None
        self._noted_at: datetime | None = None

    async def look_once(self) -> None:
        """Raises NoDaemon, NatsError."""
        async with asyncio.TaskGroup() as looks:
            looks.create_task(self._look_at_workers(), name="workers")
            looks.create_task(self._look_at_runs(), name="runs")
        await self._look_at_failures()

    async def look_on(self) -> None:
        """Until cancelled. Raises nothing that an outage brings."""
        live = self._client.live(self._take, project=self._project, target=self._target)
        async with live, asyncio.TaskGroup() as looks:
            self.fleet.watch_events(_now())
            looks.create_task(
                self._again("workers", self._look_at_workers, WORKERS_EVERY_S), name="workers"
            )
            looks.create_task(self._again("runs", self._look_at_runs, RUNS_EVERY_S), name="runs")
            looks.create_task(self._failures_once(), name="failures")

    def connection(self) -> Connection:
        if self._client.connected and self._away_since is not None:
            self._away_since = self._notice = None  # what was said of that is over, too
        elif not self._client.connected and self._away_since is None:
            self._away_since = _now()
        if self._noted_at is not None and _now() - self._noted_at > NOTICE:
            self._notice = self._noted_at = None
        return Connection(
            servers=self._client.servers,
            away_since=self._away_since,
            problem="; ".join(dict.fromkeys(self._problems.values())) or self._notice,
        )

    def note(self, text: str) -> None:
        """A warning of ours."""
        self._notice, self._noted_at = text, _now()

    def _take(self, event: AnyEvent) -> None:
        self.fleet.take_event(event, _now())

    async def _again(self, what: str, look: Callable[[], Awaitable[None]], every_s: float) -> None:
        while True:
            try:
                await look()
            except NatsError as error:
                self._problems[what] = str(error)
                await asyncio.sleep(RETRY_S)
            else:
                self._problems.pop(what, None)
                await asyncio.sleep(every_s)

    async def _look_at_workers(self) -> None:
        asked_at = _now()
        answers = await self._client.workers()
        self.fleet.take_workers(answers, asked_at=asked_at, at=_now())

    async def _look_at_runs(self) -> None:
        listed = await self._listed()
        self.fleet.take_runs(listed, _now())

    async def _listed(self) -> RunList:
        return await self._client.list(
            project=self._project, target=self._target, limit=RECENT_RUNS
        )

    async def _failures_once(self) -> None:
        with contextlib.suppress(NatsError):
            self.fleet.take_runs(await self._listed(), _now())
            await self._look_at_failures()

    async def _look_at_failures(self) -> None:
        """Of the runs that failed last, by their stored events."""
        since = self.fleet.failed_since()
        if since is None:
            return
        events = self._client.events(
            project=self._project,
            target=self._target,
            family="node",
            status=set(BAD),
            since=since,
            follow=False,
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAILURES_S), events:
                async for event in events:
                    self.fleet.take_failure(event)


# -- the live view ---------------------------------------------------------------------------


async def _show_live(watch: FleetWatch) -> None:
    """Until Ctrl-C. At most four frames a second, and only when there is something new."""
    loop = asyncio.get_running_loop()
    enough = asyncio.Event()
    for number in INTERRUPTS:
        loop.add_signal_handler(number, enough.set)
    looking = asyncio.create_task(watch.look_on(), name="look at the fleet")
    looking.add_done_callback(lambda _: enough.set())
    try:
        with _notices_to(watch), _screen() as live:
            await _draw_until(enough, watch, live)
    finally:
        for number in INTERRUPTS:
            loop.remove_signal_handler(number)
        looking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await looking


async def _draw_until(enough: asyncio.Event, watch: FleetWatch, live: Live) -> None:
    loop = asyncio.get_running_loop()
    drawn: tuple[object, ...] = ()
    drawn_at = 0.0
    while not enough.is_set():
        connection = watch.connection()
        size = live.console.size
        news = (watch.fleet.told, connection, size)
        if news != drawn or loop.time() - drawn_at >= REDRAW_S:
            drawn, drawn_at = news, loop.time()
            frame = fleet_frame(watch.fleet.view(_now()), connection, height=size.height)
            live.update(frame, refresh=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TICK_S):
                await enough.wait()


def _screen() -> Live:
    return Live(console=Console(), screen=True, auto_refresh=False)


@contextlib.contextmanager
def _notices_to(watch: FleetWatch) -> Iterator[None]:
    """Log lines go into the view: printed, they would tear it."""
    root = logging.getLogger()
    before = root.handlers[:]
    root.handlers[:] = [_Notices(watch)]
    try:
        yield
    finally:
        root.handlers[:] = before


class _Notices(logging.Handler):
    """The last warning, for as long as it is news."""

    def __init__(self, watch: FleetWatch) -> None:
        super().__init__(logging.WARNING)
        self._watch = watch

    def emit(self, record: logging.LogRecord) -> None:
        facts = facts_of(record)
        problem = facts.get("problem") or facts.get("error") or ""
        self._watch.note(": ".join(filter(None, (record.getMessage(), str(problem)))))


def _now() -> datetime:
    return datetime.now(UTC)
