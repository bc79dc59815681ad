"""Identity of datasets: equal to OpenLineage's, whole for any relation, and made of anything.

Where OpenLineage's own code can be called, it is what ours is compared with.
"""

import importlib
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openlineage.client.naming import dataset as naming

from dbtstream.connection_words import snowflake_account
from dbtstream.datasets import Datasets, dataset_name, namespace_of
from dbtstream.event_base import Relation
from dbtstream.frames import PlannedNode
from dbtstream.lineage_events import Identity

# They have no types.
processor: Any = importlib.import_module("openlineage.common.provider.dbt.processor")
snowflake: Any = importlib.import_module("openlineage.common.provider.snowflake")

ORDERS = Relation(
    database="shop", schema="main", identifier="orders", relation_name='"shop"."main"."orders"'
)


def node(resource_type: str = "model", materialized: str | None = "table") -> PlannedNode:
    return PlannedNode(
        unique_id=f"{resource_type}.shop.orders",
        resource_type=resource_type,
        name="orders",
        materialized=materialized,
        relation=ORDERS,
    )


def names(
    adapter: str | None, connection: dict[str, Any], relation: Relation = ORDERS, base: str = ""
) -> tuple[str, str]:
    return Datasets(adapter, connection, base=base).of_relation(relation)


# -- beside OpenLineage's own code ---------------------------------------------------------------


def wrapper_namespace(adapter: str, profile: dict[str, Any]) -> str:
    """What openlineage-dbt calls it: its method, without the files that its class reads."""
    wrapper = SimpleNamespace(adapter_type=processor.Adapter(adapter))
    return str(processor.DbtArtifactProcessor.extract_namespace(wrapper, profile))


def wrapper_name(database: str | None, schema: str | None, table: str) -> str:
    return str(processor.DbtArtifactProcessor._format_dataset_name(None, database, schema, table))


PROFILES: list[tuple[str, dict[str, Any]]] = [
    ("duckdb", {"path": "/data/shop.duckdb"}),
    ("duckdb", {"path": ":memory:"}),
    ("duckdb", {"path": "md:shop"}),
    ("duckdb", {"path": "s3://bucket/shop.duckdb"}),
    ("postgres", {"host": "db.example.com", "port": 5432}),
    ("snowflake", {"account": "myorg-prod"}),
    ("snowflake", {"account": "xy12345"}),
    ("snowflake", {"account": "xy12345.us-east-1"}),
    ("snowflake", {"account": "xy12345.east-us-2.azure"}),
    ("bigquery", {"project": "shop", "dataset": "main"}),
    ("redshift", {"host": "10.0.0.7", "port": 5439}),
    ("databricks", {"host": "dbc-1.cloud.databricks.com"}),
    ("clickhouse", {"host": "ch", "port": 9000}),
    ("trino", {"host": "trino", "port": 443}),
    ("presto", {"host": "presto", "port": 8080}),
    ("watsonx_presto", {"host": "presto", "port": 8080}),
    ("sqlserver", {"server": "sql", "port": 1433}),
    ("fabric", {"server": "x.fabric.microsoft.com"}),
    ("fabric", {"server": "x.fabric.microsoft.com", "port": 1433}),
    ("dremio", {"software_host": "dremio", "port": 9047}),
    ("athena", {"region_name": "eu-west-1"}),
    ("glue", {"region": "eu-west-1", "account_id": "123456789012"}),
    ("glue", {"region": "eu-west-1", "role_arn": "arn:aws:iam::123456789012:role/dbt"}),
    ("spark", {"host": "spark", "method": "thrift"}),
    ("spark", {"host": "spark", "method": "http"}),
    ("spark", {"host": "spark", "method": "odbc", "port": 8443}),
]


@pytest.mark.parametrize(
    ("adapter", "profile"),
    PROFILES,
)
def test_a_namespace_is_the_one_of_openlineages_dbt_integration(
    adapter: str, profile: dict[str, Any]
) -> None:
    expected = wrapper_namespace(adapter, profile)
    assert namespace_of(adapter, profile, None) == expected
    if adapter != "glue":  # it names Glue's tables otherwise than the spec
        assert names(adapter, profile) == (expected, wrapper_name("shop", "main", "orders"))


