"""The summary of an evaluation as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_dice.report.provenance import INTERVAL
from lightning_dice.scoring.summary import ScoreSummary
from lightning_dice.scoring.table import SCORES

if TYPE_CHECKING:
    from rich.table import Table


def score_table(summaries: Sequence[ScoreSummary]) -> Table:
    """Return the summaries as a rich table, a row for each score and class.

    >>> [column.header for column in score_table([]).columns]
    ['score', 'class', 'mean', 'interval', 'median', 'cases', 'undefined']
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=f"interval: {INTERVAL}", caption_justify="left")
    for name in ("score", "class"):
        table.add_column(name)
    for name in ("mean", "interval", "median", "cases", "undefined"):
        table.add_column(name, justify="right", no_wrap=True)
    previous = ""
    for line in summaries:
        title = f"{SCORES[line.score].title}{f' ({line.unit})' if line.unit else ''}"
        ends = "" if math.isnan(line.low) else f"{format_score(line.low)} to {format_score(line.high)}"
        cells = [format_score(line.mean), ends, format_score(line.median)]
        counts = [str(line.cases), str(line.undefined) if line.undefined else ""]
        table.add_row(title if title != previous else "", Text(line.name), *cells, *counts)
        previous = title
    return table


def format_score(value: float) -> str:
    """Format a number with four decimals, or four digits from 10 on; NaN is empty.

    >>> format_score(0.5), format_score(-12345.6), format_score(float("nan"))
    ('0.5000', '-1.235e+04', '')
    """
    if math.isnan(value):
        return ""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"
