"""What is around the panels: variables, the links between the dashboards, the time."""

from collections.abc import Sequence
from typing import Final

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models.common import DataSourceRef
from grafana_foundation_sdk.models.dashboard import (
    Dashboard,
    DashboardCursorSync,
    DashboardLinkType,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

from dbtstream.instruments import QUEUE_PENDING, SLOT_LIMIT, Instrument
from deploy.grafana.source.panels import PROMETHEUS
from deploy.grafana.source.promql import INSTANCE, JOB, PROJECT, TARGET, Scope

TAG: Final = "dbtstream"
FLEET: Final = "dbtstream-fleet"
PROJECT_UID: Final = "dbtstream-project"
RUN_UID: Final = "dbtstream-run"
DAEMON: Final = "dbtstream-daemon"

TEMPO: Final = DataSourceRef(type_val="tempo", uid="${tempo}")

JOBS: Final = Scope({JOB: "job"})
BY_PROJECT: Final = Scope({JOB: "job", PROJECT: "project"})
BY_TARGET: Final = Scope({JOB: "job", PROJECT: "project", TARGET: "target"})
BY_WORKER: Final = Scope({JOB: "job", INSTANCE: "instance"})


def page(uid: str, title: str, description: str, *, since: str) -> dashboard.Dashboard:
    return (
        dashboard.Dashboard(f"dbtstream / {title}")
        .uid(uid)
        .description(description)
        .tags([TAG, "dbt"])
        .timezone("browser")
        .editable()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time(since, "now")
        .refresh("30s")
        .link(
            dashboard.DashboardLink("dbtstream")
            .type(DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(False)
            .include_vars(True)
            .keep_time(True)
        )
    )


def finished(page: dashboard.Dashboard) -> Dashboard:
    """With an id for each panel, so that links to one stay, and with its own links in sight."""
    built = page.build()
    for link in built.links or []:
        # The SDK's default hides them in a menu; without the key they are at the top.
        link.placement = None  # type: ignore[assignment]
    for number, panel in enumerate(built.panels or [], 1):
        panel.id_val = number
    return built


def datasource(name: str, kind: str, label: str) -> dashboard.DatasourceVariable:
    return dashboard.DatasourceVariable(name).type(kind).label(label)


def prometheus_variable() -> dashboard.DatasourceVariable:
    return datasource("datasource", "prometheus", "Prometheus")


def tempo_variable() -> dashboard.DatasourceVariable:
    return datasource("tempo", "tempo", "Tempo")


def job_variable() -> dashboard.QueryVariable:
    return _values("job", "Job", JOB, SLOT_LIMIT, (), "Prometheus' name for the daemons")


def instance_variable() -> dashboard.QueryVariable:
    return _values("instance", "Worker", INSTANCE, SLOT_LIMIT, (JOB,), "One worker or all")


def project_variable() -> dashboard.QueryVariable:
    return _values("project", "Project", PROJECT, QUEUE_PENDING, (JOB,), "dbt project")


def target_variable() -> dashboard.QueryVariable:
    return _values("target", "Target", TARGET, QUEUE_PENDING, (JOB, PROJECT), "dbt target")


def text_variable(name: str, title: str, description: str) -> dashboard.TextBoxVariable:
    return dashboard.TextBoxVariable(name).label(title).description(description).default_value("")


def _values(
    name: str,
    title: str,
    label: str,
    instrument: Instrument,
    narrowed_by: Sequence[str],
    description: str,
) -> dashboard.QueryVariable:
    """A choice among the values that a label has; "All" is any, also none."""
    variables = {JOB: "job", PROJECT: "project"}
    scope = Scope({key: variables[key] for key in narrowed_by})
    query = f"label_values({scope(instrument)}, {label})"
    return (
        dashboard.QueryVariable(name)
        .label(title)
        .description(description)
        .datasource(PROMETHEUS)
        .query({"query": query, "refId": f"variable-{name}", "qryType": 1})
        .definition(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(selected=True, text="All", value="$__all"))
    )


def link_to_project(project: str, target: str) -> str:
    """A table cell's link; the fields are the columns' titles."""
    return (
        f"/d/{PROJECT_UID}?var-project=${{__data.fields.{project}}}"
        f"&var-target=${{__data.fields.{target}}}&${{datasource:queryparam}}"
        "&${job:queryparam}&${__url_time_range}"
    )
