"""Values of several rounds, what is wanted of them, and how they are printed.

A figure has one value per round. Where it has a baseline, that has one value per round too,
measured in the same round, and the ratio is taken pair by pair: what changes slowly on the
machine then cancels out. A goal is judged by the median, unless it says otherwise.
"""

import operator
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, Literal

import msgspec

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    ">=": operator.ge,
    "==": operator.eq,
}
PICK: dict[str, Callable[[Sequence[float]], float]] = {"median": median, "max": max, "min": min}
NONE = "–"


class Goal(msgspec.Struct, frozen=True):
    """`Goal("<", 5)`: of the values; `of="ratio"`: of the ratios to the baseline."""

    sign: Literal["<", ">=", "=="]
    limit: float
    of: Literal["value", "ratio"] = "value"
    by: Literal["median", "max", "min"] = "median"

    def __str__(self) -> str:
        text = f"{self.sign} {self.limit:g}"
        text += "×" if self.of == "ratio" else ""
        return text if self.by == "median" else f"{text} ({self.by})"


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table."""

    name: str
    unit: str
    values: list[float]
    against: str = ""  # what the baseline is
    baseline: list[float] = []
    goal: Goal | None = None

    @property
    def ratios(self) -> list[float]:
        if not all(self.baseline):
            return []
        return [value / base for value, base in zip(self.values, self.baseline, strict=False)]

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        judged = self.values if self.goal.of == "value" else self.ratios
        if not judged:
            return "not measured"
        met = OPERATORS[self.goal.sign](PICK[self.goal.by](judged), self.goal.limit)
        return "met" if met else "missed"

    def as_json(self) -> dict[str, Any]:
        return {
            **msgspec.to_builtins(self),
            "ratios": self.ratios,
            "verdict": self.verdict or None,
        }


HEADINGS = (
    *("figure", "min", "median", "max", "unit"),
    *("baseline", "against", "ratio", "(min … max)"),
    *("goal", ""),
)
TEXT_COLUMNS = {0, 4, 6, 8, 9, 10}


def table(figures: Sequence[Figure]) -> str:
    """All figures of one benchmark, a row each."""
    rows = [HEADINGS, *map(_row, figures)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            f"{cell:<{width}}" if number in TEXT_COLUMNS else f"{cell:>{width}}"
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines)


def _row(figure: Figure) -> tuple[str, ...]:
    values, ratios = figure.values, figure.ratios
    spread = f"{min(ratios):.3f} … {max(ratios):.3f}" if len(ratios) > 1 else ""
    return (
        figure.name,
        *(number(pick(values)) if values else NONE for pick in (min, median, max)),
        figure.unit,
        number(median(figure.baseline)) if figure.baseline else "",
        figure.against,
        f"{median(ratios):.3f}×" if ratios else "",
        spread,
        str(figure.goal or ""),
        figure.verdict,
    )


def number(value: float) -> str:
    """Three or four digits that count, never an exponent."""
    size = abs(value)
    if size >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 1 else f"{value:.4f}"


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, int(share * len(ordered) + 0.999999) - 1))]
