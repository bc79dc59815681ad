"""The comparison with `dbt-ol` itself: what it counts as missing, and what it does not."""

from tests.openlineage_events import Json, RunStory, mapped
from tests.openlineage_wrapper import Tables, missing_edges, missing_tested

SOURCE = {
    "resource_type": "source",
    "database": "shop",
    "schema": "main",
    "name": "logical",
    "identifier": "raw_orders",
}


def model(name: str, materialized: str = "table") -> Json:
    return {
        "resource_type": "model",
        "database": "shop",
        "schema": "main",
        "alias": name,
        "config": {"materialized": materialized},
    }


TABLES = Tables.of(
    {
        "nodes": {
            "model.shop.base": model("base", "ephemeral"),
            "model.shop.over": model("over", "ephemeral"),
            "model.shop.orders": model("orders"),
        },
        "sources": {"source.shop.raw.logical": SOURCE},
        "parent_map": {
            "model.shop.base": ["source.shop.raw.logical"],
            "model.shop.over": ["model.shop.base"],
            "model.shop.orders": ["model.shop.over"],
        },
    }
)


def theirs(name: str, output: str) -> Json:
    return {"inputs": [{"name": f"shop.main.{name}"}], "outputs": [{"name": f"shop.main.{output}"}]}


OURS = mapped(
    RunStory().begin().build("model.shop.orders", "source.shop.raw.raw_orders").end().events
)


def test_an_edge_that_both_have_is_not_missing() -> None:
    assert missing_edges(OURS, [theirs("raw_orders", "orders")], TABLES) == set()


def test_an_edge_that_only_they_have_is() -> None:
    assert missing_edges([], [theirs("raw_orders", "orders")], TABLES) == {
        ("shop.main.raw_orders", "shop.main.orders")
    }


def test_an_ephemeral_model_stands_for_the_tables_behind_it() -> None:
    assert missing_edges(OURS, [theirs("over", "orders")], TABLES) == set()
    assert missing_edges([], [theirs("over", "orders")], TABLES) == {
        ("shop.main.raw_orders", "shop.main.orders")
    }


def test_a_source_may_be_called_by_its_logical_name() -> None:
    assert missing_edges(OURS, [theirs("logical", "orders")], TABLES) == set()


def test_edges_to_tables_that_are_not_there_do_not_count() -> None:
    made_up = [theirs("orders", "not_null_orders_id"), theirs("raw_orders", "base")]
    assert missing_edges([], made_up, TABLES) == set()


def test_a_table_that_only_their_tests_read_is_missing() -> None:
    test = {
        "eventType": "COMPLETE",
        "job": {"facets": {"jobType": {"jobType": "TEST"}}},
        **theirs("orders", "x"),
    }
    assert missing_tested([], [test], TABLES) == {"shop.main.orders"}
    story = RunStory().begin().test("test.shop.unique.x", "model.shop.orders").end()
    assert missing_tested(mapped(story.events), [test], TABLES) == set()
