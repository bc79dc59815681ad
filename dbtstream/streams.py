"""The streams and buckets on the server: what they must be, made so or compared.

`dbtstream setup` and `serve` call `ensure_streams`; `dbtstream check`, and `serve` with
`streams.manage = false`, call `check_streams`. It speaks the JSON API directly, so that an
update keeps what an operator has set and we do not know. It never deletes a stream.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from dbtstream.config import StreamsConfig
from dbtstream.errors import NatsRefused
from dbtstream.nats_errors import JetStreamRefused, NobodyListens
from dbtstream.nats_link import NatsLink
from dbtstream.subjects import (
    DEAD,
    DEAD_STREAM,
    EVENTS,
    EVENTS_STREAM,
    LINEAGE_BUCKET,
    LIVE,
    RUNS,
    RUNS_STREAM,
    STATE_BUCKET,
)

LEASES_BUCKET = "dbt_leases"
ARTIFACTS_BUCKET = "dbt_artifacts"
ADVISORIES_STREAM = "DBT_ADVISORIES"
ADVISORIES = f"$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.{RUNS_STREAM}"
"""Then a dot and the consumer: the server gives up handing out a request (`stuck_requests`)."""

DUPLICATE_WINDOW_RUNS_S = 2 * 3600.0
DUPLICATE_WINDOW_EVENTS_S = 600.0

ADVISORIES_MAX_AGE_S = 7 * 86400.0
ADVISORIES_MAX_MSGS = 10_000

API_LEVEL = 2  # nats-server 2.12: atomic batches and message schedules
OLDEST_SERVER = "2.12"

_NOT_FOUND = 10059


@dataclass(frozen=True, slots=True)
class Wanted:
    """One stream. `needed`: we do not work without it. `sized`: the config's choice."""

    name: str
    needed: dict[str, Any]
    sized: dict[str, Any] = field(default_factory=dict)

    @property
    def what(self) -> str:
        """As people and the nats CLI call it."""
        for prefix, kind in (("KV_", "KV bucket"), ("OBJ_", "object store")):
            if self.name.startswith(prefix):
                return f"{kind} {self.name.removeprefix(prefix)}"
        return f"stream {self.name}"


def wanted_streams(config: StreamsConfig) -> list[Wanted]:
    replicas = {"num_replicas": config.replicas}
    kv = {
        "storage": "file",
        "discard": "new",
        "max_msgs_per_subject": 1,
        "allow_rollup_hdrs": True,
        "deny_delete": True,
        "allow_msg_ttl": True,
    }
    return [
        Wanted(
            RUNS_STREAM,
            {
                # All depths: a request on a malformed subject is rejected by a worker, not lost.
                "subjects": [f"{RUNS}.>"],
                "retention": "workqueue",
                "storage": "file",
                "discard": "new",
                "allow_direct": True,
                "allow_msg_ttl": True,
                # Without message schedules: a server refuses them beside `discard: new` (10052),
                # and a full queue that forgets its oldest requests would be worse.
            },
            {
                # No max_msg_size: a worker rejects what is too large, so that it gets an answer.
                "max_msgs": config.runs_max_msgs,
                "duplicate_window": _ns(DUPLICATE_WINDOW_RUNS_S),
                **replicas,
            },
        ),
        Wanted(
            EVENTS_STREAM,
            {
                "subjects": [f"{EVENTS}.>"],
                "retention": "limits",
                "storage": "file",
                "allow_atomic": True,
                "allow_direct": True,
                "republish": {"src": f"{EVENTS}.>", "dest": f"{LIVE}.>"},
            },
            {
                "max_age": _ns(config.events_max_age_s),
                "max_bytes": config.events_max_bytes,
                "duplicate_window": _ns(min(DUPLICATE_WINDOW_EVENTS_S, config.events_max_age_s)),
                **replicas,
            },
        ),
        Wanted(
            DEAD_STREAM,
            {"subjects": [f"{DEAD}.>"], "retention": "limits", "storage": "file"},
            {"max_age": _ns(config.dead_max_age_s), **replicas},
        ),
        Wanted(
            # The server says it once, to whoever listens just then; here it waits for a worker.
            ADVISORIES_STREAM,
            {"subjects": [f"{ADVISORIES}.*"], "retention": "limits", "storage": "file"},
            {
                "max_age": _ns(ADVISORIES_MAX_AGE_S),
                "max_msgs": ADVISORIES_MAX_MSGS,
                **replicas,
            },
        ),
        Wanted(
            f"KV_{STATE_BUCKET}",
            {
                **kv,
                "subjects": [f"$KV.{STATE_BUCKET}.>"],
                "allow_direct": True,
                "allow_atomic": True,  # node states are written many at once
            },
            {"max_age": _ns(config.state_max_age_s), **replicas},
        ),
        Wanted(
            # No max_age: a model that never changes is told once, and its lineage stays readable.
            f"KV_{LINEAGE_BUCKET}",
            {
                **kv,
                "subjects": [f"$KV.{LINEAGE_BUCKET}.>"],
                "allow_direct": True,
                "allow_atomic": True,
            },
            replicas,
        ),
        Wanted(
            # No max_age and no subject_delete_marker_ttl: a lease's TTL is its own, and nats-py
            # reads a marker as a living entry.
            f"KV_{LEASES_BUCKET}",
            {**kv, "subjects": [f"$KV.{LEASES_BUCKET}.>"]},
            replicas,
        ),
        Wanted(
            f"OBJ_{ARTIFACTS_BUCKET}",
            {
                "subjects": [f"$O.{ARTIFACTS_BUCKET}.C.>", f"$O.{ARTIFACTS_BUCKET}.M.>"],
                "storage": "file",
                "discard": "new",
                "allow_rollup_hdrs": True,
                "allow_direct": True,
                "allow_msg_ttl": True,  # a target's state outlives max_age, see artifact_store
            },
            {"max_age": _ns(config.events_max_age_s), **replicas},
        ),
    ]


