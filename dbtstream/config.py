"""`dbtstream.toml`: what a worker may run, where, and how it reaches NATS.

Unknown keys are refused, and every error says file, key path and what is accepted. A value
may be set from the environment (`DBTSTREAM__WORKER__SLOTS=8`), which wins over the file.
Secrets are never in the file: they are named (`{ env = "X" }`, `{ file = "/run/…" }`) and
read when a child is started, into that child's environment only.
"""

import os
import re
import socket
import string
import sys
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn
from urllib.parse import urlsplit

import msgspec

from dbtstream.config_environment import lay_over
from dbtstream.errors import ConfigError
from dbtstream.subjects import NAME

FILE_NAME = "dbtstream.toml"
SEARCH = (Path(FILE_NAME), Path("/etc/dbtstream") / FILE_NAME)
ENV_FILE = "DBTSTREAM_CONFIG"

DEFAULT_COMMANDS = (
    "build",
    "run",
    "test",
    "seed",
    "snapshot",
    "compile",
    "source freshness",
    "docs generate",
    "parse",
    "list",
    "show",
)
"""dbt commands that a project allows if it does not say. Others it must name."""

KNOWN_COMMANDS = (*DEFAULT_COMMANDS, "retry", "clone", "deps", "debug", "run-operation")

DEFAULT_PASS_ENV = (
    "HOME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LOGNAME",
    "PATH",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    "TMPDIR",
    "TZ",
    "USER",
    "DBT_SEND_ANONYMOUS_USAGE_STATS",
    "DO_NOT_TRACK",
)
"""The variables of the daemon that a dbt process gets besides those of its project."""

RESOURCE_KEYS = {
    "service.name": "service_name",
    "service.namespace": "service_namespace",
    "deployment.environment.name": "environment",
}
"""Attributes of the resource that have a key of their own."""

NEVER_PASS_ENV = ("DBTSTREAM_", "NATS_", "OTEL_")
"""Not even `pass_env = ["*"]` hands these to dbt: they are the daemon's own."""

ASSET_KEY_FIELDS = (
    "project",
    "target",
    "namespace",
    "database",
    "schema",
    "identifier",
    "name",
    "package_name",
    "resource_type",
)
"""What `assets.key` may have in braces."""

MAX_LIMIT = 1000
"""Each place under a limit is a lease of its own, looked for one by one."""

SUBJECT = re.compile(r"[^\s.*>\x00-\x1f\x7f]+(\.[^\s.*>\x00-\x1f\x7f]+)*")
HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")

