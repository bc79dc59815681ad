"""Values written behind a run's back: the newest of each key, in order, together, or given up."""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from dbtstream.errors import NatsRefused, NatsUnavailable
from dbtstream.write_behind import BATCH_KEYS, WriteBehind


class Value(NamedTuple):
    key: str
    number: int
    project: str = "shop"


class Bucket:
    """What is written, chunk by chunk; `answers` are raised one after the other before."""

    def __init__(self, *answers: Exception) -> None:
        self.chunks: list[list[Value]] = []
        self.answers = list(answers)
        self.behind: WriteBehind[Value] = WriteBehind(
            self.write,
            key=lambda value: f"{value.project}.{value.key}",
            group=lambda value: (value.project, "dev"),
            what="values",
        )

    async def write(self, values: Sequence[Value]) -> None:
        if self.answers:
            raise self.answers.pop(0)
        self.chunks.append(list(values))

    async def written(self) -> list[list[Value]]:
        self.behind.close()
        async with asyncio.timeout(10):
            await self.behind.run()
        return self.chunks


async def test_the_newest_value_goes_to_the_end_of_the_line() -> None:
    """What was put after the older one may have to be there first."""
    bucket = Bucket()
    for value in (Value("graph", 1), Value("node", 2), Value("graph", 3)):
        bucket.behind.put(value)
    assert await bucket.written() == [[Value("node", 2), Value("graph", 3)]]
    assert bucket.behind.counts == {"received": 3, "dropped": 1, "sent": 2}


async def test_chunks_are_of_one_group_and_bounded() -> None:
    bucket = Bucket()
    for number in range(BATCH_KEYS + 1):
        bucket.behind.put(Value(f"k{number}", number))
    bucket.behind.put(Value("other", 0, "crm"))
    assert [len(chunk) for chunk in await bucket.written()] == [BATCH_KEYS, 1, 1]


async def test_an_outage_keeps_the_order() -> None:
    bucket = Bucket(NatsUnavailable(("nats://x",), "away"))
    bucket.behind.put(Value("a", 1))
    bucket.behind.put(Value("b", 2))
    assert await bucket.written() == [[Value("a", 1), Value("b", 2)]]


async def test_what_is_refused_is_counted_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bucket = Bucket(NatsRefused("writing", "no"), NatsRefused("writing", "no"))
    bucket.behind.put(Value("a", 1))
    bucket.behind.put(Value("b", 2, "crm"))
    bucket.behind.put(Value("c", 3, "web"))
    assert await bucket.written() == [[Value("c", 3, "web")]]
    assert (bucket.behind.counts["failed"], bucket.behind.counts["sent"]) == (2, 1)
    assert len([record for record in caplog.records if "cannot be written" in record.msg]) == 1


async def test_a_run_waits_for_its_own_values_only() -> None:
    bucket = Bucket()
    bucket.behind.put(Value("a", 1))
    waiting = asyncio.create_task(bucket.behind.written("shop", "dev"))
    async with asyncio.timeout(10):
        await bucket.behind.written("crm", "dev")
    assert not waiting.done()
    running = asyncio.create_task(bucket.behind.run())
    async with asyncio.timeout(10):
        await waiting
    assert bucket.chunks == [[Value("a", 1)]]
    bucket.behind.close()
    await running
