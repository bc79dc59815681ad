"""The four Grafana dashboards as code. `python -m deploy.grafana.source` writes the JSON.

    promql      metrics and labels, by the constants of `dbtstream.instruments` only
    traceql     queries of Tempo, by the names of the attributes of our spans
    colours     what a status looks like
    panels      the few kinds of panel that we use, in one style
    frame       what is around the panels: variables, links, time
    fleet, project, run, daemon        one dashboard each

For developers: it needs grafana-foundation-sdk, of the extra `dev`. What Grafana reads is in
`../dashboards`, and a test fails if that is not what this package writes.
"""

from collections.abc import Callable
from typing import Final

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.source import daemon, fleet, project, run

DASHBOARDS: Final[dict[str, Callable[[], Dashboard]]] = {
    "fleet.json": fleet.build,
    "project.json": project.build,
    "run.json": run.build,
    "daemon.json": daemon.build,
}
