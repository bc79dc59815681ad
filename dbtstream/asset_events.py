"""Lineage and asset events of one attempt, behind its node events and never in their way.

Layer 3. `execution` hands over each frame and the events that came of it; here they wait in one
queue, in their order, for what takes time: what earlier runs knew (`lineage_store`), the columns
of a build (`build_columns`). What comes of it is numbered by the normalizer like all events of
the run. What is told is decided in `declared`, `lineage` and `assets`; here is the order of things.

Whatever goes wrong here is said in the log and counted, and costs the event it is about: never a
node event, never the run. At the run's end what still waits gets some seconds, then it is told
without its columns.
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

import msgspec

from dbtstream.artifacts import read_catalog
from dbtstream.asset_schema import Schema
from dbtstream.assets import (
    BUILT,
    CHECKS,
    COMMANDS,
    Assets,
    AssetState,
    Build,
    Stamp,
)
from dbtstream.attempt_events import AttemptEvents
from dbtstream.build_columns import BuildColumns
from dbtstream.column_lineage import KnownColumn
from dbtstream.config import ProjectConfig
from dbtstream.datasets import Datasets
from dbtstream.dbt_values import utc
from dbtstream.declared import Declared
from dbtstream.errors import NatsError
from dbtstream.events import AnyEvent, ArtifactWritten, NodeFinished
from dbtstream.frames import (
    AnyFrame,
    Artifact,
    Columns,
    Graph,
    GraphNodes,
    NodeFinish,
    Nodes,
    PlannedNode,
)
from dbtstream.lineage import Facts, ProjectGraph
from dbtstream.lineage_events import Asset, LineageObserved
from dbtstream.lineage_store import LineageStore, asset_entry, lineage_entry
from dbtstream.normalizer import Normalizer
from dbtstream.sql_process import SqlReader
from dbtstream.statuses import NodeStatus, Reason

logger = logging.getLogger(__name__)

MAX_WAITING_CODE = 32 * 1024 * 1024
"""Characters of SQL that may wait to be read; what comes beyond is told without its columns."""

MAX_WARNINGS = 20
"""Of one kind in one run; the last one says how many more there are."""

_SUCCEEDED = (NodeStatus.SUCCESS, NodeStatus.WARN)
_TOLD_TYPES = BUILT | CHECKS | {"source"}
_GOES_ON = (Reason.HANDED_OVER, Reason.WORKER_LOST)
"""Ends of an attempt that another one takes up: that one will tell how the asset is."""


@dataclass(slots=True)
class _End:
    """A node's end, waiting. `finish` has its SQL; an end that a dead worker told has none."""

    finished: NodeFinished
    finish: NodeFinish | None = None


@dataclass(slots=True)
class _Catalog:
    """`docs generate` has written what the database says of all columns."""

    written: ArtifactWritten
    path: str


_Job = Graph | _End | _Catalog


