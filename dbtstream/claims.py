"""How a run becomes ours: its target's lease, its state, its place in the stream, its limits.

    lease of the target  →  run state with our fence  →  the other worker's attempt closed
                                                      →  limits and a slot  →  dbt may start

`worker` brings a request, and gets what `execution` needs. Each step shuts others out more
firmly, and may be repeated after a crash. Whatever has to be waited for (a lease that somebody
still has, a place under a limit) is waited for without a slot.
"""

import asyncio
import logging
import random
from dataclasses import replace
from datetime import UTC, datetime

from dbtstream.config import Config
from dbtstream.duckdb_file import duckdb_file
from dbtstream.errors import NatsError, RequestRejected
from dbtstream.events import TraceBlock
from dbtstream.execution import Claim, Services
from dbtstream.job import Job
from dbtstream.messages import OnLost, RunView
from dbtstream.nats_link import NatsLink
from dbtstream.publishers.fence import EventFence
from dbtstream.recovery import Closed, Policy, close_attempt, save_verdict
from dbtstream.rejection import Request, bury
from dbtstream.resume import HANDED_OVER, WORKER_LOST
from dbtstream.run_lease import Leases, RunLease, Vacancy, settle_s
from dbtstream.runs import next_attempt, taken_over
from dbtstream.slots import Slot
from dbtstream.statuses import RunStatus
from dbtstream.store import RevisionConflict
from dbtstream.workspace import Workspace

logger = logging.getLogger(__name__)

LIMIT_LOOK_S = 1.0
EXHAUSTED = "attempts_exhausted"
"""The code under which a request lies in DBT_DEAD whose workers have died `max_attempts` times."""