DEFAULT_TARGET = "default"
"""A target of this name means: whatever target the profile says."""


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all config tables: an unknown key is an error, not a default."""


class SecretRef(Section, frozen=True, kw_only=True):
    """Where a secret is: exactly one of an environment variable or a file."""

    env: str | None = None
    file: str | None = None

    def __post_init__(self) -> None:
        if (self.env is None) == (self.file is None):
            raise ValueError('name one of env and file, like { env = "PASSWORD" }')


class NatsConfig(Section, frozen=True, kw_only=True):
    servers: tuple[str, ...] = ("nats://127.0.0.1:4222",)
    user: str | None = None
    password: SecretRef | None = None
    token: SecretRef | None = None
    creds_file: str | None = None
    nkey_seed_file: str | None = None
    tls_ca_file: str | None = None
    tls_cert_file: str | None = None
    tls_key_file: str | None = None
    inbox_prefix: str = "_INBOX"
    connect_timeout_s: float = 2.0
    request_timeout_s: float = 2.0
    reconnect_wait_s: float = 0.5


class StreamsConfig(Section, frozen=True, kw_only=True):
    """What `dbtstream setup` creates. Sizes are bytes."""

    manage: bool = True  # `serve` creates what is missing; needs the permissions for it
    replicas: int = 1
    runs_max_msgs: int = 10_000
    events_max_age_s: float = 14 * 86400
    events_max_bytes: int = 2 * 1024**3
    dead_max_age_s: float = 30 * 86400
    state_max_age_s: float = 30 * 86400
    idle_consumer_s: float = 7 * 86400


class WorkerConfig(Section, frozen=True, kw_only=True):
    name: str = ""  # in events, in logs and in `dbtstream ps`; the host's name if empty
    slots: int = 4  # dbt processes at one time
    state_dir: str = ""  # outboxes, target and log paths; $XDG_STATE_HOME/dbtstream if empty
    drain_timeout_s: float = 60.0  # SIGTERM: how long running dbt may go on
    cancel_grace_s: float = 30.0  # interrupted dbt may take so long before SIGTERM
    kill_grace_s: float = 10.0  # and so long after SIGTERM before SIGKILL
    handshake_timeout_s: float = 60.0  # process start to dbt imported
    on_drain: Literal["cancel", "hand_over"] = "cancel"  # of dbt that is not done by then
    ack_wait_s: float = 90.0  # without a heartbeat for so long, another worker gets the request
    lease_ttl_s: int = 120  # and without one for so long, it may take over the run
    heartbeat_s: float = 15.0  # of requests and leases
    cut_off: Literal["auto", "stop", "go_on"] = "auto"  # dbt, when its lease cannot be renewed
    # fork dbt from a process that has imported it, or that has parsed the project, too
    warm_starts: Literal["off", "imports", "manifest"] = "off"
    max_attempts: int = 5  # of a run whose workers die; then it is lost
    max_deliveries: int = 1000  # of a request that no worker settles; then it is a dead letter
    outbox_max_bytes: int = 1024**3  # per run
    keep_runs: int = 50  # folders of so many ended runs stay on disk, per project and target


class LogConfig(Section, frozen=True, kw_only=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"  # auto: console on a terminal


class OpenLineageConfig(Section, frozen=True, kw_only=True):
    """Where OpenLineage messages go: to a NATS subject, an HTTP endpoint, or both."""

    namespace: str = "dbt"  # of jobs; what OpenLineage's own dbt integration has by default
    subject: str | None = None  # of a stream that is yours, such as "openlineage.events"
    url: str | None = None  # such as "http://marquez:5000"
    endpoint: str = "api/v1/lineage"  # below the url
    api_key: SecretRef | None = None  # sent as a bearer token
    headers: dict[str, str] = {}
    tls_ca_file: str | None = None
    timeout_s: float = 10.0  # of one message, from connecting to its answer


class OtlpConfig(Section, frozen=True, kw_only=True):
    """Where OTLP goes, over HTTP. What is not set here is taken from OTEL_EXPORTER_OTLP_*."""

    endpoint: str = ""  # such as "http://127.0.0.1:4318"; each signal has its own path below it
    headers: dict[str, str] = {}
    secret_headers: dict[str, SecretRef] = {}  # such as { "api-key" = { env = "KEY" } }
    tls_ca_file: str | None = None
    timeout_s: float = 3.0  # of one export
    traces: bool = True
    metrics: bool = True
    logs: bool = False  # dbt's own log lines, from the project's log_level on
    metrics_interval_s: float = 30.0
    temporality: Literal["cumulative", "delta"] = "cumulative"  # Datadog wants delta


class TelemetryConfig(Section, frozen=True, kw_only=True):
    """What is told to OpenTelemetry, and as whom."""

    service_name: str = "dbtstream"
    service_namespace: str = ""
    environment: str = ""  # deployment.environment.name
    resource: dict[str, str] = {}  # more attributes of the resource
    trace_context: Literal["parent", "link", "ignore"] = "parent"  # of a request's traceparent
    baggage: tuple[str, ...] = ()  # keys of a request's baggage that become attributes of its run
    span_names: Literal["node", "type"] = "node"  # "model orders", or just "model"
    query_spans: bool = False  # a span for each query, where the project has `queries`
    node_metrics: bool = False  # the few metrics with a node's name in them
    datadog: bool = False  # operation.name, resource.name, span.type on spans
    otlp: OtlpConfig | None = None  # off without its table


class HttpConfig(Section, frozen=True, kw_only=True):
    listen: str = "127.0.0.1:9464"  # /livez, /readyz, /metrics; "" for none


class AssetsConfig(Section, frozen=True, kw_only=True):
    """How the datasets of a project are named and told. `meta.dbtstream` of a node wins."""

    emit: bool = True  # asset events
    key: str = "{database}.{schema}.{identifier}"  # of ASSET_KEY_FIELDS
    prefix: str = ""  # before every key
    namespace: str | None = None  # of datasets; by the adapter's connection if not set


class LineageConfig(Section, frozen=True, kw_only=True):
    emit: bool = True  # lineage events
    columns: bool = True  # column lineage, in a process of its own
    adapter_columns: bool = False  # ask the database for the columns of what was built
    timeout_s: float = 10.0  # for the SQL of one model; then its status is `error`
    wait_s: float = 15.0  # at a run's end, for what is still being read


class ProjectConfig(Section, frozen=True, kw_only=True):
    """One dbt project. Its name, the table's key, is the first token of its subjects."""

    path: str
    targets: tuple[str, ...]  # the first is that of `dbtstream run`; "default" is the profile's own
    python: str = ""  # an interpreter that has dbt and the adapter; the daemon's own if empty
    profiles_dir: str | None = None
    profile: str | None = None
    commands: tuple[str, ...] = DEFAULT_COMMANDS
    allow_inline: bool = False  # `--inline`: SQL and macro calls of the request's own
    run_operations: tuple[str, ...] = ()  # macros that `run-operation` may call, by name
    default_args: tuple[str, ...] = ()  # after the request's own, such as ["--threads", "8"]
    env: dict[str, str] = {}
    secrets: dict[str, SecretRef] = {}
    pass_env: tuple[str, ...] = ()  # more variables of the daemon; a final * matches any ending
    target_path: str | None = None  # where artifacts go; each run's own folder if not set
    log_level: Literal["debug", "info", "warn", "error", "none"] = "warn"
    queries: bool = False  # publish `query.finished`
    query_sql: bool = False  # with the SQL text
    timeout_s: float | None = None
    silence_timeout_s: float | None = None
    on_lost: Literal["resume", "restart", "fail"] = "resume"  # for runs whose worker died
    speedups: bool = True  # dbt's cycle check in linear time; off: dbt as it is
    limits: tuple[str, ...] = ()  # of the table [limits], each taken for as long as dbt runs
    content_type: Literal["application/json", "application/msgpack"] = "application/json"
    labels: dict[str, str] = {}
    assets: AssetsConfig = AssetsConfig()
    lineage: LineageConfig = LineageConfig()
    selectors: dict[str, str] = {}  # name -> dbt's selection syntax; in the events' `matches`


