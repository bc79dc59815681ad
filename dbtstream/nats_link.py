"""Asking and publishing over NATS so that it survives restarts and outages.

Everything that speaks to NATS goes through a `NatsLink`: `streams`, `store`, `consumer`,
`control` and `publishers.jetstream`. Use two of them in one daemon, one for events and one
for the queue and the control service, so that a burst of events delays no heartbeat. The
connection itself is `nats_connection`'s.

It never sends without waiting for the answer (nats-py's `publish_async` leaves futures that
never end), and with `pending_size=0` it never queues a message for a connection to come: a
publish that "timed out" in such a queue is sent after the reconnect all the same.
"""

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import nats.errors
from nats.aio.msg import Msg
from nats.js.api import PubAck

from dbtstream.errors import NatsError, NatsRefused, NatsUnavailable
from dbtstream.nats_connection import Flight, NatsConnection, backoff_s
from dbtstream.nats_errors import JetStreamRefused, NobodyListens, from_answer, translate
from dbtstream.subjects import H_MSG_ID

__all__ = ["JetStreamRefused", "NatsLink", "NobodyListens", "Outgoing", "backoff_s"]

logger = logging.getLogger(__name__)

NO_RESPONDERS = "503"

SMALL_HEADERS_BYTES = 64 * 1024
"""More than the headers of any message of ours come to."""
BATCH_TIMEOUT_S = 10.0  # the server gives up a silent batch after so long


class Outgoing(Protocol):
    """A message to publish; `outbox.Record` is one."""

    @property
    def subject(self) -> str: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def payload(self) -> bytes: ...


