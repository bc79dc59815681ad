"""What a person at a terminal sees of a run: fed with events, no NATS and no dbt."""

import io
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.console import Console, RenderableType

from dbtstream.event_base import ErrorBlock
from dbtstream.events import (
    AnyEvent,
    FailedNode,
    LogLine,
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
    RunStarted,
    SlowNode,
    decode_event,
)
from dbtstream.follow import exit_code_of_rejection
from dbtstream.messages import RejectCode, RunList, RunView
from dbtstream.screen import (
    MAX_RUNNING,
    JsonView,
    PlainView,
    ScreenView,
    lines_above,
    live_frame,
)
from dbtstream.statuses import NodeStatus, Reason, RunStatus
from dbtstream.tables import counts_table, run_summary, runs_table, view_lines
from dbtstream.terminal import MAX_PROBLEMS, RunPicture, duration, plain_line

BEGIN = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
RUN_ID = "0195512b-8a00-7000-8000-000000000001"


class Told:
    """Makes events of one run, one second apart, and feeds a picture with them."""

    def __init__(self) -> None:
        self.picture = RunPicture()
        self.seq = 0

    def envelope(self, **changes: Any) -> dict[str, Any]:
        self.seq += 1
        facts: dict[str, Any] = {
            "event_id": f"{RUN_ID}.1.{self.seq}",
            "time": BEGIN + timedelta(seconds=self.seq),
            "seq": self.seq,
            "project": "shop",
            "target": "prod",
            "run_id": RUN_ID,
            "attempt": 1,
            "fence": 1,
            "worker": "w1",
        }
        return facts | changes

    def tell(self, event: AnyEvent) -> AnyEvent:
        self.picture.apply(event)
        return event

    def queued(self, **changes: Any) -> AnyEvent:
        return self.tell(
            RunQueued(args=["build", "--select", "orders+"], **self.envelope(**changes))
        )

    def began(self, nodes: int, **changes: Any) -> None:
        self.queued(**changes)
        self.tell(run_started(self.envelope(**changes)))
        self.tell(RunPlanned(node_count=nodes, **self.envelope(**changes)))

    def started(self, name: str, **changes: Any) -> AnyEvent:
        return self.tell(
            NodeStarted(node=block(name), index=1, total=3, **self.envelope(**changes))
        )

    def finished(self, name: str, status: NodeStatus, **facts: Any) -> NodeFinished:
        kind = facts.pop("resource_type", "model")
        event = NodeFinished(node=block(name, kind), status=status, **facts, **self.envelope())
        self.tell(event)
        return event

    def ended(self, status: RunStatus, **facts: Any) -> RunFinished:
        facts = {"exit_code": 0, "elapsed_s": 75.0} | facts
        event = RunFinished(status=status, **facts, **self.envelope())
        self.tell(event)
        return event

    def log(self, name: str, message: str, level: str = "info") -> LogLine:
        return LogLine(level=level, code="X001", name=name, message=message, **self.envelope())


def run_started(envelope: dict[str, Any]) -> RunStarted:
    return RunStarted(
        args=["build", "--select", "orders+"],
        dbt_version="1.11.16",
        adapter_type="duckdb",
        adapter_version="1.11.1",
        python_version="3.11.7",
        host="h",
        pid=1,
        queue_wait_s=0.1,
        start="cold",
        start_s=1.0,
        **envelope,
    )


def block(name: str, resource_type: str = "model") -> NodeBlock:
    return NodeBlock(
        unique_id=f"{resource_type}.shop.{name}", resource_type=resource_type, name=name
    )


def rendered(*what: RenderableType) -> str:
    console = Console(record=True, width=100, file=io.StringIO(), color_system=None)
    console.print(*what)
    return console.export_text()


@pytest.fixture
def told() -> Told:
    return Told()


def test_a_picture_counts_what_is_done_and_forgets_a_node_that_has_finished(told: Told) -> None:
    told.began(nodes=3)
    told.started("orders")
    told.started("customers")
    told.finished("orders", NodeStatus.SUCCESS)

    picture = told.picture
    assert (picture.done, picture.total) == (1, 3)
    assert list(picture.running) == ["model.shop.customers"]
    assert picture.by_status == {NodeStatus.SUCCESS: 1}
    assert picture.status is RunStatus.RUNNING


def test_hooks_are_not_counted_as_done_for_dbt_does_not_plan_them(told: Told) -> None:
    told.began(nodes=1)
    told.finished("shop-on-run-start-0", NodeStatus.SUCCESS, resource_type="operation")
    told.finished("orders", NodeStatus.SUCCESS)

    assert (told.picture.done, told.picture.total) == (1, 1)


