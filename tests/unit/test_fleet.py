"""What `dbtstream top` knows and shows of a fleet: from answers and events, no NATS and no dbt."""

import io
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from rich.console import Console

from dbtstream.cli_top import top
from dbtstream.event_base import ErrorBlock
from dbtstream.events import (
    AnyEvent,
    NodeBlock,
    NodeCounts,
    NodeFinished,
    NodeStarted,
    RunCancel,
    RunFinished,
    RunPlanned,
    RunProgress,
    RunQueued,
    RunRejected,
)
from dbtstream.fleet import (
    FORGET_WORKER,
    MAX_ENDED,
    MAX_FAILURES,
    MAX_NODES,
    EndedRow,
    FailureRow,
    Fleet,
    FleetView,
    QueueRow,
    RunRow,
    WorkerRow,
)
from dbtstream.fleet_screen import Connection, fair_shares, fleet_frame
from dbtstream.messages import NodeAtWork, RunAtWork, RunList, RunView, WorkerStatus
from dbtstream.statuses import NodeStatus, RunStatus

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
RUN, OTHER = "0195512b-8a00-7000-8000-00000000000a", "0195512b-8a00-7000-8000-00000000000b"
HERE = Connection(servers=["nats://127.0.0.1:4222"])


def later(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def at_work(run_id: str = RUN, **facts: Any) -> RunAtWork:
    usual: dict[str, Any] = {
        "project": "shop",
        "target": "prod",
        "status": RunStatus.RUNNING,
        "args": ["build"],
        "last_seq": 10,
        "started_at": later(-34),
        "done": 4,
        "total": 10,
        "by_status": {"success": 4},
    }
    return RunAtWork(run_id=run_id, **usual | facts)


def status(worker: str = "w1", *runs: RunAtWork, **facts: Any) -> WorkerStatus:
    usual: dict[str, Any] = {
        "version": "0.1.0",
        "host": "h",
        "at": NOW,
        "started_at": later(-7500),
        "slots": 4,
        "used": len(runs),
        "projects": ["shop"],
    }
    return WorkerStatus(worker=worker, runs=list(runs), **usual | facts)


def envelope(seq: int, run_id: str = RUN, **changes: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "event_id": f"{run_id}.1.{seq}",
        "time": later(seq),
        "seq": seq,
        "project": "shop",
        "target": "prod",
        "run_id": run_id,
        "attempt": 1,
        "fence": 1,
        "worker": "w1",
    }
    return facts | changes


def block(name: str, resource_type: str = "model") -> NodeBlock:
    return NodeBlock(
        unique_id=f"{resource_type}.shop.{name}", resource_type=resource_type, name=name
    )


def node_started(name: str, seq: int, **changes: Any) -> NodeStarted:
    return NodeStarted(node=block(name), **envelope(seq, **changes))


def node_finished(name: str, seq: int, state: NodeStatus, **facts: Any) -> NodeFinished:
    message = facts.pop("message", None)
    kind = facts.pop("resource_type", "model")
    return NodeFinished(
        node=block(name, kind), status=state, message=message, **envelope(seq, **facts)
    )


def run_finished(seq: int, state: RunStatus, run_id: str = RUN, **facts: Any) -> RunFinished:
    usual: dict[str, Any] = {"exit_code": 0, "elapsed_s": 12.5}
    return RunFinished(status=state, **usual | facts, **envelope(seq, run_id))


def ended_view(run_id: str, state: RunStatus, **facts: Any) -> RunView:
    usual: dict[str, Any] = {
        "project": "shop",
        "target": "prod",
        "args": ["build"],
        "attempt": 1,
        "started_at": later(-60),
        "finished_at": later(-20),
        "exit_code": 1,
    }
    return RunView(run_id=run_id, status=state, **usual | facts)


@pytest.fixture
def fleet() -> Fleet:
    """One worker with one run: four of ten nodes done, up to event 10."""
    fleet = Fleet()
    tell(fleet, [status("w1", at_work())])
    return fleet


def tell(fleet: Fleet, answers: Iterable[WorkerStatus], at: datetime = NOW) -> None:
    fleet.take_workers(answers, asked_at=at, at=at)


def hear(fleet: Fleet, *events: AnyEvent, at: datetime = NOW) -> None:
    for event in events:
        fleet.take_event(event, at)


def only_run(fleet: Fleet) -> RunRow:
    (run,) = fleet.view(NOW).runs
    return run


# -- what is known ---------------------------------------------------------------------------


def test_events_go_on_from_where_the_worker_s_answer_ends(fleet: Fleet) -> None:
    """None is counted twice: those up to its `last_seq` are in the answer already."""
    hear(
        fleet,
        node_started("orders", 10),
        node_finished("orders", 10, NodeStatus.SUCCESS),
        node_started("customers", 11),
        node_finished("payments", 12, NodeStatus.WARN),
    )

    run = only_run(fleet)
    assert (run.done, run.total) == (5, 10)
    assert run.by_status == {"success": 4, "warn": 1}
    assert [node.name for node in run.nodes] == ["customers"]


def test_an_answer_that_is_behind_the_events_does_not_take_them_back(fleet: Fleet) -> None:
    hear(fleet, node_finished("orders", 12, NodeStatus.SUCCESS))
    tell(fleet, [status("w1", at_work(last_seq=11))])

    assert only_run(fleet).done == 5


def test_an_answer_makes_good_what_was_not_heard(fleet: Fleet) -> None:
    tell(fleet, [status("w1", at_work(last_seq=40, done=9, by_status={"success": 9}))])

    assert only_run(fleet).done == 9


def test_progress_that_is_told_counts_more_than_what_was_counted(fleet: Fleet) -> None:
    """Some events between may have been missed."""
    counts = NodeCounts(done=8, running=2, total=10, by_status={"success": 7, "error": 1})
    hear(fleet, RunProgress(counts=counts, eta_s=3.0, **envelope(30)))

    run = only_run(fleet)
    assert (run.done, run.running, run.eta_s) == (8, 2, 3.0)
    assert run.by_status == {"success": 7, "error": 1}


def test_a_run_is_followed_from_its_first_event(fleet: Fleet) -> None:
    hear(
        fleet,
        RunQueued(args=["test"], **envelope(1, OTHER, target="dev")),
        RunPlanned(node_count=2, **envelope(4, OTHER, target="dev")),
        node_finished("a", 5, NodeStatus.SUCCESS, run_id=OTHER, target="dev"),
        RunCancel(step="interrupting", **envelope(6, OTHER, target="dev")),
    )

    run = fleet.view(NOW).runs[1]
    assert (run.run_id, run.args, run.target) == (OTHER, ["test"], "dev")
    assert (run.done, run.total, run.cancel) == (1, 2, "interrupting")


def test_hooks_are_no_part_of_what_is_done(fleet: Fleet) -> None:
    hear(fleet, node_finished("hook", 11, NodeStatus.SUCCESS, resource_type="operation"))

    assert only_run(fleet).done == 4


def test_another_attempt_begins_anew(fleet: Fleet) -> None:
    hear(fleet, RunPlanned(node_count=6, **envelope(12, attempt=2, worker="w2")))
    hear(fleet, node_finished("old", 13, NodeStatus.LOST))

    run = only_run(fleet)
    assert (run.attempt, run.worker, run.done, run.total) == (2, "w2", 0, 6)
    assert run.by_status == {}


def test_a_run_that_ended_moves_to_those_that_did_and_does_not_come_back(fleet: Fleet) -> None:
    hear(fleet, run_finished(20, RunStatus.SUCCESS))
    late = RunView(run_id=RUN, project="shop", target="prod", status=RunStatus.RUNNING, worker="w1")
    tell(fleet, [status("w1", at_work(last_seq=19))])
    fleet.take_runs(RunList(runs=[late]), NOW)
    hear(fleet, node_started("orders", 19))

    view = fleet.view(NOW)
    assert view.runs == []
    assert [(row.run_id, row.status, row.elapsed_s) for row in view.ended] == [
        (RUN, RunStatus.SUCCESS, 12.5)
    ]


def test_a_run_that_its_worker_has_no_more_is_not_under_way(fleet: Fleet) -> None:
    """It was given back, or we missed its end."""
    fleet.take_workers([status("w1")], asked_at=later(2), at=later(3))

    assert fleet.view(later(3)).runs == []


def test_a_run_that_began_while_the_worker_was_asked_stays(fleet: Fleet) -> None:
    hear(fleet, node_started("orders", 11), at=later(2.5))
    fleet.take_workers([status("w1")], asked_at=later(2), at=later(3))

    assert len(fleet.view(later(3)).runs) == 1


def test_a_worker_that_does_not_answer_is_shown_for_a_while_with_its_runs(fleet: Fleet) -> None:
    tell(fleet, [], at=later(12))
    view = fleet.view(later(12))
    assert [(row.worker, row.silent_s) for row in view.workers] == [("w1", 12.0)]
    assert [run.run_id for run in view.runs] == [RUN]

    tell(fleet, [], at=NOW + FORGET_WORKER + timedelta(seconds=1))
    view = fleet.view(NOW + FORGET_WORKER + timedelta(seconds=1))
    assert (view.workers, view.runs) == ([], [])


def test_a_worker_that_answers_again_is_silent_no_more(fleet: Fleet) -> None:
    tell(fleet, [], at=later(2))
    tell(fleet, [status("w1")], at=later(4))

    assert fleet.view(later(4)).workers[0].silent_s is None


def test_a_worker_that_was_draining_has_left_when_it_does_not_answer(fleet: Fleet) -> None:
    tell(fleet, [status("w1", draining=True)], at=later(2))
    assert fleet.view(later(2)).workers[0].draining

    tell(fleet, [], at=later(4))
    assert fleet.view(later(4)).workers == []


def test_a_worker_that_was_started_again_is_one_and_two_of_one_name_are_two(fleet: Fleet) -> None:
    again = status("w1", started_at=later(1))
    tell(fleet, [again], at=later(2))
    assert [row.started_at for row in fleet.view(later(2)).workers] == [later(1)]

    tell(fleet, [again, status("w1", at_work(), host="h2", started_at=later(3))], at=later(4))
    assert [row.host for row in fleet.view(later(4)).workers] == ["h", "h2"]


def test_the_queue_is_what_control_lists_and_what_it_waits_for_what_runs(fleet: Fleet) -> None:
    waiting = {"shop.prod": 3, "shop.dev": 5, "crm.prod": 0}
    fleet.take_runs(RunList(runs=[], waiting=waiting, waiting_since={"shop.prod": later(-90)}), NOW)

    dev, prod = fleet.view(NOW).queues
    assert (dev.target, dev.waiting, dev.running, dev.oldest_wait_s) == ("dev", 5, None, None)
    assert (prod.target, prod.waiting, prod.running, prod.oldest_wait_s) == ("prod", 3, RUN, 90.0)


def test_a_run_whose_worker_tells_nothing_is_known_from_the_list() -> None:
    fleet = Fleet()
    running = ended_view(RUN, RunStatus.RUNNING, worker="old", finished_at=None)
    queued = ended_view(OTHER, RunStatus.QUEUED, finished_at=None, started_at=None)
    fleet.take_runs(RunList(runs=[running, queued]), NOW)

    run = only_run(fleet)
    assert (run.worker, run.total, run.elapsed_s) == ("old", None, 60.0)
    tell(fleet, [status("w1")], at=later(1))
    assert only_run(fleet) == run


def test_failures_are_nodes_that_did_not_pass_and_runs_that_did_not_get_so_far(
    fleet: Fleet,
) -> None:
    error = ErrorBlock(class_="DbtProjectError", message="no dbt_project.yml")
    hear(
        fleet,
        node_finished("orders", 11, NodeStatus.ERROR, message="no such table"),
        node_finished("later", 12, NodeStatus.SKIPPED),
        RunRejected(code="expired", message="too late", **envelope(1, OTHER)),
        run_finished(13, RunStatus.ERROR, error=error),
    )

    failures = fleet.view(NOW).failures
    assert [(row.name, row.status, row.message) for row in failures] == [
        (None, "error", "no dbt_project.yml"),
        ("orders", "error", "no such table"),
        (None, "rejected", "expired: too late"),
    ]


def test_a_stored_failure_that_was_heard_live_is_one(fleet: Fleet) -> None:
    failed = node_finished("orders", 11, NodeStatus.FAIL)
    hear(fleet, failed)
    fleet.take_failure(failed)
    fleet.take_failure(node_finished("earlier", 9, NodeStatus.ERROR))

    assert [row.name for row in fleet.view(NOW).failures] == ["orders", "earlier"]


def test_stored_failures_are_looked_for_from_the_first_run_that_has_some() -> None:
    fleet = Fleet()
    assert fleet.failed_since() is None
    tell(fleet, [status("w1", at_work())])
    good = ended_view(OTHER, RunStatus.SUCCESS, started_at=later(-9999))
    fleet.take_runs(RunList(runs=[good]), NOW)
    assert fleet.failed_since() is None

    tell(fleet, [status("w1", at_work(last_seq=11, by_status={"error": 1}))])
    since = fleet.failed_since()
    assert since is not None
    assert later(-34) - timedelta(minutes=5) < since < later(-34)
    fleet.take_runs(RunList(runs=[ended_view(OTHER, RunStatus.FAILURE)]), NOW)
    since = fleet.failed_since()
    assert since is not None
    assert since < later(-60)


def test_another_project_is_left_out() -> None:
    fleet = Fleet(project="shop", target="prod")
    other = at_work(OTHER, project="crm")
    tell(fleet, [status("w1", at_work(), other)])
    crm = ended_view(OTHER, RunStatus.FAILURE, project="crm")
    fleet.take_runs(RunList(runs=[crm], waiting={"crm.prod": 1, "shop.dev": 2}), NOW)
    failed = node_finished("a", 1, NodeStatus.ERROR, run_id=OTHER, project="crm")
    hear(fleet, failed)
    fleet.take_failure(failed)

    view = fleet.view(NOW)
    assert [run.project for run in view.runs] == ["shop"]
    assert (view.queues, view.ended, view.failures) == ([], [], [])
    assert view.workers[0].used == 2


def test_events_per_second_are_those_of_the_last_whole_seconds() -> None:
    fleet = Fleet()
    assert fleet.view(NOW).events_per_s is None
    fleet.watch_events(NOW)
    assert fleet.view(NOW).events_per_s == 0.0
    for second in range(5):
        for number in range(20):
            hear(fleet, node_started("a", 20 * second + number), at=later(second + 0.5))

    assert fleet.view(later(5)).events_per_s == 20.0
    assert fleet.view(later(60)).events_per_s == 0.0


def test_memory_is_bounded_whatever_comes(fleet: Fleet) -> None:
    for seq in range(11, 5_011):
        hear(fleet, node_started(f"n{seq}", seq), at=later(seq))
    for seq in range(5_011, 10_011):
        hear(fleet, node_finished(f"f{seq}", seq, NodeStatus.ERROR, message="x" * 10_000))
    for number in range(1_000):
        hear(fleet, run_finished(1, RunStatus.SUCCESS, f"{number:08d}{RUN[8:]}"), at=NOW)

    view = fleet.view(NOW)
    assert len(view.runs[0].nodes) == MAX_NODES
    assert len(view.failures) == MAX_FAILURES
    assert len(view.ended) == MAX_ENDED
    assert len(msgspec.json.encode(view)) < 500_000


@pytest.mark.parametrize(
    "part", [FleetView, WorkerRow, QueueRow, RunRow, EndedRow, FailureRow], ids=lambda k: k.__name__
)
def test_the_help_names_every_field_of_the_json(part: type[msgspec.Struct]) -> None:
    text = " ".join((top.help or "").split())
    fields = [field.name for field in msgspec.structs.fields(part)]
    if part is FleetView:
        assert [name for name in fields if f"`{name}`" not in text] == []
    else:
        assert f"({', '.join(fields)})" in text


# -- what is seen ----------------------------------------------------------------------------


def drawn(
    view: FleetView, connection: Connection = HERE, *, width: int = 80, height: int | None = None
) -> list[str]:
    console = Console(record=True, width=width, file=io.StringIO(), color_system=None)
    console.print(fleet_frame(view, connection, height=height))
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.fixture
def busy() -> FleetView:
    """Two workers, a queue, three runs, failures."""
    fleet = Fleet()
    node = NodeAtWork(
        unique_id="model.shop.orders", resource_type="model", name="orders", started_at=later(-12)
    )
    counts = {"success": 118, "error": 2, "warn": 1, "skipped": 4}
    shop = at_work(
        done=125, total=300, by_status=counts, nodes=[node], running=4, eta_s=47.0, queued_at=NOW
    )
    waits = at_work(OTHER, target="dev", status=RunStatus.QUEUED, started_at=None, total=None)
    tell(fleet, [status("etl-1", shop, waits, used=4), status("etl-2", draining=True)])
    fleet.take_runs(
        RunList(
            runs=[ended_view("0195512b-0000-7000-8000-00000000000c", RunStatus.FAILURE)],
            waiting={"shop.prod": 3},
            waiting_since={"shop.prod": later(-130)},
        ),
        NOW,
    )
    message = "\x1b[31mDatabase Error\x1b[0m in model orders\n  no such table " + "very " * 40
    failed = node_finished("orders_by_day", 40, NodeStatus.ERROR, message=message, worker="etl-1")
    hear(fleet, failed)
    fleet.watch_events(NOW)
    return fleet.view(NOW)


def test_everything_is_on_the_screen_at_80_columns(busy: FleetView) -> None:
    assert drawn(busy) == [
        "dbtstream top  12:00:00  nats://127.0.0.1:4222",
        "2 workers · 4/8 slots · 2 runs under way · 3 waiting · 0.0 events/s",
        "",
        "WORKER  SLOTS            VERSION  UP        STATE     PROJECTS",
        "etl-1   4/4    ━━━━━━━━  0.1.0    2 h 05 m  full      shop",
        "etl-2   0/4    ────────  0.1.0    2 h 05 m  draining  shop",
        "",
        "QUEUE      WAITING  OLDEST    BEHIND",
        "shop.prod  3        2 m 10 s  run 0000000a",
        "",
        "RUN       OF         STATUS   PROGRESS                   LEFT   TOOK  WORKER",
        "0000000a  shop.prod  running  ━━━━━━──────────  126/300  ~47 s  34 s  etl-1",
        "    1 warn  3 error  4 skipped  model orders 12 s, 3 more",
        "0000000b  shop.dev   waits    ────────────────                        etl-1",
        "",
        "FAILED    OF         RUN       WHAT                 STATUS  MESSAGE",
        "12:00:40  shop.prod  0000000a  model orders_by_day  error   Database Error in m…",
        "",
        "ENDED     OF         RUN       STATUS   TOOK    DBT",
        "11:59:40  shop.prod  0000000c  failure  40.0 s  build",
    ]


@pytest.mark.parametrize("width", [20, 40, 79, 200])
@pytest.mark.parametrize("height", [1, 2, 3, 5, 8, 12, 16, 24, 60])
def test_it_is_never_wider_or_higher_than_the_screen(
    busy: FleetView, width: int, height: int
) -> None:
    lines = drawn(busy, width=width, height=height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


def test_in_little_room_what_runs_is_there_and_the_past_is_not(busy: FleetView) -> None:
    text = "\n".join(drawn(busy, height=14))
    assert "126/300" in text
    assert "etl-2" in text
    assert "ENDED" not in text


def test_what_has_no_room_is_counted() -> None:
    fleet = Fleet()
    tell(fleet, [status(f"w{number:02d}") for number in range(40)])
    lines = drawn(fleet.view(NOW), height=20)
    shown = [line for line in lines if line.startswith("w")]
    assert 10 < len(shown) < 20
    assert f"… {40 - len(shown)} more lines" in lines


def test_who_wants_little_gets_it() -> None:
    assert fair_shares([2, 50, 4, 50], 26) == [2, 10, 4, 10]
    assert fair_shares([2, 3], 100) == [2, 3]
    assert fair_shares([], 5) == []


def test_colours_say_how_it_is(busy: FleetView) -> None:
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
    console.print(fleet_frame(busy, HERE))
    styled = console.export_text(styles=True)
    for coloured in ("\x1b[33mdraining", "\x1b[31merror", "\x1b[36mrunning", "\x1b[31mfailure"):
        assert coloured in styled
    assert "\x1b[31m━━━━━━" in styled  # the bar of a run with errors


def test_orders_to_the_terminal_in_a_message_are_not_passed_on() -> None:
    fleet = Fleet()
    bad = "\x1b]0;owned\x07 \x9b2J\x1b[2J ends"
    hear(fleet, node_finished("orders", 1, NodeStatus.ERROR, message=bad))
    lines = drawn(fleet.view(NOW), width=120)
    assert not any(character in "".join(lines) for character in "\x1b\x07\x9b")
    assert "ends" in "".join(lines)


def test_nobody_there_is_said() -> None:
    lines = drawn(Fleet().view(NOW))
    assert lines[3:] == ["no worker answers", "", "nothing runs"]


def test_an_outage_is_said_and_goes_before_other_problems(busy: FleetView) -> None:
    away = Connection(servers=["nats://a:1"], away_since=later(-5), problem="no answer")
    assert drawn(busy, away)[2].startswith("NATS is away since 11:59:55")
    problem = Connection(servers=["nats://a:1"], problem="no dbtstream\ndaemon answers")
    assert drawn(busy, problem)[2] == "no dbtstream daemon answers"


def test_a_silent_worker_is_said(fleet: Fleet) -> None:
    tell(fleet, [], at=later(70))
    text = "\n".join(drawn(fleet.view(later(70))))
    assert "silent for 1 m 10 s" in text
