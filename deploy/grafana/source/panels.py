"""The few kinds of panel that the dashboards are made of, in one style.

A panel says in its description what one sees and what to make of it. What a number means is
also in its unit and its thresholds; a series that has a status has that status's colour.
"""

from collections.abc import Mapping, Sequence
from typing import Final, Literal

import msgspec
from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    text,
    timeseries,
)
from grafana_foundation_sdk.models.common import (
    BarGaugeDisplayMode,
    BigValueColorMode,
    BigValueGraphMode,
    DataSourceRef,
    GraphDrawStyle,
    GraphGradientMode,
    GraphThresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    LineInterpolation,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.text import TextMode

PROMETHEUS: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")

Steps = Sequence[tuple[float | None, str]]
"""Thresholds: from which value on which colour. The first one is from None."""

NEUTRAL: Final[Steps] = ((None, "blue"),)
BAD_ABOVE_ZERO: Final[Steps] = ((None, "green"), (1, "red"))


class Query(msgspec.Struct, frozen=True):
    """One expression of a panel and the name of its series, such as "{{dbt_project_name}}"."""

    expr: str
    legend: str = ""


def _target(
    query: Query, ref: str, kind: Literal["range", "instant", "table", "heatmap"]
) -> prometheus.Dataquery:
    target = prometheus.Dataquery().ref_id(ref).datasource(PROMETHEUS).expr(query.expr)
    if query.legend:
        target = target.legend_format(query.legend)
    if kind == "range":
        return target.range()
    if kind == "heatmap":
        return target.range().format(PromQueryFormat.HEATMAP)
    target = target.instant()
    return target.format(PromQueryFormat.TABLE) if kind == "table" else target


def _refs(queries: Sequence[Query]) -> list[tuple[Query, str]]:
    return [(query, chr(ord("A") + position)) for position, query in enumerate(queries)]


def thresholds(steps: Steps) -> dashboard.ThresholdsConfig:
    return (
        dashboard.ThresholdsConfig()
        .mode(ThresholdsMode.ABSOLUTE)
        .steps([Threshold(value=value, color=colour) for value, colour in steps])
    )


def fixed_colour(colour: str) -> DynamicConfigValue:
    return DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": colour})


def status_mapping(colours: Mapping[str, str]) -> list[ValueMap]:
    """For the cells of a table, which hold the words themselves."""
    return [
        ValueMap(
            options={
                str(status): ValueMappingResult(text=str(status), color=colour, index=index)
                for index, (status, colour) in enumerate(colours.items())
            }
        )
    ]


def stat_panel(
    title: str,
    expr: str,
    description: str,
    *,
    unit: str = "short",
    steps: Steps = NEUTRAL,
    decimals: int | None = None,
    width: int = 3,
    spark: bool = False,
    legend: str = "",
    no_value: str = "–",
) -> stat.Panel:
    """One number. With `spark` its course is behind it, otherwise only the present is asked."""
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(PROMETHEUS)
        .with_target(_target(Query(expr, legend), "A", "range" if spark else "instant"))
        .unit(unit)
        .no_value(no_value)
        .thresholds(thresholds(steps))
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS))
        .color_mode(BigValueColorMode.VALUE if spark else BigValueColorMode.BACKGROUND)
        .graph_mode(BigValueGraphMode.AREA if spark else BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .height(4)
        .span(width)
    )
    return panel if decimals is None else panel.decimals(decimals)


