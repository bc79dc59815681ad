"""Spans and log records of runs, over OTLP/HTTP to a collector that may be slow, ill, or gone.

Layer 2, an observer; what the spans are is decided in `span_mapping`, their bytes in
`otlp_encoding`, how they leave in `otlp_export`. Imported only where `telemetry.otlp` is set. Spans
are made by hand and not by a tracer: that would draw their ids and take the clock's time.
"""

import logging
import threading
from collections.abc import Mapping, Sequence

from opentelemetry.metrics import MeterProvider

import dbtstream
from dbtstream.config import OtlpConfig, TelemetryConfig
from dbtstream.envelope import RunContext
from dbtstream.events import AnyEvent
from dbtstream.instruments import METER
from dbtstream.log_records import log_record_of
from dbtstream.observers import AttemptObserver, Observer
from dbtstream.otlp_encoding import Envelope, encoded_log_record, encoded_span
from dbtstream.publishers.otlp_export import OtlpExport
from dbtstream.publishers.otlp_http import OtlpHttp, Signal
from dbtstream.readings import Flow
from dbtstream.span_mapping import RunSpans
from dbtstream.spans import AttributeValue

logger = logging.getLogger(__name__)

SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"


class OtelExport:
    """The way out for spans, and for log records where they are wanted."""

    def __init__(
        self,
        config: TelemetryConfig,
        otlp: OtlpConfig,
        resource: Mapping[str, object],
        meter_provider: MeterProvider | None,
        secret_headers: Mapping[str, str],
    ) -> None:
        headers = {**otlp.headers, **secret_headers}
        envelope = Envelope(
            {name: _attribute(value) for name, value in resource.items()},
            scope=METER,
            version=dbtstream.__version__,
            schema_url=SCHEMA_URL,
        )

        def export(signal: Signal) -> OtlpExport:
            http = OtlpHttp(otlp, signal, headers)
            return OtlpExport(signal, http, envelope, meter_provider)

        spans = export("traces") if otlp.traces else None
        logs = export("logs") if otlp.logs else None
        self._exports = [each for each in (spans, logs) if each is not None]
        self.observer: Observer = RunObserver(config, spans, logs)

    @property
    def flow(self) -> Flow:
        """Spans and log records since the start. What is in none of the rest is on its way."""
        total = Flow()
        for export in self._exports:
            total.add(export.flow)
        return total

    def close(self, timeout_s: float) -> None:
        """Send what is left, but not for longer than `timeout_s`. Blocking; never raises."""
        left: list[int] = []
        threads = [
            threading.Thread(target=lambda e=each: left.append(e.finish(timeout_s)), daemon=True)
            for each in self._exports
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if sum(left):
            logger.warning(
                "telemetry was left behind at the stop",
                extra={"action": "telemetry.left", "count": sum(left)},
            )


class RunObserver:
    """Makes of each attempt's events what goes out."""

    def __init__(
        self, config: TelemetryConfig, spans: OtlpExport | None, logs: OtlpExport | None
    ) -> None:
        self._config, self._spans, self._logs = config, spans, logs

    def attempt(self, context: RunContext, *, earlier: Sequence[AnyEvent] = ()) -> AttemptObserver:
        run = RunSpans(context, settings=self._config, earlier=earlier)
        return _Attempt(run, self._spans, self._logs)


class _Attempt:
    def __init__(self, run: RunSpans, spans: OtlpExport | None, logs: OtlpExport | None) -> None:
        self._run, self._spans, self._logs = run, spans, logs

    def take(self, event: AnyEvent) -> None:
        if self._spans is not None:
            for span in self._run.take(event):
                self._spans.put(encoded_span(span))
        if self._logs is not None and (record := log_record_of(event)) is not None:
            self._logs.put(encoded_log_record(record))


def _attribute(value: object) -> AttributeValue:
    """Resources of the SDK may have more types than ours, where its detectors find them."""
    if isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [str(each) for each in value]
    return str(value)
