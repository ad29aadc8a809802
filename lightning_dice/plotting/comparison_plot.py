"""The picture of a paired comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_dice.io import save_figure
from lightning_dice.plotting.curves import INK, MEAN, POINT
from lightning_dice.plotting.report_plots import DPI
from lightning_dice.scoring.table import SCORES

if TYPE_CHECKING:
    from lightning_dice.scoring.comparison import Difference


def draw(path: Path, names: Sequence[str], groups: Sequence[Sequence[Difference]], score: str, unit: str) -> None:
    """Each case's difference as a point, the mean and its interval over them; a line for each class and run.

    Args:
        path: of the PNG.
        names: of the runs, that of the first ahead.
        groups: of each further run the differences from the first.
        score: a key of `SCORES`.
        unit: of the score; empty for a share.
    """
    from matplotlib.figure import Figure

    lines = [(name, line) for name, group in zip(names[1:], groups, strict=True) for line in group]
    figure = Figure(figsize=(9, 1.9 + 0.46 * len(lines)), layout="constrained")
    axes = figure.subplots()
    random = np.random.default_rng(0)
    labels = []
    for place, (name, line) in enumerate(lines):
        known = line.differences[np.isfinite(line.differences)]
        labels.append(f"{name}: {line.name}" if len(groups) > 1 else line.name)
        heights = place + random.uniform(-0.26, 0.26, len(known))
        alpha = min(0.7, max(0.1, 60 / max(1, len(known))))
        axes.plot(known, heights, "o", color=POINT, markersize=4, markeredgewidth=0, alpha=alpha, zorder=2)
        if not math.isnan(line.low):
            axes.plot([line.low, line.high], [place, place], color=MEAN, linewidth=3, solid_capstyle="butt", zorder=4)
        if line.cases:
            axes.plot(line.mean, place, "D", color=MEAN, markersize=7, markeredgecolor="white", zorder=5)
        axes.annotate(
            f"{line.wins} : {line.losses} : {line.ties}",
            (1, place),
            (6, 0),
            ("axes fraction", "data"),
            "offset points",
            va="center",
            fontsize=9,
        )
    axes.axvline(0, color=INK, linewidth=1, zorder=3)
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    # As far to the left as to the right: the eye then weighs both sides alike.
    reach = max((float(np.nanmax(np.abs(line.differences), initial=0.0)) for _, line in lines), default=0.0) or 1.0
    axes.set_xlim(-1.06 * reach, 1.06 * reach)
    second = names[1] if len(groups) == 1 else "each run"
    better = {"high": "right", "low": "left", "zero": ""}[SCORES[score].better]
    side = f"; {better} of 0 {second} is better" if better else ""
    title = f"{SCORES[score].title}{f' ({unit})' if unit else ''} of {second}\nless {names[0]}"
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11, parse_math=False)
    # Over its column: beside the title there is no room for the names of runs.
    axes.annotate("wins : losses : ties", (1, 1), (6, 4), "axes fraction", "offset points", fontsize=9, color=INK)
    note = f"case: point; mean and its 95% interval: diamond and bar{side}"
    axes.set_xlabel(note, fontsize=9, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="0.92", zorder=0)
    axes.set_axisbelow(True)
    save_figure(path, figure, DPI)
