"""What is known of runs, requests and nodes, in the KV bucket `dbt_state`.

    run.<run_id>                              messages.RunView, written with compare-and-set
    request.<project>.<target>.<hash>         the run id that a request_id belongs to
    node.<project>.<target>.<unique_id>       NodeState, the last end of the node wins

`execution` and `worker` write, `control` reads; `streams` makes the bucket and `kv_bucket`
reads and writes its keys. Run states are written at once and in order; node states behind
the run's back, since a run of ten thousand nodes must not wait for ten thousand answers.
"""

from collections.abc import Sequence
from datetime import datetime

import msgspec

from dbtstream.events import NodeFinished
from dbtstream.kv_bucket import Bucket, RevisionConflict
from dbtstream.messages import RunView
from dbtstream.nats_link import NatsLink
from dbtstream.statuses import NodeStatus
from dbtstream.subjects import STATE_BUCKET, node_key, request_key, run_key
from dbtstream.write_behind import WriteBehind

__all__ = ["NodeState", "NodeStates", "RevisionConflict", "Store", "state_of"]

RETRY_FOR_S = 30.0
PAGE = 100  # runs read per request
MAX_LISTED = 5000  # of the newest runs, how many a filtered list looks at
MAX_MESSAGE_CHARS = 500

_encoder = msgspec.json.Encoder()
_run: msgspec.json.Decoder[RunView] = msgspec.json.Decoder(RunView)


class NodeState(msgspec.Struct, frozen=True, kw_only=True):
    """How a node ended last in a project and target, and how (`previous_status`) before that."""

    unique_id: str
    status: NodeStatus
    run_id: str
    attempt: int
    seq: int
    fence: int = 0
    finished_at: datetime | None = None
    resource_type: str
    name: str
    message: str | None = None
    previous_status: NodeStatus | None = None


_node: msgspec.json.Decoder[NodeState] = msgspec.json.Decoder(NodeState)


class Store:
    """Each call is retried through outages for `retry_for_s` (None: for ever), then raises
    NatsUnavailable; NatsRefused comes at once."""

    def __init__(self, link: NatsLink, *, retry_for_s: float | None = RETRY_FOR_S) -> None:
        self._bucket = Bucket(link, STATE_BUCKET, retry_for_s=retry_for_s)

    # -- runs ------------------------------------------------------------------------------

    async def create_run(self, view: RunView) -> int:
        """The first state of a run; its revision. Raises RevisionConflict if it is known."""
        return await self._bucket.write(run_key(view.run_id), _encoder.encode(view), 0)

    async def update_run(self, view: RunView, revision: int) -> int:
        """Write over `revision`; the new one. Raises RevisionConflict."""
        return await self._bucket.write(run_key(view.run_id), _encoder.encode(view), revision)

    async def get_run(self, run_id: str) -> tuple[RunView, int] | None:
        """From the stream's leader, so that what it says may be written over."""
        value = await self._bucket.read(run_key(run_id))
        if value is None or value.data is None:
            return None
        return _run.decode(value.data), value.revision

    async def list_runs(
        self,
        *,
        project: str | None = None,
        target: str | None = None,
        active: bool = False,
        limit: int = 50,
    ) -> list[RunView]:
        """Newest first. `active`: only runs that have not ended.

        It asks for all run ids and reads states a hundred at a time until it has enough.
        """
        keys = sorted(await self._bucket.keys("run.>"), reverse=True)[:MAX_LISTED]
        runs: list[RunView] = []
        for start in range(0, len(keys), PAGE):
            values = await self._bucket.read_many(keys[start : start + PAGE])
            views = sorted(
                map(_run.decode, values.values()), key=lambda view: view.run_id, reverse=True
            )
            runs += (
                view
                for view in views
                if project in (None, view.project)
                and target in (None, view.target)
                and not (active and view.status.is_terminal)
            )
            if len(runs) >= limit:
                break
        return runs[:limit]

    # -- requests --------------------------------------------------------------------------

    async def remember_request(
        self, project: str, target: str, request_id: str, run_id: str
    ) -> str:
        """The run id that this request_id got first: `run_id`, unless there is an older one."""
        key = request_key(project, target, request_id)
        while True:
            try:
                await self._bucket.write(key, run_id.encode(), 0)
            except RevisionConflict:
                value = await self._bucket.read(key)
                if value is not None and value.data is not None:
                    return value.data.decode()
            else:
                return run_id

    # -- nodes -----------------------------------------------------------------------------

    async def put_nodes(self, events: Sequence[NodeFinished]) -> None:
        """Of up to BATCH_KEYS nodes of one project and target, where none knows a later end:
        a worker that was frozen may come with what is long over."""
        found = await self._bucket.read_many([_key(event) for event in events])
        before = {key: _node.decode(data) for key, data in found.items()}
        values = {
            _key(event): _encoder.encode(state_of(event, known))
            for event in events
            if (known := before.get(_key(event))) is None or not is_later(known, event)
        }
        if values:
            await self._bucket.write_many(values)

    async def list_nodes(self, project: str, target: str, resource_type: str) -> list[NodeState]:
        """Of all nodes of a type that are known, in no order."""
        keys = await self._bucket.keys(f"node.{project}.{target}.{resource_type}.>")
        states: list[NodeState] = []
        for start in range(0, len(keys), PAGE):
            values = await self._bucket.read_many(keys[start : start + PAGE])
            states += map(_node.decode, values.values())
        return states

    async def get_node(self, project: str, target: str, unique_id: str) -> NodeState | None:
        value = await self._bucket.read(node_key(project, target, unique_id))
        return None if value is None or value.data is None else _node.decode(value.data)


class NodeStates(WriteBehind[NodeFinished]):
    """How nodes ended, written behind the run's back."""

    def __init__(self, store: Store) -> None:
        super().__init__(
            store.put_nodes,
            key=_key,
            group=lambda event: (event.project, event.target),
            what="states of nodes",
        )


def _key(event: NodeFinished) -> str:
    return node_key(event.project, event.target, event.node.unique_id)


def is_later(known: NodeState, event: NodeFinished) -> bool:
    """Whether `known` is of a later end. By fence first: a worker that was frozen may have
    numbered what it never published. Of two runs the time counts, too, as fences begin anew
    when the streams do."""
    if known.run_id == event.run_id:
        return (known.fence, known.seq) > (event.fence, event.seq)
    ended = event.finished_at or event.time
    return known.fence > event.fence and known.finished_at is not None and known.finished_at > ended


def state_of(event: NodeFinished, before: NodeState | None) -> NodeState:
    """`before` of the same run tells what was before the run; of another run, it is that."""
    previous = None
    if before is not None:
        previous = before.previous_status if before.run_id == event.run_id else before.status
    return NodeState(
        unique_id=event.node.unique_id,
        status=event.status,
        run_id=event.run_id,
        attempt=event.attempt,
        seq=event.seq,
        fence=event.fence,
        finished_at=event.finished_at or event.time,
        resource_type=event.node.resource_type,
        name=event.node.name,
        message=event.message[:MAX_MESSAGE_CHARS] if event.message else None,
        previous_status=previous,
    )
