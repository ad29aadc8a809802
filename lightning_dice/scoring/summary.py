"""Summary of a table of cases: means with intervals, medians, worst cases."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_dice.scoring.table import SCORES, Floats, ScoreTable

MEAN_OF_CLASSES = "mean of classes"
MOST_PROBABLE_CLASS = "most probable class"
N_RESAMPLES = 10_000
CONFIDENCE = 0.95
# Of the mean size of the values: a table has six digits, and sums of float64 have fifteen or so.
_ROUNDING = 1e-9


class ScoreSummary(NamedTuple):
    """One score of one class, over all cases.

    Attributes:
        score: a key of `SCORES`.
        name: the class; or `MEAN_OF_CLASSES`, the mean of the classes' means, as `DiceScore` computes it; or
            `MOST_PROBABLE_CLASS`, for the calibration error of mutually exclusive classes.
        unit: the score's unit; empty for a fraction.
        mean: over the cases in which the score is defined.
        low: lower end of the interval; NaN with fewer than two cases.
        high: upper end of the interval.
        median: over the cases; for `MEAN_OF_CLASSES`, of each case's mean over the classes.
        cases: number of cases in which the score is defined.
        undefined: cases that have the class in mask or prediction, but no score: the distance to an empty mask.
        absent: cases that have the class neither in the mask nor in the prediction.
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


class _Column(NamedTuple):
    """One score of one class.

    Attributes:
        score: a key of `SCORES`.
        name: as in `ScoreSummary`.
        mean: over the cases.
        values: each case's score; NaN where undefined.
        resampled: means of the bootstrap resamples.
        present: whether each case has the class in mask or prediction.
    """

    score: str
    name: str
    mean: float
    values: Floats
    resampled: Floats
    present: NDArray[np.bool_]


def summarize(
    table: ScoreTable, *, n_resamples: int = N_RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0, worst: int = 5
) -> list[ScoreSummary]:
    """Summarize a table over its cases.

    Intervals are percentile bootstrap intervals (Efron & Tibshirani, 1993, ch. 13): cases are drawn with replacement,
    and the ends are percentiles of the means of these resamples. All scores and classes share the same resamples; one
    in which a score is never defined is left out. Cases are treated as independent: if several come from one patient,
    the intervals are too narrow.

    Args:
        table: the scores of the cases.
        n_resamples: number of resamples.
        confidence: confidence level of the intervals, in (0, 1).
        seed: for drawing the resamples.
        worst: how many of the worst cases to name.

    >>> table = ScoreTable("test", ["a", "b"], ["cell"], {"dice/cell": np.array([0.5, 0.9])}, "mm")
    >>> (dice,) = summarize(table, worst=1)
    >>> dice.mean, dice.cases, dice.worst
    (0.7, 2, [('a', 0.5)])
    """
    return [_summarize_column(column, table, confidence, worst) for column in _columns(table, n_resamples, seed)]


def _summarize_column(column: _Column, table: ScoreTable, confidence: float, worst: int) -> ScoreSummary:
    known = np.isfinite(column.values)
    low, high = percentile_interval(column.resampled, confidence) if known.sum() > 1 else (math.nan, math.nan)
    return ScoreSummary(
        score=column.score,
        name=column.name,
        unit=table.unit_of(column.score),
        mean=column.mean,
        low=low,
        high=high,
        median=float(np.median(column.values[known])) if known.any() else math.nan,
        cases=int(known.sum()),
        undefined=int((column.present & ~known).sum()),
        absent=int((~column.present).sum()),
        worst=[(table.names[i], float(column.values[i])) for i in worst_first(column.values, column.score)[:worst]],
    )


