"""deploy/examples as a user runs them: on a real nats-server, with the events of real dbt."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dbtstream.client import Client
from dbtstream.config import StreamsConfig
from dbtstream.embedded import NatsServer
from dbtstream.events import AnyEvent, NodeFinished, encode_event
from dbtstream.nats_link import NatsLink
from dbtstream.schema_examples import EXAMPLES
from dbtstream.streams import ensure_streams
from dbtstream.subjects import event_headers, event_subject
from tests import dbt_projects
from tests.acceptance.conftest import serve, whole_run, write_config
from tests.dbt_projects import write_project
from tests.node import script

FOLDER = Path(__file__).parents[2] / "deploy" / "examples"
BASH = shutil.which("bash") or "bash"


class Subscriber:
    """One example, running."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(60):
            return (await self.process.stdout.readline()).decode().rstrip("\n")

    async def until_error(self, text: str) -> None:
        assert self.process.stderr is not None
        async with asyncio.timeout(60):
            while text not in (line := (await self.process.stderr.readline()).decode()):
                assert line, f"it ended without saying {text}"


@asynccontextmanager
async def subscriber(
    command: list[str], ready: str, url: str, path: str = "/nowhere"
) -> AsyncIterator[Subscriber]:
    """Started and subscribed; killed at the end."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=2**22,
        env={"NATS_URL": url, "PATH": path},
    )
    try:
        started = Subscriber(process)
        await started.until_error(ready)
        yield started
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def shell(subject: str) -> list[str]:
    """Without a PATH there is no `nats` command, on no machine."""
    return [BASH, str(FOLDER / "subscribe.sh"), subject]


def node(*words: str) -> list[str]:
    return [*script(FOLDER / "subscribe.mjs"), *words]


def example(name: str, **changes: Any) -> Any:
    return msgspec.structs.replace(EXAMPLES[name], **changes)


async def publish(link: NatsLink, event: AnyEvent) -> None:
    """As the daemon does."""
    await link.publish(event_subject(event), encode_event(event), event_headers(event))


# -- subscribe.sh ------------------------------------------------------------------------------


async def test_the_shell_one_prints_what_a_run_does(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    project = write_project(tmp_path / "shop", dbt_projects.node_failure())
    async with (
        serve(write_config(tmp_path, nats_server.url, project)),
        Client.connect(nats_server.url) as client,
        subscriber(shell("dbt.live.shop.dev.node.>"), "listening", nats_server.url) as printing,
    ):
        accepted = await client.submit("shop", ["build"], target="dev")
        events = await whole_run(client, accepted.run_id)
        told = [event for event in events if event.family == "node"]
        printed = [json.loads(await printing.line()) for _ in told]

    assert printed == [json.loads(encode_event(event)) for event in told]
    (failed,) = (each for each in printed if each.get("status") == "error")
    assert failed["node"]["unique_id"] == "model.shop.broken"


async def test_the_shell_one_counts_bytes_with_and_without_headers(
    nats_server: NatsServer, link: NatsLink
) -> None:
    texts = ["", "grüße 😀 \\ %s", "x" * 300_000]
    async with subscriber(shell("dbt.live.a.>"), "listening", nats_server.url) as printing:
        for text in texts:
            payload = json.dumps({"message": text}, ensure_ascii=False).encode()
            await link.client.publish("dbt.live.a.b", payload)
            await link.client.publish("dbt.live.a.b", payload, headers={"ce-id": "1", "x": "y"})
        await link.client.publish("dbt.live.a.b", b"{}", reply="somewhere")
        printed = [json.loads(await printing.line()) for _ in range(7)]
    assert printed == [{"message": text} for text in texts for _ in range(2)] + [{}]


async def test_the_shell_one_answers_pings_and_ends_with_the_server() -> None:
    """A server of this test: real ones ask after minutes."""
    heard = asyncio.Queue[bytes]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"X"}\r\n')
        for _ in range(3):
            heard.put_nowait(await reader.readline())
        writer.write(b"PONG\r\nPING\r\n")
        heard.put_nowait(await reader.readline())
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        url = f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with subscriber(shell("dbt.live.>"), "listening", url) as printing:
            await printing.until_error(f"{url} is gone")
            assert await printing.process.wait() == 1
    said = [heard.get_nowait() for _ in range(4)]
    assert said[0].startswith(b"CONNECT {")
    assert said[1:] == [b"SUB dbt.live.> 1\r\n", b"PING\r\n", b"PONG\r\n"]


async def test_the_shell_one_leaves_it_to_the_nats_command_where_there_is_one(
    tmp_path: Path,
) -> None:
    command = tmp_path / "nats"
    command.write_text(f'#!{BASH}\necho "$@"\necho called >&2\n')
    command.chmod(0o755)
    subject = "dbt.live.*.*.run.>"
    async with subscriber(shell(subject), "called", "nats://a:1", str(tmp_path)) as printing:
        assert await printing.line() == f"--server nats://a:1 sub --raw {subject}"


# -- subscribe.mjs -----------------------------------------------------------------------------

FAILED = (
    'failed shop.prod shop.main.orders: Catalog Error: Table with name "stg_payments" does not '
    "exist! [ada@example.com, Finance]"
)
CHECKED = (
    "failed shop.prod shop.main.orders, not_null_orders_customer_id: Got 2 results, configured "
    "to fail if != 0 [ada@example.com, Finance]"
)
RECOVERED = (
    "recovered shop.prod shop.main.orders, relationships_orders_customer_id: pass "
    "[ada@example.com, Finance]"
)
STALE = "failed shop.prod shop.raw.payments_v2: error [loaders@example.com]"


@pytest.fixture
async def streams(link: NatsLink) -> None:
    await ensure_streams(link, StreamsConfig())


@pytest.mark.usefixtures("streams")
async def test_the_node_one_tells_what_failed_and_what_recovered(
    nats_server: NatsServer, link: NatsLink
) -> None:
    """What is not news (built again, checked as before, skipped) is not told."""
    async with subscriber(node(), "watching", nats_server.url) as watching:
        for name in ("failed", "materialized", "checked", "skipped", "checked.recovered"):
            await publish(link, example(f"event.asset.{name}", event_id=name))
        await publish(link, example("event.asset.observed"))
        assert [await watching.line() for _ in range(4)] == [FAILED, CHECKED, RECOVERED, STALE]


@pytest.mark.usefixtures("streams")
async def test_the_node_one_filters_on_the_header_of_selectors(
    nats_server: NatsServer, link: NatsLink
) -> None:
    async with subscriber(node("marts"), "watching", nats_server.url) as watching:
        for number, matches in enumerate(([], ["critical"], ["critical", "marts"])):
            failed = example("event.asset.failed", matches=matches, event_id=f"x.{number}")
            failed = msgspec.structs.replace(failed, key=",".join(matches))
            await publish(link, failed)
        assert (await watching.line()).startswith("failed shop.prod critical,marts: ")


@pytest.mark.usefixtures("streams")
async def test_the_node_one_misses_nothing_while_it_or_the_server_is_away(
    nats_server: NatsServer, link: NatsLink
) -> None:
    async with subscriber(node(), "watching", nats_server.url) as watching:
        await publish(link, example("event.asset.failed", key="first", event_id="1"))
        assert (await watching.line()).startswith("failed shop.prod first: ")
        await acknowledged(link)
    await publish(link, example("event.asset.failed", key="second", event_id="2"))

    async with subscriber(node(), "watching", nats_server.url) as watching:
        assert (await watching.line()).startswith("failed shop.prod second: ")
        await nats_server.restart()
        await link.wait_connected(30)
        await publish(link, example("event.asset.failed", key="third", event_id="3"))
        assert (await watching.line()).startswith("failed shop.prod third: ")


async def acknowledged(link: NatsLink) -> None:
    async with asyncio.timeout(30):
        while (await link.js.consumer_info("DBT_EVENTS", "asset-watch-all")).num_ack_pending:
            pass


async def test_the_node_one_tells_of_a_real_run(tmp_path: Path, nats_server: NatsServer) -> None:
    """First a model and a test fail, then what was wrong is mended."""
    broken = {**dbt_projects.test_failure(), "models/broken.sql": dbt_projects.BROKEN}
    project = write_project(tmp_path / "shop", broken)
    mended = {"models/orders.sql": dbt_projects.ORDERS, "models/broken.sql": "select 1 as id"}
    async with (
        serve(write_config(tmp_path, nats_server.url, project)),
        Client.connect(nats_server.url) as client,
        subscriber(node(), "watching", nats_server.url) as watching,
    ):
        told = []
        for files in ({}, mended):
            for name, text in files.items():
                (project / name).write_text(text)
            accepted = await client.submit("shop", ["build"], target="dev")
            events = await whole_run(client, accepted.run_id)
            bad = [e for e in events if isinstance(e, NodeFinished) and e.status in BAD]
            assert {e.node.name.partition(".")[0] for e in bad} == (
                set() if files else {"broken", "unique_orders_id"}
            )
            assert any(event.family == "asset" for event in events)
            told.append({await watching.line(), await watching.line()})
    assert [{line.partition(":")[0] for line in each} for each in told] == [
        {
            f"{word} shop.dev shop.main.broken",
            f"{word} shop.dev shop.main.orders, unique_orders_id",
        }
        for word in ("failed", "recovered")
    ]


BAD = ("error", "fail")
