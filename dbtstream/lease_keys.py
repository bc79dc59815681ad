"""The keys of the bucket `dbt_leases`, and what their values say. No I/O: `run_lease` has that.

    run.<project>.<target>        a Held: who runs dbt there, one run at a time
    limit.<name>.<n>              a Held: who has this place under a named limit
    used.limit.<name>.<n>         that this place was taken in the last weeks
    leader.<name>                 which worker sends to OpenLineage: `publishers.leadership`
    position.<name>               and how far it is: `publishers.event_feed`

A Held goes away with its TTL, or a marker in its place says for some weeks that it was given up.
"""

import hashlib
from enum import StrEnum

import msgspec

from dbtstream.kv_bucket import Value
from dbtstream.subjects import kv_key

LONGEST_NAME = 200  # of a limit within its key


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """The token is new with each acquisition."""

    worker: str
    run_id: str
    token: str


class Vacancy(StrEnum):
    HELD = "held"
    GIVEN_UP = "given_up"  # by its holder, whose child is gone
    ABSENT = "absent"  # expired, or never used, or given up weeks ago


_decoder = msgspec.json.Decoder(Held)
encode_held = msgspec.json.Encoder().encode


def target_key(project: str, target: str) -> str:
    return f"run.{project}.{target}"


def limit_key(name: str, place: int) -> str:
    """A name may be a path of any length; a subject may not."""
    escaped = kv_key(name)
    if len(escaped) > LONGEST_NAME:
        digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        escaped = f"{escaped[:LONGEST_NAME].rstrip('.')}-{digest}"
    return f"limit.{escaped}.{place}"


def used_key(key: str) -> str:
    return f"used.{key}"


def held_of(value: Value | None) -> Held | None:
    if value is None or value.data is None:
        return None
    try:
        return _decoder.decode(value.data)
    except msgspec.DecodeError:  # not ours to read, and held all the same
        return Held(worker="unknown", run_id="", token="")


def vacancy_of(value: Value | None) -> Vacancy:
    """A marker of the server's own, which an operator can have it leave, means expired."""
    if value is None:
        return Vacancy.ABSENT
    if value.data is not None:
        return Vacancy.HELD
    return Vacancy.GIVEN_UP if value.deleted else Vacancy.ABSENT
