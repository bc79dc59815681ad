"""`dbtstream verify`: all that is stored of a run, read from each place and compared.

It needs NATS and no daemon: the stream DBT_EVENTS, the bucket dbt_state and the Object Store,
with the permissions of an admin. What differs is found by `verification`. It writes nothing.
"""

import asyncio
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import msgspec

from dbtstream.artifact_store import ArtifactStore
from dbtstream.errors import DbtstreamError, RunNotFound
from dbtstream.event_stream import EventStream, Selection, Start
from dbtstream.events import AnyEvent, NodeFinished, RunFinished, RunRejected
from dbtstream.kv_bucket import Bucket
from dbtstream.messages import RunView
from dbtstream.nats_link import NatsLink
from dbtstream.store import NodeState, Store
from dbtstream.subjects import STATE_BUCKET, node_key
from dbtstream.verification import (
    NOTHING,
    RUN_RESULTS,
    RUN_STATE,
    Difference,
    RunResults,
    check_events,
    compare_nodes,
    compare_results,
    compare_run,
    verdicts,
)

__all__ = ["NotEnded", "Unreadable", "Verification", "verify_run"]

RETRY_FOR_S = 10.0
BEHIND_S = 10.0
"""States are written behind the events: of a run that has just ended they may be on their way."""
LOOK_AGAIN_S = 0.2
KEYS_AT_ONCE = 500

_node_state: msgspec.json.Decoder[NodeState] = msgspec.json.Decoder(NodeState)
_run_results: msgspec.json.Decoder[RunResults] = msgspec.json.Decoder(RunResults)


class NotEnded(DbtstreamError):
    """What is told of a run that goes on cannot agree yet."""

    def __init__(self, view: RunView) -> None:
        self.view = view
        super().__init__(f"run {view.run_id} has not ended, it is {view.status}; verify it then")


class Unreadable(DbtstreamError):
    """An artifact that is not what dbt writes."""

    def __init__(self, name: str, error: Exception) -> None:
        self.name = name
        super().__init__(f"{name} in the Object Store cannot be read: {error}")


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """What was compared, and every difference."""

    run_id: str
    agrees: bool
    events: int
    nodes: int
    run_results: Literal["compared", "not stored"]
    differences: list[Difference]


async def verify_run(link: NatsLink, run_id: str, since: datetime) -> Verification:
    """`since`: surely before the run's first event. Raises RunNotFound, NotEnded, NatsError."""
    store = Store(link, retry_for_s=RETRY_FOR_S)
    known = await store.get_run(run_id)
    events = await _events(link, run_id, since, known[0] if known else None)
    if not events and known is None:
        raise RunNotFound(run_id)
    end = events[-1] if events else None
    if known and not known[0].status.is_terminal and not isinstance(end, RunFinished | RunRejected):
        raise NotEnded(known[0])
    differences = list(check_events(events))
    view, of_state = await _compare_state(link, store, run_id, events)
    results = await _run_results_of(link, run_id)
    if results is not None:
        of_state += compare_results(results, events)
    elif view is not None and "run_results" in view.artifacts:
        of_state.append(_missing_object(view.artifacts["run_results"]))
    differences += of_state
    return Verification(
        run_id=run_id,
        agrees=not differences,
        events=len(events),
        nodes=len(verdicts(events)),
        run_results="not stored" if results is None else "compared",
        differences=differences,
    )


async def _events(
    link: NatsLink, run_id: str, since: datetime, view: RunView | None
) -> list[AnyEvent]:
    """All of the run that is stored, also what should not be there: after its end."""
    selection = Selection(view.project, view.target) if view else Selection()
    events: list[AnyEvent] = []
    start = Start(at=since)
    while True:
        count = len(events)
        async with EventStream(link, selection, start, run_id=run_id, follow=False) as stream:
            events += [event async for event in stream]
        # It ends with the run; whatever is behind that takes another look.
        if len(events) == count or stream.stream_seq is None:
            return events
        start = Start(after_seq=stream.stream_seq)


async def _compare_state(
    link: NatsLink, store: Store, run_id: str, events: Sequence[AnyEvent]
) -> tuple[RunView | None, list[Difference]]:
    """The run's state, and what differs in it or in its nodes' when it has had its time."""
    last = verdicts(events)
    deadline = events[-1].time + timedelta(seconds=BEHIND_S) if events else None
    while True:
        known = await store.get_run(run_id)
        view = known[0] if known else None
        differences = list(compare_run(view, events))
        differences += compare_nodes(await _states(link, last), last)
        if not differences or deadline is None or datetime.now(UTC) > deadline:
            return view, differences
        await asyncio.sleep(LOOK_AGAIN_S)


async def _states(link: NatsLink, last: Mapping[str, NodeFinished]) -> dict[str, NodeState | None]:
    """By unique_id; of some thousand nodes in a few requests."""
    bucket = Bucket(link, STATE_BUCKET, retry_for_s=RETRY_FOR_S)
    keys = [node_key(end.project, end.target, unique_id) for unique_id, end in last.items()]
    states: dict[str, NodeState | None] = {}
    for start in range(0, len(keys), KEYS_AT_ONCE):
        found = await bucket.read_many(keys[start : start + KEYS_AT_ONCE])
        states |= {state.unique_id: state for state in map(_node_state.decode, found.values())}
    return states


async def _run_results_of(link: NatsLink, run_id: str) -> RunResults | None:
    """As it lies in the Object Store; None if it does not."""
    folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="dbtstream-verify-"))
    try:
        names = await ArtifactStore(link).fetch(
            run_id, [RUN_RESULTS], folder, retry_for_s=RETRY_FOR_S
        )
        if not names:
            return None
        return _run_results.decode(await asyncio.to_thread((folder / RUN_RESULTS).read_bytes))
    except msgspec.DecodeError as error:
        raise Unreadable(f"{run_id}/{RUN_RESULTS}", error) from error
    finally:
        await asyncio.to_thread(shutil.rmtree, folder)


def _missing_object(name: str) -> Difference:
    return Difference(
        what="the run",
        field="artifacts",
        left=RUN_STATE,
        left_says=name,
        right="the Object Store",
        right_says=NOTHING,
    )
