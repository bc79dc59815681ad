"""Dead letters: requests that could not run, kept in DBT_DEAD; to look at, replay or drop.

`rejection` writes them; people read them through `client` and `dbtstream dead`. It needs the
stream and the bucket `dbt_state`, no daemon, and the NATS permissions of an admin. A replay is
a new request, with a run id of its own, that a worker accepts or rejects like any other; it
never makes a run out of bytes by itself.
"""

import contextlib
import secrets
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
import nats.errors
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig

from dbtstream.errors import DbtstreamError, NatsRefused, RequestRejected
from dbtstream.kv_bucket import Bucket
from dbtstream.messages import decode_run_request
from dbtstream.nats_errors import JetStreamRefused, from_answer
from dbtstream.nats_link import NatsLink
from dbtstream.store import Store
from dbtstream.stored_message import NO_STREAM, StoredMessage, delete_stored, stored_message
from dbtstream.subjects import (
    DEAD,
    DEAD_STREAM,
    H_MSG_ID,
    H_RUN_ID,
    NAME,
    RUNS,
    STATE_BUCKET,
    new_run_id,
    request_key,
    token,
    trace_headers,
)

__all__ = ["DeadLetter", "DeadLetters", "NoSuchLetter", "NotReplayable", "Replayed"]

H_CODE = "dbtstream-code"
H_MESSAGE = "dbtstream-message"
H_FIELD = "dbtstream-field"
H_SUBJECT = "dbtstream-subject"
H_REQUEST_SEQ = "dbtstream-request-seq"
H_TRUNCATED = "dbtstream-truncated"  # bytes that the request had

PAGE = 500
CONSUMER_IDLE_S = 30.0
READ_TIMEOUT_S = 5.0
RETRY_FOR_S = 10.0


class NoSuchLetter(DbtstreamError):
    """Its id was never given, or it was dropped or has expired."""

    def __init__(self, letter_id: int) -> None:
        self.letter_id = letter_id
        super().__init__(
            f"there is no dead letter {letter_id} (`dbtstream dead ls` lists those that are)"
        )


