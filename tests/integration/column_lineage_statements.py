# ruff: noqa: S608 - SQL of our own
"""Statements that nobody would write, but that DuckDB runs: made by chance from a seed.

Common table expressions, derived tables, all joins, set operations, stars, windows, aggregates,
cases, aliases and subqueries, over the tables of `column_lineage_cases.SHOP`.
"""

from collections import Counter
from collections.abc import Callable
from random import Random

from tests.unit.column_lineage_cases import SHOP

TYPES = {"id": "i", "customer_id": "i", "order_id": "i", "amount": "i", "ordered_at": "t"}
LITERALS = {"i": "1", "s": "'a'", "t": "timestamp '2024-01-01'"}

Columns = list[tuple[str, str]]
"""Name and type: i, s or t."""

Made = tuple[str, Columns]


def statement(seed: int) -> str:
    """The same for the same seed."""
    return _Statement(Random(seed)).made()


class _Statement:
    def __init__(self, random: Random) -> None:
        self.random = random
        self._names = 0

    def made(self) -> str:
        ctes: dict[str, Columns] = {}
        parts = []
        for _ in range(self.random.randint(0, 3)):
            sql, columns = self.query(1, dict(ctes))
            name = self.name("w")
            ctes[name] = columns
            parts.append(f"{name} as ({sql})")
        head = f"with {', '.join(parts)} " if parts else ""
        return head + self.query(2, ctes)[0]

    def name(self, prefix: str) -> str:
        self._names += 1
        return f"{prefix}{self._names}"

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def query(self, depth: int, ctes: dict[str, Columns]) -> Made:
        if depth and self.chance(0.15):
            arms = [_Select(self, depth - 1, ctes).made(numbers=3) for _ in range(2)]
            word = self.random.choice(["union all", "union", "except", "intersect"])
            return f"{arms[0][0]} {word} {arms[1][0]}", arms[0][1]
        return _Select(self, depth, ctes).made()

    def source(self, depth: int, ctes: dict[str, Columns]) -> tuple[str, str, Columns]:
        alias = self.name("t")
        kinds = ["table", "table", *(["cte"] if ctes else []), *(["derived"] if depth else [])]
        kind = self.random.choice(kinds)
        if kind == "cte":
            name = self.random.choice(list(ctes))
            return f"{name} as {alias}", alias, ctes[name]
        if kind == "derived":
            sql, columns = self.query(depth - 1, ctes)
            return f"({sql}) as {alias}", alias, columns
        table = self.random.choice(list(SHOP))
        columns = [(name, TYPES.get(name, "s")) for name in SHOP[table].split()]
        return f"shop.main.{table} as {alias}", alias, columns