def test_a_second_attempt_begins_its_counts_anew(told: Told) -> None:
    """A resumed run does only what had not succeeded; its bar must not start half full."""
    told.began(nodes=3)
    told.started("orders")
    told.finished("customers", NodeStatus.SUCCESS)
    told.tell(run_started(told.envelope(attempt=2)))
    told.tell(RunPlanned(node_count=2, **told.envelope(attempt=2)))

    assert (told.picture.done, told.picture.total, told.picture.running) == (0, 2, {})


def test_the_elapsed_time_is_dbtstreams_own_figure_once_the_run_has_ended(told: Told) -> None:
    told.began(nodes=1)
    assert told.picture.elapsed_s(BEGIN + timedelta(seconds=31)) == 30
    # A worker's clock ahead of ours gives no negative time.
    assert told.picture.elapsed_s(BEGIN - timedelta(seconds=31)) == 0
    told.ended(RunStatus.SUCCESS, elapsed_s=12.5)
    assert told.picture.elapsed_s(BEGIN + timedelta(days=1)) == 12.5


def test_only_so_many_failed_nodes_keep_their_message_but_all_are_counted(told: Told) -> None:
    told.began(nodes=1000)
    for number in range(MAX_PROBLEMS + 50):
        told.finished(f"m{number}", NodeStatus.ERROR, message="boom")

    assert len(told.picture.problems) == MAX_PROBLEMS
    assert told.picture.problem_count == MAX_PROBLEMS + 50


def test_plain_lines_say_what_happened_in_one_line_each(told: Told) -> None:
    def line(event: AnyEvent) -> str:
        text = plain_line(event)
        assert text is not None
        assert "\n" not in text
        return " ".join(text.split())

    assert line(told.queued()).endswith("queued: dbt build --select orders+")
    assert line(told.tell(run_started(told.envelope()))).endswith("(dbt 1.11.16, duckdb 1.11.1)")
    assert line(told.started("orders")) == "12:00:03 START model orders (1 of 3)"
    ok = told.finished("orders", NodeStatus.SUCCESS, execute_s=1.25, rows_affected=1200)
    assert line(ok) == "12:00:04 OK model orders 1.25 s, 1,200 rows"
    bad = told.finished("orders", NodeStatus.ERROR, message="Database Error\n  no such table\n")
    assert line(bad) == "12:00:05 ERROR model orders: Database Error no such table"
    skipped = told.finished(
        "daily",
        NodeStatus.SKIPPED,
        reason=Reason.UPSTREAM_FAILED,
        root_causes=["model.shop.orders"],
    )
    assert line(skipped) == "12:00:06 SKIP model daily: because of model.shop.orders"
    hooked = told.finished("d", NodeStatus.NEVER_STARTED, reason=Reason.ON_RUN_START_FAILED)
    assert line(hooked).endswith("NOT RUN model d: on run start failed")
    cancel = RunCancel(step="requested", by="ada", reason="wrong day", **told.envelope())
    assert line(cancel).endswith("shop/prod cancel: requested by ada: wrong day")
    error = ErrorBlock(class_="X", message="it\nbroke")
    ended = told.ended(RunStatus.ERROR, exit_code=2, error=error)
    assert line(ended).endswith("finished: error, exit code 2, 1 m 15 s: it broke")


def test_every_status_of_a_node_has_a_word(told: Told) -> None:
    for status in NodeStatus:
        assert plain_line(told.finished("orders", status))


def test_the_live_frame_shows_the_bar_and_the_nodes_at_work_the_longest(told: Told) -> None:
    told.began(nodes=5000)
    for number in range(5000 - 100):
        told.started(f"m{number:04}")
    told.finished("m0000", NodeStatus.ERROR, message="boom")
    told.finished("skipped", NodeStatus.SKIPPED, root_causes=["model.shop.m0000"])
    told.tell(
        RunProgress(counts=NodeCounts(done=2, running=9, total=5000), eta_s=61.7, **told.envelope())
    )

    text = rendered(live_frame(told.picture, BEGIN + timedelta(seconds=6000)))

    assert "shop/prod  dbt build --select orders+" in text
    assert "2/5000 · 1 failed · 1 skipped · about 1 m 02 s left" in text
    assert "m0001" in text
    assert f"m{MAX_RUNNING:04}" in text
    assert f"m{MAX_RUNNING + 1:04}" not in text
    assert f"and {4899 - MAX_RUNNING} more" in text
    assert "1 h 39 m" in text  # since its own start, not since the run's
    assert len(text.splitlines()) <= MAX_RUNNING + 5


