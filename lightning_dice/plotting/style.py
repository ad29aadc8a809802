"""Colours, axes and rows of points that the charts share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.legend import Legend
    from numpy.typing import NDArray

TRAIN, VAL, POINT, INK, MEAN = "#9A9A9A", "#000000", "#0072B2", "#404040", "#D55E00"
DPI = 144


def style_axes(axes: Axes, grid: Literal["both", "x"] = "both") -> None:
    """Remove the upper and right border of a chart and draw a light grid behind its content."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="0.92", zorder=0)
    axes.set_axisbelow(True)


def label_rows(axes: Axes, labels: list[str]) -> None:
    """Label the rows 0, 1, ... of a chart, from the top down."""
    # Names may contain what matplotlib would parse as mathematics.
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    axes.set_ylim(len(labels) - 0.4, -0.6)


def annotate_row(axes: Axes, row: int, text: str) -> None:
    """Write a text to the right of a row."""
    place, unit = (1, row), ("axes fraction", "data")
    axes.annotate(text, place, (6, 0), unit, "offset points", va="center", fontsize=9)


def add_legend(axes: Axes, **style: Any) -> Legend:
    """Add a legend without a frame; names are not parsed as mathematics."""
    legend = axes.legend(frameon=False, **style)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return legend


def draw_score_rows(axes: Axes, scores: Mapping[str, NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """Draw a row for each class: cases as points, quartiles as a box (from five cases on), the mean as a diamond.

    Args:
        axes: the chart's axes.
        scores: scores of the cases by class; NaN where a case has none.

    Returns:
        The finite scores of each row.

    >>> from matplotlib.figure import Figure
    >>> rows = draw_score_rows(Figure().subplots(), {"cell": np.array([0.5, np.nan, 0.75])})
    >>> [row.tolist() for row in rows]
    [[0.5, 0.75]]
    """
    random = np.random.default_rng(0)
    finite = [values[np.isfinite(values)] for values in scores.values()]
    for row, values in enumerate(finite):
        if len(values):
            _draw_scores(axes, row, values, random)
    label_rows(axes, [f"{name}  (n={len(values)})" for name, values in zip(scores, finite, strict=True)])
    return finite


def _draw_scores(axes: Axes, row: int, values: NDArray[np.float64], random: np.random.Generator) -> None:
    heights = row + random.uniform(-0.24, 0.24, len(values))
    alpha = min(0.8, max(0.1, 60 / len(values)))
    axes.plot(values, heights, "o", color=POINT, markersize=4, markeredgewidth=0, alpha=alpha, zorder=2)
    if len(values) > 4:
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
        box: dict[str, Any] = {"height": 0.6, "facecolor": "none", "edgecolor": INK, "linewidth": 1, "zorder": 3}
        axes.barh(row, high - low, left=low, **box)
        axes.plot([median, median], [row - 0.3, row + 0.3], color=INK, linewidth=1.6, zorder=3)
    axes.plot(values.mean(), row, "D", color=MEAN, markersize=7, markeredgecolor="white", zorder=4)
