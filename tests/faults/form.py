"""How often: the short form of each test, or the long one with DBTSTREAM_FAULTS=long.

What is drawn by lot comes from one seed, which is told with the figures at the end and can be
given as DBTSTREAM_FAULTS_SEED.
"""

import os
import random
from typing import TypeVar

T = TypeVar("T")

LONG = os.environ.get("DBTSTREAM_FAULTS") == "long"
SEED = int(os.environ.get("DBTSTREAM_FAULTS_SEED") or random.SystemRandom().randrange(10**6))


def form(short: T, long: T) -> T:
    """That of the two which goes with the form that runs."""
    return long if LONG else short


def lots(name: str) -> random.Random:
    """A test's own, so that it draws the same alone as among others."""
    return random.Random(f"{SEED} {name}")
