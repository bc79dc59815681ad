"""What OpenTelemetry's SDK logs is said once in a while, in one line of ours."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from dbtstream import telemetry
from dbtstream.telemetry import MAX_SAID, SdkLog

SDK = logging.getLogger("opentelemetry.sdk.export")


def said(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Our own lines. pytest also hears loggers that pass nothing on."""
    return [r.__dict__ for r in caplog.records if r.name == "dbtstream.telemetry"]


@pytest.fixture
def sdk_log() -> Iterator[SdkLog]:
    handler = SdkLog()
    handler.install()
    yield handler
    handler.remove()


def test_the_same_complaint_is_said_once(sdk_log: SdkLog, caplog: pytest.LogCaptureFixture) -> None:
    for attempt in range(100):
        SDK.warning("Failed to export %s, retrying", attempt)
    SDK.error("something else")

    assert [line["problem"] for line in said(caplog)] == [
        "Failed to export 0, retrying",
        "something else",
    ]
    assert not logging.getLogger("opentelemetry").propagate


def test_it_is_said_again_with_how_often_it_was_not(
    sdk_log: SdkLog, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(telemetry, "monotonic", lambda: now)
    for _ in range(7):
        SDK.warning("no")
    now += telemetry.SAY_AGAIN_S
    SDK.warning("no")

    assert [line["unsaid"] for line in said(caplog)] == [0, 6]


def test_many_different_complaints_are_not_remembered_for_ever(
    sdk_log: SdkLog, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(5 * MAX_SAID):
        SDK.warning(f"no. {number}")
    assert len(said(caplog)) <= MAX_SAID + 1
    assert len(sdk_log._unsaid) <= MAX_SAID + 1


def test_afterwards_the_logger_is_as_it_was() -> None:
    logger = logging.getLogger("opentelemetry")
    before = (logger.propagate, list(logger.handlers))
    handler = SdkLog()
    handler.install()
    handler.remove()
    assert (logger.propagate, logger.handlers) == before
