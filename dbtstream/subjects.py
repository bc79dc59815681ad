"""Names on the wire: subjects, KV keys, message headers, run ids. Pure functions.

    dbt.runs.<project>.<target>
    dbt.events.<project>.<target>.<family>.<kind>.<name>.<status>
    dbt.live.<project>.<target>.<family>.<kind>.<name>.<status>    (republished)
    dbt.dead.<project>.<target>
    dbt.control.<verb>

A subject has a bounded number of values (nodes times statuses): run ids are in headers.
"""

import hashlib
import re
import secrets
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime

from dbtstream.events import (
    JSON,
    AnyEvent,
    ArtifactWritten,
    Gap,
    LogLine,
    NodeBatch,
    NodeFinished,
    NodeStarted,
    QueryFinished,
    RunFinished,
    RunLeased,
    event_type,
)
from dbtstream.lineage_events import Asset, Lineage, LineageChanged

RUNS = "dbt.runs"
EVENTS = "dbt.events"
LIVE = "dbt.live"
DEAD = "dbt.dead"
CONTROL = "dbt.control"
CONTROL_CANCEL = f"{CONTROL}.worker.cancel"  # broadcast: the worker of that run answers
CONTROL_STATUS = f"{CONTROL}.worker.status"  # broadcast: every worker answers

RUNS_STREAM = "DBT_RUNS"
EVENTS_STREAM = "DBT_EVENTS"
DEAD_STREAM = "DBT_DEAD"
STATE_BUCKET = "dbt_state"
LINEAGE_BUCKET = "dbt_lineage"

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What projects, targets and workers may be called: safe in subjects, KV keys and paths."""

H_MSG_ID = "Nats-Msg-Id"
H_RUN_ID = "dbtstream-run-id"
H_ATTEMPT = "dbtstream-attempt"
H_SEQ = "dbtstream-seq"
H_FENCE = "dbtstream-fence"
H_MATCHES = "dbtstream-matches"
H_CONTENT_TYPE = "Content-Type"
H_TRACEPARENT = "traceparent"
H_TRACESTATE = "tracestate"
H_BAGGAGE = "baggage"

MAX_TOKEN_CHARS = 100

_NOT_IN_TOKEN = re.compile(r"[\s.*>\x00-\x1f\x7f]")


def token(text: str) -> str:
    """`text` as one subject token: characters that NATS reserves become `_`.

    Not reversible and possibly shared by two names; the payload has the exact `unique_id`.
    """
    return _NOT_IN_TOKEN.sub("_", text)[:MAX_TOKEN_CHARS] or "_"


_NOT_IN_KEY = re.compile(rb"[^A-Za-z0-9_./-]")


def kv_key(text: str) -> str:
    """`text` as (part of) a KV key, reversibly: other bytes become `=XX`.

    NATS KV keys may hold `[-/_=.a-zA-Z0-9]`; dots may not begin, end or repeat.
    """
    escaped = _NOT_IN_KEY.sub(lambda m: b"=%02X" % m[0][0], text.encode()).decode("ascii")
    escaped = re.sub(r"\.(?=\.|$)", "=2E", escaped)
    return "=2E" + escaped[1:] if escaped.startswith(".") else escaped


def run_key(run_id: str) -> str:
    return f"run.{run_id}"


def node_key(project: str, target: str, unique_id: str) -> str:
    return f"node.{project}.{target}.{kv_key(unique_id)}"


def declared_key(project: str, target: str, unique_id: str) -> str:
    """In the bucket `dbt_lineage`: the node's last lineage.declared."""
    return f"declared.{project}.{target}.{kv_key(unique_id)}"


def observed_key(project: str, target: str, unique_id: str) -> str:
    """In the bucket `dbt_lineage`: the node's last lineage.observed."""
    return f"observed.{project}.{target}.{kv_key(unique_id)}"


def asset_key(project: str, target: str, unique_id: str) -> str:
    """In the bucket `dbt_lineage`: what is known of the asset's last build."""
    return f"asset.{project}.{target}.{kv_key(unique_id)}"


def graph_key(project: str, target: str) -> str:
    """In the bucket `dbt_lineage`: the manifest that all `declared` keys are of."""
    return f"graph.{project}.{target}"


def request_key(project: str, target: str, request_id: str) -> str:
    """Where a request_id is remembered: it may be long and odd, so its hash is the key."""
    digest = hashlib.blake2b(request_id.encode(), digest_size=16).hexdigest()
    return f"request.{project}.{target}.{digest}"


def runs_subject(project: str, target: str) -> str:
    return f"{RUNS}.{project}.{target}"


def leased_subject(project: str, target: str) -> str:
    """Of `run.leased`: one per project and target, so that the stream can be told to refuse
    what comes from an older lease than the last one here."""
    return f"{EVENTS}.{project}.{target}.run._._.leased"


