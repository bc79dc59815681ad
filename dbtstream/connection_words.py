"""The words of a database connection, read leniently: hosts, ports, paths, accounts.

Layer 1, pure. For `datasets` and `duckdb_catalogs`, which make names of them. What is not there, or
is of a type that makes no sense, is "" or `unknown`: a name is made in any case. Nothing here gives
out a user, a password or a token.
"""

import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

UNKNOWN = "unknown"


class Server(NamedTuple):
    """How an adapter's `<scheme>://<host>:<port>` is made."""

    scheme: str
    hosts: Sequence[str] = ("host",)  # keys of dbt's credentials; the first that is there
    port: str = ""  # if the connection has none; if this is empty, too, none is written


SERVERS = {
    "postgres": Server("postgres", port="5432"),
    "redshift": Server("redshift", port="5439"),
    "clickhouse": Server("clickhouse", port="8123"),
    "trino": Server("trino", port="8080"),
    "presto": Server("presto", port="8080"),
    "watsonx_presto": Server("presto", port="8080"),  # IBM's fork of dbt-presto
    "sqlserver": Server("mssql", ("server", "host"), port="1433"),
    "fabric": Server("fabric-warehouse", ("server", "host")),
    "dremio": Server("dremio", ("software_host", "cloud_host", "host"), port="9047"),
    "mysql": Server("mysql", ("server", "host"), port="3306"),
    "mysql5": Server("mysql", ("server", "host"), port="3306"),
    "mariadb": Server("mysql", ("server", "host"), port="3306"),
}

ANY_HOST = ("host", "server", "server_hostname", "hostname")
"""Where adapters that nobody told us of may have theirs."""

_SPARK_PORTS = {"http": "443", "odbc": "443", "thrift": "10001"}

# example.abc123.eu-west-1.redshift.amazonaws.com, wg.123456789012.eu-west-1.redshift-serverless…
_REDSHIFT_HOST = re.compile(
    r"(?P<name>[^.]+)\.[^.]+\.(?P<region>[^.]+)\.redshift(-serverless)?\.amazonaws\.com(\.cn)?"
)

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_URI_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_URI = re.compile(
    _URI_SCHEME.pattern + r"(?:[^@/?#]*@)?(?P<host>\[[^@/?#]*\]|[^@/?#:]*)(?::(?P<port>\d*))?"
    r"(?:/(?P<database>[^@/?#]*))?(?:[?#].*)?"
)


def text(values: Mapping[str, Any], *keys: str) -> str:
    """The first of these that is a text or a whole number and not blank; else ""."""
    for key in keys:
        value = values.get(key)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            return str(value)
    return ""


def authority(connection: Mapping[str, Any], server: Server) -> str:
    """`host:port`, or `host`, or `unknown`."""
    host = without_scheme(text(connection, *server.hosts))
    port = text(connection, "port") or server.port
    return f"{host}:{port}" if host and port else host or UNKNOWN


def redshift_authority(connection: Mapping[str, Any]) -> str:
    """`<cluster>.<region>:<port>` by the spec, where the host's name or IAM's words tell it."""
    port = text(connection, "port") or SERVERS["redshift"].port
    if found := _REDSHIFT_HOST.fullmatch(text(connection, "host")):
        return f"{found['name']}.{found['region']}:{port}"
    cluster, region = text(connection, "cluster_id"), text(connection, "region")
    if cluster and region:
        return f"{cluster}.{region}:{port}"
    return authority(connection, SERVERS["redshift"])


def spark_authority(connection: Mapping[str, Any]) -> str:
    port = _SPARK_PORTS.get(text(connection, "method"), "")
    return authority(connection, Server("spark", port=port))


def snowflake_account(name: str) -> str:
    """The account as OpenLineage's `fix_account_name` has it, its defaults included: they are
    not always right (a locator without a region is us-west-2), but graphs join only if equal."""
    locator, *rest = name.split(".")
    if "-" in locator or not locator:
        return locator
    match rest:
        case []:
            return f"{locator}.us-west-1.aws"
        case [region]:
            return f"{locator}.{region}.aws"
    return name


def aws_account(connection: Mapping[str, Any]) -> str:
    """As it is given, else that of the role (arn:aws:iam::<account>:role/<name>)."""
    parts = text(connection, "role_arn").split(":")
    return text(connection, "account_id") or (parts[4] if len(parts) > 4 else "")


def sqlite_path(connection: Mapping[str, Any], base: str) -> str:
    """dbt-sqlite has one file per schema."""
    paths = connection.get("schemas_and_paths")
    if isinstance(paths, Mapping):
        path = text(paths, text(connection, "schema"), "main", *map(str, paths))
    else:
        path = text(connection, "path")
    return absolute(path, base) or UNKNOWN


def connection_string(words: str) -> dict[str, str]:
    """libpq's `host=… dbname=…` (or MySQL's like it) or a URI: its host, port and database.

    Of a URI that is not well-formed, nothing: what looks like its host may be of the password.
    """
    if _URI_SCHEME.match(words):
        found = _URI.fullmatch(words)
        return (
            {} if found is None else {key: value or "" for key, value in found.groupdict().items()}
        )
    pairs = re.findall(r"(\w+)\s*=\s*('(?:[^'\\]|\\.)*'|\S*)", words)
    told = {key.lower(): value.strip("'") for key, value in pairs}
    return {
        "host": text(told, "host", "hostaddr"),
        "port": text(told, "port"),
        "database": text(told, "dbname", "database", "db"),
    }


def has_scheme(path: str) -> bool:
    """s3://bucket/x, md:sales; not a file's path."""
    return bool(_SCHEME.match(path))


def without_scheme(host: str) -> str:
    """Hosts are sometimes given as they stand in a browser."""
    if "://" not in host:
        return host.rstrip("/")
    return host.partition("://")[2].partition("/")[0].rpartition("@")[2]


def without_secrets(url: str) -> str:
    """No user, no password, no query."""
    return re.sub(r"(://)[^/]*@", r"\1", url.partition("?")[0])


def holds_secret(words: str) -> bool:
    """A connection string with a password, where a path should be."""
    return bool(re.search(r"(?i)(pass|pwd|token|secret)\w*\s*=", words.partition("?")[0]))


def absolute(path: str, base: str) -> str:
    """Lexically: no disk is looked at, so links are not followed. "" stays so."""
    return posixpath.normpath(posixpath.join(base, path)) if path else ""
