"""What runs, how many at a time, and what becomes of a request that cannot.

One loop per project and target asks `consumer` for the next request when a slot is free,
checks it (message, limits, policy, duplicates, expiry), makes the run ours (`claims`), and hands
it to `execution`. A request that cannot run is answered with `run.rejected` and kept in DBT_DEAD
with its bytes. What a request has to wait for, it waits for in our hands, with heartbeats, so
that the order of the queue holds.
"""

import asyncio
import logging
import socket
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import msgspec

from dbtstream import __version__
from dbtstream.claims import Claims
from dbtstream.config import Config
from dbtstream.consumer import RequestConsumer
from dbtstream.errors import NatsError, NatsUnavailable, RequestRejected, Superseded
from dbtstream.execution import Execution, Outcome, Services
from dbtstream.job import Job, checked_args
from dbtstream.lease import RequestLease
from dbtstream.messages import (
    OnLost,
    RejectCode,
    RunRequest,
    RunView,
    WorkerStatus,
    decode_run_request,
)
from dbtstream.nats_link import NatsLink
from dbtstream.policy import DbtArgs
from dbtstream.queue_watch import QueueWatch
from dbtstream.readings import Flow
from dbtstream.rejection import reject
from dbtstream.run_lease import Leases, RunLease
from dbtstream.runs import advance
from dbtstream.slots import Slot, Slots
from dbtstream.statuses import Reason, RunStatus
from dbtstream.stuck_requests import StuckRequests
from dbtstream.subjects import (
    H_MSG_ID,
    H_RUN_ID,
    is_run_id,
    run_id_of_request,
    runs_subject,
)
from dbtstream.trace import trace_block
from dbtstream.unknown_subjects import UnknownSubjects
from dbtstream.workspace import forget_old_runs

logger = logging.getLogger(__name__)

RETRY_S = 2.0
SWEEP_S = 3.0
LEASE_LOOK_S = 1.0


@dataclass(slots=True)
class WorkerStats:
    """What passed through the worker since its start."""

    received: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    given_back: int = 0
    repeated: int = 0  # redeliveries of runs that had ended, or could only be ended
    superseded: int = 0  # runs that another worker has taken from us
    finished: Counter[str] = field(default_factory=Counter)