def _columns(table: ScoreTable, n_resamples: int, seed: int) -> Iterator[_Column]:
    scores = {score: table.of(score) for score in table.scores}
    overall = table.values.get("ece")  # Calibration error of the most probable class, and so of no class of its own.
    if overall is not None:
        scores["ece"] = overall[:, None]
    resampled = resampled_means(scores, n_resamples, seed) if scores else {}
    present = table.of("actual") + table.of("predicted") > 0
    any_present: NDArray[np.bool_] = np.any(present, axis=1)
    for score, values in scores.items():
        draws = resampled[score]
        if score == "ece" and overall is not None:
            yield _Column(score, MOST_PROBABLE_CLASS, float(nan_mean(overall, 0)), overall, draws[:, 0], any_present)
            continue
        if len(table.classes) > 1:
            mean = float(nan_mean(nan_mean(values, 0), 0))
            yield _Column(score, MEAN_OF_CLASSES, mean, nan_mean(values, 1), nan_mean(draws, 1), any_present)
        for i, name in enumerate(table.classes):
            yield _Column(score, name, float(nan_mean(values[:, i], 0)), values[:, i], draws[:, i], present[:, i])


def resampled_means(values: Mapping[str, Floats], n_resamples: int, seed: int) -> dict[str, Floats]:
    """Return means over resampled cases, `(n_resamples, columns)`, of tables `(cases, columns)` of the same cases.

    The number of times that each case is drawn is multinomial, so the means are a matrix product. This way missing
    values are left out and all columns share the same resamples, which `scipy.stats.bootstrap` does not support.

    >>> means = resampled_means({"dice": np.array([[0.5], [0.9], [np.nan]])}, 1000, seed=0)["dice"]
    >>> means.shape, float(np.nanmean(means).round(1))
    ((1000, 1), 0.7)
    """
    count = len(next(iter(values.values()), ()))
    random = np.random.default_rng(seed)
    known = {name: np.isfinite(table) for name, table in values.items()}
    filled = {name: np.where(known[name], table, 0.0) for name, table in values.items()}
    parts: dict[str, list[Floats]] = {name: [] for name in values}
    step = max(1, 2**22 // max(1, count))
    for start in range(0, n_resamples, step):
        size = min(step, n_resamples - start)
        times = random.multinomial(count, np.full(count, 1 / count), size=size).astype(float)
        for name in values:
            with np.errstate(invalid="ignore"):
                drawn = times @ known[name].astype(float)
                means = (times @ filled[name]) / drawn
                if (filled[name] < 0).any():
                    means = _without_rounding(means, (times @ np.abs(filled[name])) / drawn)
                parts[name].append(means)
    return {name: np.concatenate(part) for name, part in parts.items()}


def percentile_interval(means: Floats, confidence: float) -> tuple[float, float]:
    """Return the ends of the middle `confidence` of resampled means, ignoring NaN; NaN if there are none.

    >>> percentile_interval(np.arange(101.0), 0.5)
    (25.0, 75.0)
    """
    known = means[np.isfinite(means)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.percentile(known, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)


def worst_first(values: Floats, score: str) -> list[int]:
    """Return the indices of the defined values, worst first.

    >>> worst_first(np.array([0.9, math.nan, 0.5]), "dice")
    [2, 0]
    """
    better = SCORES[score].better
    badness = -values if better == "high" else np.abs(values) if better == "zero" else values
    return [int(index) for index in np.argsort(-badness, kind="stable") if math.isfinite(values[index])]


def nan_mean(values: Floats, axis: int) -> Floats:
    """Return the mean of the defined values along an axis, without a warning where there are none.

    Values that cancel each other have a mean of 0, not of a rounding error.

    >>> nan_mean(np.array([[0.5, math.nan], [math.nan, math.nan]]), 1)
    array([0.5, nan])
    >>> nan_mean(np.array([0.1, 0.2, -0.3]), 0)
    array(0.)
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return _without_rounding(np.nanmean(values, axis), np.nanmean(np.abs(values), axis))


def _without_rounding(means: Floats, sizes: Floats) -> Floats:
    """Return means, with 0 for those that are rounding errors of values of these mean sizes."""
    rounded: Floats = np.where(np.abs(means) <= _ROUNDING * sizes, 0.0, means)
    return rounded
