# ruff: noqa: S608 - nobody runs this SQL
"""The SQL reader's process, real: answers, its memory, and every way in which it can be lost."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from dbtstream.column_lineage import MAX_SQL_BYTES, AnalysisRequest, KnownColumn, SourceTable
from dbtstream.sql_process import SqlReader
from dbtstream.statuses import ColumnLineageStatus

TIMEOUT_S = 30.0
ORDERS = AnalysisRequest(
    unique_id="model.shop.x",
    sql="select id as key, amount * 2 as twice from shop.main.orders where d > '2024-01-01'",
    dialect="duckdb",
    sources=[
        SourceTable(
            ref="model.shop.orders",
            relation_name='"shop"."main"."orders"',
            columns=[KnownColumn(name=name) for name in ("id", "amount", "d")],
        )
    ],
)
SLOW = msgspec.structs.replace(
    ORDERS, sql="select " + " + ".join(f"f(a{i}, b{i})" for i in range(50_000)) + " as x"
)
"""Seconds of parsing; what is waited for never comes."""


def asking(sql: str) -> AnalysisRequest:
    return msgspec.structs.replace(ORDERS, sql=sql)


async def until(true: Callable[[], bool], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not true():  # noqa: ASYNC110 - of processes there is no event
            await asyncio.sleep(0.01)


def running(pid: int) -> bool:
    """Neither gone nor a zombie that nobody has waited for."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(") ")[2][0] != "Z"


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


async def test_an_answer_from_the_process_and_the_next_from_memory() -> None:
    """No process before the first question; other date bounds ask the same."""
    async with SqlReader() as reader:
        assert reader.pid is None
        first = await reader.read(ORDERS, TIMEOUT_S)
        pid = reader.pid
        again = await reader.read(asking(ORDERS.sql.replace("2024", "2025")), TIMEOUT_S)

        assert first.status is ColumnLineageStatus.COMPLETE
        assert first.fields is not None
        assert [it.ref for it in first.fields["twice"]] == ["model.shop.orders"]
        assert again == first
        assert reader.pid == pid
        assert reader.stats.received == reader.stats.sent == 2
        assert reader.stats.hits == 1
    assert pid is not None
    assert not running(pid)


async def test_errors_are_answers_and_are_not_kept() -> None:
    async with SqlReader() as reader:
        for _ in range(2):
            assert (await reader.read(asking("select 1 +"), TIMEOUT_S)).status == "error"

        assert (reader.stats.hits, reader.stats.failed, reader.stats.sent) == (0, 0, 2)


async def test_memory_is_bounded_and_forgets_the_oldest() -> None:
    async with SqlReader(cache_bytes=1000) as reader:
        for number in range(20):
            await reader.read(asking(f"select id as c{number} from shop.main.orders"), TIMEOUT_S)
        await reader.read(asking("select id as c19 from shop.main.orders"), TIMEOUT_S)
        await reader.read(asking("select id as c0 from shop.main.orders"), TIMEOUT_S)

        assert reader.stats.hits == 1


async def test_too_long_costs_the_process_and_one_answer() -> None:
    async with SqlReader() as reader:
        await reader.read(ORDERS, TIMEOUT_S)
        first = reader.pid

        late = await reader.read(SLOW, 0.2)
        after = await reader.read(asking("select 1 as a"), TIMEOUT_S)

        assert late.status is ColumnLineageStatus.ERROR
        assert late.message == "took longer than 0.2 s"
        assert after.status is ColumnLineageStatus.COMPLETE
        assert first is not None
        assert not running(first)
        assert (reader.stats.failed, reader.stats.restarts) == (1, 1)


