"""A KV bucket: reading, and compare-and-set writing and deleting, of its keys.

`store` and `run_lease` give the keys a meaning. It goes past nats-py's KeyValue (2.16), which
reads server-placed markers as living entries, whose update drops a key's TTL and cannot tell
our own write, with its answer lost, from another's, and which cannot read many keys at once.
"""

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from dbtstream.errors import NatsRefused, NatsUnavailable
from dbtstream.nats_errors import WRONG_LAST_SEQUENCE, JetStreamRefused
from dbtstream.nats_link import NatsLink, backoff_s

_EXPECTED = "Nats-Expected-Last-Subject-Sequence"
_TTL = "Nats-TTL"
_OPERATION = "KV-Operation"
_MARKERS = (_OPERATION, "Nats-Marker-Reason")
_SUBJECT = "Nats-Subject"  # of a message that a direct get answers with
_NO_MESSAGE = 10037
_READ_TIMEOUT_S = 5.0

MARKER_TTL_S = 30 * 86400
"""What says that a key was deleted goes away after so long: a bucket must not fill with it."""

_NOTHING: Mapping[str, str] = MappingProxyType({})
_DELETED: Mapping[str, str] = MappingProxyType({_OPERATION: "DEL", _TTL: f"{MARKER_TTL_S}s"})

WORTH_A_BATCH = 20
"""An atomic batch costs the server some 25 ms whatever its size; single writes 1 to 2 ms each."""

T = TypeVar("T")


class RevisionConflict(NatsRefused):
    """Somebody else wrote `key` after `revision` was read: read again and decide again."""

    def __init__(self, key: str, revision: int) -> None:
        self.key, self.revision = key, revision
        super().__init__(f"writing {key} over revision {revision}", "it has been written since")


class Value(NamedTuple):
    """A key's last message, and the server's time of it.

    `data` is None for a deleted, purged or expired key; `deleted` tells those that a client
    deleted from those that the server has marked as expired.
    """

    data: bytes | None
    revision: int
    at: datetime
    deleted: bool = False


class _Put(NamedTuple):
    """One write of a batch, as `NatsLink.publish_batch` takes it."""

    subject: str
    payload: bytes
    headers: Mapping[str, str]


