"""OpenLineage 2-0-2: the messages and facets that we send, as Structs. Pure.

`openlineage_mapping` fills them from our events, `publishers.openlineage` sends them. Not the
openlineage-python classes: those take 30 times longer to encode, bring 38 MB of imports, and
write empty lists where nothing is known. Field names are the specification's. What is not known
is UNSET, and then is not in the message.
"""

import hashlib
from datetime import datetime
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

import dbtstream

PRODUCER = f"https://pypi.org/project/dbtstream/{dbtstream.__version__}"

_SPEC = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/"

FACETS = {
    # Struct                        version    file, where it is not called like the Struct
    "ColumnLineageDatasetFacet": ("1-2-0", ""),
    "DataQualityAssertionsDatasetFacet": ("1-1-0", ""),
    "DataQualityMetricsInputDatasetFacet": ("1-0-3", ""),
    "DatasetTypeDatasetFacet": ("1-0-1", ""),
    "DatasetVersionDatasetFacet": ("1-0-1", ""),
    "DatasourceDatasetFacet": ("1-0-1", ""),
    "DocumentationDatasetFacet": ("1-1-0", ""),
    "DocumentationJobFacet": ("1-1-0", ""),
    "ErrorMessageRunFacet": ("1-0-1", ""),
    "ExternalQueryRunFacet": ("1-0-2", ""),
    "JobDependenciesRunFacet": ("1-0-1", ""),
    "JobTypeJobFacet": ("2-0-4", ""),
    "LifecycleStateChangeDatasetFacet": ("1-0-1", ""),
    "LineageJobFacet": ("1-0-0", "LineageFacet"),
    "NominalTimeRunFacet": ("1-0-1", ""),
    "OutputStatisticsOutputDatasetFacet": ("1-0-2", ""),
    "OwnershipDatasetFacet": ("1-0-1", ""),
    "OwnershipJobFacet": ("1-0-1", ""),
    "ParentRunFacet": ("1-2-0", ""),
    "ProcessingEngineRunFacet": ("1-1-1", ""),
    "SchemaDatasetFacet": ("1-2-0", ""),
    "TagsDatasetFacet": ("1-0-0", ""),
    "TagsJobFacet": ("1-0-0", ""),
    "TagsRunFacet": ("1-0-0", ""),
    "TestRunFacet": ("1-0-1", ""),
}
"""The version of each facet that we fill; its `_schemaURL` follows from that."""


