"""What runs, how many at a time, and what becomes of a request that cannot.

One loop per project and target asks `consumer` for the next request when a slot is free,
checks it (message, limits, policy, duplicates, expiry), and hands it to `execution`. A
request that cannot run is answered with `run.rejected` and kept in DBT_DEAD with its bytes.
A request that comes again after its run began elsewhere is not run again: see `recovery`.
"""

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from dbtstream.config import Config
from dbtstream.consumer import RequestConsumer
from dbtstream.errors import NatsError, NatsUnavailable, RequestRejected
from dbtstream.execution import Execution, Job, Services
from dbtstream.lease import RequestLease
from dbtstream.messages import RejectCode, RunRequest, RunView, decode_run_request
from dbtstream.nats_link import NatsLink
from dbtstream.policy import check_args
from dbtstream.recovery import close_lost_run
from dbtstream.rejection import reject
from dbtstream.runs import advance
from dbtstream.statuses import Reason, RunStatus
from dbtstream.subjects import (
    CONTROL_OWNS,
    H_MSG_ID,
    H_RUN_ID,
    H_TRACEPARENT,
    H_TRACESTATE,
    is_run_id,
    run_id_of_request,
    runs_subject,
)
from dbtstream.trace import parse_traceparent
from dbtstream.unknown_subjects import UnknownSubjects
from dbtstream.workspace import forget_old_runs

logger = logging.getLogger(__name__)

RETRY_S = 2.0
SWEEP_S = 3.0
OWNER_ANSWERS_S = 3.0


@dataclass(slots=True)
class WorkerStats:
    """What passed through the worker since its start."""

    received: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    given_back: int = 0
    repeated: int = 0  # redeliveries of runs that had ended
    lost: int = 0  # runs of a vanished worker that were closed
    finished: Counter[str] = field(default_factory=Counter)