def test_every_adapter_of_openlineages_dbt_integration_is_among_those_compared() -> None:
    assert {adapter for adapter, _ in PROFILES} == {a.value for a in processor.Adapter}


@pytest.mark.parametrize(
    ("adapter", "connection", "expected"),
    [
        (
            "postgres",
            {"host": "db", "port": 5433},
            naming.Postgres("db", "5433", "shop", "main", "orders"),
        ),
        (
            "snowflake",
            {"account": "myorg-prod"},
            naming.Snowflake("myorg", "prod", "shop", "main", "orders"),
        ),
        ("bigquery", {}, naming.BigQuery("shop", "main", "orders")),
        (
            "redshift",
            {"host": "wh.abc123.eu-west-1.redshift.amazonaws.com", "port": 5439},
            naming.Redshift("wh", "eu-west-1", "5439", "shop", "main", "orders"),
        ),
        (
            "trino",
            {"host": "trino", "port": "443"},
            naming.Trino("trino", "443", "shop", "main", "orders"),
        ),
        (
            "mysql",
            {"server": "db", "port": 3306},
            naming.MySQL("db", "3306", "main", "orders"),
        ),
        (
            "athena",
            {"region_name": "eu-west-1"},
            naming.Athena("eu-west-1", "shop", "main", "orders"),
        ),
        (
            "glue",
            {"region": "eu-west-1", "account_id": "123456789012"},
            naming.AWSGlue("eu-west-1", "123456789012", "main", "orders"),
        ),
    ],
)
def test_namespace_and_name_follow_the_naming_spec(
    adapter: str, connection: dict[str, Any], expected: naming.DatasetNaming
) -> None:
    assert names(adapter, connection) == (expected.get_namespace(), expected.get_name())


@given(st.from_regex(r"\A[A-Za-z0-9_-]{1,12}(\.[a-z0-9-]{1,12}){0,4}\Z"))
def test_any_snowflake_account_is_written_as_openlineage_does(account: str) -> None:
    assert snowflake_account(account) == snowflake.fix_account_name(account)


# -- redshift, databricks, others ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("connection", "authority"),
    [
        ({"host": "wh.a1.eu-west-1.redshift.amazonaws.com"}, "wh.eu-west-1:5439"),
        ({"host": "wh.a1.cn-north-1.redshift.amazonaws.com.cn"}, "wh.cn-north-1:5439"),
        (
            {"host": "wg.123456789012.us-east-1.redshift-serverless.amazonaws.com", "port": 5440},
            "wg.us-east-1:5440",
        ),
        ({"host": "redshift.corp.example.com", "port": 5439}, "redshift.corp.example.com:5439"),
        ({"cluster_id": "wh", "region": "eu-west-1"}, "wh.eu-west-1:5439"),
        ({"host": "tunnel", "cluster_id": "wh", "region": "eu-west-1"}, "wh.eu-west-1:5439"),
        ({}, "unknown"),
    ],
)
def test_a_redshift_cluster_is_told_from_its_hosts_name(
    connection: dict[str, Any], authority: str
) -> None:
    assert namespace_of("redshift", connection, None) == f"redshift://{authority}"


@pytest.mark.parametrize(
    ("adapter", "connection", "namespace"),
    [
        ("databricks", {"server_hostname": "https://dbc-1.x.com/"}, "databricks://dbc-1.x.com"),
        ("postgres", {"host": "db"}, "postgres://db:5432"),
        ("sqlite", {"schemas_and_paths": {"main": "/data/a.db"}}, "sqlite:///data/a.db"),
        ("sqlite", {}, "sqlite://unknown"),
        ("oracle", {"host": "ora", "port": 1521}, "oracle://ora:1521"),
        ("teradata", {"server": "td"}, "teradata://td"),
        ("vertica", {}, "vertica://unknown"),
        (None, {"type": "postgres", "host": "db"}, "postgres://db:5432"),
        (None, {}, "unknown://unknown"),
    ],
)
def test_any_adapter_has_a_namespace(
    adapter: str | None, connection: dict[str, Any], namespace: str
) -> None:
    assert namespace_of(adapter, connection, None) == namespace


ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text())
WORDS = ["path", "host", "port", "account", "region", "server", "type", "attach", "role_arn"]
ADAPTERS = [*(adapter.value for adapter in processor.Adapter), "mysql", "sqlite", "vertica", None]
ATTACHMENTS = st.lists(
    ODD
    | st.dictionaries(st.sampled_from(["path", "alias", "type", "options"]), ODD)
    | st.fixed_dictionaries(
        {"path": st.sampled_from(["md:", "postgres:", "ducklake:x", "ducklake:mysql:a=b", "://["])}
    )
)


