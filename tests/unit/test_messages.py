"""Requests are read strictly, and every refusal says what and where."""

import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from dbtstream import messages
from dbtstream.errors import RequestRejected
from dbtstream.messages import RejectCode, RunRequest, decode_run_request, decode_submit
from dbtstream.statuses import RunStatus


def rejected(payload: bytes | dict[str, Any]) -> RequestRejected:
    """Refused as a message on its own, and inside a submit."""
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    with pytest.raises(RequestRejected) as caught:
        decode_run_request(data)
    return caught.value


def test_the_shortest_request_gets_the_defaults() -> None:
    request = decode_run_request(b'{"args": ["build"]}')
    assert request == RunRequest(args=["build"])
    assert request.on_busy == "queue"


def test_a_request_with_everything_comes_through_unchanged() -> None:
    request = RunRequest(
        args=["run", "--select", "ß+"],
        vars={"day": "2025-12-18", "limits": [1, None, {"a": 0.5}]},
        request_id="load-1",
        not_after=datetime(2025, 12, 18, 7, tzinfo=UTC),
        timeout_s=60,
        silence_timeout_s=0.5,
        on_busy=messages.OnBusy.COALESCE,
        on_lost=messages.OnLost.FAIL,
        retry_of="019b2f3c-8a10-7c4e-9f21-5b0d6c7e8f90",
        state=messages.StateFrom(from_="last_success"),
        labels={"team": "finance"},
        reason="because",
        requested_by="ada",
    )
    assert decode_run_request(messages.encode(request)) == request
    submit = messages.SubmitRequest(project="shop", request=request)
    assert decode_submit(messages.encode(submit)) == submit


@pytest.mark.parametrize(
    "data", [b"", b"build", b"[]", b'"build"', b"null", b'{"args": ["build"]', b"\xff\xfe", b"{}"]
)
def test_what_is_no_request_is_a_bad_message(data: bytes) -> None:
    assert rejected(data).code == RejectCode.BAD_MESSAGE


def test_bytes_that_are_not_text_inside_a_string_are_a_bad_message() -> None:
    assert rejected(b'{"args": ["\xff"]}').code == RejectCode.BAD_MESSAGE


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"arg": []}, "`arg`"),
        ({"selekt": "orders"}, "`selekt`"),
        ({"state": {"from": "last_success", "path": "target"}}, "`path`"),
        ({"type": "run_request"}, "`type`"),
    ],
)
def test_an_unknown_key_is_refused_by_its_name(changed: dict[str, Any], named: str) -> None:
    """A misspelt option must not be a run without it."""
    error = rejected({"args": ["build"], **changed})
    assert error.code == RejectCode.BAD_MESSAGE
    assert named in error.message


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"args": "build"}, "args"),
        ({"args": ["build", 3]}, "args[1]"),
        ({"args": None}, "args"),
        ({"vars": "{a: 1}"}, "vars"),
        ({"vars": []}, "vars"),
        ({"request_id": 7}, "request_id"),
        ({"not_after": "tomorrow"}, "not_after"),
        ({"timeout_s": "60"}, "timeout_s"),
        ({"timeout_s": True}, "timeout_s"),
        ({"on_busy": "wait"}, "on_busy"),
        ({"on_lost": "retry"}, "on_lost"),
        ({"state": {"from": 1}}, "state.from"),
        ({"state": "last_success"}, "state"),
        ({"labels": {"team": 1}}, "labels[...]"),
        ({"requested_by": ["ada"]}, "requested_by"),
    ],
)
def test_a_wrong_type_names_its_path(changed: dict[str, Any], field: str) -> None:
    error = rejected({"args": ["build"], **changed})
    assert (error.code, error.field) == (RejectCode.BAD_MESSAGE, field)
    assert field in error.message


def test_the_path_inside_a_submit_begins_at_the_submit() -> None:
    with pytest.raises(RequestRejected) as caught:
        decode_submit(b'{"project": "shop", "request": {"args": [1]}}')
    assert caught.value.field == "request.args[0]"


def test_no_args_are_refused_with_an_example() -> None:
    error = rejected({"args": []})
    assert (error.code, error.field) == (RejectCode.BAD_MESSAGE, "args")
    assert '["build"]' in error.message


