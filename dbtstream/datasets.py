"""What a relation is called in the world: OpenLineage's namespace and name of a dataset.

Layer 1, pure. `asset_events` makes one `Datasets` per attempt, of what the child's `Graph` frame
says of the connection, and asks it about every node; `duckdb_catalogs` knows DuckDB's attached
databases. Names equal the naming spec and those of OpenLineage's own dbt integration, so that
graphs join; where these two differ, the spec wins. A name is made of anything: it never raises.

A file is named by its absolute path: a relative one would be the name of many.
"""

from collections.abc import Mapping
from typing import Any

from dbtstream.connection_words import (
    ANY_HOST,
    SERVERS,
    UNKNOWN,
    Server,
    authority,
    aws_account,
    redshift_authority,
    snowflake_account,
    spark_authority,
    sqlite_path,
    text,
    without_scheme,
)
from dbtstream.duckdb_catalogs import DuckdbCatalogs, duckdb_namespace
from dbtstream.event_base import Relation
from dbtstream.frames import PlannedNode
from dbtstream.lineage_events import Identity

DATASET_TYPES = frozenset({"model", "seed", "snapshot", "source"})
"""Resource types whose relation is a dataset."""

RELATION_TYPES = {
    "table": "table",
    "incremental": "table",
    "distributed_table": "table",  # dbt-clickhouse
    "distributed_incremental": "table",
    "view": "view",
    "materialized_view": "materialized_view",
    "dynamic_table": "dynamic_table",  # dbt-snowflake
    "streaming_table": "streaming_table",  # dbt-databricks
    "external": "external",  # dbt-duckdb: a view on a file that it writes
    "dictionary": "dictionary",  # dbt-clickhouse
}
"""dbt's materialization -> what is in the database. What a custom one makes is not known."""

_WITHOUT_DATABASE = frozenset({"mysql", "mysql5", "mariadb", "sqlite"})
"""Adapters that have a schema and no database; some write the schema's name in both places."""


def namespace_of(
    adapter_type: str | None,
    connection: Mapping[str, Any],
    override: str | None,
    *,
    base: str = "",
) -> str:
    """Of the datasets of a dbt target.

    `connection` has the names of dbt's credentials. Relative paths are below `base`, the folder
    that dbt runs in; without it they stay relative.
    """
    if override:
        return override
    adapter = adapter_type or text(connection, "type") or UNKNOWN
    match adapter:
        case "duckdb":
            return duckdb_namespace(text(connection, "path"), base)
        case "sqlite":
            return f"sqlite://{sqlite_path(connection, base)}"
        case "snowflake":
            return f"snowflake://{snowflake_account(text(connection, 'account')) or UNKNOWN}"
        case "bigquery":
            return "bigquery"
        case "redshift":
            return f"redshift://{redshift_authority(connection)}"
        case "databricks":
            host = without_scheme(text(connection, "host", "server_hostname"))
            return f"databricks://{host or UNKNOWN}"
        case "spark":
            return f"spark://{spark_authority(connection)}"
        case "athena":
            region = text(connection, "region_name", "region") or UNKNOWN
            return f"awsathena://athena.{region}.amazonaws.com"
        case "glue":
            region = text(connection, "region", "region_name") or UNKNOWN
            return f"arn:aws:glue:{region}:{aws_account(connection) or UNKNOWN}"
    server = SERVERS.get(adapter, Server(adapter, ANY_HOST))
    return f"{server.scheme}://{authority(connection, server)}"


def dataset_name(relation: Relation, adapter_type: str | None = None) -> str:
    """Those parts of the relation that there are, joined by dots, each as it is."""
    database, schema, identifier = relation.database, relation.schema, relation.identifier
    if adapter_type == "glue" and schema and identifier:
        return f"table/{schema}/{identifier}"
    if adapter_type in _WITHOUT_DATABASE and schema:
        database = None
    return ".".join(filter(None, (database, schema, identifier))) or relation.relation_name or ""


def relation_type(node: PlannedNode) -> str | None:
    """table, view, materialized_view, external …; None where nobody says it, as of a source."""
    if node.resource_type in ("seed", "snapshot"):
        return "table"
    return RELATION_TYPES.get(node.materialized or "")


class Datasets:
    """The names of all relations of one dbt target. Two targets on one database agree on them."""

    def __init__(
        self,
        adapter_type: str | None,
        connection: Mapping[str, Any],
        override: str | None = None,
        *,
        base: str = "",
    ) -> None:
        self.adapter_type = adapter_type or text(connection, "type") or None
        self.namespace = namespace_of(adapter_type, connection, override, base=base)
        is_duckdb = self.adapter_type == "duckdb" and not override
        self._catalogs = DuckdbCatalogs(connection, base) if is_duckdb else None

    def of_relation(self, relation: Relation) -> tuple[str, str]:
        """(namespace, name)."""
        found = self._catalogs.find(relation.database) if self._catalogs else None
        if found is None:
            return self.namespace, dataset_name(relation, self.adapter_type)
        parts = (found.name, relation.schema, relation.identifier)
        return found.namespace, ".".join(filter(None, parts))

    def identity(self, node: PlannedNode, relation: Relation | None = None) -> Identity | None:
        """Of the dataset that the node makes or is; None where that is none.

        `relation` is what dbt said when it was built, if that is not the planned one.
        """
        relation = relation or node.relation
        if relation is None or node.resource_type not in DATASET_TYPES:
            return None
        if node.materialized == "ephemeral" or not (relation.identifier or relation.relation_name):
            return None
        namespace, name = self.of_relation(relation)
        return Identity(
            namespace=namespace,
            name=name,
            database=relation.database or None,
            schema=relation.schema or None,
            identifier=relation.identifier or None,
            relation_name=relation.relation_name or None,
            relation_type=relation_type(node),
        )