async def test_sql_that_took_too_long_costs_its_time_limit_once() -> None:
    """A longer limit is worth another try."""
    async with SqlReader() as reader:
        await reader.read(SLOW, 0.2)
        process = reader.pid
        await reader.read(asking("select 1 as a"), TIMEOUT_S)

        again = await reader.read(SLOW, 0.2)
        longer = await reader.read(SLOW, 0.3)

        assert again.status is ColumnLineageStatus.ERROR
        assert again.message == "took longer than 0.2 s when it was last read"
        assert longer.message == "took longer than 0.3 s"
        assert process is None
        assert (reader.stats.failed, reader.stats.restarts) == (3, 1)


async def test_a_process_killed_in_flight_is_an_error_that_names_the_signal() -> None:
    async with SqlReader() as reader:
        await reader.read(ORDERS, TIMEOUT_S)
        pid = reader.pid
        assert pid is not None
        asked = asyncio.create_task(reader.read(SLOW, TIMEOUT_S))
        await until(lambda: reader.stats.received == 2)
        os.kill(pid, signal.SIGKILL)

        answer = await asked

        assert answer.message == "the SQL reader was killed by SIGKILL"
        assert (await reader.read(asking("select 1 as a"), TIMEOUT_S)).status == "complete"
        assert reader.stats.restarts == 1


async def test_a_process_killed_between_two_questions_is_replaced() -> None:
    """Nobody has to hear of it."""
    async with SqlReader() as reader:
        await reader.read(ORDERS, TIMEOUT_S)
        pid = reader.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not running(pid))

        answers = [await reader.read(asking(f"select {it} as a"), TIMEOUT_S) for it in (1, 2)]

        assert [answer.status for answer in answers][-1] == "complete"
        assert reader.stats.restarts == 1


async def test_too_much_memory_is_one_answer() -> None:
    """The limit is the process' own; the machine does not notice."""
    async with SqlReader(memory_bytes=110 * 1024 * 1024) as reader:
        greedy = await reader.read(SLOW, 60)
        after = await reader.read(asking("select 1 as a"), TIMEOUT_S)

    assert greedy.status is ColumnLineageStatus.ERROR
    assert after.status is ColumnLineageStatus.COMPLETE


async def test_five_megabytes_are_refused_without_a_process() -> None:
    async with SqlReader() as reader:
        answer = await reader.read(asking("x" * 5 * MAX_SQL_BYTES), TIMEOUT_S)

        assert answer.status is ColumnLineageStatus.ERROR
        assert "5,242,880" in (answer.message or "")
        assert reader.pid is None


async def test_a_mebibyte_does_not_stop_the_loop() -> None:
    """More than a pipe holds, to a process that is not reading yet."""
    big = asking(f"select id, '{'x' * (MAX_SQL_BYTES - 100)}' as x from shop.main.orders")
    longest = 0.0

    async def look() -> None:
        nonlocal longest
        while True:
            before = time.thread_time()
            await asyncio.sleep(0)
            longest = max(longest, time.thread_time() - before)
            await asyncio.sleep(0.001)

    async with SqlReader() as reader:
        looking = asyncio.create_task(look())
        answer = await reader.read(big, TIMEOUT_S)
        looking.cancel()

    assert answer.status is ColumnLineageStatus.COMPLETE
    assert longest < 0.1  # CPU of our own thread between two turns


async def test_questions_are_answered_one_by_one_in_their_order() -> None:
    """And the same question, asked by several at once, is read once."""
    order: list[int] = []

    async def ask(number: int) -> None:
        await reader.read(asking(f"select {number // 2} as a"), TIMEOUT_S)
        order.append(number)

    async with SqlReader() as reader:
        await asyncio.gather(*(ask(number) for number in range(10)))

        assert order == list(range(10))
        assert (reader.stats.sent, reader.stats.hits, reader.stats.restarts) == (10, 5, 0)


async def test_a_cancelled_question_is_counted_and_harms_nobody() -> None:
    async with SqlReader() as reader:
        await reader.read(ORDERS, TIMEOUT_S)
        asked = asyncio.create_task(reader.read(SLOW, TIMEOUT_S))
        waiting = asyncio.create_task(reader.read(asking("select 2 as b"), TIMEOUT_S))
        await until(lambda: reader.stats.received == 3)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked

        answer = await waiting

        assert answer.columns == [KnownColumn(name="b")]
        assert reader.stats.dropped == 1


