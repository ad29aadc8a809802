"""The report's charts, as pictures that a page can hold."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_dice.plotting.colors import PALETTE
from lightning_dice.plotting.curves import POINT, draw_cases
from lightning_dice.scoring.table import SCORES, Cases

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
CLASSES = 12  # in one chart; a page with more of them would be one long chart


def as_source(pixels: Any, quality: int | None = None) -> str:
    """A picture as an address that holds it: WebP, or PNG where Pillow was built without.

    Args:
        pixels: a `PIL.Image.Image`.
        quality: 1 to 100; `None`: lossless.
    """
    from PIL import features

    kind = "webp" if features.check("webp") else "png"
    options: dict[str, Any] = {"lossless": True} if quality is None else {"quality": quality, "method": 4}
    buffer = io.BytesIO()
    pixels.save(buffer, format=kind, **(options if kind == "webp" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def of_file(path: Path, limit: int = 2_000_000) -> str:
    """The picture of a file, in at most about `limit` bytes if that is possible; empty if there is no such file."""
    from PIL import Image

    if not path.is_file():
        return ""
    with Image.open(path) as picture:
        pixels = picture.convert("RGB")
    if max(pixels.size) > 16383:  # The most that WebP can hold.
        scale = 16383 / max(pixels.size)
        pixels = pixels.resize((int(pixels.width * scale), int(pixels.height * scale)))
    source = ""
    for quality in (85, 70, 50, 30):
        source = as_source(pixels, quality)
        if len(source) <= limit:
            break
    return source


def distribution(cases: Cases, score: str) -> str:
    """Each case as a point, quartiles as a box and the mean as a diamond, a line for each class."""
    names = cases.classes[:CLASSES]
    values = cases.of(score)[:, : len(names)]
    figure, axes = _chart(7.2, 0.95 + 0.42 * len(names))
    random = np.random.default_rng(0)
    for place in range(len(names)):
        known = values[np.isfinite(values[:, place]), place]
        if not len(known):
            continue
        draw_cases(axes, place, known, random)
    counts = np.isfinite(values).sum(0)
    labels = [f"{name}  (n={count})" for name, count in zip(names, counts, strict=True)]
    axes.set_yticks(range(len(names)), labels, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    if SCORES[score].better == "high":
        axes.set_xlim(-0.02, 1.02)
    elif SCORES[score].better == "low":
        axes.set_xlim(left=0)
    axes.set_xlabel(_label(cases, score))
    return _source(figure)


def by_size(cases: Cases, score: str = "dice") -> str:
    """A score of each case against the size of what there is; empty where no case has anything."""
    names = cases.classes[:CLASSES]
    figure, axes = _chart(7.2, 3.6)
    smallest, largest = math.inf, 0.0
    for place, name in enumerate(names):
        sizes, values = cases.values[f"actual/{name}"], cases.of(score)[:, place]
        kept = np.isfinite(values) & (sizes > 0)
        if kept.any():
            smallest, largest = min(smallest, sizes[kept].min()), max(largest, sizes[kept].max())
            color = PALETTE[place % len(PALETTE)] if len(names) > 1 else POINT
            alpha = min(0.85, max(0.15, 200 / kept.sum()))
            axes.plot(
                sizes[kept], values[kept], "o", color=color, markersize=4.5, markeredgewidth=0, alpha=alpha, label=name
            )
    if not largest:
        return ""
    if largest > 10 * smallest:  # Within a decade a logarithmic axis has labels that run into each other.
        axes.set_xscale("log")
    axes.set_xlabel("pixels of the class in the mask")
    axes.set_ylabel(_label(cases, score))
    axes.set_ylim(-0.02, 1.02)
    if len(names) > 1:
        legend = axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        for text in legend.get_texts():
            text.set_parse_math(False)
    return _source(figure)


def reliability(rows: Sequence[Mapping[str, str]]) -> str:
    """How often a confidence is right, and how many pixels have it; rows as of `reliability.csv`."""
    groups: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        groups.setdefault(row.get("class", ""), []).append(row)
    shown = dict(list(groups.items())[:CLASSES])
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    curve, pixels = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    curve.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for place, (name, bins) in enumerate(shown.items()):
        color = PALETTE[place % len(PALETTE)] if len(shown) > 1 else POINT
        points = [(float(row["confidence"]), float(row["right"])) for row in bins if row.get("confidence")]
        if points:
            curve.plot(*zip(*points, strict=True), marker="o", markersize=4, color=color, label=name, zorder=3)
        counts = [float(row["pixels"]) for row in bins]
        middles = [(float(row["lower"]) + float(row["upper"])) / 2 for row in bins]
        total = sum(counts) or 1
        pixels.step(middles, [count / total for count in counts], where="mid", color=color)
    several = len(shown) > 1 or next(iter(shown)) != ""
    curve.set_ylabel("share of pixels of the class" if several else "share of right pixels")
    pixels.set_xlabel("predicted probability")
    pixels.set_ylabel("pixels")
    pixels.set_yscale("log")
    curve.set_xlim(0, 1)
    curve.set_ylim(0, 1)
    for axes in (curve, pixels):
        _plain(axes)
    if len(shown) > 1:
        for text in curve.legend(frameon=False, fontsize=8).get_texts():
            text.set_parse_math(False)
    return _source(figure)


def _label(cases: Cases, score: str) -> str:
    unit = cases.unit_of(score)
    return f"{SCORES[score].title}{f' ({unit})' if unit else ''}"


def _chart(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", zorder=0)
    axes.set_axisbelow(True)


def _source(figure: Figure) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(DPI)
    buffer = io.BytesIO()
    canvas.print_figure(buffer, format="png")
    buffer.seek(0)
    with Image.open(buffer) as picture:
        return as_source(picture.convert("RGB"))
