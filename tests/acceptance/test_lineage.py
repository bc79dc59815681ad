"""Lineage and assets on real dbt and DuckDB: edges against the manifest, columns, bad input."""

import json
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from dbtstream.client import Client
from dbtstream.config import NatsConfig
from dbtstream.embedded import NatsServer
from dbtstream.events import AnyEvent, LogLine, NodeFinished
from dbtstream.lineage_events import (
    AssetChecked,
    AssetFailed,
    AssetMaterialized,
    AssetObserved,
    AssetSkipped,
    LineageChanged,
    LineageDeclared,
    LineageObserved,
)
from dbtstream.lineage_store import LineageStore
from dbtstream.nats_link import NatsLink
from dbtstream.statuses import ColumnLineageStatus, NodeStatus
from tests.acceptance.conftest import serve, whole_run, write_config
from tests.bench.projects import write_layered_project
from tests.dbt_projects import Files, properties, write_project
from tests.guarantees import check_run
from tests.manifests import edges_of

SAMPLE = Path(__file__).parents[2] / "dbtstream" / "demo" / "project"


class Served:
    """A daemon with one project; `run` from submit to verdict, its bucket written."""

    def __init__(self, client: Client, store: LineageStore, state: Path) -> None:
        self.client, self.store, self.state = client, store, state

    async def run(self, *args: str) -> list[AnyEvent]:
        accepted = await self.client.submit("shop", list(args), target="dev")
        events = await whole_run(self.client, accepted.run_id)
        await self.client.wait(accepted.run_id)
        check_run(events)
        return events

    def manifest(self, events: Sequence[AnyEvent]) -> Path:
        (found,) = self.state.glob(f"**/{events[0].run_id}/**/manifest.json")
        return found


@asynccontextmanager
async def shop(
    tmp_path: Path, server: NatsServer, project: Path, **settings: str
) -> AsyncIterator[Served]:
    config = write_config(tmp_path, server.url, project, **settings)
    nats = NatsConfig(servers=(server.url,))
    async with (
        serve(config),
        Client.connect(server.url) as client,
        NatsLink(nats, name="test") as link,
    ):
        await link.wait_connected(10)
        yield Served(client, LineageStore(link), tmp_path / "state")


def of(events: Sequence[AnyEvent], *kinds: type) -> list[Any]:
    return [event for event in events if isinstance(event, kinds)]


def edges(events: Sequence[LineageDeclared] | Sequence[LineageObserved]) -> set[tuple[str, str]]:
    return {(i.unique_id or i.name, e.unique_id) for e in events for i in e.inputs}


def by_name(events: Sequence[AnyEvent], kind: type) -> dict[str, Any]:
    return {event.name: event for event in of(events, kind)}


