"""Requests that the server has given up handing out: told, kept in DBT_DEAD, taken out.

A request that no worker has settled in `max_deliveries` deliveries stays in DBT_RUNS, and
nobody is given it any more. The server says so once; the stream DBT_ADVISORIES keeps that, and
the workers share its consumer. Every step may be repeated, by another worker too. How a run
that had begun is ended is `worker`'s knowledge; this never runs anything.
"""

import json
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import msgspec
import nats.errors
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig

from dbtstream.errors import NatsRefused, RequestRejected, Superseded
from dbtstream.execution import Services
from dbtstream.messages import RejectCode, RunView
from dbtstream.nats_errors import JetStreamRefused
from dbtstream.nats_link import NatsLink
from dbtstream.rejection import Request, bury, reject
from dbtstream.runs import advance
from dbtstream.statuses import RunStatus
from dbtstream.store import Store
from dbtstream.stored_message import StoredMessage, delete_stored, stored_message
from dbtstream.streams import ADVISORIES_STREAM
from dbtstream.subjects import H_RUN_ID, RUNS_STREAM, is_run_id, run_id_of_request

logger = logging.getLogger(__name__)

CONSUMER = "stuck_requests"
BATCH = 50
READ_TIMEOUT_S = 2.0
AGAIN_S = 30.0
"""An advisory that is not settled, because its run still runs somewhere, comes again then."""

_CONSUMER_NOT_FOUND = 10014
_PULL = json.dumps({"batch": BATCH, "no_wait": True}).encode()

EndLost = Callable[[RunView, int], Awaitable[bool]]
"""End a run that began, whose request nobody will be given again; `int` is the revision of its
state. False: some worker is at it, or it cannot be known yet. Raises NatsError, Superseded."""


class _Advisory(msgspec.Struct, frozen=True, kw_only=True):
    """What of `io.nats.jetstream.advisory.v1.max_deliver` is of interest."""

    timestamp: datetime
    consumer: str
    stream_seq: int
    deliveries: int


_advisory: msgspec.json.Decoder[_Advisory] = msgspec.json.Decoder(_Advisory)


