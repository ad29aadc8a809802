"""Write the summary and the report of an evaluation from its `cases.csv`; both can be written again at any time."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning_dice.io import number, read_csv, write_atomically, write_csv
from lightning_dice.report.provenance import INTERVAL, ScoreProvenance, package_versions
from lightning_dice.scoring.summary import ScoreSummary, summarize
from lightning_dice.scoring.table import ScoreTable, parse_rows

SUMMARY, SUMMARY_DATA, REPORT = "summary.csv", "summary.json", "report.html"


def write_report(folder: Path, split: str, provenance: ScoreProvenance) -> list[ScoreSummary]:
    """Write `summary.csv`, `summary.json` and `report.html` beside the `cases.csv` of an evaluation.

    Args:
        folder: the evaluation's folder; the report shows its `overlays.png` and `reliability.csv` if they exist.
        split: the rows of the table to summarize.
        provenance: what was evaluated.

    Returns:
        The summaries; none if there is no table, or no row of this split, and then nothing is written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_report(Path(folder), "test", ScoreProvenance("An evaluation without a table", {}, {}))
    []
    """
    rows = read_csv(folder / "cases.csv")
    if not any(row.get("split") == split for row in rows):
        return []
    table = parse_rows(rows, split)
    summaries = summarize(table)
    details = {"date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}", "versions": package_versions()}
    provenance = provenance._replace(details={**provenance.details, **details})
    _write_summary_csv(folder / SUMMARY, summaries)
    _write_text(folder / SUMMARY_DATA, _summary_json(table, summaries, provenance))
    from lightning_dice.report.html import render_report

    _write_text(folder / REPORT, render_report(folder, table, summaries, provenance))
    return summaries


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, partial(Path.write_text, data=text, encoding="utf-8"))


def _write_summary_csv(path: Path, summaries: Sequence[ScoreSummary]) -> None:
    columns = ["score", "class", "unit", "mean", "low", "high", "median", "cases", "undefined", "absent"]
    rows = []
    for line in summaries:
        fields = {"class": line.name, **line._asdict()}
        texts = {key: number(value) if isinstance(value, float) else str(value) for key, value in fields.items()}
        rows.append({column: texts[column] for column in columns})
    write_csv(path, columns, rows)


def _summary_json(table: ScoreTable, summaries: Sequence[ScoreSummary], provenance: ScoreProvenance) -> str:
    data = {
        "title": provenance.title,
        **provenance.details,
        "split": table.split,
        "cases": len(table.names),
        "unit": table.unit,
        "settings": dict(provenance.settings),
        "interval": INTERVAL,
        "scores": [_json_fields(line) for line in summaries],
    }
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _json_fields(line: ScoreSummary) -> dict[str, Any]:
    fields = line._asdict()
    fields["class"] = fields.pop("name")
    fields["worst"] = [{"case": case, "value": value} for case, value in line.worst]
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in fields.items()}
