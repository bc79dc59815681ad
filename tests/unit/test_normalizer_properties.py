"""Whatever dbt does and however it ends, the guarantees hold.

Hypothesis draws a project and how each node will fare; a small model of `dbt build` tells the
frames in an order that dbt could take, with parents before children and skips passed on; then
the run ends in some way at some point.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dbtstream import frames
from dbtstream.endings import Ended
from dbtstream.events import NodeStarted
from dbtstream.statuses import DBT_NODE_STATUS, NodeStatus, Reason
from tests.guarantees import check_run_results
from tests.stories import Story, node

FAIL_FAST = "Skipping due to fail_fast"
BAD = {"error", "fail", "raised"}

Step = tuple[type[frames.Frame], dict[str, Any]]


@dataclass
class Project:
    """Selected nodes in an order in which each comes after its upstreams."""

    nodes: list[frames.PlannedNode]
    outcome: dict[str, str]  # success, warn, error, fail; raised: no NodeFinished, but a result
    threads: int
    parents: dict[str, set[str]] = field(default_factory=dict)  # as dbt's queue sees them

    def __post_init__(self) -> None:
        above: dict[str, set[str]] = {}
        for n in self.nodes:
            if n.resource_type != "unit_test":
                ups = set(n.upstream)
                above[n.unique_id] = ups.union(*(above[up] for up in ups))
        tests = [n for n in self.nodes if n.resource_type == "test"]
        for n in self.nodes:
            parents = set(n.upstream)
            if n.resource_type == "unit_test":
                parents = self.parents[n.upstream[0]]
            if n.resource_type == "model":
                # Linker.add_test_edges: tests whose parents are all above the model.
                parents |= {t.unique_id for t in tests if set(t.upstream) <= above[n.unique_id]}
            self.parents[n.unique_id] = parents
        for n in self.nodes:
            if n.resource_type == "unit_test":
                self.parents[n.upstream[0]].add(n.unique_id)
        for n in self.nodes:
            if n.resource_type == "unit_test":
                self.parents[n.unique_id] = self.parents[n.upstream[0]] - self.unit_tests()

    def unit_tests(self) -> set[str]:
        return {n.unique_id for n in self.nodes if n.resource_type == "unit_test"}

    def is_ephemeral(self, name: str) -> bool:
        return any(n.unique_id == name and n.materialized == "ephemeral" for n in self.nodes)


@st.composite
def projects(draw: st.DrawFn) -> Project:
    nodes: list[frames.PlannedNode] = []
    outcome: dict[str, str] = {}
    models: list[str] = []
    for i in range(draw(st.integers(1, 7))):
        name = f"model.shop.m{i}"
        ups = draw(st.lists(st.sampled_from(models), unique=True, max_size=3)) if models else []
        materialized = draw(st.sampled_from(["table", "view", "ephemeral"]))
        nodes.append(node(name, *ups, materialized=materialized))
        outcome[name] = draw(st.sampled_from(["success"] * 5 + ["error", "raised"]))
        models.append(name)
    for i in range(draw(st.integers(0, 4))):
        name = f"test.shop.t{i}.ab{i}"
        ups = draw(st.lists(st.sampled_from(models), unique=True, min_size=1, max_size=2))
        nodes.append(node(name, *ups))
        outcome[name] = draw(st.sampled_from(["pass", "pass", "warn", "fail", "error"]))
    for i in range(draw(st.integers(0, 1))):
        name = f"unit_test.shop.m{i}.u{i}"
        model = draw(st.sampled_from(models))
        nodes.append(node(name, model, name=f"u{i}"))
        outcome[name] = draw(st.sampled_from(["pass", "pass", "fail"]))
    return Project(nodes, outcome, draw(st.integers(1, 3)))


class Build:
    """A model of `dbt build`: takes ready nodes, runs them in threads, passes on skips."""

    def __init__(self, project: Project, random: Random) -> None:
        self.project, self.random = project, random
        self.ended: dict[str, str] = {}  # dbt's word, or "raised"
        self.running: list[str] = []
        self.results: list[frames.NodeResult] = []
        self._times = itertools.count(1)
        self._started_at: dict[str, str] = {}

    def steps(self) -> Iterator[Step]:
        waiting = [n.unique_id for n in self.project.nodes]
        while waiting or self.running:
            ready = [n for n in waiting if self.project.parents[n] <= set(self.ended)]
            may_start = bool(ready) and len(self.running) < self.project.threads
            if may_start and (not self.running or self.random.random() < 0.6):
                name = self.random.choice(ready)
                waiting.remove(name)
                yield from self._begin(name)
            else:
                name = self.running.pop(self.random.randrange(len(self.running)))
                yield from self._end(name, self.project.outcome[name])

    def _begin(self, name: str) -> Iterator[Step]:
        self._started_at[name] = f"2026-03-01T12:00:00.{next(self._times):06}"
        yield (
            frames.NodeStart,
            {"unique_id": name, "thread": "Thread-1", "started_at": self._started_at[name]},
        )
        if any(self.ended[p] in BAD | {"skipped"} for p in self.project.parents[name]):
            if not self.project.is_ephemeral(name):
                yield frames.NodeSkip, {"unique_id": name}
            yield from self._end(name, "skipped")
        else:
            yield frames.NodeWork, {"unique_id": name}
            self.running.append(name)

    def _end(self, name: str, word: str) -> Iterator[Step]:
        message = "Database Error in x\n  no" if word in ("error", "raised") else None
        if message:
            yield (
                frames.NodeError,
                {"unique_id": name, "error_class": "DbtDatabaseError", "message": message},
            )
        if word != "raised":
            yield (
                frames.NodeFinish,
                {
                    "unique_id": name,
                    "status": word,
                    "started_at": self._started_at[name],
                    "message": message,
                },
            )
        self.ended[name] = word
        if not self.project.is_ephemeral(name):
            status = "error" if word == "raised" else word
            self.results.append(frames.NodeResult(unique_id=name, status=status, message=message))

    def interrupted(self) -> Iterator[Step]:
        """After a cancel: some running nodes still tell their end, others do not."""
        for name in self.running:
            if self.random.random() < 0.7:
                yield from self._end(name, "error")


def plan(project: Project) -> Iterable[Step]:
    half = len(project.nodes) // 2
    for chunk in (project.nodes[:half], project.nodes[half:]):
        yield frames.Nodes, {"nodes": chunk}
    yield frames.Plan, {"node_count": len(project.nodes), "status": "complete"}


def told(steps: Iterable[Step]) -> Story:
    story = Story()
    story.hello()
    for kind, fields in steps:
        story.tell(kind, **fields)
    return story


def returned(story: Story, results: list[frames.NodeResult], **fields: Any) -> None:
    for i in range(0, len(results), 3):
        story.tell(frames.Results, results=results[i : i + 3])
    bad = any(r.status in BAD | {"skipped"} for r in results)
    facts: dict[str, Any] = {
        "success": not bad,
        "exit_code": int(bad),
        "result_count": len(results),
    }
    story.tell(frames.Result, **(facts | fields))


def expected_causes(project: Project, build: Build, name: str) -> set[str]:
    """The nearest bad parents in the graph that dbt works through."""
    causes: set[str] = set()
    for parent in project.parents[name]:
        if build.ended[parent] in BAD:
            causes.add(parent)
        elif build.ended[parent] == "skipped":
            causes |= expected_causes(project, build, parent)
    return causes


thorough = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
randoms = st.randoms(use_true_random=False)


@thorough
@given(projects(), randoms)
def test_a_build_that_ends_by_itself_has_each_outcome_and_each_cause(
    project: Project, random: Random
) -> None:
    build = Build(project, random)
    story = told([*plan(project), *build.steps()])
    returned(story, build.results)
    story.end()

    ends = {name: story.end_of(name) for name in build.ended}
    for name, word in build.ended.items():
        assert ends[name].status is DBT_NODE_STATUS.get(word, NodeStatus.ERROR)
    causes = {n: set(ends[n].root_causes) for n, w in build.ended.items() if w == "skipped"}
    assert causes == {n: expected_causes(project, build, n) for n in causes}
    assert story.finished.verified
    check_run_results(story.events, {r.unique_id: r.status for r in build.results})


@thorough
@given(projects(), randoms, st.data())
def test_a_child_may_die_after_any_frame(
    project: Project, random: Random, data: st.DataObject
) -> None:
    steps = [*plan(project), *Build(project, random).steps()]
    length = data.draw(st.integers(0, len(steps)), label="frames before the end")
    how = data.draw(st.sampled_from([Ended.CRASHED, Ended.WORKER_LOST]))
    stop = data.draw(st.sampled_from([None, Reason.CANCELLED, Reason.TIMEOUT]))
    story = told(steps[:length])
    story.end(how, stop=stop, oom=data.draw(st.booleans()))

    selected = {
        n.unique_id for kind, f in steps[:length] if kind is frames.Nodes for n in f["nodes"]
    }
    assert {e.node.unique_id for e in story.ends()} == selected


@thorough
@given(projects(), randoms, st.data())
def test_a_build_may_be_cancelled_at_any_time(
    project: Project, random: Random, data: st.DataObject
) -> None:
    build = Build(project, random)
    upto = data.draw(st.integers(0, 40), label="steps before the cancel")
    stop = data.draw(st.sampled_from([Reason.CANCELLED, Reason.TIMEOUT]))
    story = told([*plan(project), *itertools.islice(build.steps(), upto)])
    finished_before = {e.node.unique_id for e in story.ends()}
    story.cancel(stop)
    for kind, fields in build.interrupted():
        story.tell(kind, **fields)
    story.interrupt()
    story.end(stop=stop)

    started = {e.node.unique_id for e in story.all(NodeStarted)}
    for end in story.ends():
        name = end.node.unique_id
        if name not in finished_before:
            wanted = NodeStatus.CANCELLED if name in started else NodeStatus.NEVER_STARTED
            assert (end.status, end.reason) == (wanted, stop)


@thorough
@given(projects(), randoms, st.data())
def test_fail_fast_and_errors_of_the_run_leave_nothing_open(
    project: Project, random: Random, data: st.DataObject
) -> None:
    build = Build(project, random)
    upto = data.draw(st.integers(0, 40), label="steps before dbt stops")
    story = told([*plan(project), *itertools.islice(build.steps(), upto)])
    if data.draw(st.booleans(), label="fail fast"):
        known = {result.unique_id for result in build.results}
        rest = [
            frames.NodeResult(unique_id=n.unique_id, status="skipped", message=FAIL_FAST)
            for n in project.nodes
            if n.unique_id not in known
        ]
        returned(story, build.results + rest)
    else:
        error = frames.ErrorInfo(error_class="DbtRuntimeError", message="no")
        returned(story, [], success=False, exit_code=2, result_count=-1, error=error)
    story.end()

    assert {e.node.unique_id for e in story.ends()} == {n.unique_id for n in project.nodes}


@thorough
@given(projects(), randoms, st.data())
def test_another_worker_can_take_up_and_end_what_was_published(
    project: Project, random: Random, data: st.DataObject
) -> None:
    steps = [*plan(project), *Build(project, random).steps()]
    length = data.draw(st.integers(3, len(steps)), label="frames before the worker dies")
    story = told(steps[:length])
    in_flight = set(story.normalizer.in_flight)

    survivor = Story(fence=8, worker="w2")
    survivor.normalizer.recall(story.events)
    survivor.events = list(story.events)
    survivor.end(Ended.WORKER_LOST)

    lost = {e.node.unique_id for e in survivor.ends() if e.status is NodeStatus.LOST}
    assert lost == in_flight
    assert {e.node.unique_id for e in survivor.ends()} == {n.unique_id for n in project.nodes}
