"""Metric queries of Datadog, by the constants of `dbtstream.instruments` only.

Over OTLP a metric keeps its name, dots and all, and each attribute is a tag. A counter is a count
(`.as_count()`), a gauge a gauge, a histogram a distribution: `count:`, `sum:`, `avg:` and `max:`
work at once, `p95:` only after percentiles were enabled for that metric.
"""

from collections.abc import Iterable, Sequence
from typing import Final, Literal

from dbtstream.instruments import Instrument, Kind

ENV: Final = "env"
SERVICE: Final = "service"
VERSION: Final = "version"
INSTANCE: Final = "service.instance.id"
RESOURCE: Final = (ENV, SERVICE, VERSION, INSTANCE)
"""Tags of all metrics, from the resource."""

COUNTERS = (Kind.COUNTER, Kind.OBSERVED_COUNTER)
GAUGES = (Kind.GAUGE, Kind.OBSERVED)

Space = Literal["avg", "max", "min", "sum"]


class Unfit(ValueError):
    """A query that Datadog would take, and show nothing of."""


def only(attribute: str, *values: str) -> str:
    """A filter: one value, or one of several."""
    if len(values) == 1:
        return f"{attribute}:{values[0]}"
    return f"{attribute} IN ({','.join(values)})"


def how_many(instrument: Instrument, *filters: str, by: Sequence[str] = ()) -> str:
    """What a counter counted, or how many values a histogram got."""
    if instrument.kind in COUNTERS:
        return _query("sum", instrument, filters, by) + ".as_count()"
    if instrument.kind is Kind.HISTOGRAM:
        return _query("count", instrument, filters, by) + ".as_count()"
    raise Unfit(f"{instrument.name} is a gauge: it has a value, and counts nothing")


def value(instrument: Instrument, *filters: str, by: Sequence[str] = (), space: Space) -> str:
    """A gauge. `space` says what becomes of several workers."""
    if instrument.kind not in GAUGES:
        raise Unfit(f"{instrument.name} is no gauge")
    return _query(space, instrument, filters, by)


def mean(instrument: Instrument, *filters: str, by: Sequence[str] = ()) -> str:
    return _of_distribution("avg", instrument, filters, by)


def most(instrument: Instrument, *filters: str, by: Sequence[str] = ()) -> str:
    return _of_distribution("max", instrument, filters, by)


def together(instrument: Instrument, *filters: str, by: Sequence[str] = ()) -> str:
    """The sum of the values themselves: the seconds that all of them took."""
    return _of_distribution("sum", instrument, filters, by)


def percentile(instrument: Instrument, rank: int, *filters: str, by: Sequence[str] = ()) -> str:
    """Nothing before percentiles were enabled for the metric: Metrics > Summary."""
    return _of_distribution(f"p{rank}", instrument, filters, by)


def _of_distribution(
    aggregate: str, instrument: Instrument, filters: Iterable[str], by: Sequence[str]
) -> str:
    if instrument.kind is not Kind.HISTOGRAM:
        raise Unfit(f"{instrument.name} is no distribution")
    return _query(aggregate, instrument, filters, by)


def _query(
    aggregate: str, instrument: Instrument, filters: Iterable[str], by: Sequence[str]
) -> str:
    scope = _scope(list(filters))
    groups = f" by {{{','.join(by)}}}" if by else ""
    unknown = [tag for tag in by if tag not in (*instrument.attributes, *RESOURCE)]
    if unknown:
        raise Unfit(f"{instrument.name} has no {unknown[0]}")
    return f"{aggregate}:{instrument.name}{{{scope}}}{groups}"


def _scope(filters: list[str]) -> str:
    """Commas, or AND: Datadog takes no commas beside an IN."""
    joint = " AND " if any(" IN " in text for text in filters) else ","
    return joint.join(filters) or "*"
