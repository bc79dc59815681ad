"""Take secrets out of what the daemon itself writes: args, output tails, error texts, files. Pure.

What dbt says is scrubbed in the child, before it is a frame. This is the same rule (dbt's own:
every non-blank value is replaced by `*****`) for what does not come from there: a few strings,
and the artifacts that dbt has written with whatever its vars, configs and messages held.
"""

import json
from collections.abc import Iterable, Iterator, Mapping

DBT_SECRET_PREFIX = "DBT_ENV_SECRET_"  # noqa: S105 - the name of variables, not a secret
REPLACEMENT = "*****"

QUOTED_DEPTH = 3
"""dbt logs the repr of a command line with JSON in it, and can log that in JSON."""


class Scrubber:
    """Replaces known secret values; the longest first: one may be part of another."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        self._values = sorted({value for value in values if value.strip()}, key=len, reverse=True)

    @classmethod
    def for_environment(
        cls, environment: Mapping[str, str], secret_names: Iterable[str]
    ) -> "Scrubber":
        """For a child's environment: dbt's own secret variables and those the config names."""
        names = {name for name in environment if name.startswith(DBT_SECRET_PREFIX)}
        names.update(secret_names)
        return cls(environment[name] for name in names if name in environment)

    def text(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, REPLACEMENT)
        return text

    def words(self, words: Iterable[str]) -> list[str]:
        return [self.text(word) for word in words]

    def stream(self) -> "ScrubStream":
        """For a file: plain values, and as JSON and Python write them between quotes."""
        return ScrubStream({spelling for value in self._values for spelling in _spellings(value)})

    def data(self, data: bytes) -> bytes:
        """A file that fits into memory."""
        stream = self.stream()
        return stream.feed(data) + stream.end()


class ScrubStream:
    """Scrubs bytes that come in pieces, wherever these are cut; holds back less than a value.

    Where values overlap, all of them goes: replacing one would leave the other's rest.
    """

    def __init__(self, values: Iterable[bytes]) -> None:
        self._values = tuple(values)
        self._overlap = max(map(len, self._values), default=1) - 1
        self._held = b""
        self._covered = 0  # so many of the held bytes belong to a value that has been replaced

    def feed(self, data: bytes) -> bytes:
        """What can be told of the stream so far."""
        held = self._held + data
        return self._take(held, max(0, len(held) - self._overlap))

    def end(self) -> bytes:
        """The rest."""
        return self._take(self._held, len(self._held))

    def _take(self, held: bytes, cut: int) -> bytes:
        """Whoever begins before `cut` is in `held` with its end."""
        out, done = bytearray(), self._covered
        for start, end in sorted(self._found(held)):
            if start >= cut:
                break
            if start >= done:
                out += held[done:start]
                out += REPLACEMENT.encode()
            done = max(done, end)
        out += held[done:cut]
        self._held, self._covered = held[cut:], max(0, done - cut)
        return bytes(out)

    def _found(self, held: bytes) -> Iterator[tuple[int, int]]:
        for value in self._values:
            at = held.find(value)
            while at >= 0:
                yield at, at + len(value)
                at = held.find(value, at + 1)


def _spellings(value: str) -> set[bytes]:
    """As it is, and as it stands between quotes in JSON and in Python's repr, text within text."""
    texts = {value}
    for _ in range(QUOTED_DEPTH):
        texts |= {quoted for text in texts for quoted in _quoted(text)}
    return {text.encode("utf-8", "surrogateescape") for text in texts}


def _quoted(text: str) -> Iterator[str]:
    yield json.dumps(text)[1:-1]
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield repr(text)[1:-1]
    # Whether repr escapes single quotes depends on what else there is in the text.
    yield repr("'\"" + text)[len("'\\'\"") : -1]
