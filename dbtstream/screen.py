"""A run on the terminal while it goes on, and its summary (`tables`) when it has ended.

Three views take the events of one run, all with the same four methods: `ScreenView` redraws
at most ten times a second and prints above that what must not scroll away; `PlainView` prints
one line per event; `JsonView` one JSON event per line. `follow` feeds them. A frame costs the
same for ten nodes and for ten thousand: at most MAX_RUNNING rows, never a loop over all nodes.
"""

import itertools
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dbtstream.events import (
    AnyEvent,
    Gap,
    LogLine,
    NodeFinished,
    RunCancel,
    RunRejected,
    encode_event,
)
from dbtstream.statuses import NodeStatus
from dbtstream.tables import COLOURS, indented, run_summary, without_colour
from dbtstream.terminal import (
    BAD,
    RESULT_COMMANDS,
    RESULT_LOGS,
    RunPicture,
    duration,
    message_of,
    node_finished_text,
    plain_line,
    plural,
)

REFRESH_S = 0.125
MAX_RUNNING = 10
PLAIN_WIDTH = 100

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    return datetime.now(UTC)


class RunWatcher(Protocol):
    """What `follow` needs of a view."""

    picture: RunPicture

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
    def event(self, event: AnyEvent) -> None: ...
    def note(self, text: str) -> None:
        """A sentence of ours, between the events."""

    def refresh(self) -> None:
        """Time has passed."""

    def summary(self, again: str | None) -> None:
        """The run has ended, or we leave. `again` is a command that shows it once more."""


def view_for(args: list[str], *, as_json: bool, plain: bool) -> RunWatcher:
    """The view that suits where stdout goes and what was asked for."""
    if as_json:
        return JsonView(sys.stdout)
    if not plain and sys.stdout.isatty():
        return ScreenView(Console())
    return PlainView(text_result=bool(args) and args[0] in RESULT_COMMANDS)


class JsonView:
    """Every event as one line of JSON on stdout; notes go to stderr."""

    def __init__(self, out: TextIO) -> None:
        self.picture = RunPicture()
        self._out = out

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.flush()

    def event(self, event: AnyEvent) -> None:
        self.picture.apply(event)
        self._out.write(encode_event(event).decode() + "\n")
        self._out.flush()

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)  # noqa: T201  # this is the terminal's own module

    def refresh(self) -> None:
        pass

    def summary(self, again: str | None) -> None:
        pass


class PlainView:
    """One line per event, for logs and pipes. The text that a command is for goes to stdout.

    With `text_result` (list, show, compile) all else goes to stderr, so that
    `dbtstream run … -- list | sort` sorts nodes and nothing else.
    """

    def __init__(
        self, *, text_result: bool = False, out: TextIO | None = None, err: TextIO | None = None
    ) -> None:
        self.picture = RunPicture()
        self._out = out or sys.stdout
        self._progress = (err or sys.stderr) if text_result else self._out

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.flush()

    def event(self, event: AnyEvent) -> None:
        self.picture.apply(event)
        if isinstance(event, LogLine) and event.name in RESULT_LOGS:
            self._write(self._out, without_colour(event.message) + _cut_note(event))
        elif line := plain_line(event):
            self._write(self._progress, without_colour(line))

    def note(self, text: str) -> None:
        self._write(self._progress, text)

    def refresh(self) -> None:
        pass

    def summary(self, again: str | None) -> None:
        console = Console(file=self._progress, width=PLAIN_WIDTH, color_system=None)
        console.print(run_summary(self.picture, again=again))

    def _write(self, out: TextIO, line: str) -> None:
        out.write(line + "\n")
        out.flush()


