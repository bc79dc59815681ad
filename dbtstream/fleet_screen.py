"""How `dbtstream top` looks: a `FleetView` as lines of text, as many as there is room for.

Every line is cut at the width of the console and none is wrapped, so that what is drawn has
the height that was reckoned with. Takes typed facts and gives a renderable; reads no clock,
prints nothing. `top_commands` shows it.
"""

from collections.abc import Sequence
from datetime import datetime

import msgspec
from rich.console import Group, RenderableType
from rich.text import Text

from dbtstream.fleet import EndedRow, FailureRow, FleetView, QueueRow, RunRow, WorkerRow
from dbtstream.statuses import PASSED, NodeStatus, RunStatus
from dbtstream.tables import COLOURS, RUN_COLOURS, without_colour
from dbtstream.terminal import duration, plural

BAR_WIDTH = 16
SLOTS_BAR_WIDTH = 8
PLACE_WIDTH = 24
NAME_WIDTH = 32
SHORT_ID = 8
MIN_LINES = 4  # of a section
NODES_NAMED = 3
MESSAGE_CHARS = 300  # wider than most terminals

Cell = Text | str


class Connection(msgspec.Struct, frozen=True, kw_only=True):
    """How we know: by whom, whether still, and what is in the way."""

    servers: Sequence[str]
    away_since: datetime | None = None  # without a connection to NATS since then
    problem: str | None = None


def fleet_frame(
    view: FleetView, connection: Connection, *, height: int | None = None
) -> RenderableType:
    """All of it in `height` lines, or what matters most of it; without a height, all of it."""
    head = _head(view, connection)
    sections = [
        _workers(view),
        _queues(view.queues),
        _runs(view),
        _failures(view),
        _ended(view.ended, view.at),
    ]
    sections = [lines for lines in sections if lines]
    if height is not None:
        # Each section has an empty line above it, and is nothing without a line or two.
        while len(sections) > 1 and (height - len(head)) // len(sections) < MIN_LINES:
            sections.pop()
        room = max(0, height - len(head) - len(sections))
        shares = fair_shares([len(lines) for lines in sections], room)
        sections = [
            shortened(lines, share) for lines, share in zip(sections, shares, strict=True) if share
        ]
    lines = list(head)
    for section in sections:
        lines += [Text(), *section]
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    return Group(*lines[:height])