class Config(Section, frozen=True, kw_only=True):
    nats: NatsConfig = NatsConfig()
    streams: StreamsConfig = StreamsConfig()
    worker: WorkerConfig = WorkerConfig()
    log: LogConfig = LogConfig()
    openlineage: OpenLineageConfig | None = None  # off without its table
    telemetry: TelemetryConfig = TelemetryConfig()
    http: HttpConfig = HttpConfig()
    limits: dict[str, int] = {}  # dbt processes at one time, over all workers, by name
    projects: dict[str, ProjectConfig] = {}
    source: str = "defaults"  # where it came from, for messages; not a key of the file

    @property
    def worker_name(self) -> str:
        return self.worker.name or _host_name()

    @property
    def state_dir(self) -> Path:
        if self.worker.state_dir:
            return Path(self.worker.state_dir)
        base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        return Path(base) / "dbtstream"


def find_config(given: str | None = None) -> Path | None:
    """The file that applies: `--config`, `$DBTSTREAM_CONFIG`, ./dbtstream.toml, /etc/dbtstream."""
    if chosen := given or os.environ.get(ENV_FILE):
        return Path(chosen)
    return next((path for path in SEARCH if path.is_file()), None)


def load_config(path: Path | None, environ: Mapping[str, str] | None = None) -> Config:
    """The file (defaults if None) with the environment laid over it. Raises ConfigError."""
    source = str(path) if path else "defaults"
    tables: dict[str, Any] = {}
    if path is not None:
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(source, "", "there is no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(source, "", f"cannot be read: {error}") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(source, "", f"is not TOML: {error}") from error
    origins = lay_over(tables, os.environ if environ is None else environ)
    try:
        return _check(_convert(tables, source), base=path.parent if path else Path())
    except ConfigError as error:
        # A person looks for the mistake where the value came from.
        if variable := origins.get(error.key.split("[")[0]):
            raise ConfigError(
                f"environment {variable}", error.key, error.problem, error.hint
            ) from None
        raise


def read_secret(ref: SecretRef, source: str, key: str) -> str:
    """The secret itself. Raises ConfigError that names where it should be, never its value."""
    if ref.env is not None:
        if (value := os.environ.get(ref.env)) is None:
            raise ConfigError(source, key, f"environment variable {ref.env} is not set")
        return value
    try:
        return Path(ref.file or "").read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(source, key, f"secret file {ref.file} cannot be read: {error}") from error


def _convert(tables: dict[str, Any], source: str) -> Config:
    """Table by table, so that an error can name the project it is in."""
    sections: dict[str, Any] = {}
    kinds: dict[str, type[Section]] = {
        "nats": NatsConfig,
        "streams": StreamsConfig,
        "worker": WorkerConfig,
        "log": LogConfig,
        "openlineage": OpenLineageConfig,
        "telemetry": TelemetryConfig,
        "http": HttpConfig,
    }
    for key, value in tables.items():
        if key in kinds:
            sections[key] = _section(value, kinds[key], source, key)
        elif key == "projects" and isinstance(value, dict):
            sections[key] = {
                name: _section(table, ProjectConfig, source, f"projects.{name}")
                for name, table in value.items()
            }
        elif key == "limits":
            sections[key] = _limits(value, source)
        else:
            raise ConfigError(
                source,
                key,
                "no such table",
                f"accepted: {', '.join([*kinds, 'limits', 'projects'])}",
            )
    return Config(**sections, source=source)


def _limits(value: Any, source: str) -> dict[str, int]:
    """`{warehouse = 4}`: how many dbt processes may share what goes by this name."""
    try:
        limits = msgspec.convert(value, dict[str, int])
    except msgspec.ValidationError as error:
        raise ConfigError(
            source, "limits", str(error), "names with whole numbers, like warehouse = 4"
        ) from error
    for name, count in limits.items():
        if not 1 <= count <= MAX_LIMIT:
            raise ConfigError(source, f"limits.{name}", f"is {count}; it must be 1 to {MAX_LIMIT}")
    return limits


def _section(value: Any, kind: type[Section], source: str, key: str) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$")
        path = path.rstrip("`").removeprefix(".")
        accepted = _accepted(kind, path)
        where = ".".join(filter(None, (key, _with_item(value, kind, path))))
        raise ConfigError(source, where, problem, accepted) from error


def _with_item(value: Any, kind: type[Section], path: str) -> str:
    """msgspec says `secrets[...]`; which of the secrets it is, has to be tried."""
    field, marker, rest = path.partition("[...]")
    if not marker or not isinstance(value.get(field), dict):
        return path
    hint = typing.get_type_hints(kind)[field]
    for name, item in value[field].items():
        try:
            msgspec.convert({name: item}, hint)
        except msgspec.ValidationError:
            return f"{field}.{name}{rest}"
    return path


def _accepted(kind: Any, path: str) -> str:
    """What may stand at `path` of a table: its keys, or the values of a closed list."""
    for part in path.replace("[...]", "[]").split(".") if path else []:
        name = part.split("[")[0]
        kind = typing.get_type_hints(kind).get(name) if name else None
        if "[" in part:
            kind = next(iter(typing.get_args(kind)[-1:]), None)
        if kind is None:
            return ""
    choices = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for choice in choices:
        if isinstance(choice, type) and issubclass(choice, Section):
            return f"accepted keys: {', '.join(choice.__struct_fields__)}"
        if typing.get_origin(choice) is Literal:
            return f"accepted: {', '.join(map(str, typing.get_args(choice)))}"
    return ""


def _check(config: Config, base: Path) -> Config:
    """What types cannot say; and paths made absolute, from the file's own folder."""
    source = config.source
    worker = config.worker
    if worker.name and not NAME.fullmatch(worker.name):
        raise ConfigError(source, "worker.name", _name_rule(worker.name))
    _check_durations(source, "nats", config.nats)
    _check_durations(source, "streams", config.streams)
    _check_durations(source, "worker", worker)
    for key, low in (
        ("slots", 1),
        ("keep_runs", 0),
        ("outbox_max_bytes", 1024 * 1024),
        ("lease_ttl_s", 3),
        ("max_attempts", 1),
        ("max_deliveries", 1),
    ):
        if getattr(worker, key) < low:
            raise ConfigError(source, f"worker.{key}", f"must be at least {low}")
    for key in ("ack_wait_s", "lease_ttl_s"):
        if worker.heartbeat_s * 3 > getattr(worker, key):
            raise ConfigError(
                source, "worker.heartbeat_s", f"must be at most a third of worker.{key}"
            )
    if config.openlineage is not None:
        _check_openlineage(source, config.openlineage)
    _check_telemetry(source, config.telemetry)
    _check_http(source, config.http)
    if not config.nats.servers:
        raise ConfigError(source, "nats.servers", "is empty", 'such as ["nats://host:4222"]')
    projects = {
        name: _check_project(name, project, config, base)
        for name, project in config.projects.items()
    }
    state_dir = _absolute(base, worker.state_dir) if worker.state_dir else ""
    return msgspec.structs.replace(
        config,
        nats=_with_paths(config.nats, base),
        openlineage=_with_openlineage_paths(config.openlineage, base),
        telemetry=_with_telemetry_paths(config.telemetry, base),
        projects=projects,
        worker=msgspec.structs.replace(worker, state_dir=state_dir),
    )


def _check_openlineage(source: str, section: OpenLineageConfig) -> None:
    _check_durations(source, "openlineage", section)

    def refuse(key: str, problem: str, hint: str = "") -> NoReturn:
        raise ConfigError(source, f"openlineage.{key}".rstrip("."), problem, hint)

    if section.subject is None and section.url is None:
        refuse(
            "",
            "names no place to send to",
            'such as url = "http://marquez:5000" or subject = "openlineage.events"',
        )
    if not section.namespace.strip():
        refuse("namespace", "is empty", 'such as "dbt"')
    if section.subject is not None:
        if not SUBJECT.fullmatch(section.subject):
            refuse("subject", f"{section.subject!r} is no subject to publish on")
        if section.subject.startswith(("dbt.", "$", "_INBOX.")):
            refuse("subject", "begins as ours or the server's do", 'such as "openlineage.events"')
    if section.url is None:
        for key in ("api_key", "headers", "tls_ca_file"):
            if getattr(section, key):
                refuse(key, "is for an HTTP endpoint, and there is no url")
        return
    if not _is_http_url(section.url):
        refuse("url", f"{section.url!r} is no address", 'such as "http://marquez:5000"')
    parts = urlsplit(section.url)
    if parts.query or parts.fragment or parts.username:
        refuse("url", "has more than scheme, host, port and path", "a token goes into api_key")
    for name, value in section.headers.items():
        if not _is_header(name, value):
            refuse(f"headers.{name}", "is no HTTP header")


def _is_http_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.scheme in ("http", "https") and parts.hostname and parts.port != 0)
    except ValueError:
        return False


