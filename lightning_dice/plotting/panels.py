"""The grid of image, truth, prediction and errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_dice.io import save_figure
from lightning_dice.plotting import colors as palette
from lightning_dice.plotting.colors import Color, parse_color
from lightning_dice.plotting.style import DPI
from lightning_dice.plotting.thumbnails import IGNORED_CODE, CaseThumbnail, Codes, ErrorCode

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP, TITLE, HEADER, LINE, MARGIN, LEGEND_INDENT = 8, 34, 44, 32, 16, 110  # pixels
MIN_PANEL = 320  # pixels on the longer side
ERRORS = {
    ErrorCode.TRUE_POSITIVE: ("true positive", palette.TRUE_POSITIVE),
    ErrorCode.FALSE_POSITIVE: ("false positive", palette.FALSE_POSITIVE),
    ErrorCode.FALSE_NEGATIVE: ("false negative", palette.FALSE_NEGATIVE),
    ErrorCode.WRONG_CLASS: ("wrong class", palette.WRONG_CLASS),
    ErrorCode.IGNORED: ("ignored", palette.IGNORED),
}
# Where every pixel has a class, the only error is a wrong one.
DENSE_ERRORS = {
    ErrorCode.WRONG_CLASS: ("wrong class", palette.FALSE_POSITIVE),
    ErrorCode.IGNORED: ERRORS[ErrorCode.IGNORED],
}


class _Row(NamedTuple):
    panels: list[NDArray[np.uint8]]
    title: str
    height: int
    width: int


def draw_overlays(
    path: Path,
    cases: Sequence[CaseThumbnail],
    classes: Sequence[str],
    colors: Sequence[Color],
    *,
    dense: bool,
    title: str,
    labels: Mapping[str, str],
) -> None:
    """Draw a row for each case: image, truth, prediction, errors.

    Nothing is scaled down here, so that no thin object is lost; small images are scaled up.

    Args:
        path: the PNG file.
        cases: in the order of the rows.
        classes: names.
        colors: one for each class.
        dense: every pixel has a class and none is background: correct pixels are then not coloured in the errors.
        title: the picture's title.
        labels: prefixes of the rows' titles, by case.
    """
    from matplotlib.figure import Figure

    size = max(MIN_PANEL, *(max(case.truth.shape) for case in cases))
    thickened = [not dense and _has_small_objects(case, size) for case in cases]
    rows = [
        _make_row(case, labels.get(case.case, ""), colors, dense, thicken, size)
        for case, thicken in zip(cases, thickened, strict=True)
    ]
    panel_width = max(row.width for row in rows)
    width = 4 * panel_width + 3 * GAP + 2 * MARGIN
    legend = _legend(cases, classes, colors, dense)
    step = max(len(name) for entries in legend.values() for name, _ in entries) * 13 + 60
    columns = max(1, (width - 2 * MARGIN - LEGEND_INDENT) // step)
    notes = ["objects under 3 pixels across are drawn a pixel thicker"] if any(thickened) else []
    if any("at 1/" in case.note for case in cases):
        notes.append("a reduced picture colours a pixel if anything in it is coloured, so borders look thicker")
    legend_height = sum(-(-len(entries) // columns) for entries in legend.values()) * LINE
    height = HEADER + legend_height + LINE * bool(notes) + HEADER + MARGIN
    height += sum(row.height + TITLE + GAP for row in rows)

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    _draw_text(figure, MARGIN, 12, title, fontsize=13, fontweight="bold")
    top = HEADER
    for name, entries in legend.items():
        _draw_text(figure, MARGIN, top + 4, name, fontsize=10, color="0.35")
        _draw_legend(figure, entries, columns, step, top)
        top += -(-len(entries) // columns) * LINE
    if notes:
        _draw_text(figure, MARGIN, top + 4, "Display only: " + "; ".join(notes) + ".", fontsize=8, color="0.35")
        top += LINE
    for column, name in enumerate(("image", "truth", "prediction", "errors")):
        _draw_text(figure, MARGIN + column * (panel_width + GAP), top + 12, name, fontsize=11, fontweight="bold")
    top += HEADER
    for row in rows:
        _draw_text(figure, MARGIN, top + 8, row.title, fontsize=9)
        top += TITLE
        for column, panel in enumerate(row.panels):
            left = MARGIN + column * (panel_width + GAP)
            place = (left / width, 1 - (top + row.height) / height, row.width / width, row.height / height)
            axes = figure.add_axes(place)
            axes.imshow(panel, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
        top += row.height + GAP
    save_figure(path, figure, DPI)


def _make_row(case: CaseThumbnail, label: str, colors: Sequence[Color], dense: bool, thicken: bool, size: int) -> _Row:
    gray = np.repeat(case.image.mean(-1, keepdims=True), 3, -1)
    class_colors = dict(enumerate(colors, start=1)) | {IGNORED_CODE: parse_color(palette.IGNORED)}
    error_colors = {int(code): parse_color(color) for code, (_, color) in (DENSE_ERRORS if dense else ERRORS).items()}
    maps = [(case.truth, class_colors, 0.75), (case.prediction, class_colors, 0.75), (case.errors, error_colors, 0.9)]
    panels = [case.image]
    for codes, code_colors, alpha in maps:
        panels.append(_paint(gray, _thicken(codes) if thicken else codes, code_colors, alpha))
    scale = size / max(case.truth.shape)
    height, width = (round(side * scale) for side in case.truth.shape)
    note = f"   ({case.note})" if case.note else ""
    dice = "no score: nothing there, nothing predicted" if np.isnan(case.score) else f"Dice {case.score:.3f}"
    title = f"{label}{case.case}   {dice}{note}"
    return _Row([_enlarge(panel, height, width) for panel in panels], title, height, width)


def _paint(gray: Any, codes: Codes, colors: dict[int, Color], alpha: float) -> NDArray[np.uint8]:
    # Darken the image, so that the colours stand out on bright ones too.
    painted = gray * 0.6
    for code in np.unique(codes):
        if int(code) in colors:
            where = codes == code
            painted[where] = (1 - alpha) * gray[where] + alpha * np.asarray(colors[int(code)], float)
    return painted.round().astype(np.uint8)  # type: ignore[no-any-return]


def _enlarge(panel: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    rows = np.arange(height) * panel.shape[0] // height
    columns = np.arange(width) * panel.shape[1] // width
    enlarged: NDArray[np.uint8] = panel[rows][:, columns]
    return enlarged


def _dilate(codes: Any) -> Any:
    """Return the maximum of each pixel and its eight neighbours."""
    padded = np.pad(codes, 1)
    high, wide = codes.shape
    return np.max([padded[i : i + high, j : j + wide] for i in range(3) for j in range(3)], axis=0)


def _small_objects(codes: Codes) -> NDArray[np.bool_]:
    """Return the painted pixels that are neither in nor next to a 3 x 3 square of painted ones."""
    painted = (codes > 0) & (codes != IGNORED_CODE)
    solid = ~_dilate(~painted)
    return painted & ~_dilate(_dilate(solid))  # type: ignore[no-any-return]


def _thicken(codes: Codes) -> Codes:
    grown = _dilate(np.where(_small_objects(codes), codes, 0))
    return np.where(codes == 0, grown, codes).astype(codes.dtype)


def _has_small_objects(case: CaseThumbnail, size: int) -> bool:
    """Whether a case has objects that are too small to be seen when it is drawn `size` pixels large."""
    maps = (case.truth, case.prediction, case.errors)
    return size < 2 * max(case.truth.shape) and any(_small_objects(codes).any() for codes in maps)


def _legend(
    cases: Sequence[CaseThumbnail], classes: Sequence[str], colors: Sequence[Color], dense: bool
) -> dict[str, list[tuple[str, Any]]]:
    painted = {int(code) for case in cases for codes in (case.truth, case.prediction) for code in np.unique(codes)}
    names = [(name, colors[i]) for i, name in enumerate(classes) if i + 1 in painted]
    shown: list[tuple[str, Any]] = [(name, tuple(value / 255 for value in color)) for name, color in names]
    # All errors that can occur, whether or not they did, so that two pictures have the same legend.
    occurring = {int(code) for case in cases for code in np.unique(case.errors)}
    optional = {ErrorCode.IGNORED} if dense else {ErrorCode.WRONG_CLASS, ErrorCode.IGNORED}
    entries = (DENSE_ERRORS if dense else ERRORS).items()
    errors = [entry for code, entry in entries if code in occurring or code not in optional]
    return {"classes": shown, "errors": errors} if shown else {"errors": errors}


def _draw_legend(figure: Figure, entries: Sequence[tuple[str, Any]], columns: int, step: int, top: int) -> None:
    from matplotlib.patches import Rectangle

    width, height = figure.get_size_inches() * DPI
    for index, (name, color) in enumerate(entries):
        left, down = MARGIN + LEGEND_INDENT + index % columns * step, top + index // columns * LINE
        patch = Rectangle((left / width, 1 - (down + 22) / height), 22 / width, 18 / height, facecolor=color)
        patch.set(edgecolor="0.3", linewidth=0.5, transform=figure.transFigure)
        figure.add_artist(patch)
        _draw_text(figure, left + 32, down + 4, name, fontsize=10)


def _draw_text(figure: Figure, left: float, top: float, text: str, **style: Any) -> None:
    width, height = figure.get_size_inches() * DPI
    # File names may contain what matplotlib would parse as mathematics.
    figure.text(left / width, 1 - top / height, text, va="top", ha="left", parse_math=False, **style)
