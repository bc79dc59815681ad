"""Take secrets out of text that the daemon itself writes: args, output tails, error texts. Pure.

What dbt says is scrubbed in the child, before it is a frame. This is the same rule (dbt's own:
every non-blank value is replaced by `*****`) for the few strings that do not come from there.
"""

from collections.abc import Iterable, Mapping

DBT_SECRET_PREFIX = "DBT_ENV_SECRET_"  # noqa: S105 - the name of variables, not a secret
REPLACEMENT = "*****"


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