class _Select:
    """One SELECT: first its sources, so that expressions have columns to use."""

    def __init__(self, statement: _Statement, depth: int, ctes: dict[str, Columns]) -> None:
        self.all, self.random = statement, statement.random
        self.from_, alias, columns = statement.source(depth, ctes)
        self.columns = [(alias, name, type_) for name, type_ in columns]
        for _ in range(self.random.choice([0, 0, 1, 1, 2])):
            self.join(*statement.source(max(depth - 1, 0), ctes))
        self.times = Counter(name for _, name, _ in self.columns)
        self.order = ", ".join(f"{alias}.{name}" for alias, name, _ in self.columns)

    def join(self, source: str, alias: str, columns: Columns) -> None:
        times = Counter(name for _, name, _ in self.columns)
        new = [(alias, name, type_) for name, type_ in columns]
        left = [it for it in self.columns if it[2] == "i"]
        right = [it for it in new if it[2] == "i"]
        common = [name for _, name, _ in right if times[name] == 1 and (name, "i") in
                  [(it[1], it[2]) for it in left]]  # fmt: skip
        side = self.random.choice(["", "left ", "right ", "full "])
        if common and self.all.chance(0.3):
            key = self.random.choice(common)
            self.from_ += f" {side}join {source} using ({key})"
            new = [it for it in new if it[1] != key]
        elif left and right and self.all.chance(0.8):
            word = self.random.choice([side, side, side, "semi ", "anti "])
            (a, x, _), (b, y, _) = self.random.choice(left), self.random.choice(right)
            self.from_ += f" {word}join {source} on {a}.{x} = {b}.{y}"
            new = [] if word in ("semi ", "anti ") else new
        else:
            self.from_ += f" cross join {source}"
        self.columns += new

    def made(self, numbers: int = 0) -> Made:
        """With `numbers`, as many integers: an arm of a set operation."""
        count = numbers or self.random.randint(1, 4)
        tail = f" where {self.condition()}" if self.all.chance(0.4) else ""
        if self.all.chance(0.35):
            items, out, more = self.grouped(count, keys=not numbers)
        elif not numbers and max(self.times.values()) == 1 and self.all.chance(0.3):
            items, more = ["*"], ""
            out = [(name, type_) for _, name, type_ in self.columns]
        else:
            items, out, more = self.plain(count, numbers_only=bool(numbers))
        distinct = "distinct " if self.all.chance(0.1) else ""
        return f"select {distinct}{', '.join(items)} from {self.from_}{tail}{more}", out

    def grouped(self, count: int, *, keys: bool) -> tuple[list[str], Columns, str]:
        chosen = [self.random.choice("is") for _ in range(min(count - 1, 2))] if keys else []
        out: Columns = [(self.all.name("c"), type_) for type_ in chosen]
        items = [f"{self.value(type_, 1)} as {name}" for name, type_ in out]
        for _ in range(count - len(items)):
            out.append((self.all.name("c"), "i"))
            items.append(f"cast({self.aggregate()} as integer) as {out[-1][0]}")
        numbered = ", ".join(str(it + 1) for it in range(len(chosen)))
        tail = self.random.choice([f" group by {numbered}", " group by all"]) if chosen else ""
        having = f" having max({self.value('i', 0)}) > 1" if self.all.chance(0.3) else ""
        return items, out, tail + having

    def plain(self, count: int, *, numbers_only: bool) -> tuple[list[str], Columns, str]:
        items: list[str] = []
        out: Columns = []
        for _ in range(count):
            type_ = "i" if numbers_only else self.random.choice("iist")
            value = self.window() if type_ == "i" and self.all.chance(0.15) else self.value(type_)
            # An earlier column's alias; DuckDB has none of subqueries.
            aliased = out and not self.times[out[-1][0]] and "select" not in items[-1]
            if aliased and not numbers_only and self.all.chance(0.15):
                value, type_ = out[-1]
            out.append((self.all.name("c"), type_))
            items.append(f"{value} as {out[-1][0]}")
        key = self.value("i", 0)
        rank = f" qualify row_number() over (partition by {key} order by {self.order}) = 1"
        return items, out, rank if self.all.chance(0.15) else ""

    def value(self, type_: str, depth: int = 2) -> str:
        if depth == 0 or self.all.chance(0.45):
            columns = [it for it in self.columns if it[2] == type_]
            if not columns:
                return LITERALS[type_]
            alias, name, _ = self.random.choice(columns)
            return name if self.times[name] == 1 and self.all.chance(0.5) else f"{alias}.{name}"

        def i() -> str:
            return self.value("i", depth - 1)

        def s() -> str:
            return self.value("s", depth - 1)

        ways: dict[str, list[Callable[[], str]]] = {
            "i": [
                lambda: f"({i()} + {i()})",
                lambda: f"coalesce({i()}, {i()})",
                lambda: f"length({s()})",
                lambda: f"case when {self.condition(depth - 1)} then {i()} else {i()} end",
                lambda: f"nullif({i()}, {i()})",
                lambda: f"if({self.condition(depth - 1)}, {i()}, 0)",
                self.subquery,
            ],
            "s": [
                lambda: f"({s()} || {s()})",
                lambda: f"md5({s()})",
                lambda: f"cast({i()} as varchar)",
                lambda: f"case {s()} when 'a' then {s()} end",
            ],
            "t": [lambda: f"greatest({self.value('t', depth - 1)}, {self.value('t', depth - 1)})"],
        }
        return self.random.choice(ways[type_])()

    def aggregate(self) -> str:
        i = self.value("i", 1)
        ways = (
            f"sum({i})",
            f"count(distinct {self.value('s', 1)})",
            "count(*)",
            f"max({i}) filter (where {self.value('i', 0)} > 2)",
            f"sum(case when {i} > 2 then {self.value('i', 1)} end)",
        )
        return self.random.choice(ways)

    def window(self) -> str:
        function = self.random.choice(["sum", "max", "lag", "count"])
        key = self.value(self.random.choice("is"), 0)
        over = f"partition by {key} order by {self.order}"
        return f"cast({function}({self.value('i', 0)}) over ({over}) as integer)"

    def subquery(self) -> str:
        alias = self.all.name("s")
        function = self.random.choice(["max", "count", "sum"])
        return (
            f"(select {function}({alias}.id) from shop.main.{self.table()} {alias} "
            f"where {alias}.id = {self.value('i', 0)})"
        )

    def condition(self, depth: int = 1) -> str:
        alias, way = self.all.name("s"), self.random.random()
        if way < 0.6:
            sign = self.random.choice(["<", ">", "=", "<>"])
            return f"{self.value('i', depth)} {sign} {self.value('i', depth)}"
        if way < 0.8:
            return f"{self.value('s', depth)} = 'paid'"
        inner = f"from shop.main.{self.table()} {alias} where {alias}.id"
        if way < 0.9:
            return f"{self.value('i', depth)} in (select {alias}.id {inner} > 3)"
        return f"exists (select 1 {inner} = {self.value('i', 0)})"

    def table(self) -> str:
        return self.random.choice(list(SHOP))
