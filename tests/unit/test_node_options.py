"""meta.dbtstream: what is right is used, what is wrong is said and costs only itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbtstream.config import ASSET_KEY_FIELDS
from dbtstream.frames import PlannedNode
from dbtstream.lineage_events import Identity
from dbtstream.node_options import NodeOptions, UpstreamDataset, asset_key, read_options

ORDERS = "model.shop.orders"
NODE = PlannedNode(
    unique_id=ORDERS, resource_type="model", name="orders", package_name="shop", version="2"
)
IDENTITY = Identity(
    namespace="duckdb:///data/shop.duckdb",
    name="shop.main.orders_v2",
    database="shop",
    schema="main",
    identifier="orders_v2",
)


def options(**given: object) -> tuple[NodeOptions, list[str]]:
    return read_options({"owner": "finance", "dbtstream": given}, ORDERS)


def problem(**given: object) -> str:
    """The only one; and nothing of what was given is used."""
    found, problems = options(**given)
    assert found == NodeOptions()
    assert len(problems) == 1
    return problems[0]


@pytest.mark.parametrize("meta", [{}, {"owner": "finance"}, {"dbtstream": None}, {"dbtstream": {}}])
def test_a_node_that_says_nothing_has_the_defaults(meta: dict[str, object]) -> None:
    assert read_options(meta, ORDERS) == (NodeOptions(), [])
    assert NodeOptions().emit
    assert NodeOptions().asset
    assert NodeOptions().lineage


def test_all_options_are_read() -> None:
    found, problems = options(
        emit=False,
        asset=False,
        lineage=False,
        key="marts/{identifier}",
        labels={"team": "finance"},
        upstream=[
            "source.shop.raw.orders",
            {"namespace": "kafka://broker:9092", "name": "orders"},
            "source.shop.raw.orders",
        ],
    )

    assert problems == []
    assert found == NodeOptions(
        emit=False,
        asset=False,
        lineage=False,
        key="marts/{identifier}",
        labels={"team": "finance"},
        upstream=(
            "source.shop.raw.orders",
            UpstreamDataset(namespace="kafka://broker:9092", name="orders"),
        ),
    )


def test_a_wrong_key_costs_only_itself() -> None:
    found, problems = options(emit="no", asset=False, labels=["finance"], key="orders")
    assert found == NodeOptions(asset=False, key="orders")
    emit, labels = problems
    assert emit == (
        "meta.dbtstream.emit of model.shop.orders is 'no', a text; true and false are accepted"
    )
    assert labels == (
        "meta.dbtstream.labels of model.shop.orders is a list; "
        "names with texts are accepted, such as {team: finance}"
    )


@pytest.mark.parametrize("given", ["off", False, ["emit"], 3])
def test_what_is_no_object_at_all_is_one_problem(given: object) -> None:
    found, problems = read_options({"dbtstream": given}, ORDERS)
    assert found == NodeOptions()
    assert len(problems) == 1
    assert problems[0].startswith("meta.dbtstream of model.shop.orders is ")
    assert problems[0].endswith("accepted keys: emit, asset, lineage, key, labels, upstream")


def test_an_unknown_key_is_named_with_those_that_are_known() -> None:
    assert problem(emitt=False) == (
        "meta.dbtstream.emitt of model.shop.orders is not known; "
        "accepted keys: emit, asset, lineage, key, labels, upstream"
    )


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("{table}", "'{table}', a text; in braces may be: project, target, namespace"),
        ("{", "'{', a text; in braces may be"),
        ("}x", "in braces may be"),
        ("", "'', a text; a text is accepted, such as"),
        (7, "is 7, a number"),
        ([], "is a list"),
        (None, "is empty"),
    ],
)
def test_a_key_that_is_no_template_is_said(key: object, words: str) -> None:
    assert words in problem(key=key)


@pytest.mark.parametrize("key", ["orders", "{{raw}}", "{schema}.{identifier}"])
def test_a_nodes_own_key_needs_no_field(key: str) -> None:
    assert options(key=key) == (NodeOptions(key=key), [])


def test_a_wrong_label_costs_only_that_label() -> None:
    found, problems = options(labels={"team": "finance", "tier": 1, "long": "x" * 200, 2: "b"})
    assert found == NodeOptions(labels={"team": "finance"})
    assert [p.partition(" of ")[0] for p in problems] == [
        "meta.dbtstream.labels.tier",
        "meta.dbtstream.labels.long",
        "meta.dbtstream.labels",
    ]
    assert "is 1, a number; a label must be a text" in problems[0]
    assert all(len(p) < 250 for p in problems)


def test_labels_are_limited_as_those_of_a_request_are() -> None:
    found, problems = options(labels={f"n{n:02}": "x" for n in range(20)})
    assert len(found.labels) == 16
    assert len(problems) == 4


@pytest.mark.parametrize(
    "item",
    ["orders", "", "model.shop", 3, None, ["a"], {"name": "x"}, {"namespace": "", "name": "x"}],
)
def test_a_wrong_upstream_costs_only_itself(item: object) -> None:
    found, problems = options(upstream=["model.shop.a", item])
    assert found == NodeOptions(upstream=("model.shop.a",))
    assert len(problems) == 1
    assert problems[0].startswith("meta.dbtstream.upstream[1] of model.shop.orders is ")


def test_a_single_upstream_that_is_no_list_is_said() -> None:
    assert "'model.shop.a', a text; a list is accepted" in problem(upstream="model.shop.a")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
KEYS = st.sampled_from(["emit", "asset", "lineage", "key", "labels", "upstream"])


@given(st.dictionaries(KEYS | st.text(), JSON))
def test_whatever_is_there_it_is_read_or_said(given: dict[str, object]) -> None:
    found, problems = read_options({"dbtstream": given}, ORDERS)
    assert all(p.startswith("meta.dbtstream") and ORDERS in p for p in problems)
    if found.key is not None:
        asset_key(found.key, "", project="p", target="t", identity=IDENTITY, node=NODE)


# -- keys ------------------------------------------------------------------------------------


def key(template: str, prefix: str = "", **identity: str | None) -> str:
    parts = {"database": "shop", "schema": "main", "identifier": "orders_v2", **identity}
    named = Identity(namespace="ns", name="the.name", **parts)
    return asset_key(template, prefix, project="shop", target="prod", identity=named, node=NODE)


def test_a_key_follows_its_template_after_the_prefix() -> None:
    assert key("{database}.{schema}.{identifier}") == "shop.main.orders_v2"
    assert key("{schema}/{identifier}", "warehouse/") == "warehouse/main/orders_v2"
    assert key("orders", "warehouse:") == "warehouse:orders"
    assert key("{{x}}{name}") == "{x}orders"
    every = "|".join(f"{{{field}}}" for field in ASSET_KEY_FIELDS)
    assert key(every) == "shop|prod|ns|shop|main|orders_v2|orders|shop|model"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{database}.{schema}.{identifier}", "main.orders_v2"),
        ("db:{database}.{schema}", "db:main"),
        ("{schema}.{database}", "main"),
        ("{database}/tables/{schema}", "tables/main"),
        ("{schema}.{database}.{identifier}", "main.orders_v2"),
        ("{database}", "the.name"),
    ],
)
def test_an_empty_field_leaves_no_lone_separator(template: str, expected: str) -> None:
    assert key(template, database=None) == expected
    assert key(template, database="") == expected


def test_the_parts_of_a_key_are_as_they_are() -> None:
    assert key("{schema}.{identifier}", identifier='a."b"{x}·é') == 'main.a."b"{x}·é'
