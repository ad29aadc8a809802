"""Whether masks lie on their images: turned or flipped ones, and ones that belong to another image.

By how much the outline of a mask prefers its image as it is to all other orientations of the image tells both. On
twelve public data sets, of 1700 cases not one prefers another orientation by more than 0.023 of the mean rank of the
gradient; half of the cases of each prefer their own by 0.08 to 0.4, and at most one in a hundred another one at all.
Given the mask of another image, 40 to 90 % do, but in stacks of neighbouring sections, where that mask fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_dice.data.batch import Sample
from lightning_dice.data_check.case_statistics import CaseStatistics, Move, Task, moves, placed

CLEARLY = 0.05  # of the mean rank: a single mask's preference for another orientation, or image
ON_AVERAGE = 0.03  # the mean preference of many, beyond three standard errors
CHANCE = 0.5  # the mean rank of places that have nothing to do with the image
MOST_OF = 0.8  # of what the others have beyond chance: from there on a mask fits
HALF_OF = 0.5  # of the same: below, a mask fits strikingly ill
FEWEST = 8  # cases that say something together
DOUBTFUL = 0.03  # less preference for its own place makes a case worth comparing with others
MOST_COMPARED = 64
ASTRAY = 0.25  # of all masks


class Turned(NamedTuple):
    """Masks that fit after the same move.

    Attributes:
        move: which.
        cases: of them.
        together: whether it is the tendency of all cases, and not of each alone.
    """

    move: Move
    cases: list[CaseStatistics]
    together: bool


class Mismatch(NamedTuple):
    """A mask that fits the image of another case better than its own.

    Attributes:
        mask: the case whose mask it is.
        image: the case whose image it fits.
        own: the mean rank of the gradient of its own image under its outline.
        other: of the other image.
    """

    mask: CaseStatistics
    image: CaseStatistics
    own: float
    other: float


def find_turned(cases: Sequence[CaseStatistics]) -> list[Turned]:
    """Masks that lie clearly better on their images after they are turned, flipped or transposed.

    First all cases together, then each split; where neither shows a common move, each case alone.
    """
    informative = [case for case in cases if case.placement.size and not np.isnan(case.placement[0])]
    for part in ([informative], [[c for c in informative if c.split == split] for split in ("train", "val", "test")]):
        found = [Turned(move, group, True) for group in part if (move := _common_move(group)) is not None]
        if found:
            return found
    if not informative or astray(cases) >= ASTRAY:
        return []
    # A mask of another image may prefer any orientation a little, and fits in none.
    own = [float(case.placement[0]) for case in informative]
    usual = min(float(np.percentile(own, 10)), CHANCE + MOST_OF * (float(np.median(own)) - CHANCE))
    single: dict[Move, list[CaseStatistics]] = {}
    for case in informative:
        best = int(np.nanargmax(case.placement))
        if case.placement[best] - case.placement[0] > CLEARLY and case.placement[best] >= usual:
            single.setdefault(moves(len(case.mask_size))[best], []).append(case)
    return [Turned(move, group, False) for move, group in single.items()]


def preference(case: CaseStatistics) -> float:
    """How much better a mask lies on its image than on the image's other orientations; NaN where nothing tells."""
    others = case.placement[1:]
    if not case.placement.size or np.isnan(case.placement[0]) or np.isnan(others).all():
        return float("nan")
    return float(case.placement[0] - np.nanmax(others))


def astray(cases: Sequence[CaseStatistics]) -> float:
    """The share of masks that do not prefer their own place; NaN for fewer than 8 that tell anything."""
    known = [value for case in cases if not np.isnan(value := preference(case))]
    return float(np.mean([value < 0 for value in known])) if len(known) >= FEWEST else float("nan")


def find_loose(cases: Sequence[CaseStatistics]) -> list[CaseStatistics]:
    """Masks whose outlines lie on the edges of their images much less than usual, the loosest first."""
    known = [case for case in cases if case.placement.size and not np.isnan(case.placement[0])]
    if len(known) < FEWEST or astray(cases) >= ASTRAY:
        return []
    middle = float(np.median([case.placement[0] for case in known]))
    least = CHANCE + HALF_OF * (middle - CHANCE)
    return sorted((case for case in known if case.placement[0] < least), key=lambda case: float(case.placement[0]))


def find_mismatches(
    cases: Sequence[CaseStatistics], task: Task, read: Callable[[CaseStatistics], Sample | None]
) -> list[Mismatch]:
    """Masks that fit the image of another case clearly better than their own.

    Only cases that hardly prefer their own mask are compared, with each other, and at most 64 of them; and the mask of
    that other case must fit elsewhere, too.

    Args:
        cases: all.
        task: what the masks mean.
        read: a case's image and mask once more; `None` if it cannot be read.
    """
    doubtful = [case for case in cases if preference(case) < DOUBTFUL]
    if len(doubtful) < 2:
        return []
    # Of many, a stretch: files that are paired one place off have their partner beside them.
    ranks: list[NDArray[np.float32]] = []
    outlines: list[NDArray[np.bool_]] = []
    compared: list[CaseStatistics] = []
    for case in doubtful[:MOST_COMPARED]:
        sample = read(case)
        found = None if sample is None else placed(sample.image.float().nan_to_num(), sample.mask, task)
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
        if i != j and fits[i] - float(np.nanmax(case.placement)) > CLEARLY:
            mismatches.append(Mismatch(case, compared[i], fits[j], fits[i]))
    # One image belongs to one mask: of several that fit, the best.
    best: dict[str, Mismatch] = {}
    for mismatch in mismatches:
        rival = best.get(mismatch.image.key)
        if rival is None or mismatch.other > rival.other:
            best[mismatch.image.key] = mismatch
    # Where images are much alike, a mask may fit a neighbour's by chance; that one's own is then not elsewhere.
    astray_too = {mismatch.mask.key for mismatch in best.values()}
    return [one for one in mismatches if best[one.image.key] is one and one.image.key in astray_too]


def _common_move(cases: Sequence[CaseStatistics]) -> Move | None:
    """The move after which the masks lie clearly better than after all others."""
    by_axes: dict[int, list[NDArray[np.float32]]] = {}
    for case in cases:
        by_axes.setdefault(len(case.mask_size), []).append(case.placement)
    for axes, rows in by_axes.items():
        scores = np.stack(rows)
        for index, move in enumerate(moves(axes)):
            possible = scores[~np.isnan(scores[:, index])]
            if index == 0 or len(possible) < FEWEST:
                continue
            better = possible[:, index] - np.nanmax(np.delete(possible, index, axis=1), axis=1)
            if better.mean() > max(ON_AVERAGE, 3 * better.std(ddof=1) / len(better) ** 0.5):
                return move
    return None