class Worker:
    """Runs requests of the configured projects until `stop`."""

    def __init__(
        self, config: Config, queue_link: NatsLink, services: Services, leases: Leases
    ) -> None:
        self.stats = WorkerStats()
        self.executions: dict[str, Execution] = {}
        self._config = config
        self._link = queue_link
        self._services = services
        self._claims = Claims(config, queue_link, services, leases)
        self._slots = Slots(config.worker.slots)
        self._stopping = asyncio.Event()
        self._started_at = datetime.now(UTC)
        self._events_out = Flow()  # of runs that have ended here

    def status(self, at: datetime) -> WorkerStatus:
        """For whoever asks."""
        slots = self._config.worker.slots
        return WorkerStatus(
            worker=self._config.worker_name,
            version=__version__,
            host=socket.gethostname(),
            at=at,
            started_at=self._started_at,
            slots=slots,
            used=slots - self._slots.free,
            draining=self._stopping.is_set(),
            projects=sorted(self._config.projects),
            runs=[execution.at_work(at) for execution in self.executions.values()],
        )

    async def run(self) -> None:
        """Until `stop` was called and what was running has ended."""
        async with asyncio.TaskGroup() as loops:
            for name, project in self._config.projects.items():
                for target in project.targets:
                    loops.create_task(
                        self._serve(name, target), name=f"requests of {name}.{target}"
                    )
            unknown = UnknownSubjects(self._link, self._config, self._services)
            loops.create_task(self._sweep(unknown), name="unknown subjects")
            stuck = StuckRequests(self._link, self._services, self._claims.end_lost)
            loops.create_task(self._sweep(stuck), name="stuck requests")

    def stop(self) -> None:
        """Take no new request, and give back those that wait. Idempotent; running dbt goes on
        (see `end_all`)."""
        self._stopping.set()
        for execution in self.executions.values():
            execution.stop_before_start(by="shutdown")

    def end_all(self, *, by: str) -> None:
        """Cancel what runs, or hand it over where the config says so."""
        hand_over = self._config.worker.on_drain == "hand_over"
        for execution in self.executions.values():
            over = hand_over and execution.job.on_lost is not OnLost.FAIL
            execution.stop(Reason.HANDED_OVER if over else Reason.CANCELLED, by=by)

    def cancel(self, run_id: str, *, by: str, text: str | None) -> bool:
        """Whether the run is ours and has been asked to stop."""
        if (execution := self.executions.get(run_id)) is None:
            return False
        execution.stop(Reason.CANCELLED, by=by, text=text)
        return True

    @property
    def slots_used(self) -> int:
        return self._config.worker.slots - self._slots.free

    @property
    def requests(self) -> Flow:
        stats = self.stats
        left = stats.given_back + stats.repeated + stats.superseded
        return Flow(
            stats.received, sum(stats.finished.values()), left, sum(stats.rejected.values())
        )

    @property
    def events(self) -> Flow:
        """Of all runs since the start."""
        total = replace(self._events_out)
        for execution in self.executions.values():
            total.add(execution.flow)
        return total

    # From the queue to a decision.

    async def _serve(self, name: str, target: str) -> None:
        consumer = RequestConsumer(self._link, self._config, runs_subject(name, target))
        try:
            while await self._slot_or_stop():
                try:
                    request = await self._next(consumer)
                except NatsError as error:
                    self._complain(name, target, error)
                    await self._pause(RETRY_S)
                    continue
                if request is not None:
                    await self._handle(request, name, target)
        finally:
            await consumer.close()

    async def _sweep(self, sweeper: UnknownSubjects | StuckRequests) -> None:
        """Requests that no consumer of ours will ever be handed."""
        while not self._stopping.is_set():
            try:
                for code in await sweeper.sweep():
                    self.stats.received += 1
                    self.stats.rejected[code] += 1
            except Superseded as error:
                self._stand_aside("-", error)
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

    async def _handle(self, request: RequestLease, name: str, target: str) -> None:
        """One delivered request, to its settlement."""
        if self._stopping.is_set() or not self._slots.take_now():
            # The last slot went to another target while this fetch was waiting.
            self.stats.given_back += 1
            await request.give_back()
            return
        self.stats.received += 1
        slot = Slot(self._slots)
        try:
            async with request:
                await self._settle(request, slot, name, target)
        finally:
            await slot.lend()

    async def _settle(self, request: RequestLease, slot: Slot, name: str, target: str) -> None:
        """Ack, term, nak, or leave it to whoever has the run now."""
        run_id, stored = derived_run_id(request), None
        try:
            run_id, stored = await self._known(request)
            if stored is not None and stored[0].status.is_terminal:
                self.stats.repeated += 1
                await self._reject_again(request, stored[0])
                await request.ack()
                return
            job = await self._accept(request, run_id, name, target, stored)
            outcome = await self._with_lease(request, slot, job)
        except RequestRejected as rejected:
            self.stats.rejected[rejected.code] += 1
            await reject(self._services, request, run_id, name, target, rejected)
            if stored is not None:
                await self._note_rejection(*stored, rejected)
            await request.term()
        except Superseded as error:
            self._stand_aside(run_id, error)
        except NatsError as error:
            self._complain(name, target, error)
            await request.give_back()
            await self._pause(RETRY_S)
        else:
            await self._settle_as(request, outcome, job)

    async def _settle_as(self, request: RequestLease, outcome: Outcome, job: Job) -> None:
        match outcome:
            case Outcome.ENDED:
                await request.ack()
                await asyncio.to_thread(
                    forget_old_runs,
                    self._config,
                    job.project_name,
                    job.target,
                    running=set(self.executions),
                )
            case Outcome.GIVEN_BACK:
                self.stats.given_back += 1
                await request.give_back()
            case Outcome.SUPERSEDED:
                # Not settled: the message is in the other one's hands. Even an ack of ours
                # would count (JetStream fences none), and take it out of the queue.
                self.stats.superseded += 1

    async def _known(self, request: RequestLease) -> tuple[str, tuple[RunView, int] | None]:
        """The run of this request, and what is stored of it.

        The id in the header counts unless it belongs to another request: a plain publisher
        may write anything there, and must not end, or hide behind, somebody else's run.
        """
        given = request.headers.get(H_RUN_ID, "")
        if is_run_id(given):
            stored = await self._services.store.get_run(given)
            if stored is None or stored[0].request_seq == request.stream_seq:
                return given, stored
        derived = derived_run_id(request)
        return derived, await self._services.store.get_run(derived)

    async def _accept(
        self,
        lease: RequestLease,
        run_id: str,
        name: str,
        target: str,
        stored: tuple[RunView, int] | None,
    ) -> Job:
        """The request as a job. Raises RequestRejected, NatsError.

        A run that has begun cannot be rejected any more: where the config does not allow it
        now, it is closed as lost.
        """
        project = self._config.projects[name]
        try:
            request = decode_run_request(lease.data)
            dbt = await checked_args(self._services.store, name, project, target, request)
            if not has_begun(stored):
                check_age(request)
        except RequestRejected:
            if not has_begun(stored):
                raise
            request, dbt = RunRequest(on_lost=OnLost.FAIL), DbtArgs("_", [])
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
            trace=trace_block(lease.headers, self._config.telemetry.baggage),
        )

    # Under the lease.

    async def _with_lease(self, request: RequestLease, slot: Slot, job: Job) -> Outcome:
        """The run, once it is ours. Raises NatsError, Superseded."""
        lease = await self._lease(slot, job)
        if lease is None:
            return Outcome.GIVEN_BACK
        async with lease:
            claim = await self._claims.begin(request, request.reply, lease, job)
            if claim is None:
                self.stats.repeated += 1
                return Outcome.ENDED
            execution = Execution(job, self._services, claim)
            self.executions[job.run_id] = execution
            if self._stopping.is_set():
                execution.stop_before_start(by="shutdown")
            watch = QueueWatch(self._link, self._services, execution)
            watching = asyncio.create_task(watch.run(), name=f"queue behind {job.run_id}")
            try:
                outcome = await execution.run(
                    lambda workspace: self._claims.admit(slot, job, lease, workspace)
                )
            finally:
                del self.executions[job.run_id]
                self._events_out.add(execution.flow)
                watching.cancel()
                await asyncio.wait({watching})
        if outcome is Outcome.ENDED:
            self.stats.finished[execution.view.status] += 1
        return outcome

    async def _lease(self, slot: Slot, job: Job) -> RunLease | None:
        """The target's lease; None when we are stopping. Raises NatsError."""
        waited = False
        while not self._stopping.is_set():
            if (lease := await self._claims.lease(job)) is not None:
                return lease
            if not waited:
                waited = True
                await slot.lend()
                logger.info(
                    "waiting for the lease of another worker",
                    extra={
                        "action": "worker.lease_wait",
                        "run_id": job.run_id,
                        "project": job.project_name,
                        "target": job.target,
                    },
                )
            await self._pause(LEASE_LOOK_S)
        return None

    # Smaller things.

    def _stand_aside(self, run_id: str, error: Superseded) -> None:
        self.stats.superseded += 1
        logger.warning(
            "another worker took over a run that we were about to",
            extra={"action": "run.superseded", "run_id": run_id, "problem": str(error)},
        )

    async def _reject_again(self, request: RequestLease, view: RunView) -> None:
        """Where its state says so: whoever wrote that may have died before the rest."""
        if view.attempt == 0 and view.error is not None:
            code, _, message = view.error.partition(": ")
            rejected = RequestRejected(code, message)
            await reject(self._services, request, view.run_id, view.project, view.target, rejected)

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
        free = asyncio.ensure_future(self._slots.some_free())
        await self._or_stop(free)
        free.cancel()
        await asyncio.wait({free})
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


def has_begun(stored: tuple[RunView, int] | None) -> bool:
    return stored is not None and stored[0].attempt > 0


def check_age(request: RunRequest) -> None:
    """Raises RequestRejected when it has waited for too long."""
    if request.not_after is not None and request.not_after < datetime.now(UTC):
        raise RequestRejected(
            RejectCode.EXPIRED, f"it was not to begin after {request.not_after}", "not_after"
        )


def derived_run_id(request: RequestLease) -> str:
    """The same at every delivery of the request."""
    return run_id_of_request(request.stream_seq, request.stored_at)
