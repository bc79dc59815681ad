"""dbt's own `retry`, so that it runs what is wanted, where it is wanted.

Two ways lead here. A `retry` in `Start`: the parent tells how the nodes of a cut-off attempt
had ended, and what dbt would have written at its end (run_results.json) is written from that.
And plain `["retry", …]` args, on a file that dbt wrote itself.

Facts of dbt 1.8 to 1.12 behind what is done (`dbt/task/retry.py`):

* target, profile and nearly every flag are those in the file's `args`; given to `retry` itself
  they are ignored. Only paths, --warn-error and --defer-state are taken from there, --vars too,
  and --threads from 1.9 on. So a file of another target would be run against that target.
* `args` are made a command line again by `f"--{name}={value}"`. What is not a string comes back
  as something else: `{"a": null}` as the word None, a backslash as two. Strings come back whole,
  and so the words that were given are what is put there; no default is, as dbt finds those again.
* --vars given to `retry` go the same way, but dbt_project.yml is rendered before, and needs
  them. As a keyword of `dbtRunner.invoke` they are there in time and do not override the file's.
* A node that is not in the file, or not with a status that dbt retries, does not run.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

RUN_RESULTS = "run_results.json"
SCHEMA = "https://schemas.getdbt.com/dbt/run-results/v6.json"
NOT_HANDED_ON = frozenset({"state", "vars", "full_refresh"})

Options = Dict[str, Any]


class CannotRetry(Exception):
    """dbt has no retry for this command."""

    def __init__(self, command: str) -> None:
        self.command = command
        super().__init__(f"dbt cannot retry `{command}`")


class Prepared(NamedTuple):
    """What `dbtRunner.invoke` is to be called with."""

    args: List[str]
    keywords: Dict[str, Any]


def prepare(args: List[str], retry: Optional[Dict[str, Any]]) -> Prepared:
    """dbt is imported by now. Raises CannotRetry, and what dbt's parsers raise."""
    if retry is not None:
        return _resume(retry)
    if "retry" in args:
        return _repeat(args)
    return Prepared(args, {})


def _resume(retry: Dict[str, Any]) -> Prepared:
    """Of an attempt of which no file is left."""
    command, options = given_options(retry["args"])
    args: Options = {"which": command, **options}
    if command == "retry":  # which was cut off itself: its flags are those of the run before
        args = _args_in_file(options.get("state"))
        _mend(args, options)
    _check(str(args.get("which")))
    write_run_results(retry["state_dir"], args, retry["results"], retry.get("began_at"))
    words = _words(options, known=_retry_options(), without=NOT_HANDED_ON)
    return Prepared(["retry", f"--state={retry['state_dir']}", *words], _vars(args.get("vars")))


def _repeat(args: List[str]) -> Prepared:
    """Of a run whose file is there: it is read by dbt, and mended between reading and use."""
    from click import ClickException

    try:
        command, options = given_options(args)
    except ClickException:
        return Prepared(args, {})  # dbt says it better
    if command != "retry":
        return Prepared(args, {})
    _mend_when_loaded(options)
    known = _retry_options()
    words = _words(options, known=known, without=frozenset({"vars"}))
    previous = _args_in_file(options.get("state"))
    _mend(previous, options)
    return Prepared(["retry", *words], _vars(previous.get("vars")))


def given_options(args: List[str]) -> Tuple[str, Options]:
    """The command's name and the options as they were written: strings, True and False.

    Raises click.UsageError for what dbt's command line does not know.
    """
    import click
    from dbt.cli.main import cli

    options: Options = {}
    command: Any = cli
    context: Optional[Any] = None
    words = list(args)
    while True:
        context = click.Context(command, info_name=command.name, parent=context)
        given, words, order = command.make_parser(context).parse_args(words)
        seen = [parameter.name for parameter in order]
        options.update({name: _text(given[name]) for name in seen if _is_given(given.get(name))})
        if not isinstance(command, click.Group):
            return command.name or "", options
        if not words:
            raise click.UsageError("no command is given", context)
        _, command, words = command.resolve_command(context, words)


