"""From the stored events of a run to OpenLineage messages. Pure: no clock, no I/O.

A `RunMapping` takes the events of one run in their order and gives what is to be sent after each.
The same events give the same messages, byte for byte: run ids of nodes are made of our run id,
times are those of the events. So whoever takes over the sending feeds it what was sent already,
throws those messages away, and goes on. `openlineage_datasets` makes the datasets' facets,
`openlineage_runs` those of runs.

**What waits for what.** A node's end is held until the asset event that follows it, which has the
datasets. If that names a `lineage_hash` whose `lineage.observed` is not known here, the end is
held until that comes. With `run.finished`, or the next attempt, all that is held goes out as it
is. A `lineage.observed` that comes later still makes a message of type OTHER, which is how
OpenLineage adds to a run that has ended.
"""

import uuid
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime, timedelta

from msgspec import UNSET

from dbtstream import openlineage as ol
from dbtstream import openlineage_datasets as datasets
from dbtstream import openlineage_runs as runs
from dbtstream.event_base import Event
from dbtstream.events import (
    AnyEvent,
    NodeBatch,
    NodeBlock,
    NodeFinished,
    NodeStarted,
    RunFinished,
    RunQueued,
    RunRejected,
    RunStarted,
)
from dbtstream.lineage_events import (
    AssetChecked,
    AssetFailed,
    AssetMaterialized,
    AssetObserved,
    AssetSkipped,
    Column,
    LineageDeclared,
    LineageObserved,
)
from dbtstream.openlineage import OpenLineageMessage
from dbtstream.openlineage_runs import Kin, end_of, node_run
from dbtstream.statuses import RunStatus

FAMILIES = ("run", "node", "batch", "lineage", "asset")
"""The families of events that are mapped."""

MAX_LATE = 200
"""The columns of so many nodes are kept for lineage that comes after their end."""

_RUN_ENDS = {RunStatus.SUCCESS: "COMPLETE", RunStatus.CANCELLED: "ABORT"}
_BUILDS = frozenset({"model", "seed", "snapshot"})
_CHECKS = frozenset({"test", "unit_test"})

AssetEvent = AssetMaterialized | AssetFailed | AssetSkipped | AssetChecked | AssetObserved


@dataclass(slots=True)
class _Held:
    finished: NodeFinished
    asset: AssetMaterialized | None = None


