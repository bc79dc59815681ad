"""The command line's words: help that a newcomer can use, and errors in one line."""

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest

from dbtstream import commands
from dbtstream.cli import _main, cli
from dbtstream.cli_dead import dead
from dbtstream.cli_words import begin_of, pairs, project_and_args, variables
from dbtstream.embedded import NatsServer
from tests.acceptance.conftest import COMMAND, ENVIRONMENT

COMMANDS = {**cli.commands, **{f"dead {name}": command for name, command in dead.commands.items()}}
"""By the words that lead to each."""

NAMES = sorted(COMMANDS)


def help_of(name: str) -> str:
    command = COMMANDS[name]
    return command.get_help(click.Context(command, info_name=name))


def examples_in(text: str) -> list[list[str]]:
    """The words of each line that begins with `dbtstream`."""
    lines = [line.strip() for line in text.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("dbtstream ")]


def test_every_command_of_the_contract_is_there() -> None:
    named = "serve run tail ps top show verify cancel dead lineage setup check schema demo"
    assert sorted(cli.commands) == sorted(named.split())
    assert sorted(dead.commands) == ["drop", "ls", "replay", "show"]


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_a_command_has_an_example_that_its_parser_takes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shop").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    examples = examples_in(help_of(name)) + examples_in(cli.get_help(click.Context(cli)))
    first, *more = name.split()
    of_this = [w for w in examples if first in w and w[w.index(first) + 1 :][: len(more)] == more]
    assert of_this
    for words in of_this:
        # The shell expands `~`, and removes comments.
        expanded = [os.path.expanduser(word) for word in words[1:]]
        # Parses the words as `main` does: the group's, a command's, and that of a group below.
        context = cli.make_context("dbtstream", expanded)
        for word in name.split():
            group = context.command
            assert isinstance(group, click.Group)
            words_left = [*context._protected_args, *context.args]
            found, command, rest = group.resolve_command(context, words_left)
            assert (found, command is not None) == (word, True)
            assert command is not None
            context = command.make_context(word, rest, parent=context)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_says_what_it_is_for(name: str) -> None:
    for parameter in COMMANDS[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
    assert COMMANDS[name].short_help
    assert "..." not in cli.get_help(click.Context(cli)).partition("Commands:")[2]


def test_the_help_is_short_enough_to_read() -> None:
    for name in NAMES:
        assert len(help_of(name).splitlines()) <= 45


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["--version"]) == 0
    assert re.search(r"\d+\.\d+\.\d+", capsys.readouterr().out)


def test_serve_carries_neither_rich_nor_dbt() -> None:
    """They cost the daemon memory and start-up time, and are for terminals and children."""
    code = (
        "import sys, dbtstream.cli, dbtstream.commands, dbtstream.daemon, dbtstream.logs;"
        "print([m for m in ('rich', 'dbt', 'duckdb', 'yaml', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True
    )
    assert done.stdout.strip() == "[]"


# -- errors ----------------------------------------------------------------------------------


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """(exit code, stderr)."""
    code = _main(list(argv))
    return code, capsys.readouterr().err


def test_a_config_that_cannot_be_used_is_one_line_and_exit_78(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "dbtstream.toml"
    path.write_text("[worker]\nslotz = 3\n", encoding="utf-8")

    code, text = error_of(capsys, "--config", str(path), "serve")

    assert code == 78
    assert text.startswith(f"dbtstream: {path}: worker")
    assert "slots" in text  # what is accepted
    assert len(text.splitlines()) == 1


def test_no_nats_server_is_one_line_that_says_where_it_was_looked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "CONNECT_S", 0.3)

    code, text = error_of(capsys, "--nats", "nats://127.0.0.1:1", "ps")

    assert code == 1
    assert text.startswith("dbtstream: no answer from NATS at nats://127.0.0.1:1: ")
    assert len(text.splitlines()) == 1


