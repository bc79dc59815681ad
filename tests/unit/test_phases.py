"""The parts of an attempt, and what became of dbt's process, as `run.finished` tells them."""

import itertools
from datetime import timedelta

import pytest

from dbtstream import frames
from dbtstream.endings import Ended, Ending
from dbtstream.events import RunFinished
from dbtstream.normalizer import Normalizer
from dbtstream.phases import Phases
from dbtstream.statuses import Phase
from tests.stories import BEGIN, Story, context, node

ORDERS = "model.shop.orders"


def seconds(phases: Phases, ended_s: float) -> dict[str, tuple[float, float]]:
    return {
        timing.phase.value: (
            (timing.started_at - BEGIN).total_seconds(),
            (timing.finished_at - BEGIN).total_seconds(),
        )
        for timing in phases.timings(BEGIN + timedelta(seconds=ended_s))
    }


def test_each_part_ends_where_the_next_begins() -> None:
    story = Story()  # queued at 0, spawned at 2
    story.plan(node(ORDERS))
    story.run(ORDERS)
    story.result(0)
    story.end(pid=1, exited_at=story.now)
    timings = story.finished.phases

    assert [timing.phase for timing in timings] == list(Phase)
    assert timings[0].started_at == BEGIN
    assert timings[1].started_at == BEGIN + timedelta(seconds=2)
    for this, following in itertools.pairwise(timings):
        assert this.finished_at == following.started_at


def test_a_run_that_was_not_started_has_only_waited() -> None:
    assert seconds(Phases(BEGIN), 5.0) == {"queue": (0.0, 5.0)}


def test_what_did_not_begin_is_not_there() -> None:
    phases = Phases(BEGIN, spawned_at=BEGIN + timedelta(seconds=1))

    assert seconds(phases, 5.0) == {"queue": (0.0, 1.0), "startup": (1.0, 5.0)}


def test_a_dbt_that_never_returned_had_nothing_to_finalize() -> None:
    story = Story()
    story.plan(node(ORDERS))
    story.run(ORDERS)
    story.end(Ended.CRASHED, pid=1, exited_at=story.now)

    assert [timing.phase for timing in story.finished.phases][-1] is Phase.EXECUTE
    assert story.finished.phases[-1].finished_at == story.now - timedelta(seconds=0.1)


def test_a_command_without_nodes_parses_until_it_is_done() -> None:
    story = Story(command="parse")
    story.hello()
    story.result(0)
    story.end(pid=1, exited_at=story.now)

    assert [timing.phase for timing in story.finished.phases] == [
        Phase.QUEUE,
        Phase.STARTUP,
        Phase.PARSE,
        Phase.FINALIZE,
    ]


def test_a_command_without_nodes_may_have_other_things_to_do() -> None:
    story = Story(command="run-operation")
    story.hello()
    story.tell(frames.Parsed)
    parsed_at = story.now
    story.result(0)
    story.end(pid=1, exited_at=story.now)
    parse, execute, finalize = story.finished.phases[2:]

    assert (parse.phase, parse.finished_at) == (Phase.PARSE, parsed_at)
    assert (execute.phase, execute.finished_at) == (Phase.EXECUTE, finalize.started_at)


def test_a_clock_that_is_set_back_makes_no_part_of_less_than_nothing() -> None:
    phases = Phases(
        BEGIN,
        spawned_at=BEGIN + timedelta(seconds=9),
        invoked_at=BEGIN + timedelta(seconds=4),
        planned_at=BEGIN + timedelta(seconds=10),
    )

    assert seconds(phases, 3.0) == {
        "queue": (0.0, 9.0),
        "startup": (9.0, 9.0),
        "parse": (9.0, 10.0),
        "execute": (10.0, 10.0),
    }


def test_a_later_attempt_has_waited_since_the_run_was_taken_over() -> None:
    first = Story()
    first.events += first.normalizer.leased("first", BEGIN)
    first.plan(node(ORDERS))
    at = first.now + timedelta(seconds=60)
    closer = Normalizer(context())
    closer.recall(first.events)
    closing = closer.leased("worker_lost", at) + closer.end(
        Ending(how=Ended.WORKER_LOST), at=at, final=False
    )
    second = Normalizer(context(attempt=2))
    second.recall([*first.events, *closing])
    second.spawned(at + timedelta(seconds=3))
    finished = second.end(Ending(how=Ended.NOT_STARTED), at=at + timedelta(seconds=4))[-1]

    assert isinstance(finished, RunFinished)
    assert finished.phases[0].started_at == at


@pytest.mark.parametrize(
    ("code", "exit_code", "signal"),
    [(0, 0, None), (2, 2, None), (-9, None, "SIGKILL"), (-40, None, "SIG40")],
)
def test_how_the_process_ended_is_told(
    code: int, exit_code: int | None, signal: str | None
) -> None:
    story = Story()
    story.hello()
    story.end(Ended.CRASHED, pid=4711, exit_code=code, exited_at=story.now)
    process = story.finished.process

    assert process is not None
    assert (process.pid, process.exit_code, process.signal) == (4711, exit_code, signal)
    assert process.started_at == BEGIN + timedelta(seconds=2)


def test_of_a_process_that_nobody_saw_end_nothing_is_told() -> None:
    story = Story()
    story.hello()
    story.end(Ended.WORKER_LOST)

    assert story.finished.process is None
