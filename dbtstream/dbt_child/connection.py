"""Of the profile's target, what names a dataset in the world. Never a secret, nor who logs in.

A closed list of names per adapter type: what is not in it is not looked at. Values that may
carry a secret all the same (a URL with a password, a MotherDuck path with its token) lose it
here; the scrubber sees them afterwards, too.
"""

from __future__ import annotations

import os
import re
from typing import Any, Dict, List, Optional

ALWAYS = ("database", "schema")
HOST = ("host", "port")
NAMES: Dict[str, tuple] = {  # type: ignore[type-arg]  # Python 3.8
    "athena": ("region_name",),
    "bigquery": ("project", "location"),
    "clickhouse": HOST,
    "databricks": HOST,
    "dremio": ("software_host", "cloud_host", "port"),
    "duckdb": (),  # see _duckdb
    "exasol": ("dsn",),
    "fabric": ("host", "server", "port"),
    "fabricspark": ("workspaceid", "lakehouseid"),
    "glue": ("region",),
    "hive": HOST,
    "impala": HOST,
    "mariadb": ("host", "server", "port"),
    "mysql": ("host", "server", "port"),
    "mysql5": ("host", "server", "port"),
    "oracle": ("host", "port", "service"),
    "redshift": ("host", "port", "region", "cluster_id"),
    "snowflake": ("account",),
    "spark": ("host", "port", "method"),
    "sqlserver": ("host", "server", "port"),
    "synapse": ("host", "server", "port"),
}
"""Of all others host and port, which every database on a network has."""

IN_MEMORY = ":memory:"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # two letters at least: C:\ is a drive
_USER_INFO = re.compile(r"//[^/@]*@")


def connection_facts(credentials: Any, project_root: Optional[str]) -> Dict[str, Any]:
    """Of dbt's Credentials object; {} if there is none."""
    if credentials is None:
        return {}
    kind = str(getattr(credentials, "type", "") or "")
    facts: Dict[str, Any] = {"type": kind}
    for name in ALWAYS + tuple(NAMES.get(kind, HOST)):
        # BigQuery's project is an alias that dbt has translated.
        value = getattr(credentials, "database" if name == "project" else name, None)
        if isinstance(value, str):
            value = without_secrets(value)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and value != "":
            facts[name] = value
    if kind == "duckdb":
        facts.update(_duckdb(credentials, project_root))
    return facts


def without_secrets(value: str) -> str:
    """Hosts and URLs without user, password and query."""
    value = value.split("?", 1)[0]
    if "//" in value:
        return _USER_INFO.sub("//", value)
    return value.rsplit("@", 1)[-1]


def _duckdb(credentials: Any, project_root: Optional[str]) -> Dict[str, Any]:
    facts: Dict[str, Any] = {"path": duckdb_path(getattr(credentials, "path", None), project_root)}
    if getattr(credentials, "is_motherduck", False) is True:
        facts["motherduck"] = True
    attached: Dict[str, Any] = {}
    entries: List[Any] = list(getattr(credentials, "attach", None) or ())
    for entry in entries:
        path, kind = getattr(entry, "path", None), getattr(entry, "type", None)
        alias = getattr(entry, "alias", None) or _catalog_name(path)
        # Of another kind (postgres, mysql) the "path" is a connection string, password and all.
        local = kind is None or str(kind).lower() in ("duckdb", "sqlite", "motherduck")
        if alias:
            attached[str(alias)] = duckdb_path(path, project_root) if local else None
    if attached:
        facts["attach"] = attached
    return facts


def duckdb_path(path: Any, project_root: Optional[str]) -> Optional[str]:
    """Absolute where it is a file; dbt-duckdb takes it from the directory of the project."""
    if not isinstance(path, str) or not path:
        return IN_MEMORY if path in (None, "") else None
    if path.startswith(IN_MEMORY):
        return IN_MEMORY
    if "=" in path and not path.startswith(("/", ".", "~")) and " " in path:
        return None  # a connection string: dbname=x password=y
    scheme = _SCHEME.match(path)
    if scheme is None:
        expanded = os.path.expanduser(path.split("?", 1)[0])
        return os.path.normpath(os.path.join(project_root or os.getcwd(), expanded))
    if "=" in without_secrets(path):  # postgres:dbname=x, ducklake:postgres:...
        return scheme.group()
    return without_secrets(path) if "//" in path else path.split("?", 1)[0]


def _catalog_name(path: Any) -> Optional[str]:
    """DuckDB names an attached database after its file."""
    if not isinstance(path, str):
        return None
    return os.path.basename(path.split("?", 1)[0]).split(":")[-1].split(".", 1)[0] or None
