"""What a table of cases comes to, for people: `summary.csv`, `summary.json` and `report.html`.

Everything is made from the files of an evaluation's folder, above all `cases.csv`, so that it can be made again.
"""

from __future__ import annotations

import csv
import datetime
import json
import math
import platform
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_dice.io import number, read_csv, write_atomically
from lightning_dice.scoring.summary import CONFIDENCE, RESAMPLES, Line, summarize
from lightning_dice.scoring.table import SCORES, Cases, read

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["REPORT", "SUMMARY", "SUMMARY_DATA", "Line", "ScoreProvenance", "conclude", "shown", "summary_of_scores"]

SUMMARY, SUMMARY_DATA, REPORT = "summary.csv", "summary.json", "report.html"
INTERVAL = f"{CONFIDENCE:.0%} percentile bootstrap over cases, {RESAMPLES} resamples, seed 0"


class ScoreProvenance(NamedTuple):
    """What was evaluated, and how.

    Attributes:
        title: of the report.
        made_of: what to say of the run, the checkpoint, the data; in the order in which it is shown.
        settings: of the scores, by their names in `lightning_dice.scoring.Scoring`.
    """

    title: str
    made_of: Mapping[str, str]
    settings: Mapping[str, Any]


def write_report(folder: Path, split: str, facts: ScoreProvenance) -> list[Line]:
    """Sum an evaluation up: write the summary and the report beside its `cases.csv`.

    Args:
        folder: of the evaluation.
        split: which rows of the table.
        facts: what was evaluated.

    Returns:
        The lines of the summary; none if there is no table, or none of this split.
    """
    rows = read_csv(folder / "cases.csv")
    if not any(row.get("split") == split for row in rows):
        return []
    cases = read(rows, split)
    lines = summarize(cases)
    made_of = {**facts.made_of, "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}", "versions": versions()}
    facts = facts._replace(made_of=made_of)
    write_summary(folder, cases, lines, facts)
    from lightning_dice.report.html import page

    text = page(folder, cases, lines, facts)
    write_atomically(folder / REPORT, lambda part: part.write_text(text, encoding="utf-8"))
    return lines


def write_summary(folder: Path, cases: Cases, lines: Sequence[Line], facts: ScoreProvenance) -> None:
    """Write `summary.csv`, a row for each score and class, and `summary.json`, which also says how it came about."""
    columns = ["score", "class", "unit", "mean", "low", "high", "median", "cases", "undefined", "absent"]

    def write(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(columns)
            for line in lines:
                numbers = (line.mean, line.low, line.high, line.median)
                counts = (line.cases, line.undefined, line.absent)
                table.writerow([line.score, line.name, line.unit, *map(number, numbers), *counts])

    write_atomically(folder / SUMMARY, write)
    data = {
        "title": facts.title,
        **facts.made_of,
        "split": cases.split,
        "cases": len(cases.names),
        "unit": cases.unit,
        "settings": dict(facts.settings),
        "interval": INTERVAL,
        "scores": [_plain(line) for line in lines],
    }
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / SUMMARY_DATA, partial(Path.write_text, data=text + "\n", encoding="utf-8"))


def _plain(line: Line) -> dict[str, Any]:
    plain = line._asdict()
    plain["class"] = plain.pop("name")
    plain["worst"] = [{"case": case, "value": value} for case, value in line.worst]
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in plain.items()}


def summary_of_scores(lines: Sequence[Line]) -> Table:
    """The summary as a rich table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=f"interval: {INTERVAL}", caption_justify="left")
    for name in ("score", "class"):
        table.add_column(name)
    for name in ("mean", "interval", "median", "cases", "undefined"):
        table.add_column(name, justify="right", no_wrap=True)
    last = ""
    for line in lines:
        title = f"{SCORES[line.score].title}{f' ({line.unit})' if line.unit else ''}"
        cells = [shown(line.mean), f"{shown(line.low)} to {shown(line.high)}" if line.low == line.low else ""]
        counts = [str(line.cases), str(line.undefined) if line.undefined else ""]
        table.add_row(title if title != last else "", Text(line.name), *cells, shown(line.median), *counts)
        last = title
    return table


def shown(value: float) -> str:
    """A number as people read it: four digits; nothing for NaN."""
    if math.isnan(value):
        return ""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"


def versions() -> str:
    """This package's version and those of what the numbers rest on."""
    names = ("lightning-dice", "torch", "lightning", "monai", "scipy")
    found = [f"Python {platform.python_version()}"]
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