@given(
    st.sampled_from(ADAPTERS),
    st.dictionaries(st.sampled_from(WORDS), ODD),
    ATTACHMENTS,
    st.text() | st.none(),
)
def test_no_connection_is_odd_enough_for_an_exception(
    adapter: str | None,
    connection: dict[str, Any],
    attach: list[Any],
    database: str | None,
) -> None:
    relation = Relation(database=database, schema="s", identifier="t")
    for odd in (connection, {**connection, "attach": attach}):
        namespace, name = Datasets(adapter, odd).of_relation(relation)
        assert namespace
        assert "None." not in namespace
        assert name.endswith("t")


def test_the_configs_namespace_wins_also_for_attached_databases() -> None:
    connection = {"path": "/a.duckdb", "attach": [{"path": "/b.duckdb", "alias": "shop"}]}
    datasets = Datasets("duckdb", connection, "warehouse://main")
    assert datasets.of_relation(ORDERS) == ("warehouse://main", "shop.main.orders")


# -- DuckDB --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "base", "namespace"),
    [
        ("shop.duckdb", "/srv/shop", "duckdb:///srv/shop/shop.duckdb"),
        ("../data/./shop.duckdb", "/srv/shop", "duckdb:///srv/data/shop.duckdb"),
        ("/data//shop.duckdb", "/srv/shop", "duckdb:///data/shop.duckdb"),
        ("data/shop.duckdb", "", "duckdb://data/shop.duckdb"),
        (None, "/srv/shop", "duckdb://:memory:"),
        (":memory:", "/srv/shop", "duckdb://:memory:"),
        (":memory:named", "/srv/shop", "duckdb://:memory:named"),
        ("md:shop?motherduck_token=hush", "/srv", "duckdb://md:shop"),
        ("motherduck:shop", "/srv", "duckdb://md:shop"),
        ("md:", "/srv", "duckdb://md:my_db"),
        ("s3://key:hush@bucket/x.duckdb?secret=hush", "/srv", "duckdb://s3://bucket/x.duckdb"),
        ("ducklake:meta.ducklake", "/srv", "ducklake:///srv/meta.ducklake"),
        (
            "ducklake:postgres:dbname=lake host=db password=hush",
            "/srv",
            "ducklake://db:5432/lake",
        ),
    ],
)
def test_a_duckdb_file_is_named_by_its_absolute_path(
    path: str | None, base: str, namespace: str
) -> None:
    assert namespace_of("duckdb", {"path": path}, None, base=base) == namespace


def attached(database: str, /, **attachment: object) -> tuple[str, str]:
    connection = {"path": "shop.duckdb", "attach": [attachment]}
    relation = Relation(database=database, schema="main", identifier="orders")
    return names("duckdb", connection, relation, base="/srv/shop")


def test_a_relation_of_an_attached_file_has_the_name_that_its_owner_gives_it() -> None:
    owners = names(
        "duckdb",
        {"path": "/srv/ingest.duckdb"},
        Relation(database="ingest", schema="main", identifier="orders"),
    )
    assert owners == ("duckdb:///srv/ingest.duckdb", "ingest.main.orders")
    assert attached("raw", path="../ingest.duckdb", alias="raw") == owners
    assert attached("RAW", path="/srv/ingest.duckdb", alias="raw", read_only=True) == owners
    assert attached("ingest", path="/srv/ingest.duckdb") == owners
    own = ("duckdb:///srv/shop/shop.duckdb", "shop.main.orders")
    assert attached("shop", path="/srv/ingest.duckdb", alias="raw") == own