async def test_it_leaves_when_idle_and_comes_back_when_asked() -> None:
    async with SqlReader(idle_s=0.1) as reader:
        await reader.read(ORDERS, TIMEOUT_S)
        pid = reader.pid
        assert pid is not None
        await until(lambda: reader.pid is None and not running(pid))

        assert (await reader.read(asking("select 1 as a"), TIMEOUT_S)).status == "complete"
        assert reader.stats.restarts == 0  # leaving is no failure


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise SystemExit('no such module')", "could not be started: no such module"),
        ("import os; os.write(1, b'garbage, not a frame')", "could not be started"),
        ("import os; os.kill(os.getpid(), 9)", "could not be started"),
    ],
)
async def test_a_process_that_cannot_start_is_not_started_again_and_again(
    code: str, said: str
) -> None:
    """Each question gets its answer; processes are begun with growing pauses between them."""
    async with SqlReader(command=(sys.executable, "-c", code)) as reader:
        answers = [await reader.read(ORDERS, TIMEOUT_S) for _ in range(20)]

        assert {answer.status for answer in answers} == {ColumnLineageStatus.ERROR}
        assert said in (answers[0].message or "")
        assert reader.stats.failed == 20
        assert reader.stats.restarts <= 2


async def test_a_program_that_is_not_there_is_an_answer_too() -> None:
    async with SqlReader(command=("/does/not/exist",)) as reader:
        answer = await reader.read(ORDERS, TIMEOUT_S)

    assert "could not be started" in (answer.message or "")


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (b"\\x00\\x00\\x00\\x03abc", "makes no sense"),
        (b"\\xff\\xff\\xff\\xff", "bytes"),
        (b"\\x00\\x00", "ended with exit code 7: the reason"),
        (b"", "ended with exit code 7: the reason"),
    ],
)
async def test_garbage_is_an_answer_that_says_so(frame: bytes, said: str) -> None:
    """After a proper start."""
    code = (
        "import os, sys; os.write(1, bytes(4)); os.read(0, 100000);"
        f"os.write(1, b'{frame.decode()}'); sys.stderr.write('the reason'); sys.stderr.flush();"
        "os._exit(7)"
    )
    async with SqlReader(command=(sys.executable, "-c", code)) as reader:
        answer = await reader.read(ORDERS, TIMEOUT_S)

        assert answer.status is ColumnLineageStatus.ERROR
        assert said in (answer.message or "")
        assert reader.stats.failed == 1


async def test_the_process_gets_no_secret_and_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_PASSWORD", "secret")
    monkeypatch.setenv("DBT_ENV_SECRET_TOKEN", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    async with SqlReader() as reader:
        await reader.read(ORDERS, TIMEOUT_S)
        pid = reader.pid
        assert pid is not None

        assert b"secret" not in environment_of(pid)
        assert os.getpriority(os.PRIO_PROCESS, pid) > os.getpriority(os.PRIO_PROCESS, 0)
        assert os.sched_getscheduler(pid) == os.SCHED_BATCH


PARENT = """
import asyncio, sys
from dbtstream.sql_process import SqlReader
from tests.integration.test_sql_process import ORDERS, SLOW

async def main():
    async with SqlReader() as reader:
        await reader.read(ORDERS, 30)
        busy = asyncio.create_task(reader.read(SLOW, 60)) if sys.argv[1] == "busy" else None
        print(reader.pid, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
async def test_no_process_outlives_a_killed_daemon(state: str) -> None:
    """Not even one in the middle of a statement."""
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, state, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    assert running(pid)

    parent.kill()
    await parent.wait()

    await until(lambda: not running(pid))
