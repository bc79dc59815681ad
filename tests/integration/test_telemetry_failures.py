"""Telemetry is never in the way: whatever the collector does, runs, events and the stop go on.

A collector that never answers would hold up the SDK's own shutdown for 30 s; STOP_S is what a test
allows, on a machine that does much else.
"""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from dbtstream import telemetry
from dbtstream.checks import check_telemetry
from dbtstream.config import Config, NatsConfig, OtlpConfig, TelemetryConfig
from dbtstream.daemon import Daemon
from dbtstream.envelope import RunContext
from dbtstream.errors import ConfigError
from dbtstream.events import AnyEvent, RunFinished
from dbtstream.observers import AttemptObserver
from dbtstream.publishers import otlp_export
from dbtstream.pulse import Pulse
from dbtstream.telemetry import Observers, Telemetry
from tests.daemons import Served, daemon_config, serving
from tests.guarantees import check_run
from tests.otlp_sink import Mood, otlp_sink
from tests.scrapes import ANY_PORT, Scrape, get, scrape
from tests.scripted_child import GOOD_RUN
from tests.stories import Story, context, node

STOP_S = 12.0
TELEMETRY = {"dbtstream_stage": "telemetry"}

FORTY_NODES = """
    start_line()
    hello()
    names = [f"m{n}" for n in range(40)]
    plan(*(model(name) for name in names))
    for name in names:
        started(name)
        finished(name)
    result(0, [(name, "success") for name in names])
"""


@contextmanager
def refusing() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    yield f"http://127.0.0.1:{port}"


