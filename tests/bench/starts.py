"""From a request to the first node, and what a whole run takes: cold, warm, and by dbt alone.

Measured, for one model of 28 nodes (20 models and 8 tests), for the build of all 28, of 300
models and 300 tests, and for one model of 1,000 and of 5,000: a request to a daemon with each kind
of warm starts, from the request to the first `node.started` at a NATS subscriber, to
`run.finished`, the CPU of everything there is for it, and the peak PSS of the run's own
processes. Against: dbt's own command line, which finds a warm parse cache, and a bare fork of the
same kind of process, with no daemon and no callback around it. `ways` says how each is asked and
what is counted.

All ways to start a run take turns in each round, and each time another one is first. Processes
that runs are forked from are made before; what making them takes is not counted. All ways have
the same project, the same parse, and the same database: for builds one that is not there yet, for
one model of many one with a relation for every model, which dbt lists. PSS is of one more run of
each, since looking at it costs the process time.

The second run right after the first is asked for as soon as the first one's `run.finished` is
seen; the first one follows some seconds of silence.

Disturbed by: few cores, as the daemon and the server need one besides dbt. The kernel counts CPU
in steps of 10 ms, which shows in runs of 0.3 s. With the database on a busy disk the ratios of
builds come closer to 1.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args, get_type_hints

import duckdb

from dbtstream.config import WorkerConfig
from tests.bench.figures import Figure, Goal
from tests.bench.options import Options, say, scratch
from tests.bench.projects import write_layered_project
from tests.bench.ways import Cli, Daemon, Place, Took, Way, bare, daemon

ROUNDS = 5
CLI = "dbt's command line"
MODES: tuple[str, ...] = get_args(get_type_hints(WorkerConfig)["warm_starts"])
BEST = MODES[-1]
BARE = {mode: "imports" if mode == "imports" else "manifest" for mode in MODES if mode != "off"}
"""The bare fork that each mode of the daemon is measured against."""

BUILD = ("build",)
ONE = ("run", "--select", "marts_0000")
WARM_UP = 2  # runs of each way before the first that counts: a template is made after the first


@dataclass(frozen=True)
class Case:
    """One command in one project. `sooner` and `less` are goals of the best mode: how many times
    sooner than the command line the first node is, and how many times less all of it takes."""

    name: str
    args: tuple[str, ...]
    sooner: float | None = None
    less: float | None = None


@dataclass(frozen=True)
class Size:
    """A project, and what is done in it. `share` of the rounds are measured, at least one."""

    models: int
    tests: int
    cases: tuple[Case, ...]
    small: tuple[int, int]
    share: float = 1.0


SIZES = (
    Size(20, 8, (Case("all 28", BUILD), Case("1 of 28", ONE, sooner=8, less=6)), (20, 8)),
    Size(300, 300, (Case("300 + 300 tests", BUILD),), (30, 30), share=0.6),
    Size(1000, 0, (Case("1 of 1,000", ONE, sooner=12),), (60, 0)),
    Size(5000, 0, (Case("1 of 5,000", ONE, sooner=15),), (120, 0), share=0.6),
)


@dataclass
class _Found:
    """Of one case."""

    took: dict[str, list[Took]] = field(default_factory=lambda: defaultdict(list))
    pss_mb: dict[str, float] = field(default_factory=dict)
    again: list[tuple[float, float]] = field(default_factory=list)
    """Seconds to the first node of a run, and of the one right after it."""


async def measure(options: Options) -> list[Figure]:
    figures: list[Figure] = []
    for size in SIZES if not options.small else SIZES[::2]:
        with scratch() as folder:
            found = await _Project(size, folder, options).measure()
        for case in size.cases:
            figures += _figures(case, found[case.name])
    return figures


class _Project:
    def __init__(self, size: Size, folder: Path, options: Options) -> None:
        self._size, self._folder = size, folder
        self._models, self._tests = size.small if options.small else (size.models, size.tests)
        self._rounds = max(1, round(options.rounds * size.share))
        self._warm_up = 1 if options.small else WARM_UP
        self._project = folder / "project"
        self._ways: dict[str, Way] = {}
        self._found: dict[str, _Found] = defaultdict(_Found)

    async def measure(self) -> dict[str, _Found]:
        write_layered_project(self._project, models=self._models, tests=self._tests)
        place = Place(self._project, self._folder / "cli")
        cli = Cli(place)
        await cli.parse()
        say(f"{self._models:,} models, {self._tests:,} tests: parsed")
        async with AsyncExitStack() as stack:
            self._ways[CLI] = cli
            for kind in sorted(set(BARE.values())):
                self._ways[f"bare {kind}"] = await stack.enter_async_context(bare(place, kind))
            for mode in MODES:
                theirs = Place(self._project, self._folder / f"state-{mode}", mode)
                theirs.take_parse_of(place)
                self._ways[mode] = await stack.enter_async_context(
                    daemon(theirs, self._folder / f"daemon-{mode}")
                )
            await self._measure()
        return self._found

    async def _measure(self) -> None:
        for name, way in self._ways.items():
            for _ in range(self._warm_up if name != CLI else 0):  # that has parsed
                for case in self._size.cases[-1:]:
                    self._prepare_database(case)
                    await way.run(case.args)
        for number in range(self._rounds):
            for case in self._size.cases:
                await self._round(number, case)
        for case in self._size.cases:
            for name, way in self._ways.items():
                self._prepare_database(case)
                self._found[case.name].pss_mb[name] = await way.peak_pss_mb(case.args)

    async def _round(self, number: int, case: Case) -> None:
        found = self._found[case.name]
        for name in _turned(list(self._ways), number):
            self._prepare_database(case)
            found.took[name].append(await self._ways[name].run(case.args))
        if case.args == ONE:
            best = self._ways[BEST]
            assert isinstance(best, Daemon)
            await best.settled()
            before, _ = await best.ask(case.args)
            after, _ = await best.ask(case.args)
            found.again.append((before, after))
            await best.settled()
        firsts = ", ".join(
            f"{name} {took[number].first_s:.2f}" for name, took in found.took.items()
        )
        say(f"{case.name}, round {number + 1}: s to the first node: {firsts}")

    def _prepare_database(self, case: Case) -> None:
        """For a build none; for one model of many, as a build would have left it."""
        path = self._project / "shop.duckdb"
        if case.args == ONE:
            if not path.exists():
                fill_database(self._project)
            return
        for file in self._project.glob("*.duckdb*"):
            file.unlink()


def _turned(names: list[str], by: int) -> Iterator[str]:
    for number in range(len(names)):
        yield names[(number + by) % len(names)]


def fill_database(project: Path) -> None:
    """A relation for every model, as a build would have left it."""
    names = [file.stem for file in project.glob("models/*/*.sql")]
    path = project / "shop.duckdb"
    with duckdb.connect(str(path)) as database:
        for name in names:
            database.sql("select range as id, 1 as amount from range(9)").create_view(name)


def _figures(case: Case, found: _Found) -> list[Figure]:
    figures = []
    for mode in MODES:
        figures += _figures_of(case, found, mode)
    if found.again:
        figures.append(
            Figure(
                name=f"{case.name}, {BEST}: first node of a second run right after",
                unit="s",
                values=[after for _, after in found.again],
                against="of the first",
                baseline=[before for before, _ in found.again],
                goal=Goal("<", 1.05, of="ratio"),
            )
        )
    return figures


def _figures_of(case: Case, found: _Found, mode: str) -> list[Figure]:
    ours, cli = found.took[mode], found.took[CLI]
    title, best, whole = f"{case.name}, {mode}", mode == BEST != "off", case.args == BUILD
    sooner = Goal("<", 1 / case.sooner, of="ratio") if best and case.sooner else None
    less = Goal("<", 1 / case.less, of="ratio") if best and case.less else None
    first = [took.first_s for took in ours]
    figures = [
        Figure(
            name=f"{title}: first node",
            unit="s",
            values=first,
            against=CLI,
            baseline=[took.first_s for took in cli],
            goal=sooner,
        ),
        Figure(
            name=f"{title}: in all",
            unit="s",
            values=[took.total_s for took in ours],
            against=CLI,
            baseline=[took.total_s for took in cli],
            goal=less,
        ),
        Figure(
            name=f"{title}: CPU",
            unit="s",
            values=[took.cpu_s for took in ours],
            against=CLI,
            baseline=[took.cpu_s for took in cli],
            goal=Goal("<", 1.03, of="ratio") if whole else less,
        ),
    ]
    if mode in BARE:
        name = f"bare {BARE[mode]}"
        figures += [
            Figure(
                name=f"{title}: first node",
                unit="s",
                values=first,
                against=name,
                baseline=[took.first_s for took in found.took[name]],
                goal=Goal("<", 1.15, of="ratio"),
            ),
            Figure(
                name=f"{title}: CPU",
                unit="s",
                values=[took.cpu_s for took in ours],
                against=name,
                baseline=[took.cpu_s for took in found.took[name]],
            ),
        ]
    if whole:
        figures += [
            Figure(
                name=f"{title}: CPU of dbt's processes alone",
                unit="s",
                values=[took.dbt_s for took in ours],
                against=CLI,
                baseline=[took.cpu_s for took in cli],
            ),
            Figure(name=f"{title}: CPU of the daemon", unit="s", values=[t.daemon_s for t in ours]),
            Figure(
                name=f"{title}: CPU of the process that reads SQL",
                unit="s",
                values=[took.reader_s for took in ours],
            ),
            Figure(
                name=f"{title}: CPU of nats-server, not in the sum",
                unit="s",
                values=[took.nats_s for took in ours],
            ),
        ]
    figures.append(
        Figure(
            name=f"{title}: peak PSS",
            unit="MB",
            values=[found.pss_mb[mode]],
            against=CLI,
            baseline=[found.pss_mb[CLI]],
        )
    )
    return figures
