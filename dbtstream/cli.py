"""The command line: words in, one of `commands` called, one line for whatever goes wrong.

Imports of the work are inside the functions: `dbtstream serve` must not carry rich, and
`--help` should not carry NATS. Exit codes: dbt's own for `run`; 2 for a wrong word, 78 for a
config that cannot be used, 130 after Ctrl-C, else 1.
"""

import asyncio
import sys
from pathlib import Path
from typing import Any

import click

from dbtstream import __version__
from dbtstream.cli_dead import dead
from dbtstream.cli_lineage import lineage
from dbtstream.cli_settings import Settings, run_to_end
from dbtstream.cli_top import top
from dbtstream.cli_words import begin_of, pairs, project_and_args, state_from, variables
from dbtstream.errors import ConfigError, DbtstreamError, RequestRejected

EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h
EXIT_INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--config",
    "config_path",
    metavar="PATH",
    help="The config. Else $DBTSTREAM_CONFIG, ./dbtstream.toml, /etc/dbtstream/dbtstream.toml.",
)
@click.option("--nats", "url", metavar="URL", help="The NATS server, such as nats://host:4222.")
@click.version_option(__version__, prog_name="dbtstream")
@click.pass_context
def cli(context: click.Context, config_path: str | None, url: str | None) -> None:
    """dbt Core as an event stream: ask for a run with one message, see every node's fate.

    \b
    See it work, with nothing installed but this:
      dbtstream demo
    \b
    Run a dbt project that you have, and watch it:
      dbtstream run --project-dir . -- build
    \b
    For good: a daemon beside your NATS server, and anybody who asks it for runs:
      dbtstream serve
      dbtstream run shop --target prod -- build --select orders+
      dbtstream tail --project shop --status error
    """
    if context.invoked_subcommand != "serve":
        from dbtstream.logs import configure_client_logging

        configure_client_logging()
    context.obj = Settings(config_path, url)


@cli.command(short_help="The daemon: take run requests, run dbt, publish events.")
@click.pass_obj
def serve(settings: Settings, /) -> int:
    """Run the daemon: take run requests from NATS, run dbt, publish what happens.

    It needs a config that names its projects. SIGTERM or Ctrl-C drains: no new run begins,
    running ones may go on for worker.drain_timeout_s. A second one cancels them.

    \b
    Example:
      dbtstream --config /etc/dbtstream/dbtstream.toml serve
    """
    from dbtstream import commands
    from dbtstream.logs import configure_logging

    config = settings.config()
    configure_logging(config.log)
    return run_to_end(commands.serve(config))


@cli.command(short_help="Run dbt and watch it; exits with dbt's exit code.")
@click.argument("words", metavar="[PROJECT] -- ARGS...", nargs=-1, type=click.UNPROCESSED)
@click.option("--target", metavar="NAME", help="The dbt target. Default: the project's first.")
@click.option("--var", "single_vars", metavar="KEY=VALUE", multiple=True, help="One dbt variable.")
@click.option("--vars", "json_vars", metavar="JSON", help="dbt variables as a JSON object.")
@click.option("--label", "labels", metavar="KEY=VALUE", multiple=True, help="Goes on every event.")
@click.option("--request-id", metavar="ID", help="The same one twice is one run.")
@click.option("--reason", metavar="TEXT", help="Why, for those who look at the run later.")
@click.option("--timeout", "timeout_s", metavar="SECONDS", type=float, help="Cancel it then.")
@click.option(
    "--on-busy",
    type=click.Choice(["queue", "skip", "replace", "coalesce"]),
    default="queue",
    help="When an older run of the target is under way.",
)
@click.option(
    "--on-lost",
    type=click.Choice(["resume", "restart", "fail"]),
    help="When the worker dies. Default: the config's.",
)
@click.option("--retry-of", metavar="RUN", help="What had not succeeded there; needs no ARGS.")
@click.option(
    "--state", metavar="RUN", help="dbt's --state: a run, or last_success, or last_success:TARGET."
)
@click.option("--detach", is_flag=True, help="Print the run id and do not wait.")
@click.option("--json", "as_json", is_flag=True, help="One JSON event per line.")
@click.option("--plain", is_flag=True, help="One line of text per event, no live view.")
@click.option(
    "--project-dir",
    metavar="PATH",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Run this folder's project here and now: no daemon, no NATS server, no config.",
)
@click.option(
    "--profiles-dir",
    metavar="PATH",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="With --project-dir: where profiles.yml is, if not where dbt looks.",
)
@click.option(
    "--python",
    metavar="PATH",
    help="With --project-dir: the interpreter that has dbt and the adapter. Default: this one.",
)
@click.pass_obj
def run(
    settings: Settings,
    /,
    words: tuple[str, ...],
    project_dir: Path | None,
    profiles_dir: Path | None,
    python: str | None,
    detach: bool,
    as_json: bool,
    plain: bool,
    **asked: Any,
) -> int:
    """Run dbt and watch it; exits with dbt's exit code.

    PROJECT is a name in the daemon's config. ARGS are dbt's own words after the two dashes.
    Ctrl-C cancels the run and waits for its end; a second Ctrl-C leaves.

    \b
    Examples:
      dbtstream run shop -- build --select orders+
      dbtstream run shop --target prod --var day=2024-05-01 --detach -- run
      dbtstream run shop --retry-of 01a20128-5ce6-7645-b4b6-65c379964c39
      dbtstream run shop --target ci --state last_success:prod -- build -s state:modified+
      dbtstream run --project-dir ~/shop -- build
    """
    from dbtstream import commands
    from dbtstream.messages import OnBusy, OnLost

    if project_dir is None and (profiles_dir or python):
        raise click.UsageError("--profiles-dir and --python need --project-dir")
    if project_dir is not None and detach:
        raise click.UsageError("--detach needs a daemon; leave out --project-dir")
    if project_dir is not None and (asked["retry_of"] or asked["state"]):
        raise click.UsageError("--retry-of and --state need a daemon; leave out --project-dir")
    project, args = project_and_args(
        words, local=project_dir is not None, may_be_none=bool(asked["retry_of"])
    )
    submission = commands.Submission(
        project=project,
        args=args,
        target=asked["target"],
        vars=variables(asked["single_vars"], asked["json_vars"]),
        labels=pairs("--label", asked["labels"]),
        request_id=asked["request_id"],
        timeout_s=asked["timeout_s"],
        reason=asked["reason"],
        on_busy=OnBusy(asked["on_busy"]),
        on_lost=OnLost(asked["on_lost"]) if asked["on_lost"] else None,
        retry_of=asked["retry_of"],
        state=state_from(asked["state"]) if asked["state"] else None,
    )
    output = commands.Output(as_json=as_json, plain=plain)
    if project_dir is not None:
        return run_to_end(
            commands.run_folder(
                project_dir, submission, output, profiles_dir=profiles_dir, python=python
            )
        )
    return run_to_end(commands.run(settings.nats(), submission, output, detach=detach))


