"""Datadog's dashboard and monitors as code. `python -m deploy.datadog.source` writes the JSON.

    queries     metric queries, by the constants of `dbtstream.instruments` only
    widgets     the few kinds of widget that we use, and their places in the grid
    dashboard   one dashboard
    monitors    one monitor each, with what to do in its message

For developers: Datadog reads `../dashboard.json` and `../monitors/`, and a test fails if those are
not what this package writes.
"""

from typing import Any

from deploy.datadog.source import dashboard, monitors


def documents() -> dict[str, dict[str, Any]]:
    """By file, below `deploy/datadog`."""
    named = {f"monitors/{name}.json": build() for name, build in monitors.MONITORS.items()}
    return {"dashboard.json": dashboard.build()} | named