def _url(facet: str) -> str:
    version, file = FACETS[facet]
    return f"https://openlineage.io/spec/facets/{version}/{file or facet}.json#/$defs/{facet}"


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a facet or message."""


class Facet(msgspec.Struct, frozen=True, kw_only=True, tag_field="_schemaURL"):
    """The tag of each is its `_schemaURL`."""

    producer: str = msgspec.field(name="_producer", default=PRODUCER)


Facets = dict[str, Facet]
"""By the name under which the specification has it."""


# -- of runs ---------------------------------------------------------------------------------


class RunRef(Part, frozen=True, kw_only=True):
    run_id: str = msgspec.field(name="runId")


class JobRef(Part, frozen=True, kw_only=True):
    namespace: str
    name: str


class RootRef(Part, frozen=True, kw_only=True):
    run: RunRef
    job: JobRef


class ParentRunFacet(Facet, frozen=True, kw_only=True, tag=_url("ParentRunFacet")):
    run: RunRef
    job: JobRef
    root: RootRef | UnsetType = UNSET


class ProcessingEngineRunFacet(
    Facet, frozen=True, kw_only=True, tag=_url("ProcessingEngineRunFacet")
):
    version: str
    name: str
    adapter_version: str = msgspec.field(
        name="openlineageAdapterVersion", default=dbtstream.__version__
    )


class ErrorMessageRunFacet(Facet, frozen=True, kw_only=True, tag=_url("ErrorMessageRunFacet")):
    message: str
    programming_language: str = msgspec.field(name="programmingLanguage")
    stack_trace: str | UnsetType = msgspec.field(name="stackTrace", default=UNSET)


class ExternalQueryRunFacet(Facet, frozen=True, kw_only=True, tag=_url("ExternalQueryRunFacet")):
    external_query_id: str = msgspec.field(name="externalQueryId")
    source: str


class NominalTimeRunFacet(Facet, frozen=True, kw_only=True, tag=_url("NominalTimeRunFacet")):
    start: datetime = msgspec.field(name="nominalStartTime")
    end: datetime | UnsetType = msgspec.field(name="nominalEndTime", default=UNSET)


class JobDependency(Part, frozen=True, kw_only=True):
    job: JobRef
    run: RunRef | UnsetType = UNSET
    sequence_trigger_rule: str = "FINISH_TO_START"
    status_trigger_rule: str = "EXECUTE_ON_SUCCESS"


class JobDependenciesRunFacet(
    Facet, frozen=True, kw_only=True, tag=_url("JobDependenciesRunFacet")
):
    upstream: list[JobDependency]


class Tag(Part, frozen=True, kw_only=True):
    key: str
    value: str
    source: str | UnsetType = UNSET
    field: str | UnsetType = UNSET  # a column, of datasets only


class TagsRunFacet(Facet, frozen=True, kw_only=True, tag=_url("TagsRunFacet")):
    tags: list[Tag]


class TestExecution(Part, frozen=True, kw_only=True):
    """`status` pass, fail or skip."""

    name: str
    status: str
    severity: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    expected: str | UnsetType = UNSET
    actual: str | UnsetType = UNSET
    params: dict[str, Any] | UnsetType = UNSET


class TestRunFacet(Facet, frozen=True, kw_only=True, tag=_url("TestRunFacet")):
    tests: list[TestExecution]


class DbtstreamNodeRunFacet(
    Facet, frozen=True, kw_only=True, tag="urn:dbtstream:v1:openlineage.dbtstream_node"
):
    """What three event types cannot say: a warning is COMPLETE, a cancelled node and a skipped one
    are both ABORT. The words are those of our `node.finished`."""

    status: str
    dbt_status: str | UnsetType = UNSET
    reason: str | UnsetType = UNSET
    attempt: int
    invocation_id: str | UnsetType = UNSET


# -- of jobs ---------------------------------------------------------------------------------


class JobTypeJobFacet(Facet, frozen=True, kw_only=True, tag=_url("JobTypeJobFacet")):
    processing_type: str = msgspec.field(name="processingType", default="BATCH")
    integration: str = "DBT"
    job_type: str = msgspec.field(name="jobType")


class Owner(Part, frozen=True, kw_only=True):
    name: str


class OwnershipJobFacet(Facet, frozen=True, kw_only=True, tag=_url("OwnershipJobFacet")):
    owners: list[Owner]


class DocumentationJobFacet(Facet, frozen=True, kw_only=True, tag=_url("DocumentationJobFacet")):
    description: str


class TagsJobFacet(Facet, frozen=True, kw_only=True, tag=_url("TagsJobFacet")):
    tags: list[Tag]


class Transformation(Part, frozen=True, kw_only=True):
    type: str
    subtype: str
    masking: bool


class LineageSource(Part, frozen=True, kw_only=True):
    """LineageDatasetInput. With a `field` beside the fields: it decides over all rows."""

    namespace: str
    name: str
    type: str = "DATASET"
    field: str | UnsetType = UNSET
    transformations: list[Transformation] | UnsetType = UNSET


class LineageFieldEntry(Part, frozen=True, kw_only=True):
    inputs: list[LineageSource]


class LineageEntry(Part, frozen=True, kw_only=True):
    """Of a dataset with its name; of the message's own job without, and `type` JOB."""

    namespace: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    type: str = "DATASET"
    inputs: list[LineageSource]
    fields: dict[str, LineageFieldEntry] | UnsetType = UNSET


class LineageJobFacet(Facet, frozen=True, kw_only=True, tag=_url("LineageJobFacet")):
    entries: list[LineageEntry]


# -- of datasets -----------------------------------------------------------------------------


class SchemaField(Part, frozen=True, kw_only=True):
    name: str
    type: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    ordinal_position: int | UnsetType = UNSET


class SchemaDatasetFacet(Facet, frozen=True, kw_only=True, tag=_url("SchemaDatasetFacet")):
    fields: list[SchemaField]


class InputField(Part, frozen=True, kw_only=True):
    namespace: str
    name: str
    field: str
    transformations: list[Transformation]


class ColumnInputs(Part, frozen=True, kw_only=True):
    input_fields: list[InputField] = msgspec.field(name="inputFields")


class ColumnLineageDatasetFacet(
    Facet, frozen=True, kw_only=True, tag=_url("ColumnLineageDatasetFacet")
):
    fields: dict[str, ColumnInputs]
    dataset: list[InputField] | UnsetType = UNSET


class DatasourceDatasetFacet(Facet, frozen=True, kw_only=True, tag=_url("DatasourceDatasetFacet")):
    name: str
    uri: str


