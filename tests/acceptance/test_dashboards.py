"""Every panel and every alert has something to say about a daemon that has seen everything.

A real Prometheus, with the rules of deploy/, scrapes a daemon whose runs succeeded, warned, failed,
ended in an error, skipped nodes, ran out of time, were cancelled, and found a stale source. Then
each expression of the dashboards is asked, and each metric in it. Tempo is not to be had: of what
is asked there, the spans must be among those that a receiver of OTLP got.
"""

import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dbtstream.config import NatsConfig, OtlpConfig, TelemetryConfig
from dbtstream.events import NodeStarted
from dbtstream.instruments import RUN_STATUS
from dbtstream.statuses import RunStatus
from deploy.grafana.source.traceql import RUN_ID
from tests import traceql
from tests.daemons import Served, daemon_config, serving
from tests.dashboards import (
    Asked,
    Expression,
    expressions_of,
    load_dashboards,
    problems,
    rule_expressions,
    traceql_of,
)
from tests.otlp_sink import Mood, OtlpSink, SinkSpan, otlp_sink
from tests.prometheus import Prometheus, prometheus

PROJECT = """
    import datetime

    def iso(ago):
        return (datetime.datetime.utcnow() - datetime.timedelta(seconds=ago)).isoformat()

    def check(name, severity):
        return {"unique_id": f"test.shop.{name}", "resource_type": "test", "name": name,
            "package_name": "shop", "materialized": "test", "upstream": ["model.shop.orders"],
            "owners": ["finance"], "test": {"severity": severity,
            "attached_node": "model.shop.orders"}}

    def source(name):
        return {"unique_id": f"source.shop.raw.{name}", "resource_type": "source", "name": name,
            "package_name": "shop", "owners": ["loaders"]}

    ended = []

    def end(unique_id, status, took_s=0.5, **fields):
        send("node_start", unique_id=unique_id, started_at=iso(took_s))
        send("node_work", unique_id=unique_id, index=1, total=1)
        send("node_finish", unique_id=unique_id, status=status, started_at=iso(took_s),
            finished_at=iso(0), timing=[{"name": "execute", "started_at": iso(took_s) + "Z",
            "completed_at": iso(0) + "Z"}], **fields)
        ended.append({"unique_id": unique_id, "status": status, "execution_s": took_s,
            "failures": fields.get("failures")})

    def over(code, **fields):
        send("results", results=ended)
        send("result", success=code == 0, exit_code=code, result_count=len(ended),
            stats={"max_rss_bytes": 150_000_000, "cpu_s": 1.5}, **fields)

    rows = {"adapter_response": {"rows_affected": 100}}
    words = start_line()["args"]
    hello()
    match words[words.index("--select") + 1]:
        case "good":
            plan(model("orders"), check("positive", "WARN"))
            end("model.shop.orders", "success", 1.5, **rows)
            end("test.shop.positive", "warn", failures=3, message="Got 3 results")
            over(0)
        case "bad":
            plan(model("orders"), check("unique", "ERROR"), model("broken", owners=["marketing"]),
                model("daily", "broken"))
            end("model.shop.orders", "success", **rows)
            end("test.shop.unique", "fail", failures=7, message="Got 7 results")
            end("model.shop.broken", "error", message="Database Error in model broken")
            send("node_start", unique_id="model.shop.daily")
            send("node_skip", unique_id="model.shop.daily")
            send("node_finish", unique_id="model.shop.daily", status="skipped")
            ended.append({"unique_id": "model.shop.daily", "status": "skipped"})
            over(1)
        case "ill":
            send("result", success=False, exit_code=2, result_count=-1,
                error={"error_class": "DbtProjectError", "message": "no such profile"})
        case "endless":
            plan(model("orders"))
            started("orders")
            control_line()
            send("cancelling", by="control")
            finished("orders", "error", message="INTERRUPT Error: Interrupted!")
            result(2, [], interrupted=True,
                error={"error_class": "KeyboardInterrupt", "message": ""})
        case "sources":
            plan(source("fresh"), source("stale"))
            for name, status, age_s in (("fresh", "pass", 60.0), ("stale", "error", 500_000.0)):
                end(f"source.shop.raw.{name}", status)
                ended[-1]["freshness"] = {"age_s": age_s, "error_after_s": 86400.0}
            over(1)
"""

ENDED = "sum(dbtstream_run_ended_total)"
NOT_TAKEN = 'dbtstream_stage_failed_total{dbtstream_stage="telemetry"}'

FIRING = {"DbtstreamRunFailed", "DbtstreamSourceStale", "DbtstreamNodeProblems"}
"""Of such runs, at once; the others wait for minutes, or for something worse."""

NEVER_HERE = 'dbtstream_run_status=~"lost"'
"""One panel asks for each way to end by itself, and no worker was lost."""