async def test_no_daemon_is_one_line_that_says_how_to_start_one(nats_server: NatsServer) -> None:
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *("--nats", nats_server.url, "run", "shop", "--", "build"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    out, err = await process.communicate()

    assert (process.returncode, out) == (1, b"")
    assert err.endswith(b"start one with `dbtstream serve`\n")
    assert err.count(b"\n") == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["run"], "which PROJECT"),
        (["run", "shop"], "after two dashes"),
        (["run", "shop", "--select", "x"], "dbt's own options go after two dashes"),
        (["run", "shop", "--", "build", "--vars", "{}"], "--vars goes before the two dashes"),
        (["run", "shop", "--", "build", "-t", "prod"], "--target goes before the two dashes"),
        (["run", "shop", "--var", "day", "--", "build"], "must be KEY=VALUE"),
        (["run", "shop", "--vars", "[1]", "--", "build"], "must be a JSON object"),
        (["run", "shop", "--vars", "{", "--", "build"], "--vars is not JSON"),
        (["run", "shop", "--python", "x", "--", "build"], "need --project-dir"),
        (["run", "--project-dir", ".", "--detach", "--", "build"], "--detach needs a daemon"),
        (["run", "--project-dir", "/no/such/folder", "--", "build"], "does not exist"),
        (["tail", "--since", "yesterday"], "it must be like 10m"),
        (["show"], "Missing argument"),
        (["verify"], "Missing argument"),
        (["dead", "show", "first"], "is not a valid integer"),
        (["dead", "show", "0"], "not in the range"),
        (["dead", "replay"], "Missing argument"),
        (["dead", "drop"], "Give their ids, or --all"),
        (["dead", "drop", "3", "--all"], "Give their ids, or --all"),
        (["dead", "drop", "3", "--code", "expired"], "go with --all"),
        (["dead", "drop", "--all"], "add --yes"),
        (["dead", "lost"], "No such command"),
        (["lineage"], "Missing argument"),
        (["lineage", "shop", "--up"], "--up and --down go with --node"),
        (["lineage", "shop", "--node", "orders", "--up", "many"], "is not a valid integer"),
        (["lineage", "shop", "--format", "png"], "is not one of"),
        (["frobnicate"], "No such command"),
    ],
)
def test_a_wrong_word_is_a_usage_error_that_says_the_right_one(
    capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    code, text = error_of(capsys, *argv)
    assert code == 2
    assert words in " ".join(text.split())


def test_a_folder_without_a_project_is_an_error_that_names_the_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, text = error_of(capsys, "run", "--project-dir", str(tmp_path), "--", "build")
    assert code == 78
    assert str(tmp_path / "dbt_project.yml") in text


# -- words -----------------------------------------------------------------------------------


def test_dbts_words_are_passed_on_as_they_are() -> None:
    words = ("shop", "build", "--select", "a+", "--full-refresh")
    assert project_and_args(words, local=False) == (
        "shop",
        ["build", "--select", "a+", "--full-refresh"],
    )
    # A whole dbt command, pasted.
    assert project_and_args(("dbt", "build"), local=True) == ("", ["build"])


def test_variables_are_json_where_they_are_json_and_text_where_not() -> None:
    single = ("n=3", "day=2024-05-01", 'list=["a"]', "empty=", "eq=a=b")
    assert variables(single, '{"n": 1, "deep": {"x": null}}') == {
        "n": 3,
        "deep": {"x": None},
        "day": "2024-05-01",
        "list": ["a"],
        "empty": "",
        "eq": "a=b",
    }
    assert json.dumps(variables((), None)) == "{}"
    assert pairs("--label", ("team=finance",)) == {"team": "finance"}


def test_since_is_a_time_or_so_long_ago() -> None:
    before = datetime.now(UTC)
    assert before <= begin_of("90m") + timedelta(minutes=90) <= datetime.now(UTC)
    assert begin_of("2024-05-01T12:00:00+02:00") == datetime(2024, 5, 1, 10, tzinfo=UTC)
    assert begin_of("2024-05-01T12:00:00Z") == datetime(2024, 5, 1, 12, tzinfo=UTC)
    assert begin_of("2024-05-01") == datetime(2024, 5, 1, tzinfo=UTC)