class ScreenView:
    """A bar and the running nodes at the bottom; what went wrong, as it comes, above it."""

    def __init__(self, console: Console, *, now: Clock = utc_now) -> None:
        self.picture = RunPicture()
        self._console = console
        self._now = now
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def event(self, event: AnyEvent) -> None:
        self.picture.apply(event)
        for line in lines_above(event):
            self._console.print(line, soft_wrap=isinstance(event, LogLine))

    def note(self, text: str) -> None:
        self._console.print(Text(text, style="yellow"))

    def refresh(self) -> None:
        self._live.update(live_frame(self.picture, self._now()), refresh=True)

    def summary(self, again: str | None) -> None:
        self._live.stop()
        self._console.print(run_summary(self.picture, again=again))


def lines_above(event: AnyEvent) -> Iterable[RenderableType]:
    """What a person should see at once and keep; most events are not."""
    match event:
        case NodeFinished() if event.status in BAD or event.status is NodeStatus.WARN:
            message = message_of(event) or ""
            long = event.status in BAD and "\n" in message
            line = node_finished_text(event, with_message=not long)
            yield Text(line, style=COLOURS[event.status])
            if long:
                yield indented(message)
        case LogLine() if event.name in RESULT_LOGS:
            yield Text.from_ansi(event.message + _cut_note(event))
        case LogLine():
            style = {"error": "red", "warn": "yellow"}.get(event.level, "dim")
            yield Text(without_colour(event.message), style=style)
        case RunCancel() | Gap() | RunRejected():
            yield Text(plain_line(event) or "", style="yellow")
        case _:
            return


def live_frame(picture: RunPicture, now: datetime) -> RenderableType:
    """The bottom of the screen: what runs, how far it is, which nodes are at work."""
    head = Text(f"{picture.project}/{picture.target}  ", style="bold")
    head.append(f"dbt {' '.join(picture.args)}", style="default")
    head.append(f"  {duration(picture.elapsed_s(now))}", style="dim")
    head.no_wrap, head.overflow = True, "ellipsis"
    bar = Table.grid(padding=(0, 1))
    bar.add_row(_bar(picture), Text(_stage(picture)))
    parts: list[RenderableType] = [Text(), head, bar]
    if picture.running:
        parts.append(_running_table(picture, now))
    return Group(*parts)


def _bar(picture: RunPicture) -> RenderableType:
    style = "red" if picture.problem_count else "green"
    return ProgressBar(
        total=picture.total or None,
        completed=picture.done,
        width=36,
        pulse=picture.total is None,
        complete_style=style,
        finished_style=style,
    )


def _stage(picture: RunPicture) -> str:
    if picture.total is None:
        if picture.started_at is not None:
            return "dbt is reading the project"
        if picture.position:
            return f"waiting, {plural(picture.position, 'run')} ahead"
        return "waiting for a worker" if picture.position is None else "starting"
    words = [f"{picture.done}/{picture.total}"]
    bad = picture.problem_count
    if bad:
        words.append(f"{bad} failed")
    if skipped := picture.by_status[NodeStatus.SKIPPED]:
        words.append(f"{skipped} skipped")
    if picture.eta_s is not None and picture.done < picture.total:
        words.append(f"about {duration(max(1, round(picture.eta_s)))} left")
    if picture.cancel is not None:
        words.append(f"cancel: {picture.cancel.step}")
    return " · ".join(words)


def _running_table(picture: RunPicture, now: datetime) -> RenderableType:
    """The nodes that have been at work the longest: a dict keeps the order of their start."""
    table = Table.grid(padding=(0, 2))
    for node in itertools.islice(picture.running.values(), MAX_RUNNING):
        elapsed = max(0.0, (now - node.since).total_seconds())
        name = Text(node.name, no_wrap=True, overflow="ellipsis")
        table.add_row(Text(f"  {node.resource_type}", style="dim"), name, duration(elapsed))
    if (more := len(picture.running) - MAX_RUNNING) > 0:
        table.add_row("", Text(f"and {more} more", style="dim"), "")
    return table


def _cut_note(event: LogLine) -> str:
    return "\n… (cut: the event holds the beginning only)" if event.truncated else ""