def _is_header(name: str, value: str = "") -> bool:
    return bool(HEADER_NAME.fullmatch(name)) and value.isascii() and (value + " ").isprintable()


def _check_telemetry(source: str, section: TelemetryConfig) -> None:
    def refuse(key: str, problem: str, hint: str = "") -> NoReturn:
        raise ConfigError(source, f"telemetry.{key}", problem, hint)

    if not section.service_name.strip():
        refuse("service_name", "is empty", 'such as "dbtstream"')
    for name, value in section.resource.items():
        if (key := RESOURCE_KEYS.get(name)) is not None:
            refuse(f"resource.{name}", "has a key of its own", f"telemetry.{key}")
        if not name.strip() or not name.isprintable() or not value:
            refuse(f"resource.{name}", "is no attribute: it needs a name and a value")
    for key in section.baggage:
        if not HEADER_NAME.fullmatch(key):
            refuse("baggage", f"{key!r} cannot be a key of baggage")
    if section.otlp is not None:
        _check_otlp(source, section.otlp)


def _check_otlp(source: str, section: OtlpConfig) -> None:
    _check_durations(source, "telemetry.otlp", section)

    def refuse(key: str, problem: str, hint: str = "") -> NoReturn:
        raise ConfigError(source, f"telemetry.otlp.{key}", problem, hint)

    if not (section.traces or section.metrics or section.logs):
        refuse("traces", "is off, and so are metrics and logs", "leave out the table")
    if section.endpoint:
        if not _is_http_url(section.endpoint):
            refuse(
                "endpoint", f"{section.endpoint!r} is no address", 'such as "http://127.0.0.1:4318"'
            )
        parts = urlsplit(section.endpoint)
        if parts.query or parts.fragment or parts.username:
            refuse("endpoint", "has more than scheme, host, port and path", "see secret_headers")
        if parts.path.rstrip("/").endswith(("/v1/traces", "/v1/metrics", "/v1/logs")):
            refuse("endpoint", "is that of one signal", "each adds its own /v1/… to it")
    for name, value in section.headers.items():
        if not _is_header(name, value):
            refuse(f"headers.{name}", "is no HTTP header")
    for name in section.secret_headers:
        if not _is_header(name):
            refuse(f"secret_headers.{name}", "is no HTTP header")
        if name.lower() in map(str.lower, section.headers):
            refuse(f"secret_headers.{name}", "is also in headers; keep one")


