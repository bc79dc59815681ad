"""dbt's artifacts in the Object Store: kept per run, kept as a target's state, fetched again.

    <run_id>/<file>                     until the bucket's max_age
    latest/<project>/<target>/<file>    until the next good run replaces it

`execution` calls it after dbt, and before dbt where a run builds on an earlier one. Which
files there are, `artifacts` tells; `object_bucket` carries them. What is stored is scrubbed on
the way: dbt writes into its artifacts whatever vars, configs and messages hold.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from dbtstream.artifacts import FILES, latest_kinds
from dbtstream.errors import NatsRefused
from dbtstream.nats_link import NatsLink
from dbtstream.object_bucket import ObjectBucket
from dbtstream.scrub import Scrubber
from dbtstream.streams import ARTIFACTS_BUCKET
from dbtstream.subjects import NAME, is_run_id, rfc3339
from dbtstream.workspace import make_private

logger = logging.getLogger(__name__)

FETCH_RETRY_S = 60.0


@dataclass(slots=True)
class ArtifactStats:
    stored: int = 0
    stored_bytes: int = 0
    failed: int = 0  # refused by the server, or gone from the disk


class ArtifactStore:
    """One per daemon. Calls for one run, and for one target, come one after the other."""

    def __init__(self, link: NatsLink) -> None:
        self._bucket = ObjectBucket(link, ARTIFACTS_BUCKET)
        self._said = False
        self.stats = ArtifactStats()

    async def put_run(
        self, run_id: str, files: Mapping[str, Path], scrubber: Scrubber
    ) -> dict[str, str]:
        """Store a run's files, by kind; the names of those that are stored, by kind.

        Waits through outages. A file that the server refuses or that has vanished is left out,
        which the log tells. Can be repeated: an object of the same name is replaced.
        """
        if not is_run_id(run_id):
            raise ValueError(f"{run_id!r} is not a run id")
        about = {"description": f"run {run_id}"}
        names = {kind: f"{run_id}/{FILES[kind]}" for kind in files}
        return {
            kind: names[kind]
            for kind, path in files.items()
            if await self._store(names[kind], path, scrubber, about)
        }

    async def set_latest(
        self,
        project: str,
        target: str,
        command: str,
        files: Mapping[str, Path],
        scrubber: Scrubber,
        *,
        run_id: str,
        finished_at: datetime,
    ) -> list[str]:
        """After a good run: make its files the state of the target; the names that are stored.

        Copies, not links: they outlive the run's own, which expire. `nats object info` tells
        whose they are.
        """
        prefix, at = latest_prefix(project, target), rfc3339(finished_at)
        about = {
            "description": f"dbt {command} of {project} {target}, run {run_id}, finished {at}",
            "headers": {
                "dbtstream-run-id": [run_id],
                "dbtstream-command": [command],
                "dbtstream-finished-at": [at],
            },
        }
        names = {kind: f"{prefix}/{FILES[kind]}" for kind in latest_kinds(command)}
        return [
            name
            for kind, name in names.items()
            if kind in files
            and await self._store(name, files[kind], scrubber, about, expires=False)
        ]

    async def fetch(
        self,
        prefix: str,
        names: Sequence[str],
        into: Path,
        *,
        retry_for_s: float | None = FETCH_RETRY_S,
    ) -> list[str]:
        """Bring files of a run (`<run_id>`) or a target (`latest_prefix`) into a folder.

        The folder is made if it is not there, 0700; files are 0600. The names of those that are
        there now, complete and as they were stored; one that the store does not have is no
        error. Raises NatsError, and OSError.
        """
        if not (is_run_id(prefix) or _is_latest(prefix)):
            raise ValueError(f"{prefix!r} is neither a run id nor latest/<project>/<target>")
        if unknown := set(names) - set(FILES.values()):
            raise ValueError(f"not artifacts: {', '.join(sorted(unknown))}")
        await asyncio.to_thread(make_private, into)
        return [
            name
            for name in names
            if await self._bucket.fetch(f"{prefix}/{name}", into / name, retry_for_s=retry_for_s)
        ]

    async def _store(
        self,
        name: str,
        path: Path,
        scrubber: Scrubber,
        about: Mapping[str, Any],
        *,
        expires: bool = True,
    ) -> bool:
        try:
            source = await asyncio.to_thread(_ScrubbedFile, path, scrubber)
            try:
                size = await self._bucket.put(name, source, about, expires=expires)
            finally:
                await asyncio.to_thread(source.close)
        except (NatsRefused, OSError) as error:
            self._not_stored(name, error)
            return False
        self._said = False
        self.stats.stored += 1
        self.stats.stored_bytes += size
        return True

    def _not_stored(self, name: str, error: NatsRefused | OSError) -> None:
        self.stats.failed += 1
        facts = {"object": f"{ARTIFACTS_BUCKET}/{name}", "error": str(error)}
        if isinstance(error, OSError):
            logger.warning(
                "an artifact cannot be read", extra={"action": "artifact.not_read", **facts}
            )
        elif not self._said:
            self._said = True  # until something is stored again
            hint = (
                "`dbtstream setup` makes the object store; it needs room, and the worker's NATS "
                "user what deploy/nats/roles.conf allows for artifacts"
            )
            logger.warning(
                "an artifact was not stored",
                extra={"action": "artifact.not_stored", "hint": hint, **facts},
            )


class _ScrubbedFile:
    """Blocking: every call goes to a thread."""

    def __init__(self, path: Path, scrubber: Scrubber) -> None:
        self._file = path.open("rb")
        self._stream = scrubber.stream()
        self._ready = bytearray()
        self._ended = False

    def read(self, size: int, /) -> bytes:
        while len(self._ready) < size and not self._ended:
            if data := self._file.read(size):
                self._ready += self._stream.feed(data)
            else:
                self._ready += self._stream.end()
                self._ended = True
        chunk = bytes(self._ready[:size])
        del self._ready[:size]
        return chunk

    def close(self) -> None:
        self._file.close()


def latest_prefix(project: str, target: str) -> str:
    """Under which names a target's state is. Raises ValueError."""
    for name in (project, target):
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be the name of a project or target")
    return f"latest/{project}/{target}"


def _is_latest(prefix: str) -> bool:
    first, *rest = prefix.split("/")
    return first == "latest" and len(rest) == 2 and all(map(NAME.fullmatch, rest))