@dataclasses.dataclass
class Observed:
    """A daemon at work, what watches it, and since when."""

    served: Served
    prometheus: Prometheus
    sink: OtlpSink
    asked: Asked
    ended: int = 0

    async def run(self, word: str, command: str = "build", **request: Any) -> None:
        """To its end, until Prometheus has seen that."""
        asked: dict[str, Any] = {"target": "dev"} | request
        accepted = await self.served.client.submit(
            "shop", [*command.split(), "--select", word], **asked
        )
        await self.served.events(accepted.run_id)
        await self.seen()

    async def cancelled_run(self) -> None:
        accepted = await self.served.client.submit(
            "shop", ["build", "--select", "endless"], target="dev"
        )
        async for event in self.served.client.events(run_id=accepted.run_id):
            if isinstance(event, NodeStarted):
                await self.prometheus.until(
                    'dbtstream_run_active{dbtstream_run_status="running"}', any
                )
                await self.served.client.cancel(accepted.run_id, by="test")
        await self.seen()

    async def rejected_request(self) -> None:
        await self.served.publish("dbt.runs.shop.dev", b'{"args": ["no-such-command"]}')
        await self.prometheus.until("sum(dbtstream_request_rejected_total)", any)
        await self.prometheus.until("dbtstream_dead_letter_count", any)

    async def untraced(self, queries: Iterable[Expression]) -> list[str]:
        """Queries of Tempo that find nothing, once the last batch of spans is there."""
        with contextlib.suppress(TimeoutError):
            await self.sink.until(lambda sink: not unanswered(queries, sink.spans), 10)
        return unanswered(queries, self.sink.spans)

    async def seen(self) -> None:
        self.ended += 1
        await self.prometheus.until(ENDED, lambda values: values == [self.ended])


@asynccontextmanager
async def observed(folder: Path, nats: NatsConfig) -> AsyncIterator[Observed]:
    since = time.time()
    with otlp_sink() as sink:
        telemetry = TelemetryConfig(node_metrics=True, otlp=OtlpConfig(endpoint=sink.url))
        config = daemon_config(folder, nats, PROJECT, listen="127.0.0.1:0", telemetry=telemetry)
        async with serving(config) as served:
            assert served.daemon.http is not None
            address = served.daemon.http.address
            async with prometheus(folder / "prometheus", address) as server:
                await server.until("dbtstream_slot_limit")
                yield Observed(served, server, sink, Asked(since=since, range_s=300))


@asynccontextmanager
async def seen_everything(folder: Path, nats: NatsConfig) -> AsyncIterator[Observed]:
    """Prometheus looks at the daemon between any two of these."""
    async with observed(folder, nats) as here:
        await here.run("good")
        await here.run("bad")
        await here.run("ill", "run")
        await here.run("endless", "run", timeout_s=0.2)
        await here.cancelled_run()
        await here.rejected_request()
        here.sink.mood = Mood.ERROR
        await here.run("sources", "source freshness")
        await here.prometheus.until(NOT_TAKEN, any)
        here.sink.mood = Mood.WELL
        await here.run("good", "run", target="prod")
        yield here


@pytest.mark.timeout(240)  # eight runs, and a scrape after each
async def test_every_panel_and_every_alert_has_data(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    dashboards = load_dashboards()
    panels = [each for one in dashboards.values() for each in expressions_of(one)]
    misspelt = dataclasses.replace(panels[0], text=panels[0].text.replace("lag", "lags"))
    covered = Expression("covered up", "sum(dbtstream_run_actives) or vector(0)")
    queries = [each for one in dashboards.values() for each in traceql_of(one)]
    recorded = [each for each in rule_expressions() if ":" in each.where]
    alerts = [each for each in rule_expressions() if ":" not in each.where]

    async with seen_everything(tmp_path, nats_config) as here:
        server, asked = here.prometheus, here.asked
        for alert in FIRING:
            await server.until(f'ALERTS{{alertname="{alert}",alertstate="firing"}}')
        found = [
            *await problems(server, panels, asked),
            *await problems(server, recorded, asked),
            *await problems(server, alerts, asked, whole=False),
        ]
        wrong = await problems(server, [misspelt, covered], asked)
        state = await server.ask("rules")
        firing = await server.ask("alerts")
        found += await here.untraced(queries)

    found = [line for line in found if NEVER_HERE not in line]
    assert not found, "\n".join(found)
    assert [line.split(": no series")[0] for line in wrong] == [
        "dbtstream / Daemon health: Loop lag, 99 % A: empty",
        "dbtstream / Daemon health: Loop lag, 99 % A",
        "covered up",
    ]
    ill = [rule for group in state["groups"] for rule in group["rules"] if rule["health"] != "ok"]
    assert not ill
    fired = [alert for alert in firing["alerts"] if alert["state"] == "firing"]
    assert {alert["labels"]["alertname"] for alert in fired} == FIRING
    assert {alert["labels"].get("dbt_node_owner") for alert in fired} >= {"finance", "marketing"}
    texts = [text for alert in firing["alerts"] for text in alert["annotations"].values()]
    assert not [text for text in texts if "<error" in text or "no value" in text]


def unanswered(queries: Iterable[Expression], spans: Sequence[SinkSpan]) -> list[str]:
    """Queries of Tempo that find no span of the run that failed, or not what they want of it."""
    runs = [each for each in spans if each.attributes.get(RUN_STATUS) == RunStatus.FAILURE]
    if not runs:
        return ["there is no run yet"]
    variables = {"run": runs[0].attributes[RUN_ID], "project": "shop", "target": ".*"}
    found = []
    for query in queries:
        if query.text != "$trace":
            matched, absent = traceql.find(query.text, spans, variables)
            found += [f"{query.where}: {name}" for name in ([] if matched else ["-"]) + absent]
    return found
