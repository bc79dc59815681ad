"""A bucket of the Object Store: whole files in, whole files out.

`artifact_store` gives the objects their names. They are those of ADR-20, which `nats object get`
and nats-py's ObjectStore read. This goes past the latter (2.16), which takes a denied publish
for an outage, begins a file anew after a broken connection and leaves its first half in the
bucket, and reads through a consumer, which a worker would have to be allowed to make.

It never holds a file in memory: manifests reach 200 MB.
"""

import asyncio
import base64
import hashlib
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import msgspec

from dbtstream.errors import NatsError, NatsRefused, NatsUnavailable
from dbtstream.nats_errors import WRONG_LAST_SEQUENCE, JetStreamRefused
from dbtstream.nats_link import NatsLink, backoff_s
from dbtstream.subjects import H_MSG_ID, rfc3339
from dbtstream.workspace import open_private

logger = logging.getLogger(__name__)

CHUNK_BYTES = 128 * 1024  # as every client of the Object Store has it
INCOMPLETE_TRIES = 3
"""An object lacks a chunk while it is replaced, and on a replica that is behind; or it expires."""

CLEAR_S = 5.0

_API = "$JS.API"
_EXPECTED = "Nats-Expected-Last-Subject-Sequence"
_NEVER_EXPIRES = {"Nats-TTL": "never"}  # whatever the stream's max_age (ADR-43)
_DIGEST = "SHA-256="
_NO_MESSAGE = 10037

T = TypeVar("T")


class Source(Protocol):
    """A file, open for reading. It is read in threads, one call at a time."""

    def read(self, size: int, /) -> bytes: ...


class ObjectInfo(msgspec.Struct, frozen=True):
    """What we use of an object's info."""

    nuid: str = ""
    size: int = 0
    chunks: int = 0
    digest: str = ""
    deleted: bool = False


class _Incomplete(NatsUnavailable):
    """The chunks are not those that the object's info tells of."""


_decode_info = msgspec.json.Decoder(ObjectInfo).decode


