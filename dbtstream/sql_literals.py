"""The literals of a statement that cannot matter to its lineage, taken out for the cache's key.

Layer 1, pure, without sqlglot: it runs in the daemon. An incremental or microbatch model differs
from run to run in the bounds of its time range, an audited one in a timestamp and a run's id;
with those taken out, its answer is found again. Every other literal stays, since some do matter:
ordinals of GROUP BY, values of PIVOT (they name columns), files as tables, precisions of types.

What goes, and only that:
* a number, or a string that is a date, a time or a UUID, right after a comparison or BETWEEN
  (and its AND);
* such a string in a cast or a typed literal: `cast('…' as`, `timestamp '…'`;
* such a string as an item of a SELECT list with `as` or `::` after it.

Nothing goes where this module cannot be sure to read quotes as the database does (backslashes,
dollar quotes, triple quotes, `#` and `//` comments, nested comments), and where a literal may
name something (PIVOT, files that are read as tables).
"""

import re

STAND_IN = "'?'"

_DOUBTFUL = ("\\", "$$", "'''", '"""', "#", "//", "pivot", "external_query", "openrowset")
_MAY_BE_DOUBTFUL = ("$", "read_", "scan")
_DOUBTFUL_CODE = re.compile(r"\$\w+\$|\bread_\w+\s*\(|\bscan_\w+\s*\(|_scan\s*\(", re.IGNORECASE)
_TEXT = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|`[^`]*`|--[^\n]*|/\*.*?\*/""", re.DOTALL)
_STRING, _NAME = "\x01", "\x02"  # what stands for each character of a string, of a quoted name
_NEUTRAL = re.compile(
    r"""'(?:
      \d{4}-\d\d-\d\d
      (?: [ T]\d\d:\d\d (?: :\d\d(?:\.\d{1,9})? )? (?: \ ?(?:Z|UTC|[+-]\d\d(?::?\d\d)?) )? )?
    | [0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}
    )'""",
    re.VERBOSE,
)
_COMPARISON = r"(?<![<>=!:~])(?:=|==|<|>|<=|>=|<>|!=)(?![<>=!:~])"
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_BEFORE_BOUND = re.compile(
    rf"(?:{_COMPARISON}|\bbetween|\bbetween\s+(?:[\d.]+|{_STRING}+)\s+and)\s*\Z", re.IGNORECASE
)
_BEFORE_TYPED = re.compile(
    r"(?:\b(?:try_|safe_)?cast\s*\(|\b(?:date|time|timestamp|timestamptz|datetime))\s*\Z",
    re.IGNORECASE,
)
_BEFORE_ITEM = re.compile(r"(?:\bselect|\bdistinct|,)\s*\Z", re.IGNORECASE)
_AFTER_ITEM = re.compile(r"\s*(?:as\b|::)", re.IGNORECASE)
_CLAUSE = re.compile(
    r"[()\[\]]|\b(?:select|from|join|where|by|on|having|values|in|using)\b", re.IGNORECASE
)
LOOK_BACK = 80
"""Characters before a literal that say what it is for; longer gaps are left alone."""

MAX_SEARCHES = 50
"""For the clause that an item stands in; a statement with more is one of data."""

MAX_STRIPPED_BYTES = 64 * 1024
"""A statement that is longer is its own key: reading it would hold the event loop too long."""


def without_literals(sql: str) -> str:
    """Equal for statements that differ in nothing but such literals."""
    if len(sql) > MAX_STRIPPED_BYTES or _is_doubtful(sql):
        return sql
    strings: list[tuple[int, int]] = []

    def hide(match: re.Match[str]) -> str:
        text = match.group()
        if text[0] == "'" and len(text) <= 48 and _NEUTRAL.fullmatch(text):
            strings.append(match.span())
        return (_STRING if text[0] == "'" else " " if text[0] in "-/" else _NAME) * len(text)

    code = _TEXT.sub(hide, sql)  # as long as the SQL, without what could be mistaken for SQL
    if "'" in code or '"' in code or "`" in code or "/*" in code:
        return sql  # something begins that does not end
    items = _Items(code)
    out = [
        span
        for span in strings
        if _is_bound(code, span[0]) or _is_typed(code, span[0]) or items.has(*span)
    ]
    out += [
        match.span()
        for match in _NUMBER.finditer(code)
        if _is_bound(code, match.start()) and _ends_there(code, match.end())
    ]
    return _replaced(sql, sorted(out))


def has_jinja(sql: str) -> bool:
    """Outside of strings, quoted names and comments."""
    if "{{" not in sql and "{%" not in sql:
        return False
    code = _TEXT.sub(" ", sql)
    return "{{" in code or "{%" in code


def _is_doubtful(sql: str) -> bool:
    lower = sql.lower()
    return (
        any(it in lower for it in _DOUBTFUL)
        or (any(it in lower for it in _MAY_BE_DOUBTFUL) and bool(_DOUBTFUL_CODE.search(sql)))
        or _STRING in sql
        or _NAME in sql
        or _has_nested_comment(sql)
    )


def _is_bound(code: str, start: int) -> bool:
    before = code[max(0, start - LOOK_BACK) : start]
    last = before.rstrip()[-1:]
    return bool(last) and last in "=<>nNdD" and bool(_BEFORE_BOUND.search(before))  # between, and


def _is_typed(code: str, start: int) -> bool:
    return bool(_BEFORE_TYPED.search(code[max(0, start - LOOK_BACK) : start]))


def _ends_there(code: str, end: int) -> bool:
    """Not the first digits of 1e5 or 1.2.3."""
    return not (code[end : end + 1].isalnum() or code[end : end + 1] in ("_", "."))


class _Items:
    """Which strings are items of a SELECT list. Asked from left to right."""

    def __init__(self, code: str) -> None:
        self._code = code
        self._searches = 0
        self._last: tuple[int, bool] | None = None

    def has(self, start: int, end: int) -> bool:
        before = self._code[max(0, start - LOOK_BACK) : start]
        if not (_BEFORE_ITEM.search(before) and _AFTER_ITEM.match(self._code, end)):
            return False
        if self._last is None or _CLAUSE.search(self._code, self._last[0], start):
            if self._searches == MAX_SEARCHES:
                return False
            self._searches += 1
            self._last = end, self._search(start)
        self._last = end, self._last[1]
        return self._last[1]

    def _search(self, start: int) -> bool:
        """Going back, the first clause outside of all parentheses is SELECT."""
        for reach in (LOOK_BACK, 8 * LOOK_BACK, 64 * LOOK_BACK):
            depth = 0
            for found in reversed(_CLAUSE.findall(self._code, max(0, start - reach), start)):
                depth += (found in ")]") - (found in "([")
                if depth < 0:
                    return False
                if depth == 0 and found not in ")]([":
                    return bool(found.lower() == "select")
        return False


def _replaced(sql: str, spans: list[tuple[int, int]]) -> str:
    parts = []
    done = 0
    for start, end in spans:
        parts += [sql[done:start], STAND_IN]
        done = end
    return "".join([*parts, sql[done:]])


def _has_nested_comment(sql: str) -> bool:
    """Dialects differ in where such a comment ends."""
    opened = sql.find("/*")
    while opened >= 0:
        closed = sql.find("*/", opened + 2)
        inner = sql.find("/*", opened + 1)
        if closed < 0 or opened < inner < closed:
            return True
        opened = inner
    return False
