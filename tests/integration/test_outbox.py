"""The outbox on a real disk: full, limited, killed, corrupted, and with nobody taking."""

import asyncio
import resource
import signal
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from dbtstream import outbox as module
from dbtstream.outbox import Dropped, Outbox, Record
from dbtstream.outbox_file import OutboxCorrupt, OutboxFile, frame

RUN = "0190b1a2-0000-7000-8000-000000000000"
MB = 1024 * 1024
NO_LIMIT = 1 << 60

Until = Callable[[Callable[[], object]], Awaitable[None]]


def record(seq: int, family: str = "node", size: int = 10) -> Record:
    payload = str(seq).encode().ljust(size, b" ")
    return Record(
        seq, family, f"dbt.events.shop.prod.{family}.x", {"Nats-Msg-Id": str(seq)}, payload
    )


def files(directory: Path) -> list[Path]:
    return list(directory.iterdir())


def size_of(path: Path) -> int:
    return path.stat().st_size


async def take(box: Outbox, until: int) -> list[int]:
    """Take and ack until record `until` has come; the numbers taken."""
    seqs: list[int] = []
    async with asyncio.timeout(60):
        while not seqs or seqs[-1] < until:
            records = await box.next(500, MB)
            seqs += (each.seq for each in records)
            box.ack(len(records))
    return seqs


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Outbox]:
    box = await Outbox.open(tmp_path / "outbox", RUN, 1, max_bytes=1024 * MB)
    yield box
    await box.close()


async def reopened(directory: Path) -> Outbox:
    (box,) = await Outbox.recover(directory)
    assert (box.run_id, box.attempt, box.recovered) == (RUN, 1, True)
    return box


async def test_records_come_out_in_order_and_again_until_they_are_acked(box: Outbox) -> None:
    for seq in (1, 2, 3):  # written as one group: nothing else runs in between
        assert box.put(record(seq))
    assert await box.next(10, MB) == [record(1), record(2), record(3)]
    box.ack(2)
    assert await box.next(10, MB) == [record(3)]
    assert await box.next(10, 1) == [record(3)]  # one at least, however small the limit


async def test_it_is_drained_when_the_input_is_closed_and_all_is_acked(
    box: Outbox, tmp_path: Path
) -> None:
    box.put(record(1))
    box.close_input()
    drained = asyncio.create_task(box.drained())
    assert await box.next(10, MB) == [record(1)]
    assert not drained.done()
    box.ack(1)
    async with asyncio.timeout(30):
        await drained
    assert await box.next(10, MB) == []
    await box.remove()
    assert files(tmp_path / "outbox") == []
    with pytest.raises(RuntimeError):
        box.put(record(2))


async def test_next_waits_for_a_record(box: Outbox) -> None:
    waiting = asyncio.create_task(box.next(10, MB))
    box.put(record(1))
    async with asyncio.timeout(30):
        assert await waiting == [record(1)]


async def test_only_we_may_read_it(box: Outbox, tmp_path: Path) -> None:
    (file,) = files(tmp_path / "outbox")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


async def test_what_is_not_acked_survives_closing_and_what_is_acked_does_not_come_again(
    box: Outbox, tmp_path: Path
) -> None:
    for seq in range(1, 101):
        box.put(record(seq))
    records = await box.next(40, MB)
    box.ack(len(records))
    await box.close()
    again = await reopened(tmp_path / "outbox")
    assert await take(again, 100) == list(range(len(records) + 1, 101))
    async with asyncio.timeout(30):
        await again.drained()
    await again.remove()


async def test_the_file_of_a_living_daemon_is_not_taken_over(box: Outbox, tmp_path: Path) -> None:
    box.put(record(1))
    await box.next(1, MB)
    assert await Outbox.recover(tmp_path / "outbox") == []