class ObjectBucket:
    """Who writes an object is its only writer at that time."""

    def __init__(self, link: NatsLink, name: str) -> None:
        self._link = link
        self._name = name
        self._stream = f"OBJ_{name}"

    async def put(
        self, name: str, source: Source, about: Mapping[str, Any], *, expires: bool = True
    ) -> int:
        """Store what is left of `source` as the object of that name; its size.

        Goes on after an outage where it was, for as long as it takes. There is no object, or
        still the old one, until all of it is stored. `about` joins the object's info. Raises
        NatsRefused, and what `source` raises.
        """
        before, chunk_bytes = await self._retried(lambda: self._begin(name), None)
        nuid = secrets.token_hex(11)
        headers = {} if expires else _NEVER_EXPIRES
        try:
            info = await self._put_chunks(nuid, source, chunk_bytes, headers)
            info |= {"name": name, "bucket": self._name, **about}
            await self._link.publish_until_stored(
                self._info_subject(name),
                json.dumps(info).encode(),
                {H_MSG_ID: f"{nuid}.info", "Nats-Rollup": "sub", **headers},
            )
        except BaseException:
            await self._clear_away(name, nuid)
            raise
        if before is not None and not before.deleted:
            await self._clear_away(name, before.nuid)
        return int(info["size"])

    async def fetch(self, name: str, path: Path, *, retry_for_s: float | None) -> bool:
        """Write an object into a file of mode 0600, at once or not at all; whether there is one.

        Raises NatsRefused, NatsUnavailable after `retry_for_s`, and OSError.
        """
        for attempt in range(1, INCOMPLETE_TRIES + 1):
            try:
                return await self._retried(lambda: self._fetch_once(name, path), retry_for_s)
            except _Incomplete:
                await asyncio.sleep(backoff_s(attempt))
        logger.warning(
            "a stored object is not complete",
            extra={"action": "object.incomplete", "object": f"{self._name}/{name}"},
        )
        return False

    # -- storing -------------------------------------------------------------------------

    async def _begin(self, name: str) -> tuple[ObjectInfo | None, int]:
        """What has the name now, and which size of chunks the server takes."""
        info = await self._info(name)
        return info, min(CHUNK_BYTES, self._link.client.max_payload // 2)

    async def _put_chunks(
        self, nuid: str, source: Source, chunk_bytes: int, headers: Mapping[str, str]
    ) -> dict[str, Any]:
        """All of `source`, under a subject of its own; what the object's info says of it."""
        digest, size, chunks, last = hashlib.sha256(), 0, 0, 0
        while chunk := await asyncio.to_thread(_read, source, chunk_bytes, digest):
            last = await self._put_chunk(nuid, chunk, chunks, last, headers)
            size += len(chunk)
            chunks += 1
        return {
            "options": {"max_chunk_size": chunk_bytes},
            "nuid": nuid,
            "size": size,
            "mtime": rfc3339(datetime.now(UTC)),
            "chunks": chunks,
            "digest": _digest_text(digest),
        }

    async def _put_chunk(
        self, nuid: str, chunk: bytes, number: int, last: int, headers: Mapping[str, str]
    ) -> int:
        """Behind the one of sequence `last`; its own."""
        try:
            ack = await self._link.publish_until_stored(
                self._chunk_subject(nuid),
                chunk,
                {H_MSG_ID: f"{nuid}.{number}", _EXPECTED: str(last), **headers},
            )
        except JetStreamRefused as error:
            if error.err_code not in WRONG_LAST_SEQUENCE:
                raise
            # Nobody else writes here: it is this chunk that is stored, and the answer was lost
            # in an outage that was longer than the duplicate window.
            return await self._retried(lambda: self._last_chunk(nuid), None)
        return int(ack.seq)

    async def _last_chunk(self, nuid: str) -> int:
        body = {"last_by_subj": self._chunk_subject(nuid)}
        answer = await self._link.ask_jetstream(f"STREAM.MSG.GET.{self._stream}", body)
        return int(answer["message"]["seq"])

    async def _clear_away(self, name: str, nuid: str) -> None:
        """Chunks that no object has; also when we are being cancelled, and so not for long."""
        body = {"filter": self._chunk_subject(nuid)}
        try:
            await self._retried(
                lambda: self._link.ask_jetstream(f"STREAM.PURGE.{self._stream}", body), CLEAR_S
            )
        except NatsError as error:
            logger.warning(
                "chunks of an object stay behind",
                extra={
                    "action": "object.chunks_left",
                    "object": f"{self._name}/{name}",
                    "error": str(error),
                },
            )

    # -- fetching ------------------------------------------------------------------------

    async def _fetch_once(self, name: str, path: Path) -> bool:
        info = await self._info(name)
        if info is None or info.deleted or not info.nuid:
            return False
        part = path.with_name(f".{path.name}.part")
        file = await asyncio.to_thread(open_private, part)
        try:
            await self._write_chunks(name, info, file)
            await asyncio.to_thread(_put_in_place, file, part, path)
        finally:
            await asyncio.to_thread(_clear, file, part)
        return True

    async def _write_chunks(self, name: str, info: ObjectInfo, file: BinaryIO) -> None:
        digest, sequence = hashlib.sha256(), 0
        for _ in range(info.chunks):
            body = {"seq": sequence + 1, "next_by_subj": self._chunk_subject(info.nuid)}
            reply = await self._link.request(
                f"{_API}.DIRECT.GET.{self._stream}", json.dumps(body).encode()
            )
            headers = reply.headers or {}
            if "Nats-Sequence" not in headers:
                raise self._incomplete(name, "a chunk is missing")
            sequence = int(headers["Nats-Sequence"])
            await asyncio.to_thread(_write, file, reply.data, digest)
        if _digest_text(digest) != info.digest:
            raise self._incomplete(name, "its digest differs")

    def _incomplete(self, name: str, problem: str) -> _Incomplete:
        return _Incomplete(self._link.servers, f"reading {name}: {problem}")

    # -- asking --------------------------------------------------------------------------

    def _info_subject(self, name: str) -> str:
        return f"$O.{self._name}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"

    def _chunk_subject(self, nuid: str) -> str:
        return f"$O.{self._name}.C.{nuid}"

    async def _info(self, name: str) -> ObjectInfo | None:
        """From the leader; a direct get may be behind."""
        body = {"last_by_subj": self._info_subject(name)}
        try:
            answer = await self._link.ask_jetstream(f"STREAM.MSG.GET.{self._stream}", body)
        except JetStreamRefused as error:
            if error.err_code == _NO_MESSAGE:
                return None
            raise
        data = base64.b64decode(answer["message"].get("data", ""))
        try:
            return _decode_info(data)
        except msgspec.DecodeError as error:
            raise NatsRefused(f"reading {name}", f"its info is not an object's: {error}") from error

    async def _retried(self, call: Callable[[], Awaitable[T]], retry_for_s: float | None) -> T:
        attempt = 0
        problem: NatsUnavailable | None = None
        try:
            async with asyncio.timeout(retry_for_s):
                while True:
                    try:
                        await self._link.wait_connected()
                        return await call()
                    except _Incomplete:
                        raise
                    except NatsUnavailable as error:
                        problem = error
                    attempt += 1
                    await asyncio.sleep(backoff_s(attempt))
        except TimeoutError:
            raise problem or NatsUnavailable(
                self._link.servers, f"no connection within {retry_for_s:g} s"
            ) from None


def _digest_text(digest: "hashlib._Hash") -> str:
    return _DIGEST + base64.urlsafe_b64encode(digest.digest()).decode()


# Blocking, and so in threads.


def _read(source: Source, size: int, digest: "hashlib._Hash") -> bytes:
    chunk = source.read(size)
    digest.update(chunk)
    return chunk


def _write(file: BinaryIO, data: bytes, digest: "hashlib._Hash") -> None:
    digest.update(data)
    file.write(data)


def _put_in_place(file: BinaryIO, part: Path, path: Path) -> None:
    file.close()
    part.replace(path)


def _clear(file: BinaryIO, part: Path) -> None:
    file.close()
    part.unlink(missing_ok=True)
