"""PNG charts of a run: learning curves, and the distribution of its scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_dice.io import save_figure
from lightning_dice.plotting.colors import PALETTE
from lightning_dice.plotting.style import (
    DPI,
    INK,
    MEAN,
    TRAIN,
    VAL,
    add_legend,
    annotate_row,
    draw_score_rows,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_curves(path: Path, rows: Sequence[Mapping[str, float]], monitor: str, mode: Literal["max", "min"]) -> None:
    """Draw loss and Dice over the epochs.

    Args:
        path: the PNG file.
        rows: one for each epoch, and for each validation within one, as `History` keeps them: `time` is in epochs, by
            default `epoch`.
        monitor: the metric whose best epoch is marked.
        mode: whether larger or smaller values of `monitor` are better.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    label = "epoch"
    if any(_time(row) % 1 for row in rows):
        # A validation after a fifth of the first epoch is at 0.2, and the end of that epoch at 1.
        rows, label = [{**row, "time": _time(row) + 1} for row in rows], "epochs trained"
    classes = list(dict.fromkeys(key for row in rows for key in row if key.startswith("val/dice/")))
    figure = Figure(figsize=(11 if classes else 9.5, 4), layout="constrained")
    loss, dice = figure.subplots(1, 2)
    for axes, name in ((loss, "loss"), (dice, "dice")):
        _draw_curve(axes, rows, f"train/{name}", label="train", color=TRAIN, linewidth=2)
        _draw_curve(axes, rows, f"val/{name}", label="val", color=VAL, linewidth=2, zorder=4)
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(name.title(), loc="left", fontweight="bold")
        style_axes(axes)
    dice.set_ylim(0, 1)
    if len(classes) > 1:
        for index, key in enumerate(classes):
            style = ("-", "--", ":")[index // len(PALETTE) % 3]
            color = PALETTE[index % len(PALETTE)]
            _draw_curve(dice, rows, key, label=key.removeprefix("val/dice/"), color=color, linewidth=1, linestyle=style)
    _mark_best(loss, dice, rows, monitor, mode)
    for axes in (loss, dice):
        if axes.get_legend_handles_labels()[0]:
            outside = axes is dice and len(classes) > 1
            place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if outside else {"loc": "best"}
            add_legend(axes, fontsize=8 if outside else 9, ncols=1 + len(classes) // 16 * outside, **place)
    save_figure(path, figure, DPI)


def _draw_curve(axes: Axes, rows: Sequence[Mapping[str, float]], key: str, **style: Any) -> None:
    points = [(_time(row), row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    if points:
        # Without markers, a single point would be invisible, and so would points between distant epochs.
        marker = "o" if len(points) <= 12 else None
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=2 + style.get("linewidth", 1), **style)


def _mark_best(
    loss: Axes, dice: Axes, rows: Sequence[Mapping[str, float]], monitor: str, mode: Literal["max", "min"]
) -> None:
    known = [row for row in rows if math.isfinite(row.get(monitor, math.nan))]
    if not known:
        return
    best = (max if mode == "max" else min)(known, key=lambda row: row[monitor])
    for axes in (loss, dice):
        axes.axvline(_time(best), color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes = loss if "loss" in monitor else dice
    ring: dict[str, Any] = {"marker": "o", "markersize": 9, "markeredgecolor": INK, "fillstyle": "none"}
    axes.plot([_time(best)], [best[monitor]], zorder=5, **ring)
    title = f"best: epoch {best['epoch']:.0f}, {monitor} {best[monitor]:.3f}"
    axes.set_title(title, loc="right", fontsize=9, color=INK)


def _time(row: Mapping[str, float]) -> float:
    return row.get("time", row["epoch"])


def draw_distribution(path: Path, scores: Mapping[str, Sequence[float]], title: str) -> None:
    """Draw the Dice scores of the cases: each as a point, quartiles as a box, the mean as a diamond.

    Args:
        path: the PNG file.
        scores: scores of the cases by class, NaN where a case has none.
        title: the chart's title.
    """
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.4 + 0.42 * len(scores)), layout="constrained")
    axes = figure.subplots()
    rows = draw_score_rows(axes, {name: np.asarray(values, dtype=float) for name, values in scores.items()})
    for row, known in enumerate(rows):
        if len(known):
            annotate_row(axes, row, f"{known.mean():.3f}")
        else:
            axes.text(0.5, row, "in no case", ha="center", va="center", color=INK, fontsize=9)
    axes.set_xlim(-0.02, 1.02)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_title("mean", loc="right", fontsize=9, color=MEAN)
    axes.set_xlabel("Dice of a case: point; quartiles: box; mean: diamond", fontsize=9)
    style_axes(axes)
    save_figure(path, figure, DPI)
