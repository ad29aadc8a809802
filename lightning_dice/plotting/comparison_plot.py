"""The chart of a paired comparison of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_dice.io import save_figure
from lightning_dice.plotting.report_plots import DPI
from lightning_dice.plotting.style import INK, MEAN, POINT, annotate_row, label_rows, style_axes
from lightning_dice.scoring.table import SCORES

if TYPE_CHECKING:
    from lightning_dice.scoring.comparison import Difference


def draw_comparison(
    path: Path, names: Sequence[str], groups: Sequence[Sequence[Difference]], score: str, unit: str
) -> None:
    """Draw the differences of the cases as points, with their mean and interval; a row for each class and run.

    Args:
        path: the PNG file.
        names: the runs' names, the reference first.
        groups: for each further run, its differences from the reference.
        score: a key of `SCORES`.
        unit: the score's unit; empty for a share.
    """
    from matplotlib.figure import Figure

    rows = [(name, line) for name, group in zip(names[1:], groups, strict=True) for line in group]
    figure = Figure(figsize=(9, 1.9 + 0.46 * len(rows)), layout="constrained")
    axes = figure.subplots()
    random = np.random.default_rng(0)
    for row, (_, line) in enumerate(rows):
        known = line.differences[np.isfinite(line.differences)]
        heights = row + random.uniform(-0.26, 0.26, len(known))
        alpha = min(0.7, max(0.1, 60 / max(1, len(known))))
        axes.plot(known, heights, "o", color=POINT, markersize=4, markeredgewidth=0, alpha=alpha, zorder=2)
        if not math.isnan(line.low):
            axes.plot([line.low, line.high], [row, row], color=MEAN, linewidth=3, solid_capstyle="butt", zorder=4)
        if line.cases:
            axes.plot(line.mean, row, "D", color=MEAN, markersize=7, markeredgecolor="white", zorder=5)
        annotate_row(axes, row, f"{line.wins} : {line.losses} : {line.ties}")
    axes.axvline(0, color=INK, linewidth=1, zorder=3)
    label_rows(axes, [f"{name}: {line.name}" if len(groups) > 1 else line.name for name, line in rows])
    # A symmetric axis, so that both sides can be compared by eye.
    reach = max((float(np.nanmax(np.abs(line.differences), initial=0.0)) for _, line in rows), default=0.0) or 1.0
    axes.set_xlim(-1.06 * reach, 1.06 * reach)
    second = names[1] if len(groups) == 1 else "each run"
    better = {"high": "right", "low": "left", "zero": ""}[SCORES[score].better]
    side = f"; {better} of 0 {second} is better" if better else ""
    title = f"{SCORES[score].title}{f' ({unit})' if unit else ''} of {second}\nminus {names[0]}"
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11, parse_math=False)
    # Above its column, because the names of the runs fill the line of the title.
    axes.annotate("wins : losses : ties", (1, 1), (6, 4), "axes fraction", "offset points", fontsize=9, color=INK)
    note = f"case: point; mean and its 95% interval: diamond and bar{side}"
    axes.set_xlabel(note, fontsize=9, parse_math=False)
    style_axes(axes, grid="x")
    save_figure(path, figure, DPI)
