"""Who listens has no say: a subscriber that never reads, or dies, changes nothing of a run.

What it costs is measured by `python -m tests.bench subscribers`.
"""

from pathlib import Path

from dbtstream.client import Client
from dbtstream.embedded import NatsServer
from dbtstream.events import NodeFinished
from dbtstream.nats_link import NatsLink
from dbtstream.subjects import EVENTS_STREAM
from tests.daemons import project_folder
from tests.faults.form import form
from tests.faults.harness import ended, judge, linked, serving, submit, write_config
from tests.faults.subscribers import bad_subscribers
from tests.scripted_child import scripted_child

NODES = form(1000, 20000)

BODY = """
    go = %r
    start_line()
    hello()
    nodes = [f"m{i}" for i in range(%d)]
    half = len(nodes) // 2
    plan(*map(model, nodes))
    for name in nodes[:half]:
        started(name)
        finished(name)
    wait_for(go)
    for name in nodes[half:]:
        started(name)
        finished(name)
    result(0, [(name, "success") for name in nodes])
"""


async def until_half(link: NatsLink, run_id: str) -> None:
    seen = 0
    async for event in Client(link).events(run_id=run_id):
        seen += isinstance(event, NodeFinished)
        if seen == NODES // 2:
            return
    raise AssertionError("the run ended before")


async def test_one_that_never_reads_and_one_that_dies_change_nothing(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """With several times what its socket holds, all events are stored and the run ends."""
    go = tmp_path / "go"
    shop = {
        "path": str(project_folder(tmp_path)),
        "targets": ["dev"],
        "python": scripted_child(tmp_path / "child", BODY % (str(go), NODES)),
    }
    config = write_config(tmp_path, nats_server, "w1", projects={"shop": shop})
    async with (
        serving(config),
        linked(nats_server) as link,
        bad_subscribers(link, nats_server.url) as dying,
    ):
        run_id = await submit(link)
        await until_half(link, run_id)
        await dying.die()
        go.touch()
        run = await ended(link, run_id)
        stored = (await link.js.stream_info(EVENTS_STREAM)).state

    judge(run, node_count=NODES)
    assert stored.messages == len(run.events)
    assert stored.bytes > 1_000_000
