"""The SQL reader's process: `python -m dbtstream.sql_child`, started by `sql_process` only.

Requests come in on stdin and answers go out on stdout, one after the other, each as a 4-byte
length and MessagePack. The first frame out, empty, says that sqlglot is imported. The process
ends when stdin does, or with its parent; whoever prints into stdout prints into stderr.
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys
from typing import BinaryIO

import msgspec

from dbtstream.column_lineage import LENGTH, AnalysisRequest

RECURSION_LIMIT = 5000
"""Of Python frames: sqlglot takes about 20 for each parenthesis in another."""

NICENESS = 10
_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    memory_bytes = int(arguments[0]) if arguments else 0
    requests, answers = _take_pipes()
    _die_with_parent()
    _as_batch_work()
    if memory_bytes:
        _limit_memory(memory_bytes)
    from dbtstream.sql_child.reader import read_sql

    sys.setrecursionlimit(RECURSION_LIMIT)
    decode = msgspec.msgpack.Decoder(AnalysisRequest).decode
    encode = msgspec.msgpack.Encoder().encode
    _write(answers, b"")
    while (frame := _read(requests)) is not None:
        _write(answers, encode(read_sql(decode(frame))))


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """stdin and stdout for frames only: descriptor 1 becomes another stderr."""
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return requests, answers


def _read(requests: BinaryIO) -> bytes | None:
    head = requests.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    frame = requests.read(length)
    return frame if len(frame) == length else None


def _write(answers: BinaryIO, frame: bytes) -> None:
    answers.write(LENGTH.pack(len(frame)) + frame)
    answers.flush()


def _die_with_parent() -> None:
    """SIGKILL when the parent dies, also amid a statement (Linux). Elsewhere stdin's end tells."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):  # a libc without prctl
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(0)


def _as_batch_work() -> None:
    """dbt and the daemon come first: nobody waits for lineage."""
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or not allowed here
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    with contextlib.suppress(OSError):
        os.nice(NICENESS)


def _limit_memory(limit: int) -> None:
    """A statement that wants more gets a MemoryError, and the machine stays alive."""
    with contextlib.suppress(ValueError, OSError):  # a lower limit is set from outside
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        main(sys.argv[1:])
    os._exit(0)  # nothing to clean up, and nobody to wait for it
