"""`dbtstream dead`: the words of its commands, and one of `dead_commands` called.

As `cli`, which adds this group to its own: imports of the work are inside the functions.
"""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from dbtstream.cli_settings import Settings, run_to_end

F = TypeVar("F", bound=Callable[..., Any])


def _filters(command: F) -> F:
    for option, metavar, text in (
        ("--code", "WORD", "Only rejected for this: bad_message, duplicate, expired, …"),
        ("--target", "NAME", "Only of this target."),
        ("--project", "NAME", "Only of this project."),
    ):
        command = click.option(option, metavar=metavar, help=text)(command)
    return command


_LETTER = click.IntRange(min=1)


@click.group(short_help="Requests that could not run: look, ask again, drop.")
def dead() -> None:
    """Requests that could not run, kept with the reason and their bytes.

    They stay in the stream DBT_DEAD for streams.dead_max_age_s. The commands ask no daemon;
    they need the NATS permissions of an admin.

    \b
    Examples:
      dbtstream dead ls --project shop
      dbtstream dead show 12
    """


@dead.command(short_help="List them, the newest first.")
@_filters
@click.option("--limit", type=_LETTER, default=50, metavar="N", help="So many; 50 by default.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def ls(settings: Settings, /, limit: int, as_json: bool, **filters: str | None) -> int:
    """List dead letters, the newest first: id, when, whose, why, how big.

    \b
    Example:
      dbtstream dead ls --project shop --code expired
    """
    from dbtstream import dead_commands

    wanted = dead_commands.Filter(**filters)
    return run_to_end(
        dead_commands.ls(settings.nats(), wanted, limit=limit, as_json=as_json),
    )


@dead.command(short_help="One of them: why, and the request itself.")
@click.argument("letter", metavar="ID", type=_LETTER)
@click.option("--raw", is_flag=True, help="Only the request's bytes, unchanged.")
@click.pass_obj
def show(settings: Settings, /, letter: int, raw: bool) -> int:
    """Show why a request could not run, and the request itself.

    With --raw, the bytes as they came, to be mended and published as another request.

    \b
    Examples:
      dbtstream dead show 12
      dbtstream dead show 12 --raw
    """
    from dbtstream import dead_commands

    return run_to_end(dead_commands.show(settings.nats(), letter, raw=raw))


@dead.command(short_help="Ask for them again, now that the reason is gone.")
@click.argument("letters", metavar="ID...", type=_LETTER, nargs=-1, required=True)
@click.option("--keep", is_flag=True, help="Leave the letter where it is.")
@click.option(
    "--new-request-id", is_flag=True, help="Also if its request_id has been that of another run."
)
@click.pass_obj
def replay(
    settings: Settings, /, letters: tuple[int, ...], keep: bool, new_request_id: bool
) -> int:
    """Publish requests again, as new ones, on the subjects that they were for.

    A worker looks at them anew: mend first what they were rejected for. Each gets a new run
    id, which is printed, and its letter is dropped. A request_id stays, so that a producer
    that sends the same one again gets this run.

    \b
    Examples:
      dbtstream dead replay 12
      dbtstream dead replay 12 15 --keep
    """
    from dbtstream import dead_commands

    return run_to_end(
        dead_commands.replay(settings.nats(), letters, keep=keep, new_request_id=new_request_id),
    )


@dead.command(short_help="Delete them for good.")
@click.argument("letters", metavar="[ID...]", type=_LETTER, nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All of them that fit; asks first.")
@_filters
@click.option("--yes", is_flag=True, help="With --all: do not ask.")
@click.pass_obj
def drop(
    settings: Settings,
    /,
    letters: tuple[int, ...],
    everything: bool,
    yes: bool,
    **filters: str | None,
) -> int:
    """Delete dead letters for good: by their ids, or all of them that fit.

    \b
    Examples:
      dbtstream dead drop 12 15
      dbtstream dead drop --all --project shop --code duplicate --yes
    """
    from dbtstream import dead_commands

    wanted = dead_commands.Filter(**filters)
    if bool(letters) == everything:
        raise click.UsageError("which letters? Give their ids, or --all.")
    if not everything and wanted != dead_commands.Filter():
        raise click.UsageError("--project, --target and --code go with --all.")
    if not everything:
        return run_to_end(dead_commands.drop(settings.nats(), letters))
    if not yes and not sys.stdin.isatty():
        raise click.UsageError("--all asks before it deletes; where nobody can answer, add --yes.")
    if not yes and not click.confirm("Drop all dead letters that fit?"):
        return 1
    return run_to_end(dead_commands.drop_all(settings.nats(), wanted))