def lines(
    title: str,
    queries: Sequence[Query],
    description: str,
    *,
    unit: str = "short",
    steps: Steps | None = None,
    colours: Mapping[str, str] | None = None,
    stacked: bool = False,
    stepped: bool = False,
    width: int = 12,
    height: int = 8,
    floor: float | None = 0,
) -> timeseries.Panel:
    """Something over time. `steps` draws the thresholds as dashed lines."""
    panel = _over_time(title, queries, description, unit, width, height).line_width(2)
    panel = panel.fill_opacity(25 if stacked else 8).gradient_mode(GraphGradientMode.OPACITY)
    panel = panel.show_points(VisibilityMode.NEVER).span_nulls(False)
    panel = panel.line_interpolation(
        LineInterpolation.STEP_AFTER if stepped else LineInterpolation.LINEAR
    )
    if floor is not None:
        panel = panel.axis_soft_min(floor)
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
    if steps:
        panel = panel.thresholds(thresholds(steps)).thresholds_style(
            common.GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED)
        )
    return _coloured(panel, colours)


def bars(
    title: str,
    queries: Sequence[Query],
    description: str,
    *,
    unit: str = "short",
    colours: Mapping[str, str] | None = None,
    width: int = 12,
    height: int = 8,
    interval: str = "1m",
) -> timeseries.Panel:
    """Counts by interval, stacked. Their expressions use `$__rate_interval`: a window that is a
    scrape longer than the step, so that no count falls between two bars."""
    panel = (
        _over_time(title, queries, description, unit, width, height)
        .draw_style(GraphDrawStyle.BARS)
        .line_width(0)
        .fill_opacity(80)
        .bar_width_factor(0.9)
        .stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
        .decimals(0)
        .axis_soft_min(0)
        .interval(interval)
        .max_data_points(100)
    )
    return _coloured(panel, colours)


def _over_time(
    title: str, queries: Sequence[Query], description: str, unit: str, width: int, height: int
) -> timeseries.Panel:
    return (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(PROMETHEUS)
        .targets([_target(query, ref, "range") for query, ref in _refs(queries)])
        .unit(unit)
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(TooltipDisplayMode.MULTI)
            .sort(SortOrder.DESCENDING)
            .hide_zeros(True)
        )
        .height(height)
        .span(width)
    )


def _coloured(panel: timeseries.Panel, colours: Mapping[str, str] | None) -> timeseries.Panel:
    for name, colour in (colours or {}).items():
        panel = panel.override_by_name(str(name), [fixed_colour(colour)])
    return panel


def heat(
    title: str, query: Query, description: str, *, unit: str = "s", width: int = 12
) -> heatmap.Panel:
    """The buckets of a histogram over time: where most are, and where the stragglers are."""
    return (
        heatmap.Panel()
        .title(title)
        .description(description)
        .datasource(PROMETHEUS)
        .with_target(_target(query, "A", "heatmap"))
        .calculate(False)
        .color(
            heatmap_colours().mode(HeatmapColorMode.SCHEME).scheme("Turbo").steps(64).reverse(False)
        )
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .cell_gap(1)
        .hide_legend()
        .interval("1m")
        .height(8)
        .span(width)
    )


def heatmap_colours() -> heatmap.HeatmapColorOptions:
    return heatmap.HeatmapColorOptions().exponent(0.5).fill("dark-orange")


def ranking(
    title: str,
    query: Query,
    description: str,
    *,
    unit: str,
    steps: Steps = NEUTRAL,
    width: int = 12,
    height: int = 8,
    ceiling: float | None = None,
) -> bargauge.Panel:
    """A bar for each series, the longest first; the expression sorts them."""
    panel = (
        bargauge.Panel()
        .title(title)
        .description(description)
        .datasource(PROMETHEUS)
        .with_target(_target(query, "A", "instant"))
        .unit(unit)
        .min(0)
        .thresholds(thresholds(steps))
        .orientation(VizOrientation.HORIZONTAL)
        .display_mode(BarGaugeDisplayMode.GRADIENT)
        .show_unfilled(True)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .height(height)
        .span(width)
    )
    return panel if ceiling is None else panel.max(ceiling)


