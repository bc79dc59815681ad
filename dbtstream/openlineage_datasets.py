"""Our datasets, columns and checks in OpenLineage's facets. Pure, and without a memory.

`openlineage_mapping` decides what is sent when, and takes the parts from here.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

from msgspec import UNSET, UnsetType

from dbtstream import openlineage as ol
from dbtstream.lineage_events import (
    AssetChecked,
    AssetMaterialized,
    AssetObserved,
    CheckBlock,
    Column,
    FieldInput,
    FieldTransformation,
    Identity,
    Lineage,
    LineageDeclared,
)

T = TypeVar("T")

_RELATION_TYPES = {
    # relation_type          datasetType  subType
    "table": ("TABLE", None),
    "view": ("VIEW", None),
    "materialized_view": ("VIEW", "MATERIALIZED"),
    "external": ("TABLE", "EXTERNAL"),
}

_VERDICTS = {"pass": True, "warn": False, "fail": False}
"""Whether the test found nothing. What else a check can be is no verdict on the data."""

_NOT_RUN = frozenset({"skipped", "cancelled", "never_started"})


def known(value: T | None) -> T | UnsetType:
    return UNSET if value is None else value


# -- what a build read and made --------------------------------------------------------------


def built(event: AssetMaterialized, lineage: Lineage | None) -> ol.Dataset:
    """The output of a build that succeeded."""
    rows = event.rows_affected
    facets = _identity_facets(event.identity)
    fields = schema_fields(event.columns or [], lineage)
    if fields:
        facets["schema"] = ol.SchemaDatasetFacet(fields=fields)
    if lineage is not None:
        facets |= column_lineage(lineage, event.columns or [])
    if event.description:
        facets["documentation"] = ol.DocumentationDatasetFacet(description=event.description)
    facets |= dataset_owners(event.owners)
    if tags := dataset_tags(event.tags, event.columns or []):
        facets["tags"] = ol.TagsDatasetFacet(tags=tags)
    facets["version"] = ol.DatasetVersionDatasetFacet(dataset_version=event.dataset_version)
    if event.lifecycle in ol.LIFECYCLES:
        facets["lifecycleStateChange"] = ol.LifecycleStateChangeDatasetFacet(
            lifecycle_state_change=event.lifecycle
        )
    statistics: ol.Facets = {}
    if rows is not None:
        statistics["outputStatistics"] = ol.OutputStatisticsOutputDatasetFacet(row_count=rows)
    return ol.Dataset(
        namespace=event.identity.namespace,
        name=event.identity.name,
        facets=facets,
        output_facets=statistics or UNSET,
    )


def read(event: AssetMaterialized, lineage: Lineage | None) -> list[ol.Dataset]:
    """The inputs of a build, each with the version that it saw where that is known."""
    inputs = {
        (each.namespace, each.name): plain(each.namespace, each.name, version=each.dataset_version)
        for each in event.input_versions
    }
    for each in lineage.inputs if lineage is not None else []:
        inputs.setdefault((each.namespace, each.name), plain(each.namespace, each.name))
    return list(inputs.values())


def traced(lineage: Lineage, columns: list[Column]) -> tuple[list[ol.Dataset], list[ol.Dataset]]:
    """Inputs and outputs of which only the lineage is told, with the columns that it names."""
    facets = column_lineage(lineage, columns)
    if fields := schema_fields(columns, lineage):
        facets["schema"] = ol.SchemaDatasetFacet(fields=fields)
    outputs = [
        ol.Dataset(namespace=output.namespace, name=output.name, facets=facets or UNSET)
        for output in lineage.outputs
    ]
    return [plain(each.namespace, each.name) for each in lineage.inputs], outputs


def plain(namespace: str, name: str, *, version: str | None = None) -> ol.Dataset:
    facets = _data_source(namespace)
    if version is not None:
        facets["version"] = ol.DatasetVersionDatasetFacet(dataset_version=version)
    return ol.Dataset(namespace=namespace, name=name, facets=facets or UNSET)


def declared(event: LineageDeclared) -> ol.Dataset:
    """What the manifest says of a node's dataset.

    Documented columns are only a claim: of what dbt builds they are told when they are a
    contract, or when it has been built (`built`). Of a source nothing better will come.
    """
    output = event.outputs[0]
    facets = _data_source(output.namespace)
    if event.columns and (event.contract_enforced or event.resource_type == "source"):
        facets["schema"] = ol.SchemaDatasetFacet(fields=schema_fields(event.columns, None))
    facets |= dataset_owners(event.owners)
    return ol.Dataset(namespace=output.namespace, name=output.name, facets=facets)


def schema_fields(columns: list[Column], lineage: Lineage | None) -> list[ol.SchemaField]:
    """With every column that `columnLineage` names: Marquez refuses the event else (#2998)."""
    fields = [
        ol.SchemaField(
            name=column.name,
            type=known(column.type),
            description=column.description or UNSET,
            ordinal_position=number,
        )
        for number, column in enumerate(columns, start=1)
    ]
    there = {column.name for column in columns}
    traced = _output_fields(lineage, columns) if lineage is not None else {}
    return fields + [ol.SchemaField(name=name) for name in traced if name not in there]


def column_lineage(lineage: Lineage, columns: list[Column]) -> ol.Facets:
    if lineage.fields is None:
        return {}
    fields = {
        name: ol.ColumnInputs(input_fields=[_input_field(each) for each in inputs])
        for name, inputs in _output_fields(lineage, columns).items()
    }
    decisive = [_input_field(each) for each in lineage.dataset_inputs or []]
    return {"columnLineage": ol.ColumnLineageDatasetFacet(fields=fields, dataset=decisive or UNSET)}


def lineage_facet(lineage: Lineage, columns: list[Column]) -> ol.LineageJobFacet:
    """The same edges for the readers of the newer facet, of tables and of columns."""
    inputs = [
        ol.LineageSource(namespace=each.namespace, name=each.name) for each in lineage.inputs
    ] + [_source(each) for each in lineage.dataset_inputs or []]
    if not lineage.outputs:
        return ol.LineageJobFacet(entries=[ol.LineageEntry(type="JOB", inputs=inputs)])
    fields: dict[str, ol.LineageFieldEntry] | UnsetType = UNSET
    if lineage.fields is not None:
        fields = {
            name: ol.LineageFieldEntry(inputs=[_source(each) for each in inputs_of_it])
            for name, inputs_of_it in _output_fields(lineage, columns).items()
        }
    return ol.LineageJobFacet(
        entries=[
            ol.LineageEntry(
                namespace=output.namespace, name=output.name, inputs=inputs, fields=fields
            )
            for output in lineage.outputs
        ]
    )


def _output_fields(lineage: Lineage, columns: list[Column]) -> dict[str, list[FieldInput]]:
    """By the columns' own names: SQL and database may differ in case only."""
    own: dict[str, str] = {}
    for column in columns:
        folded = column.name.casefold()
        own[folded] = column.name if folded not in own else ""  # two of them: leave it alone
    exact = {column.name for column in columns}
    return {
        name if name in exact else own.get(name.casefold()) or name: field.inputs
        for name, field in (lineage.fields or {}).items()
    }


def _input_field(field: FieldInput) -> ol.InputField:
    return ol.InputField(
        namespace=field.namespace,
        name=field.name,
        field=field.field,
        transformations=_transformations(field.transformations),
    )


def _source(field: FieldInput) -> ol.LineageSource:
    return ol.LineageSource(
        namespace=field.namespace,
        name=field.name,
        field=field.field,
        transformations=_transformations(field.transformations) or UNSET,
    )


def _transformations(ours: Iterable[FieldTransformation]) -> list[ol.Transformation]:
    return [
        ol.Transformation(type=each.type, subtype=each.subtype, masking=each.masking)
        for each in ours
    ]


def _identity_facets(identity: Identity) -> ol.Facets:
    facets = _data_source(identity.namespace)
    if relation := identity.relation_type:
        kind, sub_type = _RELATION_TYPES.get(relation, (relation.upper(), None))
        facets["datasetType"] = ol.DatasetTypeDatasetFacet(
            dataset_type=kind, sub_type=known(sub_type)
        )
    return facets


def _data_source(namespace: str) -> ol.Facets:
    """`bigquery` is a namespace, but no URI."""
    if "://" not in namespace or any(c.isspace() for c in namespace):
        return {}
    return {"dataSource": ol.DatasourceDatasetFacet(name=namespace, uri=namespace)}


def dataset_owners(owners: list[str]) -> ol.Facets:
    if not owners:
        return {}
    named = [ol.Owner(name=owner) for owner in owners]
    return {"ownership": ol.OwnershipDatasetFacet(owners=named)}


def dataset_tags(tags: list[str], columns: list[Column]) -> list[ol.Tag]:
    return dbt_tags(tags) + [
        ol.Tag(key=tag, value="true", source="DBT", field=column.name)
        for column in columns
        for tag in column.tags
    ]


def dbt_tags(tags: list[str]) -> list[ol.Tag]:
    return [ol.Tag(key=tag, value="true", source="DBT") for tag in tags]


# -- what was found out about it -------------------------------------------------------------


def checked(event: AssetChecked) -> list[ol.Dataset]:
    """The asset with the verdict, if there is one, and what else the test looks at."""
    facets: ol.Facets = {}
    if (assertion := _assertion(event.check)) is not None:
        facets["dataQualityAssertions"] = ol.DataQualityAssertionsDatasetFacet(
            assertions=[assertion]
        )
    identity = event.identity
    version = event.dataset_version
    looked_at = plain(identity.namespace, identity.name, version=version)
    own = ol.Dataset(
        namespace=identity.namespace,
        name=identity.name,
        facets=looked_at.facets,
        input_facets=facets or UNSET,
    )
    others = {(each.namespace, each.name) for each in event.check.other_datasets}
    others.discard((own.namespace, own.name))  # a table that refers to itself
    return [own, *(plain(*other) for other in sorted(others))]


def execution_of(check: CheckBlock) -> ol.TestRunFacet | None:
    """None for a test that could not run: the facet has no word for that."""
    status = "skip" if check.status in _NOT_RUN else None
    if check.status in _VERDICTS:
        status = "pass" if _VERDICTS[check.status] else "fail"
    if status is None:
        return None
    return ol.TestRunFacet(
        tests=[ol.TestExecution(status=status, type=_kind_of(check), **_said_of(check))]
    )


def _assertion(check: CheckBlock) -> ol.Assertion | None:
    if check.status not in _VERDICTS:
        return None
    return ol.Assertion(
        assertion=_kind_of(check),
        success=_VERDICTS[check.status],
        column=check.columns[0] if len(check.columns) == 1 else UNSET,
        **_said_of(check),
    )


def _said_of(check: CheckBlock) -> dict[str, Any]:
    """`expected` and `actual` count failing rows, as the dbt integration of OpenLineage has it."""
    counted = check.failures is not None
    return {
        "name": check.name,
        "severity": _severity(check),
        "description": check.message or UNSET,
        "expected": _expected(check) if counted else UNSET,
        "actual": str(check.failures) if counted else UNSET,
        "params": check.params or UNSET,
    }


def _kind_of(check: CheckBlock) -> str:
    return check.assertion or ("unit_test" if check.kind == "unit_test" else "custom_sql")


def _severity(check: CheckBlock) -> str | UnsetType:
    """What a finding has led to; of a test without one, what it would lead to."""
    if check.status == "warn":
        return "warn"
    if check.status == "fail":
        return "error"
    return check.severity.lower() if check.severity else UNSET


def _expected(check: CheckBlock) -> str:
    limit = check.warn_if if _severity(check) == "warn" else check.error_if
    return "0" if limit is None or limit.replace(" ", "") == "!=0" else limit


def observed(event: AssetObserved) -> ol.Dataset:
    """A source with how fresh it is."""
    facets: ol.Facets = {}
    freshness = event.freshness
    if event.status in ("pass", "warn", "error"):
        limit = None
        if freshness is not None:
            stale = freshness.error_after_s if event.status == "error" else freshness.warn_after_s
            limit = stale if stale is not None else freshness.error_after_s
        age = freshness.age_s if freshness is not None else None
        facets["dataQualityAssertions"] = ol.DataQualityAssertionsDatasetFacet(
            assertions=[
                ol.Assertion(
                    assertion="freshness",
                    name=f"{event.name}.freshness",
                    success=event.status == "pass",
                    severity=event.status if event.status != "pass" else UNSET,
                    expected=UNSET if limit is None else f"at most {limit:g} s old",
                    actual=UNSET if age is None else f"{age:g} s old",
                )
            ]
        )
    if freshness is not None and freshness.max_loaded_at is not None:
        facets["dataQualityMetrics"] = ol.DataQualityMetricsInputDatasetFacet(
            last_updated=freshness.max_loaded_at, column_metrics={}
        )
    identity = event.identity
    return ol.Dataset(
        namespace=identity.namespace,
        name=identity.name,
        facets=_identity_facets(identity) | dataset_owners(event.owners),
        input_facets=facets or UNSET,
    )
