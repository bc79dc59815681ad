"""dbtstream from Python: ask for runs, wait for them, react to what they did.

    async with Client.connect("nats://127.0.0.1:4222") as client:
        accepted = await client.submit("shop", ["build", "--select", "orders+"])
        finished = await client.wait(accepted.run_id)

        async for event in client.events(project="shop", family="node", status={"error", "fail"}):
            print(event.node.unique_id, event.message)

Requests go to the control service of a running daemon (`control`); events come from the
stream (`event_stream`) and need no daemon. Everything is typed by `messages` and `events`.
For those who look after it there are `dead_letters` and `verify`, over NATS alone.
Errors are those of `errors`, and the two below. It never starts dbt.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from dbtstream import messages
from dbtstream.config import NatsConfig
from dbtstream.dead_letters import DeadLetters
from dbtstream.errors import NatsError, NatsRefused, NatsUnavailable, RequestRejected, RunNotFound
from dbtstream.event_stream import DEFAULT_PREFETCH, EventStream
from dbtstream.events import AnyEvent, RunFinished, RunRejected
from dbtstream.live_events import LiveEvents
from dbtstream.messages import (
    MAX_REQUEST_BYTES,
    CancelAccepted,
    CancelRequest,
    ControlError,
    GetRequest,
    ListRequest,
    OnBusy,
    OnLost,
    RejectCode,
    RunAccepted,
    RunList,
    RunRequest,
    RunView,
    StateFrom,
    SubmitRequest,
    WorkerStatus,
    WorkerStatusRequest,
)
from dbtstream.nats_link import NatsLink, NobodyListens, backoff_s
from dbtstream.selection import Selection, Start, Words
from dbtstream.statuses import TERMINAL_RUN_STATUSES
from dbtstream.store import Store
from dbtstream.subjects import CONTROL, CONTROL_STATUS, is_run_id

if TYPE_CHECKING:
    from dbtstream.lineage_graph import Graph
    from dbtstream.verify_run import Verification

__all__ = ["Client", "EventStream", "EventsGone", "NoDaemon"]

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 10.0
CLOCK_SKEW = timedelta(minutes=5)
"""A run's id tells when its worker made it; the broker's clock may be so far behind."""

LAST_EVENT_S = 30.0
"""The state of a run may say that it ended so long before its last event is stored."""

FIRST_STATUS_S = 2.0
MORE_STATUS_S = 0.4
"""What workers may take to say how they are: the first of them, and each after another."""

_ENDINGS = {*map(str, TERMINAL_RUN_STATUSES), "rejected"}

_Reply = TypeVar("_Reply", bound=msgspec.Struct)


class NoDaemon(NatsError):
    """NATS is there, but no daemon answers control requests."""

    def __init__(self, servers: Sequence[str]) -> None:
        self.servers = tuple(servers)
        super().__init__(
            f"no dbtstream daemon answers on NATS at {', '.join(servers)}; "
            "start one with `dbtstream serve`"
        )


class EventsGone(NatsError):
    """The run is known and has ended, but its events are past the stream's limits."""

    def __init__(self, view: RunView) -> None:
        self.view = view
        super().__init__(
            f"run {view.run_id} ended with {view.status}, but its events are no longer stored"
        )


