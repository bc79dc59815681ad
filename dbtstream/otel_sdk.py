"""OpenTelemetry's SDK put together for one daemon: resource, meter provider, readers.

Layer 2. `telemetry` imports this only when the extra `otel` is there and something is wanted of
it. What stands here against the SDK's defaults is from measurements of it (1.45):
* buckets are advised by the instruments, there are no Views: one exponential View makes every
  scrape fail;
* nothing is shut down at exit and nothing is ever flushed: `MeterProvider.force_flush` makes a
  Prometheus reader keep a copy for ever, and a dead collector holds a shutdown up for 30 s;
* the SDK's own metrics are on: they count what it drops.
"""

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.environment_variables import OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED
from opentelemetry.sdk.metrics import (
    AlwaysOffExemplarFilter,
    Counter,
    Histogram,
    MeterProvider,
    ObservableCounter,
)
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    MetricExportResult,
    MetricReader,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

import dbtstream
from dbtstream.config import Config, OtlpConfig, TelemetryConfig
from dbtstream.instruments import METER
from dbtstream.readings import Flow

DELTA: dict[type, AggregationTemporality] = {
    Counter: AggregationTemporality.DELTA,
    Histogram: AggregationTemporality.DELTA,
    ObservableCounter: AggregationTemporality.DELTA,
}
SHUTDOWN_S = 1.5


def make_resource(config: Config) -> Resource:
    """Who we are: what the config says, else OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME."""
    section, default = config.telemetry, TelemetryConfig()
    said = {
        "service.name": section.service_name,
        "service.namespace": section.service_namespace,
        "deployment.environment.name": section.environment,
        "service.instance.id": config.worker.name,
    }
    if section.service_name == default.service_name:
        del said["service.name"]
    fallback = {
        "service.name": default.service_name,
        "service.version": dbtstream.__version__,
        "service.instance.id": config.worker_name,
    }
    chosen = {name: value for name, value in said.items() if value}
    environment = OTELResourceDetector().detect().attributes
    return Resource.create({**fallback, **environment, **chosen, **section.resource})


class Meters:
    """The meter provider with its readers: one that is scraped, one that sends OTLP if wanted."""

    def __init__(self, config: Config, resource: Resource, headers: Mapping[str, str]) -> None:
        os.environ.setdefault(OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED, "true")
        self.exports: MetricsOut | None = None
        self._registry = CollectorRegistry()
        scraped = PrometheusMetricReader(scope_info_enabled=False, registry=self._registry)
        readers: list[MetricReader] = [scraped]
        otlp = config.telemetry.otlp
        if otlp is not None and otlp.metrics:
            self.exports = MetricsOut(otlp, headers)
            readers.append(
                PeriodicExportingMetricReader(
                    self.exports,
                    export_interval_millis=otlp.metrics_interval_s * 1000,
                    export_timeout_millis=otlp.timeout_s * 1000,
                )
            )
        self.provider = MeterProvider(
            readers,
            resource,
            exemplar_filter=AlwaysOffExemplarFilter(),
            shutdown_on_exit=False,
        )
        if self.exports is not None:
            self.exports.set_meter_provider(self.provider)
        self.meter = self.provider.get_meter(METER, dbtstream.__version__)

    def scrape(self, accept: str) -> tuple[str, bytes]:
        """Content type and text of all metrics, in the form that the scraper likes best."""
        encode, content_type = choose_encoder(accept)
        return content_type, encode(self._registry)

    def close(self) -> None:
        """One last export, for SHUTDOWN_S."""
        self.provider.shutdown(SHUTDOWN_S * 1000)


class MetricsOut(OTLPMetricExporter):
    """Counts its exports."""

    def __init__(self, otlp: OtlpConfig, headers: Mapping[str, str]) -> None:
        super().__init__(
            endpoint=signal_url(otlp.endpoint, "metrics"),
            certificate_file=otlp.tls_ca_file,
            headers=dict(headers),
            timeout=otlp.timeout_s,
            compression=Compression.Gzip,
            preferred_temporality=DELTA if otlp.temporality == "delta" else {},
        )
        self.flow = Flow()

    def export(
        self, metrics_data: MetricsData, timeout_millis: float | None = None, **kwargs: object
    ) -> MetricExportResult:
        self.flow.received += 1
        result = super().export(metrics_data, timeout_millis)
        if result is MetricExportResult.SUCCESS:
            self.flow.sent += 1
        else:
            self.flow.failed += 1
        return result


def signal_url(endpoint: str, signal: str) -> str | None:
    """Where a signal goes; None leaves it to OTEL_EXPORTER_OTLP_*."""
    if not endpoint:
        return None
    parts = urlsplit(endpoint)
    return parts._replace(path=f"{parts.path.rstrip('/')}/v1/{signal}").geturl()
