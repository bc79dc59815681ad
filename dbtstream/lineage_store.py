"""What is known of a project's lineage and assets between runs, in the KV bucket `dbt_lineage`.

    declared.<project>.<target>.<unique_id>   the node's last lineage.declared, as published
    observed.<project>.<target>.<unique_id>   the node's last lineage.observed, as published
    asset.<project>.<target>.<unique_id>      AssetState: last build, columns, how it ended
    graph.<project>.<target>                  GraphState: the manifest that the above are of

So the whole current graph can be read at any time, without the history of events. `asset_events`
reads it when a run starts and writes behind the run's back; a key of a node that has left the
manifest is deleted. Nothing here expires: a model that never changes is told once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from dbtstream.assets import AssetState, Stamp, stamp_of
from dbtstream.kv_bucket import Bucket
from dbtstream.lineage_bucket import LineageBucket
from dbtstream.lineage_events import LineageDeclared, LineageObserved
from dbtstream.nats_link import NatsLink
from dbtstream.subjects import (
    LINEAGE_BUCKET,
    asset_key,
    declared_key,
    graph_key,
    observed_key,
)
from dbtstream.write_behind import WriteBehind

RETRY_FOR_S = 2.0

_encoder = msgspec.json.Encoder()


class GraphState(Stamp, frozen=True, kw_only=True):
    """`manifest_hash` is empty where the next run must tell everything again. The hash of the
    config and the namespace decide how nodes are told, too."""

    manifest_hash: str
    config_hash: str
    namespace: str


class Entry(NamedTuple):
    """A value on its way into the bucket; `data` None deletes the key."""

    key: str
    stamp: Stamp
    data: bytes | None


_graph: msgspec.json.Decoder[GraphState] = msgspec.json.Decoder(GraphState)
_stamp: msgspec.json.Decoder[Stamp] = msgspec.json.Decoder(Stamp)


class LineageStore:
    """Each call is retried through outages for `retry_for_s`, then raises NatsUnavailable;
    NatsRefused comes at once."""

    def __init__(self, link: NatsLink, *, retry_for_s: float = RETRY_FOR_S) -> None:
        self._bucket = Bucket(link, LINEAGE_BUCKET, retry_for_s=retry_for_s)
        self._reading = LineageBucket(link, retry_for_s=retry_for_s)
        self.behind: WriteBehind[Entry] = WriteBehind(
            self._put,
            key=lambda entry: entry.key,
            group=lambda entry: (entry.stamp.project, entry.stamp.target),
            what="lineage",
        )

    async def graph(self, project: str, target: str) -> GraphState | None:
        value = await self._bucket.read(graph_key(project, target))
        return None if value is None or value.data is None else _graph.decode(value.data)

    async def assets(self, project: str, target: str) -> dict[str, AssetState]:
        """By unique_id. What cannot be read is as if it were not there, and is written anew."""
        pattern = asset_key(project, target, "") + ">"
        states, _ = await self._reading.values(pattern, AssetState)
        return {state.unique_id: state for state in states}

    async def declared(self, project: str, target: str) -> dict[str, LineageDeclared]:
        """By unique_id. What cannot be read is as if it were not there, and is told anew."""
        pattern = declared_key(project, target, "") + ">"
        events, _ = await self._reading.values(pattern, LineageDeclared)
        return {event.unique_id: event for event in events}

    async def _put(self, entries: Sequence[Entry]) -> None:
        """Where nobody later has written: a worker that was frozen may come with what is over."""
        found = await self._bucket.read_many([entry.key for entry in entries])
        known = {key: _stamp.decode(data) for key, data in found.items()}
        await self._bucket.write_many(
            {
                entry.key: entry.data
                for entry in entries
                if not _is_later(known.get(entry.key), entry.stamp)
            }
        )


def lineage_entry(event: LineageDeclared | LineageObserved) -> Entry:
    """The event itself, as the last of its node."""
    key = declared_key if isinstance(event, LineageDeclared) else observed_key
    data = _encoder.encode(event)
    return Entry(key(event.project, event.target, event.unique_id), stamp_of(event), data)


def gone_entries(unique_id: str, stamp: Stamp) -> list[Entry]:
    """Of a node that has left the manifest."""
    return [
        Entry(key(stamp.project, stamp.target, unique_id), stamp, None)
        for key in (declared_key, observed_key, asset_key)
    ]


def asset_entry(state: AssetState) -> Entry:
    key = asset_key(state.project, state.target, state.unique_id)
    return Entry(key, state, _encoder.encode(state))


def graph_entry(state: GraphState) -> Entry:
    """Put after all `declared` entries: they are written in order."""
    return Entry(graph_key(state.project, state.target), state, _encoder.encode(state))


def _is_later(known: Stamp | None, stamp: Stamp) -> bool:
    """As `store.is_later`: by fence and number in one run, by fence and time in two."""
    if known is None:
        return False
    if known.run_id == stamp.run_id:
        return (known.fence, known.seq) > (stamp.fence, stamp.seq)
    return known.fence > stamp.fence and known.time > stamp.time
