"""What a log line says of the trace that it belongs to."""

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from dbtstream.log_context import in_run_of
from dbtstream.logs import ConsoleFormatter, JsonFormatter
from dbtstream.trace import span_id_of, trace_id_of

RUN, OTHER = "0195512b-8a00-7000-8000-000000000001", "0195512b-8a00-7000-8000-000000000002"
TRACE = "0af7651916cd43dd8448eb211c80319c"

logger = logging.getLogger("dbtstream.test_logs")


class Lines(logging.Handler):
    """Formats when a line is logged, as the handler of `dbtstream serve` does."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))

    @property
    def ids(self) -> list[tuple[str | None, str | None]]:
        return [(line.get("trace_id"), line.get("span_id")) for line in self.lines]


@pytest.fixture
def said() -> Iterator[Lines]:
    lines = Lines()
    logger.addHandler(lines)
    logger.setLevel("INFO")
    yield lines
    logger.removeHandler(lines)


def test_a_line_about_a_run_has_the_ids_of_its_span_and_others_have_none(said: Lines) -> None:
    logger.info("before")
    with in_run_of(RUN, 2, TRACE):
        logger.info("within", extra={"action": "x", "run_id": RUN})
    logger.info("after")

    assert said.ids == [(None, None), (TRACE, span_id_of(RUN, 2, "run")), (None, None)]
    assert said.lines[1]["run_id"] == RUN
    assert not {"trace_id", "span_id"} & set(said.lines[0])


def test_a_run_without_a_requester_s_trace_is_its_own(said: Lines) -> None:
    """As its events have it."""
    with in_run_of(RUN, 1, None):
        logger.info("within")

    assert said.ids == [(trace_id_of(RUN), span_id_of(RUN, 1, "run"))]


async def test_tasks_and_threads_of_a_run_log_as_it_does_and_those_beside_it_do_not(
    said: Lines,
) -> None:
    async def say() -> None:
        logger.info("said")

    async def carry(run_id: str) -> None:
        with in_run_of(run_id, 1, None):
            await asyncio.create_task(say())
            await asyncio.to_thread(logger.info, "said")

    await asyncio.gather(carry(RUN), carry(OTHER))
    await say()

    traces = sorted(str(trace) for trace, _ in said.ids)
    assert traces == sorted([*2 * [trace_id_of(RUN)], *2 * [trace_id_of(OTHER)], "None"])
    assert said.ids[-1] == (None, None)


async def test_the_ids_go_when_the_run_is_cancelled(said: Lines) -> None:
    async def carry() -> None:
        try:
            with in_run_of(RUN, 1, None):
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            logger.info("cancelled")

    carried = asyncio.create_task(carry())
    await asyncio.sleep(0)
    carried.cancel()
    await carried
    assert said.ids == [(None, None)]


def test_people_at_a_console_do_not_read_trace_ids() -> None:
    record = logging.makeLogRecord({"msg": "run finished", "levelname": "INFO", "run_id": RUN})
    with in_run_of(RUN, 1, TRACE):
        line = ConsoleFormatter().format(record)
    assert line.endswith(f"run finished  run_id={RUN}")