class AssetEvents:
    """`known_manifest` before dbt starts, `take` while it runs, `settle` once at the end."""

    def __init__(
        self,
        project: ProjectConfig,
        normalizer: Normalizer,
        events: AttemptEvents,
        store: LineageStore,
        reader: SqlReader,
        earlier: Sequence[AnyEvent] = (),
    ) -> None:
        self.stats: Counter[str] = Counter()
        """received (ends of nodes), sent (events), failed, dropped (ends without a graph)."""
        self._config, self._normalizer, self._events = project, normalizer, events
        self._tells = project.assets.emit or project.lineage.emit
        self._tells_ends = self._tells and normalizer.context.command in COMMANDS
        self._store, self._reader = store, reader
        context = normalizer.context
        self._project, self._target = context.project, context.target
        self._declared = Declared(project, store, self._project, self._target)
        self._untold = untold(earlier)
        self._states: dict[str, AssetState] = {}
        self._planned: list[PlannedNode] = []
        self._graph: ProjectGraph | None = None
        self._assets: Assets | None = None
        self._builds: BuildColumns | None = None
        self._finishes: dict[str, NodeFinish] = {}
        self._columns: dict[str, Columns] = {}
        self._jobs: deque[_Job] = deque()
        self._waiting_code = 0
        self._closed = False
        self._wake = asyncio.Event()
        self._hurry = asyncio.Event()
        self._done = asyncio.Event()

    async def known_manifest(self) -> str | None:
        """The manifest of which dbt's process need not tell all nodes."""
        return await self._declared.known_manifest() if self._tells else None

    def take(self, frame: AnyFrame, events: Sequence[AnyEvent]) -> None:
        """What dbt's process said, and what the normalizer made of it. Never waits."""
        match frame:
            case Nodes() | GraphNodes():
                self._planned += frame.nodes
            case Graph():
                self._add(frame)
            case NodeFinish():
                self._keep_code(frame)
            case Columns():
                self._columns[frame.unique_id] = frame
                self._wake.set()
            case Artifact(kind="catalog"):
                for event in events:
                    if isinstance(event, ArtifactWritten):
                        self._add(_Catalog(event, frame.path))
            case _:
                pass
        self.take_ends(events)

    def take_ends(self, events: Iterable[AnyEvent]) -> None:
        """Ends of nodes, whoever knows of them."""
        for event in events:
            if self._tells_ends and isinstance(event, NodeFinished) and _is_told(event):
                self.stats["received"] += 1
                self._add(_End(event, self._finishes.pop(event.node.unique_id, None)))

    async def run(self) -> None:
        """Until `settle`. Nothing but a cancellation comes out of it."""
        try:
            await self._load()
            while (job := await self._next()) is not None:
                await self._guarded(job)
        finally:
            self._done.set()

    async def settle(self, wait_s: float) -> None:
        """No more frames come: tell what waits, with its columns if they are known by then."""
        self._closed = True
        self._wake.set()
        try:
            async with asyncio.timeout(wait_s):
                await self._done.wait()
        except TimeoutError:
            self._hurry.set()
            self._wake.set()
            await self._done.wait()
        if self.stats["dropped"]:
            logger.warning(
                "assets are not told: dbt's process did not tell its manifest",
                extra={
                    "action": "assets.no_graph",
                    "nodes": self.stats["dropped"],
                    "run_id": self._normalizer.context.run_id,
                },
            )

    # -- the queue -------------------------------------------------------------------------

    def _add(self, job: _Job) -> None:
        self._jobs.append(job)
        self._wake.set()

    def _keep_code(self, frame: NodeFinish) -> None:
        if not self._tells_ends or frame.compiled_code_hash is None:
            return
        size = len(frame.compiled_code or "")
        if self._waiting_code + size > MAX_WAITING_CODE:
            frame = msgspec.structs.replace(frame, compiled_code=None)
            size = 0
        self._waiting_code += size
        self._finishes[frame.unique_id] = frame

    async def _next(self) -> _Job | None:
        while not self._jobs:
            if self._closed:
                return None
            self._wake.clear()
            await self._wake.wait()
        return self._jobs.popleft()

    async def _load(self) -> None:
        if not self._tells:
            return
        try:
            self._states = await self._store.assets(self._project, self._target)
        except (NatsError, msgspec.DecodeError) as error:
            logger.warning(
                "what earlier runs left of a project's assets cannot be read",
                extra={
                    "action": "assets.unknown",
                    "run_id": self._normalizer.context.run_id,
                    "error": str(error),
                },
            )

    async def _guarded(self, job: _Job) -> None:
        try:
            match job:
                case Graph():
                    await self._open(job)
                case _Catalog():
                    await self._take_catalog(job)
                case _End():
                    await self._tell_end(job)
        except Exception:
            self.stats["failed"] += 1
            if self.stats["failed"] == 1:
                logger.exception(
                    "lineage or an asset could not be told",
                    extra={
                        "action": "assets.failed",
                        "job": type(job).__name__,
                        "run_id": self._normalizer.context.run_id,
                    },
                )

    def _tell(
        self, kind: type[AnyEvent], at: datetime, unique_id: str | None, facts: Facts
    ) -> AnyEvent:
        (event,) = self._normalizer.tell(kind, at, unique_id, facts)
        self._events.emit([event])
        self.stats["sent"] += 1
        return event

    # -- one of it -------------------------------------------------------------------------

    async def _open(self, frame: Graph) -> None:
        """The manifest is known: from here on ends can be told."""
        at = utc(frame.at)
        datasets = Datasets(frame.adapter_type, frame.connection, self._config.assets.namespace)
        graph = ProjectGraph(datasets)
        graph.add(self._planned)
        self._planned = []
        self._assets = Assets(
            graph,
            self._config.assets,
            project=self._project,
            target=self._target,
            states=self._states,
        )
        self._builds = BuildColumns(
            self._config.lineage,
            frame.adapter_type or "",
            graph,
            self._assets,
            self._reader,
            self._hurry,
        )
        self._graph = graph
        problems = [f"selector {p.name}: {p.problem}" for p in frame.selector_problems]
        self._warn("SelectorProblem", problems, at)
        self._warn("NodeOptionsInvalid", graph.problems, at)
        if self._config.lineage.emit:
            stamp = self._stamp(at)
            await self._declared.declare(frame, graph, datasets.namespace, stamp, self._tell)
        for end in self._untold:
            await self._guarded(_End(end))

    def _warn(self, name: str, problems: Sequence[str], at: datetime) -> None:
        shown = list(problems[:MAX_WARNINGS])
        if more := len(problems) - len(shown):
            shown[-1] += f"; and {more} more like these"
        for problem in shown:
            self._events.emit(self._normalizer.warn(name, problem, at))

    def _stamp(self, at: datetime) -> Stamp:
        context = self._normalizer.context
        return Stamp(
            project=self._project,
            target=self._target,
            run_id=context.run_id,
            fence=context.fence,
            seq=self._normalizer.last_seq,
            time=at,
        )

    async def _tell_end(self, end: _End) -> None:
        finished, unique_id = end.finished, end.finished.node.unique_id
        if end.finish is not None:
            self._waiting_code -= len(end.finish.compiled_code or "")
        graph, assets = self._graph, self._assets
        if graph is None or assets is None or unique_id not in graph.nodes:
            self.stats["dropped"] += 1
            return
        build, lineage = Build(), None
        is_build = finished.node.resource_type in BUILT and finished.status in _SUCCEEDED
        if is_build and graph.identity(unique_id) is not None:
            build, lineage = await self._read_build(end)
        subject = assets.subject_of(unique_id)
        told = assets.told(finished, subject, build) if subject else None
        if told is not None:
            event = self._tell(told[0], finished.time, unique_id, told[1])
            assert isinstance(event, Asset)  # noqa: S101  # `told` makes no other
            self._store.behind.put(asset_entry(assets.remember(event)))
        elif build.schema is not None:
            state = assets.remember_schema(unique_id, finished, build.schema)
            self._store.behind.put(asset_entry(state))
        if lineage is not None:
            self._tell_lineage(finished, lineage)

    async def _read_build(self, end: _End) -> tuple[Build, Facts | None]:
        assert self._graph is not None  # noqa: S101  # _tell_end has looked
        assert self._builds is not None  # noqa: S101  # they come together
        node = self._graph.nodes[end.finished.node.unique_id]
        if end.finished.attempt != self._normalizer.context.attempt:
            # A dead worker told its end: nothing new is known of its columns.
            return Build(inputs=self._graph.inputs(node.unique_id)), None
        columns = None
        if self._config.lineage.adapter_columns:
            columns = await self._adapter_columns(node.unique_id)
        read = await self._builds.read(node, end.finish, columns)
        return read.build, read.lineage

    async def _adapter_columns(self, unique_id: str) -> Columns | None:
        """dbt's process asks for one after the other, and at its end it has said all it will."""
        while unique_id not in self._columns and not self._closed:
            self._wake.clear()
            await self._wake.wait()
        return self._columns.pop(unique_id, None)

    def _tell_lineage(self, finished: NodeFinished, lineage: Facts) -> None:
        assert self._graph is not None  # noqa: S101  # _tell_end has looked
        assert self._assets is not None  # noqa: S101  # they come together
        unique_id = finished.node.unique_id
        options = self._graph.options(unique_id)
        last = self._assets.states.get(unique_id)
        if not (self._config.lineage.emit and options.emit and options.lineage):
            return
        if last is not None and last.lineage_hash == lineage["lineage_hash"]:
            return
        event = self._tell(LineageObserved, finished.time, unique_id, lineage)
        assert isinstance(event, LineageObserved)  # noqa: S101  # it is what was told
        self._store.behind.put(lineage_entry(event))
        state = self._assets.remember_lineage(unique_id, event, event.lineage_hash)
        self._store.behind.put(asset_entry(state))

    async def _take_catalog(self, catalog: _Catalog) -> None:
        """What the database says of columns counts until a node's SQL is another one."""
        assets = self._assets
        if assets is None:
            return
        found = await asyncio.to_thread(read_catalog, catalog.path)
        for unique_id, columns in found.items():
            known = [KnownColumn(name=name, type=type_) for name, type_ in columns]
            schema = Schema(columns=known, source="catalog")
            state = assets.remember_schema(unique_id, catalog.written, schema)
            self._store.behind.put(asset_entry(state))


def untold(earlier: Sequence[AnyEvent]) -> list[NodeFinished]:
    """Ends in a dead worker's attempt whose asset events it did not get to."""
    told: set[tuple[int, str]] = set()
    for event in earlier:
        if isinstance(event, Asset):
            told.add((event.attempt, getattr(event, "check", event).unique_id))
    return [
        event
        for event in earlier
        if isinstance(event, NodeFinished)
        and _is_told(event)
        and (event.attempt, event.node.unique_id) not in told
    ]


def _is_told(event: NodeFinished) -> bool:
    return event.node.resource_type in _TOLD_TYPES and event.reason not in _GOES_ON
