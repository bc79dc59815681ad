"""What the telemetry shows, on loopback and in a minute or two: `make telemetry-demo`.

A daemon, a Prometheus with deploy/prometheus, and a receiver of OTLP. The sample project runs in
five ways: all well, only in part, with a stale source, cancelled, and compiled. Printed are the
trace of the run that went wrong and what every panel of the dashboards has to say. It needs
Prometheus' programs, which the same make target fetches.
"""

import asyncio
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from dbtstream.config import (
    Config,
    HttpConfig,
    NatsConfig,
    OtlpConfig,
    ProjectConfig,
    TelemetryConfig,
    WorkerConfig,
)
from dbtstream.embedded import NatsServer
from dbtstream.events import NodeStarted, RunFinished
from dbtstream.local_run import DEMO_PROJECT, DEMO_TARGET, copy_demo
from tests import traceql
from tests.daemons import Served, serving
from tests.dashboards import Asked, Expression, answers, load_dashboards, panels_of
from tests.otlp_sink import OtlpSink, otlp_sink
from tests.prometheus import MISSING, Prometheus, find, prometheus

SHOWN_SERIES = 4
"""Of a panel; the rest is counted."""

ENDLESS = "select sum(a.range * b.range) as n from range(100000000) a, range(1000000) b\n"

console = Console(soft_wrap=False)


@dataclass
class Stage:
    """All that the demo talks to."""

    served: Served
    prometheus: Prometheus
    sink: OtlpSink
    project: Path
    asked: Asked
    runs: int = 0

    async def run(self, title: str, *args: str, cancel: bool = False) -> RunFinished:
        """To its end, until Prometheus and the receiver have it."""
        client = self.served.client
        accepted = await client.submit(DEMO_PROJECT, list(args), target=DEMO_TARGET)
        finished: RunFinished | None = None
        async for event in client.events(run_id=accepted.run_id):
            if cancel and isinstance(event, NodeStarted) and event.node.name == "endless":
                await client.cancel(accepted.run_id, by="demo", reason="to show it")
            if isinstance(event, RunFinished):
                finished = event
        assert finished is not None
        self.runs += 1
        await self.prometheus.until(
            "sum(dbtstream_run_ended_total)", lambda values: values == [self.runs]
        )
        await self.sink.until(lambda sink: _run_span(sink, accepted.run_id))
        took = f"{finished.elapsed_s:.1f} s"
        console.print(f"{title:24} {' '.join(args):32} {finished.status:10} {took:>8}")
        return finished


async def demo() -> None:
    with tempfile.TemporaryDirectory(prefix="dbtstream-telemetry-") as name, otlp_sink() as sink:
        folder = Path(name)
        project = await asyncio.to_thread(copy_demo, folder / "project")
        async with NatsServer.start(folder / "nats") as server:
            config = _config(folder, server.url, project, sink.url)
            async with serving(config) as served:
                assert served.daemon.http is not None
                address = served.daemon.http.address
                async with prometheus(folder / "prometheus", address) as watching:
                    asked = Asked(since=time.time(), range_s=900)
                    stage = Stage(served, watching, sink, folder / "project", asked)
                    await _show(stage)


def _config(folder: Path, nats_url: str, project: ProjectConfig, otlp_url: str) -> Config:
    return Config(
        nats=NatsConfig(servers=(nats_url,)),
        worker=WorkerConfig(name="demo", state_dir=str(folder / "state"), slots=2),
        http=HttpConfig(listen="127.0.0.1:0"),
        telemetry=TelemetryConfig(node_metrics=True, otlp=OtlpConfig(endpoint=otlp_url)),
        projects={DEMO_PROJECT: project},
        source="telemetry demo",
    )


async def _show(stage: Stage) -> None:
    console.rule("Five runs")
    await stage.run("all well, with a warning", "build")
    _spoil(stage.project)
    bad = await stage.run("a model, a test go wrong", "build", "--select", "dim_planes+", "wrong")
    await stage.run("a stale source", "source", "freshness")
    await stage.run("cancelled", "run", "--select", "endless", cancel=True)
    await stage.run("only compiled", "compile")

    console.rule("The trace of the second run")
    assert bad.trace_id is not None
    for line in stage.sink.tree(bad.trace_id):
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    for dashboard in load_dashboards().values():
        console.print()
        console.print(await _values(stage, dashboard, bad.run_id))


