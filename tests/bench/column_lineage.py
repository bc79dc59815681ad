"""Column lineage: CPU per model of ordinary size, and how it grows with columns.

Measured: `sql_child.reader.read_sql` in this process, without pipe and cache, CPU of the
hand-checked statements of `tests/unit/column_lineage_cases` (their mean) and of a synthetic model
with stars, a join, a window and one expression for each of its columns. Then what the daemon
itself spends on a question whose answer is known, which is nearly every one in the steady state:
key and look-up.
"""

import argparse
import asyncio
import time
from collections.abc import Callable

from dbtstream.column_lineage import AnalysisRequest, KnownColumn, SourceTable
from dbtstream.sql_child.reader import read_sql
from dbtstream.sql_process import SqlReader
from tests.bench.figures import Figure, Goal, table
from tests.bench.options import Options, say
from tests.unit.column_lineage_cases import CASES
from tests.unit.test_sql_reader_cases import request

ROUNDS = 7
WIDTHS = (20, 100, 300, 1000)
JAFFLE = ("stg_customers", "stg_payments", "orders", "customers")
HITS = 2000


async def measure(options: Options) -> list[Figure]:
    questions = [request(case) for case in CASES]
    jaffle = [request(case) for case in CASES if case.name in JAFFLE]
    widths = WIDTHS[: options.size(len(WIDTHS), 2)]
    for question in questions:  # imports, and what sqlglot makes of its dialects at first use
        read_sql(question)
    ordinary, shop, hits = [], [], []
    wides: dict[int, list[float]] = {width: [] for width in widths}
    for number in range(options.rounds):
        ordinary.append(_mean_ms(questions))
        shop.append(_mean_ms(jaffle))
        for width in widths:
            wides[width].append(_mean_ms([wide(width)]))
        hits.append(await _hit_us(jaffle, options.size(HITS, 20)))
        say(f"round {number + 1}: {ordinary[-1]:.2f} ms per model, {hits[-1]:.0f} µs if known")
    return [
        Figure(name="hand-checked, mean", unit="ms", values=ordinary, goal=Goal("<", 10)),
        Figure(name="jaffle shop, mean", unit="ms", values=shop, goal=Goal("<", 10)),
        *(_wide_figure(width, wides) for width in widths),
        Figure(name="known answer, in the daemon", unit="µs", values=hits),
    ]


def wide(columns: int) -> AnalysisRequest:
    names = [f"c{i}" for i in range(columns)]
    items = ",\n  ".join(f"coalesce({name}, 0) + {name}_b as {name}_sum" for name in names)
    sql = f"""
        with a as (select * from db.s.a),
        ranked as (select *, row_number() over (partition by c0 order by c1) as rn from a),
        joined as (select ranked.*, b.* from ranked left join db.s.b as b on b.c0_b = c0)
        select {items} from joined where rn = 1
    """  # noqa: S608 - nobody runs it
    tables = {"a": names, "b": [f"{name}_b" for name in names]}
    sources = [
        SourceTable(
            ref=ref,
            relation_name=f"db.s.{ref}",
            columns=[KnownColumn(name=name) for name in columns_of],
        )
        for ref, columns_of in tables.items()
    ]
    return AnalysisRequest(unique_id="model.x.wide", sql=sql, dialect="duckdb", sources=sources)


def _wide_figure(width: int, wides: dict[int, list[float]]) -> Figure:
    """Per column, beside the narrowest: linear is a ratio of one."""
    return Figure(
        name=f"{width} columns",
        unit="ms",
        values=wides[width],
        against=f"{WIDTHS[0]} columns × {width // WIDTHS[0]}",
        baseline=[value * width / WIDTHS[0] for value in wides[WIDTHS[0]]],
        goal=Goal("<", 500) if width == 300 else None,
    )


def _mean_ms(questions: list[AnalysisRequest]) -> float:
    return 1000 * _cpu_s(lambda: [read_sql(question) for question in questions]) / len(questions)


async def _hit_us(questions: list[AnalysisRequest], count: int) -> float:
    """The question again; then the answer's decoding, which is half of it."""
    async with SqlReader() as reader:
        for question in questions:
            await reader.read(question, 30)
        began = time.thread_time()
        for _ in range(count):
            for question in questions:
                await reader.read(question, 30)
        spent_s = time.thread_time() - began
        if reader.stats.hits != count * len(questions):
            raise RuntimeError(f"{reader.stats} after {count} times {len(questions)} questions")
    return 1e6 * spent_s / (count * len(questions))


def _cpu_s(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--small", action="store_true", help="only see whether it works")
    arguments = parser.parse_args()
    options = Options(rounds=arguments.rounds, small=arguments.small)
    print(table(asyncio.run(measure(options))))


if __name__ == "__main__":
    main()
