"""From words on the command line to values: KEY=VALUE, JSON, `10m` ago, dbt's own words.

Pure but for the clock in `begin_of`. What is wrong with a word is a click.UsageError.
"""

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from dbtstream.messages import StateFrom

_SINCE = re.compile(r"(\d+)\s*([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_BEFORE_DASHES = {"--vars": "--vars", "--target": "--target", "-t": "--target"}


def project_and_args(
    words: tuple[str, ...], *, local: bool, may_be_none: bool = False
) -> tuple[str, list[str]]:
    """`may_be_none`: words for dbt need not be there, as the request names an earlier run."""
    project, args = ("", list(words)) if local else (words[0] if words else "", list(words[1:]))
    if not local and not project:
        raise click.UsageError("which PROJECT? Or give --project-dir for a folder of yours.")
    if args[:1] == ["dbt"]:
        args = args[1:]
    if not args and not may_be_none:
        raise click.UsageError("no words for dbt. They come after two dashes, like: -- build")
    for word in args:
        option = _BEFORE_DASHES.get(word.split("=", 1)[0])
        if option:
            raise click.UsageError(f"{option} goes before the two dashes: it is ours to pass on.")
    return project, args


def variables(single: tuple[str, ...], whole: str | None) -> dict[str, Any]:
    """`--vars` first, then each `--var`: JSON where it is JSON, text where it is not."""
    found: Any = {}
    if whole is not None:
        try:
            found = json.loads(whole)
        except ValueError as error:
            raise click.UsageError(f"--vars is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise click.UsageError('--vars must be a JSON object, like {"day": "2024-05-01"}')
    for name, text in pairs("--var", single).items():
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return dict(found)


def state_from(text: str) -> StateFrom:
    """`last_success`, `last_success:prod`, or a run id."""
    whose, _, target = text.partition(":")
    return StateFrom(from_=whose, target=target or None)


def pairs(option: str, values: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not key or not equals:
            raise click.UsageError(f"{option} {value}: it must be KEY=VALUE")
        found[key] = text
    return found


def begin_of(text: str) -> datetime:
    """`10m` ago, or an RFC 3339 time; one without a zone is UTC."""
    if found := _SINCE.fullmatch(text):
        return datetime.now(UTC) - timedelta(**{_UNITS[found[2]]: int(found[1])})
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise click.UsageError(
            f"--since {text}: it must be like 10m, 2h, 1d or 2024-05-01T12:00:00Z"
        ) from None
    return at if at.tzinfo else at.replace(tzinfo=UTC)