def _check_http(source: str, section: HttpConfig) -> None:
    if not section.listen:
        return
    try:
        split_listen(section.listen)
    except ValueError:
        raise ConfigError(
            source,
            "http.listen",
            f"{section.listen!r} is no address to listen on",
            'such as "127.0.0.1:9464", "[::1]:9464" or "0.0.0.0:9464"; "" for none',
        ) from None


def split_listen(listen: str) -> tuple[str, int]:
    """`host:port` or `[address]:port`. Raises ValueError."""
    parts = urlsplit(f"//{listen}")
    if parts.hostname is None or parts.port is None or parts.netloc != listen or parts.username:
        raise ValueError(listen)
    return parts.hostname, parts.port


def _with_telemetry_paths(section: TelemetryConfig, base: Path) -> TelemetryConfig:
    if section.otlp is None:
        return section
    ca_file = section.otlp.tls_ca_file
    refs = section.otlp.secret_headers.items()
    otlp = msgspec.structs.replace(
        section.otlp,
        tls_ca_file=None if ca_file is None else _absolute(base, ca_file),
        secret_headers={name: _with_path(ref, base) for name, ref in refs},
    )
    return msgspec.structs.replace(section, otlp=otlp)


def _with_openlineage_paths(
    section: OpenLineageConfig | None, base: Path
) -> OpenLineageConfig | None:
    if section is None:
        return None
    ca_file, api_key = section.tls_ca_file, section.api_key
    return msgspec.structs.replace(
        section,
        tls_ca_file=None if ca_file is None else _absolute(base, ca_file),
        api_key=None if api_key is None else _with_path(api_key, base),
    )


