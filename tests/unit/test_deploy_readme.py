"""deploy/README.md: its sums add up, and what it names is there."""

import re

import pytest

from dbtstream import instruments
from dbtstream.cli import EXIT_CONFIG, cli
from dbtstream.config import HttpConfig, StreamsConfig, WorkerConfig
from dbtstream.daemon import stop_budget_s
from dbtstream.outbox_file import MAGIC
from dbtstream.streams import wanted_streams
from tests.deploy import DEPLOY, ROOT, read_yaml, seconds

TEXT = (DEPLOY / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    _, found, rest = TEXT.partition(f"\n## {title}\n")
    assert found, title
    return rest.partition("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """The cells of its tables, without their heads."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if not set("".join(row)) <= {"-"}]


def test_the_steps_of_a_stop_add_up_to_what_the_daemon_takes() -> None:
    steps = {what: time for what, time, _ in rows("The time that a stop takes")[1:] if what}
    total = int(steps.pop("**sum**").strip("*"))
    unnamed = [int(time) for what, time, _ in rows("The time that a stop takes")[1:] if not what]
    assert sum(map(int, steps.values())) + sum(unnamed) == total
    assert total == stop_budget_s(WorkerConfig())
    worker = WorkerConfig()
    assert int(steps["dbt may finish"]) == worker.drain_timeout_s
    assert unnamed == [worker.kill_grace_s]


def test_every_service_manager_waits_longer_and_as_long_as_is_said() -> None:
    (said,) = re.findall(r"StatefulSet are (\d+) s", section("The time that a stop takes"))
    unit = (DEPLOY / "systemd" / "dbtstream.service").read_text(encoding="utf-8")
    compose = read_yaml(DEPLOY / "compose.yaml")["services"]["dbtstream"]
    pod = read_yaml(DEPLOY / "kubernetes" / "statefulset.yaml")["spec"]["template"]["spec"]
    waits = {
        *map(int, re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)),
        seconds(compose["stop_grace_period"]),
        pod["terminationGracePeriodSeconds"],
    }
    assert waits == {int(said)}
    assert int(said) > stop_budget_s(WorkerConfig())


@pytest.mark.parametrize("file", ["compose.yaml", "kubernetes/statefulset.yaml"])
def test_each_file_says_the_same_sum(file: str) -> None:
    assert f"take {stop_budget_s(WorkerConfig()):.0f} s with the config's defaults" in (
        (DEPLOY / file).read_text(encoding="utf-8")
    )


@pytest.mark.parametrize(
    "figure", ["35 MB", "55 MB", "4.7 ms", "4.1 ms", "0.4 ms", "203 ms", "5,1", "1.0 ms"]
)
def test_its_figures_are_those_of_the_benchmark(figure: str) -> None:
    ours = {"5,1": "5,000 events", "1.0 ms": "1 ms", "203 ms": "5 … 203 ms"}
    cost = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Cost\n")[2]
    assert figure in cost.partition("\n## ")[0]
    assert ours.get(figure, figure) in section("Sizing")


def test_the_example_of_the_sizing_is_worked_out_right() -> None:
    figures = {what: figure for _, what, figure in rows("Sizing") if figure}

    def of_run(what: str) -> tuple[float, float]:
        """What one of 500 nodes takes, in GB, and what each of the nodes does, in KB."""
        row = re.match(r"(?:([\d.]+) MB, and )?([\d.]+) KB for each node", figures[what])
        assert row
        fixed_mb, node_kb = float(row[1] or 0), float(row[2])
        return (fixed_mb * 1e6 + 500 * node_kb * 1e3) / 1e9, node_kb

    events, events_kb = of_run("run, in DBT_EVENTS")
    artifacts, artifacts_kb = of_run("run, in dbt_artifacts")
    kept, kept_kb = of_run("run that is kept")
    said = re.search(
        r"Ten runs a day of 500 nodes are ([\d.]+) GB of events and ([\d.]+) GB of artifacts"
        r" in 14 days, and ([\d.]+) GB of kept runs",
        section("Sizing"),
    )
    assert said
    runs = 10 * StreamsConfig().events_max_age_s / 86400
    assert [float(found) for found in said.groups()] == [
        round(total, 1)
        for total in (runs * events, runs * artifacts, WorkerConfig().keep_runs * kept)
    ]
    # The formulas have the same figures.
    formulas = section("Sizing").partition("So a worker wants")[2]
    assert f"nodes × {events_kb:g} KB × days" in formulas
    assert f"nodes × {artifacts_kb:g} KB) × days" in formulas
    assert f"nodes × {kept_kb:g} KB) +" in formulas


def test_its_defaults_are_the_defaults() -> None:
    streams = StreamsConfig()
    assert f"events_max_age_s: {streams.events_max_age_s / 86400:.0f} days" in TEXT
    assert f"events_max_bytes: {streams.events_max_bytes / 1024**3:.0f} GiB" in TEXT
    assert f"`outbox_max_bytes` ({WorkerConfig().outbox_max_bytes / 1024**3:.0f} GiB)" in TEXT
    assert f"`http.listen` ({HttpConfig().listen} by default" in TEXT
    assert f"exit code {EXIT_CONFIG}" in TEXT
    assert f"`{MAGIC.decode()}`" in TEXT


def test_every_stream_is_backed_up_or_said_not_to_be_worth_it() -> None:
    told = {name for row in rows("Backup and restore") for name in re.findall(r"`(\w+)`", row[0])}
    streams = {wanted.name for wanted in wanted_streams(StreamsConfig())}
    assert told == streams
    (loop,) = re.findall(r"for s in (DBT_.*); do", section("Backup and restore"))
    assert set(loop.split()) == streams - {"DBT_ADVISORIES", "KV_dbt_leases"}


def test_metrics_and_commands_that_it_names_exist() -> None:
    names = {
        metric.name.replace(".", "_")
        for metric in vars(instruments).values()
        if isinstance(metric, instruments.Instrument)
    }
    found = re.findall(r"\bdbtstream_\w+", TEXT.replace("test_", ""))
    assert found
    assert set(found) <= names
    commands = set(re.findall(r"(?:^    |`)dbtstream (?:--config \S+ )?(\w+)", TEXT, re.MULTILINE))
    assert {"check", "setup", "serve"} <= commands
    assert commands <= set(cli.commands)


def test_what_it_names_is_there() -> None:
    for path in re.findall(r"deploy/[\w./-]*\w", TEXT):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:nats|systemd|kubernetes|docker|tempo)/[\w./-]*)`", TEXT):
        assert (DEPLOY / path).exists(), path
    for path in re.findall(r"`(?:tests/\w+/)?(test_\w+\.py)`", TEXT):
        assert list((ROOT / "tests").rglob(path)), path
