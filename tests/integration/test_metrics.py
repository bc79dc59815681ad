"""What a served daemon tells on /metrics, whatever became of its runs."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dbtstream.config import NatsConfig, OtlpConfig, TelemetryConfig
from dbtstream.events import NodeStarted
from dbtstream.instruments import INSTRUMENTS, Kind
from dbtstream.messages import OnBusy
from tests.daemons import Served, daemon_config, serving
from tests.otlp_sink import SinkPoint, otlp_sink
from tests.scrapes import ANY_PORT, Scrape, get, scrape
from tests.scripted_child import GOOD_RUN

ALL_WAYS = """
    start = start_line()
    hello()
    began, done = "2026-03-01T12:00:00", "2026-03-01T12:00:07"
    stats = {"max_rss_bytes": 90_000_000, "cpu_s": 1.5}
    interrupted = {"error_class": "KeyboardInterrupt", "message": ""}

    def ran(name, status="success", **fields):
        send("node_start", unique_id=name, started_at=began)
        send("node_work", unique_id=name, index=1, total=1)
        timing = [{"name": "execute", "started_at": began, "completed_at": done}]
        send("node_finish", unique_id=name, status=status, started_at=began, finished_at=done,
             timing=timing, **fields)

    def skipped(name):
        send("node_start", unique_id=name)
        send("node_skip", unique_id=name)
        send("node_finish", unique_id=name, status="skipped")

    def test(name, severity):
        return {"unique_id": f"test.shop.{name}.1", "resource_type": "test", "name": name,
                "package_name": "shop", "materialized": "test", "upstream": ["model.shop.orders"],
                "test": {"attached_node": "model.shop.orders", "severity": severity}}

    def ends(code, results, **fields):
        send("results", results=[{"unique_id": n, "status": s, **more} for n, s, more in results])
        send("result", success=code == 0, exit_code=code, result_count=len(results), stats=stats,
             **fields)

    if "freshness" in start["args"]:
        source = {"unique_id": "source.shop.raw.late", "resource_type": "source", "name": "late",
                  "package_name": "shop"}
        plan(source)
        ran(source["unique_id"], "error")
        ends(1, [(source["unique_id"], "error", {"freshness": {"age_s": 7200.0}})])
    elif "wait" in start["args"]:
        plan(model("orders"))
        started("orders")
        control_line()
        send("cancelling", by="control")
        send("result", success=False, exit_code=2, result_count=-1, stats=stats, interrupted=True,
             error=interrupted)
    else:
        plan(model("orders", owners=["ada@example.com"]), model("broken", "orders"),
             model("daily", "broken"), test("unique", "ERROR"), test("fresh", "WARN"))
        ran("model.shop.orders", adapter_response={"rows_affected": 5})
        ran("test.shop.unique.1", "fail", failures=3)
        ran("test.shop.fresh.1", "warn", failures=2)
        send("node_error", unique_id="model.shop.broken", error_class="DbtDatabaseError",
             message="Database Error in model broken", code="1")
        ran("model.shop.broken", "error", message="Database Error in model broken")
        skipped("model.shop.daily")
        ends(1, [("model.shop.orders", "success", {}), ("test.shop.unique.1", "fail", {}),
                 ("test.shop.fresh.1", "warn", {}), ("model.shop.broken", "error", {}),
                 ("model.shop.daily", "skipped", {})])
"""

MANY_NODES = """
    start_line()
    hello()
    count = 10_000
    plan(*(model(f"m{n}", owners=[f"team-{n % 7}"], materialized=f"own_{n}")
           for n in range(count)))
    frames = []
    for n in range(count):
        status = ("success", "error", "warn", "success")[n % 4]
        name = f"model.shop.m{n}"
        frames.append(pack("node_start", unique_id=name) + pack("node_work", unique_id=name,
            index=1, total=count) + pack("node_finish", unique_id=name, status=status,
            message=f"Oddity {n} Error in model m{n}" if status == "error" else None))
        if len(frames) == 100:
            raw(b"".join(frames))
            frames = []
    result(1, [(f"m{n}", ("success", "error", "warn", "success")[n % 4]) for n in range(count)])
