"""What is known of each node in one attempt: begun, ended how, and because of whom. Pure.

Layer 1. `node_events` writes into it as frames arrive; `normalizer` reads from it what the
closing event says: counts, the slowest, the failed, whether dbt's own results agree. It makes
no event and knows no time but those it is given.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import msgspec

from dbtstream.dbt_values import FAIL_FAST_MESSAGE, block_from_id, cut, node_block
from dbtstream.event_base import Relation
from dbtstream.events import (
    FailedNode,
    NodeBlock,
    NodeFinished,
    NodeStarted,
    PlanEntry,
    SlowNode,
    TestBlock,
)
from dbtstream.frames import BatchFinish, NodeError, NodeFinish, NodeResult, NodeStart, PlannedNode
from dbtstream.statuses import CAUSES_SKIP, DBT_NODE_STATUS, NodeStatus, Reason

MAX_SLOWEST = 10
MAX_FAILED = 50
MAX_FAILED_MESSAGE_BYTES = 1024

FAILED = CAUSES_SKIP | {NodeStatus.LOST}
"""Listed in `run.finished`. A cancelled node was stopped, it did not fail."""

_IS_CAUSE = CAUSES_SKIP | {NodeStatus.CANCELLED, NodeStatus.LOST}
_SKIP_IS = frozenset({NodeStatus.SKIPPED, NodeStatus.NEVER_STARTED})
_ERROR_IS = frozenset({NodeStatus.ERROR, NodeStatus.CANCELLED})

BLOCKED_BY_TESTS = frozenset({"model", "seed", "snapshot"})
"""`dbt build` adds edges from tests to these (Linker.add_test_edges, 1.8 to 1.12)."""
_WAITS_FOR_TESTS = BLOCKED_BY_TESTS | {"unit_test"}


@dataclass(slots=True)
class NodeRecord:
    """One node of this attempt. `status` is set once, with its terminal event."""

    block: NodeBlock
    relation: Relation | None = None
    test: TestBlock | None = None
    opened: NodeStart | None = None  # the first NodeStart; batches fire more
    depth: int = 0  # NodeStarts without their NodeFinish
    began: float | None = None  # node.started was emitted; Unix seconds
    ended: float | None = None
    error: NodeError | None = None
    batches: list[BatchFinish] = field(default_factory=list)
    held: NodeFinish | None = None  # a source's end, waiting for its ages
    status: NodeStatus | None = None
    reason: Reason | None = None
    message: str | None = None
    elapsed_s: float | None = None
    root_causes: list[str] = field(default_factory=list)
    span_id: str = ""

    @property
    def is_hook(self) -> bool:
        return self.block.resource_type == "operation"

    @property
    def in_flight(self) -> bool:
        return self.began is not None and self.status is None

    @property
    def is_cause(self) -> bool:
        """What depends on it is skipped. A node whose thread raised has only its error yet."""
        if self.status is None:
            return self.error is not None
        return self.status in _IS_CAUSE

    def plan_entry(self) -> PlanEntry:
        return PlanEntry(
            unique_id=self.block.unique_id,
            resource_type=self.block.resource_type,
            materialized=self.block.materialized,
            depends_on=self.block.upstream,
        )

    def is_nested(self, frame: NodeFinish) -> bool:
        """Whether this finish is of a batch. A batch has its own start time.

        Counting alone would do but for batches whose thread raised: they never finish, and
        the model's own finish would then be taken for one of theirs.
        """
        if self.opened is None or self.depth <= 1:
            return False
        if frame.started_at and self.opened.started_at:
            return frame.started_at != self.opened.started_at
        return True


class Ledger:
    """All nodes of the attempt by unique_id, in the order in which they were heard of."""

    def __init__(self) -> None:
        self.nodes: dict[str, NodeRecord] = {}
        self.earlier: dict[str, NodeRecord] = {}  # of attempts before this one, each node's last
        self._known: dict[str, PlannedNode] = {}  # whatever the manifest told, selected or not
        self._children: dict[str, list[str]] | None = None
        self._tests_of: dict[str, list[NodeRecord]] = defaultdict(list)
        self._failed_tests: dict[str, NodeRecord] = {}
        self._blocked: dict[str, frozenset[str]] = {}

    def know(self, nodes: Iterable[PlannedNode]) -> None:
        """Nodes that are not selected but may be heard of, or lie between selected ones."""
        for node in nodes:
            self._known[node.unique_id] = node

    def select(self, nodes: Iterable[PlannedNode]) -> None:
        for node in nodes:
            self._known[node.unique_id] = node
            record = self.record(node.unique_id)
            if node.resource_type == "test" and len(node.upstream) == 1:
                self._tests_of[node.upstream[0]].append(record)

    def record(self, unique_id: str) -> NodeRecord:
        """The node's record, made on first hearing."""
        record = self.nodes.get(unique_id)
        if record is None:
            known = self._known.get(unique_id)
            if known is None:
                record = NodeRecord(block_from_id(unique_id))
            else:
                record = NodeRecord(node_block(known), known.relation, known.test)
            self.nodes[unique_id] = record
        return record

    def selected(self) -> Iterator[NodeRecord]:
        """Without hooks: those are no part of a selection."""
        return (record for record in self.nodes.values() if not record.is_hook)

    def upstream_of(self, record: NodeRecord) -> Iterator[NodeRecord]:
        """The selected nodes that dbt ends before it begins this one.

        A unit test depends on its model by the manifest, and runs right before it. In `build`
        a model also waits for the tests of its upstreams; where models and tests are selected
        together, that is so (of tests with several parents only dbt's linker knows).
        """
        for name in self._subject_of(record).upstream:
            if name in self.nodes:
                yield self.nodes[name]
            if record.block.resource_type in _WAITS_FOR_TESTS:
                yield from self._tests_of.get(name, ())

    def recall_plan(self, entries: Iterable[PlanEntry]) -> None:
        """From a published plan, which says less of a node than the manifest did."""
        for entry in entries:
            record = self.record(entry.unique_id)
            record.block = msgspec.structs.replace(
                record.block, materialized=entry.materialized, upstream=entry.depends_on
            )

    def recall_node(self, event: NodeStarted | NodeFinished) -> None:
        """From a published event of the node."""
        record = self.record(event.node.unique_id)
        record.block = event.node
        if isinstance(event, NodeStarted):
            record.began = event.time.timestamp()
            return
        _take_end(record, event)

    def recall_earlier(self, event: NodeFinished) -> None:
        """A node's end in an attempt before this one: it counts until this one has its own."""
        record = NodeRecord(event.node)
        _take_end(record, event)
        self.earlier[event.node.unique_id] = record

    def verdicts(self) -> dict[str, NodeRecord]:
        """Each node of the run in the last attempt in which it ended."""
        ended = {name: record for name, record in self.nodes.items() if record.status is not None}
        return self.earlier | ended if self.earlier else ended

    # Why a node was skipped

    def root_causes(self, record: NodeRecord) -> list[str]:
        """The nearest nodes that did not pass, through skipped ones; sorted.

        dbt names no cause. It skips every descendant of a failed node, and in `build` also
        what lies behind a failed test or unit test.
        """
        if record.is_hook:
            return [n for n, r in self.nodes.items() if r.is_hook and r.is_cause]
        subject = self._subject_of(record)
        causes: set[str] = set()
        self._collect_causes(subject.upstream, causes)
        causes.update(
            name
            for name, test in self._failed_tests.items()
            if test.is_cause and self._blocks(test, subject)
        )
        return sorted(causes) or self._only_suspect()

    def note_failed_test(self, record: NodeRecord) -> None:
        """A test that did not pass, or is about not to: what lies behind it will be skipped."""
        self._failed_tests[record.block.unique_id] = record

    def _subject_of(self, record: NodeRecord) -> NodeBlock:
        """A unit test waits and is skipped with its model, and for the same causes."""
        if record.block.resource_type == "unit_test" and record.block.upstream:
            tested = self.nodes.get(record.block.upstream[0])
            if tested is not None:
                return tested.block
        return record.block

    def _blocks(self, test: NodeRecord, subject: NodeBlock) -> bool:
        if test.block.resource_type == "unit_test":
            return subject.unique_id in test.block.upstream[:1]
        return subject.resource_type in BLOCKED_BY_TESTS and (
            subject.unique_id in self._behind(test)
        )

    def _collect_causes(self, upstream: list[str], causes: set[str]) -> None:
        todo = list(upstream)
        seen: set[str] = set()
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            record = self.nodes.get(name)
            if record is None:
                known = self._known.get(name)  # not selected: look through it
                todo.extend(known.upstream if known else ())
            elif record.is_cause:
                causes.add(name)
            elif record.status in _SKIP_IS:
                causes.update(record.root_causes)

    def _behind(self, test: NodeRecord) -> frozenset[str]:
        """Nodes that descend from all that the test looks at: dbt's rule for its test edges."""
        name = test.block.unique_id
        if name not in self._blocked:
            behind = [self._descendants(parent) for parent in test.block.upstream]
            self._blocked[name] = frozenset.intersection(*behind) if behind else frozenset()
        return self._blocked[name]

    def _descendants(self, name: str) -> frozenset[str]:
        if self._children is None:
            self._children = defaultdict(list)
            for child in self._known.values():
                for parent in child.upstream:
                    self._children[parent].append(child.unique_id)
        found: set[str] = set()
        todo = list(self._children.get(name, ()))
        while todo:
            child_name = todo.pop()
            if child_name not in found:
                found.add(child_name)
                todo.extend(self._children.get(child_name, ()))
        return frozenset(found)

    def _only_suspect(self) -> list[str]:
        """When the graph between cause and effect is not known, but only one node failed."""
        failed = [name for name, record in self.nodes.items() if record.is_cause]
        return failed if len(failed) == 1 else []

    # What the closing event says

    def counts(self) -> dict[str, dict[str, int]]:
        """By resource_type and status, of nodes that have ended; hooks are `operation`."""
        counts: dict[str, dict[str, int]] = {}
        for record in self.verdicts().values():
            if record.status is not None:
                of_type = counts.setdefault(record.block.resource_type, {})
                of_type[record.status.value] = of_type.get(record.status.value, 0) + 1
        return counts

    def by_status(self) -> dict[str, int]:
        """Of nodes that have ended, without hooks."""
        counts: dict[str, int] = {}
        for record in self.selected():
            if record.status is not None:
                counts[record.status.value] = counts.get(record.status.value, 0) + 1
        return counts

    def start_hook_failed(self) -> bool:
        return any(
            record.is_hook
            and record.status is NodeStatus.ERROR
            and "-on-run-start-" in record.block.name
            for record in self.nodes.values()
        )

    def slowest(self) -> list[SlowNode]:
        timed = [
            (record.elapsed_s, name)
            for name, record in self.verdicts().items()
            if record.elapsed_s is not None
        ]
        return [
            SlowNode(unique_id=name, elapsed_s=elapsed_s)
            for elapsed_s, name in heapq.nlargest(MAX_SLOWEST, timed)
        ]

    def failed(self) -> tuple[list[FailedNode], int]:
        """The first of them, and how many there are."""
        failed = [
            (name, record.status, record.message)
            for name, record in self.verdicts().items()
            if record.status is not None and record.status in FAILED
        ]
        listed = [
            FailedNode(
                unique_id=name,
                status=status,
                message=cut(message, MAX_FAILED_MESSAGE_BYTES)[0] if message else None,
            )
            for name, status, message in failed[:MAX_FAILED]
        ]
        return listed, len(failed)

    def differences(self, results: Iterable[NodeResult]) -> list[str]:
        """Nodes of which dbt's results say something else than their terminal event did."""
        return [
            result.unique_id
            for result in results
            if (record := self.nodes.get(result.unique_id)) is not None
            and record.status is not None
            and not agrees(result.status, result.message, record.status, record.reason)
        ]


def _take_end(record: NodeRecord, event: NodeFinished) -> None:
    record.ended = event.time.timestamp()
    record.status, record.reason = event.status, event.reason
    record.message, record.root_causes = event.message, event.root_causes
    record.elapsed_s = event.execute_s if event.execute_s is not None else event.compile_s


def agrees(
    dbt_status: str, dbt_message: str | None, status: NodeStatus, reason: Reason | None
) -> bool:
    """Whether dbt's result says what a node's terminal event does.

    dbt has fewer words: `skipped` is also what never started, `error` what was cancelled.
    """
    said = DBT_NODE_STATUS.get(dbt_status, NodeStatus.ERROR)
    if said is NodeStatus.SKIPPED:
        return status in _SKIP_IS or (
            # Interrupted by --fail-fast, and in dbt's results as if it had never begun.
            reason is Reason.FAIL_FAST and dbt_message == FAIL_FAST_MESSAGE
        )
    return status in _ERROR_IS if said is NodeStatus.ERROR else status is said
