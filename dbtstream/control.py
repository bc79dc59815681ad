"""The control service: submit, cancel, get, list, as a NATS micro service.

Any worker answers (queue group); `nats micro ls` finds it. Payloads are `messages`. A cancel
reaches the worker that runs the run by a broadcast that only that worker answers, so a
caller needs to know no worker's name. Another broadcast, `dbt.control.worker.status`, is
answered by all of them. Handlers of one endpoint run one after another (nats-py), so none of
them waits long.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from typing import Self

import msgspec
import nats.errors
import nats.js.errors
import nats.micro
from nats.aio.msg import Msg
from nats.micro.request import Request
from nats.micro.service import EndpointConfig, Service, ServiceConfig

import dbtstream
from dbtstream.config import Config
from dbtstream.consumer import durable_name
from dbtstream.errors import DbtstreamError, NatsError, NatsUnavailable, RequestRejected
from dbtstream.execution import Services
from dbtstream.job import checked_args
from dbtstream.messages import (
    CancelAccepted,
    CancelRequest,
    ControlError,
    GetRequest,
    ListRequest,
    RejectCode,
    Reply,
    RunAccepted,
    RunList,
    RunRejected,
    RunView,
    WorkerStatusRequest,
    decode_reply,
    decode_submit,
    encode,
)
from dbtstream.nats_link import NatsLink
from dbtstream.recovery import finish_waiting
from dbtstream.statuses import RunStatus
from dbtstream.store import RevisionConflict
from dbtstream.stored_message import (
    StoredMessage,
    delete_stored,
    next_stored,
    stored_message,
)
from dbtstream.subjects import (
    CONTROL,
    CONTROL_CANCEL,
    CONTROL_STATUS,
    H_MSG_ID,
    H_RUN_ID,
    RUNS,
    RUNS_STREAM,
    new_run_id,
    runs_subject,
    trace_headers,
)
from dbtstream.trace import trace_block
from dbtstream.worker import Worker

logger = logging.getLogger(__name__)

MAX_LIST = 500
OWNER_ANSWERS_S = 2.0

Handler = Callable[[bytes, dict[str, str]], Awaitable[Reply]]


class Control:
    """The service of one daemon. Use as an async context manager."""

    def __init__(self, config: Config, link: NatsLink, services: Services, worker: Worker) -> None:
        self._config = config
        self._link = link
        self._store = services.store
        self._services = services
        self._worker = worker
        self._generation = -1
        self._service: Service | None = None
        self._undo: Callable[[], None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self._register()
        self._undo = self._link.on_reconnect(self._reconnected)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._undo is not None:
            self._undo()
        for task in self._tasks:
            task.cancel()
        if self._service is not None:
            try:
                async with asyncio.timeout(OWNER_ANSWERS_S):
                    await self._service.stop()
            except (nats.errors.Error, TimeoutError):
                logger.info("control service not signed off", extra={"action": "control.stop"})

    def _reconnected(self) -> None:
        """A rebuilt client has no subscriptions; a reconnected one still has its own."""
        if self._link.generation != self._generation:
            self._spawn(self._register())

    async def _register(self) -> None:
        self._generation = self._link.generation
        with self._link.translated("starting the control service"):
            service = await nats.micro.add_service(
                self._link.client,
                ServiceConfig(
                    name="dbtstream",
                    version=dbtstream.__version__,
                    description="run dbt: submit, cancel, get, list",
                    metadata={
                        "worker": self._config.worker_name,
                        "projects": ",".join(self._config.projects),
                    },
                ),
            )
            handlers: dict[str, Handler] = {
                "submit": self._submit,
                "cancel": self._cancel,
                "get": self._get,
                "list": self._list,
            }
            for verb, handler in handlers.items():
                await service.add_endpoint(
                    EndpointConfig(
                        name=verb,
                        subject=f"{CONTROL}.{verb}",
                        handler=self._answering(f"{CONTROL}.{verb}", handler),
                    )
                )
            await self._link.client.subscribe(CONTROL_CANCEL, cb=self._cancel_here)
            await self._link.client.subscribe(CONTROL_STATUS, cb=self._status_here)
            # A round trip behind the subscriptions: from here on they are the server's, too
            # (nats-py's own flush may overtake what it has buffered).
            await self._link.js.stream_info(RUNS_STREAM)
            self._service = service

    def _answering(self, subject: str, handler: Handler) -> Callable[[Request], Awaitable[None]]:
        """Whatever comes in, one of our replies goes out."""

        async def answer(request: Request) -> None:
            # Whoever may create consumers can have stream messages delivered to any subject;
            # those carry their own subject and an ack reply (facts of NATS permissions).
            # And a reply subject is not checked against the asker's permissions, but ours apply.
            reply_to = request._msg.reply  # noqa: SLF001  # nats-py 2.16 shows it nowhere else
            if request.subject != subject or not _is_inbox(reply_to):
                return
            try:
                reply = await handler(request.data, dict(request.headers or {}))
            except RequestRejected as rejected:
                reply = RunRejected(
                    code=rejected.code, message=rejected.message, field=rejected.field
                )
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                reply = ControlError(code="bad_message", message=str(error))
            except NatsError as error:
                reply = ControlError(code="unavailable", message=str(error))
            await request.respond(encode(reply))

        return answer

    async def _submit(self, data: bytes, headers: dict[str, str]) -> Reply:
        submit = decode_submit(data)
        request = submit.request
        target = submit.target or self._default_target(submit.project)
        await self._check_served(submit.project, target)
        project = self._config.projects.get(submit.project)
        if project is not None:
            await checked_args(self._store, submit.project, project, target, request)
        request_id = request.request_id or headers.get(H_MSG_ID)
        request = msgspec.structs.replace(request, request_id=request_id)
        run_id = new_run_id(datetime.now(UTC))
        if request_id is not None:
            first = await self._store.remember_request(submit.project, target, request_id, run_id)
            if first != run_id and await self._store.get_run(first) is not None:
                return RunAccepted(
                    run_id=first, project=submit.project, target=target, duplicate=True
                )
            run_id = first  # remembered, but its request may never have been stored
        outgoing = trace_headers(headers)
        # JetStream looks for a message id in the whole stream, we for a request id in a target.
        msg_id = f"{submit.project}.{target}.{request_id}" if request_id else run_id
        outgoing |= {H_MSG_ID: msg_id, H_RUN_ID: run_id}
        ack = await self._link.publish(
            runs_subject(submit.project, target), encode(request), outgoing
        )
        now = datetime.now(UTC)
        view = RunView(
            run_id=run_id,
            project=submit.project,
            target=target,
            status=RunStatus.QUEUED,
            request_id=request_id,
            requested_by=request.requested_by,
            reason=request.reason,
            labels=request.labels,
            request_seq=ack.seq,
            queued_at=now,
            updated_at=now,
        )
        with contextlib.suppress(RevisionConflict):  # a worker was quicker and wrote more
            await self._store.create_run(view)
        position = await self._waiting(submit.project, target)
        return RunAccepted(
            run_id=run_id, project=submit.project, target=target, position=max(0, position - 1)
        )

    async def _cancel(self, data: bytes, _: dict[str, str]) -> Reply:
        cancel = msgspec.json.decode(data, type=CancelRequest)
        stored = await self._store.get_run(cancel.run_id)
        if stored is None:
            return _not_found(cancel.run_id)
        view, revision = stored
        if view.status.is_terminal:
            return CancelAccepted(run_id=view.run_id, status=view.status)
        waits = view.status is RunStatus.QUEUED and (view.attempt == 0 or view.worker is None)
        if waits and (request := await self._take_from_queue(view)):
            await finish_waiting(
                self._services,
                view,
                revision,
                by=cancel.by or "control",
                reason=cancel.reason,
                trace=trace_block(request.headers, self._config.telemetry.baggage),
            )
            return CancelAccepted(run_id=view.run_id, status=RunStatus.QUEUED)
        try:
            answer = await self._link.request(CONTROL_CANCEL, data, timeout_s=OWNER_ANSWERS_S)
        except NatsUnavailable:
            return ControlError(
                code="unavailable",
                message=f"worker {view.worker}, which runs {view.run_id}, does not answer",
            )
        return decode_reply(answer.data)

    async def _cancel_here(self, message: Msg) -> None:
        """The broadcast: answered only by the worker that runs the run."""
        if message.subject != CONTROL_CANCEL or not _is_inbox(message.reply):
            return
        try:
            cancel = msgspec.json.decode(message.data, type=CancelRequest)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        execution = self._worker.executions.get(cancel.run_id)
        if execution is not None and self._worker.cancel(
            cancel.run_id, by=cancel.by or "control", text=cancel.reason
        ):
            await message.respond(
                encode(CancelAccepted(run_id=cancel.run_id, status=execution.view.status))
            )

    async def _status_here(self, message: Msg) -> None:
        """The other broadcast: answered by every worker."""
        if message.subject != CONTROL_STATUS or not _is_inbox(message.reply):
            return
        reply: Reply = self._worker.status(datetime.now(UTC))
        try:
            msgspec.json.decode(message.data or b"{}", type=WorkerStatusRequest)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            reply = ControlError(code="bad_message", message=str(error))
        await message.respond(encode(reply))

    async def _get(self, data: bytes, _: dict[str, str]) -> Reply:
        get = msgspec.json.decode(data, type=GetRequest)
        stored = await self._store.get_run(get.run_id)
        return stored[0] if stored else _not_found(get.run_id)

    async def _list(self, data: bytes, _: dict[str, str]) -> Reply:
        wanted = msgspec.json.decode(data or b"{}", type=ListRequest)
        runs = await self._store.list_runs(
            project=wanted.project,
            target=wanted.target,
            active=wanted.active,
            limit=max(1, min(wanted.limit, MAX_LIST)),
        )
        waiting = await self._all_waiting()
        return RunList(
            runs=runs,
            waiting={place: count for place, (count, _) in waiting.items()},
            waiting_since={place: since for place, (_, since) in waiting.items() if since},
        )

    def _default_target(self, project: str) -> str:
        if (known := self._config.projects.get(project)) is None:
            raise RequestRejected(
                RejectCode.UNKNOWN_PROJECT,
                f"this worker serves {', '.join(self._config.projects) or 'no project'}, not "
                f"{project}; if another one does, name the target",
                "project",
            )
        return known.targets[0]

    async def _check_served(self, project: str, target: str) -> None:
        """By this worker's config, or by another worker's consumer."""
        known = self._config.projects.get(project)
        if known is not None and target in known.targets:
            return
        subject = runs_subject(project, target)
        with self._link.translated(f"looking for a worker of {subject}"):
            try:
                await self._link.js.consumer_info(RUNS_STREAM, durable_name(subject))
            except nats.js.errors.NotFoundError:
                pass
            else:
                return
        if known is not None:
            raise RequestRejected(
                RejectCode.UNKNOWN_TARGET,
                f"project {project} has no target {target}; it has {', '.join(known.targets)}",
                "target",
            )
        raise RequestRejected(
            RejectCode.UNKNOWN_PROJECT,
            f"no worker serves project {project}; this one serves "
            f"{', '.join(self._config.projects) or 'none'}",
            "project",
        )

    async def _waiting(self, project: str, target: str) -> int:
        """Requests of one target in the queue, the running one included."""
        subject = runs_subject(project, target)
        with self._link.translated("counting requests"):
            info = await self._link.js.stream_info(RUNS_STREAM, subjects_filter=subject)
        return (info.state.subjects or {}).get(subject, 0)

    async def _all_waiting(self) -> dict[str, tuple[int, datetime | None]]:
        """By `<project>.<target>`: how many requests no worker has been handed yet, and when the
        first of them was stored; None if that one went away meanwhile."""
        found: dict[str, tuple[int, datetime | None]] = {}
        with self._link.translated("counting requests"):
            info = await self._link.js.stream_info(RUNS_STREAM, subjects_filter=f"{RUNS}.>")
            for subject, count in (info.state.subjects or {}).items():
                handed_out = 0
                # Where nobody has a consumer, all of them wait: see `unknown_subjects`.
                with contextlib.suppress(nats.js.errors.NotFoundError):
                    consumer = await self._link.js.consumer_info(RUNS_STREAM, durable_name(subject))
                    count = consumer.num_pending or 0  # noqa: PLW2901
                    handed_out = consumer.delivered.stream_seq if consumer.delivered else 0
                if count:
                    first = await next_stored(self._link, RUNS_STREAM, handed_out + 1, subject)
                    place = subject.removeprefix(f"{RUNS}.")
                    found[place] = (count, first.stored_at if first else None)
        return found

    async def _take_from_queue(self, view: RunView) -> StoredMessage | None:
        """The request, if it was still waiting; it is gone now."""
        if view.request_seq is None:
            return None
        request = await stored_message(self._link, RUNS_STREAM, view.request_seq)
        if request is None or not await delete_stored(self._link, RUNS_STREAM, view.request_seq):
            return None
        return request

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work, name="control service")
        self._tasks.add(task)
        task.add_done_callback(self._spawned_done)

    def _spawned_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(task.exception(), DbtstreamError):
            logger.error(
                "control service not restarted",
                extra={"action": "control.failed", "error": str(task.exception())},
            )


def _is_inbox(reply: str) -> bool:
    """Not a subject that means something: answered there, we would write in the asker's stead."""
    return not reply.startswith(("$", "dbt."))


def _not_found(run_id: str) -> ControlError:
    return ControlError(code="not_found", message=f"no run {run_id} is known")