class DatasetTypeDatasetFacet(
    Facet, frozen=True, kw_only=True, tag=_url("DatasetTypeDatasetFacet")
):
    dataset_type: str = msgspec.field(name="datasetType")
    sub_type: str | UnsetType = msgspec.field(name="subType", default=UNSET)


class DatasetVersionDatasetFacet(
    Facet, frozen=True, kw_only=True, tag=_url("DatasetVersionDatasetFacet")
):
    dataset_version: str = msgspec.field(name="datasetVersion")


class DocumentationDatasetFacet(
    Facet, frozen=True, kw_only=True, tag=_url("DocumentationDatasetFacet")
):
    description: str


class OwnershipDatasetFacet(Facet, frozen=True, kw_only=True, tag=_url("OwnershipDatasetFacet")):
    owners: list[Owner]


class TagsDatasetFacet(Facet, frozen=True, kw_only=True, tag=_url("TagsDatasetFacet")):
    tags: list[Tag]


LIFECYCLES = frozenset({"ALTER", "CREATE", "DROP", "OVERWRITE", "RENAME", "TRUNCATE"})


class LifecycleStateChangeDatasetFacet(
    Facet, frozen=True, kw_only=True, tag=_url("LifecycleStateChangeDatasetFacet")
):
    lifecycle_state_change: str = msgspec.field(name="lifecycleStateChange")


class OutputStatisticsOutputDatasetFacet(
    Facet, frozen=True, kw_only=True, tag=_url("OutputStatisticsOutputDatasetFacet")
):
    row_count: int | UnsetType = msgspec.field(name="rowCount", default=UNSET)


class Assertion(Part, frozen=True, kw_only=True):
    assertion: str
    success: bool
    name: str | UnsetType = UNSET
    column: str | UnsetType = UNSET
    severity: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    expected: str | UnsetType = UNSET
    actual: str | UnsetType = UNSET
    params: dict[str, Any] | UnsetType = UNSET


class DataQualityAssertionsDatasetFacet(
    Facet, frozen=True, kw_only=True, tag=_url("DataQualityAssertionsDatasetFacet")
):
    assertions: list[Assertion]


class DataQualityMetricsInputDatasetFacet(
    Facet, frozen=True, kw_only=True, tag=_url("DataQualityMetricsInputDatasetFacet")
):
    last_updated: datetime = msgspec.field(name="lastUpdated")
    column_metrics: dict[str, Any] = msgspec.field(name="columnMetrics")  # the spec insists on it


# -- messages --------------------------------------------------------------------------------


class Run(Part, frozen=True, kw_only=True):
    run_id: str = msgspec.field(name="runId")
    facets: Facets


class Job(Part, frozen=True, kw_only=True):
    namespace: str
    name: str
    facets: Facets


class Dataset(Part, frozen=True, kw_only=True):
    namespace: str
    name: str
    facets: Facets | UnsetType = UNSET
    input_facets: Facets | UnsetType = msgspec.field(name="inputFacets", default=UNSET)
    output_facets: Facets | UnsetType = msgspec.field(name="outputFacets", default=UNSET)


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="schemaURL"):
    event_time: datetime = msgspec.field(name="eventTime")
    producer: str = PRODUCER


class RunEvent(Message, frozen=True, kw_only=True, tag=_SPEC + "RunEvent"):
    """`event_type` START, COMPLETE, FAIL, ABORT, or OTHER for what is learnt after the end."""

    event_type: str = msgspec.field(name="eventType")
    run: Run
    job: Job
    inputs: list[Dataset] = []
    outputs: list[Dataset] = []


class JobEvent(Message, frozen=True, kw_only=True, tag=_SPEC + "JobEvent"):
    """What a job reads and makes, whether or not it has run."""

    job: Job
    inputs: list[Dataset] = []
    outputs: list[Dataset] = []


class DatasetEvent(Message, frozen=True, kw_only=True, tag=_SPEC + "DatasetEvent"):
    dataset: Dataset


OpenLineageMessage = RunEvent | JobEvent | DatasetEvent

_encoder = msgspec.json.Encoder()


def encode(message: OpenLineageMessage) -> bytes:
    """The same bytes for the same message."""
    return _encoder.encode(message)


def message_id(message: OpenLineageMessage, body: bytes) -> str:
    """The Nats-Msg-Id that the NATS transport proposed to OpenLineage has (OpenLineage#4971)."""
    digest = hashlib.sha256(body).hexdigest()
    match message:
        case RunEvent():
            return f"{message.run.run_id}:{message.event_type}:{digest}"
        case JobEvent():
            return f"job:{digest}"
        case DatasetEvent():
            return f"dataset:{digest}"
