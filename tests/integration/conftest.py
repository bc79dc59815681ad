"""In this ring, a blocking call from our code on the event loop fails the test."""

from collections.abc import Iterator

import pytest
from blockbuster import BlockBuster, blockbuster_ctx


@pytest.fixture(autouse=True)
def blocking_calls_fail() -> Iterator[BlockBuster]:
    """Only calls that come through `dbtstream`: what tests and pytest do is their business."""
    with blockbuster_ctx("dbtstream") as detector:
        yield detector