class RunMapping:
    """One run's. `namespace` is that of all jobs; `first` the first event that is known. Raises
    ValueError if the run's id is no UUID: OpenLineage has no others."""

    def __init__(self, namespace: str, first: Event) -> None:
        uuid.UUID(first.run_id)
        self._kin = Kin(namespace, first.labels)
        self._adapter: str | None = None
        self._attempt = 0
        self._queued_at: datetime | None = None
        self._started: set[str] = set()  # runs of OpenLineage's
        self._seen: set[str] = set()  # nodes of this attempt
        self._held: dict[str, _Held] = {}
        self._lineage: dict[str, LineageObserved] = {}  # not told yet
        self._told: dict[str, str] = {}  # unique_id -> lineage_hash that went out
        self._columns: OrderedDict[str, list[Column]] = OrderedDict()
        self._out: list[OpenLineageMessage] = []

    # -- for the publisher ---------------------------------------------------------------------

    @property
    def problem(self) -> str | None:
        """What is wrong with the labels that name a parent, if anything is."""
        return self._kin.problem

    def lacks(self, event: AnyEvent) -> list[str]:
        """The nodes whose last `lineage.observed`, from an earlier run, would complete what
        `event` lets out. Give those that can be found to `learn`, before `take`."""
        match event:
            case AssetMaterialized() if event.unique_id in self._held:
                wanted = [event]
            case RunFinished():
                wanted = [held.asset for held in self._held.values() if held.asset is not None]
            case _:
                wanted = []
        return [a.unique_id for a in wanted if a.lineage_hash and self._lineage_of(a) is None]

    def learn(self, observed: LineageObserved) -> None:
        self._lineage[observed.unique_id] = observed

    def take(self, event: AnyEvent) -> list[OpenLineageMessage]:
        """What is to be sent now that this has happened, in this order."""
        if event.attempt > self._attempt:
            self._release_all()
            self._attempt = event.attempt
            self._seen.clear()
        match event:
            case RunQueued():
                self._queued_at = event.time
                self._kin.asked_for(event.args)
            case RunStarted():
                self._adapter = event.adapter_type
                self._kin.asked_for(event.args)
                self._start_run(event, event.time)
            case RunFinished():
                self._finish_run(event)
            case NodeStarted():
                self._start(event, event.node, event.time)
            case NodeBatch():
                self._batch(event)
            case NodeFinished():
                self._node_finished(event)
            case LineageDeclared():
                self._declared(event)
            case LineageObserved():
                self._observed(event)
            case AssetMaterialized():
                self._materialized(event)
            case AssetFailed() | AssetSkipped() | AssetObserved():
                self._finish_held(event.unique_id, event)
            case AssetChecked():
                self._finish_held(event.check.unique_id, event)
            case _:
                pass
        out, self._out = self._out, []
        return out

    # -- the run -------------------------------------------------------------------------------

    def _start_run(self, event: Event, at: datetime) -> None:
        if event.run_id not in self._started:
            self._send("START", event, event.run_id, self._run_job(event), at, self._above(event))

    def _finish_run(self, event: RunFinished) -> None:
        """Also of one that never came to its start: each run has both ends."""
        self._release_all()
        self._start_run(event, self._queued_at or event.time)
        facets = self._above(event)
        kind = _RUN_ENDS.get(event.status, "FAIL")
        if kind == "FAIL":
            facets |= runs.failure(
                runs.why_run(event), python=event.error is not None, stack=event.stderr_tail
            )
        self._send(kind, event, event.run_id, self._run_job(event), event.time, facets)

    def _above(self, event: Event) -> ol.Facets:
        return self._kin.above() | runs.label_tags(event.labels)

    def _run_job(self, event: Event) -> ol.Job:
        return self._job(self._kin.job_name(event), "JOB")

    # -- nodes ---------------------------------------------------------------------------------

    def _start(self, event: Event, node: NodeBlock, at: datetime) -> str:
        """START, unless it was sent; the run id."""
        self._seen.add(node.unique_id)
        run_id = node_run(event, node.unique_id)
        if run_id not in self._started:
            job = self._job(runs.job_name(node), runs.job_type(node), node.owners)
            self._send("START", event, run_id, job, at, self._kin.below_run(event))
        return run_id

    def _batch(self, event: NodeBatch) -> None:
        """A child of its model's run. It is told when it has ended, so both ends are now."""
        run_id = node_run(event, f"{event.unique_id}/{event.index}")
        if run_id in self._started:
            return
        job = self._job(f"{event.unique_id}.batch", "BATCH")
        facets = self._kin.below_node(event, event.unique_id)
        if event.event_time_start is not None:
            facets["nominalTime"] = ol.NominalTimeRunFacet(
                start=event.event_time_start, end=datasets.known(event.event_time_end)
            )
        began = event.time - timedelta(seconds=event.execute_s or 0.0)
        self._send("START", event, run_id, job, began, facets)
        facets = facets | runs.own_facet(event, event.status)
        kind = end_of(event.status)
        if kind == "FAIL":
            facets |= runs.failure(f"batch {event.index} of {event.total}: {event.status}")
        self._send(kind, event, run_id, job, event.time, facets)

    def _node_finished(self, event: NodeFinished) -> None:
        self._seen.add(event.node.unique_id)
        if _has_asset_event(event.node):
            self._held[event.node.unique_id] = _Held(event)
        else:
            self._finish(event)

    def _materialized(self, event: AssetMaterialized) -> None:
        held = self._held.get(event.unique_id)
        if held is None:
            return
        held.asset = event
        lineage = self._lineage_of(event)
        if lineage is not None or event.lineage_hash is None:
            del self._held[event.unique_id]
            self._finish(held.finished, event, lineage)

    def _observed(self, event: LineageObserved) -> None:
        held = self._held.pop(event.unique_id, None)
        if held is not None:
            self._finish(held.finished, held.asset, event)
        elif event.unique_id not in self._seen:
            self.learn(event)
        elif self._told.get(event.unique_id) != event.lineage_hash:
            self._add_lineage(event)

    def _finish_held(self, unique_id: str, event: AssetEvent) -> None:
        held = self._held.pop(unique_id, None)
        if held is not None:
            self._finish(held.finished, event)

    def _release_all(self) -> None:
        for held in list(self._held.values()):
            lineage = self._lineage_of(held.asset) if held.asset is not None else None
            self._finish(held.finished, held.asset, lineage)
        self._held.clear()

    def _lineage_of(self, asset: AssetMaterialized) -> LineageObserved | None:
        found = self._lineage.get(asset.unique_id)
        return found if found is not None and found.lineage_hash == asset.lineage_hash else None

    # -- a node's end --------------------------------------------------------------------------

    def _finish(
        self,
        event: NodeFinished,
        asset: AssetEvent | None = None,
        lineage: LineageObserved | None = None,
    ) -> None:
        """The node's terminal message. What never began has no START."""
        node, kind = event.node, end_of(event.status)
        at = event.finished_at or event.time
        if kind == "ABORT":
            run_id = node_run(event, node.unique_id)
        else:
            run_id = self._start(event, node, min(event.started_at or at, at))
        facets = self._end_facets(event, kind, asset)
        job = self._job(runs.job_name(node), runs.job_type(node), node.owners, node.tags)
        inputs: list[ol.Dataset] = []
        outputs: list[ol.Dataset] = []
        match asset:
            case AssetMaterialized():
                inputs = datasets.read(asset, lineage)
                outputs = [datasets.built(asset, lineage)]
                if asset.description:
                    text = ol.DocumentationJobFacet(description=asset.description)
                    job.facets["documentation"] = text
            case AssetChecked():
                inputs = datasets.checked(asset)
                if (execution := datasets.execution_of(asset.check)) is not None:
                    facets["test"] = execution
            case AssetObserved():
                inputs = [datasets.observed(asset)]
            case None if lineage is not None:  # of a project without asset events
                inputs, outputs = datasets.traced(lineage, [])
        self._remember(node.unique_id, asset, lineage)
        if lineage is not None:
            columns = asset.columns if isinstance(asset, AssetMaterialized) else None
            job.facets["lineage"] = datasets.lineage_facet(lineage, columns or [])
        self._send(kind, event, run_id, job, at, facets, inputs, outputs)

    def _end_facets(self, event: NodeFinished, kind: str, asset: AssetEvent | None) -> ol.Facets:
        facets = self._kin.below_run(event)
        facets |= runs.own_facet(event, event.status, event.dbt_status, event.reason)
        if event.query_id:
            facets["externalQuery"] = ol.ExternalQueryRunFacet(
                external_query_id=event.query_id, source=self._adapter or "dbt"
            )
        if kind == "FAIL":
            python = (event.node.path or "").endswith(".py")
            facets |= runs.failure(runs.why(event), python=python)
        if kind == "ABORT" and (causes := _causes(event, asset)):
            facets["jobDependencies"] = ol.JobDependenciesRunFacet(
                upstream=[self._dependency(event, cause) for cause in causes]
            )
        return facets

    def _dependency(self, event: Event, cause: str) -> ol.JobDependency:
        """With its run, if that is of this attempt."""
        run = ol.RunRef(run_id=node_run(event, cause)) if cause in self._seen else UNSET
        return ol.JobDependency(job=self._kin.job_ref(cause), run=run)

    def _remember(
        self, unique_id: str, asset: AssetEvent | None, lineage: LineageObserved | None
    ) -> None:
        """What has been told, or is needed to tell more."""
        if lineage is not None:
            self._told[unique_id] = lineage.lineage_hash
        elif isinstance(asset, AssetMaterialized) and asset.columns:
            self._columns[unique_id] = asset.columns
            if len(self._columns) > MAX_LATE:
                self._columns.popitem(last=False)
        self._lineage.pop(unique_id, None)

    # -- lineage by itself ---------------------------------------------------------------------

    def _add_lineage(self, event: LineageObserved) -> None:
        """Of a node whose end has been sent."""
        columns = self._columns.pop(event.unique_id, [])
        self._told[event.unique_id] = event.lineage_hash
        job = self._job(event.unique_id, event.resource_type.upper())
        job.facets["lineage"] = datasets.lineage_facet(event, columns)
        inputs, outputs = datasets.traced(event, columns)
        run_id = node_run(event, event.unique_id)
        facets = self._kin.below_run(event)
        self._send("OTHER", event, run_id, job, event.time, facets, inputs, outputs)

    def _declared(self, event: LineageDeclared) -> None:
        """A source is a dataset, and whatever builds or shows something a job; an ephemeral model
        builds nothing, it is part of those that use it."""
        if event.resource_type == "source":
            if event.outputs:
                dataset = datasets.declared(event)
                self._out.append(ol.DatasetEvent(event_time=event.time, dataset=dataset))
            return
        if not event.outputs and event.resource_type != "exposure":
            return
        job = self._job(event.unique_id, event.resource_type.upper(), event.owners)
        job.facets["lineage"] = datasets.lineage_facet(event, [])
        self._out.append(
            ol.JobEvent(
                event_time=event.time,
                job=job,
                inputs=[datasets.plain(each.namespace, each.name) for each in event.inputs],
                outputs=[datasets.declared(event)] if event.outputs else [],
            )
        )

    # -- parts of messages ---------------------------------------------------------------------

    def _send(
        self,
        kind: str,
        event: Event,
        run_id: str,
        job: ol.Job,
        at: datetime,
        facets: ol.Facets,
        inputs: list[ol.Dataset] | None = None,
        outputs: list[ol.Dataset] | None = None,
    ) -> None:
        if kind == "START":
            self._started.add(run_id)
        self._out.append(
            ol.RunEvent(
                event_time=at,
                event_type=kind,
                run=ol.Run(run_id=run_id, facets=facets | runs.engine(event)),
                job=job,
                inputs=inputs or [],
                outputs=outputs or [],
            )
        )

    def _job(
        self,
        name: str,
        job_type: str,
        owners: list[str] | None = None,
        tags: list[str] | None = None,
    ) -> ol.Job:
        facets: ol.Facets = {"jobType": ol.JobTypeJobFacet(job_type=job_type)}
        if owners:
            named = [ol.Owner(name=owner) for owner in owners]
            facets["ownership"] = ol.OwnershipJobFacet(owners=named)
        if tags:
            facets["tags"] = ol.TagsJobFacet(tags=datasets.dbt_tags(tags))
        return ol.Job(namespace=self._kin.namespace, name=name, facets=facets)


def ends_run(event: AnyEvent) -> bool:
    """Nothing of the run comes after it."""
    return isinstance(event, RunFinished | RunRejected)


def _has_asset_event(node: NodeBlock) -> bool:
    """Whether one may be expected after the node's end. What is wrongly expected comes out with
    the run's end."""
    ours = node.meta.get("dbtstream")
    if isinstance(ours, dict) and (ours.get("emit") is False or ours.get("asset") is False):
        return False
    if node.resource_type in _BUILDS:
        return node.materialized != "ephemeral"
    return node.resource_type in _CHECKS or node.resource_type == "source"


def _causes(event: NodeFinished, asset: AssetEvent | None) -> list[str]:
    if event.root_causes or not isinstance(asset, AssetSkipped):
        return event.root_causes
    return [cause.unique_id for cause in asset.causes]
