"""How many requests wait for each project and target, and for how long: asked of JetStream.

Layer 2, for the gauges. The requests of a subject that are in some worker's hands are those that
its consumer has delivered; the first one behind them is the one that waits longest.
"""

import time
from collections.abc import Iterable

from dbtstream.consumer import durable_name
from dbtstream.nats_errors import JetStreamRefused
from dbtstream.nats_link import NatsLink
from dbtstream.readings import QueueDepth, Queues, Where
from dbtstream.stored_message import next_stored
from dbtstream.subjects import DEAD_STREAM, RUNS, RUNS_STREAM, runs_subject

_CONSUMER_NOT_FOUND = 10014


async def read_queues(link: NatsLink, targets: Iterable[Where]) -> Queues:
    """Raises NatsError."""
    info = await link.ask_jetstream(f"STREAM.INFO.{RUNS_STREAM}", {"subjects_filter": f"{RUNS}.>"})
    counts = info["state"].get("subjects") or {}
    depths = {}
    for project, target in targets:
        subject = runs_subject(project, target)
        if pending := counts.get(subject, 0):
            depths[project, target] = QueueDepth(pending, await _oldest_at(link, subject))
        else:
            depths[project, target] = QueueDepth(0, None)
    dead = await link.ask_jetstream(f"STREAM.INFO.{DEAD_STREAM}")
    return Queues(time.time(), depths, int(dead["state"]["messages"]))


async def _oldest_at(link: NatsLink, subject: str) -> float | None:
    try:
        consumer = await link.ask_jetstream(f"CONSUMER.INFO.{RUNS_STREAM}.{durable_name(subject)}")
    except JetStreamRefused as error:
        if error.err_code != _CONSUMER_NOT_FOUND:
            raise
        delivered = 0  # nobody serves it yet
    else:
        delivered = int(consumer["delivered"]["stream_seq"])
    waiting = await next_stored(link, RUNS_STREAM, delivered + 1, subject)
    return None if waiting is None else waiting.stored_at.timestamp()