@cli.command(short_help="Print events as they happen, or from a time on.")
@click.option("--project", metavar="NAME", multiple=True, help="Only of this project.")
@click.option("--target", metavar="NAME", multiple=True, help="Only of this target.")
@click.option("--family", metavar="WORD", multiple=True, help="run, node, batch, log, query, …")
@click.option(
    "--kind", metavar="WORD", multiple=True, help="model, test, seed, …; a run's command."
)
@click.option("--name", metavar="NAME", multiple=True, help="Only of nodes with this name.")
@click.option("--status", metavar="WORD", multiple=True, help="success, error, fail, started, …")
@click.option("--since", metavar="WHEN", help="Begin so long ago (10m, 2h, 1d) or at a time.")
@click.option("--run", metavar="RUN", help="All of one run, to its end: its id, or `last`.")
@click.option("--json", "as_json", is_flag=True, help="One JSON event per line.")
@click.pass_obj
def tail(
    settings: Settings, /, since: str | None, run: str | None, as_json: bool, **filters: Any
) -> int:
    """Print events as they happen, from now on or from a time; one line each.

    Each filter may be given more than once. Needs no daemon, only NATS.

    \b
    Examples:
      dbtstream tail --family node --status error --status fail
      dbtstream tail --project shop --since 2h
      dbtstream tail --run last --json
    """
    from dbtstream import commands
    from dbtstream.selection import Selection

    wanted = Selection(**{key: commands.words(values) for key, values in filters.items()})
    begin = begin_of(since) if since else None
    return run_to_end(
        commands.tail(settings.nats(), wanted, since=begin, run=run, as_json=as_json),
    )


