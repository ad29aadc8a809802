"""A sweep's trials in one picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_dice.io import save_figure
from lightning_dice.plotting.curves import DPI, INK, POINT, VAL, _plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_dice.trials import Trial

PRUNED, FAILED = "#E69F00", "#D55E00"
MOST = 8  # parameters that get a chart


def draw_trials(path: Path, trials: Sequence[Trial], parameters: Sequence[str]) -> None:
    """Save `trials_figure` as a PNG at `path`."""
    save_figure(path, trials_figure(trials, parameters), DPI)


def trials_figure(trials: Sequence[Trial], parameters: Sequence[str]) -> Figure:
    """The value of each trial, with the best so far, and the values against each parameter.

    Args:
        trials: in the order of their numbers.
        parameters: the keys that are swept; the first eight get a chart. Numbers have an axis, logarithmic where they
            span a factor of 10; what else there is has a place for each of its values.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = list(parameters)[:MOST]
    columns = 2 if len(shown) == 3 else min(3, 1 + len(shown))
    rows = -(-(1 + len(shown)) // columns)
    figure = Figure(figsize=(1.2 + 4 * columns, 0.4 + 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    value = next((trial.monitor for trial in trials if trial.monitor), "value")
    _points(panels[0], trials, lambda trial: float(trial.number))
    _best_so_far(panels[0], trials)
    panels[0].set_xlabel("trial")
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes, key in zip(panels[1:], shown, strict=False):
        _against(axes, trials, key)
    for axes in panels[1 + len(shown) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel(value)
    counts = [(name, sum(trial.status == name for trial in trials)) for name in ("finished", "pruned", "failed")]
    title = ", ".join(f"{count} {name}" for name, count in counts if count) or "no trial has ended"
    panels[0].set_title("Trials", loc="left", fontweight="bold")
    panels[0].set_title(title, loc="right", fontsize=9, color=INK)
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(frameon=False, fontsize=8, loc="best")
    return figure


def _points(axes: Axes, trials: Sequence[Trial], place: Callable[[Trial], float]) -> None:
    _plain(axes)
    for status, color, marker in (("finished", POINT, "o"), ("pruned", PRUNED, "v")):
        known = [trial for trial in trials if trial.status == status and _known(trial)]
        if known:
            places, values = [place(trial) for trial in known], [trial.value or 0.0 for trial in known]
            axes.plot(places, values, marker, color=color, markersize=6, alpha=0.8, label=status)
    failed = [trial for trial in trials if trial.status == "failed"]
    if failed:
        # On the lower edge: they have no value.
        axes.plot(
            [place(trial) for trial in failed],
            [0.02] * len(failed),
            "x",
            color=FAILED,
            markersize=7,
            markeredgewidth=2,
            transform=axes.get_xaxis_transform(),
            label="failed",
        )


def _known(trial: Trial) -> bool:
    return trial.value is not None and math.isfinite(trial.value)


def _best_so_far(axes: Axes, trials: Sequence[Trial]) -> None:
    known = [trial for trial in trials if _known(trial)]
    if not known:
        return
    choose = max if known[0].mode == "max" else min
    best: list[float] = []
    for trial in known:
        best.append(choose([*best[-1:], float(trial.value or 0.0)]))
    # To the last trial, whatever became of it.
    numbers = [trial.number for trial in known] + [trials[-1].number]
    axes.step(numbers, [*best, best[-1]], where="post", color=VAL, linewidth=1.2, label="best so far", zorder=1)


def _against(axes: Axes, trials: Sequence[Trial], key: str) -> None:
    given = [trial for trial in trials if key in trial.parameters]
    numbers = [_number(trial.parameters[key]) for trial in given]
    if given and all(math.isfinite(number) for number in numbers) and len(set(numbers)) > 1:
        if min(numbers) > 0 and max(numbers) / min(numbers) >= 10:
            axes.set_xscale("log")
        _points(axes, given, lambda trial: _number(trial.parameters[key]))
    else:
        names = list(dict.fromkeys(trial.parameters[key] for trial in given))
        # Beside each other, so that equal values do not hide one another.
        turn = {trial.number: index for index, trial in enumerate(given)}
        spread = 0.3 / max(len(given) - 1, 1)
        _points(axes, given, lambda trial: names.index(trial.parameters[key]) + spread * turn[trial.number] - 0.15)
        short = [name if len(name) <= 16 else f"{name[:15]}…" for name in names]
        slanted = len(names) * max(map(len, short), default=0) > 34
        axes.set_xticks(
            range(len(names)), short, rotation=30 if slanted else 0, ha="right" if slanted else "center", fontsize=9
        )
        axes.set_xlim(-0.5, max(len(names), 1) - 0.5)
    axes.set_xlabel(key)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