@pytest.mark.parametrize(
    ("attachment", "expected"),
    [
        (
            {"path": "dbname=crm host=db port=5433 password=hush", "type": "postgres"},
            naming.Postgres("db", "5433", "crm", "main", "orders"),
        ),
        (
            {"path": "postgres:postgresql://u:hush@db/crm"},
            naming.Postgres("db", "5432", "crm", "main", "orders"),
        ),
        (
            {"type": "postgres", "host": "db", "database": "crm"},  # of a child that keeps secrets
            naming.Postgres("db", "5432", "crm", "main", "orders"),
        ),
        (
            {"path": "host=db user=u passwd=hush", "options": {"type": "mysql"}},
            naming.MySQL("db", "3306", "main", "orders"),
        ),
    ],
)
def test_an_attached_server_has_the_name_that_its_own_adapter_gives_it(
    attachment: dict[str, Any], expected: naming.DatasetNaming
) -> None:
    assert attached("ext", alias="ext", **attachment) == (
        expected.get_namespace(),
        expected.get_name(),
    )


def test_attached_files_may_be_told_as_paths_by_alias() -> None:
    """As the child tells them; None is what it does not tell, as it holds a password."""
    connection = {
        "path": "/srv/shop.duckdb",
        "attach": {
            "raw": "/srv/ingest.duckdb",
            "crm": None,
            "sales": "md:sales",
            "lake": "ducklake:",
        },
    }
    datasets = Datasets("duckdb", connection)

    def of(database: str) -> tuple[str, str]:
        relation = Relation(database=database, schema="main", identifier="t")
        return datasets.of_relation(relation)

    assert of("shop") == ("duckdb:///srv/shop.duckdb", "shop.main.t")
    assert of("raw") == ("duckdb:///srv/ingest.duckdb", "ingest.main.t")
    assert of("crm") == ("duckdb:///srv/shop.duckdb", "crm.main.t")
    assert of("sales") == ("duckdb://md:sales", "sales.main.t")
    assert of("lake") == ("ducklake://unknown", "lake.main.t")


@pytest.mark.parametrize(
    "path",
    [
        "host=db user=u password=hush",
        "host=db password='hu sh://hush@x'",
        "password=hush://hush host=db",
        "postgresql://u:hush@db:5432/crm?password=hush",
        "postgresql://u:hu/hush@db/crm",
        "postgresql://u:12/hush@db/crm",
        "postgresql://u:hush@hush@db/crm",
        "mysql://u:hush@db",
        "https://u:hush@db/x?token=hush",
    ],
)
@pytest.mark.parametrize("scheme", ["", "postgres:", "mysql:", "ducklake:postgres:", "ducklake:"])
@pytest.mark.parametrize("kind", [None, "postgres", "mysql", "ducklake"])
def test_no_password_gets_into_a_name(path: str, scheme: str, kind: str | None) -> None:
    if kind is None and not scheme and "://" not in path:
        return  # then it is a file of that odd name
    attachment = {"path": scheme + path, "alias": "ext", "type": kind}
    relation = Relation(database="ext", schema="main", identifier="t")
    namespace, name = names("duckdb", {"attach": [attachment]}, relation)
    assert "hush" not in namespace + name
    host = {"host": f"https://u:hush@{path.partition('@')[2] or 'db'}"}
    for adapter in ("databricks", "postgres", "vertica"):
        assert "u:hush" not in namespace_of(adapter, host, None)


def test_attached_lakes_and_other_files_go_by_where_they_are() -> None:
    endpoint = {"type": "iceberg", "endpoint": "http://polaris:8181/api/catalog"}
    assert attached("sales_dev", path="sales_dev", alias="sales_dev", options=endpoint) == (
        "http://polaris:8181/api/catalog",  # as OpenLineage#4618 asks for
        "sales_dev.main.orders",
    )
    assert attached("lake", path="ducklake:/srv/meta.ducklake", alias="lake") == (
        "ducklake:///srv/meta.ducklake",
        "meta.main.orders",
    )
    assert attached("a", path="sqlite:/srv/a.db", alias="a") == (
        "sqlite:///srv/a.db",
        "main.orders",
    )


