"""The columns of a build that has just succeeded, and where they come from.

Layer 3, used by `asset_events`: it asks the SQL reader (`sql_process`) about the compiled SQL,
takes what the adapter said in dbt's process, and decides whose word counts: adapter, contract,
catalog, inferred, documented. The rules are in `assets` and `lineage`.
"""

import asyncio
from dataclasses import dataclass

from dbtstream.asset_schema import Schema, schema_by_project, weakest
from dbtstream.assets import Assets, Build
from dbtstream.column_lineage import Analysis, AnalysisRequest, KnownColumn, SourceTable
from dbtstream.config import LineageConfig
from dbtstream.frames import Columns, NodeFinish, PlannedNode
from dbtstream.lineage import Facts, ProjectGraph
from dbtstream.sql_process import SqlReader
from dbtstream.statuses import ColumnLineageStatus

SNAPSHOT_COLUMNS = ["dbt_scd_id", "dbt_updated_at", "dbt_valid_from", "dbt_valid_to"]
"""What dbt's snapshot materialization adds, under its default names."""


@dataclass(frozen=True, slots=True)
class Read:
    """`lineage` has the fields of `lineage.observed`; None where nothing new can be said."""

    build: Build
    lineage: Facts | None


class BuildColumns:
    """Of one attempt. `hurry` ends what is being read: the run is over."""

    def __init__(
        self,
        config: LineageConfig,
        dialect: str,
        graph: ProjectGraph,
        assets: Assets,
        reader: SqlReader,
        hurry: asyncio.Event,
    ) -> None:
        self._config, self._dialect = config, dialect
        self._graph, self._assets, self._reader = graph, assets, reader
        self._hurry = hurry

    async def read(
        self, node: PlannedNode, finish: NodeFinish | None, columns: Columns | None
    ) -> Read:
        """What is known of the build; `finish` has its SQL, `columns` is the adapter's word."""
        code = finish.compiled_code if finish else None
        code_hash = finish.compiled_code_hash if finish else None
        deferred = self._graph.deferred_in(node.unique_id, code) if code else frozenset()
        sources = self._sources(node, deferred)
        analysis = await self._analysis(node, finish, [table for table, _ in sources])
        known = [source for _, source in sources if source is not None]
        observed = self._graph.observed(node.unique_id, analysis, deferred, weakest(known))
        lineage: Facts | None = {**observed, "compiled_code_hash": code_hash}
        last = self._assets.states.get(node.unique_id)
        lineage_hash = observed["lineage_hash"]
        if (
            analysis.status is ColumnLineageStatus.ERROR
            and last is not None
            and last.lineage_hash is not None
            and last.compiled_code_hash == code_hash
        ):
            # The same SQL was read before: an answer that did not come must not replace that one.
            lineage, lineage_hash = None, last.lineage_hash
        build = Build(
            schema=self._schema(node, columns, analysis, code_hash),
            inputs=self._graph.inputs(node.unique_id, deferred),
            lineage_hash=lineage_hash,
            compiled_code_hash=code_hash,
        )
        return Read(build, lineage)

    def _sources(
        self, node: PlannedNode, deferred: frozenset[str]
    ) -> list[tuple[SourceTable, str | None]]:
        """The relations that the SQL may read, each with who knows its columns."""
        sources = []
        for given in self._graph.inputs(node.unique_id, deferred):
            if given.unique_id is None or not given.relation_name:
                continue
            schema = self._assets.schema_of(given.unique_id)
            table = SourceTable(
                ref=given.unique_id,
                relation_name=given.relation_name,
                columns=schema.columns if schema else None,
                # The YAML need not name all of them.
                partial=schema is not None and schema.source == "documented",
            )
            sources.append((table, schema.source if schema else None))
        if node.materialized in ("incremental", "snapshot"):
            sources += self._itself(node)
        return sources

    def _itself(self, node: PlannedNode) -> list[tuple[SourceTable, str | None]]:
        """An incremental model may read what it has built before (`{{ this }}`)."""
        identity = self._graph.identity(node.unique_id)
        if identity is None or not identity.relation_name:
            return []
        schema = self._assets.schema_of(node.unique_id)
        table = SourceTable(
            ref=node.unique_id,
            relation_name=identity.relation_name,
            columns=schema.columns if schema else None,
        )
        return [(table, None)]

    async def _analysis(
        self, node: PlannedNode, finish: NodeFinish | None, sources: list[SourceTable]
    ) -> Analysis:
        if not self._config.columns:
            return _no_columns(ColumnLineageStatus.DISABLED, "lineage.columns is off in the config")
        if node.resource_type == "seed":
            header = [KnownColumn(name=name) for name in node.header or ()]
            return Analysis(
                status=ColumnLineageStatus.COMPLETE,
                columns=header or None,
                fields={column.name: [] for column in header},
                dataset_inputs=[],
            )
        if node.language == "python":
            return _no_columns(ColumnLineageStatus.UNSUPPORTED, "a Python model has no SQL")
        if finish is None or finish.compiled_code is None:
            long = finish is not None and finish.compiled_code_truncated
            return _no_columns(
                ColumnLineageStatus.ERROR,
                "the compiled SQL is longer than 1 MiB" if long else "no compiled SQL was told",
            )
        request = AnalysisRequest(
            unique_id=node.unique_id,
            sql=finish.compiled_code,
            dialect=self._dialect,
            sources=sources,
            added_columns=SNAPSHOT_COLUMNS if node.resource_type == "snapshot" else [],
        )
        return await self._unless_hurried(request)

    async def _unless_hurried(self, request: AnalysisRequest) -> Analysis:
        reading = asyncio.ensure_future(self._reader.read(request, self._config.timeout_s))
        hurried = asyncio.ensure_future(self._hurry.wait())
        try:
            await asyncio.wait({reading, hurried}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                return reading.result()
        finally:
            hurried.cancel()
            reading.cancel()
            await asyncio.wait({reading})
        return _no_columns(ColumnLineageStatus.ERROR, "the run ended before the SQL had been read")

    def _schema(
        self,
        node: PlannedNode,
        columns: Columns | None,
        analysis: Analysis,
        code_hash: str | None,
    ) -> Schema | None:
        if columns is not None and columns.columns:
            found = [KnownColumn(name=c.name, type=c.data_type) for c in columns.columns]
            return Schema(columns=found, source="adapter")
        declared = schema_by_project(node)
        if declared is not None and declared.source == "contract":
            return declared
        last = self._assets.states.get(node.unique_id)
        if (
            last is not None
            and last.columns is not None
            and last.columns_source == "catalog"
            and last.compiled_code_hash == code_hash
        ):
            return Schema(columns=last.columns, source="catalog")
        if declared is not None and node.resource_type == "seed" and declared.source == "inferred":
            return declared
        if analysis.columns is not None:
            return Schema(columns=analysis.columns, source="inferred")
        return declared


def _no_columns(status: ColumnLineageStatus, message: str) -> Analysis:
    return Analysis(status=status, message=message)