@cli.command(short_help="List runs that wait or run.")
@click.option("--all", "everything", is_flag=True, help="Also runs that have ended.")
@click.option("--project", metavar="NAME", help="Only of this project.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def ps(settings: Settings, /, everything: bool, project: str | None, as_json: bool) -> int:
    """List runs that wait or run; with --all, also those that have ended.

    \b
    Example:
      dbtstream ps --all --project shop
    """
    from dbtstream import commands

    return run_to_end(
        commands.ps(settings.nats(), project=project, everything=everything, as_json=as_json)
    )


@cli.command(short_help="What is known of one run.")
@click.argument("run", metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def show(settings: Settings, /, run: str, as_json: bool) -> int:
    """Show what is known of a run: its state, what failed and why, counts, times.

    RUN is a run id, its first or last characters if they fit one run only, or `last`.

    \b
    Examples:
      dbtstream show last
      dbtstream show 0199f2c4-7a31-7c52-9d1f-8a1f0c3b2e4d
    """
    from dbtstream import commands

    return run_to_end(commands.show(settings.nats(), run, as_json=as_json))


@cli.command(short_help="Whether all that is stored of a run agrees.")
@click.argument("run", metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def verify(settings: Settings, /, run: str, as_json: bool) -> int:
    """Compare what is stored of a run: its events, its state, dbt's run_results.json.

    Looks whether the events keep the guarantees of the contract, whether the KV states of the
    run and its nodes say the same, and dbt's own results where they are in the Object Store.
    Prints every difference; exit code 0 if there is none. RUN is as for `show`. Asks no
    daemon; needs the NATS permissions of an admin.

    \b
    Examples:
      dbtstream verify last
      dbtstream verify 0199f2c4-7a31-7c52-9d1f-8a1f0c3b2e4d --json
    """
    from dbtstream import commands

    return run_to_end(commands.verify(settings.nats(), run, as_json=as_json))


@cli.command(short_help="Cancel a run.")
@click.argument("run", metavar="RUN")
@click.option("--reason", metavar="TEXT", help="Why; it is in the run.cancel event.")
@click.pass_obj
def cancel(settings: Settings, /, run: str, reason: str | None) -> int:
    """Cancel a run that waits or runs. dbt is interrupted, then made to stop.

    \b
    Example:
      dbtstream cancel last --reason "wrong day"
    """
    from dbtstream import commands

    return run_to_end(commands.cancel(settings.nats(), run, reason=reason))


@cli.command(short_help="Create or update the streams on the NATS server.")
@click.pass_obj
def setup(settings: Settings, /) -> int:
    """Create the streams and buckets on the NATS server, or bring them up to date.

    Needed once, by a NATS user with the permissions for it; `serve` does the same unless
    streams.manage is false. Nothing is ever deleted.

    \b
    Example:
      dbtstream --nats nats://admin:secret@host:4222 setup
    """
    from dbtstream import commands

    config = settings.config()
    return run_to_end(commands.setup(config.nats, config))


@cli.command(short_help="Look whether all that `serve` needs is there.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def check(settings: Settings, /, as_json: bool) -> int:
    """Look whether everything that `serve` needs is there, and say how to mend what is not.

    The config, NATS, JetStream and its limits, the streams; for each project its
    interpreter, its dbt, its profile and targets. Connects to no warehouse. Exit code 0 if
    all is well, else 1.

    \b
    Example:
      dbtstream --config dbtstream.toml check
    """
    from dbtstream import commands

    return run_to_end(commands.check(settings.config(), as_json=as_json))


@cli.command(short_help="Print, write or compare the contract's schemas.")
@click.option(
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write them there.",
)
@click.option(
    "--check",
    "compare",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Say where the files there differ from what this version writes; exit code 1 if so.",
)
def schema(output: Path | None, compare: Path | None) -> int:
    """Print the JSON Schemas of all messages and events, their examples and the AsyncAPI document.

    Printed, all of it is JSON. A folder gets a file for each, and asyncapi.yaml; schemas there
    that this version would break are not written over.

    \b
    Example:
      dbtstream schema --output schemas
    """
    from dbtstream import commands

    return commands.schema(output=output, compare=compare)


@cli.command(short_help="A sample project, from request to events.")
@click.option("--keep", is_flag=True, help="Leave server and daemon running until Ctrl-C.")
@click.option("--port", type=int, metavar="PORT", help="Of the NATS server. Default: a free one.")
@click.option("--json", "as_json", is_flag=True, help="One JSON event per line.")
@click.option("--plain", is_flag=True, help="One line of text per event, no live view.")
def demo(keep: bool, port: int | None, as_json: bool, plain: bool) -> int:
    """Show the whole thing on a sample project: NATS, daemon, a dbt build, its events.

    Everything is in a temporary folder and gone afterwards. Exits with dbt's exit code.

    \b
    Examples:
      dbtstream demo
      dbtstream demo --keep --port 4333
    """
    from dbtstream import commands

    return run_to_end(
        commands.demo(keep=keep, port=port, output=commands.Output(as_json=as_json, plain=plain))
    )


cli.add_command(dead)
cli.add_command(lineage)
cli.add_command(top)


def main() -> None:
    """The `dbtstream` command."""
    sys.exit(_main(sys.argv[1:]))


def _main(argv: list[str]) -> int:
    try:
        code = cli.main(argv, prog_name="dbtstream", standalone_mode=False)
    except click.exceptions.Exit as left:
        return left.exit_code
    except click.ClickException as error:
        error.show()
        if isinstance(error, click.NoSuchOption) and argv[:1] != ["--"] and "run" in argv:
            click.echo(
                "dbt's own options go after two dashes: run shop -- build --select x", err=True
            )
        return error.exit_code
    except (KeyboardInterrupt, asyncio.CancelledError, click.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        from dbtstream.commands import leave_quietly

        leave_quietly()
        return 0
    except (DbtstreamError, BaseExceptionGroup) as error:
        return _explained(error)
    return code if isinstance(code, int) else 0


def _explained(error: BaseException) -> int:
    """One line for an error of ours; anything else is a bug and keeps its traceback."""
    ours = _first_of_ours(error)
    if ours is None:
        raise error
    click.echo(f"dbtstream: {ours}", err=True)
    if isinstance(ours, ConfigError):
        return EXIT_CONFIG
    if isinstance(ours, RequestRejected):
        from dbtstream.follow import exit_code_of_rejection

        return exit_code_of_rejection(ours.code)
    return 1


def _first_of_ours(error: BaseException) -> DbtstreamError | None:
    """Task groups bundle what went wrong in several tasks; the first one is the cause."""
    if isinstance(error, DbtstreamError):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(_first_of_ours, error.exceptions)), None)
    return None
