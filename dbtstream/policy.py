"""Which of dbt's words a request may carry. Pure.

Paths, profile, target, vars and logging belong to the worker: a request cannot reach them
by any spelling that dbt's command line accepts (`--target x`, `--target=x`, `-tx`, `-xtx`).
Flags are allowed by name, so a path option that a newer dbt adds is refused until it is
known here. The flags are those of dbt-core 1.8 to 1.12 (`dbt.cli.main`, read from 1.11.16).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dbtstream.config import ProjectConfig
from dbtstream.errors import RequestRejected
from dbtstream.messages import RejectCode

TWO_WORDS = {"source": ("freshness",), "docs": ("generate",)}
ALIASES = {"ls": "list"}

_SWITCHES = (
    "cache-selected-only",
    "compile",
    "connection",
    "debug",
    "defer",
    "empty",
    "empty-catalog",
    "export-saved-queries",
    "fail-fast",
    "favor-state",
    "full-refresh",
    "include-saved-query",
    "inject-ephemeral-ctes",
    "introspect",
    "macro-debugging",
    "partial-parse",
    "populate-cache",
    "print",
    "quiet",
    "show",
    "show-all-deprecations",
    "single-threaded",
    "static",
    "static-parser",
    "store-failures",
    "use-fast-test-edges",
    "version-check",
    "warn-error",
    "write-json",
)

_WITH_VALUE = frozenset(
    {
        "--args",
        "--event-time-end",
        "--event-time-start",
        "--exclude",
        "--exclude-resource-type",
        "--exclude-resource-types",
        "--indirect-selection",
        "--limit",
        "--model",
        "--models",
        "--output-keys",
        "--resource-type",
        "--resource-types",
        "--sample",
        "--select",
        "--selector",
        "--sqlparse",
        "--threads",
        "--warn-error-options",
    }
)

ALLOWED_FLAGS = (
    frozenset(f"--{name}" for name in _SWITCHES)
    | frozenset(f"--no-{name}" for name in _SWITCHES)
    | _WITH_VALUE
)

INLINE_FLAGS = frozenset({"--inline", "--inline-direct"})
"""A request's own Jinja may call any macro of the project: only where `allow_inline` says so."""

OWN_PARSE_FLAGS = frozenset(
    {
        "--no-partial-parse",
        "--static-parser",
        "--no-static-parser",
        "--warn-error",
        "--warn-error-options",
        "--macro-debugging",
    }
)
"""What changes how dbt parses, or what it makes of that, so that nobody can have done it before."""

HARMLESS_FLAGS = (ALLOWED_FLAGS | INLINE_FLAGS | {"--output"}) - OWN_PARSE_FLAGS
"""A project's `default_args` may have others: what those do to parsing is not known here."""

ON_A_MANIFEST = frozenset(
    {"build", "run", "test", "seed", "snapshot", "compile", "show", "clone", "source freshness"}
    | {"docs generate"}
)
"""Commands that do and leave the same with a manifest that they are given. `list` and
`run-operation` would leave no manifest.json, `retry` parses always."""

RETRY_FLAGS = frozenset({"--threads", "--warn-error"})
"""dbt's retry accepts more of them, --full-refresh too, and does not heed them (1.8 to 1.12)."""

INSTEAD = {
    "--inline": "the project's config does not set allow_inline",
    "--inline-direct": "the project's config does not set allow_inline",
    "--vars": "use the request's `vars`",
    "--target": "the target is the last token of the subject",
    "--project-dir": "the worker's config names the project's path",
    "--profiles-dir": "the worker's config names it",
    "--profile": "the worker's config names it",
    "--target-path": "each run has a private one",
    "--log-path": "each run has a private one",
    "--state": "use the request's `state`",
    "--defer-state": "use the request's `state`",
}

_SHORT = {
    "d": "--debug",
    "f": "--full-refresh",
    "q": "--quiet",
    "x": "--fail-fast",
    "m": "--models",
    "s": "--select",
    "t": "--target",
    "o": "--output",
    "r": "--record-timing-info",
}
_SHORT_WITH_VALUE = frozenset("mstor")


@dataclass(frozen=True, slots=True)
class DbtArgs:
    """What a request's args come to: the command, and the list for `dbtRunner.invoke`."""

    command: str  # "build", "source freshness"
    args: list[str]


def check_args(args: Sequence[str], project: ProjectConfig) -> DbtArgs:
    """The args, allowed and with the project's default args. Raises RequestRejected."""
    command, rest = split_command(args)
    if command not in project.commands:
        raise RequestRejected(
            RejectCode.COMMAND_NOT_ALLOWED,
            f"this project does not allow `dbt {command}`; it allows {', '.join(project.commands)}",
            "args",
        )
    if command == "run-operation":
        _check_operation(rest, project)
    for word in rest:
        _check_word(word, command, inline=project.allow_inline)
    _check_last(rest)
    if command == "retry" and project.target_path is None:
        raise RequestRejected(
            RejectCode.USAGE_ERROR,
            "there is nothing to retry in the private target path of a new run; "
            "use retry_of, with the id of the run",
            "args",
        )
    return DbtArgs(command, [*command.split(" "), *rest, *project.default_args])


def check_earlier(args: Sequence[str], project: ProjectConfig) -> DbtArgs:
    """The args of the run that `retry_of` names, as `check_args`: it may do what it could do
    now. Raises RequestRejected.
    """
    try:
        return check_args(args, project)
    except RequestRejected as error:
        raise RequestRejected(
            error.code, f"the run to retry: {error.message}", "retry_of"
        ) from error


