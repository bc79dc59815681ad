"""One attempt at one run, from an accepted request to the verdict. Read this first.

    workspace → dbt_process → frames → normalizer → outbox → JetStream
                                  ↘      ↗     ↘ run state and node states in KV
                                  asset_events → lineage in KV

`worker` decides that a run begins and holds its lease; this module carries it through. dbt is
never made to wait for NATS: events go to the outbox, states are written behind. What ends the
run, ends it here, in this order: every node has its terminal event, `run.finished` is stored,
the artifacts are, the state is terminal; only then does `worker` settle the request.

An attempt may end without a verdict. Handed over or cut off from NATS, it closes its nodes and
gives the run back; superseded by another worker, it publishes nothing more and settles nothing.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import Any

import msgspec

from dbtstream.artifact_store import ArtifactStore
from dbtstream.asset_events import AssetEvents
from dbtstream.attempt_events import AttemptEvents
from dbtstream.config import Config
from dbtstream.dbt_process import EXIT_S, DbtProcess, Exit
from dbtstream.endings import Ended, Ending
from dbtstream.envelope import RunContext
from dbtstream.errors import ChildCrashed, ChildError, ConfigError, NatsError, Superseded
from dbtstream.event_base import ErrorBlock
from dbtstream.events import JSON, AnyEvent
from dbtstream.frames import AnyFrame, Hello, Invocation, Result
from dbtstream.job import (
    Job,
    StateMissing,
    bring_state,
    child_start,
    keep_artifacts,
    object_names,
    parse_recipe,
)
from dbtstream.lineage_store import LineageStore
from dbtstream.log_context import in_run_of
from dbtstream.messages import NodeAtWork, OnLost, RunAtWork, RunView
from dbtstream.nats_link import NatsLink
from dbtstream.normalizer import Normalizer
from dbtstream.observers import AttemptObserver, Nobody, Observer
from dbtstream.outbox import Outbox, OutboxStats
from dbtstream.predecessor import Mark, forget_mark, write_mark
from dbtstream.publishers.fence import EventFence
from dbtstream.publishers.jetstream import JetStreamPublisher, OnStored
from dbtstream.readings import Flow
from dbtstream.resume import FIRST
from dbtstream.run_lease import RunLease
from dbtstream.run_state import RunState
from dbtstream.scrub import Scrubber
from dbtstream.sql_process import SqlReader
from dbtstream.statuses import Reason, RunStatus
from dbtstream.store import NodeStates, Store
from dbtstream.templates import Templates
from dbtstream.trace import run_trace_id, span_id_of, tracestate_in
from dbtstream.watchdog import Stop, Watchdog
from dbtstream.workspace import Workspace, keep_parse_cache, prepare_workspace

logger = logging.getLogger(__name__)

LINEAGE_WRITTEN_S = 10.0
"""What the bucket `dbt_lineage` may take after all events are stored."""

NODES_SHOWN = 10
"""Of the nodes that run, how many are told to whoever asks."""

FRAMES_PER_TURN = 32
"""After so many frames that were already there, other tasks get the loop."""


@dataclass(frozen=True, slots=True)
class Services:
    """What every execution of a worker shares."""

    config: Config
    events_link: NatsLink
    store: Store
    node_states: NodeStates
    artifacts: ArtifactStore
    lineage: LineageStore
    sql_reader: SqlReader
    templates: Templates | None = None
    observer: Observer = field(default_factory=Nobody)
    on_stored: OnStored | None = None

    def content_type(self, project: str) -> str:
        """Of the project's events; JSON for a project that is not ours."""
        known = self.config.projects.get(project)
        return known.content_type if known else JSON


@dataclass(frozen=True, slots=True)
class Claim:
    """The run in our hands, before the attempt begins: its state is stored with our fence."""

    view: RunView
    revision: int
    lease: RunLease
    fence: EventFence
    reply: str  # where the request is settled; for our successor, should we die
    earlier: Sequence[AnyEvent] = ()  # all that is published of the run
    resume: bool = False  # only nodes without success


Admission = Callable[[Workspace], Awaitable[None]]
"""Returns when dbt may be started. Cancelled when it is not to be."""


class Outcome(Enum):
    """What is to become of the request."""

    ENDED = "ended"  # its run has a verdict: ack
    GIVEN_BACK = "given_back"  # it goes on elsewhere: nak
    SUPERSEDED = "superseded"  # somebody else has it: leave it alone


