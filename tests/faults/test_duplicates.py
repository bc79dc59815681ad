"""One request_id, asked for a thousand times from everywhere at once: one run."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

from dbtstream.client import Client
from dbtstream.embedded import NatsServer
from dbtstream.events import AnyEvent, RunFinished, RunRejected, RunStarted
from dbtstream.messages import RunRequest, encode
from dbtstream.nats_link import NatsLink
from dbtstream.subjects import DEAD_STREAM, H_MSG_ID, RUNS_STREAM, runs_subject
from tests.faults.children import NODE_COUNT, Children
from tests.faults.conftest import Figure
from tests.faults.form import form, lots
from tests.faults.harness import ended, judge, linked, queue_empty, serving, write_config

REQUESTS = form(100, 1000)
CLIENTS = 5
ARGS = ["build", "--select", "1"]
REQUEST_ID = "nightly"


class Asking:
    """Some clients and connections, which ask in one of three ways."""

    def __init__(self, links: list[NatsLink]) -> None:
        self._links = links
        self._draw = lots("duplicates")
        self.ways: Counter[str] = Counter()
        self.answers: set[str] = set()  # run ids that `submit` was told

    async def ask(self, number: int) -> None:
        link = self._draw.choice(self._links)
        if number % 2:
            self.ways["submitted"] += 1
            accepted = await Client(link).submit("shop", ARGS, target="dev", request_id=REQUEST_ID)
            self.answers.add(accepted.run_id)
            return
        request = encode(RunRequest(args=ARGS, request_id=REQUEST_ID))
        with_id = number % 4 == 0
        self.ways["published with Nats-Msg-Id" if with_id else "published"] += 1
        headers = {H_MSG_ID: REQUEST_ID} if with_id else {}
        await link.publish(runs_subject("shop", "dev"), request, headers)


async def all_events(link: NatsLink) -> list[AnyEvent]:
    return [event async for event in Client(link).events(since="all", follow=False)]


async def test_requests_with_one_request_id_are_one_run(
    tmp_path: Path, nats_server: NatsServer, figure: Figure
) -> None:
    """Half through the control service, half plainly published; two workers. What was stored
    more than once is rejected as `duplicate` and names the run, and none is missing."""
    children = Children(tmp_path / "dbt")
    projects = {"shop": children.table("shop", ["dev"])}
    configs = [
        write_config(tmp_path, nats_server, name, projects=projects, ack_wait_s=30.0)
        for name in ("w1", "w2")
    ]
    async with serving(*configs), AsyncExitStack() as stack:
        links = [await stack.enter_async_context(linked(nats_server)) for _ in range(CLIENTS)]
        asking = Asking(links)
        await asyncio.gather(*(asking.ask(number) for number in range(REQUESTS)))
        link = links[0]
        await queue_empty(link)
        events = await all_events(link)
        (finished,) = (event for event in events if isinstance(event, RunFinished))
        run = await ended(link, finished.run_id)
        stored = (await link.js.stream_info(RUNS_STREAM)).state.last_seq
        letters = (await link.js.stream_info(DEAD_STREAM)).state.messages

    judge(run, node_count=NODE_COUNT)
    assert asking.answers == {finished.run_id}
    assert [event.run_id for event in events if isinstance(event, RunStarted)] == [run.view.run_id]
    rejected = [event for event in events if isinstance(event, RunRejected)]
    assert {event.code for event in rejected} == {"duplicate"}
    assert all(event.message.endswith(f"is run {finished.run_id}") for event in rejected)
    assert len(rejected) == letters == stored - 1
    assert [line.edge for line in children.lines] == ["begin", "end"]
    figure(f"{REQUESTS} requests ({dict(asking.ways)}): {stored} stored, {len(rejected)} rejected")
