"""Tables that rich prints: a run's summary, `dbtstream ps`, dead letters, the heads of `show`.

`screen` prints the summary of a run that it followed, `cli` the others. Each takes typed
messages and gives a renderable; none reads a clock or prints.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dbtstream.dead_letters import DeadLetter
from dbtstream.events import RunFinished
from dbtstream.messages import RunList, RunView
from dbtstream.statuses import NodeStatus, RunStatus
from dbtstream.terminal import RunPicture, duration, error_text, first_line, plural

MAX_LISTED = 20
MESSAGE_LINES = 12

COLOURS = {
    NodeStatus.SUCCESS: "green",
    NodeStatus.WARN: "yellow",
    NodeStatus.FAIL: "red",
    NodeStatus.ERROR: "red",
    NodeStatus.PARTIAL_SUCCESS: "yellow",
    NodeStatus.LOST: "red",
}
RUN_COLOURS = {RunStatus.SUCCESS: "green", RunStatus.RUNNING: "cyan", RunStatus.QUEUED: "cyan"}


def run_summary(picture: RunPicture, *, again: str | None = None) -> RenderableType:
    """The verdict, what failed and why, counts, the slowest nodes, and how to look again."""
    finished = picture.finished
    parts: list[RenderableType] = [Text()]
    if picture.rejected is not None:
        rejected = picture.rejected
        parts.append(Text(f"rejected: {rejected.code}: {rejected.message}", style="bold red"))
    elif finished is None:
        parts.append(Text(f"{picture.status}: the run has not ended", style="bold cyan"))
    else:
        parts += _verdict(picture, finished)
    if again:
        parts.append(Text(f"See it again: {again}", style="dim"))
    return Group(*parts)


def _verdict(picture: RunPicture, finished: RunFinished) -> Iterable[RenderableType]:
    if finished.failed_count or picture.problems:
        yield _failed_table(picture, finished)
    if finished.counts:
        yield counts_table(finished.counts)
    if len(finished.slowest) > 1:
        yield Text("Slowest: " + _slowest(finished), style="dim")
    if finished.error is not None:
        yield Text(f"Error: {error_text(finished.error)}", style="red")
    if finished.stderr_tail:
        yield Text("The end of what dbt's process printed:", style="dim")
        yield indented(finished.stderr_tail)
    colour = RUN_COLOURS.get(finished.status, "red")
    verdict = Text(f"{finished.status}", style=f"bold {colour}")
    verdict.append(
        f" in {duration(finished.elapsed_s)}, exit code {finished.exit_code}", style="default"
    )
    if finished.attempts > 1:
        verdict.append(f", {finished.attempts} attempts", style="default")
    verdict.append(f"  ·  run {finished.run_id}", style="dim")
    yield verdict


def _failed_table(picture: RunPicture, finished: RunFinished) -> RenderableType:
    """Each node that did not pass, what dbt said, and how many nodes it kept from running."""
    table = Table(title="Did not pass", title_justify="left", expand=False, show_lines=False)
    table.add_column("node", overflow="fold")
    table.add_column("status")
    table.add_column("message", overflow="fold", ratio=1)
    table.add_column("skipped by it", justify="right")
    # Our own list has whole messages; the event's list is there when ours is not.
    rows = [(p.unique_id, p.status, p.message) for p in picture.problems] or [
        (f.unique_id, f.status, f.message or "")
        for f in finished.failed
        if f.status is not NodeStatus.SKIPPED
    ]
    for unique_id, status, message in rows[:MAX_LISTED]:
        style = COLOURS.get(status, "default")
        table.add_row(
            Text(unique_id),
            Text(status, style=style),
            Text(shortened(message)),
            str(picture.skips[unique_id] or ""),
        )
    count = picture.problem_count or finished.failed_count
    if (more := count - min(len(rows), MAX_LISTED)) > 0:
        table.add_row(f"and {more} more", "", "", "")
    return table


def counts_table(counts: dict[str, dict[str, int]]) -> RenderableType:
    """Rows: resource types. Columns: the statuses that occur, in the order of `NodeStatus`."""
    statuses = [s for s in NodeStatus if any(s in of_type for of_type in counts.values())]
    table = Table()
    table.add_column("")
    for status in statuses:
        style = COLOURS.get(status, "default")
        table.add_column(Text(status.replace("_", " "), style=style), justify="right")
    table.add_column("total", justify="right")
    for resource_type in sorted(counts):
        of_type = counts[resource_type]
        cells = [str(of_type.get(status) or "") for status in statuses]
        table.add_row(resource_type.replace("_", " "), *cells, str(sum(of_type.values())))
    return table


def _slowest(finished: RunFinished) -> str:
    names = (
        f"{_short_id(node.unique_id)} {duration(node.elapsed_s)}" for node in finished.slowest[:5]
    )
    return ", ".join(names)


def _short_id(unique_id: str) -> str:
    """model.shop.orders -> orders; test.shop.not_null_x.0a1b2c -> not_null_x."""
    return [*unique_id.split(".", 2), "", ""][2].split(".")[0] or unique_id


def runs_table(runs: RunList, now: datetime) -> RenderableType:
    """`dbtstream ps`. A narrow terminal cuts dbt's words; the ids, to be copied, stay whole."""
    rows = [("run", "status", "project/target", "since", "took", "dbt")]
    for run in runs.runs:
        since = run.started_at or run.queued_at
        where, took = f"{run.project}/{run.target}", _took(run, now)
        when = _since(since, now) if since else ""
        rows.append((run.run_id, str(run.status), where, when, took, " ".join(run.args)))
    lines = _in_columns(rows, coloured=1, styles=_row_styles(runs))
    waiting = [
        Text(f"{where}: {plural(count, 'request')} waiting for a worker")
        for where, count in sorted(runs.waiting.items())
        if count
    ]
    return Group(*lines, *waiting)