class NatsLink(NatsConnection):
    """`async with NatsLink(config, name="dbtstream-events") as link`."""

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Msg:
        """Ask once. Raises NatsUnavailable (NobodyListens at once), or NatsRefused."""
        limit_s = timeout_s or self._config.request_timeout_s
        operation = f"a message to {subject}"
        flight: Flight | None = None
        task = asyncio.current_task()
        cancels = task.cancelling() if task else 0
        try:
            async with asyncio.timeout(limit_s) as limit:
                self._check_size(operation, payload, headers)
                flight = Flight(subject, limit)
                self._flights.add(flight)
                answer = await self.client.request(
                    subject, payload, timeout=limit_s, headers=dict(headers) if headers else None
                )
        except TimeoutError:
            raise self._no_answer(operation, limit_s, flight) from None
        except (nats.errors.Error, OSError) as error:
            raise translate(error, operation, self.servers) from error
        finally:
            if flight is not None:
                self._flights.discard(flight)
        if task and task.cancelling() > cancels:
            # nats-py waits with asyncio.wait_for, which before Python 3.12 swallows a cancel
            # that comes in the same turn as the answer (cpython#86296).
            raise asyncio.CancelledError
        return answer

    async def ask_all(
        self, subject: str, payload: bytes = b"", *, timeout_s: float, quiet_s: float
    ) -> list[Msg]:
        """Ask everybody who listens, in one message, and take the answers that come: until there
        was none for `quiet_s` after one, and for `timeout_s` at the most.

        Raises NatsUnavailable (NobodyListens at once), or NatsRefused.
        """
        operation = f"a message to {subject}"
        came: asyncio.Queue[Msg] = asyncio.Queue()
        answers: list[Msg] = []
        with self.translated(operation):
            inbox = await self.client.subscribe(self.client.new_inbox(), cb=came.put)
        flight: Flight | None = None
        try:
            async with asyncio.timeout(timeout_s) as limit:
                flight = Flight(subject, limit)
                self._flights.add(flight)
                await self.client.publish(subject, payload, reply=inbox.subject)
                while True:
                    answer = await came.get()
                    if not answer.data and (answer.headers or {}).get("Status") == NO_RESPONDERS:
                        raise NobodyListens(self.servers, f"{operation}: nobody listens there")
                    answers.append(answer)
                    limit.reschedule(asyncio.get_running_loop().time() + quiet_s)
        except TimeoutError:
            if flight is not None and (flight.denied or flight.lost):
                raise self._no_answer(operation, timeout_s, flight) from None
        except (nats.errors.Error, OSError) as error:
            raise translate(error, operation, self.servers) from error
        finally:
            if flight is not None:
                self._flights.discard(flight)
            with contextlib.suppress(nats.errors.Error, OSError):
                await inbox.unsubscribe()
        return answers

    async def ask_jetstream(self, verb: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer of `$JS.API.<verb>`, decoded. Raises NatsUnavailable, NatsRefused.

        nats-py's own calls take a question that the server denies for an outage.
        """
        payload = json.dumps(body).encode() if body else b""
        answer = json.loads((await self.request(f"$JS.API.{verb}", payload)).data)
        if "error" in answer:
            raise from_answer(verb, self.servers, answer["error"])
        return answer

    async def publish(
        self,
        subject: str,
        payload: bytes,
        headers: Mapping[str, str] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> PubAck:
        """Store one message: one attempt, and JetStream's answer to it.

        NatsUnavailable leaves open whether it was stored; repeat it with the same Nats-Msg-Id.
        """
        reply = await self.request(subject, payload, headers, timeout_s=timeout_s)
        return self._pub_ack(subject, reply)

    async def publish_until_stored(
        self,
        subject: str,
        payload: bytes,
        headers: Mapping[str, str],
        *,
        give_up_after_s: float | None = None,
    ) -> PubAck:
        """Repeat one message, under the same Nats-Msg-Id, until it is stored.

        Raises NatsRefused as soon as the server says no, and also when there was no stream
        for it all of `give_up_after_s`; else NatsUnavailable after that time.
        """
        if not headers.get(H_MSG_ID):
            raise ValueError(f"a message that may be sent twice needs a {H_MSG_ID} header")
        problem: NatsUnavailable = self._unavailable("not connected")
        attempt = 0
        try:
            async with asyncio.timeout(give_up_after_s):
                while True:
                    await self.wait_connected()
                    try:
                        return await self.publish(subject, payload, headers)
                    except NatsUnavailable as error:
                        problem = error
                    attempt += 1
                    if attempt == 1:
                        logger.warning(
                            "publishing again until it is stored",
                            extra={
                                "action": "nats.retry",
                                "subject": subject,
                                "problem": problem.problem,
                            },
                        )
                    await asyncio.sleep(backoff_s(attempt))
        except TimeoutError:
            if isinstance(problem, NobodyListens):
                raise NatsRefused(
                    f"a message to {subject}",
                    "no stream has this subject",
                    "`dbtstream setup` creates the streams",
                ) from problem
            raise problem from None

    async def publish_batch(
        self, messages: Sequence[Outgoing], *, timeout_s: float = BATCH_TIMEOUT_S
    ) -> PubAck:
        """Store all of `messages`, up to 1000 for one stream, or none (ADR-50; nats-server 2.12).

        After NatsUnavailable repeat the identical batch: JetStreamRefused with
        `nats_errors.BATCH_DUPLICATE_ID` then means that it had been committed.
        """
        batch_id, last = secrets.token_hex(16), len(messages)
        for number, message in enumerate(messages, start=1):
            headers = {
                **message.headers,
                "Nats-Batch-Id": batch_id,
                "Nats-Batch-Sequence": str(number),
            }
            if number == last:
                headers["Nats-Batch-Commit"] = "1"
                reply = await self.request(
                    message.subject, message.payload, headers, timeout_s=timeout_s
                )
                return self._pub_ack(message.subject, reply)
            if number == 1:
                reply = await self.request(message.subject, message.payload, headers)
                if reply.data:  # empty when the batch may go on
                    self._pub_ack(message.subject, reply)
            else:
                self._check_size(f"a message to {message.subject}", message.payload, headers)
                with self.translated(f"a message to {message.subject}"):
                    await self.client.publish(message.subject, message.payload, headers=headers)
        raise ValueError("an empty batch")

    def _check_size(
        self, operation: str, payload: bytes, headers: Mapping[str, str] | None
    ) -> None:
        """nats-py 2.16 leaves out the headers, and the server ends the connection over them."""
        size = len(payload) + 16
        if size + SMALL_HEADERS_BYTES < self.client.max_payload:
            return  # adding up the headers of each small message would cost 10 us
        if headers:
            size += sum(len(key) + len(value.encode()) + 4 for key, value in headers.items())
        if size > (limit := self.client.max_payload):
            raise JetStreamRefused(
                operation, f"{size} bytes; the server takes {limit}", about_message=True
            )

    def _pub_ack(self, subject: str, reply: Msg) -> PubAck:
        operation = f"a message to {subject}"
        try:
            answer = json.loads(reply.data)
            if "error" in answer:
                raise from_answer(operation, self.servers, answer["error"])
            return PubAck.from_response(answer)
        except (ValueError, TypeError, AttributeError) as error:
            raise NatsRefused(
                operation, f"what answered is not JetStream: {reply.data[:80]!r}"
            ) from error

    def _no_answer(self, operation: str, limit_s: float, flight: Flight | None) -> NatsError:
        if flight is not None and flight.denied:
            return NatsRefused(operation, flight.denied, "the NATS user may not publish there")
        if flight is not None and flight.lost:
            return self._unavailable(f"{operation}: the connection broke before the answer")
        text = f"{operation}: no answer within {limit_s:g} s"
        if self.last_problem and "permissions violation" in self.last_problem.lower():
            text += f"; the server said: {self.last_problem}"
        return NatsUnavailable(self.servers, text)
