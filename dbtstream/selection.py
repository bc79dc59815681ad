"""Which events of the log, and from where: filter subjects and a start for a consumer. Pure.

`event_stream` makes its consumer from these; the tokens are those of `subjects.event_subject`.
"""

import itertools
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from nats.js.api import DeliverPolicy

from dbtstream.subjects import EVENTS, token

Words = str | Collection[str] | None
"""One word, several, or any."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which events: by the tokens of their subject, each one word, several, or any (None)."""

    project: Words = None
    target: Words = None
    family: Words = None
    kind: Words = None
    name: Words = None
    status: Words = None

    def subjects(self) -> list[str]:
        """Filter subjects that cover it and do not overlap, as one consumer needs them."""
        return [".".join((EVENTS, *tokens)) for tokens in itertools.product(*self._tokens())]

    def covering_subject(self) -> str:
        """One filter subject for all of it, and more where a token may be several words."""
        one_each = (words[0] if len(words) == 1 else "*" for words in self._tokens())
        return ".".join((EVENTS, *one_each))

    def covers(self, subject: str) -> bool:
        tokens = subject.removeprefix(f"{EVENTS}.").split(".")
        return len(tokens) == 6 and all(
            "*" in wanted or got in wanted
            for got, wanted in zip(tokens, self._tokens(), strict=True)
        )

    def _tokens(self) -> list[list[str]]:
        every = (self.project, self.target, self.family, self.kind, self.name, self.status)
        return [_as_tokens(words) for words in every]


def _as_tokens(words: Words) -> list[str]:
    if words is None or words == "*":
        return ["*"]
    return sorted({token(word) for word in ([words] if isinstance(words, str) else words)})


@dataclass(frozen=True, slots=True)
class Start:
    """Where to begin: after a stream sequence, at a time, at the oldest, or now (neither)."""

    after_seq: int | None = None
    at: datetime | None = None
    oldest: bool = False

    def policy(self) -> dict[str, Any]:
        if self.after_seq is not None:
            return {
                "deliver_policy": DeliverPolicy.BY_START_SEQUENCE,
                "opt_start_seq": self.after_seq + 1,
            }
        if self.at is not None:
            return {"deliver_policy": DeliverPolicy.BY_START_TIME, "opt_start_time": self.at}
        return {"deliver_policy": DeliverPolicy.ALL if self.oldest else DeliverPolicy.NEW}
