"""What events come to in numbers: which instrument moves, by how much, under which attributes."""

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from dbtstream import frames
from dbtstream import instruments as i
from dbtstream.endings import Ended, Ending
from dbtstream.event_base import ErrorBlock
from dbtstream.events import AnyEvent, TestBlock
from dbtstream.instruments import INSTRUMENTS, Instrument, Kind
from dbtstream.measurements import (
    CUSTOM,
    MAX_OWNERS,
    NO_OWNER,
    OTHER,
    AttemptMeasurements,
    Known,
    Measurement,
    command_in,
    last_completions,
)
from dbtstream.messages import RunView
from dbtstream.normalizer import Normalizer
from dbtstream.statuses import Reason, RunStatus
from tests.stories import BEGIN, RUN_ID, Story, context, node

ORDERS, DAILY, TEST = "model.shop.orders", "model.shop.daily", "test.shop.unique_id.abc"
SHOP = {i.PROJECT: "shop", i.TARGET: "prod"}


def known() -> Known:
    return Known({"shop": ("prod", "dev")})


class Measured:
    """All measurements of a story."""

    def __init__(
        self, told: Story, knows: Known | None = None, events: list[AnyEvent] | None = None
    ) -> None:
        about = told.normalizer.context
        self.known = knows or known()
        attempt = AttemptMeasurements.of(self.known, about.project, about.target, about.command)
        self.all: list[Measurement] = [
            m for event in events or told.events for m in attempt.take(event)
        ]

    def of(self, instrument: Instrument) -> list[tuple[float, dict[str, str]]]:
        """Without zeros, which only make a series be there."""
        found = (m for m in self.all if m.instrument is instrument and m.value)
        return [(m.value, dict(m.attributes)) for m in found]

    def one(self, instrument: Instrument) -> tuple[float, dict[str, str]]:
        (found,) = self.of(instrument)
        return found

    def values(self, instrument: Instrument, attribute: str) -> dict[str, float]:
        return {attributes.get(attribute, ""): value for value, attributes in self.of(instrument)}


def story(*nodes: frames.PlannedNode, **changes: Any) -> Story:
    told = Story(**changes)
    told.events += told.normalizer.queued(told.now)
    return told.plan(*nodes)


def ended(told: Story, exit_code: int = 0, **result: Any) -> Story:
    told.result(exit_code, **result)
    told.end(exit_code=exit_code, pid=4711, exited_at=told.now)
    return told


def test_a_run_that_succeeds() -> None:
    told = story(node(ORDERS))
    told.run(ORDERS, adapter_response={"rows_affected": 7.0})
    measured = Measured(ended(told, stats=frames.ChildStats(max_rss_bytes=9000, cpu_s=1.5)))

    finished = told.finished
    run = SHOP | {i.COMMAND: "build", i.RUN_STATUS: "success"}
    assert measured.one(i.RUN_DURATION) == (finished.elapsed_s, run)
    assert measured.one(i.RUNS_ENDED) == (1, SHOP | {i.RUN_STATUS: "success"})
    assert measured.one(i.RUN_LAST_COMPLETION) == (finished.time.timestamp(), run)
    assert measured.one(i.RUN_LAST_DURATION) == (finished.elapsed_s, SHOP | {i.COMMAND: "build"})
    assert measured.one(i.RUN_QUEUE_DURATION) == (2.0, SHOP)
    assert measured.one(i.NODE_ROWS) == (7, SHOP | {i.NODE_TYPE: "model"})
    assert measured.one(i.CHILD_STARTS) == (1, {i.PROJECT: "shop", i.START: "cold"})
    assert measured.one(i.CHILD_EXITS) == (1, {i.PROJECT: "shop", i.REASON: "ok"})
    assert measured.one(i.CHILD_CPU) == (1.5, {i.PROJECT: "shop"})
    assert measured.one(i.CHILD_MEMORY) == (9000, SHOP)
    assert set(measured.values(i.PHASE_DURATION, i.PHASE)) == {
        *("queue", "startup", "parse", "execute", "finalize")
    }
    assert measured.of(i.NODE_PROBLEMS) == measured.of(i.TEST_FAILURES) == []


