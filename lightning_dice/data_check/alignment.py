"""Masks that do not fit their images: turned or flipped ones, and ones that belong to another image.

Both show in the margin by which the outline of a mask fits its image better than all other orientations of the image.
In twelve public data sets with 1700 cases, no case prefers another orientation by more than 0.023 of the gradient's
mean rank; half of the cases of each set prefer their own by 0.08 to 0.4, and at most one in a hundred prefers another
at all. Of masks paired with another image, 40 to 90 % do, except in stacks of neighbouring sections, where those masks
fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_dice.data.batch import Sample
from lightning_dice.data_check.case_statistics import CaseStatistics
from lightning_dice.data_check.orientations import Orientation, edges_and_outline, orientations
from lightning_dice.data_check.task import Task

# Alignment is a mean rank of the gradient, in [0, 1].
CHANCE = 0.5  # alignment of a mask that has nothing to do with the image
CLEAR_MARGIN = 0.05  # by which a single mask must prefer another orientation, or image
MEAN_MARGIN = 0.03  # by which many masks must prefer one on average, and by three standard errors
GOOD_FIT = 0.8  # of what other masks have above chance
POOR_FIT = 0.5  # of the same
DOUBTFUL_MARGIN = 0.03  # below which a case is compared with others
MIN_CASES = 8  # for statistics over cases
MAX_COMPARED = 64  # cases
MISALIGNED_SHARE = 0.25  # of all masks, from which on the whole data set is in doubt


class TurnedMasks(NamedTuple):
    """Masks that fit their images in one other orientation.

    Attributes:
        orientation: the orientation in which they fit.
        cases: the masks' cases.
        as_group: whether it is a tendency of all cases together, rather than of each one.
    """

    orientation: Orientation
    cases: list[CaseStatistics]
    as_group: bool


class Mismatch(NamedTuple):
    """A mask that fits the image of another case better than its own.

    Attributes:
        mask: the case of the mask.
        image: the case whose image it fits.
        own: alignment with its own image.
        other: alignment with the other image.
    """

    mask: CaseStatistics
    image: CaseStatistics
    own: float
    other: float


def find_turned_masks(cases: Sequence[CaseStatistics]) -> list[TurnedMasks]:
    """Find masks that fit their images clearly better when turned, flipped or transposed.

    First all cases together, then each split; if neither has a common orientation, each case on its own.
    """
    informative = [case for case in cases if case.has_alignment]
    splits = [[case for case in informative if case.split == split] for split in ("train", "val", "test")]
    for groups in ([informative], splits):
        common = [(_common_orientation(group), group) for group in groups]
        found = [TurnedMasks(orientation, group, True) for orientation, group in common if orientation is not None]
        if found:
            return found
    if not informative or misaligned_share(cases) >= MISALIGNED_SHARE:
        return []
    # A mask of another image may slightly prefer any orientation, but fits in none.
    own = [float(case.alignment[0]) for case in informative]
    usual = min(float(np.percentile(own, 10)), CHANCE + GOOD_FIT * (float(np.median(own)) - CHANCE))
    turned: dict[Orientation, list[CaseStatistics]] = {}
    for case in informative:
        best = int(np.nanargmax(case.alignment))
        if case.alignment[best] - case.alignment[0] > CLEAR_MARGIN and case.alignment[best] >= usual:
            turned.setdefault(orientations(len(case.mask_size))[best], []).append(case)
    return [TurnedMasks(orientation, group, False) for orientation, group in turned.items()]


def _common_orientation(cases: Sequence[CaseStatistics]) -> Orientation | None:
    """Return the orientation in which the masks of all cases fit clearly better than in any other."""
    by_axes: dict[int, list[NDArray[np.float32]]] = {}
    for case in cases:
        by_axes.setdefault(len(case.mask_size), []).append(case.alignment)
    for axes, rows in by_axes.items():
        table = np.stack(rows)
        for index, orientation in enumerate(orientations(axes)):
            possible = table[~np.isnan(table[:, index])]
            if index == 0 or len(possible) < MIN_CASES:
                continue
            better = possible[:, index] - np.nanmax(np.delete(possible, index, axis=1), axis=1)
            if better.mean() > max(MEAN_MARGIN, 3 * better.std(ddof=1) / len(better) ** 0.5):
                return orientation
    return None


def orientation_margin(case: CaseStatistics) -> float:
    """Return how much better a mask fits its image unchanged than in any other orientation; NaN if unknown.

    >>> case = CaseStatistics("train", "a", 0, (64,), (64,), alignment=np.array([0.75, 0.5], np.float32))
    >>> orientation_margin(case)
    0.25
    """
    others = case.alignment[1:]
    if not case.has_alignment or np.isnan(others).all():
        return float("nan")
    return float(case.alignment[0] - np.nanmax(others))


def misaligned_share(cases: Sequence[CaseStatistics]) -> float:
    """Return the fraction of masks that fit better in another orientation; NaN for fewer than 8 informative cases.

    >>> case = CaseStatistics("train", "a", 0, (64,), (64,), alignment=np.array([0.5, 0.75], np.float32))
    >>> misaligned_share([case] * 8), misaligned_share([case])
    (1.0, nan)
    """
    margins = [margin for case in cases if not np.isnan(margin := orientation_margin(case))]
    return float(np.mean([margin < 0 for margin in margins])) if len(margins) >= MIN_CASES else float("nan")


def find_poor_fits(cases: Sequence[CaseStatistics]) -> list[CaseStatistics]:
    """Find masks whose outlines fit the edges of their images much less than usual, the worst first."""
    known = [case for case in cases if case.has_alignment]
    if len(known) < MIN_CASES or misaligned_share(cases) >= MISALIGNED_SHARE:
        return []
    median = float(np.median([case.alignment[0] for case in known]))
    least = CHANCE + POOR_FIT * (median - CHANCE)
    return sorted((case for case in known if case.alignment[0] < least), key=lambda case: float(case.alignment[0]))


def find_mismatches(
    cases: Sequence[CaseStatistics], task: Task, read: Callable[[CaseStatistics], Sample | None]
) -> list[Mismatch]:
    """Find masks that fit the image of another case clearly better than their own.

    Only cases that hardly prefer their own mask are compared with each other, at most 64 of them; and the mask of that
    other case must also fit elsewhere.

    Args:
        cases: all of them.
        task: meaning of the masks.
        read: reads the image and mask of a case again; returns `None` if it cannot be read.
    """
    doubtful = [case for case in cases if orientation_margin(case) < DOUBTFUL_MARGIN]
    if len(doubtful) < 2:
        return []
    ranks: list[NDArray[np.float32]] = []
    outlines: list[NDArray[np.bool_]] = []
    compared: list[CaseStatistics] = []
    # If there are too many, consecutive ones: files that are paired off by one have their partner beside them.
    for case in doubtful[:MAX_COMPARED]:
        sample = read(case)
        found = None if sample is None else edges_and_outline(sample.image.float().nan_to_num(), sample.mask, task)
        if found is not None:
            compared.append(case)
            ranks.append(found[0])
            outlines.append(found[1])
    mismatches = []
    for j, case in enumerate(compared):
        fits = [
            float(ranks[i][outlines[j]].mean()) if compared[i].mask_size == case.mask_size else 0.0
            for i in range(len(compared))
        ]
        i = int(np.argmax(fits))
        if i != j and fits[i] - float(np.nanmax(case.alignment)) > CLEAR_MARGIN:
            mismatches.append(Mismatch(case, compared[i], fits[j], fits[i]))
    return _plausible(mismatches)


def _plausible(mismatches: Sequence[Mismatch]) -> list[Mismatch]:
    # An image has one mask: of several that fit, keep the best.
    best: dict[str, Mismatch] = {}
    for mismatch in mismatches:
        rival = best.get(mismatch.image.key)
        if rival is None or mismatch.other > rival.other:
            best[mismatch.image.key] = mismatch
    # Among similar images a mask may fit a neighbour's image by chance; the neighbour's own mask then still fits there.
    misplaced = {mismatch.mask.key for mismatch in best.values()}
    return [each for each in mismatches if best[each.image.key] is each and each.image.key in misplaced]
