"""The file of one outbox: blocking calls only, each made in a thread by `outbox`.

    magic 8 bytes | offset of the first record that is not acked, 8 bytes | record …
    record: length 4 bytes | crc32 of the body 4 bytes | body (MessagePack array)

All numbers are little-endian. Records are only appended, whole groups in one write. There is
no fsync: a killed daemon loses nothing of what was written, a machine that loses power may
lose its last seconds, and with them the run's own process.
"""

import contextlib
import fcntl
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

MAGIC = b"dbtsOB01"
HEADER_BYTES = 16
_POSITION = struct.Struct("<Q")
_PREFIX = struct.Struct("<II")
_SCAN_BYTES = 1024 * 1024
SUFFIX = ".outbox"


@dataclass(frozen=True, slots=True)
class Record:
    """An event on its way out. `seq` grows by one per event of a run, over all its attempts."""

    seq: int
    family: str
    subject: str
    headers: dict[str, str]
    payload: bytes


class Stored(msgspec.Struct, frozen=True, array_like=True):
    """A record's body. `at` is the Unix time of its put."""

    at: float
    seq: int
    family: str
    subject: str
    headers: dict[str, str]
    payload: bytes

    def record(self) -> Record:
        return Record(self.seq, self.family, self.subject, self.headers, self.payload)


class OutboxCorrupt(ValueError):
    """The bytes at `offset` are not a record."""

    def __init__(self, path: Path, offset: int, problem: str) -> None:
        self.path, self.offset = path, offset
        super().__init__(f"{path} at byte {offset}: {problem}")


@dataclass(frozen=True, slots=True)
class Contents:
    """What was found on opening: whole records from `position` to `end`, the rest cut off."""

    position: int
    end: int
    records: int
    cut_bytes: int


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Stored] = msgspec.msgpack.Decoder(Stored)


def frame(record: Record, at: float) -> bytes:
    body = _encoder.encode(
        (at, record.seq, record.family, record.subject, record.headers, record.payload)
    )
    return _PREFIX.pack(len(body), zlib.crc32(body)) + body


class OutboxFile:
    """Holds the file locked while open, so that a second daemon does not drain it too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    @property
    def is_open(self) -> bool:
        return self._fd >= 0

    def open(self, *, create: bool = True) -> Contents:
        """Open or make it, check every record, cut what is not whole. Raises OSError."""
        if create:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        fd = os.open(self.path, flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._fd = fd
            return self._examine()
        except BaseException:
            self._fd = -1
            os.close(fd)
            raise

    def append(self, offset: int, frames: list[bytes]) -> None:
        """Write all at `offset`, or leave the file ending there and raise OSError."""
        data = memoryview(b"".join(frames))
        at = offset
        try:
            while data:
                written = os.pwrite(self._fd, data, at)
                at += written
                data = data[written:]
        except OSError:
            # Half a group must not be there when the next try writes something else.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, offset)
            raise

    def read(self, offset: int, end: int, max_bytes: int) -> list[tuple[Stored, int]]:
        """Records from `offset`, each with the offset after it; at least one if there is one."""
        data = self._pread(offset, min(max_bytes, end - offset))
        if len(data) >= _PREFIX.size:
            first = _PREFIX.size + _PREFIX.unpack_from(data)[0]
            if len(data) < first <= end - offset:
                data = self._pread(offset, first)
        found: list[tuple[Stored, int]] = []
        at = 0
        while at + _PREFIX.size <= len(data):
            length, _ = _PREFIX.unpack_from(data, at)
            stop = at + _PREFIX.size + length
            if stop > len(data):
                break
            try:
                found.append((self._decode(data[at:stop], offset + at), offset + stop))
            except OutboxCorrupt:
                if found:
                    break  # the next read begins here, and raises
                raise
            at = stop
        if not found and offset < end:
            raise OutboxCorrupt(self.path, offset, "not a whole record")
        return found

    def write_position(self, position: int) -> None:
        os.pwrite(self._fd, _POSITION.pack(position), len(MAGIC))

    def reset(self) -> None:
        """Empty it. First the records, then the position: a position past the end reads as
        "all acked", while the other way round all would be sent again."""
        os.ftruncate(self._fd, HEADER_BYTES)
        self.write_position(HEADER_BYTES)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.close()

    def _examine(self) -> Contents:
        head = self._pread(0, HEADER_BYTES)
        if len(head) < HEADER_BYTES:  # new, or its maker died at once
            os.pwrite(self._fd, MAGIC + _POSITION.pack(HEADER_BYTES), 0)
            return Contents(HEADER_BYTES, HEADER_BYTES, 0, 0)
        if head[: len(MAGIC)] != MAGIC:
            raise OutboxCorrupt(self.path, 0, f"starts with {head[:8]!r}, not {MAGIC!r}")
        size = os.fstat(self._fd).st_size
        position = _POSITION.unpack_from(head, len(MAGIC))[0]
        if position >= size:
            return Contents(size, size, 0, 0)
        records, end = 0, max(position, HEADER_BYTES)
        with contextlib.suppress(OutboxCorrupt):
            while found := self.read(end, size, _SCAN_BYTES):
                records, end = records + len(found), found[-1][1]
        if end < size:
            os.ftruncate(self._fd, end)
        return Contents(max(position, HEADER_BYTES), end, records, size - end)

    def _pread(self, offset: int, count: int) -> bytes:
        parts = []
        while count > 0 and (part := os.pread(self._fd, count, offset)):
            parts.append(part)
            offset, count = offset + len(part), count - len(part)
        return b"".join(parts)

    def _decode(self, framed: bytes, offset: int) -> Stored:
        body = framed[_PREFIX.size :]
        if zlib.crc32(body) != _PREFIX.unpack_from(framed)[1]:
            raise OutboxCorrupt(self.path, offset, "wrong checksum")
        try:
            return _decoder.decode(body)
        except msgspec.MsgspecError as error:
            raise OutboxCorrupt(self.path, offset, str(error)) from error
