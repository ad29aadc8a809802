"""Charts of the HTML report, as data URLs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_dice.plotting.colors import PALETTE
from lightning_dice.plotting.style import POINT, add_legend, draw_score_rows, style_axes
from lightning_dice.scoring.table import SCORES, ScoreTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

DPI = 130
MAX_CLASSES = 12  # in one chart, which would fill a page with more
WEBP_MAX_SIDE = 16383  # pixels


def image_url(image: Image, quality: int | None = None) -> str:
    """Return an image as a data URL: WebP, or PNG where Pillow lacks WebP.

    Args:
        image: to encode.
        quality: 1 to 100; `None` encodes without loss.

    >>> from PIL import Image
    >>> image_url(Image.new("RGB", (2, 2)))[:11]
    'data:image/'
    """
    from PIL import features

    kind = "webp" if features.check("webp") else "png"
    options: dict[str, Any] = {"lossless": True} if quality is None else {"quality": quality, "method": 4}
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **(options if kind == "webp" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def image_file_url(path: Path, max_chars: int = 2_000_000) -> str:
    """Return an image file as a data URL, compressed to about `max_chars` if possible; empty without the file.

    >>> image_file_url(Path("no_such_file.png"))
    ''
    """
    from PIL import Image

    if not path.is_file():
        return ""
    with Image.open(path) as file:
        image = file.convert("RGB")
    if max(image.size) > WEBP_MAX_SIDE:
        scale = WEBP_MAX_SIDE / max(image.size)
        image = image.resize((int(image.width * scale), int(image.height * scale)))
    url = ""
    for quality in (85, 70, 50, 30):
        url = image_url(image, quality)
        if len(url) <= max_chars:
            break
    return url


def figure_url(figure: Figure) -> str:
    """Return a matplotlib figure as a data URL, without loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(DPI)
    buffer = io.BytesIO()
    canvas.print_figure(buffer, format="png")
    buffer.seek(0)
    with Image.open(buffer) as image:
        return image_url(image.convert("RGB"))


def distribution_chart(cases: ScoreTable, score: str) -> str:
    """Draw a row for each class: cases as points, quartiles as a box, the mean as a diamond.

    Args:
        cases: the table; its first `MAX_CLASSES` classes are drawn.
        score: a key of `SCORES`.

    >>> table = ScoreTable("test", ["a", "b"], ["cell"], {"dice/cell": np.array([0.5, 0.9])}, "mm")
    >>> distribution_chart(table, "dice")[:11]
    'data:image/'
    """
    names = cases.classes[:MAX_CLASSES]
    figure, axes = _new_chart(7.2, 0.95 + 0.42 * len(names))
    draw_score_rows(axes, dict(zip(names, cases.of(score).T, strict=False)))
    if SCORES[score].better == "high":
        axes.set_xlim(-0.02, 1.02)
    elif SCORES[score].better == "low":
        axes.set_xlim(left=0)
    axes.set_xlabel(_axis_label(cases, score))
    return figure_url(figure)


def size_chart(cases: ScoreTable, score: str = "dice") -> str:
    """Draw a score of each case against the size of the class in its mask; empty if no mask has any class.

    Args:
        cases: the table; its first `MAX_CLASSES` classes are drawn.
        score: a key of `SCORES`, a share of 1.
    """
    names = cases.classes[:MAX_CLASSES]
    figure, axes = _new_chart(7.2, 3.6)
    smallest, largest = math.inf, 0.0
    for place, name in enumerate(names):
        sizes, values = cases.values[f"actual/{name}"], cases.of(score)[:, place]
        kept = np.isfinite(values) & (sizes > 0)
        if not kept.any():
            continue
        smallest, largest = min(smallest, sizes[kept].min()), max(largest, sizes[kept].max())
        alpha = min(0.85, max(0.15, 200 / kept.sum()))
        style: dict[str, Any] = {"markersize": 4.5, "markeredgewidth": 0, "alpha": alpha}
        axes.plot(sizes[kept], values[kept], "o", color=_class_color(place, len(names)), label=name, **style)
    if not largest:
        return ""
    if largest > 10 * smallest:  # Within a decade, the labels of a logarithmic axis overlap.
        axes.set_xscale("log")
    axes.set_xlabel("pixels of the class in the mask")
    axes.set_ylabel(_axis_label(cases, score))
    axes.set_ylim(-0.02, 1.02)
    if len(names) > 1:
        add_legend(axes, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure_url(figure)


def reliability_chart(rows: Sequence[Mapping[str, str]]) -> str:
    """Draw the accuracy at each confidence, and below it the share of pixels with that confidence.

    Args:
        rows: of `reliability.csv`; the first `MAX_CLASSES` classes are drawn.
    """
    from matplotlib.figure import Figure

    bins_by_class: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        bins_by_class.setdefault(row.get("class", ""), []).append(row)
    shown = dict(list(bins_by_class.items())[:MAX_CLASSES])
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    curve, pixels = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    curve.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for place, (name, bins) in enumerate(shown.items()):
        color = _class_color(place, len(shown))
        points = [(float(row["confidence"]), float(row["right"])) for row in bins if row.get("confidence")]
        if points:
            curve.plot(*zip(*points, strict=True), marker="o", markersize=4, color=color, label=name, zorder=3)
        counts = [float(row["pixels"]) for row in bins]
        middles = [(float(row["lower"]) + float(row["upper"])) / 2 for row in bins]
        total = sum(counts) or 1
        pixels.step(middles, [count / total for count in counts], where="mid", color=color)
    per_class = len(shown) > 1 or next(iter(shown)) != ""
    curve.set_ylabel("share of pixels of the class" if per_class else "share of right pixels")
    pixels.set_xlabel("predicted probability")
    pixels.set_ylabel("pixels")
    pixels.set_yscale("log")
    curve.set_xlim(0, 1)
    curve.set_ylim(0, 1)
    for axes in (curve, pixels):
        style_axes(axes)
    if len(shown) > 1:
        add_legend(curve, fontsize=8)
    return figure_url(figure)


def _axis_label(cases: ScoreTable, score: str) -> str:
    unit = cases.unit_of(score)
    return f"{SCORES[score].title}{f' ({unit})' if unit else ''}"


def _class_color(place: int, count: int) -> str:
    return PALETTE[place % len(PALETTE)] if count > 1 else POINT


def _new_chart(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    style_axes(axes)
    return figure, axes