@contextmanager
def swallowing() -> Iterator[str]:
    """Accepts at the kernel, reads nothing, never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield f"http://127.0.0.1:{silent.getsockname()[1]}"


@contextmanager
def ill(mood: Mood) -> Iterator[str]:
    with otlp_sink() as sink:
        sink.mood = mood
        yield sink.url


COLLECTORS: dict[str, Callable[[], object]] = {
    "refuses": refusing,
    "swallows": swallowing,
    "takes and says nothing": lambda: ill(Mood.SILENT),
    "answers 500": lambda: ill(Mood.ERROR),
    "answers 503": lambda: ill(Mood.BUSY),
    "is slow": lambda: ill(Mood.SLOW),
}


def config_for(tmp_path: Path, nats: NatsConfig, body: str, endpoint: str) -> Config:
    otlp = OtlpConfig(endpoint=endpoint, logs=True, timeout_s=1.0, metrics_interval_s=0.2)
    section = TelemetryConfig(otlp=otlp)
    return daemon_config(tmp_path, nats, body, listen=ANY_PORT, telemetry=section)


@asynccontextmanager
async def stopping_in_time(config: Config) -> AsyncIterator[Served]:
    """Serving, and the stop after it within STOP_S."""
    async with asyncio.timeout(None) as limit:
        async with serving(config) as served:
            yield served
            limit.reschedule(asyncio.get_running_loop().time() + STOP_S)


async def until(served: Served, fact: Callable[[Scrape], object]) -> Scrape:
    async with asyncio.timeout(30):
        while not fact(found := await scrape(served)):  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.05)
    return found


@pytest.mark.parametrize("how", COLLECTORS)
async def test_runs_events_and_the_stop_do_not_wait_for_a_collector_that(
    how: str, tmp_path: Path, nats_config: NatsConfig
) -> None:
    with COLLECTORS[how]() as endpoint:  # type: ignore[attr-defined]
        config = config_for(tmp_path, nats_config, FORTY_NODES, endpoint)
        async with stopping_in_time(config) as served:
            for _ in range(2):
                events = await served.run()
                check_run(events)
                assert isinstance(events[-1], RunFinished)
                assert events[-1].status == "success"
            await served.queue_empty()
            assert (await get(served, "/livez")).status == 200


@pytest.mark.parametrize("how", ["refuses", "answers 500"])
async def test_what_the_collector_does_not_take_is_counted(
    how: str, tmp_path: Path, nats_config: NatsConfig
) -> None:
    with COLLECTORS[how]() as endpoint:  # type: ignore[attr-defined]
        config = config_for(tmp_path, nats_config, FORTY_NODES, endpoint)
        async with stopping_in_time(config) as served:
            await served.run()
            # 45 spans of the run, and some exports of metrics.
            found = await until(
                served, lambda s: s.value("dbtstream_stage_failed_total", **TELEMETRY) > 45
            )
    assert found.value("dbtstream_stage_sent_total", **TELEMETRY) == 0
    by_error = found.by("error_type", "otel_sdk_exporter_span_exported_total")
    assert by_error.pop("") == 0
    assert list(by_error) == ["500" if how == "answers 500" else "ConnectionError"]


async def test_the_queue_is_bounded_and_what_falls_out_of_it_is_counted(
    tmp_path: Path, nats_config: NatsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otlp_export, "MAX_QUEUE", 20)
    monkeypatch.setattr(otlp_export, "MAX_BATCH", 10)
    with ill(Mood.SILENT) as endpoint:
        config = config_for(tmp_path, nats_config, FORTY_NODES, endpoint)
        async with stopping_in_time(config) as served:
            for _ in range(3):
                await served.run()
            found = await until(
                served, lambda s: s.value("dbtstream_stage_dropped_total", **TELEMETRY) > 60
            )
    dropped = found.value("otel_sdk_processor_span_processed_total", error_type="queue_full")
    assert dropped > 60


async def test_a_collector_that_gets_well_again_gets_what_comes_then(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    with otlp_sink() as sink:
        sink.mood = Mood.ERROR
        config = config_for(tmp_path, nats_config, GOOD_RUN, sink.url)
        async with stopping_in_time(config) as served:
            await served.run()
            await until(served, lambda s: s.value("dbtstream_stage_failed_total", **TELEMETRY) > 4)
            sink.mood = Mood.WELL
            events = await served.run()
            trace_id = events[0].trace_id
            assert trace_id is not None
            await sink.until(lambda s: any(x.kind == "CONSUMER" for x in s.of_trace(trace_id)))


class TestAnObserverThatFails:
    class Broken:
        def __init__(self, *, early: bool) -> None:
            self.early = early

        def attempt(
            self, context: RunContext, *, earlier: Sequence[AnyEvent] = ()
        ) -> AttemptObserver:
            if self.early:
                raise ValueError("no attempt")
            return self

        def take(self, event: AnyEvent) -> None:
            raise RuntimeError("no event")

    class Good(Broken):
        def __init__(self) -> None:
            super().__init__(early=False)
            self.taken: list[AnyEvent] = []

        def take(self, event: AnyEvent) -> None:
            self.taken.append(event)

    @pytest.mark.parametrize("early", [True, False])
    def test_costs_neither_the_run_nor_the_others_anything(
        self, early: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        told = Story().plan(node("model.shop.orders"))
        good = self.Good()
        observers = Observers()
        observers.add(self.Broken(early=early))
        observers.add(good)

        attempt = observers.attempt(context())
        for event in told.events:
            attempt.take(event)

        assert good.taken == told.events
        assert observers.failed == (1 if early else len(told.events))
        assert len(caplog.records) == 1


class TestWithoutTheSdk:
    """The extra `otel` is not installed."""

    @pytest.fixture(autouse=True)
    def not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(telemetry, "is_installed", lambda: False)

    async def test_the_daemon_works_and_metrics_say_what_to_install(
        self, tmp_path: Path, nats_config: NatsConfig
    ) -> None:
        config = daemon_config(tmp_path, nats_config, GOOD_RUN, listen=ANY_PORT)
        async with serving(config) as served:
            events = await served.run()
            metrics = await get(served, "/metrics")
            lives = await get(served, "/livez")

        assert isinstance(events[-1], RunFinished)
        assert (metrics.status, lives.status) == (501, 200)
        assert "pip install 'dbtstream[otel]'" in metrics.text

    async def test_a_table_for_otlp_is_a_config_error(
        self, tmp_path: Path, nats_config: NatsConfig
    ) -> None:
        config = config_for(tmp_path, nats_config, GOOD_RUN, "http://127.0.0.1:4318")
        with pytest.raises(ConfigError, match=r"telemetry\.otlp: .*\(pip install"):
            await Daemon(config).run()


class TestAnSdkThatCannotBeUsed:
    @pytest.fixture(autouse=True)
    def too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(*_: object) -> None:
            raise ImportError("cannot import name 'AlwaysOffExemplarFilter'")

        monkeypatch.setattr("dbtstream.otel_sdk.make_resource", fails)

    def test_is_as_none(self, caplog: pytest.LogCaptureFixture) -> None:
        off = Telemetry(Config())
        assert off.scrape({}).status == 501
        assert "there are no metrics" in caplog.text
        off.close()

    def test_is_an_error_where_otlp_is_wanted(self) -> None:
        wanted = TelemetryConfig(otlp=OtlpConfig())
        with pytest.raises(ConfigError, match="SDK cannot be used: ImportError"):
            Telemetry(Config(telemetry=wanted))


def test_an_authority_that_is_not_there_is_found_at_the_start() -> None:
    otlp = OtlpConfig(endpoint="https://c", tls_ca_file="/no/such.pem")
    with pytest.raises(ConfigError, match=r"tls_ca_file: /no/such\.pem is no file"):
        Telemetry(Config(telemetry=TelemetryConfig(otlp=otlp)))


async def test_a_tick_that_goes_wrong_does_not_stop_the_pulse(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ticks: list[float] = []

    def broken(lag_s: float) -> None:
        ticks.append(lag_s)
        raise ValueError("no gauge")

    pulse = Pulse(tick_s=0.001)
    running = asyncio.create_task(pulse.run(broken))
    async with asyncio.timeout(30):
        while len(ticks) < 5:  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.001)
    running.cancel()

    assert len([record for record in caplog.records if record.exc_info]) == 1


def test_check_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_telemetry().ok
    monkeypatch.setattr("dbtstream.checks.is_installed", lambda: False)
    check = check_telemetry()
    assert (check.ok, check.mend) == (False, "pip install 'dbtstream[otel]'")


def test_the_sdk_is_not_imported_where_nothing_is_wanted(tmp_path: Path) -> None:
    by_default = Telemetry(Config())
    by_default.close()
    assert by_default.metrics is not None
    nothing = Telemetry(daemon_config(tmp_path, NatsConfig(), GOOD_RUN))
    assert nothing.metrics is None
    assert nothing.on_stored is None
    nothing.close()


def test_closing_leaves_a_thread_that_hangs_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "CLOSE_S", 0.05)
    open_ = Telemetry(Config())
    never = threading.Event()
    assert open_._meters is not None
    monkeypatch.setattr(open_._meters, "close", never.wait)
    open_.close()
    assert any(thread.name == "telemetry close" for thread in threading.enumerate())
    never.set()
