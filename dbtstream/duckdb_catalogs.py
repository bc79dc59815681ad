"""In which file, server or lake a relation of a DuckDB connection lies.

Layer 1, pure; `datasets` asks. A DuckDB connection reads and writes other databases than its own:
what the profile attaches, and all of a MotherDuck account. The project gives them names as it
likes, so a dataset goes by where it is and by what it is called there: a table that one project
writes and another one attaches has one name.
"""

import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dbtstream.connection_words import (
    SERVERS,
    UNKNOWN,
    absolute,
    authority,
    connection_string,
    has_scheme,
    holds_secret,
    text,
    without_secrets,
)

MOTHERDUCK = ("md", "motherduck")
MEMORY = ":memory:"
DUCKLAKE = "ducklake:"


class Catalog(NamedTuple):
    """Where an attached database is, and what it is called there ("": nothing)."""

    namespace: str
    name: str


class DuckdbCatalogs:
    """The databases of a DuckDB connection besides its own."""

    def __init__(self, connection: Mapping[str, Any], base: str) -> None:
        path = text(connection, "path")
        self._own = catalog_name(path).lower()
        self._has_motherduck = is_motherduck(path)
        self._attached: dict[str, Catalog | None] = {}
        for alias, attachment in _attachments(connection.get("attach")):
            self._add(alias, attachment, base)

    def _add(self, alias: str, attachment: Mapping[str, Any], base: str) -> None:
        path = text(attachment, "path")
        if is_motherduck(path) and not _motherduck_database(path):
            self._has_motherduck = True  # `md:` attaches all databases of the account
        elif name := alias or catalog_name(path):
            is_told = path or text(attachment, "type", "host")
            # Where it is has not been told: then it goes by the name it has here.
            self._attached[name.lower()] = (
                _attached(attachment, path, name, base) if is_told else None
            )

    def find(self, database: str | None) -> Catalog | None:
        """None: it is in the connection's own. DuckDB's names are without case."""
        if not database:
            return None
        if database.lower() in self._attached:
            return self._attached[database.lower()]
        if self._has_motherduck and database.lower() != self._own:
            return Catalog(f"duckdb://md:{database}", database)
        return None


def duckdb_namespace(path: str, base: str) -> str:
    """Of a database by its path, as a profile has it."""
    if not path or path.startswith(MEMORY):
        return f"duckdb://{path or MEMORY}"
    if is_motherduck(path):
        return f"duckdb://md:{catalog_name(path)}"
    if path.lower().startswith(DUCKLAKE):
        return _lake_namespace(path, base)
    if holds_secret(path):
        return f"duckdb://{UNKNOWN}"
    return f"duckdb://{without_secrets(path) if has_scheme(path) else absolute(path, base)}"


def catalog_name(path: str) -> str:
    """What DuckDB calls a database that is given no name; as dbt-duckdb 1.11 tells it."""
    if not path or path.startswith(MEMORY):
        return "memory"
    if is_motherduck(path):
        return _motherduck_database(path) or "my_db"
    if holds_secret(path):
        return ""
    file = posixpath.basename(path.partition("?")[0])
    return file.rpartition(":")[2].lstrip(".").partition(".")[0]


def _attachments(given: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(alias or "", what is known), from a profile's list, or from paths by alias."""
    if isinstance(given, Mapping):
        for alias, attachment in given.items():
            is_whole = isinstance(attachment, Mapping)
            yield str(alias), attachment if is_whole else {"path": attachment}
    for attachment in given if isinstance(given, list | tuple) else ():
        if isinstance(attachment, Mapping):
            yield text(attachment, "alias"), attachment


def is_motherduck(path: str) -> bool:
    scheme, colon, _ = path.partition(":")
    return bool(colon) and scheme.lower() in MOTHERDUCK


def _motherduck_database(path: str) -> str:
    """Without what follows a `?`, which may be the token."""
    return path.partition(":")[2].partition("?")[0].strip("/")


def _attached(attachment: Mapping[str, Any], path: str, name: str, base: str) -> Catalog:
    """DuckDB attaches other databases, too; each goes by the name that its own adapter gives."""
    # Instead of a string with a password, the child may have told what it says of the place.
    told = {key: text(attachment, key) for key in ("host", "port", "database")}
    options = attachment.get("options")
    options = options if isinstance(options, Mapping) else {}
    kind = (text(attachment, "type") or text(options, "type", "TYPE")).lower()
    scheme, _, rest = path.partition(":")
    if not kind and scheme.lower() in ("postgres", "postgresql", "mysql", "sqlite"):
        kind, path = scheme.lower(), path if rest.startswith("//") else rest
    match kind:
        case "postgres" | "postgresql":
            server = connection_string(path) if path else told
            namespace = f"postgres://{authority(server, SERVERS['postgres'])}"
            return Catalog(namespace, server.get("database") or name)
        case "mysql":  # whose databases DuckDB shows as schemas
            server = connection_string(path) if path else told
            return Catalog(f"mysql://{authority(server, SERVERS['mysql'])}", "")
        case "sqlite":
            return Catalog(f"sqlite://{absolute(path, base)}", "")
        case "iceberg":
            endpoint = text(options, "endpoint", "ENDPOINT")
            return Catalog(without_secrets(endpoint) or f"iceberg://{UNKNOWN}", name)
        case "ducklake":
            return Catalog(_lake_namespace(path, base), _lake_name(path) or name)
    return Catalog(duckdb_namespace(path, base), _lake_name(path) or name)


def _lake_name(path: str) -> str:
    """The catalog's own name; "" of a lake whose metadata are on a server."""
    return "" if re.match(r"(ducklake:)?(postgres(ql)?|mysql):", path) else catalog_name(path)


def _lake_namespace(path: str, base: str) -> str:
    """A DuckLake is where its metadata are: a file, or the database of a server."""
    path = path.removeprefix(DUCKLAKE)
    scheme, _, rest = path.partition(":")
    match scheme.lower():
        case "postgres" | "postgresql" | "mysql":
            server = connection_string(path if rest.startswith("//") else rest)
            kind = "mysql" if scheme.lower() == "mysql" else "postgres"
            return f"ducklake://{authority(server, SERVERS[kind])}/{server.get('database', '')}"
        case "duckdb" | "sqlite":
            path = rest
    if holds_secret(path):
        return f"ducklake://{UNKNOWN}"
    where = without_secrets(path) if has_scheme(path) else absolute(path, base)
    return f"ducklake://{where or UNKNOWN}"
