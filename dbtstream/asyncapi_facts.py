"""What is told of the contract beside the payloads: tokens, headers, streams, buckets. Pure.

`asyncapi` makes a document of it, and tests compare every word with `subjects`, `streams`,
`dead_letters` and `control`, which this layer does not import.
"""

from typing import Any

from dbtstream import subjects
from dbtstream.messages import RejectCode

DESCRIPTION = """\
dbtstream runs dbt Core and says over NATS what every node of the project did.
Requests go in, events come out. README.md beside this file says what you can rely on.

Events are CloudEvents 1.0 in binary mode: a header for each attribute (`ce-id`, `ce-type` …), the
data as the body. Bodies are JSON, or MessagePack where the project's config says so; the header
Content-Type tells. Ignore fields and event types that you do not know."""

PROJECT_TARGET = {
    "project": {
        "description": "The project's name in the worker's config: [A-Za-z0-9_-], at most 64.",
        "examples": ["shop"],
    },
    "target": {
        "description": "The dbt target, such as dev or prod: [A-Za-z0-9_-], at most 64.",
        "examples": ["prod"],
    },
}

EVENT_TOKENS = {
    "family": {
        "description": "What the event is about. New families may come.",
        "examples": [
            "run",
            "node",
            "batch",
            "lineage",
            "asset",
            "log",
            "query",
            "artifact",
            "gap",
        ],
    },
    "kind": {
        "description": "Of node, batch, lineage and asset events the resource type; of run events "
        "dbt's command, if it is known; of a log its level, of an artifact its kind, of a gap the "
        "family that was dropped. `_` where there is none.",
        "examples": ["model", "test", "source", "build", "_"],
    },
    "name": {
        "description": "The node's name (of asset.checked: the asset's), dbt's name of a log "
        "event, else `_`. Spaces, dots and wildcards are `_`; cut at 100 characters.",
        "examples": ["orders", "_"],
    },
    "status": {
        "description": "How it ended, or the word of the event's type after the dot.",
        "examples": ["success", "error", "fail", "skipped", "started", "materialized", "checked"],
    },
}

RUNS_CHANNEL = "Requests. Those of a project and target run one after another. Anybody may publish."
EVENTS_CHANNEL = (
    "Every event, stored once: read it with a JetStream consumer. The x-subject of a message says "
    "what its last four tokens are."
)
LIVE_CHANNEL = (
    "The same events, by the server, when they are stored: for core subscriptions. With the "
    "headers Nats-Stream, Nats-Subject, Nats-Sequence and Nats-Last-Sequence."
)
DEAD_CHANNEL = "Requests that could not run, with their bytes."
REPLIES_CHANNEL = "Where the asker wants it: the reply subject of the NATS message."

CONTROL_QUEUE = "q"
"""Of the NATS micro service: one worker answers."""

SECURITY = {
    "password": {"type": "userPassword", "description": "A user of the server."},
    "nkey": {
        "type": "asymmetricEncryption",
        "description": "An nkey, or a credentials file with a JWT.",
    },
}

_RUN_TAIL = "run.{command}._"
_LINEAGE_TAIL = "lineage.{resource_type}.{name}"
_ASSET_TAIL = "asset.{resource_type}.{name}"

SUBJECT_TAILS = {
    "node.started": "node.{resource_type}.{name}.started",
    "node.finished": "node.{resource_type}.{name}.{status}",
    "node.batch": "batch.{resource_type}.{name}.{status}",
    "run.leased": "run._._.leased",
    "run.finished": f"{_RUN_TAIL}.{{status}}",
    "log": "log.{level}.{name}._",
    "query.finished": "query._._._",
    "artifact.written": "artifact.{kind}._.written",
    "gap": "gap.{dropped_family}._._",
    "lineage.changed": "lineage._._.changed",
}
"""The last four tokens of an event's subject, where they do not follow from its type."""

DEAD_HEADERS = {
    "dbtstream-run-id": "The run that it would have been.",
    "dbtstream-code": f"Why: {', '.join(RejectCode)}, or attempts_exhausted.",
    "dbtstream-message": "The same in a sentence.",
    "dbtstream-field": "Of the request, which field is wrong, where it is one.",
    "dbtstream-subject": "Where the request was published.",
    "dbtstream-request-seq": "Its sequence in DBT_RUNS.",
    "dbtstream-truncated": "The bytes that it had, where not all were kept.",
}