class Claims:
    """Those of one worker."""

    def __init__(
        self, config: Config, queue_link: NatsLink, services: Services, leases: Leases
    ) -> None:
        self._config, self._link = config, queue_link
        self._services, self._leases = services, leases
        self.taken_over = 0  # runs of other workers, closed or gone on with

    async def lease(self, job: Job) -> RunLease | None:
        """The target's lease, if it is to be had now. Raises NatsError."""
        stored = await self._services.store.get_run(job.run_id)
        if stored is not None and not await self._is_settled(stored[0]):
            return None
        return await self._leases.acquire_target(job.project_name, job.target, job.run_id)

    async def begin(self, request: Request, reply: str, lease: RunLease, job: Job) -> Claim | None:
        """The run, ours by its state and in the stream; None when it has ended.

        `reply` is where its request is settled. Raises NatsError, Superseded.
        """
        fence = await self._fence(lease, job.project_name, job.target, job.run_id)
        while True:
            stored = await self._services.store.get_run(job.run_id)
            try:
                if stored is not None and stored[0].attempt > 0:
                    claim = Claim(*stored, lease, fence, reply)
                    return await self._take_over(request, claim, job)
                view = self._first_view(job, fence.number)
                revision = stored[1] if stored else 0
                revision = await self._services.store.update_run(view, revision)
            except RevisionConflict:
                continue  # `control` has just listed it as queued
            return Claim(view, revision, lease, fence, reply)

    async def end_lost(self, view: RunView, revision: int) -> bool:
        """Close a run that nobody will be given again; False if somebody is at it.

        Raises NatsError, Superseded.
        """
        if not await self._is_settled(view):
            return False
        lease = await self._leases.acquire_target(view.project, view.target, view.run_id)
        if lease is None:
            return False
        async with lease:
            fence = await self._fence(lease, view.project, view.target, view.run_id)
            claim = Claim(view, revision, lease, fence, "")
            command = view.args[0] if view.args else "_"
            closed = await self._close(claim, OnLost.FAIL, command)
            if closed.verdict is not None:
                await save_verdict(self._services, *closed.state, closed.verdict)
            return closed.verdict is not None

    async def admit(self, slot: Slot, job: Job, lease: RunLease, workspace: Workspace) -> None:
        """Until there is a place under each limit, and a slot. Cancelled when it is not wanted."""
        limits = {name: self._config.limits[name] for name in job.project.limits}
        path = await duckdb_file(job.project, job.target, workspace.environment)
        if path is not None:
            limits[f"duckdb:{path}"] = 1
        waited = False
        while limits and not await self._places(lease, limits):
            if not waited:
                waited = True
                await slot.lend()
                logger.info(
                    "waiting for a place under a limit",
                    extra={
                        "action": "claim.limit_wait",
                        "run_id": job.run_id,
                        "limits": sorted(limits),
                    },
                )
            await asyncio.sleep(LIMIT_LOOK_S * random.uniform(0.5, 1.5))  # noqa: S311
        await slot.take()

    async def _fence(self, lease: RunLease, project: str, target: str, run_id: str) -> EventFence:
        link = self._services.events_link
        return await EventFence.take(link, project, target, run_id, lease.fence)

    async def _is_settled(self, view: RunView) -> bool:
        """Whether nobody can still be at a run whose lease is not there (see `run_lease`)."""
        if view.status.is_terminal or view.attempt == 0 or view.worker is None:
            return True
        if await self._leases.vacancy(view.project, view.target) is Vacancy.GIVEN_UP:
            return True
        # Not HELD either: a server that was just started shows expired keys for a moment.
        since = self._link.connected_since
        lasted_s = 0.0 if since is None else asyncio.get_running_loop().time() - since
        return lasted_s >= settle_s(self._config.worker.lease_ttl_s)

    async def _take_over(self, request: Request, claim: Claim, job: Job) -> Claim | None:
        """A run that had begun, here or elsewhere: ended now, or ready for its next attempt."""
        if claim.view.status.is_terminal:
            return None
        closed = await self._close(claim, job.on_lost, job.dbt.command, job.trace)
        view, revision = closed.state
        if closed.verdict is not None:
            if closed.decision is OnLost.FAIL and job.on_lost is not OnLost.FAIL:
                await self._give_up(request, job)
            await save_verdict(self._services, view, revision, closed.verdict)
            return None
        if closed.events:
            view = next_attempt(view, at=datetime.now(UTC))
            revision = await self._services.store.update_run(view, revision)
        return replace(
            claim,
            view=view,
            revision=revision,
            earlier=closed.events,
            resume=closed.decision is OnLost.RESUME,
        )

    async def _close(
        self, claim: Claim, on_lost: OnLost, command: str, trace: TraceBlock | None = None
    ) -> Closed:
        """Make the run ours by its state, then end what the other worker left open."""
        cause = HANDED_OVER if claim.view.worker is None else WORKER_LOST
        view = taken_over(
            claim.view,
            worker=self._config.worker_name,
            fence=claim.fence.number,
            at=datetime.now(UTC),
        )
        revision = await self._services.store.update_run(view, claim.revision)
        policy = Policy(on_lost, command, cause, self._config.worker.max_attempts, trace)
        closed = await close_attempt(self._services, view, revision, claim.fence, policy)
        self.taken_over += bool(closed.events)
        return closed

    async def _give_up(self, request: Request, job: Job) -> None:
        """A run that nobody is to try again, though its request asked for it."""
        attempts = self._config.worker.max_attempts
        rejected = RequestRejected(EXHAUSTED, f"{attempts} workers were lost over this run")
        await bury(self._services, request, job.run_id, job.project_name, job.target, rejected)

    def _first_view(self, job: Job, fence: int) -> RunView:
        return RunView(
            run_id=job.run_id,
            project=job.project_name,
            target=job.target,
            status=RunStatus.QUEUED,
            request_id=job.request_id,
            requested_by=job.request.requested_by,
            reason=job.request.reason,
            labels=job.labels,
            attempt=1,
            fence=fence,
            worker=self._config.worker_name,
            request_seq=job.request_seq,
            queued_at=job.stored_at,
            updated_at=datetime.now(UTC),
        )

    async def _places(self, lease: RunLease, limits: dict[str, int]) -> bool:
        try:
            return await lease.take_limits(limits)
        except NatsError as error:
            logger.info(
                "cannot look for a place under a limit",
                extra={"action": "claim.limit_unseen", "error": str(error)},
            )
            return False