def check_retry(args: Sequence[str]) -> DbtArgs:
    """The args beside `retry_of`: none, or dbt's retry with what it heeds. RequestRejected.

    Allowed wherever the earlier run's own args are (`check_earlier`). Without the project's
    default args: the earlier run had them, and retry takes over what a run had.
    """
    command, rest = split_command(args) if args else ("retry", [])
    if command != "retry":
        raise RequestRejected(
            RejectCode.USAGE_ERROR,
            f"retry_of repeats what had not succeeded in that run; it cannot be a `dbt {command}`",
            "args",
        )
    for word in rest:
        _check_word(word, command, inline=False)
        if not _is_value(word) and (others := set(_flags_in(word)[0]) - RETRY_FLAGS):
            raise RequestRejected(
                RejectCode.USAGE_ERROR,
                f"{min(others)}: dbt's retry takes it from the earlier run; "
                f"it heeds {' and '.join(sorted(RETRY_FLAGS))}",
                "args",
            )
    _check_last(rest)
    return DbtArgs("retry", ["retry", *rest])


def split_command(args: Sequence[str]) -> tuple[str, list[str]]:
    """("source freshness", ["--select", "x"]). Raises RequestRejected (usage_error)."""
    first = args[0] if args else ""
    if first == "dbt" or first.startswith("-") or " " in first or not first:
        raise RequestRejected(
            RejectCode.USAGE_ERROR,
            f"args begin with {first!r}; they must begin with dbt's command, like build",
            "args",
        )
    if first in TWO_WORDS:
        second = args[1] if len(args) > 1 else ""
        if second not in TWO_WORDS[first]:
            raise RequestRejected(
                RejectCode.COMMAND_NOT_ALLOWED,
                f"`dbt {first} {second}`: only {' and '.join(TWO_WORDS[first])} can be run",
                "args",
            )
        return f"{first} {second}", list(args[2:])
    return ALIASES.get(first, first), list(args[1:])


def worker_args(
    dbt: DbtArgs, *, target: str | None, profile: str | None, vars_json: str
) -> list[str]:
    """The list that dbt gets: the worker's words, then the request's.

    In this order, since dbt's `--select` and `--exclude` take every word up to the next flag:
    behind a request's `--exclude`, `--target prod` would be two names to exclude.
    """
    added: list[str] = []
    if target:
        added += ["--target", target]
    if profile:
        added += ["--profile", profile]
    if vars_json:
        added += ["--vars", vars_json]
    words = len(dbt.command.split(" "))
    return [*dbt.args[:words], *added, *dbt.args[words:]]


def own_parse(dbt: DbtArgs) -> str:
    """Why dbt has to parse the project in that very run; empty where it need not."""
    if dbt.command not in ON_A_MANIFEST:
        return "command"
    for word in dbt.args:
        if not _is_value(word) and not set(_flags_in(word)[0]) <= HARMLESS_FLAGS:
            return "flags"
    return ""


def _check_operation(rest: Sequence[str], project: ProjectConfig) -> None:
    """The macro must come first, so that no option's value can be taken for it."""
    macro = rest[0] if rest else ""
    if macro not in project.run_operations:
        allowed = ", ".join(project.run_operations) or "none"
        raise RequestRejected(
            RejectCode.COMMAND_NOT_ALLOWED,
            f"run-operation {macro!r} is not allowed; macros that are: {allowed}",
            "args",
        )


def _check_word(word: str, command: str, *, inline: bool) -> None:
    if _is_value(word):
        return
    for flag in _flags_in(word)[0]:
        if flag == "--output" and command in ("list", "show", "compile"):
            continue  # a format there, but a path in `source freshness`
        if inline and flag in INLINE_FLAGS:
            continue
        if flag not in ALLOWED_FLAGS:
            hint = INSTEAD.get(flag, "it is not among the flags that a request may carry")
            raise RequestRejected(RejectCode.FLAG_NOT_ALLOWED, f"{flag}: {hint}", "args")


def _check_last(rest: Sequence[str]) -> None:
    """A flag that waits for its value would get the next word of ours for it."""
    last = rest[-1] if rest else ""
    if not _is_value(last) and _flags_in(last)[1]:
        raise RequestRejected(
            RejectCode.USAGE_ERROR, f"{last} is the last of the args; it needs a value", "args"
        )


def _is_value(word: str) -> bool:
    """Not a flag, for click; `--limit -1` has one too. A lone `--` is refused as a flag."""
    return not word.startswith("-") or word == "-" or word[1:].isdecimal()


def _flags_in(word: str) -> tuple[list[str], bool]:
    """The flags of a word as click reads it, and whether the last one waits for its value.

    `--a=b` -> [--a]; `-xs` -> [--fail-fast, --select] and waits; `-sx` -> [--select].
    """
    if word.startswith("--"):
        flag, equals, _ = word.partition("=")
        return [flag], not equals and (flag in _WITH_VALUE or flag == "--output")
    flags = []
    for end, letter in enumerate(word[1:], start=2):
        flags.append(_SHORT.get(letter, f"-{letter}"))
        if letter in _SHORT_WITH_VALUE:
            return flags, end == len(word)  # the rest of the word is its value
    return flags, False