EVENT_HEADERS = {
    "Nats-Msg-Id": "event_id: <run_id>.<attempt>.<seq>. The stream drops what has one it knows.",
    "Content-Type": "application/json or application/msgpack.",
    "ce-specversion": "CloudEvents 1.0, binary mode.",
    "ce-id": "event_id.",
    "ce-source": "/dbtstream/<worker>.",
    "ce-type": "dev.dbtstream.<type>.v1.",
    "ce-time": "time.",
    "ce-subject": "The node's or asset's unique_id, else the run id.",
    "ce-datacontenttype": "As Content-Type.",
    "dbtstream-run-id": "run_id.",
    "dbtstream-attempt": "attempt.",
    "dbtstream-seq": "seq.",
    "dbtstream-fence": "fence.",
    "dbtstream-matches": "Of node and asset events: the project's selectors that select the node, "
    "with commas between. Absent where none does.",
    "traceparent": "W3C trace context of the span that the event belongs to.",
    "tracestate": "Goes with traceparent.",
}
SOMETIMES = frozenset({"dbtstream-matches", "traceparent", "tracestate"})

REQUEST_HEADERS = {
    "Nats-Msg-Id": "Stands in for request_id: the same one gives the same run.",
    "traceparent": "Puts the run into the trace of its cause.",
    "tracestate": "Goes with traceparent.",
    "baggage": "W3C. The keys that the daemon's config names become attributes of the run.",
}

_DAY_S = 86_400

JETSTREAM: dict[str, Any] = {
    "streams": {
        subjects.RUNS_STREAM: {
            "subjects": [f"{subjects.RUNS}.>"],
            "retention": "workqueue",
            "storage": "file",
            "discard": "new",
            "max_msgs": 10_000,
            "duplicate_window_s": 7_200,
            "message_id": "request_id, or what the sender chose",
        },
        subjects.EVENTS_STREAM: {
            "subjects": [f"{subjects.EVENTS}.>"],
            "retention": "limits",
            "storage": "file",
            "max_age_s": 14 * _DAY_S,
            "max_bytes": 2 * 1024**3,
            "duplicate_window_s": 600,
            "message_id": "event_id",
            "republish": {"src": f"{subjects.EVENTS}.>", "dest": f"{subjects.LIVE}.>"},
        },
        subjects.DEAD_STREAM: {
            "subjects": [f"{subjects.DEAD}.>"],
            "retention": "limits",
            "storage": "file",
            "max_age_s": 30 * _DAY_S,
        },
    },
    "buckets": {
        subjects.STATE_BUCKET: {
            "description": "How each run and node is now, or ended.",
            "max_age_s": 30 * _DAY_S,
            "keys": {"run.<run_id>": "reply.run_view"},
        },
        subjects.LINEAGE_BUCKET: {
            "description": "The graph as it is now: the last lineage events of each node, kept "
            "for as long as the bucket is there. Bytes that a key may not have are =XX.",
            "keys": {
                "declared.<project>.<target>.<unique_id>": "event.lineage.declared",
                "observed.<project>.<target>.<unique_id>": "event.lineage.observed",
            },
        },
    },
}
"""What a stranger may rely on of `streams`. Sizes and ages are the defaults: an operator may
have chosen others. Other keys of the buckets, and other buckets, are for dbtstream itself."""

VERBS = {
    "submit": (
        "Publish a request and say what became of it.",
        ("reply.run_accepted", "reply.run_rejected", "reply.error"),
    ),
    "cancel": (
        "Cancel a run that waits or is under way.",
        ("reply.cancel_accepted", "reply.error"),
    ),
    "get": ("What is known of one run.", ("reply.run_view", "reply.error")),
    "list": ("Runs, newest first, and how many wait.", ("reply.run_list", "reply.error")),
}

BROADCASTS = {
    "worker_status": (
        subjects.CONTROL_STATUS,
        "How each worker is, and what it does. All of them answer, so read more than one reply.",
        ("reply.worker_status",),
    ),
}
"""By the name of the request; answered by every worker, not by one of them."""


def tail(event_type: str) -> str:
    """The last four tokens of the subject of an event of that type."""
    family, _, word = event_type.partition(".")
    usual = {"run": _RUN_TAIL, "lineage": _LINEAGE_TAIL, "asset": _ASSET_TAIL}
    return SUBJECT_TAILS.get(event_type) or f"{usual[family]}.{word}"
