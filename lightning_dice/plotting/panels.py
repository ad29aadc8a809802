"""The grid of image, truth, prediction and errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_dice.io import save_figure
from lightning_dice.plotting import thumbnails
from lightning_dice.plotting.colors import (
    FALSE_NEGATIVE,
    FALSE_POSITIVE,
    IGNORED,
    TRUE_POSITIVE,
    WRONG_CLASS,
    Color,
    parse_color,
)
from lightning_dice.plotting.thumbnails import Codes, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 144
GAP, TITLE, HEADER, LINE, MARGIN, LEAD = 8, 34, 44, 32, 16, 110  # pixels
LEAST_WIDTH = 320  # pixels of a panel
ERRORS = {
    thumbnails.HIT: ("true positive", TRUE_POSITIVE),
    thumbnails.SPURIOUS: ("false positive", FALSE_POSITIVE),
    thumbnails.MISSED: ("false negative", FALSE_NEGATIVE),
    thumbnails.CONFUSED: ("wrong class", WRONG_CLASS),
    thumbnails.VOID: ("ignored", IGNORED),
}


class _Row(NamedTuple):
    panels: list[NDArray[np.uint8]]
    title: str
    height: int
    width: int


def draw_overlays(
    path: Path,
    cases: Sequence[Record],
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
        path: of the PNG.
        cases: in the order of the rows.
        classes: names.
        colors: one for each class.
        dense: every pixel has a class, none is background: correct pixels are not coloured in the errors.
        title: of the picture.
        labels: what to say before the name of a case.
    """
    from matplotlib.figure import Figure

    box = max(LEAST_WIDTH, *(max(case.truth.shape) for case in cases))
    thick = [not dense and _is_thin(case, box) for case in cases]
    rows = [
        _row(case, labels.get(case.case, ""), colors, dense, thin, box) for case, thin in zip(cases, thick, strict=True)
    ]
    wide = max(row.width for row in rows)
    width = 4 * wide + 3 * GAP + 2 * MARGIN
    legend = _legend(cases, classes, colors, dense)
    step = max(len(name) for entries in legend.values() for name, _ in entries) * 13 + 60
    columns = max(1, (width - 2 * MARGIN - LEAD) // step)
    notes = ["objects under 3 pixels across are drawn a pixel thicker"] if any(thick) else []
    if any("at 1/" in case.note for case in cases):
        notes.append("a reduced picture colours a pixel if anything in it is coloured, so borders look thicker")
    legend_height = sum(-(-len(entries) // columns) for entries in legend.values()) * LINE
    height = HEADER + legend_height + LINE * bool(notes) + HEADER + MARGIN
    height += sum(row.height + TITLE + GAP for row in rows)

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    _text(figure, MARGIN, 12, title, fontsize=13, fontweight="bold")
    top = HEADER
    for name, entries in legend.items():
        _text(figure, MARGIN, top + 4, name, fontsize=10, color="0.35")
        _draw_legend(figure, entries, columns, step, top)
        top += -(-len(entries) // columns) * LINE
    if notes:
        _text(figure, MARGIN, top + 4, "Display only: " + "; ".join(notes) + ".", fontsize=8, color="0.35")
        top += LINE
    for column, name in enumerate(("image", "truth", "prediction", "errors")):
        _text(figure, MARGIN + column * (wide + GAP), top + 12, name, fontsize=11, fontweight="bold")
    top += HEADER
    for row in rows:
        _text(figure, MARGIN, top + 8, row.title, fontsize=9)
        top += TITLE
        for column, panel in enumerate(row.panels):
            left = MARGIN + column * (wide + GAP)
            place = (left / width, 1 - (top + row.height) / height, row.width / width, row.height / height)
            axes = figure.add_axes(place)
            axes.imshow(panel, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
        top += row.height + GAP
    save_figure(path, figure, DPI)


def _row(case: Record, label: str, colors: Sequence[Color], dense: bool, thin: bool, box: int) -> _Row:
    gray = np.repeat(case.image.mean(-1, keepdims=True), 3, -1)
    classes: dict[int, Color] = dict(enumerate(colors, start=1)) | {thumbnails.IGNORED: parse_color(IGNORED)}
    errors = {code: parse_color(color) for code, (_, color) in _errors(dense).items()}
    maps = [(case.truth, classes, 0.75), (case.prediction, classes, 0.75), (case.errors, errors, 0.9)]
    panels = [case.image]
    for codes, palette, alpha in maps:
        panels.append(_paint(gray, _thicken(codes) if thin else codes, palette, alpha))
    high, wide = case.truth.shape
    scale = box / max(high, wide)
    height, width = round(high * scale), round(wide * scale)
    note = f"   ({case.note})" if case.note else ""
    dice = "no score: nothing there, nothing predicted" if np.isnan(case.score) else f"Dice {case.score:.3f}"
    return _Row(
        [_enlarge(panel, height, width) for panel in panels], f"{label}{case.case}   {dice}{note}", height, width
    )


def _paint(gray: Any, codes: Codes, palette: dict[int, Color], alpha: float) -> NDArray[np.uint8]:
    # Darkened, so that the colours stand out on a bright image too.
    painted = gray * 0.6
    for code in np.unique(codes):
        if int(code) in palette:
            where = codes == code
            painted[where] = (1 - alpha) * gray[where] + alpha * np.asarray(palette[int(code)], float)
    return painted.round().astype(np.uint8)  # type: ignore[no-any-return]


def _enlarge(panel: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    rows = np.arange(height) * panel.shape[0] // height
    columns = np.arange(width) * panel.shape[1] // width
    enlarged: NDArray[np.uint8] = panel[rows][:, columns]
    return enlarged


def _around(codes: Any) -> Any:
    """The greatest of each pixel and its eight neighbours."""
    padded = np.pad(codes, 1)
    high, wide = codes.shape
    return np.max([padded[i : i + high, j : j + wide] for i in range(3) for j in range(3)], axis=0)


def _small(codes: Codes) -> NDArray[np.bool_]:
    """Painted pixels that lie in or near no square of 3 x 3 painted ones."""
    painted = (codes > 0) & (codes != thumbnails.IGNORED)
    solid = ~_around(~painted)
    return painted & ~_around(_around(solid))  # type: ignore[no-any-return]


def _thicken(codes: Codes) -> Codes:
    grown = _around(np.where(_small(codes), codes, 0))
    return np.where(codes == 0, grown, codes).astype(codes.dtype)


def _is_thin(case: Record, box: int) -> bool:
    """Whether something on it is too small to be seen at the size at which it is drawn."""
    return box < 2 * max(case.truth.shape) and any(_small(codes).any() for codes in case[3:6])


def _errors(dense: bool) -> dict[int, tuple[str, str]]:
    """Names and colours of what the errors show. Where every pixel has a class, the only error is a wrong one."""
    return (
        {thumbnails.CONFUSED: ("wrong class", FALSE_POSITIVE), thumbnails.VOID: ERRORS[thumbnails.VOID]}
        if dense
        else ERRORS
    )


def _legend(
    cases: Sequence[Record], classes: Sequence[str], colors: Sequence[Color], dense: bool
) -> dict[str, list[tuple[str, Any]]]:
    painted = {int(code) for case in cases for codes in (case.truth, case.prediction) for code in np.unique(codes)}
    names = [(name, colors[i]) for i, name in enumerate(classes) if i + 1 in painted]
    shown: list[tuple[str, Any]] = [(name, tuple(value / 255 for value in color)) for name, color in names]
    # Of the errors what can occur, not what did: two pictures are then read by one key.
    known = {int(code) for case in cases for code in np.unique(case.errors)}
    always = {thumbnails.CONFUSED} if dense else {thumbnails.HIT, thumbnails.SPURIOUS, thumbnails.MISSED}
    errors = [entry for code, entry in _errors(dense).items() if code in always | known]
    return {"classes": shown, "errors": errors} if shown else {"errors": errors}


def _draw_legend(figure: Figure, entries: Sequence[tuple[str, Any]], columns: int, step: int, top: int) -> None:
    from matplotlib.patches import Rectangle

    width, height = figure.get_size_inches() * DPI
    for index, (name, color) in enumerate(entries):
        left, down = MARGIN + LEAD + index % columns * step, top + index // columns * LINE
        patch = Rectangle((left / width, 1 - (down + 22) / height), 22 / width, 18 / height, facecolor=color)
        patch.set(edgecolor="0.3", linewidth=0.5, transform=figure.transFigure)
        figure.add_artist(patch)
        _text(figure, left + 32, down + 4, name, fontsize=10)


def _text(figure: Figure, left: float, top: float, text: str, **style: Any) -> None:
    width, height = figure.get_size_inches() * DPI
    # Names of files may hold what matplotlib takes for mathematics.
    figure.text(left / width, 1 - top / height, text, va="top", ha="left", parse_math=False, **style)
