"""Charts: learning curves, and the distribution of scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_dice.io import save_figure
from lightning_dice.plotting.colors import PALETTE

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

TRAIN, VAL, POINT, INK, MEAN = "#9A9A9A", "#000000", "#0072B2", "#404040", "#D55E00"
DPI = 144


def draw_curves(path: Path, rows: Sequence[Mapping[str, float]], monitor: str, mode: Literal["max", "min"]) -> None:
    """Loss and Dice over the epochs.

    Args:
        path: of the PNG.
        rows: one for each epoch, as `History` keeps them.
        monitor: the metric whose best epoch is marked.
        mode: whether its best value is the greatest or the least.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    classes = list(dict.fromkeys(key for row in rows for key in row if key.startswith("val/dice/")))
    figure = Figure(figsize=(11 if classes else 9.5, 4), layout="constrained")
    loss, dice = figure.subplots(1, 2)
    for axes, name in ((loss, "loss"), (dice, "dice")):
        _line(axes, rows, f"train/{name}", label="train", color=TRAIN, linewidth=2)
        _line(axes, rows, f"val/{name}", label="val", color=VAL, linewidth=2, zorder=4)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _plain(axes)
    loss.set_title("Loss", loc="left", fontweight="bold")
    dice.set_title("Dice", loc="left", fontweight="bold")
    dice.set_ylim(0, 1)
    if len(classes) > 1:
        for index, key in enumerate(classes):
            style = ("-", "--", ":")[index // len(PALETTE) % 3]
            color = PALETTE[index % len(PALETTE)]
            _line(dice, rows, key, label=key.removeprefix("val/dice/"), color=color, linewidth=1, linestyle=style)
    _mark_best(loss, dice, rows, monitor, mode)
    for axes in (loss, dice):
        if axes.get_legend_handles_labels()[0]:
            outside = axes is dice and len(classes) > 1
            place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if outside else {"loc": "best"}
            axes.legend(frameon=False, fontsize=8 if outside else 9, ncols=1 + len(classes) // 16 * outside, **place)
    save_figure(path, figure, DPI)


def _line(axes: Axes, rows: Sequence[Mapping[str, float]], key: str, **style: Any) -> None:
    points = [(row["epoch"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    if points:
        # A line through one point, or between epochs far apart, is not seen without its points.
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
        axes.axvline(best["epoch"], color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes = loss if "loss" in monitor else dice
    axes.plot(
        [best["epoch"]], [best[monitor]], marker="o", markersize=9, markeredgecolor=INK, fillstyle="none", zorder=5
    )
    axes.set_title(
        f"best: epoch {best['epoch']:.0f}, {monitor} {best[monitor]:.3f}", loc="right", fontsize=9, color=INK
    )


def draw_cases(axes: Axes, place: float, known: NDArray[np.float64], random: np.random.Generator) -> None:
    """A line of a chart: each case as a point, of five or more the quartiles as a box, the mean as a diamond.

    Args:
        axes: of matplotlib.
        place: of the line, along y.
        known: scores of cases, at least one.
        random: by which points are spread across the line.
    """
    import numpy as np

    heights = place + random.uniform(-0.24, 0.24, len(known))
    alpha = min(0.8, max(0.1, 60 / len(known)))
    axes.plot(known, heights, "o", color=POINT, markersize=4, markeredgewidth=0, alpha=alpha, zorder=2)
    if len(known) > 4:
        low, middle, high = np.quantile(known, [0.25, 0.5, 0.75])
        box: dict[str, Any] = {"height": 0.6, "facecolor": "none", "edgecolor": INK, "linewidth": 1, "zorder": 3}
        axes.barh(place, high - low, left=low, **box)
        axes.plot([middle, middle], [place - 0.3, place + 0.3], color=INK, linewidth=1.6, zorder=3)
    axes.plot(known.mean(), place, "D", color=MEAN, markersize=7, markeredgecolor="white", zorder=4)


def draw_distribution(path: Path, scores: Mapping[str, Sequence[float]], title: str) -> None:
    """The scores of the cases: every one as a point, quartiles as a box, the mean as a diamond.

    Args:
        path: of the PNG.
        scores: names of classes and the scores of the cases, NaN where a case has none.
        title: of the chart.
    """
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.4 + 0.42 * len(scores)), layout="constrained")
    axes = figure.subplots()
    random = np.random.default_rng(0)
    labels = []
    for place, (name, values) in enumerate(scores.items()):
        known = np.asarray([value for value in values if not math.isnan(value)], dtype=float)
        labels.append(f"{name}  (n={len(known)})")
        if not len(known):
            axes.text(0.5, place, "in no case", ha="center", va="center", color=INK, fontsize=9)
            continue
        draw_cases(axes, place, known, random)
        axes.annotate(
            f"{known.mean():.3f}",
            (1, place),
            (6, 0),
            ("axes fraction", "data"),
            "offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_title("mean", loc="right", fontsize=9, color=MEAN)
    axes.set_xlabel("Dice of a case: point; quartiles: box; mean: diamond", fontsize=9)
    _plain(axes)
    axes.grid(axis="x", color="0.92")
    save_figure(path, figure, DPI)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", zorder=0)
    axes.set_axisbelow(True)