def test_a_node_s_duration_is_from_its_start_to_its_end() -> None:
    told = story(node(ORDERS))
    told.run(ORDERS)
    value, attributes = Measured(ended(told)).one(i.NODE_DURATION)

    end = told.end_of(ORDERS)
    assert end.started_at is not None
    assert end.finished_at is not None
    assert value == (end.finished_at - end.started_at).total_seconds() > 0
    assert attributes == SHOP | {
        i.NODE_TYPE: "model",
        i.NODE_STATUS: "success",
        i.MATERIALIZATION: "view",
    }


def test_what_is_skipped_took_no_time_and_is_no_problem_of_its_owner() -> None:
    told = story(node(ORDERS, owners=["ada"]), node(DAILY, ORDERS, owners=["bob"]))
    told.fail(ORDERS)
    told.skip(DAILY)
    measured = Measured(ended(told, 1))

    durations = {a[i.NODE_STATUS]: (v, a) for v, a in measured.of(i.NODE_DURATION)}
    assert "skipped" not in durations  # it took 0, and zeros are left out here
    assert durations["error"][1][i.ERROR_TYPE] == "database_error"
    assert measured.values(i.NODE_PROBLEMS, i.OWNER) == {"ada": 1}


def test_tests_are_counted_by_severity_and_owner() -> None:
    told = story(
        node(ORDERS),
        node(TEST, ORDERS, owners=["ada", "bob"]),
        node("test.shop.other.def", ORDERS, test=TestBlock(severity="WARN")),
    )
    told.run(ORDERS)
    told.run(TEST, "fail", failures=3)
    told.run("test.shop.other.def", "warn", failures=4)
    measured = Measured(ended(told, 1))

    assert measured.values(i.TEST_FAILURES, i.SEVERITY) == {"error": 3, "warn": 4}
    assert measured.values(i.NODE_PROBLEMS, i.OWNER) == {"ada": 1, "bob": 1, NO_OWNER: 1}
    errors = {a[i.NODE_STATUS]: a.get(i.ERROR_TYPE) for _, a in measured.of(i.NODE_DURATION)}
    assert errors == {"success": None, "fail": "test_failed", "warn": None}
    assert measured.one(i.RUN_DURATION)[1][i.ERROR_TYPE] == "nodes_failed"


def test_an_owner_s_counters_begin_at_zero_before_there_can_be_a_problem() -> None:
    told = story(node(ORDERS, owners=["ada"]))
    told.start(ORDERS)
    zeros = [m for m in Measured(told).all if m.instrument is i.NODE_PROBLEMS]

    assert {(m.value, m.attributes[i.OWNER]) for m in zeros} == {(0, "ada")}
    assert {m.attributes[i.NODE_STATUS] for m in zeros} == {
        *("warn", "fail", "error", "partial_success")
    }


class TestSources:
    def checked(self, knows: Known, **statuses: tuple[str, float | None]) -> Measured:
        names = {f"source.shop.raw.{name}": status for name, status in statuses.items()}
        told = story(*(node(name) for name in names), command="source freshness")
        for name, (status, age_s) in names.items():
            told.start(name)
            told.finish(name, status)
            freshness = None if age_s is None else frames.Freshness(age_s=age_s)
            message = "Database Error in source" if status == "runtime error" else None
            told.returns(name, status, freshness=freshness, message=message)
        return Measured(ended(told, 1), knows)

    def test_are_counted_by_how_their_last_check_ended(self) -> None:
        knows = known()
        first = self.checked(knows, a=("pass", 10), b=("warn", 20), c=("error", 30), d=("pass", 1))
        assert first.values(i.SOURCES, i.FRESHNESS) == {"passed": 2, "warned": 1, "failed": 1}

        second = self.checked(knows, c=("pass", 2), d=("runtime error", None))
        assert second.values(i.SOURCES, i.FRESHNESS) == {"passed": 2, "warned": 1, "error": 1}
        assert knows.sources["shop", "prod"]["source.shop.raw.b"].age_s == 20
        assert second.one(i.SOURCES_CHECKED)[1] == SHOP

    def test_a_stale_one_has_a_word_of_its_own(self) -> None:
        measured = self.checked(known(), late=("error", 99))
        ((_, attributes),) = [
            (m.value, m.attributes) for m in measured.all if m.instrument is i.NODE_DURATION
        ]
        assert attributes[i.ERROR_TYPE] == "source_stale"

    def test_a_run_without_sources_says_nothing_of_them(self) -> None:
        told = story(node(ORDERS))
        told.run(ORDERS)
        assert Measured(ended(told)).of(i.SOURCES_CHECKED) == []


