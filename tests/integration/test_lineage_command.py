"""`dbtstream lineage` on a real nats-server whose bucket holds an invented project's events."""

import asyncio
import json
import subprocess
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import pytest

from dbtstream.cli import _main
from dbtstream.client import Client
from dbtstream.config import NatsConfig
from dbtstream.embedded import NatsServer
from dbtstream.errors import NatsRefused
from dbtstream.kv_bucket import Bucket
from dbtstream.lineage_bucket import PAGE, NoLineage, WhichTarget
from dbtstream.lineage_commands import Wanted, lineage
from dbtstream.lineage_events import Lineage, LineageDeclared
from dbtstream.lineage_find import NodeNotFound
from dbtstream.lineage_graph import Graph
from dbtstream.nats_link import NatsLink
from dbtstream.subjects import LINEAGE_BUCKET, asset_key, declared_key, observed_key
from tests.acceptance.conftest import COMMAND, ENVIRONMENT
from tests.lineage_graphs import (
    ORDERS,
    PAYMENTS,
    SHOP_DECLARED,
    SHOP_OBSERVED,
    STG,
    declared,
    edges_of,
    shop,
)

Fill = Callable[..., Awaitable[Bucket]]


def key_of(event: Lineage) -> str:
    make = declared_key if isinstance(event, LineageDeclared) else observed_key
    return make(event.project, event.target, event.unique_id)


async def make_bucket(link: NatsLink) -> Bucket:
    await link.ask_jetstream(
        f"STREAM.CREATE.KV_{LINEAGE_BUCKET}",
        {
            "name": f"KV_{LINEAGE_BUCKET}",
            "subjects": [f"$KV.{LINEAGE_BUCKET}.>"],
            "storage": "file",
            "discard": "new",
            "max_msgs_per_subject": 1,
            "allow_rollup_hdrs": True,
            "deny_delete": True,
            "allow_msg_ttl": True,
            "allow_direct": True,
            "allow_atomic": True,
        },
    )
    return Bucket(link, LINEAGE_BUCKET, retry_for_s=10)


@pytest.fixture
def fill(link: NatsLink) -> Fill:
    """`await fill(*events)`: the bucket, with these in it; with the shop's if none are given."""

    async def write(*events: Lineage) -> Bucket:
        bucket = await make_bucket(link)
        stored = events or (*SHOP_DECLARED, *SHOP_OBSERVED)
        values = {key_of(event): msgspec.json.encode(event) for event in stored}
        for start in range(0, len(values), 500):
            await bucket.write_many(dict(list(values.items())[start : start + 500]))
        return bucket

    return write


async def graph_of(nats_config: NatsConfig, project: str, target: str | None = None) -> Graph:
    async with Client.connect(config=nats_config) as client:
        return await client.lineage(project, target)