class Execution:
    """One attempt. `run` once; `stop` at any time, as often as one likes."""

    def __init__(self, job: Job, services: Services, claim: Claim) -> None:
        self.job = job
        self._services, self._claim = services, claim
        self._config = services.config
        self._state = RunState(services.store, claim.view, claim.revision)
        self._watchdog = Watchdog(
            job.run_id,
            self._config.worker,
            timeout_s=job.request.timeout_s or job.project.timeout_s,
            silence_s=job.request.silence_timeout_s or job.project.silence_timeout_s,
            tell=self._tell_rung,
        )
        self._normalizer: Normalizer
        self._events: AttemptEvents
        self._assets: AssetEvents
        self._outbox: Outbox
        self._way_out: tuple[Outbox, JetStreamPublisher] | None = None
        self._result: Result | None = None
        self._scrubber = Scrubber.for_environment(os.environ, ())
        self._superseded: Superseded | None = None
        self._is_prepared = False
        self._has_started = False
        self._command = job.dbt.command

    @property
    def view(self) -> RunView:
        return self._state.view

    @property
    def attempt(self) -> int:
        return self._state.view.attempt

    def at_work(self, at: datetime) -> RunAtWork:
        """How far it is, for whoever asks the worker."""
        view = self.view
        shown = RunAtWork(
            run_id=view.run_id,
            project=view.project,
            target=view.target,
            status=view.status,
            args=view.args,
            attempt=view.attempt,
            queued_at=view.queued_at,
            started_at=view.started_at,
        )
        if not self._is_prepared:
            return shown
        counts, eta_s = self._normalizer.progress(at.timestamp())
        nodes = [
            NodeAtWork(
                unique_id=block.unique_id,
                resource_type=block.resource_type,
                name=block.name,
                started_at=since,
            )
            for block, since in self._normalizer.at_work(NODES_SHOWN)
        ]
        return msgspec.structs.replace(
            shown,
            last_seq=self._normalizer.last_seq,
            done=counts.done if counts else 0,
            total=counts.total if counts else None,
            by_status=counts.by_status if counts else {},
            running=counts.running if counts else len(nodes),
            nodes=nodes,
            eta_s=eta_s,
            unstored=self._outbox.stats.waiting,
        )

    @property
    def outbox(self) -> OutboxStats | None:
        """None before there is one."""
        return self._way_out[0].stats if self._way_out else None

    @property
    def flow(self) -> Flow:
        """Of events, into the outbox and out to NATS."""
        if self._way_out is None:
            return Flow()
        box, out = self._way_out[0].stats, self._way_out[1].stats
        return Flow(box.received, out.sent, box.dropped + box.lost, out.failed)

    async def run(self, admission: Admission) -> Outcome:
        """Carry the run to its end and see that the world knows of it.

        `admission` returns when dbt may be started: limits and slots are `worker`'s business.
        """
        with in_run_of(self.job.run_id, self.attempt, self._trace_id):
            return await self._run(admission)

    async def _run(self, admission: Admission) -> Outcome:
        workspace = await self._prepare()
        self._normalizer = Normalizer(self._context(workspace))
        self._normalizer.recall(self._claim.earlier)
        self._outbox = await Outbox.open(
            self._config.state_dir / "outbox",
            self.job.run_id,
            self.attempt,
            max_bytes=self._config.worker.outbox_max_bytes,
        )
        self._events = AttemptEvents(
            self._normalizer,
            self._outbox,
            self._services.node_states,
            self._observer(),
            content_type=self.job.project.content_type,
            tracestate=self._tracestate,
        )
        self._assets = AssetEvents(
            self.job.project,
            self._normalizer,
            self._events,
            self._services.lineage,
            self._services.sql_reader,
            self._claim.earlier,
        )
        self._is_prepared = True
        try:
            async with asyncio.TaskGroup() as tasks:
                outcome = await self._run_beside(tasks, workspace, admission)
        except* Superseded:
            outcome = Outcome.SUPERSEDED
        if outcome is Outcome.SUPERSEDED:
            await self._stand_aside()
        await self._outbox.remove()
        await asyncio.to_thread(forget_mark, self._config, self.job.run_id)
        return outcome

    def stop(self, reason: Reason, *, by: str, text: str | None = None) -> None:
        """Ask for an end. The first reason counts; before the start it prevents the start."""
        self._watchdog.ask(Stop(reason, by, text))

    def stop_before_start(self, *, by: str) -> None:
        """Give the run back if dbt has not been started yet."""
        if not self._has_started:
            self.stop(Reason.HANDED_OVER, by=by)

    # The attempt, in the order in which things happen.

    async def _prepare(self) -> Workspace | Ending:
        job = self.job
        try:
            workspace = await asyncio.to_thread(
                prepare_workspace,
                self._config,
                job.project_name,
                job.project,
                job.target,
                job.run_id,
                self._traceparent(),
                tracestate=self._tracestate,
                attempt=self.attempt,
            )
            self._scrubber = Scrubber.for_environment(workspace.environment, workspace.secret_names)
            self._state.note(args=self._scrubber.words(job.args))
            resumed = self._claim.earlier if self._claim.resume else None
            self._command = await bring_state(job, workspace, self._services.artifacts, resumed)
        except (ConfigError, OSError, StateMissing, NatsError) as error:
            block = ErrorBlock(class_=type(error).__name__, message=str(error))
            return Ending(how=Ended.NOT_STARTED, error=block)
        return workspace

    async def _run_beside(
        self,
        tasks: asyncio.TaskGroup,
        workspace: Workspace | Ending,
        admission: Admission,
    ) -> Outcome:
        """The course of the attempt, with what goes on beside it."""
        run_id = self.job.run_id
        publisher = JetStreamPublisher(
            self._services.events_link,
            self._outbox,
            fence=self._claim.fence,
            on_stored=self._services.on_stored,
            on_failed=self._events.not_stored,
        )
        self._way_out = self._outbox, publisher
        tasks.create_task(self._unless_superseded(publisher.run()), name=f"publish {run_id}")
        saving = tasks.create_task(
            self._unless_superseded(self._state.run()), name=f"state {run_id}"
        )
        tasks.create_task(self._assets.run(), name=f"assets {run_id}")
        guard = tasks.create_task(
            self._unless_superseded(self._until_lost()), name=f"lease {run_id}"
        )
        try:
            ending = await self._course(workspace, admission)
            goes_on = self._goes_on(ending)
            await self._tell_end(ending, final=not goes_on)
            self._say_end(goes_on=goes_on)
            self._outbox.close_input()
            written = self._services.node_states.written(self.job.project_name, self.job.target)
            await asyncio.gather(self._outbox.drained(), written)
            await self._lineage_written()
            # Only now: a terminal state means that the events are stored, too, and the artifacts.
            await self._conclude(workspace)
            self._state.close()
            await saving
        except asyncio.CancelledError:
            if self._superseded is None:
                await asyncio.shield(self._leave())
            saving.cancel()
            raise
        guard.cancel()
        return Outcome.GIVEN_BACK if goes_on else Outcome.ENDED

    async def _tell_end(self, ending: Ending, *, final: bool, wait_s: float | None = None) -> None:
        """The ends of nodes, what they mean for assets, and the run's own end."""
        self._assets.take_ends(self._events.close_nodes(ending))
        await self._assets.settle(self.job.project.lineage.wait_s if wait_s is None else wait_s)
        self._events.finish(ending, final=final)

    async def _lineage_written(self) -> None:
        """What the next run wants to know. It can do without, so this is waited for in bounds."""
        behind = self._services.lineage.behind
        try:
            async with asyncio.timeout(LINEAGE_WRITTEN_S):
                await behind.written(self.job.project_name, self.job.target)
        except TimeoutError:
            logger.warning(
                "lineage is not in its bucket yet; the run ends without",
                extra={"action": "run.lineage_unwritten", "run_id": self.job.run_id},
            )

    def _goes_on(self, ending: Ending) -> bool:
        """Whether the run is given back: dbt was cut short, or never started, so that it can be."""
        may = self.job.on_lost is not OnLost.FAIL or not self._has_started
        return may and self._normalizer.is_cut_short(ending)

    async def _leave(self) -> None:
        """The daemon is being hurried: what is known goes to disk, and out at its next start."""
        self.stop(Reason.CANCELLED, by="shutdown")
        stop = self._watchdog.stop
        ending = Ending(how=Ended.CRASHED, stop=stop.reason if stop else None)
        if not self._events.ended:
            await self._tell_end(ending, final=not self._goes_on(ending), wait_s=0.0)
        await self._outbox.close()

    async def _course(self, workspace: Workspace | Ending, admission: Admission) -> Ending:
        await asyncio.to_thread(write_mark, self._config, self._mark(None))
        if not self._claim.earlier:
            self._events.emit(self._normalizer.queued(_now()))
            self._events.emit(self._normalizer.leased(FIRST, _now()))
        if isinstance(workspace, Ending):
            return workspace
        if not await self._is_admitted(admission(workspace)):
            stop = await self._watchdog.asked()
            if stop.reason is not Reason.HANDED_OVER:
                self._watchdog.rung("requested", stop)
            return Ending(how=Ended.NOT_STARTED, stop=stop.reason)
        self._has_started = True
        self._state.move(RunStatus.STARTING, at=_now())
        try:
            process = await self._spawn(workspace)
        except ChildError as error:
            return Ending.of_error(error)
        try:
            return await self._follow(process, workspace)
        finally:
            self._claim.lease.on_deadline(None)
            await asyncio.shield(process.close())

    async def _is_admitted(self, admission: Awaitable[None]) -> bool:
        """Whether dbt may start; False when it is to stop before."""
        admitted = asyncio.ensure_future(admission)
        asked = asyncio.ensure_future(self._watchdog.asked())
        try:
            await asyncio.wait({admitted, asked}, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return False
            await admitted
        finally:
            for task in (admitted, asked):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        return True

    async def _spawn(self, workspace: Workspace) -> DbtProcess:
        job = self.job
        start = child_start(
            job,
            workspace,
            self._claim.earlier if self._claim.resume else None,
            await self._assets.known_manifest(),
        )
        self._normalizer.spawned(_now())
        process = await DbtProcess.start(
            job.project.python,
            start,
            environment=workspace.environment,
            templates=self._services.templates,
            recipe=None if start.retry else parse_recipe(self._config, job, workspace),
        )
        self._claim.lease.on_deadline(process.set_deadline)
        return process

    async def _follow(self, process: DbtProcess, workspace: Workspace) -> Ending:
        """Frames until the child is gone, with somebody watching the clock."""
        watch = asyncio.create_task(self._watchdog.run(process), name=f"watch {self.job.run_id}")
        error: ChildError | None = None
        try:
            await asyncio.to_thread(write_mark, self._config, self._mark(process.pid))
            try:
                self._take(await process.hello(timeout_s=self._config.worker.handshake_timeout_s))
                await self._read(process)
            except ChildError as problem:
                error = problem
                process.kill()
            exited = await process.wait(EXIT_S)
        finally:
            watch.cancel()
            await asyncio.wait({watch})
        if self._result is not None:
            await self._keep_parse_cache(workspace)
        return msgspec.structs.replace(
            self._ending(error, exited), pid=process.pid, exited_at=exited.at
        )

    async def _keep_parse_cache(self, workspace: Workspace) -> None:
        try:
            await asyncio.to_thread(keep_parse_cache, workspace)
        except OSError as error:  # the next run parses anew
            logger.warning(
                "parse cache not kept",
                extra={
                    "action": "run.parse_cache",
                    "run_id": self.job.run_id,
                    "error": str(error),
                },
            )

    async def _read(self, process: DbtProcess) -> None:
        count = 0
        async for frame in process.frames():
            self._take(frame)
            count += 1
            if count % FRAMES_PER_TURN == 0:
                await asyncio.sleep(0)

    def _take(self, frame: AnyFrame) -> None:
        self._watchdog.heard()
        events = self._normalizer.frame(frame)
        self._events.emit(events)
        self._assets.take(frame, events)
        match frame:
            case Hello():
                self._state.move(RunStatus.RUNNING, at=_now())
            case Result():
                self._result = frame
            case Invocation():
                self._state.note(invocation_id=frame.invocation_id)

    def _tell_rung(self, step: str, stop: Stop, stack: str | None) -> None:
        self._events.emit(
            self._normalizer.cancel_step(
                step,
                by=stop.by,
                reason=stop.text,
                stop=stop.reason,
                stack=self._scrubber.text(stack) if stack else None,
                at=_now(),
            )
        )

    # How it ended.

    def _ending(self, error: ChildError | None, exited: Exit) -> Ending:
        asked = self._watchdog.stop
        stop = asked.reason if asked else None
        tail = self._scrubber.text(exited.output_tail)
        if error is None and self._result is None:
            error = ChildCrashed("ended without a result", exit_code=exited.code, stderr_tail=tail)
        if error is None:
            return Ending(how=Ended.RESULT, exit_code=exited.code, stop=stop)
        if stop is None and self._claim.lease.expired:
            stop = Reason.HANDED_OVER  # it ended itself, as the lease could not be renewed
        ending = Ending.of_error(error, oom=exited.oom, stop=stop)
        block = ending.error and msgspec.structs.replace(
            ending.error, message=self._scrubber.text(ending.error.message)
        )
        return msgspec.structs.replace(
            ending, error=block, stderr_tail=tail or None, exit_code=exited.code
        )

    def _say_end(self, *, goes_on: bool) -> None:
        verdict = self._events.verdict
        facts: dict[str, Any] = {
            "run_id": self.job.run_id,
            "project": self.job.project_name,
            "target": self.job.target,
            "attempt": self.attempt,
        }
        if goes_on or verdict is None:
            stop = self._watchdog.stop
            logger.warning(
                "run given back",
                extra={"action": "run.given_back", "by": stop.by if stop else "lease", **facts},
            )
            return
        logger.info(
            "run finished",
            extra={
                "action": "run.finished",
                "status": verdict.status,
                "elapsed_s": round(verdict.elapsed_s, 3),
                **facts,
            },
        )

    async def _conclude(self, workspace: Workspace | Ending) -> None:
        """The state that lasts: terminal, or back in the queue."""
        verdict = self._events.verdict
        if verdict is None:
            self._state.give_back(at=_now(), last_seq=self._normalizer.last_seq)
            return
        stored: dict[str, str] = {}
        if isinstance(workspace, Workspace):
            stored = await keep_artifacts(
                self.job,
                self._command,
                verdict,
                workspace,
                self._services.artifacts,
                self._scrubber,
            )
        self._state.move(
            verdict.status,
            at=verdict.time,
            exit_code=verdict.exit_code,
            error=verdict.error.message if verdict.error else None,
            counts=verdict.counts,
            last_seq=verdict.seq,
            artifacts=stored,
        )

    # Superseded.

    async def _unless_superseded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Superseded as error:
            self._superseded = self._superseded or error
            raise

    async def _stand_aside(self) -> None:
        logger.error(
            "another worker has taken over this run; nothing more is published from here",
            extra={
                "action": "run.superseded",
                "run_id": self.job.run_id,
                "attempt": self.attempt,
                "problem": str(self._superseded),
                "unpublished": self._outbox.stats.waiting,
            },
        )

    async def _until_lost(self) -> None:
        lost = await asyncio.shield(self._claim.lease.lost)
        raise Superseded(self.job.run_id, self._claim.fence.number, lost) from lost

    def _mark(self, pid: int | None) -> Mark:
        lease = self._claim.lease
        return Mark(
            run_id=self.job.run_id,
            project=self.job.project_name,
            target=self.job.target,
            attempt=self.attempt,
            token=lease.token,
            keys=list(lease.keys),
            reply=self._claim.reply,
            pid=pid,
        )

    def _observer(self) -> AttemptObserver:
        return self._services.observer.attempt(
            self._normalizer.context,
            earlier=self._claim.earlier,
        )

    def _context(self, workspace: Workspace | Ending) -> RunContext:
        job, view = self.job, self._state.view
        return RunContext(
            project=job.project_name,
            target=job.target,
            run_id=job.run_id,
            attempt=view.attempt,
            fence=self._claim.fence.number,
            worker=self._config.worker_name,
            host=socket.gethostname(),
            labels=job.labels,
            args=self._scrubber.words(job.args),
            command=job.dbt.command,
            request_id=job.request_id,
            requested_by=job.request.requested_by,
            reason=job.request.reason,
            queued_at=job.stored_at,
            began_at=view.started_at,
            position=job.position,
            trace_id=self._trace_id,
            trace=job.trace,
            objects=object_names(job.run_id),
            target_path=None if isinstance(workspace, Ending) else str(workspace.target_path),
        )

    @property
    def _trace_id(self) -> str:
        how = self._config.telemetry.trace_context
        return run_trace_id(self.job.run_id, self.job.parent, how)

    @property
    def _tracestate(self) -> str:
        return tracestate_in(self.job.trace, self._trace_id)

    def _traceparent(self) -> str:
        """Of the run's own span, so that a query comment in dbt can carry it."""
        span_id = span_id_of(self.job.run_id, self.attempt, "run")
        return f"00-{self._trace_id}-{span_id}-01"


def _now() -> datetime:
    return datetime.now(UTC)
