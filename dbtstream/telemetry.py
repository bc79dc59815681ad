"""What is told to OpenTelemetry, put together from the config; nothing where nothing is wanted.

Layer 4. `daemon` starts it first and closes it last. Metrics are on wherever the SDK is
installed (extra `otel`) and the HTTP port or OTLP wants them; spans and logs with the table
`[telemetry.otlp]`. Without the SDK the daemon works as well, and only /metrics has nothing.

Telemetry is never in the way: an observer that fails is counted and goes on with the next event,
what the SDK complains about is said once in a while, and `close` is over in CLOSE_S whatever
a collector does.
"""

import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from dbtstream.config import Config, read_secret
from dbtstream.envelope import RunContext
from dbtstream.errors import ConfigError
from dbtstream.events import AnyEvent
from dbtstream.http_port import Answer
from dbtstream.measurements import Known, Measurement
from dbtstream.observers import AttemptObserver, Observer
from dbtstream.publishers.jetstream import OnStored
from dbtstream.readings import Flow, Readings

if TYPE_CHECKING:
    from dbtstream.metrics import Metrics
    from dbtstream.otel_sdk import Meters
    from dbtstream.publishers.otel import OtelExport

logger = logging.getLogger(__name__)

CLOSE_S = 2.0
SWITCH_S = 0.0005
"""How long the event loop waits for a thread that exports metrics or spans; Python's own 5 ms are
seen in the latency of events."""

SAY_AGAIN_S = 300.0
MAX_SAID = 100

INSTALL = "pip install 'dbtstream[otel]'"
_NEEDED = (
    "opentelemetry.sdk.metrics",
    "opentelemetry.exporter.otlp.proto.http",
    "opentelemetry.exporter.prometheus",
)


def is_installed() -> bool:
    """Whether the extra `otel` is there."""
    try:
        return all(find_spec(name) for name in _NEEDED)
    except ModuleNotFoundError:
        return False


class Telemetry:
    """Of one daemon. Making it blocks (imports, secrets). Raises ConfigError."""

    def __init__(self, config: Config) -> None:
        self.known = Known({name: project.targets for name, project in config.projects.items()})
        self.look: Callable[[], Readings | None] = _nothing
        self.metrics: Metrics | None = None
        self._meters: Meters | None = None
        self._export: OtelExport | None = None
        self._observers = Observers()
        self._log = SdkLog()
        otlp = config.telemetry.otlp
        if otlp is not None and not is_installed():
            raise ConfigError(config.source, "telemetry.otlp", "needs OpenTelemetry's SDK", INSTALL)
        if (otlp is not None or config.http.listen) and is_installed():
            try:
                self._start(config)
            except ConfigError:
                raise
            except Exception as error:  # noqa: BLE001 - dbt runs without it
                self._do_without(config, error)

    def _start(self, config: Config) -> None:
        from dbtstream.metrics import Metrics
        from dbtstream.otel_sdk import Meters, make_resource

        _check_ca_file(config)
        resource, headers = make_resource(config), otlp_headers(config)
        self._meters = Meters(config, resource, headers)
        self.metrics = Metrics(
            self._meters.meter,
            self.known,
            look=self._last_readings,
            node_metrics=config.telemetry.node_metrics,
        )
        self._observers.add(self.metrics)
        otlp = config.telemetry.otlp
        if otlp is not None and (otlp.traces or otlp.logs):
            from dbtstream.publishers.otel import OtelExport

            sys.setswitchinterval(SWITCH_S)
            provider = self._meters.provider
            self._export = OtelExport(
                config.telemetry, otlp, resource.attributes, provider, headers
            )
            self._observers.add(self._export.observer)
        self._log.install()

    def _do_without(self, config: Config, error: Exception) -> None:
        """An SDK that we cannot work with is as none; but somebody who asks for OTLP wants it."""
        problem = f"OpenTelemetry's SDK cannot be used: {type(error).__name__}: {error}"
        if config.telemetry.otlp is not None:
            raise ConfigError(config.source, "telemetry.otlp", problem, INSTALL) from error
        logger.error("there are no metrics", extra={"action": "telemetry.off", "problem": problem})
        self.metrics = self._meters = None
        self._observers = Observers()

    def _last_readings(self) -> Readings | None:
        return self.look()

    # -- for the daemon ------------------------------------------------------------------------

    @property
    def observer(self) -> Observer:
        return self._observers

    @property
    def on_stored(self) -> OnStored | None:
        return self.metrics.stored if self.metrics else None

    def loop_lag(self, lag_s: float) -> None:
        if self.metrics is not None:
            self.metrics.loop_lag(lag_s)

    def recall(self, measurements: Sequence[Measurement]) -> None:
        if self.metrics is not None:
            self.metrics.recall(measurements)

    def flow(self) -> Flow:
        """Of the stage `telemetry`: spans, log records, exports of metrics; dropped are also
        events that could not be told."""
        total = Flow(dropped=self._observers.failed)
        if self._export is not None:
            total.add(self._export.flow)
        if self._meters is not None and self._meters.exports is not None:
            total.add(self._meters.exports.flow)
        return total

    def scrape(self, headers: Mapping[str, str]) -> Answer:
        """For /metrics."""
        if self._meters is None:
            return Answer.text(501, f"metrics need OpenTelemetry's SDK: {INSTALL}")
        content_type, text = self._meters.scrape(headers.get("accept", ""))
        return Answer(200, text, content_type)

    def close(self) -> None:
        """Send what is there, for CLOSE_S at the most. Blocks.

        In threads that are left to themselves when it takes longer: neither the interpreter's
        exit nor the loop's waits for them.
        """
        works: list[Callable[[], None]] = []
        if self._export is not None:
            works.append(partial(self._export.close, CLOSE_S - 0.2))
        if self._meters is not None:
            works.append(self._meters.close)
        threads = [
            threading.Thread(target=_quietly, args=(work,), name="telemetry close", daemon=True)
            for work in works
        ]
        give_up_at = monotonic() + CLOSE_S
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(give_up_at - monotonic(), 0.0))
        if any(thread.is_alive() for thread in threads):
            logger.warning(
                "telemetry that could not be sent in time is lost",
                extra={"action": "telemetry.left", "waited_s": CLOSE_S},
            )
        self._log.remove()