async def run_cli(server: NatsServer, *words: str) -> tuple[int | None, str, str]:
    """(exit code, stdout, stderr) of the command as a process."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *("--nats", server.url, "lineage", *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def shown(
    nats_config: NatsConfig,
    capsys: pytest.CaptureFixture[str],
    *,
    as_format: str = "json",
    **wanted: object,
) -> str:
    values = {"project": "shop", **wanted}
    assert await lineage(nats_config, Wanted(**values), as_format=as_format) == 0  # type: ignore[arg-type]
    return capsys.readouterr().out


# -- reading -----------------------------------------------------------------------------------


async def test_the_graph_of_the_bucket_is_that_of_its_events(
    nats_config: NatsConfig, fill: Fill
) -> None:
    bucket = await fill()
    await bucket.write(asset_key("shop", "prod", ORDERS), b"of another kind", None)
    graph = await graph_of(nats_config, "shop")
    assert (graph.project, graph.target) == ("shop", "prod")
    assert graph.nodes == shop().nodes
    assert graph.edges == shop().edges
    assert graph.columns == shop().columns


async def test_more_events_than_a_page_are_all_read(nats_config: NatsConfig, fill: Fill) -> None:
    ids = [f"model.shop.m{n}" for n in range(PAGE * 3 + 7)]
    await fill(*(declared(id_, ids[0]) for id_ in ids))
    graph = await graph_of(nats_config, "shop", "prod")
    assert set(graph.nodes) == set(ids)


async def test_a_node_that_is_gone_from_the_bucket_is_gone_from_the_graph(
    nats_config: NatsConfig, fill: Fill
) -> None:
    bucket = await fill()
    key = declared_key("shop", "prod", "exposure.shop.weekly")
    value = await bucket.read(key)
    assert value is not None
    await bucket.delete(key, value.revision)
    assert "exposure.shop.weekly" not in (await graph_of(nats_config, "shop")).nodes


async def test_names_that_no_subject_may_have_are_read_as_they_are(
    nats_config: NatsConfig, fill: Fill
) -> None:
    odd = 'model.shop.é "x".*.>. \n'
    await fill(declared(odd, PAYMENTS))
    assert edges_of(await graph_of(nats_config, "shop")) == {(PAYMENTS, odd)}


async def test_of_several_targets_one_must_be_named(nats_config: NatsConfig, fill: Fill) -> None:
    await fill(declared(STG, PAYMENTS), declared(STG, ORDERS, target="dev"))
    with pytest.raises(WhichTarget, match="2 targets: say --target dev or prod"):
        await graph_of(nats_config, "shop")
    assert edges_of(await graph_of(nats_config, "shop", "dev")) == {(ORDERS, STG)}
    assert edges_of(await graph_of(nats_config, "shop", "prod")) == {(PAYMENTS, STG)}


@pytest.mark.parametrize(
    ("project", "target"),
    [("other", None), ("shop", "dev"), ("*", None), ("shop", "*"), ("a.b", None), ("", None)],
)
async def test_an_unknown_project_is_an_error_that_says_what_is_known(
    nats_config: NatsConfig, fill: Fill, project: str, target: str | None
) -> None:
    await fill()
    with pytest.raises(NoLineage, match=r"is known; a run of it brings it \(known: shop/prod\)"):
        await graph_of(nats_config, project, target)


async def test_an_empty_bucket_and_a_missing_one_say_what_to_do(
    nats_config: NatsConfig, link: NatsLink
) -> None:
    with pytest.raises(
        NatsRefused, match=r"no KV bucket dbt_lineage \(`dbtstream setup` creates it\)"
    ):
        await graph_of(nats_config, "shop")
    await make_bucket(link)
    with pytest.raises(NoLineage, match=r"\(known: nothing yet\)"):
        await graph_of(nats_config, "shop")


async def test_what_cannot_be_read_is_counted_and_costs_only_itself(
    nats_config: NatsConfig, fill: Fill, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = await fill()
    newer = msgspec.json.decode(msgspec.json.encode(SHOP_DECLARED[0]))
    await bucket.write_many(
        {
            declared_key("shop", "prod", "model.shop.a"): b"\xff\x00",
            declared_key("shop", "prod", "model.shop.b"): b'{"type":"lineage.declared"}',
            declared_key("shop", "prod", "model.shop.c"): b"{",
            # Of a later version, and of a project that writes MessagePack.
            declared_key("shop", "prod", PAYMENTS): msgspec.json.encode({**newer, "new": 1}),
            declared_key("shop", "prod", STG): msgspec.msgpack.encode(SHOP_DECLARED[3]),
        }
    )
    assert await lineage(nats_config, Wanted(project="shop"), as_format="json") == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["nodes"]) == len(shop().nodes)
    assert err.startswith("dbtstream: 3 of the stored events cannot be read: ")
    assert err.count("\n") == 1


# -- the command -------------------------------------------------------------------------------


def node_ids(document: str) -> Sequence[str]:
    return [node["id"] for node in json.loads(document)["nodes"]]


async def test_up_and_down_choose_the_sides_of_a_node(
    nats_config: NatsConfig, fill: Fill, capsys: pytest.CaptureFixture[str]
) -> None:
    await fill()
    assert len(node_ids(await shown(nats_config, capsys))) == 7
    node = "main.orders"
    assert len(node_ids(await shown(nats_config, capsys, node=node))) == 7
    assert node_ids(await shown(nats_config, capsys, node=node, down=1)) == [
        "model.shop.customers",
        ORDERS,
    ]
    assert len(node_ids(await shown(nats_config, capsys, node=node, up=1, down=1))) == 5


async def test_every_format_is_printed(nats_server: NatsServer, fill: Fill) -> None:
    await fill()
    for as_format, begins in (
        ("tree", "seed raw_customers  shop.main.raw_customers\n└─ model orders"),
        ("json", '{"project":"shop","target":"prod"'),
        ("mermaid", "flowchart LR\n  n0"),
        ("dot", "digraph lineage {\n"),
    ):
        code, out, err = await run_cli(nats_server, "shop", "--format", as_format)
        assert (code, err) == (0, "")
        assert out.startswith(begins)


async def test_the_command_line_takes_up_and_down_with_and_without_steps(
    nats_server: NatsServer, fill: Fill
) -> None:
    await fill()
    words = ("shop", "--target", "prod", "--node", ORDERS, "--up", "--down", "1", "--columns")
    code, out, _ = await run_cli(nats_server, *words)
    assert code == 0
    assert out.splitlines()[-3:] == [
        "downstream",
        "└─ model customers (incremental)  shop.main.customers  columns complete",
        "      · Lifetime ← orders.AMOUNT (aggregation)",
    ]
    assert "source raw.payments" in out
    code, out, _ = await run_cli(nats_server, "shop", "--node", "main.orders.amount", "--columns")
    assert (code, out.splitlines()[0]) == (0, "orders.amount")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["other"], "dbtstream: no lineage of other is known; a run of it brings it"),
        (["shop", "--node", "custmers"], "no node, dataset or exposure 'custmers' in the lineage"),
        (["shop", "--node", "orders"], "'orders' may be any of 2: model.shop.orders, source."),
        (["shop", "--node", "main.orders.x", "--columns"], "has no column 'x'"),
    ],
)
async def test_a_mistake_is_one_line_on_stderr_and_exit_1(
    nats_server: NatsServer, fill: Fill, words: list[str], says: str
) -> None:
    await fill()
    code, out, err = await run_cli(nats_server, *words)
    assert (code, out) == (1, "")
    assert says in err
    assert err.count("\n") == 1


def test_no_nats_server_is_one_line_that_says_where_it_was_looked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dbtstream.commands.CONNECT_S", 0.3)
    assert _main(["--nats", "nats://127.0.0.1:1", "lineage", "shop"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dbtstream: no answer from NATS at nats://127.0.0.1:1: ")
    assert err.count("\n") == 1


async def test_nothing_is_printed_of_a_node_that_is_not_there(
    nats_config: NatsConfig, fill: Fill
) -> None:
    await fill()
    with pytest.raises(NodeNotFound, match=r"did you mean model\.shop\.customers"):
        await lineage(nats_config, Wanted(project="shop", node="custmers"), as_format="dot")