def _spoil(project: Path) -> None:
    """What was right in the first run goes wrong from now on."""
    (project / "models/marts/network/dim_planes.sql").write_text("select nothing from nowhere\n")
    (project / "tests/wrong.sql").write_text("select 1 as day from {{ ref('stg_airlines') }}\n")
    (project / "models/endless.sql").write_text(ENDLESS)
    sources = project / "models/staging/_sources.yml"
    text = sources.read_text(encoding="utf-8")
    old = text.replace("loaded_at_field: loaded_at", "loaded_at_field: loaded_at - interval 3 day")
    assert old != text
    sources.write_text(old, encoding="utf-8")


def _run_span(sink: OtlpSink, run_id: str) -> bool:
    return any(
        span.kind == "CONSUMER" and span.attributes.get("dbtstream.run.id") == run_id
        for span in sink.spans
    )


# -- what the panels say -----------------------------------------------------------------------


async def _values(stage: Stage, dashboard: Mapping[str, Any], run_id: str) -> Table:
    table = Table(title=dashboard["title"], title_style="bold", expand=True)
    table.add_column("Panel", ratio=2)
    table.add_column("Says", ratio=3)
    variables = {"run": run_id, "project": DEMO_PROJECT, "target": DEMO_TARGET}
    for panel in panels_of(dashboard):
        said: list[str] = []
        for target in panel.get("targets", []):
            if "expr" in target:
                said += await _answers(stage, panel, target)
            else:
                said.append(_spans(stage.sink, target["query"], variables))
        if said:
            table.add_row(panel["title"], "\n".join(said))
    return table


async def _answers(stage: Stage, panel: Mapping[str, Any], target: Mapping[str, Any]) -> list[str]:
    """Of a panel over time what it was at most; of a heatmap the number of all."""
    legend, over_time = target.get("legendFormat", ""), bool(target.get("range"))
    found = await answers(stage.prometheus, Expression("", target["expr"], over_time), stage.asked)
    if panel["type"] == "heatmap":
        return [f"{max(value for _, values in found for value in values):.0f} at one time"]
    column, unit = _column(panel, target)
    lines = [
        f"{_name(metric, legend)}  {_number(max(values), unit)}".strip()
        for metric, values in sorted(found, key=lambda series: -max(series[1]))
    ]
    rest = len(lines) - SHOWN_SERIES
    more = [f"and {rest} more"] if rest > 0 else []
    return [*([f"{column}:"] if column else []), *lines[:SHOWN_SERIES], *more] or ["nothing"]


def _column(panel: Mapping[str, Any], target: Mapping[str, Any]) -> tuple[str, str]:
    """The title of a table's column, and the unit of the numbers."""
    field = f"Value #{target['refId']}"
    titles: Mapping[str, str] = {}
    for transformation in panel.get("transformations", []):
        titles = transformation["options"].get("renameByName", titles)
    title = titles.get(field, "")
    config = panel["fieldConfig"]
    unit: str = config["defaults"].get("unit", "")
    for override in config["overrides"]:
        if override["matcher"]["options"] == title:
            units = [each["value"] for each in override["properties"] if each["id"] == "unit"]
            unit = units[0] if units else unit
    return title, unit


def _spans(sink: OtlpSink, query: str, variables: Mapping[str, str]) -> str:
    if query == "$trace":
        return "the trace as above"
    found, _ = traceql.find(query, sink.spans, variables)
    return f"{len(found)} spans, such as {found[0].name}" if found else "no spans"


def _name(metric: Mapping[str, str], legend: str) -> str:
    """A series as Grafana would call it; in a table, by all its labels."""
    if legend:
        return re.sub(r"\{\{(\w+)\}\}", lambda found: metric.get(found[1], ""), legend).strip()
    return " / ".join(value for key, value in metric.items() if key not in ("__name__", "job"))


def _number(value: float, unit: str) -> str:
    match unit:
        case "percentunit":
            return f"{value:.0%}"
        case "bytes":
            return f"{value / 2**20:.1f} MiB"
        case "s":
            return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
        case "eps" | "cps":
            return f"{value:.1f}/s"
    return f"{value:g}" if value == int(value) else f"{value:.1f}"


def main() -> None:
    if find("prometheus") is None:
        sys.exit(f"The demo needs Prometheus: {MISSING}.")
    uvloop.run(demo())


if __name__ == "__main__":
    main()
