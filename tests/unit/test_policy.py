"""A request cannot reach what belongs to the worker, by any spelling that click accepts.

The second half asks the real dbt: its options, and what its parser makes of args that we let
through. The daemon never imports dbt, and neither does this file: a child process does.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dbtstream.config import KNOWN_COMMANDS, ProjectConfig
from dbtstream.errors import RequestRejected
from dbtstream.messages import RejectCode
from dbtstream.policy import (
    ALLOWED_FLAGS,
    INLINE_FLAGS,
    RETRY_FLAGS,
    DbtArgs,
    check_args,
    check_earlier,
    check_retry,
    own_parse,
    worker_args,
)

SHOP = ProjectConfig(path="/shop", targets=("prod",))
INLINE = ProjectConfig(path="/shop", targets=("prod",), allow_inline=True)
OPEN = ProjectConfig(
    path="/shop", targets=("prod",), commands=KNOWN_COMMANDS, run_operations=("grant_all",)
)

OURS = {
    "--target": "-t",
    "--profiles-dir": None,
    "--project-dir": None,
    "--profile": None,
    "--target-path": None,
    "--log-path": None,
    "--state": None,
    "--defer-state": None,
    "--vars": None,
    "--record-timing-info": "-r",
    "--partial-parse-file-path": None,
    "--deprecated-state": None,
    "--log-level": None,
    "--log-level-file": None,
    "--log-format": None,
    "--log-format-file": None,
    "--log-file-max-bytes": None,
    "--log-cache-events": None,
    "--no-log-cache-events": None,
    "--send-anonymous-usage-stats": None,
    "--no-send-anonymous-usage-stats": None,
    "--upload-to-artifacts-ingest-api": None,
    "--use-colors": None,
    "--printer-width": None,
    "--config-dir": None,
    "--add-package": None,
    "--sql": None,
    "--version": "-v",
    "--help": "-h",
}
"""Flags that a request must never carry, and their short form."""

DEFAULTS = ["build", "run", "test", "seed", "snapshot", "compile", "parse", "list", "show"]


def refused(args: list[str], project: ProjectConfig = SHOP) -> RequestRejected:
    with pytest.raises(RequestRejected) as caught:
        check_args(args, project)
    assert caught.value.field == "args"
    return caught.value


def spellings(flag: str, short: str | None) -> Iterator[list[str]]:
    """Every way in which click takes a flag and its value."""
    yield [flag, "x"]
    yield [f"{flag}=x"]
    yield [f"{flag}="]
    yield [flag]
    if short:
        letter = short[1:]
        yield [short, "x"]
        yield [f"{short}x"]
        yield [f"{short}=x"]
        yield [short]
        for cluster in ("x", "q", "xf", "dfqx"):
            yield [f"-{cluster}{letter}", "x"]
            yield [f"-{cluster}{letter}x"]


class TestWhatBelongsToTheWorker:
    @pytest.mark.parametrize("flag", OURS)
    def test_is_refused_in_every_spelling_and_place(self, flag: str) -> None:
        for words in spellings(flag, OURS[flag]):
            for before, after in (
                ([], []),
                (["--select", "orders"], []),
                (["-s", "orders", "--full-refresh"], ["--fail-fast"]),
                (["--"], []),
                (["--exclude"], ["orders"]),
            ):
                error = refused(["build", *before, *words, *after])
                assert error.code == RejectCode.FLAG_NOT_ALLOWED, words

    @pytest.mark.parametrize("command", KNOWN_COMMANDS)
    def test_is_refused_for_every_command(self, command: str) -> None:
        for flag, short in OURS.items():
            for words in spellings(flag, short):
                rest = ["grant_all"] if command == "run-operation" else []
                error = refused([*command.split(" "), *rest, *words], OPEN)
                assert error.code == RejectCode.FLAG_NOT_ALLOWED, words

    def test_is_refused_before_the_command_too(self) -> None:
        for words in (["--target", "x", "build"], ["-tx", "build"], ["--log-path=x", "build"]):
            assert refused(words).code == RejectCode.USAGE_ERROR

    def test_is_refused_even_as_the_value_of_another_flag(self) -> None:
        """click would take it for a value; a person who reads the args could not tell."""
        assert refused(["build", "--select", "--target"]).code == RejectCode.FLAG_NOT_ALLOWED

    def test_names_what_to_use_instead(self) -> None:
        assert "the request's `vars`" in refused(["build", "--vars={}"]).message
        assert "last token of the subject" in refused(["build", "-xtci"]).message
        assert "the request's `state`" in refused(["build", "--state", "x"]).message

    def test_output_is_a_format_in_some_commands_and_a_path_in_source_freshness(self) -> None:
        for command in ("list", "ls", "show", "compile"):
            check_args([command, "--output", "json"], SHOP)
        for words in (["--output", "/x"], ["--output=/x"], ["-o", "/x"], ["-o/x"], ["-xo/x"]):
            error = refused(["source", "freshness", *words])
            assert (error.code, error.message[:9]) == (RejectCode.FLAG_NOT_ALLOWED, "--output:")
            assert refused(["build", *words]).code == RejectCode.FLAG_NOT_ALLOWED

    def test_the_end_of_options_would_make_our_words_arguments(self) -> None:
        for args in (["build", "--"], ["build", "--", "x"], ["run-operation", "grant_all", "--"]):
            assert refused(args, OPEN).code == RejectCode.FLAG_NOT_ALLOWED

    @pytest.mark.parametrize(
        "word", ["--TARGET", "--targe", "--target ", " --target", "---target", "-T", "-1t", "--=x"]
    )
    def test_what_click_would_not_even_know_is_refused_or_a_value(self, word: str) -> None:
        if word.startswith("-"):
            assert refused(["build", word, "x"]).code == RejectCode.FLAG_NOT_ALLOWED
        else:
            assert check_args(["build", "--select", word], SHOP).args[-1] == word


class TestAFlagWithoutItsValue:
    @pytest.mark.parametrize(
        "last",
        [
            *(["--exclude"], ["--select"], ["-s"], ["-m"], ["-xs"], ["-fm"], ["--models"]),
            *(["--selector"], ["--threads"], ["--warn-error-options"], ["--indirect-selection"]),
            ["--select", "a", "--exclude"],
        ],
    )
    def test_is_refused_since_it_would_take_our_next_word(self, last: list[str]) -> None:
        error = refused(["build", *last])
        assert error.code == RejectCode.USAGE_ERROR
        assert last[-1] in error.message
        project = ProjectConfig(path="/x", targets=("t",), default_args=("--threads", "8"))
        refused(["build", *last], project)

    @pytest.mark.parametrize(
        "last", [["--exclude="], ["-sx"], ["-s=x"], ["-xsx"], ["-x"], ["--exclude", "a"], ["-fqx"]]
    )
    def test_one_with_its_value_or_that_needs_none_is_not(self, last: list[str]) -> None:
        assert check_args(["build", *last], SHOP).args == ["build", *last]

    def test_an_output_format_is_such_a_value(self) -> None:
        assert refused(["list", "--output"]).code == RejectCode.USAGE_ERROR


class TestCommands:
    @pytest.mark.parametrize("command", DEFAULTS)
    def test_usual_ones_are_allowed(self, command: str) -> None:
        assert check_args([command], SHOP) == DbtArgs(command, [command])

    def test_two_words_are_one_command(self) -> None:
        args = ["source", "freshness", "--select", "source:raw"]
        assert check_args(args, SHOP) == DbtArgs("source freshness", args)
        assert check_args(["docs", "generate"], SHOP).command == "docs generate"

    def test_ls_is_list(self) -> None:
        assert check_args(["ls", "-s", "a"], SHOP) == DbtArgs("list", ["list", "-s", "a"])

    @pytest.mark.parametrize(
        "args",
        [
            *(["clean"], ["init"], ["deps"], ["debug"], ["retry"], ["clone"], ["run-operation"]),
            *(["docs", "serve"], ["docs"], ["source"], ["source", "snapshot-freshness"]),
            *(["buil"], ["BUILD"], ["system"]),
        ],
    )
    def test_others_are_not_and_those_that_are_get_named(self, args: list[str]) -> None:
        assert refused(args).code == RejectCode.COMMAND_NOT_ALLOWED

    @pytest.mark.parametrize(
        "args",
        [[], [""], ["dbt", "build"], ["--select", "x"], ["-x"], ["build "], ["source freshness"]],
    )
    def test_args_must_begin_with_one(self, args: list[str]) -> None:
        assert refused(args).code == RejectCode.USAGE_ERROR

    def test_a_project_names_its_own(self) -> None:
        project = ProjectConfig(path="/x", targets=("t",), commands=("deps",))
        assert check_args(["deps"], project).command == "deps"
        assert "it allows deps" in refused(["build"], project).message


class TestRunOperation:
    def test_calls_a_macro_that_is_named(self) -> None:
        args = ["run-operation", "grant_all", "--args", "{role: reader}"]
        assert check_args(args, OPEN).args == args

    @pytest.mark.parametrize(
        "rest",
        [
            *([], ["drop_all"], ["shop.grant_all"], ["grant_all "], ["", "grant_all"]),
            ["--args", "grant_all", "drop_all"],
            ["--full-refresh", "grant_all"],
        ],
    )
    def test_calls_no_other_and_takes_it_from_the_first_place(self, rest: list[str]) -> None:
        error = refused(["run-operation", *rest], OPEN)
        assert error.code == RejectCode.COMMAND_NOT_ALLOWED
        assert "macros that are: grant_all" in error.message


class TestRetry:
    def refused(self, args: list[str]) -> RequestRejected:
        with pytest.raises(RequestRejected) as caught:
            check_retry(args)
        assert caught.value.field == "args"
        return caught.value

    @pytest.mark.parametrize("args", [[], ["retry"]])
    def test_of_a_run_needs_no_words_of_its_own(self, args: list[str]) -> None:
        assert check_retry(args) == DbtArgs("retry", ["retry"])

    def test_takes_what_dbt_heeds(self) -> None:
        args = ["retry", "--threads", "2", "--warn-error"]
        assert check_retry(args) == DbtArgs("retry", args)

    @pytest.mark.parametrize(
        "word",
        ["--full-refresh", "-f", "-xf", "--fail-fast", "--defer", "--select=a", "--no-print"],
    )
    def test_refuses_what_dbt_would_take_and_not_heed(self, word: str) -> None:
        """Who asks for a full refresh, and gets none, has reason to complain."""
        error = self.refused(["retry", word])
        assert error.code == RejectCode.USAGE_ERROR
        assert "from the earlier run; it heeds --threads and --warn-error" in error.message

    @pytest.mark.parametrize("flag", OURS)
    def test_cannot_reach_what_belongs_to_the_worker(self, flag: str) -> None:
        for words in spellings(flag, OURS[flag]):
            assert self.refused(["retry", *words]).code == RejectCode.FLAG_NOT_ALLOWED

    def test_is_nothing_but_a_retry(self) -> None:
        assert self.refused(["build"]).code == RejectCode.USAGE_ERROR
        assert "cannot be a `dbt source freshness`" in self.refused(["source", "freshness"]).message
        assert self.refused(["retry", "--threads"]).code == RejectCode.USAGE_ERROR

    def test_repeats_only_what_the_project_still_allows(self) -> None:
        dbt = check_earlier(["run", "-s", "orders"], SHOP)
        assert dbt == check_args(["run", "-s", "orders"], SHOP)
        with pytest.raises(
            RequestRejected, match=r"the run to retry: .* not allow `dbt clone`"
        ) as e:
            check_earlier(["clone"], SHOP)
        assert (e.value.code, e.value.field) == (RejectCode.COMMAND_NOT_ALLOWED, "retry_of")

    def test_without_a_run_needs_a_target_path_that_runs_share(self) -> None:
        """In a private one there is never anything to retry."""
        error = refused(["retry"], OPEN)
        assert (error.code, "use retry_of" in error.message) == (RejectCode.USAGE_ERROR, True)
        shared = ProjectConfig(
            path="/shop", targets=("prod",), commands=("retry",), target_path="target"
        )
        assert check_args(["retry"], shared) == DbtArgs("retry", ["retry"])


class TestAllowed:
    def test_selection_and_switches_pass_unchanged(self) -> None:
        args = [
            *("build", "-xf", "--select", "tag:a", "+orders+", "--exclude=b", "--no-partial-parse"),
            *("--threads", "4", "--indirect-selection", "empty", "--resource-type", "model"),
            *("--event-time-start", "2025-01-01", "-q", "-", "a-b", "@orders"),
        ]
        assert check_args(args, SHOP).args == args

    def test_a_negative_number_is_a_value(self) -> None:
        assert check_args(["show", "-s", "orders", "--limit", "-1"], SHOP).args[-1] == "-1"

    def test_default_args_of_the_project_come_last(self) -> None:
        project = ProjectConfig(path="/x", targets=("t",), default_args=("--threads", "8"))
        assert check_args(["build", "-x"], project).args == ["build", "-x", "--threads", "8"]


class TestWorkerArgs:
    def test_the_workers_words_stand_between_the_command_and_the_requests(self) -> None:
        dbt = check_args(["source", "freshness", "--select", "a"], SHOP)
        args = worker_args(dbt, target="prod", profile="shop", vars_json='{"a": 1}')
        assert args == [
            *("source", "freshness", "--target", "prod", "--profile", "shop"),
            *("--vars", '{"a": 1}', "--select", "a"),
        ]

    def test_nothing_is_added_where_the_profile_decides(self) -> None:
        assert worker_args(
            check_args(["build"], SHOP), target=None, profile=None, vars_json=""
        ) == ["build"]


# The real dbt.

READ_OPTIONS = """
import json, click
from dbt.cli.main import cli