def test_a_killed_child() -> None:
    told = story(node(ORDERS))
    told.start(ORDERS)
    told.end(Ended.CRASHED, exit_code=-9, oom=True, pid=1, exited_at=told.now, error=crashed())
    measured = Measured(told)

    assert measured.values(i.CHILD_EXITS, i.REASON) == {"oom": 1}
    assert measured.one(i.RUN_DURATION)[1][i.ERROR_TYPE] == "oom"
    ((_, attributes),) = [
        (m.value, m.attributes) for m in measured.all if m.instrument is i.NODE_DURATION
    ]
    assert (attributes[i.NODE_STATUS], attributes[i.ERROR_TYPE]) == ("lost", "oom")


def test_a_cancelled_run_has_no_error() -> None:
    told = story(node(ORDERS))
    told.start(ORDERS)
    told.cancel()
    told.interrupt()
    told.end(exit_code=2, stop=Reason.CANCELLED, pid=1, exited_at=told.now)
    measured = Measured(told)

    assert i.ERROR_TYPE not in measured.one(i.RUN_DURATION)[1]
    assert measured.values(i.CHILD_EXITS, i.REASON) == {"interrupted": 1}
    assert measured.of(i.RUN_LAST_DURATION) == []


def test_a_run_taken_over_counts_its_takeover_and_no_exit_that_nobody_saw() -> None:
    told = story(node(ORDERS))
    told.start(ORDERS)
    successor = Normalizer(context(fence=8))
    successor.recall(told.events)
    events = successor.leased("worker_lost", told.now)
    events += successor.end(Ending(how=Ended.WORKER_LOST), at=told.now)
    measured = Measured(told, events=events)

    assert measured.one(i.RUN_TAKEOVERS) == (1, SHOP | {i.REASON: "worker_lost"})
    assert measured.of(i.CHILD_EXITS) == []
    assert measured.one(i.RUN_DURATION)[1][i.ERROR_TYPE] == "worker_lost"


def test_only_the_first_attempt_has_waited_in_the_queue_alone() -> None:
    assert Measured(story(node(ORDERS), attempt=2)).of(i.RUN_QUEUE_DURATION) == []


def test_what_was_dropped_is_counted_by_family_and_reason() -> None:
    told = story(node(ORDERS))
    told.events += told.normalizer.gap(
        "log", 5, "the outbox is full", at=told.now, from_seq=50, to_seq=54
    )
    told.tell(frames.Dropped, family="query", count=2)
    assert Measured(told).of(i.EVENT_DROPPED) == [
        (5, {i.FAMILY: "log", i.REASON: "outbox_full"}),
        (2, {i.FAMILY: "query", i.REASON: "child_queue_full"}),
    ]


class TestBounds:
    def test_names_that_the_config_does_not_know_are_other(self) -> None:
        told = Story(project="nobody", target="x")
        told.events += told.normalizer.rejected("unknown_project", "no", at=told.now)
        assert Measured(told).one(i.REQUESTS_REJECTED)[1] == {
            i.PROJECT: OTHER,
            i.REASON: "unknown_project",
        }

    def test_a_custom_materialization(self) -> None:
        told = story(node(ORDERS, materialized="my_own_thing"), node("fancy.shop.x"))
        told.run(ORDERS)
        told.run("fancy.shop.x")
        measured = Measured(ended(told))
        assert measured.values(i.NODE_DURATION, i.MATERIALIZATION).keys() == {CUSTOM}
        assert measured.values(i.NODE_DURATION, i.NODE_TYPE).keys() == {"model", OTHER}

    def test_owners_beyond_the_limit(self) -> None:
        knows = known()
        names = [f"owner-{n}" for n in range(MAX_OWNERS)]
        assert [knows.owner(name) for name in [*names, "late", names[0]]] == [
            *names,
            OTHER,
            names[0],
        ]

    def test_attributes_are_those_that_the_instrument_names(self) -> None:
        told = story(node(ORDERS, owners=["ada"]), node(TEST, ORDERS))
        told.run(ORDERS, adapter_response={"rows_affected": 1})
        told.run(TEST, "fail", failures=1)
        measured = [*Measured(ended(told, 1)).all, *known().at_zero()]

        assert measured
        for instrument, _, attributes in measured:
            assert attributes.keys() <= set(instrument.attributes), instrument.name

    def test_many_nodes_of_a_kind_are_one_series(self) -> None:
        told = story(*(node(f"model.shop.m{n}") for n in range(50)))
        for n in range(50):
            told.run(f"model.shop.m{n}")
        label_sets = {
            (m.instrument.name, *sorted(m.attributes.items())) for m in Measured(ended(told)).all
        }
        assert len([name for name, *_ in label_sets if name == i.NODE_DURATION.name]) == 1


