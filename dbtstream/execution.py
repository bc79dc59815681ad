"""One attempt at one run, from an accepted request to the verdict. Read this first.

    workspace → dbt_process → frames → normalizer → outbox → JetStream
                                             ↘ run state and node states in KV

`worker` decides that a run begins; this module carries it through. dbt is never made to
wait for NATS: events go to the outbox, states are written behind. What ends the run, ends
it here, in this order: every node has its terminal event, `run.finished` is stored, the
state is terminal; only then does `worker` settle the request.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from dbtstream.config import DEFAULT_TARGET, Config, ProjectConfig
from dbtstream.dbt_process import EXIT_S, DbtProcess, Exit
from dbtstream.endings import Ended, Ending
from dbtstream.envelope import RunContext
from dbtstream.errors import ChildCrashed, ChildError, ConfigError
from dbtstream.events import AnyEvent, ErrorBlock, NodeFinished, RunFinished, encode_event
from dbtstream.frames import AnyFrame, Hello, Invocation, Result, Start
from dbtstream.messages import RunRequest, RunView
from dbtstream.nats_link import NatsLink
from dbtstream.normalizer import Normalizer
from dbtstream.outbox import Outbox, Record
from dbtstream.policy import DbtArgs, worker_args
from dbtstream.publishers.jetstream import JetStreamPublisher
from dbtstream.run_state import RunState
from dbtstream.scrub import Scrubber
from dbtstream.statuses import Reason, RunStatus
from dbtstream.store import NodeStates, Store
from dbtstream.subjects import event_headers, event_subject
from dbtstream.trace import TraceParent, span_id_of, trace_id_of
from dbtstream.workspace import Workspace, keep_parse_cache, prepare_workspace

logger = logging.getLogger(__name__)

FRAMES_PER_TURN = 32
"""After so many frames that were already there, other tasks get the loop."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request that may run: checked, named, and with its place in the queue."""

    run_id: str
    project_name: str
    project: ProjectConfig
    target: str
    request: RunRequest
    request_id: str | None
    dbt: DbtArgs
    request_seq: int
    stored_at: datetime
    position: int = 0
    parent: TraceParent | None = None
    tracestate: str = ""


@dataclass(frozen=True, slots=True)
class Services:
    """What every execution of a worker shares."""

    config: Config
    events_link: NatsLink
    store: Store
    node_states: NodeStates


@dataclass(frozen=True, slots=True)
class Stop:
    """Why dbt is to stop."""

    reason: Reason  # CANCELLED or TIMEOUT
    by: str
    text: str | None = None