def commands(command, words):
    yield " ".join(words), command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from commands(inner, [*words, name])

print(json.dumps([
    {"command": name, "flags": [*option.opts, *option.secondary_opts],
     "path": isinstance(option.type, (click.Path, click.File))}
    for name, command in commands(cli, [])
    for option in command.params if isinstance(option, click.Option)
]))
"""

PARSE = """
import json, sys, click
from dbt.cli.main import cli

def parsed(args):
    context = cli.make_context("dbt", args)
    while isinstance(context.command, click.Group):
        words = [*getattr(context, "_protected_args", ()), *context.args]
        name, command, rest = context.command.resolve_command(context, words)
        context = command.make_context(name, rest, parent=context)
    return {key: context.params.get(key) for key in ("target", "profile", "project_dir")}

def outcome(args):
    try:
        return parsed(args)
    except click.UsageError as error:
        return str(error)

print(json.dumps([outcome(args) for args in json.load(sys.stdin)], default=str))
"""


def ask_dbt(program: str, question: Any, folder: Path) -> Any:
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "DBT_PROFILES_DIR": str(folder),  # its default has to exist
        "DBT_PROJECT_DIR": str(folder),
        "DBT_SEND_ANONYMOUS_USAGE_STATS": "0",
    }
    answer = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        env=environment,
        timeout=100,
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])  # dbt's own complaints come before


@pytest.fixture(scope="module")
def dbt_options(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    options: list[dict[str, Any]] = ask_dbt(READ_OPTIONS, None, tmp_path_factory.mktemp("home"))
    assert len(options) > 100
    return options


def ours(command: str) -> list[str] | None:
    """The args of a command that some project may allow."""
    command = {"ls": "list"}.get(command, command)
    if command not in KNOWN_COMMANDS:
        return None
    return [*command.split(" "), *(["grant_all"] if command == "run-operation" else [])]


def test_every_option_of_dbt_that_is_a_path_is_refused(
    dbt_options: list[dict[str, Any]],
) -> None:
    paths = [option for option in dbt_options if option["path"] and ours(option["command"])]
    assert {"--project-dir", "--state", "--output", "-r"} <= {
        flag for option in paths for flag in option["flags"]
    }
    for option in paths:
        args = ours(option["command"])
        assert args is not None
        for flag in option["flags"]:
            for words in ([flag, "x"], [f"{flag}=x"], [f"{flag}x"]):
                assert refused([*args, *words], OPEN).code == RejectCode.FLAG_NOT_ALLOWED


def test_what_a_retry_may_carry_are_options_of_dbts_retry(
    dbt_options: list[dict[str, Any]],
) -> None:
    retry = [option["flags"] for option in dbt_options if option["command"] == "retry"]
    assert {flag for flags in retry for flag in flags} >= RETRY_FLAGS


def test_every_option_of_dbt_has_been_judged(dbt_options: list[dict[str, Any]]) -> None:
    """A dbt with an option that is in neither list: decide, and add it to one of them."""
    judged = ALLOWED_FLAGS | INLINE_FLAGS | REFUSED_ON_PURPOSE | set(OURS) | {"--output"}
    unknown = {
        flag
        for option in dbt_options
        if ours(option["command"])
        for flag in option["flags"]
        if flag.startswith("--") and flag not in judged
    }
    assert unknown == set()
    assert ALLOWED_FLAGS.isdisjoint(REFUSED_ON_PURPOSE | set(OURS))


REFUSED_ON_PURPOSE = {
    "--deprecated-defer",
    "--deprecated-favor-state",
    "--deprecated-no-print",
    "--deprecated-print",
    "--lock",
    "--no-upload-to-artifacts-ingest-api",
    "--no-use-colors",
    "--no-use-colors-file",
    "--no-use-experimental-parser",
    "--partial-parse-file-diff",
    "--no-partial-parse-file-diff",
    "--source",
    "--upgrade",
    "--use-colors-file",
    "--use-experimental-parser",
}
"""Harmless or not, nobody has asked for these yet."""


def test_whatever_we_let_through_dbt_runs_on_the_workers_target(tmp_path: Path) -> None:
    """Clusters, values that look like flags, lists that eat the next word: dbt itself decides."""
    pieces = ["--exclude", "-s", "-xs", "--select=a", "-sx", "a", "--", "-", "--threads", "-1"]
    pieces += ["--warn-error-options", "{}", "--vars", "-t", "--no-defer", "-ft", "--target=x"]
    let_through = []
    for length in (1, 2, 3):
        for words in itertools.permutations(pieces, length):
            try:
                dbt = check_args(["build", *words], SHOP)
            except RequestRejected:
                continue
            let_through.append(worker_args(dbt, target="prod", profile="shop", vars_json="{}"))
    assert len(let_through) > 100

    outcomes = ask_dbt(PARSE, let_through, tmp_path)
    understood = [outcome for outcome in outcomes if isinstance(outcome, dict)]
    assert len(understood) > 50
    for args, outcome in zip(let_through, outcomes, strict=True):
        if isinstance(outcome, dict):
            assert (outcome["target"], outcome["profile"]) == ("prod", "shop"), args


@pytest.mark.parametrize("flag", sorted(INLINE_FLAGS))
def test_a_requests_own_sql_runs_only_where_the_project_says_so(flag: str) -> None:
    """Its Jinja could call any macro, whatever run_operations lists."""
    args = ["show", flag, "{{ drop_everything() }}"]
    with pytest.raises(RequestRejected, match="allow_inline"):
        check_args(args, SHOP)
    assert check_args(args, INLINE).args == args


# A parse that somebody else has done.


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["build"], ""),
        (["build", "--full-refresh", "-s", "tag:nightly", "--defer", "--threads", "8"], ""),
        (["source", "freshness", "--output", "x"], ""),
        (["show", "--inline", "select 1", "--output", "json"], ""),
        (["build", "--exclude", "--warn-error"], "flags"),
        (["build", "--no-partial-parse"], "flags"),
        (["build", "--warn-error"], "flags"),
        (["build", "--warn-error-options", "{}"], "flags"),
        (["build", "--no-static-parser"], "flags"),
        (["build", "--vars", "{a: 1}"], "flags"),  # of a project's default_args
        (["build", "-tprod"], "flags"),
        (["build", "--use-v2-parser"], "flags"),
        (["list"], "command"),
        (["parse"], "command"),
        (["retry"], "command"),
        (["run-operation", "grant_all"], "command"),
        (["deps"], "command"),
    ],
)
def test_what_changes_parsing_is_parsed_for_itself(args: list[str], why: str) -> None:
    words = 2 if args[0] in ("source", "docs") else 1
    assert own_parse(DbtArgs(" ".join(args[:words]), args)) == why
