"""What a run has reached, and where it left things."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def summary_table(
    folder: str | Path,
    val: Mapping[str, float] | None = None,
    test: Mapping[str, float] | None = None,
    files: Mapping[str, str | Path] | None = None,
    best_epoch: int | None = None,
) -> Table:
    """The table printed at the end of a run: metrics above, files below.

    Args:
        folder: the run's folder.
        val: metrics of the best checkpoint on the validation split, named `val/dice` or `dice`.
        test: metrics on the test split, named `test/dice` or `dice`.
        files: what they are and where; a path within `folder` is shown from there, one that does not exist is left out.
        best_epoch: the epoch of the best checkpoint, from 0.

    Returns:
        A rich table: `rich.print(summary_table(...))`.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    splits = {"val": _without_prefix(val, "val/"), "test": _without_prefix(test, "test/")}
    splits = {name: metrics for name, metrics in splits.items() if metrics}
    whole = Table.grid(padding=(0, 0))
    if splits:
        title = "" if best_epoch is None else f"best epoch: {best_epoch}"
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="dim", pad_edge=False)
        table.add_column("")
        for name in splits:
            table.add_column(name, justify="right")
        names = dict.fromkeys(key for metrics in splits.values() for key in metrics)
        # A class's score belongs under the mean, whatever order they were logged in.
        for key in sorted(names, key=lambda key: (key.partition("/")[0] == "dice", "/" in key)):
            label = f"  {key.partition('/')[2]}" if key.startswith("dice/") else key
            style = "bold" if key == "dice" else ""
            cells = [_number(metrics.get(key)) for metrics in splits.values()]
            table.add_row(Text(label), *cells, style=style)
        whole.add_row(table)
    paths = Table.grid(padding=(0, 2))
    paths.add_column(style="dim", no_wrap=True)
    # Folded, not cut: a path is there to be copied.
    paths.add_column(overflow="fold")
    paths.add_row("folder", Text(str(folder), style="bold"))
    for label, path in (files or {}).items():
        if Path(path).exists():
            inside = Path(path).is_relative_to(folder)
            paths.add_row(label, Text(str(Path(path).relative_to(folder) if inside else path)))
    whole.add_row(paths)
    return whole


def _without_prefix(metrics: Mapping[str, float] | None, prefix: str) -> dict[str, float]:
    return {key.removeprefix(prefix): float(value) for key, value in (metrics or {}).items()}


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4f}"
