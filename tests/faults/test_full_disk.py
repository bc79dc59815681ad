"""The disk of a worker's state directory is full for a while, in the middle of a run."""

import resource
from pathlib import Path

import pytest

from dbtstream.client import Client
from dbtstream.embedded import NatsServer
from dbtstream.events import NodeFinished
from dbtstream.nats_link import NatsLink
from tests.daemons import project_folder
from tests.faults.form import form
from tests.faults.harness import (
    Serve,
    ended,
    judge,
    linked,
    serving,
    submit,
    write_config,
)
from tests.scripted_child import scripted_child

NODES = form(400, 2000)
"""A quarter of them is some hundred kilobytes in the outbox, all of them less than the 4 MB at
which it begins its file anew."""

SLOWLY = 60
"""So many, one by one, take longer than the outbox leaves a failing disk alone."""

BODY = """
    full, end = %r
    start_line()
    hello()
    nodes = [f"m{i}" for i in range(%d)]
    quarter = len(nodes) // 4
    plan(*map(model, nodes))
    for number, name in enumerate(nodes):
        if number == quarter:
            wait_for(full)
        started(name)
        if number > 2 * quarter and not os.path.exists(end):
            time.sleep(0.05)
        finished(name)
    result(0, [(name, "success") for name in nodes])
"""
"""A quarter of the nodes while there is room, another one when there is none; then one by one,
until there is room again."""


def limit_files(daemon: Serve, size: int) -> None:
    """RLIMIT_FSIZE of the running daemon: the kernel refuses to let a file grow beyond it, half
    way through a write, as it does on a full disk. Its log is far below."""
    assert daemon.process is not None
    _, hard = resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (size, hard))


async def until_built(link: NatsLink, run_id: str, count: int) -> None:
    """So many nodes' ends are stored."""
    seen = 0
    async for event in Client(link).events(run_id=run_id):
        seen += isinstance(event, NodeFinished)
        if seen == count:
            return
    raise AssertionError("the run ended before")


@pytest.mark.timeout(form(120, 600))
async def test_a_disk_that_is_full_for_a_while_costs_no_event_and_is_used_again(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    flags = full, end = tmp_path / "full", tmp_path / "end"
    body = BODY % (tuple(map(str, flags)), NODES)
    shop = {
        "path": str(project_folder(tmp_path)),
        "targets": ["dev"],
        "python": scripted_child(tmp_path / "child", body),
    }
    config = write_config(tmp_path, nats_server, "w1", projects={"shop": shop})
    async with serving(config) as (daemon,), linked(nats_server) as link:
        run_id = await submit(link)
        outbox = tmp_path / "state-w1" / "outbox" / f"{run_id}.1.outbox"
        await until_built(link, run_id, NODES // 4)
        limit_files(daemon, outbox.stat().st_size)
        size = outbox.stat().st_size
        full.touch()
        await until_built(link, run_id, NODES // 2 + SLOWLY)
        await daemon.until_log("the outbox cannot be written")
        assert outbox.stat().st_size == size
        limit_files(daemon, resource.RLIM_INFINITY)
        await daemon.until_log("the outbox is written to disk again")
        end.touch()
        run = await ended(link, run_id)
        log = daemon.log

    judge(run, node_count=NODES)
    assert log.count("the outbox cannot be written") == 1
    assert log.count("the outbox is written to disk again") == 1
    assert not outbox.exists()