class Execution:
    """One attempt. `run` once; `stop` at any time, as often as one likes."""

    def __init__(
        self, job: Job, services: Services, *, view: RunView, revision: int | None
    ) -> None:
        self.job = job
        self._services = services
        self._worker = services.config.worker
        self._state = RunState(services.store, view, revision)
        self._normalizer: Normalizer
        self._outbox: Outbox
        self._stop: asyncio.Future[Stop] = asyncio.get_running_loop().create_future()
        self._last_frame_s = 0.0
        self._saw_result = False
        self._scrubber = Scrubber.for_environment(os.environ, ())
        self.verdict: RunFinished | None = None

    @property
    def status(self) -> RunStatus:
        return self._state.view.status

    async def run(self) -> RunStatus:
        """Carry the run to its terminal status and see that the world knows of it."""
        job = self.job
        workspace = await self._prepare()
        self._normalizer = Normalizer(self._context(workspace))
        self._outbox = await Outbox.open(
            self._services.config.state_dir / "outbox",
            job.run_id,
            self._state.view.attempt,
            max_bytes=self._worker.outbox_max_bytes,
        )
        publisher = JetStreamPublisher(
            self._services.events_link, self._outbox, on_failed=self._not_stored
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(publisher.run(), name=f"publish {job.run_id}")
            saving = tasks.create_task(self._state.run(), name=f"state {job.run_id}")
            try:
                self._emit(self._normalizer.queued(_now()))
                ending = await self._attempt(workspace)
            except asyncio.CancelledError:
                # The daemon is being hurried: what is known goes to disk and out at its next start.
                self._finish(self._hurried())
                await asyncio.shield(self._outbox.close())
                saving.cancel()
                raise
            verdict = self._finish(ending)
            self._outbox.close_input()
            await self._outbox.drained()
            # Only now: a terminal state means that the events are stored, too.
            self._state.move(
                verdict.status,
                at=verdict.time,
                exit_code=verdict.exit_code,
                error=verdict.error.message if verdict.error else None,
                counts=verdict.counts,
                last_seq=verdict.seq,
            )
            self._state.close()
        await self._outbox.remove()
        return self.status

    def stop(self, reason: Reason, *, by: str, text: str | None = None) -> None:
        """Ask for an end. The first reason counts; before the start it prevents the start."""
        if not self._stop.done():
            self._stop.set_result(Stop(reason, by, text))

    # The attempt, in the order in which things happen.

    async def _prepare(self) -> Workspace | Ending:
        job = self.job
        try:
            workspace = await asyncio.to_thread(
                prepare_workspace,
                self._services.config,
                job.project_name,
                job.project,
                job.target,
                job.run_id,
                self._traceparent(),
            )
        except (ConfigError, OSError) as error:
            block = ErrorBlock(class_=type(error).__name__, message=str(error))
            return Ending(how=Ended.NOT_STARTED, error=block)
        self._scrubber = Scrubber.for_environment(workspace.environment, workspace.secret_names)
        self._state.note(args=self._scrubber.words(job.request.args))
        return workspace

    async def _attempt(self, workspace: Workspace | Ending) -> Ending:
        if isinstance(workspace, Ending):
            return workspace
        if self._stop.done():
            return self._stopped_before_start()
        self._state.move(RunStatus.STARTING, at=_now())
        try:
            process = await self._spawn(workspace)
        except ChildError as error:
            return Ending.of_error(error)
        try:
            return await self._follow(process, workspace)
        finally:
            await asyncio.shield(process.close())

    async def _spawn(self, workspace: Workspace) -> DbtProcess:
        job = self.job
        variables = job.request.vars
        start = Start(
            args=worker_args(
                job.dbt,
                target=None if job.target == DEFAULT_TARGET else job.target,
                profile=job.project.profile,
                vars_json=msgspec.json.encode(variables).decode() if variables else "",
            ),
            project_dir=job.project.path,
            secret_env=list(workspace.secret_names),
            log_level=job.project.log_level,
            queries=job.project.queries,
            query_sql=job.project.query_sql,
        )
        self._normalizer.spawned(_now())
        return await DbtProcess.start(job.project.python, start, environment=workspace.environment)

    async def _follow(self, process: DbtProcess, workspace: Workspace) -> Ending:
        """Frames until the child is gone, with somebody watching the clock."""
        watch = asyncio.create_task(self._watch(process), name=f"watch {self.job.run_id}")
        error: ChildError | None = None
        try:
            try:
                self._take(await process.hello(timeout_s=self._worker.handshake_timeout_s))
                await self._read(process)
            except ChildError as problem:
                error = problem
                process.kill()
            exited = await process.wait(EXIT_S)
        finally:
            watch.cancel()
            await asyncio.wait({watch})
        if self._saw_result:
            await self._keep_parse_cache(workspace)
        return self._ending(error, exited)

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
        self._last_frame_s = asyncio.get_running_loop().time()
        self._emit(self._normalizer.frame(frame))
        match frame:
            case Hello():
                self._state.move(RunStatus.RUNNING, at=_now())
            case Result():
                self._saw_result = True
            case Invocation():
                self._state.note(invocation_id=frame.invocation_id)

    async def _watch(self, process: DbtProcess) -> None:
        """Wait for a reason to stop dbt; then ask, insist, and end it. Each rung is an event."""
        stop = await self._reason_to_stop()
        self.stop(stop.reason, by=stop.by, text=stop.text)
        self._step("requested", stop)
        await process.cancel()  # the child tells of `interrupting` itself
        await asyncio.sleep(self._worker.cancel_grace_s)
        self._step("terminating", stop)
        process.terminate()
        await asyncio.sleep(self._worker.kill_grace_s)
        self._step("killing", stop)
        process.kill()

    async def _reason_to_stop(self) -> Stop:
        """A cancel, the run's time limit, or too long a silence; whichever is first."""
        loop = asyncio.get_running_loop()
        request, project = self.job.request, self.job.project
        limit_s = request.timeout_s or project.timeout_s
        silence_s = request.silence_timeout_s or project.silence_timeout_s
        begun = self._last_frame_s = loop.time()
        while not self._stop.done():
            now = loop.time()
            if limit_s and now >= begun + limit_s:
                return Stop(Reason.TIMEOUT, "timeout_s", f"ran longer than {limit_s:g} s")
            if silence_s and now >= self._last_frame_s + silence_s:
                return Stop(Reason.TIMEOUT, "silence_timeout_s", f"no event for {silence_s:g} s")
            ends = [begun + limit_s] if limit_s else []
            ends += [self._last_frame_s + silence_s] if silence_s else []
            await asyncio.wait({self._stop}, timeout=min(ends) - now if ends else None)
        return self._stop.result()

    def _step(self, step: str, stop: Stop) -> None:
        logger.info(
            "stopping dbt",
            extra={
                "action": "run.cancel",
                "run_id": self.job.run_id,
                "step": step,
                "by": stop.by,
                "reason": stop.text,
            },
        )
        self._emit(
            self._normalizer.cancel_step(
                step, by=stop.by, reason=stop.text, stop=stop.reason, at=_now()
            )
        )

    # How it ended.

    def _ending(self, error: ChildError | None, exited: Exit) -> Ending:
        stop = self._stop.result().reason if self._stop.done() else None
        tail = self._scrubber.text(exited.output_tail)
        if error is None and not self._saw_result:
            error = ChildCrashed("ended without a result", exit_code=exited.code, stderr_tail=tail)
        if error is None:
            return Ending(how=Ended.RESULT, exit_code=exited.code, stop=stop)
        ending = Ending.of_error(error, oom=exited.oom, stop=stop)
        block = ending.error and msgspec.structs.replace(
            ending.error, message=self._scrubber.text(ending.error.message)
        )
        return msgspec.structs.replace(
            ending, error=block, stderr_tail=tail or None, exit_code=exited.code
        )

    def _stopped_before_start(self) -> Ending:
        stop = self._stop.result()
        self._step("requested", stop)
        return Ending(how=Ended.NOT_STARTED, stop=stop.reason)

    def _hurried(self) -> Ending:
        self.stop(Reason.CANCELLED, by="shutdown")
        return Ending(how=Ended.CRASHED, stop=self._stop.result().reason)

    def _finish(self, ending: Ending) -> RunFinished:
        self._tell_drops()
        for event in self._normalizer.end(ending, at=_now()):
            # Whatever their family, closing events are kept: no gap can follow them.
            self._put(event, family="run")
        verdict = self.verdict
        assert verdict is not None  # noqa: S101 - end() always yields run.finished
        logger.info(
            "run finished",
            extra={
                "action": "run.finished",
                "run_id": self.job.run_id,
                "project": self.job.project_name,
                "target": self.job.target,
                "status": verdict.status,
                "elapsed_s": round(verdict.elapsed_s, 3),
            },
        )
        return verdict

    # Events out.

    def _emit(self, events: Iterable[AnyEvent]) -> None:
        """Into the outbox, never waiting. What it had no room for is told in a gap."""
        for event in events:
            self._put(event, family=event.family)
        self._tell_drops()

    def _tell_drops(self) -> None:
        for dropped in self._outbox.take_dropped():
            for event in self._normalizer.gap(
                dropped.family,
                dropped.count,
                "the outbox is full",
                at=_now(),
                from_seq=dropped.from_seq,
                to_seq=dropped.to_seq,
            ):
                self._put(event, family=event.family)

    def _put(self, event: AnyEvent, *, family: str) -> None:
        if isinstance(event, NodeFinished):
            self._services.node_states.put(event)
        elif isinstance(event, RunFinished):
            self.verdict = event
        content_type = self.job.project.content_type
        self._outbox.put(
            Record(
                seq=event.seq,
                family=family,
                subject=event_subject(event, command=self.job.dbt.command),
                headers=event_headers(
                    event, content_type=content_type, tracestate=self.job.tracestate
                ),
                payload=encode_event(event, content_type),
            )
        )

    def _not_stored(self, record: Record, problem: str) -> None:
        """NATS will never take this event: its number is covered by a gap, if one may follow."""
        if self.verdict is None:
            self._emit(
                self._normalizer.gap(
                    record.family,
                    1,
                    f"refused by NATS: {problem}",
                    at=_now(),
                    from_seq=record.seq,
                    to_seq=record.seq,
                )
            )
        logger.error(
            "event refused by NATS and not stored",
            extra={
                "action": "event.refused",
                "run_id": self.job.run_id,
                "seq": record.seq,
                "subject": record.subject,
                "problem": problem,
            },
        )

    def _context(self, workspace: Workspace | Ending) -> RunContext:
        job, view = self.job, self._state.view
        return RunContext(
            project=job.project_name,
            target=job.target,
            run_id=job.run_id,
            attempt=view.attempt,
            fence=view.fence,
            worker=self._services.config.worker_name,
            host=socket.gethostname(),
            labels=job.project.labels | job.request.labels,
            args=self._scrubber.words(job.request.args),
            command=job.dbt.command,
            request_id=job.request_id,
            requested_by=job.request.requested_by,
            reason=job.request.reason,
            queued_at=job.stored_at,
            position=job.position,
            trace_id=self._trace_id,
            target_path=None if isinstance(workspace, Ending) else str(workspace.target_path),
        )

    @property
    def _trace_id(self) -> str:
        return self.job.parent.trace_id if self.job.parent else trace_id_of(self.job.run_id)

    def _traceparent(self) -> str:
        """Of the run's own span, so that a query comment in dbt can carry it."""
        span_id = span_id_of(self.job.run_id, self._state.view.attempt, "run")
        return f"00-{self._trace_id}-{span_id}-01"


def _now() -> datetime:
    return datetime.now(UTC)
