"""PromQL with names from `dbtstream.instruments`, and no others.

A metric or a label that is renamed there is renamed here with it; a label that a metric does not
have is an error when the dashboards are made, not an empty panel on the day it is needed.
"""

from collections.abc import Mapping
from typing import Final, Literal

import msgspec
from opentelemetry.semconv._incubating.attributes import http_attributes, otel_attributes
from opentelemetry.semconv._incubating.metrics import otel_metrics

from dbtstream import instruments
from dbtstream.instruments import Instrument, Kind
from dbtstream.statuses import RunStatus

Part = Literal["", "bucket", "count", "sum"]


def label(attribute: str) -> str:
    """As OpenTelemetry's Prometheus exporter writes an attribute's name."""
    return attribute.replace(".", "_")


JOB: Final = "job"
INSTANCE: Final = "instance"
PROJECT: Final = label(instruments.PROJECT)
TARGET: Final = label(instruments.TARGET)
COMMAND: Final = label(instruments.COMMAND)
RUN_STATUS: Final = label(instruments.RUN_STATUS)
NODE_STATUS: Final = label(instruments.NODE_STATUS)
NODE_TYPE: Final = label(instruments.NODE_TYPE)
OWNER: Final = label(instruments.OWNER)
UNIQUE_ID: Final = label(instruments.UNIQUE_ID)
SEVERITY: Final = label(instruments.SEVERITY)
FRESHNESS: Final = label(instruments.FRESHNESS)
PHASE: Final = label(instruments.PHASE)
FAMILY: Final = label(instruments.FAMILY)
REASON: Final = label(instruments.REASON)
STAGE: Final = label(instruments.STAGE)
START: Final = label(instruments.START)
MEMORY_OF: Final = label(instruments.MEMORY_KIND)
ERROR_TYPE: Final = label(instruments.ERROR_TYPE)
ANSWER: Final = label(http_attributes.HTTP_RESPONSE_STATUS_CODE)

BAD_RUNS = f"{RunStatus.FAILURE}|{RunStatus.ERROR}|{RunStatus.TIMED_OUT}|{RunStatus.LOST}"
JUDGED_RUNS = f"{RunStatus.SUCCESS}|{BAD_RUNS}"
"""A run that somebody cancelled is neither good nor bad."""
FINISHED_RUNS = f"{RunStatus.SUCCESS}|{RunStatus.FAILURE}"
"""Only the duration of these says something about the next run's."""

# OpenTelemetry's SDK about itself: there with [telemetry.otlp] only.
# What was sent, it does not know: to 1.45 an answer of 500 counts as exported. Our own stage does.
EXPORTS = Instrument(
    name=otel_metrics.OTEL_SDK_EXPORTER_OPERATION_DURATION,
    kind=Kind.HISTOGRAM,
    unit="s",
    description="Requests to the collector",
    attributes=(
        instruments.ERROR_TYPE,
        http_attributes.HTTP_RESPONSE_STATUS_CODE,
        otel_attributes.OTEL_COMPONENT_TYPE,
    ),
)
SPAN_QUEUE = Instrument(
    name=otel_metrics.OTEL_SDK_PROCESSOR_SPAN_QUEUE_SIZE,
    kind=Kind.OBSERVED,
    unit="{span}",
    description="Spans that wait to be sent",
)
SPAN_QUEUE_CAPACITY = Instrument(
    name=otel_metrics.OTEL_SDK_PROCESSOR_SPAN_QUEUE_CAPACITY,
    kind=Kind.OBSERVED,
    unit="{span}",
    description="How many may wait",
)


class Scope(msgspec.Struct, frozen=True):
    """Which of a dashboard's variables narrow its metrics, by label.

    Always `job` and never the name of the service: `job` is there whether Prometheus scrapes
    or is sent OTLP.
    """

    variables: Mapping[str, str]

    def __call__(self, instrument: Instrument, part: Part = "", **matches: str) -> str:
        """`name{job=~"$job", ...}`. `matches` are regular expressions by the name of a constant
        in `instruments`, such as RUN_STATUS="failure|error"."""
        conditions = [
            f'{name}=~"${variable}"'
            for name, variable in self.variables.items()
            if name in (JOB, INSTANCE) or name in _labels(instrument)
        ]
        for constant, pattern in matches.items():
            name = label(getattr(instruments, constant))
            if name not in _labels(instrument):
                raise ValueError(f"{instrument.name} has no {name}")
            conditions.append(f'{name}=~"{pattern}"')
        suffix = f"_{part}" if part else ""
        if (instrument.kind is Kind.HISTOGRAM) != bool(part):
            raise ValueError(f"{instrument.name} is a {instrument.kind}, not to be read so")
        braces = f"{{{','.join(conditions)}}}" if conditions else ""
        return f"{instrument.prometheus_name}{suffix}{braces}"


def _labels(instrument: Instrument) -> set[str]:
    return {label(attribute) for attribute in instrument.attributes}


def by(*labels: str) -> str:
    return f"by ({', '.join(labels)})"


UNSEEN: Final = "1h"


def shown(*labels: str) -> str:
    """The name of a series, made of its labels' values."""
    return " / ".join(f"{{{{{name}}}}}" for name in labels)


def increase(counter: str, window: str) -> str:
    """For counters that the daemon begins at 0."""
    return f"increase({counter}[{window}])"


def growth(counter: str, window: str) -> str:
    """For counters that appear with what they count first, such as the count of a histogram.

    `increase` knows their growth from the second sample on only: of a nightly run that is the
    first of its kind since the daemon began, nothing would be seen. So a counter that nothing was
    seen of for a while before the window counts as a whole; the while is for a scrape that failed.
    """
    before = f"last_over_time({counter}[{UNSEEN}] offset {window})"
    return f"(({counter} unless {before}) or increase({counter}[{window}]))"


def quantile(share: float, buckets: str, *labels: str, window: str = "$__rate_interval") -> str:
    grown = growth(buckets, window) if window == "$__range" else f"rate({buckets}[{window}])"
    return f"histogram_quantile({share}, sum {by('le', *labels)} ({grown}))"


def runs_ended(scope: Scope, window: str, status: str = ".+") -> str:
    return increase(scope(instruments.RUNS_ENDED, RUN_STATUS=status), window)


def newest(stamps: str, *labels: str, among: str = "") -> str:
    """Of the series of `stamps`, for each combination of the labels the one with the latest time,
    if that is also the latest `among` others.

    Every worker tells of the last run of its own. Which of them has the newest, this says.
    """
    keys = (JOB, *labels)
    latest = f"max {by(*keys)} ({among or stamps})"
    return f"({stamps} == on ({', '.join(keys)}) group_left () {latest})"


def of_newest(values: str, stamps: str, *labels: str) -> str:
    """The values of those workers that have the newest of the stamps."""
    keys = ", ".join((JOB, INSTANCE, *labels))
    return f"({values} and on ({keys}) {newest(stamps, *labels)})"
