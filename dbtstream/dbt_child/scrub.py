"""Makes any value fit for the pipe: secrets out, lengths bounded, nothing JSON cannot carry.

`channel` passes every frame through here on its writer thread. dbt scrubs only what its own
loggers write, so a callback sees raw `DBT_ENV_SECRET_*` values (1.8 to 1.12).
"""

from __future__ import annotations

import enum
import json
import math
import re
from datetime import date
from typing import Any, Dict, Iterable, List, Mapping, Tuple
from urllib.parse import quote, quote_plus

SECRET_PREFIX = "DBT_ENV_SECRET_"  # noqa: S105 - a name, not a secret
MASK = "*****"  # dbt's own
MAX_TEXT_BYTES = 8 * 1024
MAX_RAW_CHARS = 64 * 1024  # more than this of a text is never looked at
MAX_FREE_BYTES = 64 * 1024
MAX_DEPTH = 20
MAX_CODE_BYTES = 1024 * 1024
TRUNCATED = {
    "message": "truncated",
    "sql": "truncated",
    "description": "description_truncated",
    "compiled_code": "compiled_code_truncated",
}
"""Texts that have a field beside them that says whether they were cut."""

CODE_KEYS = frozenset({"compiled_code"})  # of use whole or not at all
FREE_KEYS = frozenset({"meta", "adapter_response", "params", "connection"})  # any shape and size

_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def secret_values(environ: Mapping[str, str], names: Iterable[str] = ()) -> List[str]:
    """Values to hide, by dbt's own rule: those of non-blank variables, here longest first."""
    wanted = set(names)
    return sorted(
        {
            value
            for name, value in environ.items()
            if (name.startswith(SECRET_PREFIX) or name in wanted) and value.strip()
        },
        key=lambda value: (-len(value), value),
    )


def spellings(secret: str) -> List[str]:
    """How a secret may look in JSON, a repr, an SQL literal or a URL, and once more inside one.

    `--vars` is JSON that dbt shows inside the repr of a dict: two rounds happen in every run.
    """
    once = set(_spelled(secret))
    twice = once.union(*map(_spelled, once))
    return sorted(twice, key=lambda form: (-len(form), form))


def _spelled(text: str) -> List[str]:
    escaped = text.replace("\\", "\\\\")
    return [
        text,
        json.dumps(text)[1:-1],
        json.dumps(text, ensure_ascii=False)[1:-1],
        repr(text)[1:-1],
        escaped.replace("'", "\\'"),
        escaped.replace("'", "\\'").replace('"', '\\"'),
        text.replace("'", "''"),
        quote(text, safe="", errors="replace"),
        quote_plus(text, errors="replace"),
    ]


class Scrubber:
    """Cleans frames; counts the strings in which it found a secret."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        # The core of a secret is in all of its spellings: mostly one look at a text is enough.
        self._secrets = [
            (max(_PLAIN.findall(secret), key=len, default=""), spellings(secret))
            for secret in sorted(secrets, key=len, reverse=True)
        ]
        self._longest = max((len(forms[0]) for _, forms in self._secrets), default=0)
        self.scrubbed = 0

    def text(self, text: str, limit: int = MAX_TEXT_BYTES) -> Tuple[str, bool]:
        """The text as it may leave, and whether it was cut. The beginning is kept."""
        raw_limit = max(MAX_RAW_CHARS, limit)
        cut = len(text) > raw_limit
        if cut:
            text = text[:raw_limit]
        if "\x1b" in text:
            text = _ANSI.sub("", text)
        found = False
        for core, forms in self._secrets:
            for form in forms if core in text else ():
                if form in text:
                    text = text.replace(form, MASK)
                    found = True
        if found:
            self.scrubbed += 1
        if cut:
            # The first cut may have left the beginning of a secret that is no longer whole.
            text = text[: max(0, len(text) - self._longest)]
        if len(text) * 4 > limit:
            raw = text.encode("utf-8", "replace")
            if len(raw) > limit:
                return raw[:limit].decode("utf-8", "ignore"), True
        return text, cut

    def frame(self, frame: Mapping[str, Any]) -> Dict[str, Any]:
        """A frame whose every string is clean, except its tag and the names of its fields."""
        return {"t": frame["t"], **self._fields(frame, 0)}

    def _fields(self, fields: Mapping[str, Any], depth: int) -> Dict[str, Any]:
        """An object of the protocol: its keys are ours, so a secret cannot be among them."""
        clean: Dict[str, Any] = {}
        for name, value in fields.items():
            if name == "t":
                continue
            if name in TRUNCATED and isinstance(value, str):
                code = name in CODE_KEYS
                clean[name], cut = self.text(value, MAX_CODE_BYTES if code else MAX_TEXT_BYTES)
                if cut:
                    clean[TRUNCATED[name]] = True
                    if code:
                        del clean[name]
            elif name in FREE_KEYS:
                clean[name] = self._free(value, depth + 1)
            else:
                clean[name] = self.value(value, depth + 1)
        return clean

    def _free(self, value: Any, depth: int) -> Any:
        """Something of the project's or the adapter's making: any keys, any size."""
        clean = self.value(value, depth, free=True)
        if clean and len(json.dumps(clean)) > MAX_FREE_BYTES:
            return {"truncated": True}
        return clean

    def value(self, value: Any, depth: int = 0, free: bool = False) -> Any:
        if value is None or value is True or value is False:
            return value
        if isinstance(value, enum.Enum):
            value = value.value
        if isinstance(value, str):
            return self.text(value)[0]
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            # NaN and the infinities are not JSON.
            return float(value) if math.isfinite(value) else str(value)
        if depth < MAX_DEPTH:
            if isinstance(value, Mapping):
                if not free:
                    return self._fields(value, depth)
                return {
                    self.text(str(key))[0]: self.value(item, depth + 1, free)
                    for key, item in list(value.items())
                }
            if isinstance(value, (list, tuple, set, frozenset)):
                return [self.value(item, depth + 1, free) for item in list(value)]
        if isinstance(value, date):
            return value.isoformat()
        return self.text(str(value))[0]