async def test_an_empty_file_is_removed_and_foreign_ones_are_left(tmp_path: Path) -> None:
    box = await Outbox.open(tmp_path, RUN, 1, max_bytes=MB)
    await box.close()
    foreign = tmp_path / f"{RUN}.2.outbox"
    foreign.write_bytes(b"this is not an outbox at all")
    assert await Outbox.recover(tmp_path) == []
    assert files(tmp_path) == [foreign]
    assert await Outbox.recover(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        pytest.param(lambda raw: raw[:-1], 9, id="half written"),
        pytest.param(lambda raw: raw + b"\x05\x00", 10, id="half a length"),
        pytest.param(lambda raw: raw[:-3] + b"XYZ", 9, id="wrong checksum"),
        pytest.param(lambda raw: raw + b"\xff" * 64, 10, id="garbage after it"),
        pytest.param(lambda raw: raw + bytes(64), 10, id="zeros after it"),
    ],
)
async def test_a_damaged_end_is_cut_and_what_came_before_it_is_delivered(
    tmp_path: Path, damage: Callable[[bytes], bytes], left: int
) -> None:
    box = await Outbox.open(tmp_path, RUN, 1, max_bytes=MB)
    for seq in range(1, 11):
        box.put(record(seq))
    await box.close()
    (file,) = files(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    again = await reopened(tmp_path)
    assert again.stats.lost == 1
    assert await take(again, left) == list(range(1, left + 1))
    assert await again.next(1, MB) == []
    await again.remove()


async def test_a_killed_process_leaves_what_it_had_written(tmp_path: Path) -> None:
    script = (
        "import asyncio, pathlib, sys\n"
        "from dbtstream.outbox import Outbox, Record\n"
        "async def main():\n"
        f"    box = await Outbox.open(pathlib.Path(sys.argv[1]), {RUN!r}, 1, max_bytes=1 << 30)\n"
        "    seq = 0\n"
        "    while True:\n"
        "        seq += 1\n"
        "        box.put(Record(seq, 'node', 's', {}, str(seq).encode()))\n"
        "        await asyncio.sleep(0)\n"
        "        last = (await box.next(1 << 30, 1 << 40))[-1].seq\n"
        "        print(last, flush=True)\n"
        "asyncio.run(main())\n"
    )
    writer = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert writer.stdout is not None
    promised = 0
    while promised < 500:
        promised = int(await writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    rest = await writer.stdout.read()
    promised = max([promised, *map(int, rest.split(b"\n")[:-1])])
    await writer.wait()
    again = await reopened(tmp_path)
    assert (await take(again, promised))[:promised] == list(range(1, promised + 1))
    await again.close()


async def test_with_nobody_taking_memory_stays_bounded_and_nothing_is_lost(
    box: Outbox, until: Until
) -> None:
    count, taken = 100_000, 0
    for seq in range(1, count + 1):
        assert box.put(record(seq, size=200))
        if seq % 5000 == 0:
            # What is written leaves memory, but for the window: else this never comes true.
            await until(lambda: box.stats.memory_bytes <= module.WINDOW_BYTES)
        if seq == count // 2:  # there is room in the window, and still older ones on disk
            taken = (await take(box, 1000))[-1]
    assert box.stats.waiting == count - taken
    assert box.stats.waiting_bytes > 4 * module.WINDOW_BYTES
    assert await take(box, count) == list(range(taken + 1, count + 1))
    assert box.stats.waiting == box.stats.memory_bytes == box.stats.waiting_bytes == 0


async def test_a_record_larger_than_the_read_size_comes_back_whole(box: Outbox) -> None:
    for seq in range(1, 8):
        box.put(record(seq, size=2 * MB))
    assert await take(box, 7) == list(range(1, 8))


async def test_over_the_cap_logs_go_first_then_queries_and_nodes_never(tmp_path: Path) -> None:
    box = await Outbox.open(tmp_path, RUN, 1, max_bytes=100_000)
    seq = 0
    kept: dict[str, int] = {"log": 0, "query": 0, "node": 0}
    for _ in range(100):
        for family in kept:
            seq += 1
            kept[family] += box.put(record(seq, family, size=1000))
    assert kept["log"] < kept["query"] < kept["node"] == 100
    dropped = box.take_dropped()
    assert {each.family for each in dropped} == {"log", "query"}
    assert sum(each.count for each in dropped) == 300 - sum(kept.values())
    assert box.stats.dropped == 300 - sum(kept.values())
    assert box.take_dropped() == []
    await box.close()


async def test_neighbouring_drops_of_a_family_are_told_as_one_range(tmp_path: Path) -> None:
    box = await Outbox.open(tmp_path, RUN, 1, max_bytes=100)
    box.put(record(1, size=200))
    for seq in (2, 3, 4):
        assert not box.put(record(seq, "log"))
    box.put(record(5))
    assert not box.put(record(6, "log"))
    assert not box.put(record(7, "query"))
    assert box.take_dropped() == [
        Dropped("log", 3, 2, 4),
        Dropped("log", 1, 6, 6),
        Dropped("query", 1, 7, 7),
    ]
    await box.close()


async def test_with_a_full_disk_events_still_pass_in_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """/dev/full answers every write with ENOSPC."""
    (tmp_path / f"{RUN}.1.outbox").symlink_to("/dev/full")
    box = await Outbox.open(tmp_path, RUN, 1, max_bytes=MB)
    for seq in range(1, 1001):
        assert box.put(record(seq))
    assert await take(box, 1000) == list(range(1, 1001))
    assert box.stats.disk_failed
    assert caplog.text.count("the outbox cannot be written") == 1
    box.close_input()
    async with asyncio.timeout(30):
        await box.drained()
    await box.remove()


async def test_what_no_disk_took_and_nobody_had_is_counted_as_lost_on_closing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / f"{RUN}.1.outbox").symlink_to("/dev/full")
    box = await Outbox.open(tmp_path, RUN, 1, max_bytes=MB)
    for seq in range(1, 11):
        box.put(record(seq))
    await box.close()
    assert box.stats.lost == 10
    assert "in memory only and are lost" in caplog.text


async def test_without_a_disk_only_droppable_families_are_dropped_at_the_memory_cap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MEMORY_CAP_BYTES", 10_000)
    (tmp_path / f"{RUN}.1.outbox").symlink_to("/dev/full")
    box = await Outbox.open(tmp_path, RUN, 1, max_bytes=MB)
    for seq in range(1, 101):
        assert box.put(record(seq, size=1000))
    assert not box.put(record(101, "log"))
    assert await take(box, 100) == list(range(1, 101))
    await box.remove()


async def test_a_disk_that_comes_back_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    """RLIMIT_FSIZE makes the kernel refuse, half way through a group, what a full disk would."""
    monkeypatch.setattr(module, "DISK_RETRY_S", 0.05)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    box = await Outbox.open(tmp_path, RUN, 1, max_bytes=MB)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        for seq in range(1, 101):
            box.put(record(seq, size=100))
        assert await take(box, 100) == list(range(1, 101))
        assert box.stats.disk_failed
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    for seq in range(101, 201):
        box.put(record(seq, size=100))
    await until(lambda: not box.stats.disk_failed)
    await box.close()
    again = await reopened(tmp_path)
    assert await take(again, 200) == list(range(101, 201))
    await again.close()


def test_a_group_that_fails_half_way_leaves_no_half_group_behind(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    file = OutboxFile(tmp_path / "x.1.outbox")
    end = file.open().end
    frames = [frame(record(seq, size=100), 1.0) for seq in range(20)]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(OSError, match="too large"):
            file.append(end, frames)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert size_of(file.path) == end
    file.append(end, frames[:3])
    size = size_of(file.path)
    assert [each.seq for each, _ in file.read(end, size, MB)] == [0, 1, 2]
    file.close()


async def test_a_delivered_file_is_emptied_so_that_a_long_run_needs_little_disk(
    box: Outbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    monkeypatch.setattr(module, "RESET_BYTES", 1000)
    (file,) = files(tmp_path / "outbox")
    for seq in range(1, 101):
        box.put(record(seq, size=1000))
    await take(box, 100)
    await until(lambda: size_of(file) == 16)
    for seq in range(101, 111):
        box.put(record(seq))
    await box.close()
    again = await reopened(tmp_path / "outbox")
    assert await take(again, 110) == list(range(101, 111))
    await again.close()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.1.outbox"
    path.write_bytes(b"x" * 100)
    with pytest.raises(OutboxCorrupt, match="starts with b'xxxxxxxx'"):
        OutboxFile(path).open()


def test_damage_in_the_middle_is_told_when_it_is_read(tmp_path: Path) -> None:
    file = OutboxFile(tmp_path / "x.1.outbox")
    start = file.open().end
    data = [frame(record(seq), 1.0) for seq in range(3)]
    file.append(start, data)
    end = start + sum(map(len, data))
    file.append(start + len(data[0]) + 8, [b"!!!!"])
    found = file.read(start, end, NO_LIMIT)
    assert [each.seq for each, _ in found] == [0]
    with pytest.raises(OutboxCorrupt, match="wrong checksum"):
        file.read(found[-1][1], end, NO_LIMIT)
    file.close()
