"""A bounded queue of encoded spans or log records, and the thread that sends them.

Layer 2, used by `otel`. Nothing waits for the collector: what does not fit is dropped, oldest
first, and counted; what is not taken in time is counted, and said when it begins and when it ends.

This is not the SDK's BatchSpanProcessor, since that takes spans as objects of the SDK: to encode
them holds up every other thread for 25 ms per batch, which was seen in the latency of events. Here
they come encoded, and a thread that compresses and sends does not need the interpreter. The metrics
of it are those that the SDK would have, by OpenTelemetry's names.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from time import monotonic

from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation

from dbtstream.otlp_encoding import Envelope
from dbtstream.publishers.otlp_http import OtlpHttp, Outcome, Signal
from dbtstream.readings import Flow

logger = logging.getLogger(__name__)

MAX_QUEUE = 8192
MAX_QUEUE_BYTES = 32 * 1024 * 1024
MAX_BATCH = 512
MAX_BATCH_BYTES = 4 * 1024 * 1024
"""What a collector takes in one request without being asked to take more."""
SCHEDULE_S = 1.0


class OtlpExport:
    """Of one signal. `put` is for one thread; the flow may be read in any."""

    def __init__(
        self,
        signal: Signal,
        http: OtlpHttp,
        envelope: Envelope,
        meter_provider: MeterProvider | None,
    ) -> None:
        self.signal = signal
        self.flow = Flow()
        self._http, self._envelope = http, envelope
        self._queue: deque[bytes] = deque()
        self._bytes = 0
        self._lock = threading.Lock()  # of the queue, for microseconds
        self._wake = threading.Event()
        self._is_closing = self._is_abandoned = self._is_failing = False
        self._said_rejected = False
        self.in_flight = 0
        self._metrics = SelfMetrics(self, meter_provider) if meter_provider else None
        self._thread = threading.Thread(target=self._work, name=f"otlp {signal}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def put(self, encoded: bytes) -> None:
        dropped = 0
        with self._lock:
            self._queue.append(encoded)
            self._bytes += len(encoded)
            while len(self._queue) > MAX_QUEUE or self._bytes > MAX_QUEUE_BYTES:
                self._bytes -= len(self._queue.popleft())
                dropped += 1
        self.flow.received += 1
        if dropped:
            if not self.flow.dropped:
                logger.warning(
                    "telemetry is dropped, its queue is full",
                    extra={"action": "telemetry.dropped", "signal": self.signal},
                )
            self.flow.dropped += dropped
        if len(self._queue) >= MAX_BATCH:
            self._wake.set()

    def finish(self, timeout_s: float) -> int:
        """Send what waits, for no longer than `timeout_s`; the rest is dropped. How many that are.

        Blocking. A thread that waits for an answer is left to itself.
        """
        self._is_closing = True
        self._wake.set()
        self._thread.join(timeout_s)
        with self._lock:
            self._is_abandoned = True
            left = len(self._queue)
            self._queue.clear()
        self.flow.dropped += left
        self._http.abandon()
        return left

    # In the thread.

    def _work(self) -> None:
        while not self._is_abandoned:
            self._wake.wait(SCHEDULE_S)
            self._wake.clear()
            is_last = self._is_closing
            while batch := self._take():
                self._send(batch)
            if is_last:
                return

    def _take(self) -> list[bytes]:
        batch: list[bytes] = []
        size = 0
        with self._lock:
            while self._queue and len(batch) < MAX_BATCH and size < MAX_BATCH_BYTES:
                batch.append(self._queue.popleft())
                size += len(batch[-1])
            self._bytes -= size
        return batch

    def _send(self, batch: list[bytes]) -> None:
        self.in_flight = len(batch)
        began = monotonic()
        try:
            outcome = self._http.post(self._envelope.request(batch))
        except Exception as error:  # noqa: BLE001 - this thread must not end
            outcome = Outcome(False, None, type(error).__name__, str(error))
        self.in_flight = 0
        self._done(len(batch), outcome)
        if self._metrics is not None:
            self._metrics.sent(len(batch), outcome, monotonic() - began)

    def _done(self, count: int, outcome: Outcome) -> None:
        facts = {"action": "telemetry.exported", "signal": self.signal, "url": self._http.url}
        if not outcome.ok:
            self.flow.failed += count
            if not self._is_failing:
                problem = outcome.problem[:500]
                logger.warning(
                    "telemetry is not taken by the collector",
                    extra={**facts, "ok": False, "problem": problem},
                )
        else:
            rejected = min(outcome.rejected, count)
            self.flow.sent += count - rejected
            self.flow.failed += rejected
            if rejected and not self._said_rejected:
                self._said_rejected = True
                logger.warning(
                    "the collector does not want some of the telemetry",
                    extra={**facts, "count": rejected, "problem": outcome.problem[:500]},
                )
            if self._is_failing:
                logger.info("telemetry is taken again", extra={**facts, "ok": True})
        self._is_failing = not outcome.ok


class SelfMetrics:
    """`otel.sdk.processor.*` and `otel.sdk.exporter.*` of one signal.

    https://opentelemetry.io/docs/specs/semconv/otel/sdk-metrics/
    """

    def __init__(self, export: OtlpExport, provider: MeterProvider) -> None:
        meter = provider.get_meter("dbtstream.otlp")
        word = "span" if export.signal == "traces" else "log"
        unit = "{span}" if word == "span" else "{log_record}"
        processor = _component(f"batching_{word}_processor")
        exporter = _component(f"otlp_http_{word}_exporter")
        self._exporter = exporter
        self._exported: dict[str, int] = {"": 0}  # by error.type

        def processed() -> Iterable[Observation]:
            flow = export.flow
            yield Observation(flow.received - flow.dropped - export.waiting, processor)
            yield Observation(flow.dropped, processor | {"error.type": "queue_full"})

        def exported() -> Iterable[Observation]:
            for error_type, count in self._exported.copy().items():
                by_error = {"error.type": error_type} if error_type else {}
                yield Observation(count, exporter | by_error)

        def value_of(
            read: Callable[[], int], component: dict[str, str]
        ) -> Callable[[], Iterable[Observation]]:
            return lambda: [Observation(read(), component)]

        name = f"otel.sdk.processor.{word}"
        _counter(meter, f"{name}.processed", unit, processed)
        _level(meter, f"{name}.queue.size", unit, value_of(lambda: export.waiting, processor))
        _level(meter, f"{name}.queue.capacity", unit, value_of(lambda: MAX_QUEUE, processor))
        name = f"otel.sdk.exporter.{word}"
        _counter(meter, f"{name}.exported", unit, exported)
        _level(meter, f"{name}.inflight", unit, value_of(lambda: export.in_flight, exporter))
        self._duration = meter.create_histogram(
            "otel.sdk.exporter.operation.duration", "s", "The duration of exporting a batch."
        )

    def sent(self, count: int, outcome: Outcome, took_s: float) -> None:
        error_type = outcome.error_type or ""
        rejected = min(outcome.rejected, count)
        for name, items in ((error_type, count - rejected), ("rejected", rejected)):
            if items:
                self._exported[name] = self._exported.get(name, 0) + items
        attributes: dict[str, str | int] = dict(self._exporter)
        if error_type:
            attributes["error.type"] = error_type
        if outcome.status is not None:
            attributes["http.response.status_code"] = outcome.status
        self._duration.record(took_s, attributes)


def _component(kind: str) -> dict[str, str]:
    return {"otel.component.type": kind, "otel.component.name": f"{kind}/0"}


def _counter(meter: Meter, name: str, unit: str, ask: Callable[[], Iterable[Observation]]) -> None:
    meter.create_observable_counter(name, [_callback(ask)], unit)


def _level(meter: Meter, name: str, unit: str, ask: Callable[[], Iterable[Observation]]) -> None:
    meter.create_observable_up_down_counter(name, [_callback(ask)], unit)


def _callback(
    ask: Callable[[], Iterable[Observation]],
) -> Callable[[CallbackOptions], Iterable[Observation]]:
    return lambda _: ask()