def fair_shares(wanted: Sequence[int], room: int) -> list[int]:
    """Who wants little gets it, and the others share what is left."""
    shares = [0] * len(wanted)
    by_size = sorted(range(len(wanted)), key=lambda index: wanted[index])
    for position, index in enumerate(by_size):
        shares[index] = min(wanted[index], room // (len(wanted) - position))
        room -= shares[index]
    return shares


def shortened(lines: Sequence[Text], count: int) -> Sequence[Text]:
    """The first of them, and a word about the rest."""
    if len(lines) <= count:
        return lines
    if count < 2:
        return lines[:count]
    return [*lines[: count - 1], Text(f"… {len(lines) - count + 1} more lines", style="dim")]


def _head(view: FleetView, connection: Connection) -> list[Text]:
    line = Text("dbtstream top", style="bold")
    line.append(f"  {view.at:%H:%M:%S}  {', '.join(connection.servers)}", style="dim")
    lines = [line, _sums(view)]
    if connection.away_since is not None:
        since = f"{connection.away_since:%H:%M:%S}"
        words = f"NATS is away since {since}; trying to connect. What you see is as of then."
        lines.append(Text(words, style="bold red"))
    elif connection.problem:
        lines.append(Text(plain(connection.problem), style="red"))
    return lines


def _sums(view: FleetView) -> Text:
    used = sum(worker.used for worker in view.workers)
    slots = sum(worker.slots for worker in view.workers)
    waiting = sum(queue.waiting for queue in view.queues)
    words = [
        plural(len(view.workers), "worker"),
        f"{used}/{slots} slots",
        f"{plural(len(view.runs), 'run')} under way",
        f"{waiting} waiting",
    ]
    if view.events_per_s is not None:
        words.append(f"{view.events_per_s:.1f} events/s")
    return Text(" · ".join(words))


# -- the sections ----------------------------------------------------------------------------


def _workers(view: FleetView) -> Sequence[Text]:
    if not view.workers:
        return [Text("no worker answers", style="yellow")]
    rows = [_worker(worker, view.at) for worker in view.workers]
    return columns(("WORKER", "SLOTS", "", "VERSION", "UP", "STATE", "PROJECTS"), rows)


def _worker(worker: WorkerRow, now: datetime) -> tuple[Cell, ...]:
    state = Text("ready", style="green")
    if worker.silent_s is not None:
        state = Text(f"silent for {span(worker.silent_s)}", style="bold red")
    elif worker.draining:
        state = Text("draining", style="yellow")
    elif worker.used >= worker.slots:
        state = Text("full", style="cyan")
    return (
        cut(worker.worker, PLACE_WIDTH),
        f"{worker.used}/{worker.slots}",
        bar(worker.used, worker.slots, width=SLOTS_BAR_WIDTH, style="cyan"),
        worker.version,
        _ago(worker.started_at, now),
        state,
        plain(", ".join(worker.projects)),
    )


def _queues(queues: Sequence[QueueRow]) -> Sequence[Text]:
    rows = [
        (
            place_of(queue),
            str(queue.waiting),
            "" if queue.oldest_wait_s is None else span(queue.oldest_wait_s),
            f"run {short(queue.running)}" if queue.running else Text("nothing", style="yellow"),
        )
        for queue in queues
    ]
    return columns(("QUEUE", "WAITING", "OLDEST", "BEHIND"), rows)


def _runs(view: FleetView) -> Sequence[Text]:
    rows = [_run(run) for run in view.runs]
    heading, *lines = columns(
        ("RUN", "OF", "STATUS", "PROGRESS", "", "LEFT", "TOOK", "WORKER"), rows
    ) or [Text("nothing runs", style="dim")]
    found = [heading]
    for run, line in zip(view.runs, lines, strict=True):
        found.append(line)
        if details := _details(run, view.at):
            found.append(details)
    return found


def _run(run: RunRow) -> tuple[Cell, ...]:
    status = Text(run.status, style=RUN_COLOURS.get(run.status, "red"))
    if run.cancel is not None:
        status = Text(run.cancel, style="yellow")
    elif run.status is RunStatus.QUEUED:
        status = Text("waits", style="yellow")  # for a limit or a slot
    done = "" if run.total is None else f"{run.done}/{run.total}"
    left = run.eta_s is not None and run.total is not None and run.done < run.total
    return (
        short(run.run_id),
        place_of(run),
        status,
        bar(run.done, run.total or 0, width=BAR_WIDTH, style="red" if _bad(run) else "green"),
        done,
        f"~{span(max(1, run.eta_s or 0))}" if left else "",
        "" if run.elapsed_s is None else span(run.elapsed_s),
        plain(run.worker or ""),
    )


def _bad(run: RunRow) -> bool:
    return any(run.by_status.get(status) for status in COLOURS if COLOURS[status] == "red")


def _details(run: RunRow, now: datetime) -> Text | None:
    """Under the run: what did not pass, and what is at work for how long."""
    line = Text("    ")
    for status in NodeStatus:
        if status not in PASSED - {NodeStatus.WARN} and (count := run.by_status.get(status)):
            line.append(f"{count} {status.replace('_', ' ')}  ", style=COLOURS.get(status, "dim"))
    named = run.nodes[:NODES_NAMED]
    words = [
        f"{node.resource_type} {cut(node.name, NAME_WIDTH)} {_ago(node.started_at, now)}"
        for node in named
    ]
    if (more := run.running - len(named)) > 0:
        words.append(f"{more} more")
    if run.attempt > 1:
        words.insert(0, f"attempt {run.attempt}")
    if run.unstored > 0:
        words.append(f"{plural(run.unstored, 'event')} not stored yet")
    line.append(", ".join(words), style="dim")
    return line if line.plain.strip() else None


def _failures(view: FleetView) -> Sequence[Text]:
    return columns(
        ("FAILED", "OF", "RUN", "WHAT", "STATUS", "MESSAGE"),
        [_failure(failure, view.at) for failure in view.failures],
    )


def _failure(failure: FailureRow, now: datetime) -> tuple[Cell, ...]:
    what = f"{failure.resource_type} {failure.name}" if failure.name else "the run"
    return (
        clock(failure.at, now),
        place_of(failure),
        short(failure.run_id),
        cut(plain(what), NAME_WIDTH),
        Text(failure.status.replace("_", " "), style="red"),
        Text(plain(failure.message or ""), style="dim"),
    )


def _ended(ended: Sequence[EndedRow], now: datetime) -> Sequence[Text]:
    rows = [
        (
            clock(row.finished_at, now),
            place_of(row),
            short(row.run_id),
            Text(row.status.replace("_", " "), style=RUN_COLOURS.get(row.status, "red")),
            "" if row.elapsed_s is None else duration(row.elapsed_s),
            Text(plain(" ".join(row.args)), style="dim"),
        )
        for row in ended
    ]
    return columns(("ENDED", "OF", "RUN", "STATUS", "TOOK", "DBT"), rows)


# -- lines and cells -------------------------------------------------------------------------


def columns(heading: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[Text]:
    """Each column as wide as its widest cell; nothing where there are no rows."""
    if not rows:
        return []
    table = [heading, *rows]
    widths = [max(_length(row[index]) for row in table) for index in range(len(heading) - 1)]
    lines = []
    for row in table:
        line = Text()
        for cell, width in zip(row, [*widths, 0], strict=True):
            line.append_text(cell if isinstance(cell, Text) else Text(cell))
            line.append(" " * (width - _length(cell) + 2 if width else 0))
        line.rstrip()
        lines.append(line)
    lines[0].stylize("dim")
    return lines


def _length(cell: Cell) -> int:
    return (cell if isinstance(cell, Text) else Text(cell)).cell_len


def bar(done: int, total: int, *, width: int, style: str) -> Text:
    full = 0 if total <= 0 else min(width, done * width // total)
    line = Text("━" * full, style=style)
    return line.append("─" * (width - full), style="dim")


def place_of(row: QueueRow | RunRow | EndedRow | FailureRow) -> str:
    return cut(f"{row.project}.{row.target}", PLACE_WIDTH)


def short(run_id: str) -> str:
    """Its last characters: `dbtstream show` takes them for the whole."""
    return run_id[-SHORT_ID:]


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def clock(at: datetime, now: datetime) -> str:
    return f"{at:%H:%M:%S}" if at.date() == now.date() else f"{at:%m-%d %H:%M}"


def _ago(since: datetime, now: datetime) -> str:
    return span(max(0.0, (now - since).total_seconds()))


def span(seconds: float) -> str:
    """As `duration`, in whole seconds: what counts up should not flicker."""
    return f"{round(seconds)} s" if round(seconds) < 60 else duration(round(seconds))


def plain(text: str) -> str:
    """On one line, and without what a terminal would take for an order."""
    text = " ".join(without_colour(text[: 2 * MESSAGE_CHARS]).split())[:MESSAGE_CHARS]
    return "".join(character for character in text if character.isprintable())
