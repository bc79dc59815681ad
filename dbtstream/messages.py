"""Commands in and replies out: what a person or a service may ask of dbtstream.

A run request is the payload of `dbt.runs.<project>.<target>`; the others belong to the
control service (`dbt.control.*`). Requests refuse unknown keys, so that a misspelt option
is an error and not a run without it. Replies are read tolerantly.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

import msgspec

from dbtstream.errors import RequestRejected
from dbtstream.statuses import RunStatus

MAX_REQUEST_BYTES = 256 * 1024
MAX_ARGS = 1000
MAX_LABELS = 16
MAX_LABEL_BYTES = 128  # key or value
MAX_VARS_BYTES = 64 * 1024
MAX_WORD_BYTES = 256  # request_id, requested_by
MAX_REASON_BYTES = 1024


Instant = Annotated[datetime, msgspec.Meta(tz=True)]
"""With its zone: a naive time would mean another moment on another worker."""


class OnBusy(StrEnum):
    QUEUE = "queue"
    SKIP = "skip"
    REPLACE = "replace"
    COALESCE = "coalesce"


class OnLost(StrEnum):
    RESUME = "resume"
    RESTART = "restart"
    FAIL = "fail"


class RejectCode(StrEnum):
    BAD_MESSAGE = "bad_message"
    UNKNOWN_PROJECT = "unknown_project"
    UNKNOWN_TARGET = "unknown_target"
    COMMAND_NOT_ALLOWED = "command_not_allowed"
    FLAG_NOT_ALLOWED = "flag_not_allowed"
    USAGE_ERROR = "usage_error"
    TOO_LARGE = "too_large"
    EXPIRED = "expired"
    DUPLICATE = "duplicate"
    BUSY = "busy"
    DELIVERIES_EXHAUSTED = "deliveries_exhausted"  # handed out max_deliveries times


LAST_SUCCESS = "last_success"


class StateFrom(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """Which earlier run `state:` selection and defer compare with.

    `target` is whose last success; the run's own target if absent, so a CI target can name prod.
    """

    from_: str = msgspec.field(name="from")  # "last_success" or a run id
    target: str | None = None


class RunRequest(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """Ask for one dbt invocation. Published to `dbt.runs.<project>.<target>`.

    `args` are dbt's own words, the list that `dbtRunner.invoke` takes: `["build", "--select",
    "orders+"]`. Paths, profiles, logging and target flags belong to the worker. With `retry_of`,
    which names an earlier run, they may be left out or be dbt's `["retry", …]`.
    """

    args: list[str] = []
    vars: dict[str, Any] = {}
    request_id: str | None = None  # idempotency key; the Nats-Msg-Id if absent
    not_after: Instant | None = None  # give up if it has not begun by then
    timeout_s: float | None = None
    silence_timeout_s: float | None = None
    on_busy: OnBusy = OnBusy.QUEUE
    on_lost: OnLost | None = None
    retry_of: str | None = None
    state: StateFrom | None = None
    labels: dict[str, str] = {}
    reason: str | None = None
    requested_by: str | None = None


class SubmitRequest(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """`dbt.control.submit`: publish this request and say what became of it."""

    project: str
    target: str | None = None  # the project's first target if absent
    request: RunRequest


class RunAccepted(msgspec.Struct, frozen=True, kw_only=True, tag="run_accepted", tag_field="type"):
    """The request is stored in DBT_RUNS. `duplicate`: this request_id had already been."""

    run_id: str
    project: str
    target: str
    position: int = 0
    duplicate: bool = False


class RunRejected(msgspec.Struct, frozen=True, kw_only=True, tag="run_rejected", tag_field="type"):
    """The request was not stored and will not run. `code` is a `RejectCode`."""

    code: str
    message: str
    field: str | None = None


class CancelRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`dbt.control.cancel`."""

    run_id: str
    by: str | None = None
    reason: str | None = None


class CancelAccepted(
    msgspec.Struct, frozen=True, kw_only=True, tag="cancel_accepted", tag_field="type"
):
    """The cancel reached the run's worker, or the run was waiting and is removed.

    `status` is the run's status when the cancel arrived; a run that had ended stays as it was.
    """

    run_id: str
    status: RunStatus


class GetRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`dbt.control.get`."""

    run_id: str


class ListRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`dbt.control.list`: newest first. An empty payload means all defaults."""

    project: str | None = None
    target: str | None = None
    active: bool = False  # only runs that have not ended
    limit: int = 50


class RunView(msgspec.Struct, frozen=True, kw_only=True, tag="run_view", tag_field="type"):
    """What is known of a run; also its value in the KV bucket `dbt_state`."""

    run_id: str
    project: str
    target: str
    status: RunStatus
    args: list[str] = []
    request_id: str | None = None
    requested_by: str | None = None
    reason: str | None = None
    labels: dict[str, str] = {}
    attempt: int = 0
    fence: int = 0
    worker: str | None = None
    invocation_id: str | None = None
    request_seq: int | None = None  # sequence in DBT_RUNS
    last_seq: int = 0  # highest event seq so far
    queued_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    updated_at: datetime | None = None
    exit_code: int | None = None
    error: str | None = None
    counts: dict[str, dict[str, int]] = {}
    artifacts: dict[str, str] = {}  # kind -> name in the Object Store, of those that are there


class RunList(msgspec.Struct, frozen=True, kw_only=True, tag="run_list", tag_field="type"):
    """`waiting` counts requests that no worker has seen yet, by `<project>.<target>`;
    `waiting_since` says when the oldest of them was stored."""

    runs: list[RunView]
    waiting: dict[str, int] = {}
    waiting_since: dict[str, datetime] = {}


class WorkerStatusRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`dbt.control.worker.status`: every worker answers, so read more than one reply. An empty
    payload will do."""


class NodeAtWork(msgspec.Struct, frozen=True, kw_only=True):
    unique_id: str
    resource_type: str
    name: str
    started_at: datetime


class RunAtWork(msgspec.Struct, frozen=True, kw_only=True):
    """A run in a worker's hands, and how far it is: all that its events up to `last_seq` say.

    `status` is queued while it waits for a limit or a slot. `done` counts the nodes of this attempt
    that have ended, without hooks, out of `total`, which is null until dbt has selected.
    """

    run_id: str
    project: str
    target: str
    status: RunStatus
    args: list[str] = []
    attempt: int = 1
    last_seq: int = 0
    queued_at: datetime | None = None
    started_at: datetime | None = None
    done: int = 0
    total: int | None = None
    by_status: dict[str, int] = {}
    running: int = 0
    nodes: list[NodeAtWork] = []  # of those that run, the ten that have for the longest
    eta_s: float | None = None
    unstored: int = 0  # events that JetStream does not have yet


class WorkerStatus(
    msgspec.Struct, frozen=True, kw_only=True, tag="worker_status", tag_field="type"
):
    """How one worker is at the moment `at`, by its own clock.

    `used` of its `slots` are taken by requests; what waits for a limit has lent its slot, so
    there may be more `runs` than that. `draining`: it takes no new request.
    """

    worker: str
    version: str
    host: str
    at: datetime
    started_at: datetime
    slots: int
    used: int
    draining: bool = False
    projects: list[str] = []
    runs: list[RunAtWork] = []


class ControlError(msgspec.Struct, frozen=True, kw_only=True, tag="error", tag_field="type"):
    """A control request that could not be answered: `not_found`, `bad_message`, `unavailable`."""

    code: str
    message: str


Reply = RunAccepted | RunRejected | CancelAccepted | RunView | RunList | WorkerStatus | ControlError

_run_request: msgspec.json.Decoder[RunRequest] = msgspec.json.Decoder(RunRequest)
_submit: msgspec.json.Decoder[SubmitRequest] = msgspec.json.Decoder(SubmitRequest)
_reply: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)
_encoder = msgspec.json.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    return _encoder.encode(message)


def decode_reply(data: bytes) -> Reply:
    """Raises msgspec.ValidationError when it is none of ours."""
    return _reply.decode(data)


def decode_run_request(data: bytes) -> RunRequest:
    """A request within its limits. Raises RequestRejected (bad_message, too_large)."""
    if len(data) > MAX_REQUEST_BYTES:
        raise RequestRejected(
            RejectCode.TOO_LARGE,
            f"the request has {len(data)} bytes; the limit is {MAX_REQUEST_BYTES}",
        )
    try:
        request = _run_request.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestRejected(RejectCode.BAD_MESSAGE, str(error), _path_of(error)) from error
    check_limits(request)
    return request


def decode_submit(data: bytes) -> SubmitRequest:
    """As `decode_run_request`, for `dbt.control.submit`."""
    if len(data) > MAX_REQUEST_BYTES:
        raise RequestRejected(
            RejectCode.TOO_LARGE,
            f"the request has {len(data)} bytes; the limit is {MAX_REQUEST_BYTES}",
        )
    try:
        submit = _submit.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestRejected(RejectCode.BAD_MESSAGE, str(error), _path_of(error)) from error
    check_limits(submit.request)
    return submit


def check_limits(request: RunRequest) -> None:
    """Sizes that a type cannot say. Raises RequestRejected."""
    if not request.args and request.retry_of is None:
        raise RequestRejected(
            RejectCode.BAD_MESSAGE, 'args is empty; it needs dbt\'s words, like ["build"]', "args"
        )
    if len(request.args) > MAX_ARGS:
        _too_large("args", f"{len(request.args)} words", f"{MAX_ARGS}")
    if len(request.labels) > MAX_LABELS:
        _too_large("labels", f"{len(request.labels)} entries", f"{MAX_LABELS}")
    for key, value in request.labels.items():
        if max(len(key.encode()), len(value.encode())) > MAX_LABEL_BYTES:
            _too_large(f"labels.{key[:40]}", "a key or value", f"{MAX_LABEL_BYTES} bytes")
    if len(_encoder.encode(request.vars)) > MAX_VARS_BYTES:
        _too_large("vars", "its JSON", f"{MAX_VARS_BYTES} bytes")
    for name in ("request_id", "requested_by", "retry_of"):
        word = getattr(request, name)
        if word is not None and len(word.encode()) > MAX_WORD_BYTES:
            _too_large(name, "it", f"{MAX_WORD_BYTES} bytes")
    if request.reason is not None and len(request.reason.encode()) > MAX_REASON_BYTES:
        _too_large("reason", "it", f"{MAX_REASON_BYTES} bytes")
    for name in ("timeout_s", "silence_timeout_s"):
        seconds = getattr(request, name)
        if seconds is not None and not seconds > 0:
            raise RequestRejected(
                RejectCode.BAD_MESSAGE, f"{name} is {seconds}; it must be above 0", name
            )


def _too_large(field: str, what: str, limit: str) -> None:
    raise RequestRejected(
        RejectCode.TOO_LARGE, f"{field}: {what} is over the limit of {limit}", field
    )


def _path_of(error: Exception) -> str | None:
    """msgspec ends its messages with ` - at `$.labels[...]``; the path without the `$.`."""
    _, at, path = str(error).rpartition(" - at `$.")
    return path.rstrip("`") if at else None