"""


async def until(served: Served, fact: Callable[[Scrape], object]) -> Scrape:
    """The first scrape of which `fact` is true."""
    async with asyncio.timeout(30):
        while not fact(found := await scrape(served)):  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.05)
    return found


def expected_names() -> set[str]:
    """One sample name of each instrument."""
    return {
        name + ("_count" if instrument.kind is Kind.HISTOGRAM else "")
        for instrument in INSTRUMENTS
        for name in [instrument.prometheus_name]
    }


async def test_every_instrument_is_there_after_runs_that_ended_in_all_ways(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    config = daemon_config(
        tmp_path,
        nats_config,
        ALL_WAYS,
        listen=ANY_PORT,
        telemetry=TelemetryConfig(node_metrics=True),
    )
    async with serving(config) as served:
        await served.run(["build"])
        await served.run(["source", "freshness"])
        accepted = await served.client.submit("shop", ["build", "-s", "wait"], target="dev")
        running = await until(
            served,
            lambda s: s.by("dbtstream_run_status", "dbtstream_run_active").get("running"),
        )
        await served.client.cancel(accepted.run_id)
        await served.events(accepted.run_id)
        await served.publish("dbt.runs.shop.dev", b"not JSON")
        found = await until(
            served,
            lambda s: (
                expected_names() <= s.names
                and s.value("dbtstream_request_rejected_total")
                and s.value("dbtstream_dead_letter_count")
                and not s.value("dbtstream_slot_used")
            ),
        )

    assert running.value("dbtstream_slot_used") == 1
    assert found.names >= expected_names()
    assert_what_happened(found)


def assert_what_happened(found: Scrape) -> None:
    assert found.by("dbtstream_run_status", "dbtstream_run_ended_total") == {
        "success": 0,
        "failure": 2,
        "cancelled": 1,
        "error": 0,
        "timed_out": 0,
        "lost": 0,
    }
    assert found.by("dbt_node_status", "dbtstream_node_duration_seconds_count") == {
        "success": 1,
        "fail": 1,
        "warn": 1,
        "error": 2,
        "skipped": 1,
        "cancelled": 1,
    }
    assert found.by("error_type", "dbtstream_node_duration_seconds_count") == {
        "": 4,
        "test_failed": 1,
        "database_error": 1,
        "source_stale": 1,
    }
    assert found.by("dbt_node_owner", "dbtstream_node_problems_total") == {
        "ada@example.com": 0,
        "none": 4,
    }
    assert found.by("dbt_test_severity", "dbtstream_test_failures_total") == {"error": 3, "warn": 2}
    assert found.by("dbt_freshness_outcome", "dbtstream_source_count") == {
        "passed": 0,
        "warned": 0,
        "failed": 1,
        "error": 0,
    }
    late = {"dbt_node_unique_id": "source.shop.raw.late", "dbt_freshness_outcome": "failed"}
    assert found.value("dbtstream_source_freshness_age_seconds", **late) == 7200
    orders = {"dbt_node_unique_id": "model.shop.orders"}
    assert found.value("dbtstream_run_slowest_duration_seconds", **orders) == 7
    exits = found.by("dbtstream_reason", "dbtstream_child_exits_total")
    assert {reason: n for reason, n in exits.items() if n} == {"failure": 2, "interrupted": 1}
    assert found.value("dbtstream_child_cpu_time_seconds_total") == 4.5
    assert found.value("dbtstream_child_memory_max_bytes") == 90_000_000
    assert found.value("dbtstream_node_rows_affected_total") == 5
    assert found.value("dbtstream_request_rejected_total", dbtstream_reason="bad_message") == 1
    assert found.value("dbtstream_nats_connections") == 2
    stage = {"dbtstream_stage": "events"}
    stored = found.value("dbtstream_event_published_total")
    assert stored > 20
    assert 1 <= found.value("dbtstream_event_publish_lag_seconds_count") <= stored
    assert stored == found.value("dbtstream_stage_sent_total", **stage)


async def test_every_label_is_one_that_the_instrument_names(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    async with serving(daemon_config(tmp_path, nats_config, ALL_WAYS, listen=ANY_PORT)) as served:
        await served.run(["build"])
        found = await scrape(served)

    allowed = {
        instrument.prometheus_name: {label.replace(".", "_") for label in instrument.attributes}
        for instrument in INSTRUMENTS
    }
    ours = [
        (name, labels)
        for sample, labels, _ in found.samples
        for name in [sample.removesuffix("_count").removesuffix("_sum").removesuffix("_bucket")]
        if sample.startswith(("dbtstream_", "process_"))
    ]
    assert len(ours) > 100
    for name, labels in ours:
        assert labels.keys() - {"le"} <= allowed[name], name


async def test_ten_thousand_nodes_make_few_series(tmp_path: Path, nats_config: NatsConfig) -> None:
    config = daemon_config(
        tmp_path, nats_config, MANY_NODES, listen=ANY_PORT, project={"targets": ("dev",)}
    )
    async with serving(config) as served:
        accepted = await served.client.submit("shop", ["build"], target="dev")
        async with asyncio.timeout(120):
            await served.client.wait(accepted.run_id)
        found = await scrape(served)

    assert found.value("dbtstream_node_duration_seconds_count") == 10_000
    assert found.by("dbt_node_materialization", "dbtstream_node_duration_seconds_count") == {
        "custom": 10_000
    }
    assert len(found.samples) < 500


async def test_what_waits_in_the_queue_is_told_with_its_age(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    async with serving(daemon_config(tmp_path, nats_config, ALL_WAYS, listen=ANY_PORT)) as served:
        runs = [
            await served.client.submit("shop", ["build", "-s", "wait"], target="dev")
            for _ in range(3)
        ]
        dev = {"dbt_project_name": "shop", "dbt_target_name": "dev"}
        found = await until(
            served,
            lambda s: (
                s.all("dbtstream_queue_pending", **dev) == [3]
                and s.value("dbtstream_queue_oldest_age_seconds", **dev)
            ),
        )
        later = await until(
            served,
            lambda s: (
                s.value("dbtstream_queue_oldest_age_seconds", **dev)
                > found.value("dbtstream_queue_oldest_age_seconds", **dev)
            ),
        )
        for run in reversed(runs):
            await served.client.cancel(run.run_id)

    prod = dev | {"dbt_target_name": "prod"}
    assert found.value("dbtstream_queue_pending", **prod) == 0
    assert later.value("dbtstream_queue_oldest_age_seconds", **prod) == 0


async def test_a_daemon_that_was_restarted_still_knows_when_runs_last_ended(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    config = daemon_config(tmp_path, nats_config, GOOD_RUN, listen=ANY_PORT)
    name = "dbtstream_run_last_completion_time_seconds"
    async with serving(config) as served:
        await served.run()
        await served.queue_empty()
        before = await scrape(served)
    async with serving(config) as served:
        after = await until(served, lambda s: s.all(name))

    which = {"dbt_command": "build", "dbtstream_run_status": "success", "dbt_target_name": "dev"}
    assert abs(after.value(name, **which) - before.value(name, **which)) < 0.001
    assert after.value("dbtstream_run_last_duration_seconds", dbt_command="build") > 0
    assert after.value("dbtstream_run_ended_total") == 0


async def test_a_daemon_that_was_restarted_still_knows_what_is_stale(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    config = daemon_config(tmp_path, nats_config, ALL_WAYS, listen=ANY_PORT)
    async with serving(config) as served:
        await served.run(["source", "freshness"])
        await served.queue_empty()
    async with serving(config) as served:
        found = await until(served, lambda s: s.all("dbtstream_source_count"))

    assert found.by("dbt_freshness_outcome", "dbtstream_source_count") == {
        "passed": 0,
        "warned": 0,
        "failed": 1,
        "error": 0,
    }
    assert found.value("dbtstream_source_check_time_seconds") > 0


async def test_the_same_over_otlp_with_delta_temporality(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    with otlp_sink() as sink:
        otlp = OtlpConfig(endpoint=sink.url, metrics_interval_s=0.2, temporality="delta")
        config = daemon_config(
            tmp_path, nats_config, GOOD_RUN, telemetry=TelemetryConfig(otlp=otlp)
        )
        async with serving(config) as served:
            for _ in range(2):
                await served.run()
            await sink.until(lambda s: sum(p.value for p in s.points if _is_end(p)) == 2)

        ends = [point for point in sink.points if _is_end(point)]
        durations = [p for p in sink.points if p.metric == "dbtstream.run.duration"]
        gauges = [p for p in sink.points if p.metric == "dbtstream.slot.limit"]

    assert {point.temporality for point in [*ends, *durations]} == {"delta"}
    assert sum(point.count for point in durations) == 2
    assert {(point.value, point.temporality) for point in gauges} == {(4.0, "")}
    assert any(span.name == "dbt build shop" for span in sink.spans)


def _is_end(point: SinkPoint) -> bool:
    status = point.attributes.get("dbtstream.run.status")
    return point.metric == "dbtstream.run.ended" and status == "success"


async def test_openmetrics_where_the_scraper_asks_for_it(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN, listen=ANY_PORT)) as served:
        asked = await get(served, "/metrics", Accept="application/openmetrics-text;version=1.0.0")
        plain = await get(served, "/metrics")

    assert asked.content_type.startswith("application/openmetrics-text")
    assert asked.text.endswith("# EOF\n")
    assert plain.content_type.startswith("text/plain; version=0.0.4")


WAITS = """
    start_line()
    hello()
    plan(model("a"), model("b", "a"))
    started("a")
    finished("a")
    started("b")
    control_line()
    send("cancelling", by="control")
    result(2, [], interrupted=True, error={"error_class": "KeyboardInterrupt", "message": ""})
