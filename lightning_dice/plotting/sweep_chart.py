"""The chart of a sweep: its trials in order, and their values against each parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_dice.io import save_figure
from lightning_dice.plotting.style import DPI, INK, POINT, VAL, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_dice.trials import Trial

PRUNED, FAILED = "#E69F00", "#D55E00"
MAX_PARAMETERS = 8  # that get a chart


def draw_trials(path: Path, trials: Sequence[Trial], parameters: Sequence[str]) -> None:
    """Save `trials_figure` as a PNG at `path`."""
    save_figure(path, trials_figure(trials, parameters), DPI)


def trials_figure(trials: Sequence[Trial], parameters: Sequence[str]) -> Figure:
    """Draw the value of each trial with the best so far, and the values against each parameter.

    Numbers get a numeric axis, logarithmic if they span a factor of 10; other values get a place each.

    Args:
        trials: in the order of their numbers.
        parameters: the swept keys; the first eight get a chart.

    >>> from lightning_dice.trials import Trial
    >>> figure = trials_figure([Trial(0, ["lr=0.1"], "finished", 0.5), Trial(1, ["lr=1"], "finished", 0.75)], ["lr"])
    >>> [axes.get_xlabel() for axes in figure.axes]
    ['trial', 'lr']
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = list(parameters)[:MAX_PARAMETERS]
    columns = 2 if len(shown) == 3 else min(3, 1 + len(shown))
    rows = -(-(1 + len(shown)) // columns)
    figure = Figure(figsize=(1.2 + 4 * columns, 0.4 + 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    first = panels[0]
    _draw_values(first, trials, lambda trial: float(trial.number))
    _draw_best_so_far(first, trials)
    first.set_xlabel("trial")
    first.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes, key in zip(panels[1:], shown, strict=False):
        _draw_against_parameter(axes, trials, key)
    for axes in panels[1 + len(shown) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel(next((trial.monitor for trial in trials if trial.monitor), "value"))
    counts = [(name, sum(trial.status == name for trial in trials)) for name in ("finished", "pruned", "failed")]
    summary = ", ".join(f"{count} {name}" for name, count in counts if count) or "no trial has ended"
    first.set_title("Trials", loc="left", fontweight="bold")
    first.set_title(summary, loc="right", fontsize=9, color=INK)
    if first.get_legend_handles_labels()[0]:
        first.legend(frameon=False, fontsize=8, loc="best")
    return figure


def _draw_values(axes: Axes, trials: Sequence[Trial], position: Callable[[Trial], float]) -> None:
    style_axes(axes)
    for status, color, marker in (("finished", POINT, "o"), ("pruned", PRUNED, "v")):
        known = [trial for trial in trials if trial.status == status and _has_value(trial)]
        if known:
            positions, values = [position(trial) for trial in known], [trial.value or 0.0 for trial in known]
            axes.plot(positions, values, marker, color=color, markersize=6, alpha=0.8, label=status)
    if failed := [position(trial) for trial in trials if trial.status == "failed"]:
        # At the lower edge, because they have no value.
        heights, edge = [0.02] * len(failed), axes.get_xaxis_transform()
        axes.plot(failed, heights, "x", color=FAILED, markersize=7, markeredgewidth=2, transform=edge, label="failed")


def _has_value(trial: Trial) -> bool:
    return trial.value is not None and math.isfinite(trial.value)


def _draw_best_so_far(axes: Axes, trials: Sequence[Trial]) -> None:
    known = [trial for trial in trials if _has_value(trial)]
    if not known:
        return
    choose = max if known[0].mode == "max" else min
    best: list[float] = []
    for trial in known:
        best.append(choose([*best[-1:], float(trial.value or 0.0)]))
    # The line extends to the last trial, whether or not it has a value.
    numbers = [trial.number for trial in known] + [trials[-1].number]
    axes.step(numbers, [*best, best[-1]], where="post", color=VAL, linewidth=1.2, label="best so far", zorder=1)


def _draw_against_parameter(axes: Axes, trials: Sequence[Trial], key: str) -> None:
    swept = [trial for trial in trials if key in trial.parameters]
    numbers = [_parse_number(trial.parameters[key]) for trial in swept]
    if swept and all(math.isfinite(number) for number in numbers) and len(set(numbers)) > 1:
        if min(numbers) > 0 and max(numbers) / min(numbers) >= 10:
            axes.set_xscale("log")
        _draw_values(axes, swept, lambda trial: _parse_number(trial.parameters[key]))
    else:
        names = list(dict.fromkeys(trial.parameters[key] for trial in swept))
        # Side by side, so that equal values do not hide each other.
        offsets = {trial.number: 0.3 * i / max(len(swept) - 1, 1) - 0.15 for i, trial in enumerate(swept)}
        _draw_values(axes, swept, lambda trial: names.index(trial.parameters[key]) + offsets[trial.number])
        short = [name if len(name) <= 16 else f"{name[:15]}…" for name in names]
        slanted = len(names) * max(map(len, short), default=0) > 34
        rotation, align = (30, "right") if slanted else (0, "center")
        axes.set_xticks(range(len(names)), short, rotation=rotation, ha=align, fontsize=9)
        axes.set_xlim(-0.5, max(len(names), 1) - 0.5)
    axes.set_xlabel(key)


def _parse_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
