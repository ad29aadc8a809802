"""Paired comparison of two tables of cases: differences case by case, with tests."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from lightning_dice.scoring.summary import (
    CONFIDENCE,
    MEAN_OF_CLASSES,
    N_RESAMPLES,
    nan_mean,
    percentile_interval,
    resampled_means,
)
from lightning_dice.scoring.table import SCORES, Floats, ScoreTable


class Difference(NamedTuple):
    """B minus A: one score of one class, over the cases in which both have it.

    Attributes:
        name: the class, or `MEAN_OF_CLASSES`: each case's mean over the classes for which both have a score.
        cases: number of cases in which both have the score; all means, wins and tests are over these.
        only_a: number of cases in which only A has it: neither B nor the mask has the class, but A does.
        only_b: the same for B.
        mean_a: mean of A.
        mean_b: mean of B.
        mean: mean difference.
        low: lower end of its interval; NaN with fewer than two cases.
        high: upper end of its interval.
        wins: number of cases in which B is better.
        losses: number of cases in which A is better.
        ties: number of cases in which they are equal.
        wilcoxon: p-value of the signed-rank test; 1 if there are no differences.
        permutation: p-value of the sign-flip permutation test of the mean.
        wilcoxon_holm: adjusted for all classes and pairs compared together (Holm, 1979).
        permutation_holm: likewise.
        differences: each case's difference, in the order of the table; NaN where a score is undefined.
    """

    name: str
    cases: int
    only_a: int
    only_b: int
    mean_a: float
    mean_b: float
    mean: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int
    wilcoxon: float
    permutation: float
    wilcoxon_holm: float
    permutation_holm: float
    differences: Floats


def check_same_cases(a: ScoreTable, b: ScoreTable, names: tuple[str, str]) -> None:
    """Check that two tables have the same cases and the same masks.

    Args:
        a: one table.
        b: the other.
        names: the tables' names, for the message.

    Raises:
        ValueError: the cases, the classes or the masks' sizes differ; names some of them.

    >>> a = ScoreTable("test", ["x", "y"], ["cell"], {"actual/cell": np.array([9.0, 5.0])}, "mm")
    >>> check_same_cases(a, replace(a, values={"actual/cell": np.array([9.0, 6.0])}), ("old", "new"))
    Traceback (most recent call last):
    ValueError: the masks differ in 1 case: actual/cell of y is 5 pixels in old and 6 in new
    """
    for one, other, name in ((a, b, names[1]), (b, a, names[0])):
        missing = sorted(set(one.names) - set(other.names))
        if missing:
            raise ValueError(
                f"{name} lacks {len(missing)} of the {a.split} cases, such as {', '.join(missing[:5])}: a paired "
                "comparison needs the same cases; cases=common compares those that both have"
            )
    if a.classes != b.classes:
        raise ValueError(f"{names[0]} scores the classes {', '.join(a.classes)}; {names[1]}, {', '.join(b.classes)}")
    for column in (key for key in a.values if key.startswith("actual/")):
        other_values = b.values.get(column, np.full(len(b.names), math.nan))
        differing = np.flatnonzero(a.values[column] != other_values)
        if len(differing):
            case, count = differing[0], len(differing)
            raise ValueError(
                f"the masks differ in {count} case{'s' * (count > 1)}: {column} of {a.names[case]} is "
                f"{a.values[column][case]:.0f} pixels in {names[0]} and {other_values[case]:.0f} in {names[1]}"
            )


def common_cases(a: ScoreTable, b: ScoreTable) -> tuple[ScoreTable, ScoreTable]:
    """Return both tables with only the cases that both have.

    Raises:
        ValueError: they have none in common.

    >>> a = ScoreTable("test", ["x", "y"], ["cell"], {"dice/cell": np.array([0.5, 0.75])}, "mm")
    >>> first, _ = common_cases(a, replace(a, names=["y", "z"]))
    >>> first.names, first.of("dice").tolist()
    (['y'], [[0.75]])
    """
    both = sorted(set(a.names) & set(b.names))
    if not both:
        raise ValueError(f"the tables have no {a.split} case in common")
    return _select_cases(a, both), _select_cases(b, both)


def _select_cases(table: ScoreTable, names: Sequence[str]) -> ScoreTable:
    indices = [table.names.index(name) for name in names]
    return replace(table, names=list(names), values={key: column[indices] for key, column in table.values.items()})


def compare_tables(
    a: ScoreTable,
    b: ScoreTable,
    score: str = "dice",
    *,
    n_resamples: int = N_RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> list[Difference]:
    """Compare two tables of the same cases, class by class, and by each case's mean over the classes.

    Only cases in which both have a score are compared. A class that is neither in the mask nor predicted has no Dice.
    If one prediction is correctly empty and the other is not, only the latter has a score (0) and there is no
    difference: such cases are counted in `only_a` and `only_b`, and favour the run without a score.

    Args:
        a: the first table, or the baseline.
        b: the second table; differences are B minus A.
        score: a key of `SCORES`.
        n_resamples: for the bootstrap and the permutation test; the latter is exact if there are fewer sign flips.
        confidence: confidence level of the percentile bootstrap interval over cases.
        seed: for both.

    Returns:
        One difference for each class; with several classes their mean first. The p-values are not adjusted yet, see
        `adjust_p_values`.

    >>> a = ScoreTable("test", ["x", "y"], ["cell"], {"dice/cell": np.array([0.5, 0.75])}, "mm")
    >>> (cell,) = compare_tables(a, replace(a, values={"dice/cell": np.array([0.75, 0.75])}))
    >>> cell.mean, cell.wins, cell.ties, cell.losses
    (0.125, 1, 1, 0)
    """
    first, second = a.of(score), b.of(score)
    pairs = [(name, first[:, i], second[:, i]) for i, name in enumerate(a.classes)]
    if len(a.classes) > 1:
        both = np.isfinite(first) & np.isfinite(second)
        mean_first, mean_second = (nan_mean(np.where(both, values, math.nan), 1) for values in (first, second))
        pairs.insert(0, (MEAN_OF_CLASSES, mean_first, mean_second))
    return [_difference(*pair, score, n_resamples, confidence, seed) for pair in pairs]


def _difference(
    name: str, first: Floats, second: Floats, score: str, n_resamples: int, confidence: float, seed: int
) -> Difference:
    # The numbers of a table have six digits. Digits after the ninth are rounding errors, and would break ties.
    differences = (second - first).round(9)
    known = differences[np.isfinite(differences)]
    has_first, has_second = np.isfinite(first), np.isfinite(second)
    both = has_first & has_second
    if len(known) > 1:
        resampled = resampled_means({"difference": known[:, None]}, n_resamples, seed)["difference"]
        low, high = percentile_interval(resampled[:, 0], confidence)
    else:
        low = high = math.nan
    better = SCORES[score].better
    gains = known if better == "high" else -known if better == "low" else np.abs(first[both]) - np.abs(second[both])
    wilcoxon, permutation = _p_values(known, n_resamples, seed)
    return Difference(
        name=name,
        cases=len(known),
        only_a=int((has_first & ~has_second).sum()),
        only_b=int((has_second & ~has_first).sum()),
        mean_a=float(first[both].mean()) if len(known) else math.nan,
        mean_b=float(second[both].mean()) if len(known) else math.nan,
        mean=float(nan_mean(known, 0)),
        low=low,
        high=high,
        wins=int((gains > 0).sum()),
        losses=int((gains < 0).sum()),
        ties=int((gains == 0).sum()),
        wilcoxon=wilcoxon,
        permutation=permutation,
        wilcoxon_holm=math.nan,
        permutation_holm=math.nan,
        differences=differences,
    )


def _p_values(differences: Floats, n_resamples: int, seed: int) -> tuple[float, float]:
    """Return the two-sided p-values of the signed-rank test and of the sign-flip test."""
    from scipy import stats

    # Both tests flip signs: without differences nothing changes, and a single case is as likely with either sign.
    if len(differences) < 2 or not differences.any():
        return 1.0, 1.0
    # Pratt's method: cases without a difference are evidence for no effect, and keep their ranks.
    method = "exact" if len(differences) <= 50 and _has_no_ties(differences) else "approx"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sample size too small")  # Older SciPy, with fewer than 10 cases.
        signed = stats.wilcoxon(differences, zero_method="wilcox" if method == "exact" else "pratt", method=method)
    flipped = stats.permutation_test(
        (differences,),
        lambda sample, axis: sample.mean(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=n_resamples,
        random_state=np.random.default_rng(seed),
        batch=max(1, 2**22 // len(differences)),
    )
    return float(signed.pvalue), float(flipped.pvalue)


def _has_no_ties(differences: Floats) -> bool:
    return bool((differences != 0).all()) and len(np.unique(np.abs(differences))) == len(differences)


def adjust_p_values(differences: Sequence[Difference]) -> list[Difference]:
    """Adjust the p-values of all comparisons made together by Holm's step-down method.

    The mean of classes summarizes the others and is not counted among them; its p-value is adjusted only for the number
    of pairs of runs.

    Args:
        differences: those of all pairs of tables and all classes.

    >>> a = ScoreTable("test", ["x", "y", "z"], ["cell"], {"dice/cell": np.array([0.5, 0.6, 0.7])}, "mm")
    >>> pairs = [compare_tables(a, replace(a, values={"dice/cell": a.values["dice/cell"] + 0.1}))[0] for _ in range(2)]
    >>> pairs[0].permutation, adjust_p_values(pairs)[0].permutation_holm
    (0.25, 0.5)
    """
    result = list(differences)
    for is_mean in (True, False):
        group = [i for i, difference in enumerate(differences) if (difference.name == MEAN_OF_CLASSES) == is_mean]
        wilcoxon, permutation = (
            holm([p_value(differences[i]) for i in group])
            for p_value in (attrgetter("wilcoxon"), attrgetter("permutation"))
        )
        for i, signed, flipped in zip(group, wilcoxon, permutation, strict=True):
            result[i] = result[i]._replace(wilcoxon_holm=signed, permutation_holm=flipped)
    return result


def holm(values: Sequence[float]) -> list[float]:
    """Adjust p-values such that the chance of any false discovery among them stays below the level (Holm, 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    result = [math.nan] * len(values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        result[index] = highest
    return result
