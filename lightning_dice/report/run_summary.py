"""The table printed at the end of a run: its scores and files."""

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
    best_step: int | None = None,
) -> Table:
    """Return the table printed at the end of a run, with metrics above and files below.

    Args:
        folder: the run's folder.
        val: metrics of the best checkpoint on the validation split, named `val/dice` or `dice`.
        test: metrics on the test split, named `test/dice` or `dice`.
        files: paths by label. Paths inside `folder` are printed relative to it; files that do not exist are left out.
        best_epoch: epoch of the best checkpoint, counted from 0.
        best_step: its number of optimizer steps, if it is not that of an epoch's end.

    Returns:
        A table for `rich.print`.

    >>> table = summary_table("my_run", {"val/dice": 0.75, "val/dice/car": 0.5}, best_epoch=4)
    >>> table.row_count
    2
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    splits = {name: _without_prefix(found, f"{name}/") for name, found in (("val", val), ("test", test)) if found}
    both = Table.grid(padding=(0, 0))
    if splits:
        title = "" if best_epoch is None else f"best epoch: {best_epoch}"
        title += "" if best_step is None else f", step {best_step}"
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="dim", pad_edge=False)
        table.add_column("")
        for name in splits:
            table.add_column(name, justify="right")
        names = dict.fromkeys(key for metrics in splits.values() for key in metrics)
        # The scores of the classes follow the mean, in whatever order they were logged.
        for key in sorted(names, key=lambda key: (key.partition("/")[0] == "dice", "/" in key)):
            label = f"  {key.partition('/')[2]}" if key.startswith("dice/") else key
            style = "bold" if key == "dice" else ""
            cells = [_format_metric(metrics.get(key)) for metrics in splits.values()]
            table.add_row(Text(label), *cells, style=style)
        both.add_row(table)
    paths = Table.grid(padding=(0, 2))
    paths.add_column(style="dim", no_wrap=True)
    # Fold long paths instead of truncating them, so that they can be copied.
    paths.add_column(overflow="fold")
    paths.add_row("folder", Text(str(folder), style="bold"))
    for label, path in (files or {}).items():
        if Path(path).exists():
            inside = Path(path).is_relative_to(folder)
            paths.add_row(label, Text(str(Path(path).relative_to(folder) if inside else path)))
    both.add_row(paths)
    return both


def _without_prefix(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {key.removeprefix(prefix): float(value) for key, value in metrics.items()}


def _format_metric(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4f}"
