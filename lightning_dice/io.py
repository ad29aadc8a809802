"""Write tables, figures and other files atomically."""

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
    """Write a file under a temporary name beside `path`, then rename it: `path` is the old file or the new, never half.

    The temporary file is in the same folder, because renaming is atomic only within one file system. It has the suffix
    of `path`, by which some writers choose the format, and is removed if `write` fails.

    Args:
        path: the file; its folder is created if necessary.
        write: called with the temporary path.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically(Path(folder) / "new" / "a.txt", lambda part: part.write_text("1"))
    ...     (Path(folder) / "new" / "a.txt").read_text()
    '1'
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
    """Format a number for a table, with six significant digits; NaN is an empty field.

    >>> number(2 / 3), number(float("nan")), number(-0.0)
    ('0.666667', '', '0')
    """
    return "" if value != value else f"{value + 0.0:.6g}"  # -0.0 + 0.0 is 0.0.


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    """Write a table with a header; missing values are empty fields.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "cases.csv"
    ...     write_csv(path, ["case", "dice"], [{"case": "a", "dice": "0.5"}, {"case": "b"}])
    ...     read_csv(path)
    [{'case': 'a', 'dice': '0.5'}, {'case': 'b'}]
    """

    def write(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)

    write_atomically(path, write)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows of a table, without their empty fields; an empty list if the file does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if key and value} for row in csv.DictReader(file)]


def save_figure(path: Path, figure: Figure, dpi: float) -> None:
    """Write a figure as PNG, without a display and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(dpi)
    write_atomically(path, canvas.print_png)