def letters_table(letters: Sequence[DeadLetter], now: datetime) -> RenderableType:
    """`dbtstream dead ls`. A narrow terminal cuts the messages."""
    rows = [("id", "since", "project.target", "code", "size", "message")]
    for letter in letters:
        where, size = f"{letter.project}.{letter.target}", str(letter.size)
        when = _since(letter.at, now)
        rows.append((str(letter.id), when, where, letter.code, size, letter.message))
    styles = ["dim", *("red" for _ in letters)]
    return Group(*_in_columns(rows, coloured=3, styles=styles))


def letter_lines(letter: DeadLetter) -> RenderableType:
    """The head of `dbtstream dead show`: what its headers say."""
    kept = " (cut; it cannot be replayed)" if letter.truncated else ""
    return _facts(
        {
            "letter": str(letter.id),
            "of": f"{letter.project}.{letter.target}",
            "since": f"{letter.at:%Y-%m-%d %H:%M:%S} UTC",
            "code": letter.code,
            "message": letter.message,
            "field": letter.field or "",
            "run": letter.run_id or "",
            "subject": letter.subject,
            "request": "" if letter.request_seq is None else f"DBT_RUNS {letter.request_seq}",
            "size": f"{letter.size} bytes{kept}",
        }
    )


def view_lines(view: RunView, now: datetime) -> RenderableType:
    """The head of `dbtstream show`: what the run is, before what it did."""
    rows = {
        "run": view.run_id,
        "of": f"{view.project}/{view.target}",
        "dbt": " ".join(view.args),
        "status": str(view.status),
        "queued": f"{view.queued_at:%Y-%m-%d %H:%M:%S} UTC" if view.queued_at else "",
        "took": _took(view, now),
        "worker": view.worker or "",
        "attempt": str(view.attempt) if view.attempt > 1 else "",
        "invocation": view.invocation_id or "",
        "request": view.request_id or "",
        "asked for by": view.requested_by or "",
        "reason": view.reason or "",
        "labels": ", ".join(f"{key}={value}" for key, value in sorted(view.labels.items())),
        "error": first_line(view.error or ""),
    }
    return _facts(rows)


def _facts(rows: Mapping[str, str]) -> RenderableType:
    """Name and value, of those that there are."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        if value:
            table.add_row(Text(name, style="dim"), Text(value))
    return table


def _in_columns(
    rows: Sequence[tuple[str, ...]], *, coloured: int, styles: Sequence[str]
) -> list[Text]:
    """A heading and lines; the last column is cut. Not a rich table: that narrows all alike."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = [Text(no_wrap=True, overflow="ellipsis") for _ in rows]
    for line, row, style in zip(lines, rows, styles, strict=True):
        for column, (cell, width) in enumerate(zip(row, [*widths, 0], strict=True)):
            line.append(f"{cell:<{width}}  ", style=style if column == coloured else None)
    lines[0].stylize("dim")
    return lines


def _row_styles(runs: RunList) -> list[str]:
    return ["dim", *(RUN_COLOURS.get(run.status, "red") for run in runs.runs)]


def _since(at: datetime, now: datetime) -> str:
    return f"{at:%H:%M:%S}" if at.date() == now.date() else f"{at:%m-%d %H:%M}"


def _took(run: RunView, now: datetime) -> str:
    if run.started_at is None:
        return ""
    return duration(max(0.0, ((run.finished_at or now) - run.started_at).total_seconds()))


def indented(message: str) -> Text:
    """A long message under the line that it explains."""
    return Text("\n".join(f"    {line}" for line in shortened(message).splitlines()), style="dim")


def shortened(message: str) -> str:
    lines = without_colour(message).strip().splitlines()
    if len(lines) <= MESSAGE_LINES:
        return "\n".join(lines)
    return "\n".join([*lines[:MESSAGE_LINES], f"… {len(lines) - MESSAGE_LINES} more lines"])


def without_colour(text: str) -> str:
    """dbt colours parts of its messages (PASS, the diff of a unit test)."""
    return Text.from_ansi(text).plain if "\x1b" in text else text