class Bucket:
    """Each call is retried through outages for `retry_for_s` (None: for ever; 0: tried once),
    then raises NatsUnavailable; NatsRefused comes at once."""

    def __init__(self, link: NatsLink, name: str, *, retry_for_s: float | None) -> None:
        self._link = link
        self._stream = f"KV_{name}"
        self._prefix = f"$KV.{name}."
        self._retry_for_s = retry_for_s

    async def write(
        self, key: str, data: bytes, revision: int | None, *, ttl_s: int | None = None
    ) -> int:
        """Over `revision` (0: it must not exist; None: whatever is there); the new one.

        The key goes away `ttl_s` after this write; without it, it stays, even if the write
        before had one. Equal data with a newer revision is taken for our own write, its answer
        lost. Raises RevisionConflict.
        """
        return await self._retried(lambda: self._write_once(key, data, revision, ttl_s))

    async def delete(self, key: str, revision: int) -> None:
        """Of `revision`, by a marker that others can read for some weeks; a key that is gone
        already is left as it is. Raises RevisionConflict."""
        await self._retried(lambda: self._delete_once(key, revision))

    async def read(self, key: str) -> Value | None:
        """Through STREAM.MSG.GET, which the leader answers; a direct get may be behind."""
        return await self._retried(lambda: self._read_once(key))

    async def read_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        """The living values of up to about a thousand keys, maybe a bit behind."""
        return await self._retried(lambda: self._read_many(keys))

    async def write_many(self, values: Mapping[str, bytes | None]) -> None:
        """Over whatever is there; all of them or none, up to 1000 keys. None deletes."""
        puts = [
            _Put(self._prefix + key, data or b"", _NOTHING if data else _DELETED)
            for key, data in values.items()
        ]
        await self._retried(lambda: self._write_many(puts))

    async def keys(self, pattern: str) -> list[str]:
        """All keys that match, such as `run.>`."""
        return await self._retried(lambda: self._keys(pattern))

    async def _write_once(
        self, key: str, data: bytes, revision: int | None, ttl_s: int | None
    ) -> int:
        headers = {} if revision is None else {_EXPECTED: str(revision)}
        if ttl_s is not None:
            headers[_TTL] = f"{ttl_s}s"
        try:
            ack = await self._link.publish(self._prefix + key, data, headers)
        except JetStreamRefused as error:
            if revision is None or error.err_code not in WRONG_LAST_SEQUENCE:
                raise
            value = await self._read_once(key)
            if value is not None and value.data == data and value.revision > revision:
                return value.revision  # our own write, whose answer was lost
            if revision == 0 and value is not None and value.data is None:
                return await self._write_once(key, data, value.revision, ttl_s)
            raise RevisionConflict(key, revision) from error
        return int(ack.seq)

    async def _delete_once(self, key: str, revision: int) -> None:
        headers = {**_DELETED, _EXPECTED: str(revision)}
        try:
            await self._link.publish(self._prefix + key, b"", headers)
        except JetStreamRefused as error:
            if error.err_code not in WRONG_LAST_SEQUENCE:
                raise
            value = await self._read_once(key)
            if value is not None and value.data is not None:
                raise RevisionConflict(key, revision) from error

    async def _write_many(self, puts: "Sequence[_Put]") -> None:
        if len(puts) >= WORTH_A_BATCH:
            await self._link.publish_batch(puts)
            return
        for put in puts:
            await self._link.publish(put.subject, put.payload, put.headers)

    async def _read_once(self, key: str) -> Value | None:
        body = {"last_by_subj": self._prefix + key}
        try:
            answer = await self._link.ask_jetstream(f"STREAM.MSG.GET.{self._stream}", body)
        except JetStreamRefused as error:
            if error.err_code == _NO_MESSAGE:
                return None
            raise
        message = answer["message"]
        headers = base64.b64decode(message.get("hdrs", "")).decode("utf-8", "replace")
        gone = any(f"\n{name}:" in headers for name in _MARKERS)
        data = None if gone else base64.b64decode(message.get("data", ""))
        # The server's nanoseconds are cut to the microseconds that datetime has.
        at = datetime.fromisoformat(message["time"])
        return Value(data, int(message["seq"]), at, f"\n{_OPERATION}:" in headers)

    async def _keys(self, pattern: str) -> list[str]:
        """100,000 come per answer."""
        keys: list[str] = []
        total = 1
        while len(keys) < total:
            answer = await self._link.ask_jetstream(
                f"STREAM.INFO.{self._stream}",
                {"subjects_filter": self._prefix + pattern, "offset": len(keys)},
            )
            subjects = answer["state"].get("subjects") or {}
            if not subjects:
                break
            keys += (subject.removeprefix(self._prefix) for subject in subjects)
            total = int(answer.get("total", len(keys)))
        return keys

    async def _read_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Last values of many keys in one request (ADR-31, `multi_last`); nats-py has no call
        for it. The answers end with a message of status 204."""
        body = json.dumps({"multi_last": [self._prefix + key for key in keys]}).encode()
        values: dict[str, bytes] = {}
        with self._link.translated(f"reading {self._stream}"):
            client = self._link.client
            inbox = client.new_inbox()
            subscription = await client.subscribe(inbox)
            try:
                await client.publish(f"$JS.API.DIRECT.GET.{self._stream}", body, reply=inbox)
                while True:
                    message = await subscription.next_msg(timeout=_READ_TIMEOUT_S)
                    headers = message.headers or {}
                    if "Status" in headers:  # 204: that was all; 404: there is none
                        return values
                    if not any(name in headers for name in _MARKERS):
                        subject = headers[_SUBJECT]
                        values[subject.removeprefix(self._prefix)] = message.data
            finally:
                await subscription.unsubscribe()

    async def _retried(self, call: Callable[[], Awaitable[T]]) -> T:
        if self._retry_for_s == 0:
            return await call()
        attempt = 0
        problem: NatsUnavailable | None = None
        try:
            async with asyncio.timeout(self._retry_for_s):
                while True:
                    try:
                        await self._link.wait_connected()
                        return await call()
                    except NatsUnavailable as error:
                        problem = error
                    attempt += 1
                    await asyncio.sleep(backoff_s(attempt))
        except TimeoutError:
            raise problem or NatsUnavailable(
                self._link.servers, f"no connection within {self._retry_for_s:g} s"
            ) from None
