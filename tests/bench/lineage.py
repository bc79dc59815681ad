"""Lineage and assets: CPU of the daemon per node, and what they cost dbt.

Measured: real builds of 1,000 models, in each round two by a daemon with everything on (lineage,
column lineage, assets, selectors, OpenLineage to a NATS subject) and two by one with all of it
off; who begins alternates. The first build with it on tells the whole manifest and has the SQL of
all models read; so has the first one after each start of the daemon, whose memory of it is gone.
CPU of the daemon per node, with and without; of the process that reads SQL; and of dbt's process,
beside the second build without against the first one (the noise).

What it costs dbt drowns in that noise, so it is also taken from where it is spent: the CPU time of
the child's writer thread and of its callbacks, in builds of the child alone, with and without. All
of what the child does for lineage is done in these two.

Disturbed by: whatever runs beside it. dbt's process shares two cores with everything else here, so
a ratio of whole processes says no more than the noise beside it does.
"""

import msgspec
from nats.js.api import StreamConfig

from dbtstream.config import AssetsConfig, Config, LineageConfig, OpenLineageConfig
from dbtstream.statuses import RunStatus
from dbtstream.workspace import runs_dir
from tests.bench.builds import BUILD, PROJECT, Build, Builds, used
from tests.bench.figures import Figure, Goal
from tests.bench.options import Options, say, scratch
from tests.bench.served import Served, cpu_s, run_to_end, serving, sql_reader_cpu_s

ROUNDS = 2
ON, OFF = "with", "without"
SUBJECT = "openlineage.events"
SELECTORS = {"marts": "path:models/marts", "tagged": "tag:staging +tag:combined"}


async def measure(options: Options) -> list[Figure]:
    models = options.size(1000, 30)
    rounds = _Rounds(models)
    with scratch() as folder:
        builds = Builds(folder, models=models, tests=0)
        await builds.warm_up()
        for number in range(options.rounds):
            for name in (OFF, ON) if number % 2 else (ON, OFF):
                async with serving(_config(builds.config, name), folder) as served:
                    if name == ON:
                        await _openlineage_stream(served)
                    for _ in range(2):
                        await rounds.add(name, builds, served)
                await rounds.add_child(name, builds)
            say(f"round {number + 1}: {rounds.last()}")
    return rounds.figures()


def _config(config: Config, name: str) -> Config:
    """The project with everything on, or with all of it off."""
    project = config.projects[PROJECT]
    if name == ON:
        on = msgspec.structs.replace(project, selectors=SELECTORS)
        sending = OpenLineageConfig(subject=SUBJECT)
        return msgspec.structs.replace(config, projects={PROJECT: on}, openlineage=sending)
    off = msgspec.structs.replace(
        project, assets=AssetsConfig(emit=False), lineage=LineageConfig(emit=False)
    )
    return msgspec.structs.replace(config, projects={PROJECT: off})


async def _openlineage_stream(served: Served) -> None:
    """There from an earlier round, or made."""
    await served.link.js.add_stream(StreamConfig(name="OPENLINEAGE", subjects=[SUBJECT]))


class _Rounds:
    def __init__(self, models: int) -> None:
        self._models = models
        self._dbt: dict[str, list[Build]] = {ON: [], OFF: []}
        self._daemon_s: dict[str, list[float]] = {ON: [], OFF: []}
        self._reader_s: list[float] = []
        self._child: dict[str, list[Build]] = {ON: [], OFF: []}

    async def add_child(self, name: str, builds: Builds) -> None:
        on = name == ON
        build = await builds.observed(measure=True, lineage=on, selectors=SELECTORS if on else None)
        self._child[name].append(build)

    async def add(self, name: str, builds: Builds, served: Served) -> None:
        builds.forget_database()
        before = cpu_s(served.daemon), sql_reader_cpu_s(served.daemon)
        finished = await run_to_end(served.client, PROJECT, BUILD)
        if finished.status is not RunStatus.SUCCESS:
            raise RuntimeError(f"a build ended with {finished}")
        self._daemon_s[name].append(cpu_s(served.daemon) - before[0])
        if name == ON:
            self._reader_s.append(sql_reader_cpu_s(served.daemon) - before[1])
        folder = runs_dir(builds.config, PROJECT, finished.target) / finished.run_id
        self._dbt[name].append(used(folder / "logs"))

    def last(self) -> str:
        return ", ".join(
            f"{name}: dbt {[round(b.cpu_s, 1) for b in self._dbt[name][-2:]]} s, "
            f"daemon {[round(s, 2) for s in self._daemon_s[name][-2:]]} s"
            for name in (ON, OFF)
        )

    def figures(self) -> list[Figure]:
        on, off = self._daemon_s[ON], self._daemon_s[OFF]
        dbt = {name: _pairs([build.cpu_s for build in self._dbt[name]]) for name in (ON, OFF)}
        return [
            Figure(
                name="CPU of the daemon, per node",
                unit="ms",
                values=self._per_node(on),
                against="without",
                baseline=self._per_node(off),
            ),
            Figure(
                name="CPU of the daemon for it, per node",
                unit="ms",
                values=self._per_node([a - b for a, b in zip(on, off, strict=True)]),
                goal=Goal("<", 5),
            ),
            Figure(
                name="CPU of the process that reads SQL, per node",
                unit="ms",
                values=self._per_node(self._reader_s),
            ),
            Figure(
                name="CPU of the child's own code for it, of dbt's process",
                unit="%",
                values=[
                    100 * (_own_s(a) - _own_s(b)) / b.cpu_s
                    for a, b in zip(self._child[ON], self._child[OFF], strict=True)
                ],
                goal=Goal("<", 1),
            ),
            Figure(
                name="CPU of dbt's process",
                unit="s",
                values=[sum(pair) / 2 for pair in dbt[ON]],
                against="without",
                baseline=[sum(pair) / 2 for pair in dbt[OFF]],
            ),
            Figure(
                name="CPU of dbt's process without (the noise)",
                unit="s",
                values=[pair[1] for pair in dbt[OFF]],
                against="the other one of the round",
                baseline=[pair[0] for pair in dbt[OFF]],
            ),
        ]

    def _per_node(self, seconds: list[float]) -> list[float]:
        return [1000 * s / self._models for s in seconds]


def _own_s(build: Build) -> float:
    return (build.stats.callback_s or 0.0) + build.stats.writer_s


def _pairs(values: list[float]) -> list[tuple[float, float]]:
    return list(zip(values[::2], values[1::2], strict=True))