def test_a_run_that_waits_says_what_for(told: Told) -> None:
    assert "waiting for a worker" in rendered(live_frame(told.picture, BEGIN))
    told.tell(RunQueued(args=["build"], position=2, **told.envelope()))
    assert "waiting, 2 runs ahead" in rendered(live_frame(told.picture, BEGIN))


def test_above_the_bar_stands_what_went_wrong_and_nothing_that_went_well(told: Told) -> None:
    def above(event: AnyEvent) -> str:
        return rendered(*lines_above(event)) if list(lines_above(event)) else ""

    assert above(told.started("orders")) == ""
    assert above(told.finished("orders", NodeStatus.SUCCESS)) == ""
    assert above(told.finished("daily", NodeStatus.SKIPPED)) == ""
    failed = above(told.finished("orders", NodeStatus.ERROR, message="Database Error\n  no table"))
    assert "ERROR" in failed
    assert failed.count("no table") == 1
    assert "Got 3 results" in above(told.finished("t", NodeStatus.WARN, message="Got 3 results"))
    assert "careful" in above(told.log("JinjaLogWarning", "careful", "warn"))
    assert "| 1 |" in above(told.log("ShowNode", "| 1 |"))


def test_markup_in_names_and_messages_is_text_and_not_an_instruction(told: Told) -> None:
    event = told.finished("a[bold]b", NodeStatus.ERROR, message="[/red] [link=x]\n[0m")
    told.ended(RunStatus.FAILURE, exit_code=1, failed_count=1)

    assert "a[bold]b" in rendered(*lines_above(event))
    assert "[/red] [link=x]" in rendered(run_summary(told.picture))


def test_the_summary_tells_what_failed_and_how_much_it_kept_from_running(told: Told) -> None:
    told.began(nodes=4)
    told.finished("orders", NodeStatus.ERROR, message="Database Error\n  no such table")
    for name in ("daily", "weekly"):
        told.finished(name, NodeStatus.SKIPPED, root_causes=["model.shop.orders"])
    told.ended(
        RunStatus.FAILURE,
        exit_code=1,
        counts={"model": {"error": 1, "skipped": 2, "success": 4}, "unit_test": {"success": 1}},
        slowest=[
            SlowNode(unique_id="model.shop.big", elapsed_s=61.0),
            SlowNode(unique_id="test.shop.not_null_x.0a1b2c", elapsed_s=2.0),
        ],
        failed_count=1,
        attempts=2,
    )

    text = rendered(run_summary(told.picture, again=f"dbtstream show {RUN_ID}"))

    row = next(line for line in text.splitlines() if "model.shop.orders" in line)
    assert "error" in row
    assert row.rstrip(" │").endswith("2")  # skipped because of it
    assert "no such table" in text
    counts = [line.split() for line in text.splitlines() if line.startswith("│ model ")]
    assert counts == [["│", "model", "│", "4", "│", "1", "│", "2", "│", "7", "│"]]
    assert "Slowest: big 1 m 01 s, not_null_x 2.00 s" in text
    assert "failure in 1 m 15 s, exit code 1, 2 attempts" in text
    assert RUN_ID in text
    assert f"See it again: dbtstream show {RUN_ID}" in text


def test_the_summary_of_a_run_whose_nodes_were_not_seen_lists_what_its_end_lists(
    told: Told,
) -> None:
    failed = FailedNode(unique_id="model.shop.orders", status=NodeStatus.ERROR, message="boom")
    told.ended(RunStatus.FAILURE, exit_code=1, failed=[failed], failed_count=51)

    text = rendered(run_summary(told.picture))

    assert "model.shop.orders" in text
    assert "and 50 more" in text


def test_the_summary_of_a_crash_holds_dbts_last_words(told: Told) -> None:
    error = ErrorBlock(class_="ChildCrashed", message="dbt's process ended without a result")
    told.ended(RunStatus.ERROR, exit_code=2, error=error, stderr_tail="Segmentation fault")

    text = rendered(run_summary(told.picture))

    assert "Error: ChildCrashed: dbt's process ended without a result" in text
    assert "Segmentation fault" in text


def test_a_rejected_run_and_one_that_goes_on_have_a_summary_too(told: Told) -> None:
    assert "the run has not ended" in rendered(run_summary(told.picture))
    told.tell(RunRejected(code="flag_not_allowed", message="--target-path: no", **told.envelope()))
    assert "rejected: flag_not_allowed: --target-path: no" in rendered(run_summary(told.picture))


