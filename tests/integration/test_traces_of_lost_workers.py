"""The trace of a run that has lost its worker: each attempt is told, in one trace, once."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from dbtstream.client import Client
from dbtstream.embedded import NatsServer
from dbtstream.events import RunLeased
from dbtstream.trace import span_id_of
from tests.acceptance.conftest import Serve, whole_run
from tests.integration.test_worker_loss import b_started, until, worker
from tests.otlp_sink import OtlpSink, SinkSpan, otlp_sink


@pytest.fixture
def sink() -> Iterator[OtlpSink]:
    with otlp_sink() as running:
        yield running


async def run_span(sink: OtlpSink, run_id: str, attempt: int) -> SinkSpan:
    span_id = span_id_of(run_id, attempt, "run")
    await sink.until(lambda s: any(span.span_id == span_id for span in s.spans))
    (span,) = [span for span in sink.spans if span.span_id == span_id]
    return span


async def gone(daemon: Serve, how: signal.Signals) -> None:
    daemon.process.send_signal(how)
    await asyncio.wait_for(daemon.process.wait(), 60)


@pytest.mark.parametrize(
    ("how", "cause", "first_tree"),
    [
        (
            signal.SIGKILL,
            "worker_lost",
            [
                "dbt build shop CONSUMER ERROR worker_lost",
                "  queue",
                "  dbt CLIENT ERROR worker_lost",
                "    startup",
                "    parse",
                "    execute",
                "      model a [success]",
                "      model b [lost] ERROR worker_lost",
                "      model c [never_started]",
                "      model d [never_started]",
            ],
        ),
        (
            signal.SIGTERM,
            "handed_over",
            [
                "dbt build shop CONSUMER",
                "  queue",
                "  dbt CLIENT",
                "    startup",
                "    parse",
                "    execute",
                "      model a [success]",
                "      model b [lost] ERROR handed_over",
                "      model c [never_started]",
                "      model d [never_started]",
            ],
        ),
    ],
)
async def test_a_run_taken_over_has_two_trees_in_one_trace(
    tmp_path: Path,
    nats_server: NatsServer,
    sink: OtlpSink,
    how: signal.Signals,
    cause: str,
    first_tree: list[str],
) -> None:
    flag = tmp_path / "go"
    telemetry = f'[http]\nlisten = ""\n[telemetry.otlp]\nendpoint = "{sink.url}"\n'
    async with Client.connect(nats_server.url) as client:
        async with worker(
            tmp_path, nats_server, "w1", flag, more=telemetry, on_drain="hand_over"
        ) as first:
            run_id = (await client.submit("shop", ["build"], target="dev")).run_id
            await until(client, run_id, b_started)
            # A killed process takes with it what it had not sent.
            await sink.until(lambda s: any(span.name == "model a" for span in s.spans))
            await gone(first, how)
        async with worker(tmp_path, nats_server, "w2", flag, more=telemetry):
            await until(client, run_id, lambda event: b_started(event, attempt=2))
            flag.touch()
            events = await whole_run(client, run_id)
            second_run = await run_span(sink, run_id, 2)
            first_run = await run_span(sink, run_id, 1)

    assert [event.cause for event in events if isinstance(event, RunLeased)] == ["first", cause]
    assert {span.trace_id for span in sink.spans} == {event.trace_id for event in events}
    trees = sink.tree(first_run.trace_id)
    cut = trees.index("dbt build shop CONSUMER [success]")
    assert trees[:cut] == first_tree
    assert trees[cut:] == [
        "dbt build shop CONSUMER [success]",
        "  queue",
        "  dbt CLIENT",
        "    startup",
        "    execute",
        "      model b [success]",
        "      model c [success]",
        "      model d [success]",
        "    finalize",
    ]
    assert first_run.attributes["dbtstream.worker"] == "w1"
    assert [
        (link.attributes["dbtstream.link.type"], link.span_id) for link in second_run.links
    ] == [("previous_attempt", first_run.span_id)]
    # b was built upon what the first attempt had built.
    (b,) = [s for s in sink.spans if s.name == "model b" and s.status == "UNSET"]
    assert [link.span_id for link in b.links] == [span_id_of(run_id, 1, "node", "model.shop.a")]
    assert {event.span_id for event in events} <= {span.span_id for span in sink.spans}
