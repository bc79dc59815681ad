"""What a benchmark is told, and how it says how far it is."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

PREFIX = "dbtstream-bench-"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`small`: see whether it works; what is measured then means nothing."""

    rounds: int
    small: bool = False

    def size(self, full: int, small: int) -> int:
        return small if self.small else full


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for everything, gone afterwards. Its disk is that of outbox and JetStream."""
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def say(text: str) -> None:
    """Progress, beside the table."""
    print(f"  … {text}", file=sys.stderr, flush=True)