def _check_durations(source: str, key: str, section: Section) -> None:
    """Graces may be zero: SIGTERM or SIGKILL at once. No other time limit may."""
    for name in section.__struct_fields__:
        value = getattr(section, name)
        may_be_zero = name in ("drain_timeout_s", "cancel_grace_s", "kill_grace_s")
        if (
            name.endswith("_s")
            and value is not None
            and (value < 0 or (value == 0 and not may_be_zero))
        ):
            rule = "must not be negative" if may_be_zero else "must be above 0"
            raise ConfigError(source, f"{key}.{name}", f"is {value:g}; it {rule}")


def _with_paths(nats: NatsConfig, base: Path) -> NatsConfig:
    files = ("creds_file", "nkey_seed_file", "tls_ca_file", "tls_cert_file", "tls_key_file")
    paths = {name: _absolute(base, path) for name in files if (path := getattr(nats, name))}
    secrets = {
        name: _with_path(ref, base)
        for name in ("password", "token")
        if (ref := getattr(nats, name)) is not None
    }
    return msgspec.structs.replace(nats, **paths, **secrets)


def _with_path(ref: SecretRef, base: Path) -> SecretRef:
    return SecretRef(file=_absolute(base, ref.file)) if ref.file is not None else ref


def _absolute(base: Path, path: str) -> str:
    return str((base / Path(path).expanduser()).absolute())