def test_databases_of_a_motherduck_account_have_one_name_wherever_one_connects() -> None:
    sales = Relation(database="sales", schema="main", identifier="orders")
    expected = ("duckdb://md:sales", "sales.main.orders")
    for connection in (
        {"path": "md:sales"},
        {"path": "md:other"},
        {"path": "md:"},
        {"path": "/a.duckdb", "attach": [{"path": "md:sales"}]},
        {"path": "/a.duckdb", "attach": [{"path": "md:sales?x=1", "alias": "sales"}]},
        {"path": "/a.duckdb", "attach": [{"path": "md:"}]},
    ):
        assert names("duckdb", connection, sales) == expected
    local = Relation(database="a", schema="main", identifier="t")
    connection = {"path": "/a.duckdb", "attach": [{"path": "md:"}]}
    assert names("duckdb", connection, local) == ("duckdb:///a.duckdb", "a.main.t")


# -- names and identities ------------------------------------------------------------------------

PART = st.text(min_size=1, max_size=200)


@given(PART, PART, PART)
def test_a_name_keeps_its_parts_exactly(database: str, schema: str, identifier: str) -> None:
    relation = Relation(database=database, schema=schema, identifier=identifier)
    assert dataset_name(relation) == f"{database}.{schema}.{identifier}"


@pytest.mark.parametrize("nothing", [None, ""])
def test_a_part_that_is_not_there_leaves_no_trace(nothing: str | None) -> None:
    assert dataset_name(Relation(database=nothing, schema="s", identifier="t")) == "s.t"
    assert dataset_name(Relation(database="d", schema=nothing, identifier="t")) == "d.t"
    assert dataset_name(Relation(schema=nothing, identifier="t")) == "t"
    assert dataset_name(Relation(relation_name="read_csv('x')")) == "read_csv('x')"


def test_case_is_the_relations() -> None:
    """dbt says ORDERS of Snowflake only where the project does; so does OpenLineage."""
    relation = Relation(database="SHOP", schema="main", identifier="Orders")
    assert names("snowflake", {"account": "o-a"}, relation)[1] == "SHOP.main.Orders"


def test_an_identity_has_all_that_is_known() -> None:
    found = Datasets("duckdb", {"path": "/shop.duckdb"}).identity(node())
    assert found == Identity(
        namespace="duckdb:///shop.duckdb",
        name="shop.main.orders",
        database="shop",
        schema="main",
        identifier="orders",
        relation_name='"shop"."main"."orders"',
        relation_type="table",
    )


def test_two_projects_with_one_relation_have_one_identity() -> None:
    ours = Datasets("duckdb", {"path": "../shop.duckdb"}, base="/srv/a").identity(node())
    other = Datasets("duckdb", {"path": "/srv/shop.duckdb"}, base="/srv/b").identity(node("source"))
    assert ours is not None
    assert other is not None
    assert (ours.namespace, ours.name) == (other.namespace, other.name)


def test_the_relation_that_was_built_wins_over_the_planned_one() -> None:
    built = Relation(database="shop", schema="main", identifier="orders__dbt_tmp")
    found = Datasets("duckdb", {}).identity(node(), built)
    assert found is not None
    assert found.name == "shop.main.orders__dbt_tmp"


@pytest.mark.parametrize(
    "without",
    [
        node(materialized="ephemeral"),
        node("test", "test"),
        node("exposure"),
        node("operation"),
        msgspec.structs.replace(node(), relation=None),
        msgspec.structs.replace(node(), relation=Relation(schema="main")),
    ],
)
def test_what_makes_no_dataset_has_no_identity(without: PlannedNode) -> None:
    assert Datasets("duckdb", {}).identity(without) is None


@pytest.mark.parametrize(
    ("resource_type", "materialized", "expected"),
    [
        ("model", "table", "table"),
        ("model", "incremental", "table"),
        ("model", "view", "view"),
        ("model", "materialized_view", "materialized_view"),
        ("model", "dynamic_table", "dynamic_table"),
        ("model", "external", "external"),
        ("model", "my_own", None),
        ("seed", "seed", "table"),
        ("snapshot", "snapshot", "table"),
        ("source", None, None),
    ],
)
def test_the_type_of_relation_is_what_the_materialization_makes(
    resource_type: str, materialized: str | None, expected: str | None
) -> None:
    found = Datasets("duckdb", {}).identity(node(resource_type, materialized))
    assert found is not None
    assert found.relation_type == expected
