"""What waits behind a run that is under way, and does not want to: `on_busy`.

The worker that has a project and target looks at the requests behind the current one as they
come in. `skip`: it is rejected, since the target is busy. `replace`: the current run is
cancelled. `coalesce`: it is rejected if one that asks for the same waits already, and is sure to
do its work. All others wait for their turn; in the order of the queue, whatever they say.
"""

import asyncio
import logging
from datetime import UTC, datetime

import msgspec

from dbtstream.errors import NatsError, RequestRejected
from dbtstream.execution import Execution, Services
from dbtstream.messages import OnBusy, RejectCode, RunRequest, RunView, decode_run_request
from dbtstream.nats_link import NatsLink
from dbtstream.rejection import reject
from dbtstream.runs import advance
from dbtstream.statuses import Reason, RunStatus
from dbtstream.stored_message import (
    StoredMessage,
    delete_stored,
    next_stored,
    stored_message,
)
from dbtstream.subjects import H_RUN_ID, RUNS_STREAM, is_run_id, run_id_of_request, runs_subject

logger = logging.getLogger(__name__)

LOOK_S = 1.0


class QueueWatch:
    """Of one execution. `run` until cancelled."""

    def __init__(self, link: NatsLink, services: Services, execution: Execution) -> None:
        job = execution.job
        self._link, self._services, self._execution = link, services, execution
        self._subject = runs_subject(job.project_name, job.target)
        self._seen = job.request_seq
        self._waiting: dict[bytes, tuple[str, int]] = {}
        """What is asked for -> the run that will do it, and its place in the queue."""

    async def run(self) -> None:
        while True:
            try:
                while (request := await self._next()) is not None:
                    await self._look_at(request)
                    self._seen = request.stream_seq
            except NatsError as error:
                logger.debug(
                    "cannot look at the queue for now",
                    extra={"action": "queue.unseen", "error": str(error)},
                )
            await asyncio.sleep(LOOK_S)

    async def _look_at(self, request: StoredMessage) -> None:
        try:
            wanted = decode_run_request(request.data)
        except RequestRejected:
            return  # it is told so at its turn
        run_id = await self._run_id(request)
        current = self._execution.job.run_id
        match wanted.on_busy:
            case OnBusy.SKIP:
                busy = RequestRejected(RejectCode.BUSY, f"run {current} is under way", "on_busy")
                await self._take_out(request, run_id, busy)
                return
            case OnBusy.REPLACE:
                self._execution.stop(
                    Reason.CANCELLED, by="on_busy", text=f"replaced by run {run_id}"
                )
            case OnBusy.COALESCE if first := await self._same(wanted):
                same = RequestRejected(
                    RejectCode.DUPLICATE, f"run {first} waits and will do the same", "on_busy"
                )
                await self._take_out(request, run_id, same)
                return
        if wanted.not_after is None:  # else it may expire, and nothing is done
            self._waiting.setdefault(what_is_asked(wanted), (run_id, request.stream_seq))

    async def _same(self, wanted: RunRequest) -> str | None:
        """The run that asks for the same and still waits."""
        asked = what_is_asked(wanted)
        run_id, seq = self._waiting.get(asked, (None, 0))
        if run_id and await stored_message(self._link, RUNS_STREAM, seq) is None:
            del self._waiting[asked]  # cancelled meanwhile
            return None
        return run_id

    async def _take_out(
        self, request: StoredMessage, run_id: str, rejected: RequestRejected
    ) -> None:
        """The state first: should we die in between, `worker` tells the rest at its turn."""
        job = self._execution.job
        stored = await self._services.store.get_run(run_id)
        now = datetime.now(UTC)
        view = RunView(
            run_id=run_id,
            project=job.project_name,
            target=job.target,
            status=RunStatus.QUEUED,
            request_seq=request.stream_seq,
            queued_at=request.stored_at,
            updated_at=now,
        )
        if stored is not None:
            view = stored[0]
        if not view.status.is_terminal:  # else it is rejected, and that was not told to the end
            ended = advance(view, RunStatus.ERROR, at=now)
            await self._services.store.update_run(
                msgspec.structs.replace(ended, error=str(rejected), exit_code=2),
                stored[1] if stored else 0,
            )
        await reject(self._services, request, run_id, job.project_name, job.target, rejected)
        await delete_stored(self._link, RUNS_STREAM, request.stream_seq)

    async def _run_id(self, request: StoredMessage) -> str:
        """As `worker` will name it."""
        given = request.headers.get(H_RUN_ID, "")
        if is_run_id(given):
            stored = await self._services.store.get_run(given)
            if stored is None or stored[0].request_seq == request.stream_seq:
                return given
        return run_id_of_request(request.stream_seq, request.stored_at)

    async def _next(self) -> StoredMessage | None:
        return await next_stored(self._link, RUNS_STREAM, self._seen + 1, self._subject)


def what_is_asked(request: RunRequest) -> bytes:
    """Equal for requests that would have dbt do the same."""
    return msgspec.json.encode(
        [request.args, request.vars, request.retry_of, request.state], order="sorted"
    )