"""


async def test_a_run_that_is_taken_over_is_counted_by_who_took_it(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    leaves: Any = {"on_drain": "hand_over", "drain_timeout_s": 0.0}
    async with serving(daemon_config(tmp_path, nats_config, WAITS, **leaves)) as first:
        accepted = await first.client.submit("shop", ["build"], target="dev")
        async for event in first.client.events(run_id=accepted.run_id):
            if isinstance(event, NodeStarted) and event.node.name == "b":
                break
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN, listen=ANY_PORT)) as second:
        events = await second.events(accepted.run_id)
        found = await until(second, lambda s: s.value("dbtstream_run_ended_total"))

    assert events[-1].attempt == 2
    assert found.by("dbtstream_reason", "dbtstream_run_takeovers_total") == {
        "worker_lost": 0,
        "handed_over": 1,
    }
    assert found.value("dbtstream_node_duration_seconds_count") == 2  # of its own attempt
    assert found.all("dbtstream_run_queue_duration_seconds_count") == []


async def test_what_ends_without_dbt_is_counted_too(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    """Cancelled in the queue, and turned away since the target is busy."""
    async with serving(daemon_config(tmp_path, nats_config, WAITS, listen=ANY_PORT)) as served:
        running = await served.client.submit("shop", ["build"], target="dev")
        waiting = await served.client.submit("shop", ["build"], target="dev")
        await served.client.submit("shop", ["build"], target="dev", on_busy=OnBusy.SKIP)
        await served.client.cancel(waiting.run_id)
        cancelled = {"dbtstream_run_status": "cancelled"}
        found = await until(
            served,
            lambda s: (
                s.value("dbtstream_run_ended_total", **cancelled)
                and s.value("dbtstream_request_rejected_total")
            ),
        )
        await served.client.cancel(running.run_id)
        await served.events(running.run_id)

    assert found.value("dbtstream_run_ended_total") == 1
    assert found.value("dbtstream_child_exits_total") == 0
    assert found.value("dbtstream_request_rejected_total", dbtstream_reason="busy") == 1
