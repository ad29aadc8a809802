"""Whether one prediction is better than another: differences case by case."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from lightning_dice.scoring.summary import ALL, CONFIDENCE, RESAMPLES, interval, resampled_means
from lightning_dice.scoring.table import SCORES, Cases, Floats


class Difference(NamedTuple):
    """B less A of one score of one class, over the cases in which both have it.

    Attributes:
        name: of the class, or `ALL`: of each case's mean over the classes that both have a score of.
        cases: in which both have the score.
        only_a: cases in which A alone has it: B and the mask have nothing there, A has.
        only_b: the same for B.
        mean_a: over the cases in which both have it, as all that follows.
        mean_b: the same.
        mean: of the differences.
        low: the lower end of its interval; NaN with fewer than two cases.
        high: its upper end.
        wins: cases in which B is better.
        losses: cases in which A is better.
        ties: cases in which they are equal.
        wilcoxon: p of the signed-rank test; of no difference, and of no case, 1.
        permutation: p of the sign-flip permutation test of the mean.
        wilcoxon_holm: adjusted for all classes and pairs compared together (Holm, 1979).
        permutation_holm: the same.
        differences: of the cases, in the order of the table; NaN where one has no score.
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


def check_same(a: Cases, b: Cases, names: tuple[str, str]) -> None:
    """See that two tables are of the same cases with the same masks.

    Args:
        a: one table.
        b: the other.
        names: of the tables, for the message.

    Raises:
        ValueError: other cases, other classes, or masks of other sizes; names some of them.
    """
    for one, other, name in ((a, b, names[1]), (b, a, names[0])):
        lacking = sorted(set(one.names) - set(other.names))
        if lacking:
            raise ValueError(
                f"{name} lacks {len(lacking)} of the {a.split} cases, such as {', '.join(lacking[:5])}: a paired "
                "comparison needs the same cases; cases=common compares those that both have"
            )
    if a.classes != b.classes:
        raise ValueError(f"{names[0]} scores the classes {', '.join(a.classes)}; {names[1]}, {', '.join(b.classes)}")
    for column in (key for key in a.values if key.startswith("actual/")):
        differing = np.flatnonzero(a.values[column] != b.values.get(column, math.nan))
        if len(differing):
            case = differing[0]
            raise ValueError(
                f"the masks are not the same: of {len(differing)} cases, such as {a.names[case]}, {column} is "
                f"{a.values[column][case]:.0f} pixels in {names[0]} and "
                f"{b.values.get(column, a.values[column] * math.nan)[case]:.0f} in {names[1]}"
            )


def common(a: Cases, b: Cases) -> tuple[Cases, Cases]:
    """Both tables without the cases that the other one lacks.

    Raises:
        ValueError: they have none in common.
    """
    both = sorted(set(a.names) & set(b.names))
    if not both:
        raise ValueError(f"the tables have no {a.split} case in common")
    return tuple(_only(table, both) for table in (a, b))  # type: ignore[return-value]