class StuckRequests:
    """Looks through DBT_ADVISORIES; one per worker."""

    def __init__(self, link: NatsLink, services: Services, end_lost: EndLost) -> None:
        self._link = link
        self._services = services
        self._end_lost = end_lost
        self._has_consumer = False

    async def sweep(self) -> list[str]:
        """Deal with what was told since; the codes of requests rejected. Raises NatsError."""
        codes: list[str] = []
        for message in await self._told():
            try:
                advisory = _advisory.decode(message.data)
            except msgspec.DecodeError as error:
                logger.warning(
                    "an advisory that cannot be read",
                    extra={"action": "stuck.unreadable", "problem": str(error)},
                )
            else:
                if not await self._is_settled(advisory, codes):
                    continue
            with self._link.translated("settling an advisory"):
                await message.ack()
        return codes

    async def _is_settled(self, advisory: _Advisory, codes: list[str]) -> bool:
        """One that the server refuses to have settled must not hold up those behind it."""
        try:
            return await self._settle(advisory, codes)
        except NatsRefused as error:
            logger.warning(
                "a request that was handed out too often is not dealt with yet",
                extra={
                    "action": "stuck.refused",
                    "request_seq": advisory.stream_seq,
                    "error": str(error),
                },
            )
            return False

    async def _settle(self, advisory: _Advisory, codes: list[str]) -> bool:
        """Whether nothing is left to do for it."""
        request = await stored_message(self._link, RUNS_STREAM, advisory.stream_seq)
        if request is None or await self._is_outdated(advisory):
            return True
        run_id, stored = await known_run(self._services.store, request)
        rejected = RequestRejected(
            RejectCode.DELIVERIES_EXHAUSTED,
            f"it was handed out {advisory.deliveries} times, and no worker has settled it",
        )
        if stored is None or stored[0].attempt == 0:
            if stored is None or not stored[0].status.is_terminal:
                await self._reject(request, run_id, stored, rejected)
                codes.append(rejected.code)
        elif not await self._end_begun(request, *stored, rejected):
            return False
        # Last: as long as the request is there, all of this is done again.
        await delete_stored(self._link, RUNS_STREAM, request.stream_seq)
        return True

    async def _reject(
        self,
        request: StoredMessage,
        run_id: str,
        stored: tuple[RunView, int] | None,
        rejected: RequestRejected,
    ) -> None:
        """Of a request of which no run has begun."""
        project, target = _names(request)
        await reject(self._services, request, run_id, project, target, rejected)
        if stored is not None:  # `control` had accepted it
            view, revision = stored
            ended = advance(view, RunStatus.ERROR, at=datetime.now(UTC))
            await self._services.store.update_run(
                msgspec.structs.replace(ended, error=str(rejected), exit_code=2), revision
            )

    async def _end_begun(
        self, request: StoredMessage, view: RunView, revision: int, rejected: RequestRejected
    ) -> bool:
        """A run has its `run.finished`, and no `run.rejected` after it; whether it has."""
        if not view.status.is_terminal:
            try:
                if not await self._end_lost(view, revision):
                    return False
            except Superseded:
                return False  # another one has just taken it over
            logger.warning(
                "closed a run whose request nobody is given any more",
                extra={"action": "stuck.closed", "run_id": view.run_id, "why": str(rejected)},
            )
        elif view.status is not RunStatus.LOST:
            return True  # it ran, and only the answer to the server was lost
        await bury(self._services, request, view.run_id, view.project, view.target, rejected)
        return True

    async def _is_outdated(self, advisory: _Advisory) -> bool:
        """Of a consumer that is gone or was made anew (also with the stream, where the sequence
        is another request's): the new one hands out what is there."""
        try:
            answer = await self._link.ask_jetstream(
                f"CONSUMER.INFO.{RUNS_STREAM}.{advisory.consumer}"
            )
        except JetStreamRefused as error:
            if error.err_code == _CONSUMER_NOT_FOUND:
                return True
            raise
        return datetime.fromisoformat(answer["created"]) > advisory.timestamp

    async def _told(self) -> list[Msg]:
        """The advisories that wait, without waiting for more."""
        with self._link.translated("reading advisories"):
            if not self._has_consumer:
                await self._make_consumer()
            messages: list[Msg] = []
            client = self._link.client
            inbox = client.new_inbox()
            subscription = await client.subscribe(inbox)
            try:
                path = f"$JS.API.CONSUMER.MSG.NEXT.{ADVISORIES_STREAM}.{CONSUMER}"
                await client.publish(path, _PULL, reply=inbox)
                while len(messages) < BATCH:
                    message = await subscription.next_msg(timeout=READ_TIMEOUT_S)
                    if status := (message.headers or {}).get("Status"):
                        # 404 and 408 end a pull; anything else, such as 503, the consumer.
                        self._has_consumer = status in ("404", "408")
                        break
                    messages.append(message)
            except nats.errors.TimeoutError:
                self._has_consumer = False
            finally:
                await subscription.unsubscribe()
        return messages

    async def _make_consumer(self) -> None:
        await self._link.js.add_consumer(
            ADVISORIES_STREAM,
            ConsumerConfig(
                name=CONSUMER,
                durable_name=CONSUMER,
                description="requests that were handed out too often",
                ack_policy=AckPolicy.EXPLICIT,
                ack_wait=AGAIN_S,
            ),
        )
        self._has_consumer = True


async def known_run(store: Store, request: Request) -> tuple[str, tuple[RunView, int] | None]:
    """The run of this request, and what is stored of it.

    The id in the header counts unless it belongs to another request: a plain publisher may
    write anything there, and must not end, or hide behind, somebody else's run.
    """
    given = request.headers.get(H_RUN_ID, "")
    if is_run_id(given):
        stored = await store.get_run(given)
        if stored is None or stored[0].request_seq == request.stream_seq:
            return given, stored
    derived = run_id_of_request(request.stream_seq, request.stored_at)
    return derived, await store.get_run(derived)


def _names(request: Request) -> tuple[str, str]:
    """Project and target; only such a subject has a consumer that can give up."""
    _, _, project, target = request.subject.split(".")
    return project, target