class Client:
    """Made by `Client.connect`. May be shared by any number of tasks of one event loop."""

    def __init__(self, link: NatsLink) -> None:
        self._link = link

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        servers: str | Sequence[str] | None = None,
        *,
        config: NatsConfig | None = None,
        name: str = "dbtstream-client",
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> "AsyncIterator[Client]":
        """`async with Client.connect("nats://host:4222") as client`.

        `config` is the `[nats]` table of `dbtstream.toml` (credentials, TLS, inbox prefix);
        `servers` go before its own. Raises NatsUnavailable if nothing answers in `timeout_s`;
        once connected, the client outlives any outage.
        """
        chosen = config or NatsConfig()
        if servers is not None:
            urls = (servers,) if isinstance(servers, str) else tuple(servers)
            chosen = msgspec.structs.replace(chosen, servers=urls)
        async with NatsLink(chosen, name=name) as link:
            await link.wait_connected(timeout_s)
            yield cls(link)

    # -- asking for runs -----------------------------------------------------------------

    async def submit(
        self,
        project: str,
        args: Sequence[str],
        *,
        target: str | None = None,
        vars: Mapping[str, Any] | None = None,  # noqa: A002  # dbt's word for it
        request_id: str | None = None,
        not_after: datetime | None = None,
        timeout_s: float | None = None,
        silence_timeout_s: float | None = None,
        on_busy: OnBusy = OnBusy.QUEUE,
        on_lost: OnLost | None = None,
        retry_of: str | None = None,
        state: StateFrom | None = None,
        labels: Mapping[str, str] | None = None,
        reason: str | None = None,
        requested_by: str | None = None,
    ) -> RunAccepted:
        """Ask for one dbt invocation; returns when the request is stored, not when it ran.

        `args` are dbt's words, such as `["build", "--select", "orders+"]`; `target` is the
        project's first if None. The trace context of the current OpenTelemetry span goes
        along. A `request_id` makes the call safe to repeat: the same one gives the same run
        (`duplicate` tells). Raises RequestRejected, NoDaemon, NatsUnavailable.
        """
        request = RunRequest(
            args=list(args),
            vars=dict(vars or {}),
            # One of our own where the caller has none, so that asking again is harmless.
            request_id=request_id or uuid.uuid4().hex,
            not_after=not_after,
            timeout_s=timeout_s,
            silence_timeout_s=silence_timeout_s,
            on_busy=on_busy,
            on_lost=on_lost,
            retry_of=retry_of,
            state=state,
            labels=dict(labels or {}),
            reason=reason,
            requested_by=requested_by,
        )
        messages.check_limits(request)
        payload = messages.encode(SubmitRequest(project=project, target=target, request=request))
        if len(payload) > MAX_REQUEST_BYTES:
            raise RequestRejected(
                RejectCode.TOO_LARGE,
                f"the request has {len(payload)} bytes; the limit is {MAX_REQUEST_BYTES}",
            )
        return await self._ask("submit", payload, RunAccepted, headers=_trace_headers())

    async def cancel(
        self, run_id: str, *, by: str | None = None, reason: str | None = None
    ) -> CancelAccepted:
        """Stop a run that waits or runs. Returns when its worker knows, not when dbt ended."""
        request = CancelRequest(run_id=run_id, by=by, reason=reason)
        return await self._ask("cancel", messages.encode(request), CancelAccepted, run_id=run_id)

    async def get(self, run_id: str) -> RunView:
        """What is known of a run. Raises RunNotFound."""
        request = GetRequest(run_id=run_id)
        return await self._ask("get", messages.encode(request), RunView, run_id=run_id)

    async def list(
        self,
        *,
        project: str | None = None,
        target: str | None = None,
        active: bool = False,
        limit: int = 50,
    ) -> RunList:
        """Runs, newest first; `active` for those that have not ended."""
        request = ListRequest(project=project, target=target, active=active, limit=limit)
        return await self._ask("list", messages.encode(request), RunList)

    async def workers(self) -> Sequence[WorkerStatus]:
        """How every worker is, by its name; of those that answer within a second or so.

        Raises NatsUnavailable, NatsRefused. Workers of a version that knows no such question do
        not answer it; none may.
        """
        await self._link.wait_connected(FIRST_STATUS_S)
        try:
            answers = await self._link.ask_all(
                CONTROL_STATUS,
                messages.encode(WorkerStatusRequest()),
                timeout_s=FIRST_STATUS_S,
                quiet_s=MORE_STATUS_S,
            )
        except NobodyListens:
            return []
        found = [
            self._read_reply(CONTROL_STATUS, answer.data, WorkerStatus, "") for answer in answers
        ]
        return sorted(found, key=lambda status: status.worker)

    async def _ask(
        self,
        verb: str,
        payload: bytes,
        kind: type[_Reply],
        *,
        run_id: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> _Reply:
        """One control request, repeated while the broker is away: all of them are idempotent."""
        subject = f"{CONTROL}.{verb}"
        deadline = datetime.now(UTC) + timedelta(seconds=ANSWER_TIMEOUT_S)
        attempt = 0
        while True:
            attempt += 1
            left_s = max(0.1, (deadline - datetime.now(UTC)).total_seconds())
            try:
                await self._link.wait_connected(left_s)
                reply = await self._link.request(subject, payload, headers, timeout_s=left_s)
                return self._read_reply(subject, reply.data, kind, run_id)
            except NobodyListens:
                raise NoDaemon(self._link.servers) from None
            except NatsUnavailable:
                pause_s = backoff_s(attempt)
                if datetime.now(UTC) + timedelta(seconds=pause_s) > deadline:
                    raise
                await asyncio.sleep(pause_s)

    def _read_reply(self, subject: str, data: bytes, kind: type[_Reply], run_id: str) -> _Reply:
        try:
            reply = messages.decode_reply(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise NatsRefused(subject, f"the answer is none of ours: {error}") from error
        match reply:
            case messages.RunRejected():
                raise RequestRejected(reply.code, reply.message, reply.field)
            case ControlError(code="not_found"):
                raise RunNotFound(run_id)
            case ControlError(code="unavailable"):
                raise NatsUnavailable(self._link.servers, reply.message)
            case ControlError():
                raise NatsRefused(subject, f"{reply.code}: {reply.message}")
            case _ if isinstance(reply, kind):
                return reply
            case _:
                raise NatsRefused(subject, f"the answer is a {type(reply).__name__}")

    # -- what they did -------------------------------------------------------------------

    async def wait(self, run_id: str, *, timeout_s: float | None = None) -> RunFinished:
        """The run's verdict, also of a run that ended long ago.

        Raises RunNotFound, RequestRejected if it was refused when its turn came, EventsGone
        if it ended before what the stream still holds, NatsUnavailable after `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._wait(run_id)
        except TimeoutError:
            raise NatsUnavailable(
                self._link.servers, f"run {run_id} did not end within {timeout_s:g} s"
            ) from None

    async def _wait(self, run_id: str) -> RunFinished:
        try:
            view: RunView | None = await self.get(run_id)
        except NoDaemon:
            view = None  # its events may be there all the same, or come later
        ended = view is not None and view.status.is_terminal
        start = Start(at=_began(run_id, view))
        if ended and (found := await self._verdict(run_id, view, start, follow=False)):
            return found
        try:
            async with asyncio.timeout(LAST_EVENT_S if ended else None):
                found = await self._verdict(run_id, view, start, follow=True)
        except TimeoutError:
            assert view is not None  # noqa: S101  # only an ended run has this limit
            raise EventsGone(view) from None
        assert found is not None  # noqa: S101  # a followed stream ends with the verdict
        return found

    async def _verdict(
        self, run_id: str, view: RunView | None, start: Start, *, follow: bool
    ) -> RunFinished | None:
        """`run.finished`, found by its subject: no other event of the run is transferred."""
        selection = Selection(
            project=view.project if view else None,
            target=view.target if view else None,
            family="run",
            status=_ENDINGS,
        )
        async with EventStream(self._link, selection, start, follow=follow) as events:
            async for event in events:
                if event.run_id != run_id:
                    continue
                if isinstance(event, RunRejected):
                    raise RequestRejected(event.code, event.message, event.field)
                if isinstance(event, RunFinished):
                    return event
        return None

    def events(
        self,
        *,
        project: Words = None,
        target: Words = None,
        family: Words = None,
        kind: Words = None,
        name: Words = None,
        status: Words = None,
        run_id: str | None = None,
        since: datetime | Literal["all"] | None = None,
        after_seq: int | None = None,
        follow: bool = True,
        prefetch: int = DEFAULT_PREFETCH,
    ) -> EventStream:
        """Events as they are stored, typed; every one once, whatever happens to NATS.

        The filters are the tokens of `dbt.events.<project>.<target>.<family>.<kind>.<name>.
        <status>`: one word, a set of words, or None for any. `kind` is a resource type
        (`model`) for family `node`, and dbt's command for family `run`.

        It begins when it is entered or first iterated, or at `since` (a time, or "all"), or
        after `after_seq`: the `stream_seq` of the last event that you have dealt with. With
        `run_id` it begins with the run and ends after its `run.finished`. `follow=False` ends
        when what is stored has been read.

            async with client.events(project="shop", family="node") as events:
                async for event in events:
                    ...
                    bookmark = events.stream_seq
        """
        if after_seq is not None:
            start = Start(after_seq=after_seq)
        elif isinstance(since, datetime):
            start = Start(at=since)
        elif run_id is not None and since is None:
            start = Start(at=_began(run_id, None))
        else:
            start = Start(oldest=since == "all")
        selection = Selection(project, target, family, kind, name, status)
        return EventStream(
            self._link, selection, start, run_id=run_id, follow=follow, prefetch=prefetch
        )

    def live(
        self, take: Callable[[AnyEvent], None], *, project: Words = None, target: Words = None
    ) -> LiveEvents:
        """`async with client.live(take)`: runs' and nodes' events from now on, each once, as the
        server passes them on. What comes while NATS is away is not repeated: use `events` for
        what must not be missed."""
        return LiveEvents(self._link, take, project=project, target=target)

    @property
    def connected(self) -> bool:
        """Whether there is a connection now. If there is none, one is being made."""
        return self._link.connected

    @property
    def servers(self) -> Sequence[str]:
        """The configured URLs, without user and password."""
        return self._link.servers

    async def lineage(self, project: str, target: str | None = None) -> "Graph":
        """The current graph of a project and target, also while nothing runs; no daemon need be
        there. Without `target`, of the only one that has any.

        Raises lineage_bucket.NoLineage, lineage_bucket.WhichTarget, NatsError.
        """
        from dbtstream.lineage_bucket import LineageBucket
        from dbtstream.lineage_graph import build_graph

        stored = await LineageBucket(self._link, retry_for_s=ANSWER_TIMEOUT_S).read(project, target)
        return build_graph(project, *stored)

    # -- for those who look after it -----------------------------------------------------

    @property
    def dead_letters(self) -> DeadLetters:
        """Requests that could not run: list, get, replay, drop."""
        return DeadLetters(self._link)

    async def verify(self, run_id: str) -> "Verification":
        """Compare what is stored of a run in its events, its state and dbt's own results.

        Raises RunNotFound, verify_run.NotEnded, NatsError.
        """
        from dbtstream.verify_run import verify_run

        return await verify_run(self._link, run_id, _began(run_id, None))

    async def stored_runs(self, *, limit: int = 50) -> Sequence[RunView]:
        """As `list`, newest first, from the KV bucket itself: no daemon need be there."""
        return await Store(self._link, retry_for_s=ANSWER_TIMEOUT_S).list_runs(limit=limit)


def _began(run_id: str, view: RunView | None) -> datetime:
    """Surely before the run's first event: its id is a UUIDv7, which holds its time."""
    if view is not None and view.queued_at is not None:
        return view.queued_at - CLOCK_SKEW
    if not is_run_id(run_id):
        raise RunNotFound(run_id)
    made_ms = uuid.UUID(run_id).int >> 80
    return datetime.fromtimestamp(made_ms / 1000, UTC) - CLOCK_SKEW


def _trace_headers() -> dict[str, str]:
    """`traceparent` and its kin of the current span; nothing without one."""
    from opentelemetry.propagate import inject

    headers: dict[str, str] = {}
    inject(headers)
    return headers
