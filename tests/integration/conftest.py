"""In this ring, a blocking call from our code on the event loop fails the test."""

import os
from collections.abc import Iterator

import pytest
from blockbuster import BlockBuster, blockbuster_ctx

from tests.warm_children import WarmChildren


@pytest.fixture(autouse=True)
def blocking_calls_fail() -> Iterator[BlockBuster]:
    """Only calls that come through `dbtstream`: what tests and pytest do is their business."""
    with blockbuster_ctx("dbtstream") as detector:
        yield detector


@pytest.fixture(scope="session")
def templates() -> Iterator[WarmChildren]:
    """For tests of the dbt child that are run with forked ones, too."""
    warm = WarmChildren()
    yield warm
    warm.close()


@pytest.fixture
def warm(request: pytest.FixtureRequest) -> WarmChildren | None:
    """None: children are started cold. `DBTSTREAM_TEST_START=warm` turns round what a test that
    does not say would get."""
    how = getattr(request, "param", os.environ.get("DBTSTREAM_TEST_START", "cold"))
    found: WarmChildren | None = request.getfixturevalue("templates") if how == "warm" else None
    return found