@pytest.mark.parametrize("name", ["timeout_s", "silence_timeout_s"])
@pytest.mark.parametrize("seconds", [0, -1, -0.0])
def test_a_time_limit_must_be_above_zero(name: str, seconds: float) -> None:
    error = rejected({"args": ["build"], name: seconds})
    assert (error.code, error.field) == (RejectCode.BAD_MESSAGE, name)


AT_THE_LIMIT: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"args": ["x"] * messages.MAX_ARGS},
        {"args": ["x"] * (messages.MAX_ARGS + 1)},
        "args",
    ),
    (
        {"labels": {str(n): "" for n in range(messages.MAX_LABELS)}},
        {"labels": {str(n): "" for n in range(messages.MAX_LABELS + 1)}},
        "labels",
    ),
    (
        {"labels": {"k": "v" * messages.MAX_LABEL_BYTES}},
        {"labels": {"k": "v" * (messages.MAX_LABEL_BYTES + 1)}},
        "labels.k",
    ),
    (
        {"labels": {"é" * (messages.MAX_LABEL_BYTES // 2): ""}},
        {"labels": {"é" * (messages.MAX_LABEL_BYTES // 2 + 1): ""}},
        "labels." + "é" * 40,
    ),
    (
        {"vars": {"a": "v" * (messages.MAX_VARS_BYTES - 8)}},
        {"vars": {"a": "v" * (messages.MAX_VARS_BYTES - 7)}},
        "vars",
    ),
    (
        {"reason": "r" * messages.MAX_REASON_BYTES},
        {"reason": "r" * (messages.MAX_REASON_BYTES + 1)},
        "reason",
    ),
    *(
        (
            {name: "é" * (messages.MAX_WORD_BYTES // 2)},
            {name: "é" * (messages.MAX_WORD_BYTES // 2 + 1)},
            name,
        )
        for name in ("request_id", "requested_by", "retry_of")
    ),
]


@pytest.mark.parametrize(("fits", "too_large", "field"), AT_THE_LIMIT)
def test_each_limit_counts_bytes_and_is_sharp(
    fits: dict[str, Any], too_large: dict[str, Any], field: str
) -> None:
    decode_run_request(json.dumps({"args": ["build"], **fits}).encode())
    error = rejected({"args": ["build"], **too_large})
    assert (error.code, error.field) == (RejectCode.TOO_LARGE, field)
    assert field in error.message


def test_a_request_is_weighed_before_it_is_read() -> None:
    """Even what is no JSON: nothing of that size is parsed."""
    padded = b'{"args": ["build"]}'.ljust(messages.MAX_REQUEST_BYTES)
    decode_run_request(padded)
    for too_long in (padded + b" ", b"x" * (messages.MAX_REQUEST_BYTES + 1)):
        assert rejected(too_long).code == RejectCode.TOO_LARGE
        with pytest.raises(RequestRejected, match="too_large"):
            decode_submit(too_long)


def test_a_submit_has_the_limits_of_its_request() -> None:
    submit = {"project": "shop", "request": {"args": []}}
    with pytest.raises(RequestRejected, match="args is empty"):
        decode_submit(json.dumps(submit).encode())
    with pytest.raises(RequestRejected, match="unknown field `dry_run`"):
        decode_submit(json.dumps({**submit, "dry_run": True}).encode())


@pytest.mark.parametrize(
    "reply",
    [
        messages.RunAccepted(run_id="r", project="p", target="t", duplicate=True),
        messages.RunRejected(code="busy", message="m", field="f"),
        messages.CancelAccepted(run_id="r", status=RunStatus.RUNNING),
        messages.RunView(
            run_id="r", project="p", target="t", status=RunStatus.TIMED_OUT, exit_code=2
        ),
        messages.RunList(runs=[], waiting={"p.t": 3}),
        messages.ControlError(code="not_found", message="m"),
    ],
)
def test_a_reply_is_told_by_its_type_and_unknown_fields_pass(reply: messages.Reply) -> None:
    assert messages.decode_reply(messages.encode(reply)) == reply
    newer = {**json.loads(messages.encode(reply)), "invented_later": [1]}
    assert messages.decode_reply(json.dumps(newer).encode()) == reply


@pytest.mark.parametrize("data", [b"{}", b'{"type": "run_maybe"}', b"-ERR", b""])
def test_what_is_none_of_our_replies_is_an_error(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        messages.decode_reply(data)
