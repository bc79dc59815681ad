"""One message of a stream: read from the stream's leader, or deleted.

For `dead_letters`, `stuck_requests`, `queue_watch` and `publishers.fence`. It asks over the
link, and not through nats-py's own calls, which turn a denied request into a timeout.
"""

import base64
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from dbtstream.errors import NatsUnavailable
from dbtstream.nats_errors import JetStreamRefused
from dbtstream.nats_link import NatsLink

NO_STREAM = 10059
_NO_MESSAGE = frozenset({10037, 10043})


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """As it was published, with what the stream knows of it."""

    subject: str
    data: bytes
    headers: dict[str, str]
    stream_seq: int
    stored_at: datetime


async def stored_message(link: NatsLink, stream: str, seq: int) -> StoredMessage | None:
    """None if there is none of that sequence, or no longer. Raises NatsError."""
    return await _read(link, stream, {"seq": seq})


async def next_stored(link: NatsLink, stream: str, seq: int, subject: str) -> StoredMessage | None:
    """The first one from sequence `seq` on that `subject` (or filter) fits. Raises NatsError."""
    return await _read(link, stream, {"seq": seq, "next_by_subj": subject})


async def last_stored(link: NatsLink, stream: str, subject: str) -> StoredMessage | None:
    """The last one that `subject` (or filter) fits. Raises NatsError."""
    return await _read(link, stream, {"last_by_subj": subject})


async def _read(link: NatsLink, stream: str, which: dict[str, Any]) -> StoredMessage | None:
    answer = await _api(link, f"STREAM.MSG.GET.{stream}", which)
    if answer is None:
        return None
    message = answer["message"]
    return StoredMessage(
        subject=message["subject"],
        data=base64.b64decode(message.get("data", "")),
        headers=_headers(base64.b64decode(message.get("hdrs", ""))),
        stream_seq=int(message["seq"]),
        stored_at=_time(message["time"]),
    )


def _time(text: str) -> datetime:
    """The server's nanoseconds, rounded exactly as nats-py rounds those of a delivered message:
    run ids are derived from either."""
    seconds, _, fraction = text.removesuffix("Z").partition(".")
    whole = int(datetime.fromisoformat(f"{seconds}+00:00").timestamp())
    return datetime.fromtimestamp((whole * 10**9 + int(fraction.ljust(9, "0"))) / 1e9, UTC)


async def delete_stored(link: NatsLink, stream: str, seq: int) -> bool:
    """Whether it was there. Raises NatsError."""
    try:
        return await _api(link, f"STREAM.MSG.DELETE.{stream}", {"seq": seq}) is not None
    except NatsUnavailable:
        # A sequence past the last one is "stream store EOF", code 500 (nats-server 2.15.1).
        if await stored_message(link, stream, seq) is None:
            return False
        raise


async def _api(link: NatsLink, verb: str, body: dict[str, Any]) -> dict[str, Any] | None:
    """The answer; None for `no such message`."""
    try:
        answer: dict[str, Any] = await link.ask_jetstream(verb, body)
    except JetStreamRefused as error:
        if error.err_code in _NO_MESSAGE:
            return None
        raise
    return answer


def _headers(block: bytes) -> dict[str, str]:
    """`NATS/1.0`, then `name: value` lines."""
    lines = block.decode("utf-8", "replace").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if ":" in line)
    return {name: value.strip() for name, _, value in pairs}
