"""Lineage and assets of runs: a real daemon and nats-server, the SQL reader's own process, and
scripted children that tell a small manifest."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dbtstream.config import AssetsConfig, LineageConfig, NatsConfig
from dbtstream.events import AnyEvent, LogLine, RunFinished, event_type
from dbtstream.lineage_bucket import LineageBucket
from dbtstream.lineage_events import (
    AssetChecked,
    AssetMaterialized,
    LineageChanged,
    LineageDeclared,
    LineageObserved,
)
from dbtstream.lineage_store import LineageStore
from dbtstream.statuses import ColumnLineageStatus, RunStatus
from dbtstream.subjects import EVENTS_STREAM, H_MATCHES
from tests.daemons import daemon_config, serving
from tests.guarantees import check_run

SHOP = """
    start = start_line()
    with open(%(start)r, "w") as file:
        json.dump(start, file)
    names = json.load(open(%(names)r))
    seed = {"unique_id": "seed.shop.raw", "resource_type": "seed", "name": "raw",
        "header": ["id", "amount"], "relation": table("raw")}
    models = [model(n, relation=table(n), checksum=n, language="sql",
        matches=["critical"] if n == "orders" else []) for n in names]
    for m in models:
        m["upstream"] = ["seed.shop.raw"]
    test = {"unique_id": "test.shop.unique", "resource_type": "test", "name": "unique",
        "upstream": ["model.shop.orders"], "test": {"attached_node": "model.shop.orders"}}
    hello()
    plan(*models, test)
    graph(seed, manifest_hash=",".join(names),
        complete=start["known_manifest"] != ",".join(names),
        selector_problems=[{"name": "none", "problem": "selects nothing"}])
    sql = open(%(sql)r).read()
    for n in names:
        started(n)
        finished(n, compiled_code=sql, compiled_code_hash=sql)
    send("node_start", unique_id="test.shop.unique")
    send("node_work", unique_id="test.shop.unique", index=1, total=1)
    send("node_finish", unique_id="test.shop.unique", status="pass", failures=0)
    result(0, [(n, "success") for n in names])
