"""The child's callback: its mean time per dbt event, and its share of the child's CPU.

Measured: `dbt build` of 300 models and 300 tests on DuckDB by the dbt child, which with
`Start.measure` adds up the CPU time of the calling thread in its callback (less what the same
measurement of an empty function beside it takes) and counts the events. Against: the CPU of the
same build by dbt's own command line, which calls nobody back; the two alternate.

Disturbed by: cold caches, which are part of the truth: between two callbacks dbt does other
things, so an event costs several times what it does in a loop of its own. Frames are made of few
events (about one in eight); the mean is over all. Packing and writing frames is the writer thread's
work and not in here: `overhead` has it.
"""

from tests.bench.builds import Build, Builds
from tests.bench.figures import Figure, Goal
from tests.bench.options import Options, say, scratch

ROUNDS = 3


async def measure(options: Options) -> list[Figure]:
    size = options.size(300, 30)
    measured: list[Build] = []
    plain: list[Build] = []
    with scratch() as folder:
        builds = Builds(folder, models=size, tests=size)
        await builds.warm_up()
        for number in range(options.rounds):
            # Each one is first in every other round.
            for observed in (True, False) if number % 2 else (False, True):
                if observed:
                    measured.append(await builds.observed(measure=True))
                else:
                    plain.append(await builds.plain())
            say(
                f"round {number + 1}: {measured[-1].stats.events:,} events, CPU "
                f"{measured[-1].cpu_s:.2f} s with the callback, {plain[-1].cpu_s:.2f} s without"
            )
    return _figures(measured, plain)


def _figures(measured: list[Build], plain: list[Build]) -> list[Figure]:
    spent_s = [build.stats.callback_s or 0.0 for build in measured]
    events = [build.stats.events for build in measured]
    errors = sum(build.stats.callback_errors for build in measured)
    if errors:
        raise RuntimeError(f"{errors} callbacks raised: {measured[0].stats.callback_error}")
    return [
        Figure(
            name="time in the callback, mean per event",
            unit="µs",
            values=[1e6 * s / count for s, count in zip(spent_s, events, strict=True)],
            goal=Goal("<", 5),
        ),
        Figure(
            name="time in the callback, of the child's CPU",
            unit="%",
            values=[100 * s / build.cpu_s for s, build in zip(spent_s, measured, strict=True)],
            goal=Goal("<", 1),
        ),
        Figure(
            name="time in the callback",
            unit="s",
            values=spent_s,
            against="CPU s, plain dbt",
            baseline=[build.cpu_s for build in plain],
            goal=Goal("<", 0.01, of="ratio"),
        ),
        Figure(name="events per build", unit="", values=[float(count) for count in events]),
        Figure(
            name="frames per build",
            unit="",
            values=[float(build.stats.frames) for build in measured],
        ),
    ]