def compare_tables(
    a: Cases,
    b: Cases,
    score: str = "dice",
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> list[Difference]:
    """Compare two tables of the same cases, class by class, and by each case's mean over the classes.

    A case counts where both have a score. Where a class is neither in a mask nor predicted it has no Dice; where one
    prediction is right to be empty and the other is not, only the latter has one (0), and there is no difference to
    take: such cases are counted apart, in `only_a` and `only_b`, and speak for the one without a score.

    Args:
        a: the first, or the baseline.
        b: the second; differences are b less a.
        score: a key of `SCORES`.
        resamples: of the bootstrap and the permutation test, which is exact where all sign flips are fewer.
        confidence: of the percentile bootstrap interval over cases.
        seed: of both.

    Returns:
        A line for each class, the mean of classes first; p-values not adjusted yet, see `adjusted`.
    """
    first, second = a.of(score), b.of(score)
    several = [None] if len(a.classes) > 1 else []
    lines = []
    for place in (*several, *range(len(a.classes))):
        if place is None:
            both = np.isfinite(first) & np.isfinite(second)
            one, other = _row_means(np.where(both, first, math.nan)), _row_means(np.where(both, second, math.nan))
        else:
            one, other = first[:, place], second[:, place]
        name = ALL if place is None else a.classes[place]
        lines.append(_line(name, one, other, score, resamples, confidence, seed))
    return lines


def _line(
    name: str, one: Floats, other: Floats, score: str, resamples: int, confidence: float, seed: int
) -> Difference:
    # A table's numbers have six digits. What is beyond nine is rounding, and would break ties.
    differences = (other - one).round(9)
    known = differences[np.isfinite(differences)]
    there = [np.isfinite(one), np.isfinite(other)]
    both = there[0] & there[1]
    if len(known) > 1:
        low, high = interval(resampled_means({"d": known[:, None]}, resamples, seed)["d"][:, 0], confidence)
    else:
        low = high = math.nan
    better = SCORES[score].better
    gains = known if better == "high" else -known if better == "low" else np.abs(one[both]) - np.abs(other[both])
    wilcoxon, permutation = _tests(known, resamples, seed)
    return Difference(
        name,
        len(known),
        int((there[0] & ~there[1]).sum()),
        int((there[1] & ~there[0]).sum()),
        float(one[both].mean()) if len(known) else math.nan,
        float(other[both].mean()) if len(known) else math.nan,
        float(known.mean()) if len(known) else math.nan,
        low,
        high,
        int((gains > 0).sum()),
        int((gains < 0).sum()),
        int((gains == 0).sum()),
        wilcoxon,
        permutation,
        math.nan,
        math.nan,
        differences,
    )


def _tests(differences: Floats, resamples: int, seed: int) -> tuple[float, float]:
    """Two-sided p-values of the signed-rank and of the sign-flip test."""
    from scipy import stats

    if len(differences) < 2 or not differences.any():
        return 1.0, 1.0  # Both tests are of signs: of none, or of one, which may as well be the other.
    # Pratt's way: cases without a difference are evidence for none, and have their ranks.
    method = "exact" if len(differences) <= 50 and _untied(differences) else "approx"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sample size too small")  # Of older SciPy, for less than 10 cases.
        signed = stats.wilcoxon(differences, zero_method="wilcox" if method == "exact" else "pratt", method=method)
    flipped = stats.permutation_test(
        (differences,),
        lambda sample, axis: sample.mean(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        random_state=np.random.default_rng(seed),
        batch=max(1, 2**22 // len(differences)),
    )
    return float(signed.pvalue), float(flipped.pvalue)


def _untied(differences: Floats) -> bool:
    return bool((differences != 0).all()) and len(np.unique(np.abs(differences))) == len(differences)


def adjusted(lines: Sequence[Difference]) -> list[Difference]:
    """The lines of all comparisons made together, their p-values adjusted by Holm's step-down method.

    The mean of classes is a summary of the others and is not counted among them; it keeps its own p-value unless there
    are several pairs of runs.
    """
    result = list(lines)
    for whole in (True, False):
        group = [place for place, line in enumerate(lines) if (line.name == ALL) == whole]
        signed, flipped = (
            holm([test(lines[place]) for place in group])
            for test in (attrgetter("wilcoxon"), attrgetter("permutation"))
        )
        for place, one, other in zip(group, signed, flipped, strict=True):
            result[place] = result[place]._replace(wilcoxon_holm=one, permutation_holm=other)
    return result


def holm(values: Sequence[float]) -> list[float]:
    """P-values adjusted such that the chance of any false discovery among them stays below the level (Holm, 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(values)), key=lambda place: values[place])
    result = [math.nan] * len(values)
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        result[place] = highest
    return result


def _only(table: Cases, names: Sequence[str]) -> Cases:
    places = [table.names.index(name) for name in names]
    values = {key: column[places] for key, column in table.values.items()}
    return Cases(table.split, list(names), table.classes, values, table.unit, table.axes)


def _row_means(values: Floats) -> Floats:
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        means: Floats = np.where(known, values, 0.0).sum(1) / known.sum(1)
    return means
