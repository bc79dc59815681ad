"""From what nats-py raises to our two branches: try again, or do not.

`nats_link` raises these; `streams`, `store` and `consumer` use `nats_link.translated`. The
numbers are nats-server's own (server/errors.json). nats-py tells some of them apart only by
type, some only by number, and a full stream (which will not pass by waiting) arrives with
the same 503 as an election (which will).
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import nats.errors
import nats.js.errors

from dbtstream.errors import NatsError, NatsRefused, NatsUnavailable

WRONG_LAST_SEQUENCE = frozenset({10071, 10164})
BATCH_DUPLICATE_ID = 10201
"""A batch holds a Nats-Msg-Id that is stored. For a repeated batch it means: committed."""

_ABOUT_MESSAGE = frozenset(
    {
        10054,  # message size exceeds maximum allowed
        10097,  # header size exceeds maximum allowed of 64k
    }
)
_CONFIG = frozenset(
    {
        # 500 by their code, yet a matter of what was asked
        10012,  # a consumer cannot be created so
        10049,  # a stream cannot be created so
        10052,  # a stream cannot be updated so
    }
)
_FULL = ("maximum messages", "maximum bytes", "maximum consumers")
_NO_JETSTREAM = frozenset(
    {
        10039,  # not enabled for account
        10076,  # not enabled
    }
)
_WILL_NOT_PASS = (
    nats.errors.MaxPayloadError,
    nats.errors.BadHeaderError,
    nats.errors.BadSubjectError,
)


class NobodyListens(NatsUnavailable):
    """The server answered at once: no subscriber, and no stream, has this subject."""


class JetStreamRefused(NatsRefused):
    """JetStream's own no. `err_code` is its number, 0 when the client library refused.

    `about_message`: this very message can never be stored, wherever and whenever.
    """

    def __init__(
        self,
        operation: str,
        problem: str,
        hint: str = "",
        *,
        err_code: int = 0,
        about_message: bool = False,
    ) -> None:
        super().__init__(operation, problem, hint)
        self.err_code, self.about_message = err_code, about_message


def translate(error: BaseException, operation: str, servers: Sequence[str]) -> NatsError:
    """Ours for one of nats-py's. What is not known is taken as passing: a retry is safe."""
    match error:
        case NatsError():
            return error
        case nats.js.errors.APIError():
            return from_api(
                operation, servers, error.code, error.err_code, error.description or str(error)
            )
        case nats.js.errors.NoStreamResponseError():
            return NobodyListens(servers, f"{operation}: no stream has this subject")
        case nats.errors.NoRespondersError():
            return NobodyListens(servers, f"{operation}: nobody listens there")
        case nats.errors.OutboundBufferLimitError():
            return NatsUnavailable(servers, f"{operation}: not connected")
        case nats.errors.MaxPayloadError():
            return JetStreamRefused(
                operation, "the message is over the server's max_payload", about_message=True
            )
        case _ if isinstance(error, _WILL_NOT_PASS):
            return JetStreamRefused(operation, str(error), about_message=True)
        case asyncio.TimeoutError():
            return NatsUnavailable(servers, f"{operation}: no answer in time")
        case _:
            return NatsUnavailable(servers, f"{operation}: {str(error) or type(error).__name__}")


def from_answer(operation: str, servers: Sequence[str], error: dict[str, Any]) -> NatsError:
    """For the `error` object of a JetStream answer."""
    return from_api(
        operation,
        servers,
        error.get("code"),
        error.get("err_code"),
        str(error.get("description", error)),
    )


def from_api(
    operation: str,
    servers: Sequence[str],
    code: int | None,
    err_code: int | None,
    description: str,
) -> NatsError:
    number = err_code or 0
    if number in _NO_JETSTREAM:
        return JetStreamRefused(
            operation,
            description,
            "JetStream is off: give the server `jetstream {}`, and the account its limits",
            err_code=number,
        )
    if any(limit in description for limit in _FULL):
        return JetStreamRefused(operation, description, "the stream is full", err_code=number)
    if (code is None or code >= 500) and number not in _CONFIG:
        return NatsUnavailable(servers, f"{operation}: {description} ({number})")
    return JetStreamRefused(
        operation,
        f"{description} ({number})",
        err_code=number,
        about_message=number in _ABOUT_MESSAGE,
    )
