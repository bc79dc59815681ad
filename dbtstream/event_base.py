"""What all events of the contract share: the envelope, and blocks that several of them have.

Layer 0. The events themselves are in `events` (runs and nodes) and `lineage_events` (lineage and
assets); readers take them from `events`, whose `AnyEvent` is all of them.
"""

from datetime import datetime
from typing import ClassVar

import msgspec

VERSION = 1

MAX_TEXT_BYTES = 8 * 1024
"""Longer messages are cut, and the field beside them says `truncated: true`."""


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", omit_defaults=False):
    """The envelope: fields that every event has.

    `event_id` is `<run_id>.<attempt>.<seq>` and is the Nats-Msg-Id, so an event is stored
    once. `seq` counts 1, 2, 3 … per run over all its attempts.
    """

    family: ClassVar[str]

    event_id: str
    time: datetime
    seq: int
    project: str
    target: str
    run_id: str
    attempt: int
    fence: int
    worker: str
    invocation_id: str | None = None
    engine: str | None = None  # "dbt-core 1.11.16"; null until the child said hello
    trace_id: str | None = None
    span_id: str | None = None
    labels: dict[str, str] = {}


class ErrorBlock(msgspec.Struct, frozen=True, kw_only=True, rename={"class_": "class"}):
    """What went wrong. `class` is the Python class that dbt raised, where one is known."""

    class_: str
    message: str
    dbt_code: str | None = None
    truncated: bool = False


class Relation(msgspec.Struct, frozen=True, kw_only=True):
    """The table or view that a node builds or reads; `relation_name` as dbt renders it."""

    database: str | None = None
    schema: str | None = None
    identifier: str | None = None
    relation_name: str | None = None


class FreshnessBlock(msgspec.Struct, frozen=True, kw_only=True):
    """Of a source in `dbt source freshness`. Thresholds and age are seconds."""

    max_loaded_at: datetime | None = None
    snapshotted_at: datetime | None = None
    age_s: float | None = None
    warn_after_s: float | None = None
    error_after_s: float | None = None
    filter: str | None = None
