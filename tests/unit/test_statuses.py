"""dbt's words become ours by one table; each row of it has its test."""

import pytest

from dbtstream.events import LogLine
from dbtstream.statuses import (
    CAUSES_SKIP,
    DBT_NODE_STATUS,
    PASSED,
    TERMINAL_RUN_STATUSES,
    NodeStatus,
    RunStatus,
)
from tests.stories import Story, node

ROWS = {
    # dbt's word       the node it is said of, our word, the run
    "success": ("model.shop.orders", "success", "success"),
    "pass": ("test.shop.unique_id.1a", "success", "success"),
    "OK": ("model.shop.orders", "success", "success"),
    "warn": ("test.shop.unique_id.1a", "warn", "success"),
    "fail": ("test.shop.unique_id.1a", "fail", "failure"),
    "error": ("model.shop.orders", "error", "failure"),
    "runtime error": ("source.shop.raw.orders", "error", "failure"),
    "partial success": ("model.shop.orders", "partial_success", "failure"),
    "skipped": ("model.shop.orders", "skipped", "failure"),
    "no-op": ("exposure.shop.board", "no_op", "success"),
    "reused": ("model.shop.orders", "reused", "success"),
}


def test_the_table_has_exactly_the_words_that_dbt_has() -> None:
    """1.8 to 1.12; a row that comes or goes needs its test here."""
    assert set(DBT_NODE_STATUS) == set(ROWS)


@pytest.mark.parametrize("word", ROWS)
def test_a_word_of_dbt_becomes_ours_and_stays_readable(word: str) -> None:
    """`status` is from the closed list, `dbt_status` is what dbt said."""
    unique_id, ours, run = ROWS[word]
    story = Story()
    story.plan(node(unique_id))
    if word in ("skipped", "no-op", "reused"):
        story.open(unique_id)
        story.finish(unique_id, word)
    else:
        story.run(unique_id, word)
    story.result(0 if run == "success" else 1)
    story.end()

    end = story.end_of(unique_id)
    assert (end.status, end.dbt_status) == (ours, word)
    assert story.finished.status == run
    assert story.finished.verified


@pytest.mark.parametrize("word", ["success", "OK", "error", "skipped"])
def test_hooks_have_their_words_too(word: str) -> None:
    """1.8 says OK where 1.9 says success."""
    hook = "operation.shop.shop-on-run-end-0"
    story = Story()
    story.plan(node("model.shop.orders"), others=(node(hook),))
    story.run("model.shop.orders")
    story.hook(hook, word)
    story.result(0 if word in ("success", "OK") else 1)
    story.end()

    assert story.end_of(hook).status == DBT_NODE_STATUS[word]
    assert story.end_of(hook).node.resource_type == "operation"


def test_a_word_that_nobody_knows_is_an_error_and_is_named() -> None:
    """It must not read as a success."""
    story = Story()
    story.plan(node("model.shop.orders"))
    story.run("model.shop.orders", "transmogrified")
    story.result(0)
    story.end()

    end = story.end_of("model.shop.orders")
    assert (end.status, end.dbt_status) == ("error", "transmogrified")
    assert story.finished.status == "failure", "even though dbt was content"
    (line,) = story.all(LogLine)
    assert line.level == "error"
    assert "transmogrified" in line.message
    assert "model.shop.orders" in line.message


def test_every_status_of_a_node_either_passed_or_did_not() -> None:
    """Whoever adds a status decides what it does to the run and to what is downstream."""
    assert not PASSED & CAUSES_SKIP
    assert set(NodeStatus) - PASSED - CAUSES_SKIP == {
        NodeStatus.SKIPPED,
        NodeStatus.NEVER_STARTED,
        NodeStatus.CANCELLED,
        NodeStatus.LOST,
    }


def test_a_run_status_is_an_end_or_on_the_way_to_one() -> None:
    on_the_way = {RunStatus.QUEUED, RunStatus.STARTING, RunStatus.RUNNING}
    assert set(RunStatus) == TERMINAL_RUN_STATUSES | on_the_way
    assert not any(status.is_terminal for status in on_the_way)