class Worker:
    """Runs requests of the configured projects until `stop`."""

    def __init__(self, config: Config, queue_link: NatsLink, services: Services) -> None:
        self.stats = WorkerStats()
        self.executions: dict[str, Execution] = {}
        self._config = config
        self._link = queue_link
        self._services = services
        self._free = config.worker.slots
        self._changed = asyncio.Event()  # a slot is free, or we are stopping
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Until `stop` was called and what was running has ended."""
        async with asyncio.TaskGroup() as loops:
            for name, project in self._config.projects.items():
                for target in project.targets:
                    loops.create_task(
                        self._serve(name, target), name=f"requests of {name}.{target}"
                    )
            sweeper = UnknownSubjects(self._link, self._config, self._services)
            loops.create_task(self._sweep(sweeper), name="unknown subjects")

    def stop(self) -> None:
        """Take no new request. Idempotent; running ones go on (see `cancel_all`)."""
        self._stopping.set()
        self._changed.set()

    def cancel_all(self, *, by: str) -> None:
        for execution in self.executions.values():
            execution.stop(Reason.CANCELLED, by=by)

    def cancel(self, run_id: str, *, by: str, text: str | None) -> bool:
        """Whether the run is ours and has been asked to stop."""
        if (execution := self.executions.get(run_id)) is None:
            return False
        execution.stop(Reason.CANCELLED, by=by, text=text)
        return True

    async def _serve(self, name: str, target: str) -> None:
        consumer = RequestConsumer(self._link, self._config, runs_subject(name, target))
        try:
            while await self._slot_or_stop():
                try:
                    lease = await self._next(consumer)
                except NatsError as error:
                    self._complain(name, target, error)
                    await self._pause(RETRY_S)
                    continue
                if lease is not None:
                    await self._handle(lease, name, target)
        finally:
            await consumer.close()

    async def _sweep(self, sweeper: UnknownSubjects) -> None:
        while not self._stopping.is_set():
            try:
                for code in await sweeper.sweep():
                    self.stats.received += 1
                    self.stats.rejected[code] += 1
            except NatsError as error:
                self._complain("-", "-", error)
            await self._pause(SWEEP_S)

    async def _next(self, consumer: RequestConsumer) -> RequestLease | None:
        """The next request, or None when there was none for a while or we are stopping."""
        fetch = asyncio.ensure_future(consumer.next())
        await self._or_stop(fetch)
        if fetch.done():
            return fetch.result()
        fetch.cancel()
        await asyncio.wait({fetch})
        if fetch.cancelled() or fetch.exception() is not None:
            return None
        return fetch.result()  # it came in the same turn, and will be given back

    async def _handle(self, lease: RequestLease, name: str, target: str) -> None:
        """One delivered request, to its settlement."""
        if self._free == 0 or self._stopping.is_set():
            # The last slot went to another target while this fetch was waiting.
            self.stats.given_back += 1
            await lease.give_back()
            return
        self.stats.received += 1
        self._free -= 1
        try:
            async with lease:
                await self._settle(lease, name, target)
        finally:
            self._free += 1
            self._changed.set()

    async def _settle(self, lease: RequestLease, name: str, target: str) -> None:
        run_id, stored = derived_run_id(lease), None
        try:
            run_id, stored = await self._known(lease)
            if stored is not None and stored[0].attempt > 0:
                await self._settle_repeated(lease, *stored)
                return
            job = await self._accept(lease, run_id, name, target)
        except RequestRejected as rejected:
            self.stats.rejected[rejected.code] += 1
            await reject(self._services, lease, run_id, name, target, rejected)
            if stored is not None:
                await self._note_rejection(*stored, rejected)
            await lease.term()
            return
        except NatsError as error:
            self._complain(name, target, error)
            await lease.give_back()
            await self._pause(RETRY_S)
            return
        await self._execute(lease, job, stored)

    async def _known(self, lease: RequestLease) -> tuple[str, tuple[RunView, int] | None]:
        """The run of this request, and what is stored of it.

        The id in the header counts unless it belongs to another request: a plain publisher
        may write anything there, and must not end, or hide behind, somebody else's run.
        """
        given = lease.headers.get(H_RUN_ID, "")
        if is_run_id(given):
            stored = await self._services.store.get_run(given)
            if stored is None or stored[0].request_seq == lease.stream_seq:
                return given, stored
        derived = derived_run_id(lease)
        return derived, await self._services.store.get_run(derived)

    async def _accept(self, lease: RequestLease, run_id: str, name: str, target: str) -> Job:
        """The request as a job. Raises RequestRejected, NatsError."""
        request = decode_run_request(lease.data)
        project = self._config.projects[name]
        refuse_what_is_not_built(request)
        if request.not_after is not None and request.not_after < datetime.now(UTC):
            raise RequestRejected(
                RejectCode.EXPIRED, f"it was not to begin after {request.not_after}", "not_after"
            )
        dbt = check_args(request.args, project)
        request_id = request.request_id or lease.headers.get(H_MSG_ID)
        if request_id is not None:
            first = await self._services.store.remember_request(name, target, request_id, run_id)
            if first != run_id:
                raise RequestRejected(
                    RejectCode.DUPLICATE, f"request_id {request_id} is run {first}", "request_id"
                )
        return Job(
            run_id=run_id,
            project_name=name,
            project=project,
            target=target,
            request=request,
            request_id=request_id,
            dbt=dbt,
            request_seq=lease.stream_seq,
            stored_at=lease.stored_at,
            parent=parse_traceparent(lease.headers.get(H_TRACEPARENT)),
            tracestate=lease.headers.get(H_TRACESTATE, ""),
        )

    async def _execute(
        self, lease: RequestLease, job: Job, stored: tuple[RunView, int] | None
    ) -> None:
        view = RunView(
            run_id=job.run_id,
            project=job.project_name,
            target=job.target,
            status=RunStatus.QUEUED,
            request_id=job.request_id,
            requested_by=job.request.requested_by,
            reason=job.request.reason,
            labels=job.project.labels | job.request.labels,
            attempt=1,
            worker=self._config.worker_name,
            request_seq=job.request_seq,
            queued_at=job.stored_at,
            updated_at=datetime.now(UTC),
        )
        revision = stored[1] if stored is not None else None
        execution = Execution(job, self._services, view=view, revision=revision)
        self.executions[job.run_id] = execution
        try:
            status = await execution.run()
        finally:
            del self.executions[job.run_id]
        self.stats.finished[status] += 1
        await lease.ack()
        await asyncio.to_thread(
            forget_old_runs,
            self._config,
            job.project_name,
            job.target,
            running=set(self.executions),
        )

    async def _settle_repeated(self, lease: RequestLease, view: RunView, revision: int) -> None:
        """A request whose run had begun: a worker vanished, or an ack did."""
        if view.status.is_terminal:
            self.stats.repeated += 1
        elif await self._still_runs(view):
            # NATS was away for longer than ack_wait and took the silence for a death.
            self.stats.given_back += 1
            await lease.give_back()
            await self._pause(RETRY_S)
            return
        else:
            self.stats.lost += 1
            await close_lost_run(self._services, view, revision)
        await lease.ack()

    async def _still_runs(self, view: RunView) -> bool:
        """Whether some worker answers that it is at this run. Raises NatsRefused."""
        try:
            answer = await self._link.request(
                CONTROL_OWNS, view.run_id.encode(), timeout_s=OWNER_ANSWERS_S
            )
        except NatsUnavailable:
            return False
        logger.info(
            "the run was handed to us but its worker is alive",
            extra={
                "action": "worker.still_runs",
                "run_id": view.run_id,
                "worker": answer.data.decode("utf-8", "replace"),
            },
        )
        return True

    async def _note_rejection(
        self, view: RunView, revision: int, rejected: RequestRejected
    ) -> None:
        """A run that `control` had accepted, and listed as queued, does not stay so."""
        at = datetime.now(UTC)
        ended = msgspec.structs.replace(
            advance(view, RunStatus.ERROR, at=at), error=str(rejected), exit_code=2
        )
        try:
            await self._services.store.update_run(ended, revision)
        except NatsError as error:
            self._complain(view.project, view.target, error)

    async def _slot_or_stop(self) -> bool:
        """True when there is a free slot, False when we are stopping."""
        while self._free == 0 and not self._stopping.is_set():
            self._changed.clear()
            await self._changed.wait()
        return not self._stopping.is_set()

    async def _pause(self, pause_s: float) -> None:
        pause = asyncio.ensure_future(asyncio.sleep(pause_s))
        await self._or_stop(pause)
        pause.cancel()

    async def _or_stop(self, work: asyncio.Future[Any]) -> None:
        """Until `work` is done or we are stopping; a cancel of ours is a cancel of it."""
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            work.cancel()
            raise
        finally:
            stopping.cancel()

    def _complain(self, name: str, target: str, error: NatsError) -> None:
        log = logger.info if isinstance(error, NatsUnavailable) else logger.error
        log(
            "cannot fetch requests for now",
            extra={
                "action": "worker.fetch_failed",
                "project": name,
                "target": target,
                "error": str(error),
            },
        )


def derived_run_id(lease: RequestLease) -> str:
    """The same at every delivery of the request."""
    return run_id_of_request(lease.stream_seq, lease.stored_at)


def refuse_what_is_not_built(request: RunRequest) -> None:
    """An option that would be ignored is refused: silence would be taken for consent."""
    for name, default in (
        ("retry_of", None),
        ("state", None),
        ("on_lost", None),
        ("on_busy", "queue"),
    ):
        if getattr(request, name) != default:
            raise RequestRejected(
                RejectCode.BAD_MESSAGE,
                f"{name} is part of the contract but not of this version of dbtstream",
                name,
            )