class NotReplayable(DbtstreamError):
    """Published again it would be rejected again, or be another request than it was."""

    def __init__(self, letter_id: int, problem: str, hint: str = "") -> None:
        self.letter_id, self.problem = letter_id, problem
        super().__init__(
            f"dead letter {letter_id} cannot be replayed: {problem}"
            + (f" ({hint})" if hint else "")
        )


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a request that could not run; `id` is its sequence in DBT_DEAD.

    `size` is the request's; of one that is `truncated`, fewer bytes were kept.
    """

    id: int
    at: datetime
    project: str
    target: str
    code: str  # messages.RejectCode
    message: str
    field: str | None
    subject: str
    run_id: str | None
    request_seq: int | None
    size: int
    truncated: bool


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """The request is in the queue again, at `stream_seq` of DBT_RUNS."""

    id: int
    run_id: str
    subject: str
    stream_seq: int


class DeadLetters:
    """`client.dead_letters`. Raises NatsUnavailable and NatsRefused, and the two above."""

    def __init__(self, link: NatsLink) -> None:
        self._link = link

    async def list(
        self,
        *,
        project: str | None = None,
        target: str | None = None,
        code: str | None = None,
        limit: int | None = None,
    ) -> list[DeadLetter]:
        """Newest first. The bytes of the requests stay on the server."""
        subject = ".".join((DEAD, *(token(word) if word else "*" for word in (project, target))))
        letters = [_letter_of(message) async for message in self._messages(subject)]
        wanted = [letter for letter in letters if code in (None, letter.code)]
        return wanted[::-1][:limit]

    async def get(self, letter_id: int) -> tuple[DeadLetter, bytes]:
        """One letter, and the request's bytes as they came."""
        letter, message = await self._read(letter_id)
        return letter, message.data

    async def replay(self, letter_id: int, *, new_request_id: bool = False) -> Replayed:
        """Publish the request again, as a new one; returns when it is stored. The letter stays.

        The bytes are the same, unless `new_request_id` asks for a new id in them. A request_id
        that belonged to the letter's own run, which never came to be, belongs to the new run
        from here on. Raises NotReplayable.
        """
        letter, message = await self._read(letter_id)
        if letter.truncated:
            kept = len(message.data)
            raise NotReplayable(letter_id, f"only {kept} of its {letter.size} bytes were kept")
        if not letter.subject.startswith(f"{RUNS}."):
            raise NotReplayable(letter_id, f"its request was for {letter.subject or 'nobody'}")
        run_id = new_run_id(datetime.now(UTC))
        data = await self._claim(letter, message.data, run_id, new_request_id=new_request_id)
        outgoing = trace_headers(message.headers)
        # Not the message id of then: the stream would take it for the same message.
        outgoing |= {H_MSG_ID: f"replay-{run_id}", H_RUN_ID: run_id}
        ack = await self._link.publish_until_stored(
            letter.subject, data, outgoing, give_up_after_s=RETRY_FOR_S
        )
        return Replayed(id=letter_id, run_id=run_id, subject=letter.subject, stream_seq=ack.seq)

    async def drop(self, letter_id: int) -> None:
        """Delete the letter for good."""
        with _no_stream_explained():
            if not await delete_stored(self._link, DEAD_STREAM, letter_id):
                raise NoSuchLetter(letter_id)

    async def _claim(
        self, letter: DeadLetter, data: bytes, run_id: str, *, new_request_id: bool
    ) -> bytes:
        """Make the request_id, if there is one, that of `run_id`; the bytes to publish."""
        try:
            request = decode_run_request(data)
        except RequestRejected:
            return data  # a worker of another version may understand it, or rejects it again
        if request.not_after is not None and request.not_after < datetime.now(UTC):
            raise NotReplayable(
                letter.id,
                f"it was not to begin after {request.not_after}",
                "publish a corrected copy; `dbtstream dead show --raw` prints it",
            )
        if request.request_id is None:
            return data
        if new_request_id:
            return _with_request_id(data, uuid.uuid4().hex)
        await self._own(letter, request.request_id, run_id)
        return data

    async def _own(self, letter: DeadLetter, request_id: str, run_id: str) -> None:
        """A worker rejects a request whose request_id is another run's."""
        project, target = _names(letter.subject)
        if not (NAME.fullmatch(project) and NAME.fullmatch(target)):
            return
        bucket = Bucket(self._link, STATE_BUCKET, retry_for_s=RETRY_FOR_S)
        key = request_key(project, target, request_id)
        value = await bucket.read(key)
        if value is not None and value.data is not None:
            owner = value.data.decode()
            known = await Store(self._link, retry_for_s=RETRY_FOR_S).get_run(owner)
            if known is not None and owner != letter.run_id:
                raise NotReplayable(
                    letter.id,
                    f"its request_id {request_id} is that of run {owner} ({known[0].status})",
                    "--new-request-id runs it all the same",
                )
        await bucket.write(key, run_id.encode(), value.revision if value else 0)

    async def _read(self, letter_id: int) -> tuple[DeadLetter, StoredMessage]:
        with _no_stream_explained():
            message = await stored_message(self._link, DEAD_STREAM, letter_id)
        if message is None:
            raise NoSuchLetter(letter_id)
        size = len(message.data)
        letter = _letter(letter_id, message.stored_at, message.subject, message.headers, size)
        return letter, message

    async def _messages(self, subject: str) -> AsyncIterator[Msg]:
        """All letters, oldest first, without their bytes."""
        js, name = self._link.js, f"dead_{secrets.token_hex(8)}"
        config = ConsumerConfig(
            name=name,
            filter_subject=subject,
            ack_policy=AckPolicy.NONE,
            headers_only=True,
            mem_storage=True,
            num_replicas=1,
            inactive_threshold=CONSUMER_IDLE_S,
        )
        left = await self._create(config)
        with self._link.translated("reading dead letters"):
            pulls = await js.pull_subscribe_bind(name, stream=DEAD_STREAM)
        try:
            while left:
                with self._link.translated("reading dead letters"):
                    messages = await pulls.fetch(min(left, PAGE), timeout=READ_TIMEOUT_S)
                for message in messages:
                    yield message
                left = messages[-1].metadata.num_pending
        finally:
            with contextlib.suppress(nats.errors.Error, TimeoutError):
                await pulls.unsubscribe()
                await js.delete_consumer(DEAD_STREAM, name)

    async def _create(self, config: ConsumerConfig) -> int:
        """The consumer; how many letters it will give. Not by nats-py, see `stored_message`."""
        path = f"$JS.API.CONSUMER.CREATE.{DEAD_STREAM}.{config.name}.{config.filter_subject}"
        request = {"stream_name": DEAD_STREAM, "config": config.as_dict()}
        reply = await self._link.request(path, msgspec.json.encode(request))
        answer: dict[str, Any] = msgspec.json.decode(reply.data)
        if "error" in answer:
            with _no_stream_explained():
                raise from_answer("reading dead letters", self._link.servers, answer["error"])
        return int(answer["num_pending"])


@contextlib.contextmanager
def _no_stream_explained() -> Iterator[None]:
    try:
        yield
    except JetStreamRefused as error:
        if error.err_code != NO_STREAM:
            raise
        raise NatsRefused(
            "reading dead letters",
            f"there is no stream {DEAD_STREAM}",
            "`dbtstream setup` creates it",
        ) from error


def _letter_of(message: Msg) -> DeadLetter:
    headers: Mapping[str, str] = message.headers or {}
    metadata = message.metadata
    size = _number(headers.get("Nats-Msg-Size")) or 0
    return _letter(metadata.sequence.stream, metadata.timestamp, message.subject, headers, size)


def _letter(
    letter_id: int, at: datetime, subject: str, headers: Mapping[str, str], size: int
) -> DeadLetter:
    project, target = _names(subject)
    whole = _number(headers.get(H_TRUNCATED))
    return DeadLetter(
        id=letter_id,
        at=at,
        project=project,
        target=target,
        code=headers.get(H_CODE, ""),
        message=headers.get(H_MESSAGE, ""),
        field=headers.get(H_FIELD),
        subject=headers.get(H_SUBJECT, ""),
        run_id=headers.get(H_RUN_ID),
        request_seq=_number(headers.get(H_REQUEST_SEQ)),
        size=size if whole is None else whole,
        truncated=whole is not None,
    )


def _names(subject: str) -> tuple[str, str]:
    """Project and target: the last two of `dbt.dead.<project>.<target>`, and of a request's."""
    _, _, *names = subject.split(".")
    return (names[0], names[1]) if len(names) == 2 else ("", "")


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _with_request_id(data: bytes, request_id: str) -> bytes:
    request: dict[str, Any] = msgspec.json.decode(data)
    return msgspec.json.encode(request | {"request_id": request_id})
