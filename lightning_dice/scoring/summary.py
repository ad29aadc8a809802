"""What a table of cases comes to: means with intervals, medians, worst cases."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np

from lightning_dice.scoring.table import SCORES, Cases, Floats

ALL = "mean of classes"
TOP = "most probable class"
RESAMPLES = 10_000
CONFIDENCE = 0.95


class Line(NamedTuple):
    """One score of one class over the cases.

    Attributes:
        score: a key of `SCORES`.
        name: of the class, `ALL`: the mean over the classes of each one's mean, as `DiceScore` has it; or `TOP`: the
            calibration error of classes that exclude each other.
        unit: of the score; empty for a share of 1.
        mean: over the cases that have the score.
        low: the lower end of the interval; NaN with fewer than two cases.
        high: its upper end.
        median: of the cases; with `ALL`, of their means over the classes.
        cases: that have the score.
        undefined: cases in which the class is, or is predicted, and which have no score all the same: the distance
            from a surface to none.
        absent: cases that neither have the class nor are predicted to have it.
        worst: names and scores of the worst cases.
    """

    score: str
    name: str
    unit: str
    mean: float
    low: float
    high: float
    median: float
    cases: int
    undefined: int
    absent: int
    worst: list[tuple[str, float]]


def summarize(
    cases: Cases, *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0, worst: int = 5
) -> list[Line]:
    """Sum a table up.

    The intervals are percentile bootstrap intervals (Efron & Tibshirani, 1993, ch. 13): the cases are drawn again, with
    replacement, and the ends are percentiles of the means of these draws. All scores and classes see the same draws. A
    draw that holds no case with the score says nothing and is left out. Cases count as independent: several of one
    patient make the intervals too narrow.

    Args:
        cases: the table.
        resamples: draws.
        confidence: of the interval, in (0, 1).
        seed: of the draws.
        worst: how many cases to name.
    """
    tables = {score: cases.of(score) for score in cases.scores}
    whole = cases.values.get("ece")  # Of the most probable class, and so of no class.
    if whole is not None:
        tables["ece"] = whole[:, None]
    draws = resampled_means(tables, resamples, seed) if tables else {}
    there = cases.of("actual") + cases.of("predicted") > 0
    lines = []

    def add(score: str, name: str, mean: Floats, column: Floats, means: Floats, has: Any) -> None:
        known = np.isfinite(column)
        lines.append(
            Line(
                score,
                name,
                cases.unit_of(score),
                float(mean),
                *(interval(means, confidence) if known.sum() > 1 else (math.nan, math.nan)),
                float(np.median(column[known])) if known.any() else math.nan,
                int(known.sum()),
                int((has & ~known).sum()),
                int((~has).sum()),
                _worst(cases, score, column, worst),
            )
        )

    for score, table in tables.items():
        if score == "ece" and whole is not None:
            add(score, TOP, _mean(whole), whole, draws[score][:, 0], there.any(1))
            continue
        if len(cases.classes) > 1:
            add(score, ALL, _mean(_mean(table)), _class_means(table), _class_means(draws[score]), there.any(1))
        for place, name in enumerate(cases.classes):
            add(score, name, _mean(table[:, place]), table[:, place], draws[score][:, place], there[:, place])
    return lines


def resampled_means(values: dict[str, Floats], resamples: int, seed: int) -> dict[str, Floats]:
    """Means over resampled cases of tables `(cases, columns)` of the same cases: `(resamples, columns)` each.

    How often each case is drawn is multinomial, and a mean is then a product of matrices, which leaves out missing
    values and does all columns with the same draws; `scipy.stats.bootstrap` can do neither.
    """
    count = len(next(iter(values.values()), ()))
    random = np.random.default_rng(seed)
    known = {name: np.isfinite(table) for name, table in values.items()}
    filled = {name: np.where(known[name], table, 0.0) for name, table in values.items()}
    parts: dict[str, list[Floats]] = {name: [] for name in values}
    step = max(1, 2**22 // max(1, count))
    for start in range(0, resamples, step):
        drawn = random.multinomial(count, np.full(count, 1 / count), size=min(step, resamples - start)).astype(float)
        for name in values:
            with np.errstate(invalid="ignore"):
                parts[name].append((drawn @ filled[name]) / (drawn @ known[name].astype(float)))
    return {name: np.concatenate(part) for name, part in parts.items()}


def interval(means: Floats, confidence: float) -> tuple[float, float]:
    """The middle `confidence` of resampled means, NaN left out."""
    known = means[np.isfinite(means)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.percentile(known, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)


def worst_first(values: Floats, score: str) -> list[int]:
    """Places of the values that are there, from the worst to the best."""
    better = SCORES[score].better
    badness = -values if better == "high" else np.abs(values) if better == "zero" else values
    return [int(place) for place in np.argsort(-badness, kind="stable") if math.isfinite(values[place])]


def _worst(cases: Cases, score: str, column: Floats, count: int) -> list[tuple[str, float]]:
    return [(cases.names[place], float(column[place])) for place in worst_first(column, score)[:count]]


def _class_means(values: Floats) -> Floats:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # A case without any score has no mean.
        means: Floats = np.nanmean(values, 1)
    return means


def _mean(values: Floats) -> Floats:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        means: Floats = np.nanmean(values, 0)
    return means
