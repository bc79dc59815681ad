"""What the dbt child makes of a manifest: nodes, its hash, and the facts of the connection.

Pure parts: invented manifests here, dbt's own in `test_dbt_child_graph`.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dbtstream.dbt_child import connection, graph, nodes
from dbtstream.dbt_child.scrub import Scrubber
from dbtstream.frames import Nodes, decode_frame

# The hash.


def test_the_manifest_hash_depends_on_nodes_code_and_parents_not_on_their_order() -> None:
    def manifest(**nodes: tuple[str, list[str]]) -> Any:
        return SimpleNamespace(
            nodes={
                name: SimpleNamespace(checksum=code, depends_on=SimpleNamespace(nodes=parents))
                for name, (code, parents) in nodes.items()
            }
        )

    base = graph.manifest_hash(manifest(a=("1", []), b=("2", ["a", "c"])))
    assert base == graph.manifest_hash(manifest(b=("2", ["c", "a"]), a=("1", [])))
    assert base != graph.manifest_hash(manifest(a=("1", []), b=("3", ["a", "c"])))
    assert base != graph.manifest_hash(manifest(a=("1", []), b=("2", ["a"])))
    assert base != graph.manifest_hash(manifest(a=("1", [])))


def manifest_of(**facts: Any) -> Any:
    """One model with these facts, a group and an exposure."""
    config: dict[str, Any] = {
        "materialized": "table",
        "group": "finance",
        "contract": None,
        "meta": {},
    }
    config.update({name: facts.pop(name) for name in list(facts) if name in config})
    node = {
        "unique_id": "model.shop.orders",
        "resource_type": "model",
        "name": "orders",
        "checksum": "1",
        "relation_name": '"shop"."main"."orders"',
        "schema": "main",
        "columns": {"id": SimpleNamespace(name="id", data_type="integer", tags=["key"])},
    }
    exposure = {"resource_type": "exposure", "name": "board", "type": "dashboard", "url": "a"}
    exposure.update({name: facts.pop(name) for name in list(facts) if name in ("url", "maturity")})
    owner = SimpleNamespace(name=facts.pop("group_owner", "Finance"), email=None)
    others = facts.pop("others", {})
    return SimpleNamespace(
        groups={"group.shop.finance": SimpleNamespace(name="finance", owner=owner)},
        nodes={
            "model.shop.orders": SimpleNamespace(
                **{**node, **facts}, config=SimpleNamespace(**config)
            ),
            **others,
        },
        exposures={"exposure.shop.board": SimpleNamespace(**exposure)},
    )


COLUMNS = {
    "typed": {"id": SimpleNamespace(name="id", data_type="bigint", tags=["key"])},
    "named": {"id": SimpleNamespace(name="ID", data_type="integer", tags=["key"])},
    "tagged": {"id": SimpleNamespace(name="id", data_type="integer", tags=[])},
}


@pytest.mark.parametrize(
    "facts",
    [
        {"checksum": "2"},
        {"schema": "other"},
        {"relation_name": None},
        {"alias": "x"},
        {"columns": COLUMNS["typed"]},
        {"columns": COLUMNS["named"]},
        {"columns": COLUMNS["tagged"]},
        {"columns": {}},
        {"materialized": "view"},
        {"group": None},
        {"group_owner": "Treasury"},
        {"contract": SimpleNamespace(enforced=True)},
        {"meta": {"owner": "ada"}},
        {"meta": {"dbtstream": {"emit": False}}},
        {"url": "b"},
        {"maturity": "low"},
        {"depends_on": SimpleNamespace(nodes=["source.shop.raw.a"])},
        {"others": {"test.shop.x": SimpleNamespace(resource_type="test", unique_id="test.shop.x")}},
    ],
    ids=str,
)
def test_the_manifest_hash_changes_with_all_that_lineage_declares(facts: dict[str, Any]) -> None:
    assert graph.manifest_hash(manifest_of(**facts)) != graph.manifest_hash(manifest_of())


@pytest.mark.parametrize(
    "facts",
    [
        {"description": "x"},
        {"meta": {"tier": 1}},
        {"compiled_code": "select 1"},
        {"others": {"sql": SimpleNamespace(resource_type="sql_operation", unique_id="sql")}},
    ],
    ids=str,
)
def test_the_manifest_hash_does_not_change_with_the_rest(facts: dict[str, Any]) -> None:
    assert graph.manifest_hash(manifest_of(**facts)) == graph.manifest_hash(manifest_of())


# Nodes.


def test_a_node_with_values_of_the_wrong_type_is_told_all_the_same() -> None:
    node = SimpleNamespace(
        unique_id="model.shop.odd",
        resource_type="model",
        name=5,
        fqn=7,
        tags=[1, None],
        meta="no mapping",
        description=3.5,
        columns={"a": SimpleNamespace(name=1, data_type=2, description=None, tags="x")},
        depends_on=None,
        config=SimpleNamespace(meta=["neither"], contract={}, materialized=None, full_refresh="no"),
    )
    frame = {"t": "nodes", "at": 1.0, "n": 1, "nodes": [nodes.NodeReader(None).read(node)]}
    decoded = decode_frame(json.dumps(Scrubber().frame(frame)).encode())
    assert isinstance(decoded, Nodes)
    (odd,) = decoded.nodes
    assert (odd.name, odd.fqn, odd.tags, odd.meta) == ("5", [], ["1", "None"], {})
    assert (odd.description, odd.contract_enforced) == ("3.5", False)
    (column,) = odd.columns
    assert (column.name, column.data_type, column.tags) == ("1", "2", ("x",))


def test_what_a_node_does_not_have_is_left_out() -> None:
    node = SimpleNamespace(unique_id="model.shop.a", resource_type="model", name="a")
    assert nodes.NodeReader(None).read(node) == vars(node)


@pytest.mark.parametrize(
    ("content", "delimiter", "header"),
    [
        (b"a,b\n1,2\n", ",", ["a", "b"]),
        (b"\xef\xbb\xbfa;b,c\r\n", ";", ["a", "b,c"]),
        ('"ö\nx",b\n1,2\n'.encode(), ",", ["ö\nx", "b"]),
        (b"only", ",", ["only"]),
        (b"", ",", None),
        (b"\xff\xfe", ",", None),
        (b"a,b\n", "too long", None),
        (b"x," * 100_000 + b"\n1\n", ",", None),
        (b"a,b\n" + b"1,2\n" * 100_000, ",", ["a", "b"]),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_header_is_read_as_far_as_it_is_sure(
    tmp_path: Path, content: bytes, delimiter: str, header: list[str] | None
) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    assert nodes.csv_header(str(tmp_path / "a.csv"), delimiter) == header
    assert nodes.csv_header(str(tmp_path / "none.csv")) is None


# The connection.

SECRET = "hunter2"
NO_SECRETS: dict[str, dict[str, Any]] = {
    "athena": {"region_name": "eu-central-1"},
    "bigquery": {"database": "my-project", "location": "EU"},
    "clickhouse": {"host": "ch.example.com", "port": 8443},
    "databricks": {"host": "dbc.example.com"},
    "fabric": {"host": "f.example.com"},
    "mysql": {"server": "my.example.com", "port": 3306},
    "postgres": {"host": "pg.example.com", "port": 5432},
    "redshift": {"host": "c.example.com", "port": 5439, "region": "eu", "cluster_id": "c"},
    "snowflake": {"account": "org-account"},
    "spark": {"host": "spark.example.com", "port": 10000, "method": "thrift"},
    "sqlserver": {"server": "ms.example.com", "port": 1433},
    "trino": {"host": "trino.example.com", "port": 8080},
    "brandnew": {"host": "new.example.com", "port": 1},
}
SECRET_NAMES = [
    "access_key_id",
    "access_token",
    "auth",
    "authenticator",
    "aws_access_key_id",
    "aws_secret_access_key",
    "azure_client_secret",
    "client_id",
    "client_secret",
    "connection_string",
    "credentials",
    "http_path",
    "iam_profile",
    "keyfile",
    "keyfile_json",
    "keyfile_path",
    "pass",
    "pass_",
    "password",
    "private_key",
    "private_key_passphrase",
    "private_key_path",
    "refresh_token",
    "role",
    "s3_staging_dir",
    "secret",
    "secrets",
    "session_parameters",
    "settings",
    "sslkey",
    "sslrootcert",
    "token",
    "user",
    "username",
    "UID",
    "PWD",
]


@pytest.mark.parametrize("kind", NO_SECRETS)
def test_of_a_connection_only_a_closed_list_of_names_is_told(kind: str) -> None:
    facts = NO_SECRETS[kind]
    secrets = dict.fromkeys(SECRET_NAMES, SECRET)
    credentials = SimpleNamespace(type=kind, schema="main", **facts, **secrets)
    told = connection.connection_facts(credentials, "/srv/shop")
    project = {"project": facts["database"]} if kind == "bigquery" else {}
    assert told == {"type": kind, "schema": "main", **facts, **project}


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (None, ":memory:"),
        (":memory:", ":memory:"),
        (":memory:named", ":memory:"),
        ("shop.duckdb", "/srv/shop/shop.duckdb"),
        ("../a/./b.duckdb", "/srv/a/b.duckdb"),
        ("/data/a@b=c d.duckdb", "/data/a@b=c d.duckdb"),
        ("md:shop", "md:shop"),
        (f"md:shop?motherduck_token={SECRET}", "md:shop"),
        (f"motherduck:?motherduck_token={SECRET}", "motherduck:"),
        (f"s3://key:{SECRET}@bucket/a.duckdb?x=1", "s3://bucket/a.duckdb"),
        (f"postgres:dbname=x password={SECRET}", None),
        (f"postgres:password={SECRET}", "postgres:"),
        (f"dbname=x password={SECRET}", None),
        (7, None),
    ],
    ids=str,
)
def test_the_path_of_duckdb_is_absolute_and_without_tokens(path: Any, told: str | None) -> None:
    assert connection.duckdb_path(path, "/srv/shop") == told


def test_attached_databases_are_named_and_foreign_ones_have_no_path() -> None:
    attach = [
        SimpleNamespace(path="other.duckdb", type=None, alias="other"),
        SimpleNamespace(path="/data/old.db", type="sqlite", alias=None),
        SimpleNamespace(path=f"host=x password={SECRET}", type="postgres", alias="pg"),
    ]
    credentials = SimpleNamespace(
        type="duckdb", path=f"md:x?motherduck_token={SECRET}", attach=attach, is_motherduck=True
    )
    assert connection.connection_facts(credentials, "/srv/shop") == {
        "type": "duckdb",
        "path": "md:x",
        "motherduck": True,
        "attach": {"other": "/srv/shop/other.duckdb", "old": "/data/old.db", "pg": None},
    }


@pytest.mark.parametrize(
    ("host", "told"),
    [
        (
            f"https://ada:{SECRET}@host.example.com:8443/x?token={SECRET}",
            "https://host.example.com:8443/x",
        ),
        (f"ada:{SECRET}@host.example.com", "host.example.com"),
        ("host.example.com", "host.example.com"),
    ],
)
def test_a_host_loses_user_password_and_query(host: str, told: str) -> None:
    assert connection.without_secrets(host) == told


def test_owners_are_gathered_from_meta_exposure_and_group_each_once() -> None:
    group = SimpleNamespace(
        name="finance", owner=SimpleNamespace(email=["fin@x.org", "cfo@x.org"], name="Finance")
    )
    manifest = SimpleNamespace(groups={"group.shop.finance": group})
    owned = SimpleNamespace(
        meta={"owner": "ada@x.org"}, owner=SimpleNamespace(email="grace@x.org", name=None)
    )
    config = SimpleNamespace(meta={"owner": "ada@x.org", "owners": [{"email": "bob@x.org"}, 7]})
    assert nodes.owners(owned, config, nodes.group_owners(manifest)["finance"]) == [
        "ada@x.org",
        "bob@x.org",
        "grace@x.org",
        "fin@x.org",
        "cfo@x.org",
        "Finance",
    ]