def event_subject(event: AnyEvent, *, command: str = "_") -> str:
    """Where an event is published. `command` is dbt's (build, test …), for run events."""
    match event:
        case NodeStarted():
            tail = ("node", event.node.resource_type, event.node.name, "started")
        case NodeFinished():
            tail = ("node", event.node.resource_type, event.node.name, event.status)
        case NodeBatch():
            tail = ("batch", event.resource_type, event.name, event.status)
        case LogLine():
            tail = ("log", event.level, event.name, "_")
        case QueryFinished():
            tail = ("query", "_", "_", "_")
        case ArtifactWritten():
            tail = ("artifact", event.kind, "_", "written")
        case Gap():
            tail = ("gap", event.dropped_family, "_", "_")
        case Lineage():
            tail = ("lineage", event.resource_type, event.name, _last_word(event))
        case LineageChanged():
            tail = ("lineage", "_", "_", "changed")
        case Asset():
            tail = ("asset", event.resource_type, event.name, _last_word(event))
        case RunLeased():
            return leased_subject(event.project, event.target)
        case RunFinished():
            tail = ("run", command, "_", event.status)
        case _:
            tail = ("run", command, "_", event_type(event).removeprefix("run."))
    return ".".join((EVENTS, event.project, event.target, *map(token, tail)))


def _last_word(event: AnyEvent) -> str:
    """`materialized` of asset.materialized."""
    return event_type(event).partition(".")[2]


def event_headers(
    event: AnyEvent, *, content_type: str = JSON, tracestate: str = ""
) -> dict[str, str]:
    """CloudEvents 1.0 binary mode for NATS (cloudevents/spec, nats-protocol-binding), and ours."""
    headers = {
        H_MSG_ID: event.event_id,
        H_CONTENT_TYPE: content_type,
        "ce-specversion": "1.0",
        "ce-id": event.event_id,
        "ce-source": f"/dbtstream/{event.worker}",
        "ce-type": f"dev.dbtstream.{event_type(event)}.v1",
        "ce-time": rfc3339(event.time),
        "ce-subject": ce_subject(event),
        "ce-datacontenttype": content_type,
        H_RUN_ID: event.run_id,
        H_ATTEMPT: str(event.attempt),
        H_SEQ: str(event.seq),
        H_FENCE: str(event.fence),
    }
    match event:
        case NodeStarted() | NodeFinished():
            matches = event.node.matches
        case Asset():
            matches = event.matches
        case _:
            matches = []
    if matches:
        headers[H_MATCHES] = ",".join(matches)
    if event.trace_id and event.span_id:
        headers[H_TRACEPARENT] = f"00-{event.trace_id}-{event.span_id}-01"
        if tracestate:
            headers[H_TRACESTATE] = tracestate
    return headers


def trace_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The trace context among a message's headers. NATS keeps the case of their names, and
    clients that borrow HTTP's write `Traceparent`."""
    lower = {name.lower(): value for name, value in headers.items()}
    return {name: lower[name] for name in (H_TRACEPARENT, H_TRACESTATE, H_BAGGAGE) if name in lower}


def ce_subject(event: AnyEvent) -> str:
    """What the event is about: the node's unique_id, else the run. Header values are ASCII."""
    match event:
        case NodeStarted() | NodeFinished():
            about = event.node.unique_id
        case NodeBatch() | Lineage() | Asset():
            about = event.unique_id
        case _:
            about = event.run_id
    return about.encode("ascii", "backslashreplace").decode("ascii")


def rfc3339(at: datetime) -> str:
    """UTC with microseconds and a Z."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def new_run_id(at: datetime) -> str:
    """A UUIDv7 (RFC 9562, 5.7): sorts by `at` to the millisecond."""
    return _uuid7(int(at.timestamp() * 1000), secrets.randbits(74))


def run_id_of_request(stream_seq: int, stored_at: datetime) -> str:
    """The run id of a plainly published request: the same at every redelivery.

    The time is when the server stored it, the rest is a hash of its place in the stream.
    """
    digest = hashlib.blake2b(
        f"{RUNS_STREAM}/{stream_seq}/{stored_at.timestamp():.6f}".encode(), digest_size=10
    ).digest()
    return _uuid7(int(stored_at.timestamp() * 1000), int.from_bytes(digest) >> 6)


def _uuid7(unix_ms: int, random_74: int) -> str:
    value = (unix_ms & (1 << 48) - 1) << 80 | 0x7 << 76
    value |= (random_74 >> 62) << 64 | 0b10 << 62 | random_74 & (1 << 62) - 1
    return str(uuid.UUID(int=value))


def is_run_id(text: str) -> bool:
    """Whether a header or argument has the form of our run ids."""
    try:
        parsed = uuid.UUID(text)
    except ValueError:
        return False
    return parsed.version == 7 and str(parsed) == text