def _check_project(name: str, project: ProjectConfig, config: Config, base: Path) -> ProjectConfig:
    key, source = f"projects.{name}", config.source
    if not NAME.fullmatch(name):
        raise ConfigError(source, key, _name_rule(name))
    if not project.targets:
        raise ConfigError(source, f"{key}.targets", "is empty", 'such as ["prod"]')
    for target in project.targets:
        if not NAME.fullmatch(target):
            raise ConfigError(source, f"{key}.targets", _name_rule(target))
        if project.targets.count(target) > 1:
            raise ConfigError(source, f"{key}.targets", f"names {target} more than once")
    for command in project.commands:
        if command not in KNOWN_COMMANDS:
            raise ConfigError(
                source,
                f"{key}.commands",
                f"dbt has no command {command!r} for us",
                f"accepted: {', '.join(KNOWN_COMMANDS)}",
            )
    if project.run_operations and "run-operation" not in project.commands:
        raise ConfigError(
            source, f"{key}.run_operations", "names macros, but commands lacks run-operation"
        )
    for limit in project.limits:
        if limit not in config.limits:
            raise ConfigError(
                source,
                f"{key}.limits",
                f"there is no limit {limit!r}",
                f"the table [limits] has {', '.join(config.limits) or 'none'}",
            )
    for variable in project.env:
        if variable in project.secrets:
            raise ConfigError(source, f"{key}.env.{variable}", "is also in secrets; keep one")
    _check_durations(source, key, project)
    _check_durations(source, f"{key}.lineage", project.lineage)
    if problem := template_problem(project.assets.key):
        raise ConfigError(
            source,
            f"{key}.assets.key",
            problem,
            f"accepted in braces: {', '.join(ASSET_KEY_FIELDS)}",
        )
    for selector in project.selectors:
        if not NAME.fullmatch(selector):
            raise ConfigError(source, f"{key}.selectors", _name_rule(selector))
    path = _absolute(base, project.path)
    if not Path(path, "dbt_project.yml").is_file():
        raise ConfigError(source, f"{key}.path", f"{path} holds no dbt_project.yml")
    profiles_dir = project.profiles_dir
    return msgspec.structs.replace(
        project,
        path=path,
        profiles_dir=None if profiles_dir is None else _absolute(base, profiles_dir),
        python=_python(project.python, base),
        secrets={name: _with_path(ref, base) for name, ref in project.secrets.items()},
    )


def template_problem(template: str) -> str | None:
    """What is wrong with a key template, or None."""
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        return f"{template!r} is no template: {error}"
    unknown = [name for name in fields if name not in ASSET_KEY_FIELDS]
    if unknown:
        return f"{template!r} has {{{unknown[0]}}}"
    return None if fields else f"{template!r} has no field: all keys would be the same"


def _python(configured: str, base: Path) -> str:
    """Absolute unless it is a bare command name; symlinks stay, they make the venv."""
    if not configured:
        return sys.executable
    if "/" not in configured:
        return configured
    return _absolute(base, configured)


def _name_rule(name: str) -> str:
    return f"{name!r} cannot be in a NATS subject; use letters, digits, - and _ (at most 64)"


def _host_name() -> str:
    cleaned = "".join(c if NAME.fullmatch(c) else "-" for c in socket.gethostname())
    return cleaned[:64] or "worker"
