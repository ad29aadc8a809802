"""Tables and figures, written as files that are either the old one or the new one."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_dice.io import number, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["number", "read_csv", "save_figure", "write_atomically", "write_csv"]


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    """A table with a header; a missing value is an empty field."""

    def write(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)

    write_atomically(path, write)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table that `write_csv` wrote, without the empty fields; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if key and value} for row in csv.DictReader(file)]


def save_figure(path: Path, figure: Figure, dpi: float) -> None:
    """A PNG of the figure, drawn without a display and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(dpi)
    write_atomically(path, canvas.print_png)