class Column(msgspec.Struct, frozen=True):
    """A column of a table: the label or the query ("Value #A") it shows, and how."""

    field: str
    title: str
    unit: str = ""
    steps: Steps = ()
    colours: Mapping[str, str] = {}
    link: str = ""
    width: int = 0

    def properties(self) -> list[DynamicConfigValue]:
        found: list[DynamicConfigValue] = []
        if self.unit:
            found.append(DynamicConfigValue(id_val="unit", value=self.unit))
        if self.width:
            found.append(DynamicConfigValue(id_val="custom.width", value=self.width))
        if self.colours:
            found.append(DynamicConfigValue(id_val="mappings", value=status_mapping(self.colours)))
            found.append(_cell("color-background"))
        if self.steps:
            found.append(
                DynamicConfigValue(id_val="thresholds", value=thresholds(self.steps).build())
            )
            found.append(DynamicConfigValue(id_val="color", value={"mode": "thresholds"}))
            found.append(_cell("color-text"))
        if self.link:
            found.append(
                DynamicConfigValue(id_val="links", value=[{"title": "Open", "url": self.link}])
            )
        return found


def _cell(kind: str) -> DynamicConfigValue:
    return DynamicConfigValue(id_val="custom.cellOptions", value={"type": kind})


def table_panel(
    title: str,
    queries: Sequence[Query],
    columns: Sequence[Column],
    description: str,
    *,
    width: int = 24,
    height: int = 8,
    sort_by: str = "",
) -> table.Panel:
    """One row for each combination of labels that all queries have, only the columns named."""
    panel = plain_table(title, columns, description, width=width, height=height)
    panel = panel.datasource(PROMETHEUS).targets(
        [_target(query, ref, "table") for query, ref in _refs(queries)]
    )
    panel = panel.transformations(
        [
            DataTransformerConfig(id_val="merge", options={}),
            DataTransformerConfig(
                id_val="filterFieldsByName",
                options={"include": {"names": [column.field for column in columns]}},
            ),
            DataTransformerConfig(
                id_val="organize",
                options={
                    "excludeByName": {},
                    "indexByName": {column.field: at for at, column in enumerate(columns)},
                    "renameByName": {column.field: column.title for column in columns},
                },
            ),
        ]
    )
    if sort_by:
        panel = panel.sort_by([descending(sort_by)])
    return panel


def plain_table(
    title: str,
    columns: Sequence[Column],
    description: str,
    *,
    width: int = 24,
    height: int = 8,
) -> table.Panel:
    panel = (
        table.Panel()
        .title(title)
        .description(description)
        .filterable(True)
        .height(height)
        .span(width)
    )
    for column in columns:
        if properties := column.properties():
            panel = panel.override_by_name(column.title, properties)
    return panel


def timeline(
    title: str,
    queries: Sequence[Query],
    description: str,
    *,
    words: Mapping[int, tuple[str, str]],
    width: int = 24,
    height: int = 6,
) -> statetimeline.Panel:
    """A band for each series, coloured by the state. `words`: number -> word and colour."""
    mapping = ValueMap(
        options={
            str(number): ValueMappingResult(text=word, color=colour, index=number)
            for number, (word, colour) in words.items()
        }
    )
    return (
        statetimeline.Panel()
        .title(title)
        .description(description)
        .datasource(PROMETHEUS)
        .targets([_target(query, ref, "range") for query, ref in _refs(queries)])
        .mappings([mapping])
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.FIXED).fixed_color("#8e8e8e"))
        .merge_values(True)
        .show_value(VisibilityMode.AUTO)
        .row_height(0.8)
        .fill_opacity(80)
        .line_width(0)
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
        )
        .height(height)
        .span(width)
    )


def words(title: str, markdown: str, *, width: int = 24, height: int = 3) -> text.Panel:
    return (
        text.Panel()
        .title(title)
        .mode(TextMode.MARKDOWN)
        .content(markdown)
        .transparent(True)
        .height(height)
        .span(width)
    )


def descending(column: str) -> common.TableSortByFieldState:
    return common.TableSortByFieldState().display_name(column).desc(True)