async def ensure_streams(link: NatsLink, config: StreamsConfig) -> list[str]:
    """Create what is missing and update what differs; a line about each, for people.

    Raises NatsRefused with what to do where the server does not allow it.
    """
    await _check_server(link)
    return [await _ensure(link, wanted) for wanted in wanted_streams(config)]


async def check_streams(link: NatsLink, config: StreamsConfig) -> list[str]:
    """What is missing or does not do, as sentences; [] when we can work. Changes nothing.

    Sizes and ages that differ from the config are an operator's choice and no problem.
    """
    await _check_server(link)
    problems = []
    for wanted in wanted_streams(config):
        actual = await _stream_config(link, wanted.name)
        if actual is None:
            problems.append(f"{wanted.what} is missing (`dbtstream setup` creates it)")
        elif differences := _differences(actual, wanted.needed):
            problems.append(f"{wanted.what} differs: {', '.join(differences)}")
    return problems


async def _ensure(link: NatsLink, wanted: Wanted) -> str:
    everything = {**wanted.needed, **wanted.sized}
    actual = await _stream_config(link, wanted.name)
    if actual is None:
        await link.ask_jetstream(
            f"STREAM.CREATE.{wanted.name}", {"name": wanted.name, **everything}
        )
        return f"{wanted.what}: created"
    differences = _differences(actual, everything)
    if not differences:
        return f"{wanted.what}: as it should be"
    try:
        await link.ask_jetstream(f"STREAM.UPDATE.{wanted.name}", {**actual, **everything})
    except NatsRefused as error:
        raise NatsRefused(
            f"updating {wanted.what} ({', '.join(differences)})",
            error.problem,
            f"it cannot be changed in place: back it up and remove it "
            f"(nats stream rm {wanted.name}), then run `dbtstream setup` again",
        ) from error
    return f"{wanted.what}: updated ({', '.join(differences)})"


def _differences(actual: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """`max_msgs is 5, should be 10`; what the server leaves out of its answer is zero."""
    return [
        f"{key} is {json.dumps(actual.get(key))}, should be {json.dumps(value)}"
        for key, value in wanted.items()
        if not _same(actual.get(key), value)
    ]


def _same(actual: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return isinstance(actual, dict) and all(
            _same(actual.get(key), value) for key, value in wanted.items()
        )
    return bool(actual == wanted) or (not actual and not wanted)


async def _check_server(link: NatsLink) -> None:
    try:
        info = await link.ask_jetstream("INFO")
    except NobodyListens as error:
        raise NatsRefused(
            "using JetStream",
            f"{', '.join(link.servers)} has none",
            "start nats-server with -js or a jetstream {} block",
        ) from error
    if int(info.get("api", {}).get("level", 0)) < API_LEVEL:
        version = link.client.connected_server_version
        raise NatsRefused(
            "using JetStream",
            f"nats-server {version.major}.{version.minor} is too old",
            f"{OLDEST_SERVER} or newer is needed, for atomic batches",
        )


async def _stream_config(link: NatsLink, name: str) -> dict[str, Any] | None:
    try:
        answer = await link.ask_jetstream(f"STREAM.INFO.{name}")
    except JetStreamRefused as error:
        if error.err_code == _NOT_FOUND:
            return None
        raise
    config: dict[str, Any] = answer["config"]
    return config


def _ns(seconds: float) -> int:
    return int(seconds * 1_000_000_000)