def write_run_results(
    folder: str,
    args: Dict[str, Any],
    results: List[Dict[str, Any]],
    began_at: Optional[str] = None,
) -> None:
    """As much of a run_results.json (v6) as dbt's `retry` reads.

    Since 1.10 it takes the time of the first invocation for its own, for microbatch models.
    """
    at = began_at or time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + ".000000Z"
    metadata = {"dbt_schema_version": SCHEMA, "generated_at": at, "env": {}}
    if began_at is not None:
        metadata["invocation_started_at"] = began_at
    document = {
        "metadata": metadata,
        "results": [_result(result) for result in results],
        "elapsed_time": 0.0,
        "args": args,
    }
    path = os.path.join(folder, RUN_RESULTS)
    fresh = path + ".new"
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(document, file)
    os.replace(fresh, path)


def _result(result: Dict[str, Any]) -> Dict[str, Any]:
    """A node's entry; every field that has no default in one of the versions is there."""
    entry: Dict[str, Any] = {
        "unique_id": result["unique_id"],
        "status": result["status"],
        "timing": [],
        "thread_id": "",
        "execution_time": 0.0,
        "adapter_response": {},
        "message": None,
        "failures": None,
        "compiled": None,
        "compiled_code": None,
        "relation_name": None,
    }
    if result.get("batch_results"):
        entry["batch_results"] = {"successful": [], "failed": [], **result["batch_results"]}
    return entry


def _mend_when_loaded(options: Options) -> None:
    """dbt's `retry` gets its file's args in a form that survives, and for the right target."""
    import dbt.task.retry

    module: Any = dbt.task.retry
    load: Callable[[Any], Any] = module.load_result_state

    def loaded(path: Any) -> Any:
        previous = load(path)
        if previous is not None:
            _check(str(previous.args.get("which")))
            _mend(previous.args, options)
        return previous

    module.load_result_state = loaded


def _mend(args: Options, options: Options) -> None:
    """What is to be different in the `args` of a file that dbt wrote."""
    for name, value in args.items():
        if isinstance(value, dict) and name != "warn_error_options":  # dbt looks for its default
            args[name] = json.dumps(value)
    for name in ("vars", "threads"):
        if name in options:
            args[name] = options[name]
    for name in ("target", "profile"):
        args.pop(name, None)  # then it is that of the environment or the profile, as for any run
        if name in options:
            args[name] = options[name]


def _check(command: str) -> None:
    from dbt.task.retry import CMD_DICT

    if command not in CMD_DICT:
        raise CannotRetry(command)


def _retry_options() -> frozenset[str]:
    from dbt.cli.main import cli

    return frozenset(str(parameter.name) for parameter in cli.commands["retry"].params)


def _words(options: Options, *, known: frozenset[str], without: frozenset[str]) -> List[str]:
    """Options as words again, those of them that `retry` takes."""
    words = []
    for name, value in options.items():
        if name not in known or name in without:
            continue
        word = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{word}" if value else f"--no-{word}")
        else:
            words.append(f"--{word}={value}")
    return words


def _vars(text: Optional[str]) -> Dict[str, Any]:
    from dbt.config.utils import parse_cli_yaml_string

    return {"vars": parse_cli_yaml_string(text, "vars")} if text else {}


def _args_in_file(folder: Optional[str]) -> Options:
    """Of the earlier run, where they can be read; that they can is dbt's to check."""
    try:
        with open(os.path.join(folder or "", RUN_RESULTS), encoding="utf-8") as file:
            return dict(json.load(file)["args"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _is_given(value: Any) -> bool:
    """Not an argument that is missing, which click marks with None or a sentinel."""
    return isinstance(value, (str, bool, int, list, tuple))


def _text(value: Any) -> Any:
    """Words of an option that takes many, as the one string that it takes too."""
    if isinstance(value, (list, tuple)):
        return " ".join(str(_text(item)) for item in value)
    return value
