"""Files that are either the old one or the new one, never half of one."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["number", "read_csv", "save_figure", "write_atomically", "write_csv"]


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make the file under a temporary name beside `path`, then put it in its place.

    The temporary file lies in the same folder, because a rename is atomic only within one file system. It keeps the
    suffix, from which writers tell the format, and is removed if `write` fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix
    part = path.with_name(f".{path.name.removesuffix(suffix)}.{os.getpid()}.part{suffix}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def number(value: float) -> str:
    """Six digits, as tables need them; NaN is an empty field."""
    return "" if value != value else f"{value:.6g}"


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