class Observers:
    """All observers as one that never raises."""

    def __init__(self) -> None:
        self.failed = 0
        self._observers: list[Observer] = []
        self._said: set[str] = set()

    def add(self, observer: Observer) -> None:
        self._observers.append(observer)

    def attempt(self, context: RunContext, *, earlier: Sequence[AnyEvent] = ()) -> AttemptObserver:
        watching = []
        for observer in self._observers:
            try:
                watching.append(observer.attempt(context, earlier=earlier))
            except Exception as error:  # noqa: BLE001 - a run must not end over its telemetry
                self.complain(error)
        return _Watching(watching, self.complain)

    def complain(self, error: Exception) -> None:
        """Count it; say it once."""
        self.failed += 1
        problem = f"{type(error).__name__}: {error}"
        if problem not in self._said and len(self._said) < MAX_SAID:
            self._said.add(problem)
            logger.error(
                "an event could not be told to telemetry",
                exc_info=error,
                extra={"action": "telemetry.failed"},
            )


class _Watching:
    """Of one attempt."""

    def __init__(
        self, observers: Sequence[AttemptObserver], complain: Callable[[Exception], None]
    ) -> None:
        self._observers, self._complain = observers, complain

    def take(self, event: AnyEvent) -> None:
        for observer in self._observers:
            try:
                observer.take(event)
            except Exception as error:  # noqa: BLE001 - see Observers
                self._complain(error)


_OTHERS = ("", "")


class SdkLog(logging.Handler):
    """What the SDK logs, said in our words once in a while: it writes a line per failed batch,
    and a traceback per attribute that it does not like."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._logger = logging.getLogger("opentelemetry")
        self._next: dict[tuple[str, str], float] = {}
        self._unsaid: dict[tuple[str, str], int] = {}

    def install(self) -> None:
        self._logger.addHandler(self)
        self._logger.propagate = False

    def remove(self) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = True

    def emit(self, record: logging.LogRecord) -> None:
        key = (record.name, str(record.msg)[:100])
        if key not in self._next and len(self._next) >= MAX_SAID:
            key = _OTHERS
        now = monotonic()
        if now < self._next.get(key, 0.0):
            self._unsaid[key] = self._unsaid.get(key, 0) + 1
            return
        self._next[key] = now + SAY_AGAIN_S
        logger.warning(
            "OpenTelemetry's SDK has a problem",
            extra={
                "action": "telemetry.sdk",
                "logger": record.name,
                "problem": record.getMessage()[:500],
                "unsaid": self._unsaid.pop(key, 0),
            },
        )


def otlp_headers(config: Config) -> dict[str, str]:
    """Those of the config, with the secret ones read. Blocking. Raises ConfigError."""
    otlp = config.telemetry.otlp
    if otlp is None:
        return {}
    return otlp.headers | {
        name: read_secret(ref, config.source, f"telemetry.otlp.secret_headers.{name}")
        for name, ref in otlp.secret_headers.items()
    }


def _check_ca_file(config: Config) -> None:
    """The exporters would find out at each export."""
    otlp = config.telemetry.otlp
    if otlp is not None and otlp.tls_ca_file and not Path(otlp.tls_ca_file).is_file():
        key = "telemetry.otlp.tls_ca_file"
        raise ConfigError(config.source, key, f"{otlp.tls_ca_file} is no file")


def _nothing() -> None:
    return None


def _quietly(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception as error:  # noqa: BLE001 - it may be over, and it says what it lost
        logger.info(
            "telemetry did not end well",
            extra={"action": "telemetry.close", "problem": str(error)},
        )
