"""Variables like `DBTSTREAM__WORKER__SLOTS=8`, laid over the tables of `dbtstream.toml`. Pure.

`config` reads the file, calls this, and checks what comes out: a value from the environment
has to pass the same checks as one from the file.
"""

import tomllib
from collections.abc import Mapping
from typing import Any

from dbtstream.errors import ConfigError

PREFIX = "DBTSTREAM__"


def lay_over(tables: dict[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """`DBTSTREAM__PROJECTS__SHOP__LOG_LEVEL=info` -> tables["projects"]["shop"]["log_level"].

    Returns which key path came from which variable.
    """
    origins: dict[str, str] = {}
    for variable in sorted(environ):
        if not variable.startswith(PREFIX):
            continue
        *parents, last = variable.removeprefix(PREFIX).split("__")
        table = tables
        path: list[str] = []
        for part in parents:
            path.append(_same_key(table, part, path))
            table = table.setdefault(path[-1], {})
            if not isinstance(table, dict):
                raise ConfigError(
                    f"environment {variable}", ".".join(path), "is a value, not a table"
                )
        path.append(_same_key(table, last, path))
        table[path[-1]] = _toml_value(environ[variable])
        origins[".".join(path)] = variable
    return origins


def _same_key(table: dict[str, Any], part: str, path: list[str]) -> str:
    """The file's spelling of a key, whatever its case; a new key is lower case as ours are.

    But not the names of a child's variables: they are case-sensitive, and usually upper case.
    """
    if part in table:
        return part
    new = part if path[-1:] in (["env"], ["secrets"]) and path[0] == "projects" else part.lower()
    return next((key for key in table if key.lower() == part.lower()), new)


def _toml_value(text: str) -> Any:
    """`8`, `true`, `["a"]` as in TOML; anything else is a string as it stands."""
    try:
        tables = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return tables["value"] if len(tables) == 1 else text
