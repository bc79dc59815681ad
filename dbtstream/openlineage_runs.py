"""Who is who in OpenLineage's runs: ids, names and parents of one run of ours, and why one failed.

Pure; for `openlineage_mapping`. All that is made here follows from the event alone, so that an
event that is sent again makes the same message again.
"""

import uuid

from msgspec import UNSET

from dbtstream import openlineage as ol
from dbtstream.errors import RequestRejected
from dbtstream.event_base import Event
from dbtstream.events import NodeBlock, NodeFinished, RunFinished
from dbtstream.policy import split_command
from dbtstream.statuses import PASSED, NodeStatus

PARENT = "openlineage.parent"
ROOT = "openlineage.root"
"""Labels of a request that say whose child the run is: `openlineage.parent.run_id`,
`.job_namespace` and `.job_name`, and the same of the root. All three or none."""

REF_FIELDS = ("run_id", "job_namespace", "job_name")

_ABORTED = frozenset({NodeStatus.SKIPPED, NodeStatus.NEVER_STARTED, NodeStatus.CANCELLED})


class Kin:
    """The run, its nodes below it, and who asked for it above it."""

    def __init__(self, namespace: str, labels: dict[str, str]) -> None:
        self.namespace = namespace
        self.command: str | None = None
        self.problem: str | None = None
        """What is wrong with the labels that name a parent, if anything is."""
        self._parent: ol.RootRef | None = None
        self._root: ol.RootRef | None = None
        try:
            self._parent, self._root = _ref_of(labels, PARENT), _ref_of(labels, ROOT)
        except ValueError as error:
            self.problem = str(error)

    def asked_for(self, args: list[str]) -> None:
        """The command is that of the request: a later attempt may be dbt's `retry` of it, and
        has to have the same job all the same."""
        if self.command is None:
            self.command = _command_of(args)

    def job_name(self, event: Event) -> str:
        return f"{event.project}.{event.target}.{self.command or 'dbt'}"

    def above(self) -> ol.Facets:
        """Of the run: its parent, if the request named one."""
        if self._parent is None:
            return {}
        return {"parent": _parent_facet(self._parent, self._root or self._parent)}

    def below_run(self, event: Event) -> ol.Facets:
        """Of a node."""
        return {"parent": _parent_facet(self._own(event), self._top(event))}

    def below_node(self, event: Event, unique_id: str) -> ol.Facets:
        """Of a batch."""
        node = ol.RootRef(
            run=ol.RunRef(run_id=node_run(event, unique_id)), job=self.job_ref(unique_id)
        )
        return {"parent": _parent_facet(node, self._top(event))}

    def job_ref(self, name: str) -> ol.JobRef:
        return ol.JobRef(namespace=self.namespace, name=name)

    def _own(self, event: Event) -> ol.RootRef:
        return ol.RootRef(
            run=ol.RunRef(run_id=event.run_id), job=self.job_ref(self.job_name(event))
        )

    def _top(self, event: Event) -> ol.RootRef:
        return self._root or self._parent or self._own(event)


def node_run(event: Event, what: str) -> str:
    """The run of a node, or of a batch of it, in the event's attempt."""
    return str(uuid.uuid5(uuid.UUID(event.run_id), f"{event.attempt}/{what}"))


def _parent_facet(parent: ol.RootRef, root: ol.RootRef) -> ol.ParentRunFacet:
    return ol.ParentRunFacet(run=parent.run, job=parent.job, root=root)


def _ref_of(labels: dict[str, str], prefix: str) -> ol.RootRef | None:
    """None without such labels. Raises ValueError where they are no name of a run."""
    values = {field: labels.get(f"{prefix}.{field}", "").strip() for field in REF_FIELDS}
    if not any(values.values()):
        return None
    if missing := [field for field, value in values.items() if not value]:
        raise ValueError(
            f"label {prefix}.{missing[0]} is missing: {', '.join(REF_FIELDS)} belong together"
        )
    try:
        run_id = str(uuid.UUID(values["run_id"]))
    except ValueError:
        raise ValueError(
            f"label {prefix}.run_id is {values['run_id']!r}, which is no UUID"
        ) from None
    return ol.RootRef(
        run=ol.RunRef(run_id=run_id),
        job=ol.JobRef(namespace=values["job_namespace"], name=values["job_name"]),
    )


def label_tags(labels: dict[str, str]) -> ol.Facets:
    tags = [
        ol.Tag(key=key, value=value, source="DBTSTREAM")
        for key, value in labels.items()
        if not key.startswith((f"{PARENT}.", f"{ROOT}."))
    ]
    return {"tags": ol.TagsRunFacet(tags=tags)} if tags else {}


def engine(event: Event) -> ol.Facets:
    """`dbt-core 1.11.16`, which is known once dbt has said hello."""
    if not event.engine:
        return {}
    name, _, version = event.engine.partition(" ")
    name = "dbt" if name.startswith("dbt") else name
    return {
        "processing_engine": ol.ProcessingEngineRunFacet(name=name, version=version or "unknown")
    }


def own_facet(
    event: Event, status: str, dbt_status: str | None = None, reason: str | None = None
) -> ol.Facets:
    facet = ol.DbtstreamNodeRunFacet(
        status=status,
        dbt_status=UNSET if dbt_status is None else dbt_status,
        reason=UNSET if reason is None else reason,
        attempt=event.attempt,
        invocation_id=event.invocation_id or UNSET,
    )
    return {"dbtstream_node": facet}


def job_name(node: NodeBlock) -> str:
    """What dbt runs of a source is the check of its freshness."""
    return f"{node.unique_id}.freshness" if node.resource_type == "source" else node.unique_id


def job_type(node: NodeBlock) -> str:
    return "FRESHNESS" if node.resource_type == "source" else node.resource_type.upper()


def end_of(status: NodeStatus) -> str:
    """The event type of a node's end, or of a batch's."""
    if status in PASSED:
        return "COMPLETE"
    return "ABORT" if status in _ABORTED else "FAIL"


def failure(message: str, *, python: bool = False, stack: str | None = None) -> ol.Facets:
    facet = ol.ErrorMessageRunFacet(
        message=message,
        programming_language="PYTHON" if python else "SQL",
        stack_trace=stack or UNSET,
    )
    return {"errorMessage": facet}


def why(event: NodeFinished) -> str:
    """Never empty: a FAIL without a reason helps nobody."""
    if event.error is not None and event.error.message:
        return event.error.message
    if event.message:
        return event.message
    if event.batch_results is not None:
        failed = len(event.batch_results.failed)
        return f"{failed} of {failed + len(event.batch_results.successful)} batches failed"
    if event.freshness is not None:
        age = event.freshness.age_s
        return "the source is stale" + ("" if age is None else f": {age:g} s old")
    return f"{event.node.name}: {event.status}" + (f" ({event.reason})" if event.reason else "")


def why_run(event: RunFinished) -> str:
    if event.error is not None and event.error.message:
        return event.error.message
    if not event.failed:
        return f"the run ended as {event.status}, exit code {event.exit_code}"
    named = ", ".join(f"{node.unique_id} ({node.status})" for node in event.failed)
    more = event.failed_count - len(event.failed)
    return f"did not pass: {named}" + (f", and {more} more" if more > 0 else "")


def _command_of(args: list[str]) -> str:
    """`source_freshness` of ["source", "freshness", "--select", …]."""
    try:
        return split_command(args)[0].replace(" ", "_")
    except RequestRejected:
        return "dbt"
