"""The KV bucket `dbt_lineage`, read: what is known of a project's lineage and assets.

An edge that writes nothing; what a run learns, `lineage_store` writes. `client.lineage` asks it,
`lineage_graph` makes a graph of what it gives. No daemon need be there.
"""

from typing import NamedTuple, TypeVar

import msgspec

from dbtstream.errors import DbtstreamError, NatsRefused
from dbtstream.kv_bucket import Bucket
from dbtstream.lineage_events import LineageDeclared, LineageObserved
from dbtstream.nats_errors import JetStreamRefused
from dbtstream.nats_link import NatsLink
from dbtstream.subjects import LINEAGE_BUCKET, NAME

PAGE = 500  # values read per request
MAX_LISTED = 10

_NO_STREAM = 10059

T = TypeVar("T")


class NoLineage(DbtstreamError):
    """`known` are those, as project/target, that the bucket has something of."""

    def __init__(self, project: str, target: str | None, known: list[str]) -> None:
        self.project, self.target, self.known = project, target, known
        of = project if target is None else f"{project}/{target}"
        more = " …" if len(known) > MAX_LISTED else ""
        listed = ", ".join(known[:MAX_LISTED]) or "nothing yet"
        super().__init__(
            f"no lineage of {of} is known; a run of it brings it (known: {listed}{more})"
        )


class WhichTarget(DbtstreamError):
    """The project has lineage of several."""

    def __init__(self, project: str, targets: list[str]) -> None:
        self.project, self.targets = project, targets
        super().__init__(
            f"{project} has lineage of {len(targets)} targets: say --target {' or '.join(targets)}"
        )


class StoredLineage(NamedTuple):
    """`unreadable`: a sentence about each event that cannot be read; the others are whole."""

    target: str
    declared: list[LineageDeclared]
    observed: list[LineageObserved]
    unreadable: list[str]


class LineageBucket:
    """Calls are retried through outages for `retry_for_s`, then raise NatsUnavailable."""

    def __init__(self, link: NatsLink, *, retry_for_s: float) -> None:
        self._bucket = Bucket(link, LINEAGE_BUCKET, retry_for_s=retry_for_s)

    async def read(self, project: str, target: str | None = None) -> StoredLineage:
        """Of the target, or of the only one that there is. Raises NoLineage, WhichTarget,
        NatsRefused where there is no such bucket."""
        if not NAME.fullmatch(project) or not NAME.fullmatch(target or "_"):
            raise NoLineage(project, target, await self._known())
        where = f"{project}.{target or '*'}.>"
        declared, unreadable = await self.values(f"declared.{where}", LineageDeclared)
        observed, also_unreadable = await self.values(f"observed.{where}", LineageObserved)
        targets = sorted({event.target for event in (*declared, *observed)})
        if not targets:
            raise NoLineage(project, target, await self._known())
        if len(targets) > 1:
            raise WhichTarget(project, targets)
        return StoredLineage(targets[0], declared, observed, unreadable + also_unreadable)

    async def values(self, pattern: str, kind: type[T]) -> tuple[list[T], list[str]]:
        """What lies under keys like `declared.shop.*.>`, and a sentence about each value that
        cannot be read."""
        keys = await self._keys(pattern)
        values: list[T] = []
        unreadable: list[str] = []
        for start in range(0, len(keys), PAGE):
            found = await self._bucket.read_many(keys[start : start + PAGE])
            for data in found.values():
                try:
                    values.append(_decoded(data, kind))
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    what = data[:60].decode("utf-8", "backslashreplace")
                    unreadable.append(f"{error}: {what}…")
        return values, unreadable

    async def _known(self) -> list[str]:
        """All projects and targets; only asked for to make an error helpful."""
        keys = await self._keys("declared.>")
        return sorted({"/".join(key.split(".")[1:3]) for key in keys})

    async def _keys(self, pattern: str) -> list[str]:
        try:
            return await self._bucket.keys(pattern)
        except JetStreamRefused as error:
            if error.err_code != _NO_STREAM:
                raise
            raise NatsRefused(
                "reading lineage",
                f"there is no KV bucket {LINEAGE_BUCKET}",
                "`dbtstream setup` creates it",
            ) from error


def _decoded(data: bytes, kind: type[T]) -> T:
    """A project's content type may be MessagePack, whose maps never begin with a brace."""
    if data.startswith(b"{"):
        return msgspec.json.decode(data, type=kind)
    return msgspec.msgpack.decode(data, type=kind)