def test_counters_begin_at_zero_for_all_projects_and_targets() -> None:
    zeros = known().at_zero()
    assert {m.value for m in zeros} == {0}
    assert {m.instrument.kind for m in zeros} == {Kind.COUNTER}
    runs = {
        (m.attributes[i.TARGET], m.attributes[i.RUN_STATUS])
        for m in zeros
        if m.instrument is i.RUNS_ENDED
    }
    statuses = ("success", "failure", "error", "cancelled", "timed_out", "lost")
    assert runs == {(target, status) for target in ("prod", "dev") for status in statuses}


class TestStoredRuns:
    def view(self, minute: int, status: RunStatus, *args: str, **fields: Any) -> RunView:
        at = BEGIN + timedelta(minutes=minute)
        facts: dict[str, Any] = {
            "attempt": 1,
            "started_at": at - timedelta(seconds=30),
            "finished_at": at if status.is_terminal else None,
        }
        return RunView(
            run_id=RUN_ID,
            project="shop",
            target="prod",
            status=status,
            args=list(args or ("build",)),
            **(facts | fields),
        )

    def told(self, *views: RunView) -> Iterable[tuple[str, float, str]]:
        return [
            (m.attributes[i.COMMAND], m.value, m.attributes.get(i.RUN_STATUS, ""))
            for m in last_completions(known(), views)
        ]

    def test_the_newest_of_each_kind_counts(self) -> None:
        at = BEGIN.timestamp()
        assert self.told(
            self.view(9, RunStatus.RUNNING),
            self.view(8, RunStatus.FAILURE),
            self.view(7, RunStatus.SUCCESS),
            self.view(6, RunStatus.SUCCESS),
            self.view(5, RunStatus.SUCCESS, "-q", "source", "freshness"),
        ) == [
            ("build", at + 480, "failure"),
            ("build", 30.0, ""),
            ("build", at + 420, "success"),
            ("source freshness", at + 300, "success"),
            ("source freshness", 30.0, ""),
        ]

    def test_a_rejected_request_was_no_run(self) -> None:
        assert self.told(self.view(1, RunStatus.ERROR, attempt=0)) == []

    def test_a_command_is_found_behind_flags(self) -> None:
        assert command_in(["--quiet", "docs", "generate"]) == "docs generate"
        assert command_in(["mystery"]) is None


def test_every_instrument_that_events_move_is_moved_here() -> None:
    """So that a new one is not forgotten: the others are of the daemon itself."""
    by_daemon = {
        *(i.EVENT_PUBLISHED, i.EVENT_LAG, i.LOOP_LAG),
        *(i.STAGE_RECEIVED, i.STAGE_SENT, i.STAGE_DROPPED, i.STAGE_FAILED),
    }
    observed = (Kind.OBSERVED, Kind.OBSERVED_COUNTER)
    moved = {m.instrument for m in known().at_zero()} | {
        *(i.RUN_DURATION, i.RUN_QUEUE_DURATION, i.RUN_LAST_COMPLETION, i.RUN_LAST_DURATION),
        *(i.PHASE_DURATION, i.NODE_DURATION, i.SOURCES, i.SOURCES_CHECKED),
        *(i.EVENT_DROPPED, i.CHILD_MEMORY),
    }
    assert {x for x in INSTRUMENTS if x.kind not in observed} == moved | by_daemon


def crashed() -> ErrorBlock:
    return ErrorBlock(class_="ChildCrashed", message="dbt's process ended (signal 9)")