"""


class Shop:
    """A project whose models and SQL the test writes before each run."""

    def __init__(self, folder: Path) -> None:
        self.start, self._names, self._sql = folder / "start", folder / "names", folder / "sql"
        self.body = SHOP % {
            "start": str(self.start),
            "names": str(self._names),
            "sql": str(self._sql),
        }
        self.has("orders")
        self.builds('select id, amount * 2 as twice from "shop"."main"."raw" where amount > 1')

    def has(self, *names: str) -> None:
        self._names.write_text(json.dumps(names), encoding="utf-8")

    def builds(self, sql: str) -> None:
        self._sql.write_text(sql, encoding="utf-8")

    def told(self) -> Any:
        """What the child was started with."""
        return json.loads(self.start.read_text(encoding="utf-8"))


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def of(events: Sequence[AnyEvent], *kinds: type) -> list[Any]:
    return [event for event in events if isinstance(event, kinds)]


def by_id(events: Sequence[Any]) -> dict[str, Any]:
    return {event.unique_id: event for event in events}


async def test_a_build_is_told_as_an_asset_and_as_lineage(
    shop: Shop, tmp_path: Path, nats_config: NatsConfig
) -> None:
    async with serving(daemon_config(tmp_path, nats_config, shop.body)) as served:
        events = await served.run()

    check_run(events)
    assert Counter(event_type(e) for e in events if e.family != "run") == {
        "log": 1,
        "lineage.changed": 1,
        "lineage.declared": 2,
        "node.started": 2,
        "node.finished": 2,
        "asset.materialized": 1,
        "lineage.observed": 1,
        "asset.checked": 1,
    }
    (asset,) = of(events, AssetMaterialized)
    assert asset.identity.namespace == "duckdb:///data/shop.duckdb"
    assert [c.name for c in asset.columns] == ["id", "twice"]
    assert asset.columns_source == "inferred"
    (observed,) = of(events, LineageObserved)
    assert observed.column_lineage_status is ColumnLineageStatus.COMPLETE
    assert observed.schema_source == "inferred"
    assert asset.lineage_hash == observed.lineage_hash
    (of_id,) = observed.fields["id"].inputs
    (of_twice,) = observed.fields["twice"].inputs
    assert (of_id.name, of_id.field, of_id.unique_id) == ("shop.main.raw", "id", "seed.shop.raw")
    assert of_id.transformations[0].subtype == "IDENTITY"
    assert (of_twice.field, of_twice.transformations[0].subtype) == ("amount", "TRANSFORMATION")
    assert [(i.field, i.transformations[0].subtype) for i in observed.dataset_inputs] == [
        ("amount", "FILTER")
    ]
    (check,) = of(events, AssetChecked)
    assert (check.unique_id, check.check.status) == ("model.shop.orders", "pass")
    assert check.dataset_version == asset.dataset_version
    (problem,) = of(events, LogLine)
    assert (problem.level, problem.message) == ("warn", "selector none: selects nothing")


async def test_what_has_not_changed_is_not_told_again(
    shop: Shop, tmp_path: Path, nats_config: NatsConfig
) -> None:
    """Also not by another daemon: what was told lies in the bucket."""
    config = daemon_config(tmp_path, nats_config, shop.body)
    async with serving(config) as served:
        first = await served.run()
        await served.queue_empty()
    assert shop.told()["known_manifest"] is None
    async with serving(config) as served:
        second = await served.run()
        await served.queue_empty()
        shop.builds('select id, amount from "shop"."main"."raw"')
        third = await served.run()

    assert shop.told()["known_manifest"] == "orders"
    assert len(of(first, LineageDeclared)) == 2
    assert not of(second, LineageChanged, LineageDeclared, LineageObserved)
    before, again, other = (of(e, AssetMaterialized)[0] for e in (first, second, third))
    assert again.lineage_hash == before.lineage_hash
    assert (before.previous_status, again.previous_status) == (None, "success")
    assert again.schema_change is None
    assert (other.schema_change.added, other.schema_change.removed) == (["amount"], ["twice"])
    (observed,) = of(third, LineageObserved)
    assert observed.lineage_hash == other.lineage_hash != before.lineage_hash


async def test_the_current_graph_is_in_the_bucket(
    shop: Shop, tmp_path: Path, nats_config: NatsConfig
) -> None:
    """Of nodes that have left the manifest nothing stays."""
    async with serving(daemon_config(tmp_path, nats_config, shop.body)) as served:
        bucket = LineageBucket(served.link, retry_for_s=5)
        shop.has("orders", "daily")
        events = await served.run()
        await served.queue_empty()  # the bucket is written after the last event
        stored = await bucket.read("shop")
        assert by_id(stored.declared) == by_id(of(events, LineageDeclared))
        assert by_id(stored.observed) == by_id(of(events, LineageObserved))
        assert set(by_id(stored.declared)) == {
            "seed.shop.raw",
            "model.shop.orders",
            "model.shop.daily",
        }

        shop.has("orders", "other")
        events = await served.run()
        await served.queue_empty()
        (changed,) = of(events, LineageChanged)
        assert (changed.nodes_added, changed.nodes_removed) == (
            ["model.shop.other"],
            ["model.shop.daily"],
        )
        stored = await bucket.read("shop")
        now = {"model.shop.orders", "model.shop.other"}
        assert set(by_id(stored.declared)) == now | {"seed.shop.raw"}
        assert set(by_id(stored.observed)) == now
        states = await LineageStore(served.link).assets("shop", "dev")
        assert "model.shop.daily" not in states
        assert states["test.shop.unique"].status == "pass"


async def test_selectors_are_in_a_header(
    shop: Shop, tmp_path: Path, nats_config: NatsConfig
) -> None:
    async with serving(daemon_config(tmp_path, nats_config, shop.body)) as served:
        shop.has("orders", "daily")
        await served.run()
        matched = set()
        info = await served.link.js.stream_info(EVENTS_STREAM)
        for seq in range(1, info.state.last_seq + 1):
            message = await served.link.js.get_msg(EVENTS_STREAM, seq)
            if (message.headers or {}).get(H_MATCHES) == "critical":
                matched.add((message.subject or "").removeprefix("dbt.events.shop.dev."))
    assert matched == {
        "node.model.orders.started",
        "node.model.orders.success",
        "asset.model.orders.materialized",
        "asset.model.orders.checked",
    }


@pytest.mark.parametrize("sql", ["select from where (", "", "select * from nowhere.at.all"])
async def test_sql_that_cannot_be_read_costs_its_columns_only(
    shop: Shop, tmp_path: Path, nats_config: NatsConfig, sql: str
) -> None:
    shop.builds(sql)
    async with serving(daemon_config(tmp_path, nats_config, shop.body)) as served:
        events = await served.run()
    check_run(events)
    (observed,) = of(events, LineageObserved)
    assert observed.column_lineage_status in (
        ColumnLineageStatus.ERROR,
        ColumnLineageStatus.PARTIAL,
    )
    assert observed.column_lineage_message
    assert [i.unique_id for i in observed.inputs] == ["seed.shop.raw"], "the manifest's edges stay"
    assert len(of(events, AssetMaterialized)) == 1


@pytest.mark.parametrize(
    ("sql", "status"),
    [
        ('select * from "shop"."main"."raw"', ColumnLineageStatus.PARTIAL),
        ('select id, amount * 2 as twice from "shop"."main"."raw"', ColumnLineageStatus.COMPLETE),
    ],
)
async def test_a_star_over_documented_columns_is_not_called_complete(
    shop: Shop, tmp_path: Path, nats_config: NatsConfig, sql: str, status: ColumnLineageStatus
) -> None:
    """The YAML need not name all columns."""
    shop.builds(sql)
    documented = '"columns": [{"name": "id"}, {"name": "amount"}]'
    body = shop.body.replace('"header": ["id", "amount"]', documented)
    async with serving(daemon_config(tmp_path, nats_config, body)) as served:
        events = await served.run()
    (observed,) = of(events, LineageObserved)
    assert (observed.column_lineage_status, observed.schema_source) == (status, "documented")
    assert len(observed.fields) == 2


async def test_each_part_can_be_turned_off(
    shop: Shop, tmp_path: Path, nats_config: NatsConfig
) -> None:
    async def families(**project: Any) -> set[str]:
        config = daemon_config(tmp_path, nats_config, shop.body, project=project)
        async with serving(config) as served:
            events = await served.run()
        return {event_type(event) for event in events if event.family in ("lineage", "asset")}

    no_assets = {"assets": AssetsConfig(emit=False)}
    no_lineage = {"lineage": LineageConfig(emit=False)}
    assert await families(**no_assets) == {
        "lineage.changed",
        "lineage.declared",
        "lineage.observed",
    }
    assert await families(**no_lineage) == {"asset.materialized", "asset.checked"}
    assert await families(**no_assets, **no_lineage) == set()


async def test_selectors_are_checked_without_assets_and_lineage(
    shop: Shop, tmp_path: Path, nats_config: NatsConfig
) -> None:
    off = {"assets": AssetsConfig(emit=False), "lineage": LineageConfig(emit=False)}
    project = {**off, "selectors": {"none": "tag:none"}}
    config = daemon_config(tmp_path, nats_config, shop.body, project=project)
    async with serving(config) as served:
        events = await served.run()
    assert shop.told()["selectors"] == {"none": "tag:none"}
    assert [e.message for e in of(events, LogLine)] == ["selector none: selects nothing"]
    assert not [event for event in events if event.family in ("lineage", "asset")]


async def test_a_child_that_tells_no_manifest_costs_no_run(
    tmp_path: Path, nats_config: NatsConfig, caplog: pytest.LogCaptureFixture
) -> None:
    body = """
        start_line()
        hello()
        plan(model("orders"))
        started("orders")
        finished("orders")
        result(0, [("orders", "success")])
    """
    async with serving(daemon_config(tmp_path, nats_config, body)) as served:
        events = await served.run()
    check_run(events)
    assert not [event for event in events if event.family in ("lineage", "asset")]
    assert "dbt's process did not tell its manifest" in caplog.text


async def test_a_bucket_that_cannot_be_read_leaves_the_telling_to_the_next_run(
    shop: Shop, tmp_path: Path, nats_config: NatsConfig
) -> None:
    """The run goes on, and what is not known is not made up."""
    body = shop.body.replace("hello()", f"wait_for({str(tmp_path / 'go')!r}); hello()")
    async with serving(daemon_config(tmp_path, nats_config, body)) as served:
        await served.link.js.delete_stream("KV_dbt_lineage")
        accepted = await served.client.submit("shop", ["build"], target="dev")
        (tmp_path / "go").touch()
        events = await served.events(accepted.run_id)
    check_run(events)
    assert not of(events, LineageChanged, LineageDeclared)
    assert len(of(events, AssetMaterialized)) == 1
    assert isinstance(events[-1], RunFinished)
    assert events[-1].status is RunStatus.SUCCESS