def test_counts_have_a_column_only_for_statuses_that_occur() -> None:
    text = rendered(counts_table({"test": {"fail": 2}, "model": {"never_started": 1}}))

    assert "fail" in text
    assert "never started" in text
    assert "success" not in text


def test_the_json_view_prints_events_that_decode_to_the_same(told: Told) -> None:
    out = io.StringIO()
    events = [told.queued(), told.started("orders"), told.ended(RunStatus.SUCCESS)]
    with JsonView(out) as view:
        for event in events:
            view.event(event)
        view.summary(None)

    assert [decode_event(line.encode()) for line in out.getvalue().splitlines()] == events


def test_the_plain_view_keeps_a_commands_own_text_apart_from_how_the_run_goes(told: Told) -> None:
    """So that `dbtstream run shop -- list | sort` sorts nodes only."""
    out, err = io.StringIO(), io.StringIO()
    with PlainView(text_result=True, out=out, err=err) as view:
        view.event(told.queued())
        view.event(told.log("PrintEvent", "shop.orders"))
        view.event(told.log("PrintEvent", "shop.\x1b[32mdaily\x1b[0m"))
        view.event(told.ended(RunStatus.SUCCESS))
        view.summary(None)

    assert out.getvalue() == "shop.orders\nshop.daily\n"
    assert "queued" in err.getvalue()
    assert "success in 1 m 15 s" in err.getvalue()


def test_the_plain_view_has_no_colour_and_prints_everything_where_no_text_is_the_result(
    told: Told,
) -> None:
    out = io.StringIO()
    with PlainView(out=out) as view:
        view.event(told.finished("t", NodeStatus.FAIL, message="\x1b[31mgot 1 result\x1b[0m"))
        view.summary(None)

    assert "FAIL" in out.getvalue()
    assert "got 1 result" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_the_screen_view_ends_with_the_summary_and_without_a_bar(told: Told) -> None:
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
    with ScreenView(console, now=lambda: BEGIN) as view:
        view.event(told.queued())
        view.event(run_started(told.envelope()))
        view.refresh()
        view.note("Cancelling the run.")
        view.event(told.finished("orders", NodeStatus.ERROR, message="boom"))
        view.event(told.ended(RunStatus.FAILURE, exit_code=1, failed_count=1))
        view.refresh()
        view.summary("dbtstream show x")

    text = console.export_text()
    assert "dbt is reading the project" in text
    assert text.index("Cancelling the run.") < text.index("boom")
    assert text.rstrip().endswith("See it again: dbtstream show x")


def test_ps_lists_runs_with_whole_ids_even_on_a_narrow_terminal() -> None:
    def view(**facts: Any) -> RunView:
        return RunView(run_id=RUN_ID, project="shop", target="prod", **facts)

    runs = RunList(
        runs=[
            view(
                status=RunStatus.RUNNING,
                args=["build", "--select", "a" * 100],
                started_at=BEGIN,
            ),
            view(status=RunStatus.QUEUED, queued_at=BEGIN - timedelta(days=2)),
        ],
        waiting={"shop.prod": 2, "shop.dev": 0},
    )
    console = Console(record=True, width=90, file=io.StringIO())
    console.print(runs_table(runs, BEGIN + timedelta(seconds=90)))
    lines = console.export_text().splitlines()

    assert [RUN_ID in line for line in lines] == [False, True, True, False]
    assert "12:00:00" in lines[1]
    assert "1 m 30 s" in lines[1]
    assert "02-27 12:00" in lines[2]
    assert lines[3] == "shop.prod: 2 requests waiting for a worker"


def test_the_head_of_show_leaves_out_what_is_not_known() -> None:
    view = RunView(
        run_id=RUN_ID, project="shop", target="prod", status=RunStatus.ERROR, error="a\nb"
    )

    text = rendered(view_lines(view, BEGIN))

    assert "shop/prod" in text
    assert "a b" in text
    assert "invocation" not in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.00 s"),
        (9.994, "9.99 s"),
        (9.999, "10.0 s"),
        (59.96, "1 m 00 s"),
        (60.0, "1 m 00 s"),
        (187.2, "3 m 07 s"),
        (3599.9, "1 h 00 m"),
        (7500.0, "2 h 05 m"),
    ],
)
def test_durations_read_well_at_any_length(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_request_that_cannot_be_understood_exits_with_dbts_usage_code() -> None:
    assert exit_code_of_rejection(RejectCode.FLAG_NOT_ALLOWED) == 2
    assert exit_code_of_rejection(RejectCode.UNKNOWN_PROJECT) == 2
    assert exit_code_of_rejection(RejectCode.EXPIRED) == 1
    assert exit_code_of_rejection(RejectCode.BUSY) == 1