async def test_the_sample_project_has_the_manifests_edges_exactly(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    project = shutil.copytree(SAMPLE, tmp_path / "shop")
    async with shop(tmp_path, nats_server, project) as served:
        events = await served.run("build")
        expected = edges_of(served.manifest(events))
        stored = await served.store.declared("shop", "dev")

    assert len(expected) > 20
    assert edges(of(events, LineageDeclared)) == expected
    assert edges(list(stored.values())) == expected
    built = {e.unique_id for e in of(events, LineageObserved)}
    assert edges(of(events, LineageObserved)) == {e for e in expected if e[1] in built}
    assert built == {e.unique_id for e in of(events, AssetMaterialized)}
    assert {e.column_lineage_status for e in of(events, LineageObserved)} == {
        ColumnLineageStatus.COMPLETE
    }


async def test_three_hundred_models_have_the_manifests_edges_exactly(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """One model is built; the manifest is told whole, once."""
    project = write_layered_project(tmp_path / "shop", models=300, tests=300)
    async with shop(tmp_path, nats_server, project) as served:
        events = await served.run("run", "-s", "staging_0000")
        again = await served.run("run", "-s", "staging_0001")
        expected = edges_of(served.manifest(events))
        stored = await served.store.declared("shop", "dev")

    assert len(expected) > 300
    assert edges(of(events, LineageDeclared)) == expected
    assert len(of(events, LineageDeclared)) == 300
    assert edges(list(stored.values())) == expected
    assert not of(again, LineageDeclared, LineageChanged)


def small(**files: str) -> Files:
    return {
        "seeds/raw_orders.csv": "id,customer,amount\n1,ann,10\n2,bob,20\n",
        "models/orders.sql": (
            "{{ config(materialized='table') }} "
            "select id, upper(customer) as customer, amount from {{ ref('raw_orders') }}"
        ),
        "models/totals.sql": (
            "select customer, sum(amount) as total from {{ ref('orders') }} group by customer"
        ),
        **files,
    }


async def test_a_change_of_the_project_is_told_as_what_has_changed(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    project = write_project(tmp_path / "shop", small())
    async with shop(tmp_path, nats_server, project) as served:
        await served.run("build")
        (project / "models/totals.sql").write_text(
            "select upper(customer) as who, sum(amount) as total, count(*) as orders "
            "from {{ ref('raw_orders') }} group by 1"
        )
        (project / "models/models.yml").write_text(
            properties(
                models=[
                    {
                        "name": "orders",
                        "config": {"meta": {"owner": "ada@example.com"}},
                        "columns": [{"name": "id", "data_type": "integer"}],
                    }
                ]
            )
        )
        events = await served.run("build")
        expected = edges_of(served.manifest(events))
        stored = await served.store.declared("shop", "dev")

    (changed,) = of(events, LineageChanged)
    assert [(e.upstream, e.downstream) for e in changed.edges_added] == [
        ("seed.shop.raw_orders", "model.shop.totals")
    ]
    assert [(e.upstream, e.downstream) for e in changed.edges_removed] == [
        ("model.shop.orders", "model.shop.totals")
    ]
    assert [(c.unique_id, c.after) for c in changed.owners_changed] == [
        ("model.shop.orders", ["ada@example.com"])
    ]
    assert [(c.column, c.change, c.after) for c in changed.columns_changed] == [
        ("id", "added", "integer")
    ]
    assert {e.name for e in of(events, LineageDeclared)} == {"orders", "totals"}
    assert edges(list(stored.values())) == expected
    totals = by_name(events, AssetMaterialized)["totals"]
    assert (totals.schema_change.added, totals.schema_change.removed) == (
        ["who", "orders"],
        ["customer"],
    )
    observed = by_name(events, LineageObserved)
    assert set(observed) == {"totals"}, "of the others nothing has changed"


async def test_recovered_versions_and_skips_over_four_runs(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    files = small(
        **{
            "models/models.yml": properties(
                models=[{"name": "orders", "columns": [{"name": "id", "data_tests": ["unique"]}]}]
            )
        }
    )
    project = write_project(tmp_path / "shop", files)
    orders = project / "models/orders.sql"
    good = orders.read_text()
    async with shop(tmp_path, nats_server, project) as served:
        first = await served.run("build")
        orders.write_text(good.replace("upper(customer)", "no_such_function(customer)"))
        broken = await served.run("build")
        orders.write_text(good + " union all select 1, 'X', 1")
        doubled = await served.run("build")
        orders.write_text(good)
        mended = await served.run("build")

    one = by_name(first, AssetMaterialized)
    assert one["orders"].previous_status is None
    (given,) = one["totals"].input_versions
    assert (given.unique_id, given.dataset_version) == (
        "model.shop.orders",
        one["orders"].dataset_version,
    )
    failed = by_name(broken, AssetFailed)["orders"]
    assert (failed.status, failed.previous_status) == (NodeStatus.ERROR, "success")
    assert failed.error is not None
    assert failed.dataset_version == one["orders"].dataset_version
    skipped = by_name(broken, AssetSkipped)["totals"]
    assert [(c.unique_id, c.status) for c in skipped.causes] == [
        ("model.shop.orders", NodeStatus.ERROR)
    ]
    (check,) = of(broken, AssetChecked)
    assert (check.check.status, check.previous_status) == ("skipped", "pass")
    (check,) = of(doubled, AssetChecked)
    assert (check.check.status, check.check.failures) == ("fail", 1)
    assert check.dataset_version == by_name(doubled, AssetMaterialized)["orders"].dataset_version
    last = by_name(mended, AssetMaterialized)
    assert (last["orders"].previous_status, last["totals"].previous_status) == (
        "success",
        "skipped",
    )
    (check,) = of(mended, AssetChecked)
    assert (check.check.status, check.previous_status) == ("pass", "fail")


async def test_real_types_where_the_adapter_is_asked(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    project = write_project(tmp_path / "shop", small())
    async with shop(tmp_path, nats_server, project, lineage="{ adapter_columns = true }") as served:
        events = await served.run("build")
    assets = by_name(events, AssetMaterialized)
    assert {name: asset.columns_source for name, asset in assets.items()} == dict.fromkeys(
        ("raw_orders", "orders", "totals"), "adapter"
    )
    assert [(c.name, c.type) for c in assets["totals"].columns] == [
        ("customer", "VARCHAR"),
        ("total", "HUGEINT"),
    ]
    assert {e.schema_source for e in of(events, LineageObserved) if e.inputs} == {"adapter"}


async def test_the_catalog_gives_types_until_the_sql_changes(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    project = write_project(tmp_path / "shop", small())
    async with shop(tmp_path, nats_server, project) as served:
        await served.run("build")
        await served.run("docs", "generate")
        known = by_name(await served.run("build"), AssetMaterialized)["orders"]
        (project / "models/orders.sql").write_text("select id from {{ ref('raw_orders') }}")
        other = by_name(await served.run("run"), AssetMaterialized)["orders"]
    assert (known.columns_source, known.columns[0].type) == ("catalog", "INTEGER")
    assert known.schema_change is None
    assert other.columns_source == "inferred"
    assert other.schema_change.removed == ["customer", "amount"]


LONG = "l" * 200


async def test_odd_names_and_odd_metadata_cost_nothing(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """Dots, quotes, unicode and 200 characters in a relation, meta of wrong types, and five
    megabytes of description: each has its node event, its asset and its lineage."""
    # Without double quotes: dbt-duckdb does not escape them, so that dbt itself cannot build it.
    aliases = {"dotted": "x.y.z", "unicode": "Größe – 表", "spaced": "a b 'c'", "long": LONG}
    files: Files = {
        f"models/{name}.sql": (
            "{{ config(materialized='table', alias=\"" + alias + '") }} select 1 as id'
        )
        for name, alias in aliases.items()
    }
    references = ["{{ ref('" + name + "') }}" for name in aliases]
    files["models/all_of_them.sql"] = " union all ".join(f"from {name}" for name in references)
    files["models/models.yml"] = properties(
        models=[
            {"name": "dotted", "config": {"meta": {"dbtstream": ["emit"]}}},
            {"name": "unicode", "config": {"meta": {"dbtstream": {"labels": 1, "emit": "x"}}}},
            {"name": "long", "description": "d" * 5_000_000},
        ]
    )
    project = write_project(tmp_path / "shop", files)
    async with shop(tmp_path, nats_server, project) as served:
        events = await served.run("build")

    assert {e.node.name: e.status for e in of(events, NodeFinished)} == dict.fromkeys(
        (*aliases, "all_of_them"), NodeStatus.SUCCESS
    )
    assets = by_name(events, AssetMaterialized)
    assert {name: assets[name].identity.identifier for name in aliases} == aliases
    assert assets["long"].description_truncated
    assert len(assets["long"].description) <= 8192
    (observed,) = [e for e in of(events, LineageObserved) if e.name == "all_of_them"]
    assert observed.column_lineage_status is ColumnLineageStatus.COMPLETE
    assert {i.unique_id for i in observed.fields["id"].inputs} <= {
        f"model.shop.{name}" for name in aliases
    }
    said = "\n".join(e.message for e in of(events, LogLine))
    assert "meta.dbtstream of model.shop.dotted is" in said
    assert "meta.dbtstream.labels of model.shop.unicode is 1" in said
    assert "meta.dbtstream.emit of model.shop.unicode is" in said


async def test_sql_that_the_parser_cannot_read_and_python_models(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """dbt and DuckDB can, so the build is told, and why its columns are not."""
    files = small(
        **{
            "models/odd.sql": "select (from {{ ref('raw_orders') }} select max(amount)) as top",
            "models/py.py": (
                "def model(dbt, session):\n"
                "    dbt.config(materialized='table')\n"
                "    return dbt.ref('raw_orders')\n"
            ),
        }
    )
    project = write_project(tmp_path / "shop", files)
    async with shop(tmp_path, nats_server, project) as served:
        events = await served.run("build", "-s", "+py", "+orders")
        odd = await served.run("build", "-s", "+odd")
    observed = by_name(events, LineageObserved)
    assert observed["orders"].column_lineage_status is ColumnLineageStatus.COMPLETE
    assert observed["py"].column_lineage_status is ColumnLineageStatus.UNSUPPORTED
    assert observed["py"].column_lineage_message
    assert [i.unique_id for i in observed["py"].inputs] == ["seed.shop.raw_orders"]
    assert by_name(odd, AssetMaterialized)["odd"].status is NodeStatus.SUCCESS


async def test_a_stale_source_is_observed(tmp_path: Path, nats_server: NatsServer) -> None:
    files = {
        "seeds/t_people.csv": "id,loaded_at\n1,2020-01-01 00:00:00\n",
        "models/sources.yml": properties(
            sources=[
                {
                    "name": "crm",
                    "schema": "main",
                    "tables": [
                        {
                            "name": "people",
                            "identifier": "t_people",
                            "config": {
                                "loaded_at_field": "loaded_at",
                                "freshness": {"error_after": {"count": 1, "period": "day"}},
                            },
                        }
                    ],
                }
            ]
        ),
        "models/people.sql": "select id from {{ source('crm', 'people') }}",
    }
    project = write_project(
        tmp_path / "shop", files, seeds={"+column_types": {"loaded_at": "timestamp"}}
    )
    async with shop(tmp_path, nats_server, project) as served:
        await served.run("seed")
        built = await served.run("run")
        stale = await served.run("source", "freshness")
    (asset,) = of(stale, AssetObserved)
    assert (asset.status, asset.identity.identifier) == ("error", "t_people")
    assert asset.freshness.error_after_s == 86_400
    assert asset.freshness.age_s > 86_400
    people = by_name(built, LineageObserved)["people"]
    (given,) = people.inputs
    assert given.name.endswith(".main.t_people"), "by identifier"
    assert people.fields["id"].inputs[0].name == given.name


async def test_two_projects_with_one_relation_agree_on_its_name(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    """Both say the same dataset; neither overwrites what is known of the other's node."""
    names = []
    for number in (1, 2):
        folder = tmp_path / f"p{number}"
        folder.mkdir()
        project = write_project(folder / "shop", small())
        profiles = json.loads((project / "profiles.yml").read_text())
        profiles["shop"]["outputs"]["dev"]["path"] = str(tmp_path / "one.duckdb")
        (project / "profiles.yml").write_text(json.dumps(profiles))
        config = write_config(folder, nats_server.url, project)
        config.write_text(config.read_text().replace("[projects.shop]", f"[projects.shop{number}]"))
        async with serve(config), Client.connect(nats_server.url) as client:
            accepted = await client.submit(f"shop{number}", ["build"], target="dev")
            events = await whole_run(client, accepted.run_id)
        asset = by_name(events, AssetMaterialized)["orders"]
        names.append((asset.identity.namespace, asset.identity.name))
        assert asset.previous_status is None
    assert names[0] == names[1]
