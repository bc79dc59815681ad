"""How a column came about, as the SQL reader adds it up: steps, traces, relations.

Layer 1, pure: neither sqlglot nor I/O. `expressions` says which steps an expression takes,
`binder` follows them from SELECT to SELECT, `reader` tells the outcome.

A trace is a table's column -> the ways on which it came here. A way through several SELECTs is
one step: the nearest decision, if there is one on it (INDIRECT), else the strongest change.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol


class Step(NamedTuple):
    """OpenLineage's transformation: `masking` if the value cannot be read back."""

    type: str
    subtype: str
    masking: bool = False


IDENTITY = Step("DIRECT", "IDENTITY")
TRANSFORMATION = Step("DIRECT", "TRANSFORMATION")
AGGREGATION = Step("DIRECT", "AGGREGATION")
MASKED = Step("DIRECT", "TRANSFORMATION", masking=True)
MASKED_AGGREGATION = Step("DIRECT", "AGGREGATION", masking=True)
JOIN = Step("INDIRECT", "JOIN")
FILTER = Step("INDIRECT", "FILTER")
GROUP_BY = Step("INDIRECT", "GROUP_BY")
SORT = Step("INDIRECT", "SORT")
WINDOW = Step("INDIRECT", "WINDOW")
CONDITIONAL = Step("INDIRECT", "CONDITIONAL")

STRENGTH = {"IDENTITY": 0, "TRANSFORMATION": 1, "AGGREGATION": 2}

Key = tuple[int, str]
"""A column of a table: the table's number, the column's name."""

Trace = Mapping[Key, frozenset[Step]]
Gathering = dict[Key, frozenset[Step]]

_then: dict[tuple[Step, Step], Step] = {}


def then(outer: Step, inner: Step) -> Step:
    """Both, one after the other; `outer` is nearer to the result."""
    step = _then.get((outer, inner))
    if step is None:
        step = _then[outer, inner] = _combined(outer, inner)
    return step


def _combined(outer: Step, inner: Step) -> Step:
    for step in (outer, inner):
        if step.type == "INDIRECT":
            return step
    subtype = max(outer.subtype, inner.subtype, key=STRENGTH.__getitem__)
    return Step("DIRECT", subtype, outer.masking or inner.masking)


def gather(into: Gathering, trace: Trace, step: Step = IDENTITY) -> None:
    """Add what `trace` has, each way with `step` after it."""
    for key, steps in trace.items():
        moved = steps if step is IDENTITY else frozenset(then(step, inner) for inner in steps)
        known = into.get(key)
        into[key] = moved if known is None else known | moved


def readable(steps: Iterable[Step]) -> list[Step]:
    """In a fixed order; where the same way exists unmasked, the value can be read back."""
    every = set(steps)
    return sorted(
        step for step in every if not (step.masking and step._replace(masking=False) in every)
    )


class Out(NamedTuple):
    """A column of a relation.

    `name` is folded for look-ups, `spelled` is the database's (None: it invents one). With a
    `problem` the trace is not to be trusted.
    """

    name: str
    spelled: str | None
    trace: Trace
    type: str | None = None
    problem: str | None = None


class End(Protocol):
    """Where a relation's columns are not all known: further ones may be asked for by name."""

    whose: str

    def find(self, name: str, spelled: str) -> Out | None:
        """None where there can be none of that name."""


class Unknown:
    """Columns that nobody can trace."""

    def __init__(self, whose: str) -> None:
        self.whose = whose

    def find(self, name: str, spelled: str) -> Out | None:
        return Out(name, spelled, {}, problem=f"the columns of {self.whose} are not known")


class Anything:
    """A table function's columns: each is made of its arguments."""

    def __init__(self, whose: str, trace: Trace, problem: str | None) -> None:
        self.whose, self._trace, self._problem = whose, trace, problem

    def find(self, name: str, spelled: str) -> Out | None:
        return Out(name, spelled, self._trace, problem=self._problem)


class Without:
    """A star over unknown columns that leaves some out: `* exclude (a)`."""

    def __init__(self, end: End, names: frozenset[str]) -> None:
        self.whose, self._end, self._names = end.whose, end, names

    def find(self, name: str, spelled: str) -> Out | None:
        return None if name in self._names else self._end.find(name, spelled)


class Relation:
    """What a query or table gives: columns, and what decided on its rows.

    `feeds` are the relations whose rows it is made from; `rows` and `problems` are its own only.
    """

    def __init__(self, outs: Iterable[Out] = (), ends: Iterable[End] = ()) -> None:
        self.outs = list(outs)
        self.ends = list(ends)
        self.rows: Gathering = {}
        self.problems: list[str] = []
        self.feeds: list[Relation] = []
        self._index: dict[str, Out] | None = None
        self._loose: dict[str, Out | None] | None = None

    def known(self, name: str) -> Out | None:
        """A column that is certainly here."""
        return self.exactly(name) or self.loosely(name)

    def exactly(self, name: str) -> Out | None:
        if self._index is None:
            self._index = {}
            for out in self.outs:
                twice = out.name in self._index
                self._index[out.name] = _ambiguous(out) if twice else out
        return self._index.get(name)

    def loosely(self, name: str) -> Out | None:
        """Whatever its case: a column list that people wrote may have another than the database
        has, and where the statement ran only one can have been meant."""
        if self._loose is None:
            self._loose = {}
            for out in self.outs:
                lower = out.name.lower()
                self._loose[lower] = None if lower in self._loose else out
        return self._loose.get(name.lower())

    def opened(self, name: str, spelled: str) -> Out | None:
        """A column that may be among those not known."""
        found = [out for end in self.ends if (out := end.find(name, spelled)) is not None]
        if len(found) > 1:
            whose = " or ".join(sorted({end.whose for end in self.ends}))
            return Out(name, spelled, {}, problem=f"{spelled} may be a column of {whose}")
        return found[0] if found else None

    def find(self, name: str, spelled: str) -> Out | None:
        return self.known(name) or self.opened(name, spelled)


def reachable(root: Relation) -> Iterator[Relation]:
    """The relation and all that feed it, each once, nearest first."""
    seen = {id(root)}
    waiting = [root]
    for relation in waiting:
        yield relation
        for feed in relation.feeds:
            if id(feed) not in seen:
                seen.add(id(feed))
                waiting.append(feed)


def all_rows(root: Relation) -> tuple[Gathering, list[str]]:
    """What decided on the rows, down to the tables, and what of that is not known."""
    rows: Gathering = {}
    problems: list[str] = []
    for relation in reachable(root):
        gather(rows, relation.rows)
        problems += relation.problems
    return rows, problems


def _ambiguous(out: Out) -> Out:
    return out._replace(problem=f"there are several columns named {out.spelled or out.name}")
