"""What a daemon that died on this machine has left: its leases, its requests, and maybe its dbt.

While dbt runs, a mark of the attempt lies in the state directory. A daemon that finds marks at
its start knows that their writer is dead (one daemon per state directory): it sees each dbt
out, gives up the leases and has the server deliver the requests again, at once instead of
after `ack_wait_s` and `lease_ttl_s`. What becomes of the runs is then decided as for any
redelivery. Called by `daemon` after the outboxes are published; `execution` writes the marks.
"""

import asyncio
import contextlib
import logging
import os
import signal
from pathlib import Path

import msgspec

from dbtstream.config import Config
from dbtstream.errors import NatsError
from dbtstream.nats_link import NatsLink
from dbtstream.run_lease import Leases, Vacancy

logger = logging.getLogger(__name__)

SUFFIX = ".attempt"
ORPHAN_S = 45.0
"""An orphaned dbt ends itself within less (`dbt_child.control`); then it is killed."""
LOOK_S = 0.1
TRIES = 5


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt under way. `reply` is where its request is settled."""

    run_id: str
    project: str
    target: str
    attempt: int
    token: str
    keys: list[str]
    reply: str
    pid: int | None = None
    pid_began: str | None = None  # tells the process from a later one with the same pid


_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Mark] = msgspec.json.Decoder(Mark)


def write_mark(config: Config, mark: Mark) -> None:
    """Blocking. A disk that is full costs a successor its head start, and no more."""
    path = _path(config, mark.run_id)
    began = None if mark.pid is None else _began(mark.pid)
    fresh = path.with_suffix(".new")
    try:
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        fresh.touch(0o600)
        fresh.write_bytes(_encoder.encode(msgspec.structs.replace(mark, pid_began=began)))
        fresh.replace(path)
    except OSError as error:
        logger.warning(
            "the mark of an attempt cannot be written",
            extra={"action": "attempt.unmarked", "path": str(path), "error": str(error)},
        )


def forget_mark(config: Config, run_id: str) -> None:
    """Blocking."""
    with contextlib.suppress(OSError):
        _path(config, run_id).unlink(missing_ok=True)


async def settle_predecessor(config: Config, link: NatsLink, leases: Leases) -> int:
    """Settle all that the marks tell of; how many there were."""
    paths = await asyncio.to_thread(lambda: sorted(_folder(config).glob(f"*{SUFFIX}")))
    marks = [await asyncio.to_thread(_read, path) for path in paths]
    # At the same time: each may have to wait for its dbt.
    await asyncio.gather(*(_settle(config, link, leases, mark) for mark in marks if mark))
    return len(paths)


async def _settle(config: Config, link: NatsLink, leases: Leases, mark: Mark) -> None:
    await _see_out(mark)
    for tried in range(1, TRIES + 1):
        try:
            for key in mark.keys:
                await leases.release_of(key, mark.token)
            if await leases.vacancy(mark.project, mark.target) is not Vacancy.HELD:
                with link.translated("giving a request back"):
                    await link.client.publish(mark.reply, b"-NAK")
        except NatsError as error:
            if tried == TRIES:  # all of it happens by itself, later
                logger.warning(
                    "a predecessor's lease is left to expire",
                    extra={
                        "action": "predecessor.left",
                        "run_id": mark.run_id,
                        "error": str(error),
                    },
                )
        else:
            logger.warning(
                "gave back what a predecessor was at",
                extra={
                    "action": "predecessor.settled",
                    "run_id": mark.run_id,
                    "attempt": mark.attempt,
                },
            )
            break
    await asyncio.to_thread(forget_mark, config, mark.run_id)


async def _see_out(mark: Mark) -> None:
    """Until the dead daemon's dbt is gone: two must not be at one target."""
    if mark.pid is None:
        return
    waited_s = 0.0
    while mark.pid_began is not None and await asyncio.to_thread(_began, mark.pid) == (
        mark.pid_began
    ):
        if waited_s >= ORPHAN_S:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(mark.pid, signal.SIGKILL)
        await asyncio.sleep(LOOK_S)
        waited_s += LOOK_S


def _began(pid: int) -> str | None:
    """When a living process began, in the kernel's ticks (Linux); None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _read(path: Path) -> Mark | None:
    try:
        return _decoder.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        logger.warning(
            "the mark of an attempt cannot be read",
            extra={"action": "predecessor.unreadable", "path": str(path), "error": str(error)},
        )
        with contextlib.suppress(OSError):
            path.unlink()
        return None


def _folder(config: Config) -> Path:
    return config.state_dir / "attempts"


def _path(config: Config, run_id: str) -> Path:
    return _folder(config) / f"{run_id}{SUFFIX}"
