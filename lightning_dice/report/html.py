"""The report: one HTML file that needs nothing else, neither a script nor the network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_dice.io import read_csv
from lightning_dice.plotting import report_plots
from lightning_dice.scoring.summary import MEAN_OF_CLASSES, MOST_PROBABLE_CLASS, ScoreSummary, worst_first
from lightning_dice.scoring.table import SCORES, ScoreTable

if TYPE_CHECKING:
    from lightning_dice.report import ScoreProvenance

LISTED = 20  # cases of a list; all are in the table

STYLE = """
:root { color-scheme: light; --ink: #222; --soft: #666; --line: #e3e3e3; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 2rem 1.5rem 4rem; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
p, ul { max-width: 78ch; } .soft { color: var(--soft); } small { color: var(--soft); }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.4rem 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .7rem 1.1rem; min-width: 11rem; }
.card b { display: block; font-size: 1.7rem; font-weight: 600; line-height: 1.2; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .85rem; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; white-space: nowrap; } td.n, th.n { text-align: right; white-space: nowrap; }
td.n small { display: block; } td.all { font-weight: 600; } td.all small { font-weight: 400; }
table.facts td { overflow-wrap: anywhere; } table.facts td:first-child { color: var(--soft); white-space: nowrap; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .88rem; margin-bottom: .3rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 500px), 1fr)); gap: 0 1.6rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; }
dt { font-weight: 600; } dd { margin: 0; }
@media (max-width: 640px) { dl { grid-template-columns: 1fr; } }
@media print { h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""


def page(folder: Path, cases: ScoreTable, lines: Sequence[ScoreSummary], facts: ScoreProvenance) -> str:
    """The report of an evaluation.

    Args:
        folder: of the evaluation; `overlays.png` and `reliability.csv` are shown if they are there.
        cases: its table.
        lines: its summary.
        facts: what was evaluated.
    """
    rows = [row for row in read_csv(folder / "reliability.csv") if row.get("split") == cases.split]
    parts = [
        f"<h1>{escape(facts.title)}</h1>",
        f'<p class="soft">{len(cases.names)} {escape(cases.split)} cases, {_many(len(cases.classes), "class")}</p>',
        _cards(lines),
        _section("Scores", _scores(cases, lines)),
        _section("Distribution over the cases", _distributions(cases, lines)),
        _section(
            "Dice by size", _figure(report_plots.by_size(cases), "Each point is a case, and a class that it has.")
        ),
        _section("Cases in pictures", _figure(report_plots.of_file(folder / "overlays.png"))),
        _section("Worst cases", _worst(cases)),
        _section("Empty masks and undefined scores", _without(cases)),
        _section("Calibration", _calibration(rows)),
        _section("What was evaluated", _facts(facts)),
        _section("Definitions", _definitions(cases, facts)),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(facts.title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _cards(lines: Sequence[ScoreSummary]) -> str:
    cards = []
    for score in ("dice", "surface_dice", "hd95", "lesion_f1", "ece"):
        found = [line for line in lines if line.score == score]
        if not found:
            continue
        line = found[0]  # That of all classes, where there are several.
        unit = f" {line.unit}" if line.unit else ""
        ends = f"{_short(line.low)} to {_short(line.high)}" if not math.isnan(line.low) else "no interval: one case"
        cards.append(
            f'<div class="card"><span>{SCORES[score].title}, mean</span><b>{_short(line.mean)}{unit}</b>'
            f"<span>{ends}</span></div>"
        )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _scores(cases: ScoreTable, lines: Sequence[ScoreSummary]) -> str:
    scores = list(dict.fromkeys(line.score for line in lines))
    names = list(dict.fromkeys(line.name for line in lines if line.name != MOST_PROBABLE_CLASS))
    if not names:
        return "<p>No case has a score: no class is in any mask, or predicted.</p>"
    # The calibration error of the most probable class is one for all of them.
    found = {(line.score, names[0] if line.name == MOST_PROBABLE_CLASS else line.name): line for line in lines}
    units = {score: f" <small>{escape(cases.unit_of(score))}</small>" for score in scores}
    titles = {score: f"{SCORES[score].title}{units[score] if cases.unit_of(score) else ''}" for score in scores}
    labels = {name: escape(name) for name in names}

    def cell(score: str, name: str) -> str:
        line = found.get((score, name))
        if line is None or math.isnan(line.mean):
            return '<td class="n">–</td>'
        strong = " all" if name == MEAN_OF_CLASSES else ""
        ends = f"{_short(line.low)} to {_short(line.high)}" if not math.isnan(line.low) else ""
        notes = f"<small>{ends}</small><small>median {_short(line.median)}</small>"
        if line.undefined:
            notes += f"<small>{line.undefined} undefined</small>"
        return f'<td class="n{strong}">{_short(line.mean)}{notes}</td>'

    # The longer list runs down the page.
    if len(names) <= max(6, len(scores)):
        corner, across = "", [labels[name] for name in names]
        rows = [(titles[score], [cell(score, name) for name in names]) for score in scores]
    else:
        corner, across = "class", [titles[score] for score in scores]
        rows = [(labels[name], [cell(score, name) for score in scores]) for name in names]
    head = "".join(f'<th class="n">{title}</th>' for title in across)
    body = "".join(f"<tr><td>{title}</td>{''.join(cells)}</tr>" for title, cells in rows)
    note = (
        "Mean over the cases that have the score, its 95% bootstrap interval, the median. "
        "“Undefined” counts cases in which a mask or the prediction lacks the class, so that there is no distance; "
        "they are not part of the mean, which then is too favourable: Dice and surface Dice count them as 0."
    )
    return (
        f'<div class="wide"><table><thead><tr><th>{corner}</th>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><p class="soft">{note}</p>'
    )


def _distributions(cases: ScoreTable, lines: Sequence[ScoreSummary]) -> str:
    there = {line.score for line in lines}
    shown = [score for score in ("dice", "surface_dice", "hd95", "volume_error", "lesion_f1") if score in there]
    charts = "".join(_figure(report_plots.distribution(cases, score)) for score in shown)
    rest = len(cases.classes) - report_plots.CLASSES
    note = (
        f" The first {report_plots.CLASSES} of {len(cases.classes)} classes; all are in the table." if rest > 0 else ""
    )
    return (
        f'<p class="soft">Point: a case. Box: quartiles. Diamond: mean.{note}</p><div class="grid">{charts}</div>'
        if charts
        else ""
    )


def _worst(cases: ScoreTable) -> str:
    means = cases.values.get("dice", np.full(len(cases.names), math.nan))
    others = [score for score in ("surface_dice", "hd95", "volume_error", "lesion_f1") if score in cases.scores]
    several = len(cases.classes) > 1
    head = ["case", "Dice", *(cases.classes if several else [])]
    head += [] if several else [SCORES[score].title for score in others]
    body = []
    for place in worst_first(means, "dice")[:10]:
        values = [means[place], *(cases.of("dice")[place] if several else [])]
        values += [] if several else [cases.of(score)[place, 0] for score in others]
        cells = "".join(f'<td class="n">{_short(value) or "–"}</td>' for value in values)
        body.append(f"<tr><td>{escape(cases.names[place])}</td>{cells}</tr>")
    if not body:
        return ""
    titles = "".join(f"<th{' class=n' if place else ''}>{escape(title)}</th>" for place, title in enumerate(head))
    what = "Dice of each class." if several else "Distances and errors of the same cases."
    return (
        f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
        f'<p class="soft">By mean Dice. {what}</p>'
    )


def _without(cases: ScoreTable) -> str:
    entries = []
    for name in cases.classes:
        actual, predicted = (cases.values[f"{side}/{name}"] > 0 for side in ("actual", "predicted"))
        groups = (
            (actual & ~predicted, "missed altogether: Dice 0, no distance"),
            (predicted & ~actual, "predicted, but not there: Dice 0, no distance"),
            (~actual & ~predicted, "neither there nor predicted: no score"),
        )
        for where, what in groups:
            found = [case for case, there in zip(cases.names, where, strict=True) if there]
            if found:
                entries.append(f"<li><b>{escape(name)}</b> {what}: {_many(len(found), 'case')}: {_list(found)}</li>")
    return f"<ul>{''.join(entries)}</ul>" if entries else "<p>None: every class is in every mask and predicted.</p>"


def _calibration(rows: list[dict[str, str]]) -> str:
    if not rows:
        return ""
    text = (
        "Where the curve lies below the diagonal, the network is surer than it is right. The lower chart shows how "
        "many pixels have each probability (on a logarithmic scale). The calibration error of a case is the mean "
        "distance from the diagonal, each bin weighted by its pixels."
    )
    return _figure(report_plots.reliability(rows), text)


def _facts(facts: ScoreProvenance) -> str:
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>" for key, value in facts.made_of.items()
    )
    return f'<div class="wide"><table class="facts"><tbody>{rows}</tbody></table></div>'


def _definitions(cases: ScoreTable, facts: ScoreProvenance) -> str:
    settings = facts.settings
    tolerance = settings.get("tolerance", "")
    iou = settings.get("lesion_iou", 0)
    matching = f"an intersection over union above {iou}, one to one" if iou else "any overlap"
    unit = {"mixed": "mm (pixels where the spacing is not known)"}.get(cases.unit, cases.unit)
    texts = {
        "dice": "2|P∩T| / (|P|+|T|), of each class in each case; 0 if one is empty, no score if both are.",
        "jaccard": "|P∩T| / |P∪T|.",
        "surface_dice": f"Share of both surfaces, by area, within {tolerance} {unit} of the other (Nikolov et al., "
        "2021); 0 if one is empty.",
        "hd95": f"The greater of the 95th percentiles of the distances from either boundary to the other, in {unit}.",
        "mean_surface_distance": f"Mean of the distances from both boundaries to the other one, in {unit}.",
        "volume_difference": f"Predicted less actual, in {cases.unit_of('volume_difference')}.",
        "volume_error": "The volume difference as a share of the actual volume.",
        "lesion_precision": f"Share of the predicted connected components that match an actual one by {matching}.",
        "lesion_recall": "Share of the actual components that are matched.",
        "lesion_f1": "Their harmonic mean.",
        "ece": "Expected calibration error of the pixels' probabilities, bins of equal width.",
    }
    there = [score for score in SCORES if score in cases.scores or (score == "ece" and "ece" in cases.values)]
    entries = "".join(f"<dt>{SCORES[score].title}</dt><dd>{escape(texts[score])}</dd>" for score in there)
    from lightning_dice.report import INTERVAL

    several = " “Mean of classes” is the mean of the classes' means." if len(cases.classes) > 1 else ""
    return (
        f"<dl>{entries}<dt>interval</dt><dd>{escape(INTERVAL)}; cases count as independent.{several}</dd>"
        "<dt>ignored pixels</dt><dd>belong to no class, in mask and prediction alike; a structure that runs into them "
        "ends there in both, as at the image's border.</dd></dl>"
    )


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}" if content else ""


def _figure(source: str, caption: str = "") -> str:
    if not source:
        return ""
    words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure>{words}<img alt="{escape(caption or "chart")}" src="{source}"></figure>'


def _list(names: Sequence[str]) -> str:
    shown: Iterable[str] = (escape(name) for name in names[:LISTED])
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(shown) + more


def _many(count: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{count} {noun if count == 1 else plural}"


def _short(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"
