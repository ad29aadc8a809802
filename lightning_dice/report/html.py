"""The report: one HTML file that needs neither scripts nor the network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_dice.io import read_csv
from lightning_dice.plotting.report_plots import (
    MAX_CLASSES,
    distribution_chart,
    image_file_url,
    reliability_chart,
    size_chart,
)
from lightning_dice.report.provenance import INTERVAL, ScoreProvenance
from lightning_dice.report.rendering import render_template
from lightning_dice.scoring.summary import MEAN_OF_CLASSES, MOST_PROBABLE_CLASS, ScoreSummary, worst_first
from lightning_dice.scoring.table import SCORES, ScoreTable

MAX_LISTED = 20  # cases of a list; all are in the table
WORST_CASES = 10
CARDS = ("dice", "surface_dice", "hd95", "lesion_f1", "ece")
DISTRIBUTIONS = ("dice", "surface_dice", "hd95", "volume_error", "lesion_f1")


def render_report(
    folder: Path, table: ScoreTable, summaries: Sequence[ScoreSummary], provenance: ScoreProvenance
) -> str:
    """Render the report of an evaluation.

    Args:
        folder: the evaluation's folder; its `overlays.png` and `reliability.csv` are shown if they exist.
        table: scores of the cases.
        summaries: the table's summaries.
        provenance: what was evaluated.
    """
    bins = [row for row in read_csv(folder / "reliability.csv") if row.get("split") == table.split]
    summarized = {line.score for line in summaries}
    return render_template(
        "lightning_dice.report",
        "report.html.j2",
        title=provenance.title,
        subtitle=f"{len(table.names)} {table.split} cases, {_count(len(table.classes), 'class')}",
        cards=_cards(summaries),
        scores=_score_grid(table, summaries),
        distributions=[distribution_chart(table, score) for score in DISTRIBUTIONS if score in summarized],
        charted=MAX_CLASSES,
        classes=len(table.classes),
        sizes=size_chart(table),
        overlays=image_file_url(folder / "overlays.png"),
        worst=_worst_cases(table),
        unscored=_unscored_cases(table),
        calibration=reliability_chart(bins) if bins else "",
        details=provenance.details,
        definitions=_definitions(table, provenance.settings),
        interval=INTERVAL,
    )


def _cards(summaries: Sequence[ScoreSummary]) -> list[dict[str, str]]:
    overall: dict[str, ScoreSummary] = {}
    for line in summaries:
        overall.setdefault(line.score, line)  # The mean of the classes comes first, if there are several.
    return [
        {
            "label": f"{SCORES[score].title}, mean",
            "value": f"{_format(line.mean)} {line.unit}".rstrip(),
            "note": _format_interval(line) or "no interval: one case",
        }
        for score, line in ((score, overall[score]) for score in CARDS if score in overall)
    ]


def _score_grid(table: ScoreTable, summaries: Sequence[ScoreSummary]) -> dict[str, Any] | None:
    names = list(dict.fromkeys(line.name for line in summaries if line.name != MOST_PROBABLE_CLASS))
    if not names:
        return None
    # The calibration error of the most probable class belongs to no class; it is listed under the first name.
    found = {(line.score, names[0] if line.name == MOST_PROBABLE_CLASS else line.name): line for line in summaries}
    # Headings are pairs of text and unit.
    scores = {line.score: (SCORES[line.score].title, table.unit_of(line.score)) for line in summaries}
    classes = {name: (name, "") for name in names}
    cells = [[_score_cell(found.get((score, name)), name) for name in names] for score in scores]
    corner, columns, rows = "", classes, scores
    if len(names) > max(6, len(scores)):  # The longer list runs down the page.
        corner, columns, rows = "class", scores, classes
        cells = [list(column) for column in zip(*cells, strict=True)]
    return {
        "corner": corner,
        "columns": list(columns.values()),
        "rows": list(zip(rows.values(), cells, strict=True)),
    }


def _score_cell(line: ScoreSummary | None, name: str) -> dict[str, Any]:
    if line is None or math.isnan(line.mean):
        return {"mean": "–", "notes": [], "bold": False}
    notes = [_format_interval(line), f"median {_format(line.median)}"]
    notes.append(f"{line.undefined} undefined" if line.undefined else "")
    return {"mean": _format(line.mean), "notes": [note for note in notes if note], "bold": name == MEAN_OF_CLASSES}


def _worst_cases(table: ScoreTable) -> dict[str, Any]:
    dice = table.values.get("dice", np.full(len(table.names), math.nan))
    per_class = len(table.classes) > 1
    if per_class:
        columns, values = table.classes, table.of("dice")
    else:
        scores = [score for score in ("surface_dice", "hd95", "volume_error", "lesion_f1") if score in table.scores]
        columns = [SCORES[score].title for score in scores]
        values = np.concatenate([np.empty((len(dice), 0)), *(table.of(score) for score in scores)], axis=1)
    rows = [
        [table.names[i], *(_format(value) or "–" for value in (dice[i], *values[i]))]
        for i in worst_first(dice, "dice")[:WORST_CASES]
    ]
    return {"columns": ["case", "Dice", *columns], "rows": rows, "per_class": per_class}


def _unscored_cases(table: ScoreTable) -> list[dict[str, str]]:
    entries = []
    for name in table.classes:
        actual, predicted = (table.values[f"{side}/{name}"] > 0 for side in ("actual", "predicted"))
        groups = {
            "missed altogether: Dice 0, no distance": actual & ~predicted,
            "predicted, but not in the mask: Dice 0, no distance": predicted & ~actual,
            "neither in the mask nor predicted: no score": ~actual & ~predicted,
        }
        for reason, where in groups.items():
            cases = [table.names[i] for i in np.flatnonzero(where)]
            if cases:
                more = f" and {len(cases) - MAX_LISTED} more" if len(cases) > MAX_LISTED else ""
                listed = ", ".join(cases[:MAX_LISTED]) + more
                entries.append({"name": name, "text": f"{reason}: {_count(len(cases), 'case')}: {listed}"})
    return entries


def _definitions(table: ScoreTable, settings: Mapping[str, Any]) -> dict[str, str]:
    tolerance, iou = settings.get("tolerance", ""), settings.get("lesion_iou", 0)
    matching = f"an intersection over union above {iou}, one to one" if iou else "any overlap"
    unit = {"mixed": "mm (pixels where the spacing is not known)"}.get(table.unit, table.unit)
    texts = {
        "dice": "2|P∩T| / (|P|+|T|), of each class in each case; 0 if one is empty, no score if both are.",
        "jaccard": "|P∩T| / |P∪T|.",
        "surface_dice": f"Share of both surfaces, by area, within {tolerance} {unit} of the other (Nikolov et al., "
        "2021); 0 if one is empty.",
        "hd95": f"The greater of the 95th percentiles of the distances from each boundary to the other, in {unit}.",
        "mean_surface_distance": f"Mean of the distances from each boundary to the other, in {unit}.",
        "volume_difference": f"Predicted minus actual, in {table.unit_of('volume_difference')}.",
        "volume_error": "The volume difference as a share of the actual volume.",
        "lesion_precision": f"Share of the predicted connected components that match an actual one by {matching}.",
        "lesion_recall": "Share of the actual components that are matched.",
        "lesion_f1": "Harmonic mean of lesion precision and recall.",
        "ece": "Expected calibration error of the pixels' probabilities, with bins of equal width.",
    }
    defined = {*table.scores, *({"ece"} & table.values.keys())}
    return {SCORES[score].title: texts[score] for score in SCORES if score in defined}


def _count(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def _format_interval(line: ScoreSummary) -> str:
    return "" if math.isnan(line.low) else f"{_format(line.low)} to {_format(line.high)}"


def _format(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"
