"""GETs to a daemon's HTTP port, and /metrics read as Prometheus reads it."""

import asyncio
import http.client
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from tests.daemons import Served

ANY_PORT = "127.0.0.1:0"


@dataclass(frozen=True)
class Fetched:
    status: int
    content_type: str
    text: str


@dataclass(frozen=True)
class Scrape:
    """All samples of one scrape."""

    samples: list[tuple[str, Mapping[str, str], float]]

    @property
    def names(self) -> set[str]:
        return {name for name, _, _ in self.samples}

    def value(self, name: str, **labels: str) -> float:
        """The sum of what fits, as PromQL's `sum` has it. KeyError if nothing does."""
        if not (found := self.all(name, **labels)):
            raise KeyError(name, labels)
        return sum(found)

    def all(self, name: str, **labels: str) -> list[float]:
        return [
            value
            for sample, found, value in self.samples
            if sample == name and labels.items() <= found.items()
        ]

    def by(self, label: str, name: str) -> dict[str, float]:
        """Like PromQL's `sum by (label)`."""
        sums: dict[str, float] = {}
        for sample, labels, value in self.samples:
            if sample == name:
                key = labels.get(label, "")
                sums[key] = sums.get(key, 0) + value
        return sums


def fetch(address: str, path: str, method: str = "GET", **headers: str) -> Fetched:
    connection = http.client.HTTPConnection(address, timeout=20)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        content_type = answer.getheader("Content-Type", "")
        return Fetched(answer.status, content_type, answer.read().decode())
    finally:
        connection.close()


async def get(served: Served, path: str, **headers: str) -> Fetched:
    assert served.daemon.http is not None
    return await asyncio.to_thread(fetch, served.daemon.http.address, path, **headers)


def parsed(text: str) -> Scrape:
    return Scrape(
        [
            (sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]
    )


async def scrape(served: Served) -> Scrape:
    fetched = await get(served, "/metrics")
    assert fetched.status == 200, fetched.text
    return parsed(fetched.text)
