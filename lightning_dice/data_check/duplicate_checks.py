"""Images that occur more than once: the same pixels, or the same picture after a change that one would overlook."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_dice.data_check.case_statistics import GRIDS, CaseStatistics, Move, describe, moved, moves

# Copies of the images of twelve public data sets (other brightness, contrast and gamma, JPEG of quality 30, halved,
# noise of 8 of 255) have 0.88 or more with their originals, in all but the darkest images 0.95; different images of
# these sets, fundus and chest X-rays among them, at most 0.77. Successive frames of a video from a waiting car have
# 0.99, and are as good as copies; neighbouring sections of electron microscopy at most 0.55.
ALIKE = 0.9
ROUGHLY = 0.7  # on the coarser grid, which finds the candidates

FEWEST_FOR_MEAN = 16  # below, a pair of copies would be much of the mean
MOST_MOVED = 5000  # cases up to which flipped and turned copies are looked for
MOST = 50_000  # cases up to which anything but exact copies is
ROWS = 512  # compared at once


class Duplicate(NamedTuple):
    """Two cases of one picture.

    Attributes:
        first: the one that stands first.
        second: the other.
        likeness: correlation of what brightness and contrast leave; 1 where all pixels are equal.
        exact: whether all pixels are equal.
        move: what lays the second on the first, in words; empty if it lies there.
    """

    first: CaseStatistics
    second: CaseStatistics
    likeness: float
    exact: bool = False
    move: str = ""

    @property
    def across(self) -> bool:
        """Whether they stand in two splits."""
        return self.first.split != self.second.split


def find_duplicates(cases: Sequence[CaseStatistics]) -> list[Duplicate]:
    """All pairs of one picture, most alike first.

    Crops of one large image that overlap are not found, nor are pictures shifted by more than some thousandths.

    Args:
        cases: of one number of space axes. Images of one value are passed over.
    """
    cases = [case for case in cases if case.range[0] < case.range[4]]
    exact: dict[bytes, list[CaseStatistics]] = defaultdict(list)
    for case in cases:
        exact[case.image_digest].append(case)
    found = [Duplicate(group[0], case, 1.0, exact=True) for group in exact.values() for case in group[1:]]
    # Of equal images one is compared with the others.
    single = [group[0] for group in exact.values()]
    if 2 <= len(single) <= MOST and all(case.texture.size for case in single):
        found += _alike(single)
    return sorted(found, key=lambda twin: (not twin.across, -twin.likeness, twin.first.key, twin.second.key))


def groups(twins: Iterable[Duplicate]) -> list[list[CaseStatistics]]:
    """The cases of one picture together, each once: what is like the same is alike.

    >>> a, b, c, d, e = (CaseStatistics("train", name, 0, (1,), (1,)) for name in "abcde")
    >>> found = [Duplicate(a, b, 1), Duplicate(d, e, 1), Duplicate(b, c, 1)]
    >>> [[case.name for case in group] for group in groups(found)]
    [['a', 'b', 'c'], ['d', 'e']]
    """
    group_of: dict[str, list[CaseStatistics]] = {}
    for twin in twins:
        one, other = (group_of.setdefault(case.key, [case]) for case in (twin.first, twin.second))
        if one is not other:
            one += other
            group_of.update((case.key, one) for case in other)
    unique = {id(group): group for group in group_of.values()}
    return list(unique.values())


def _alike(cases: Sequence[CaseStatistics]) -> list[Duplicate]:
    textures = np.stack([case.texture for case in cases])
    # What all images of a set have in common, such as the round border of a fundus, makes no two of them alike.
    common = textures.mean(0, dtype=np.float32) if len(cases) >= FEWEST_FOR_MEAN else np.zeros(textures.shape[1])
    grid = GRIDS[len(cases[0].size)]
    straight = tuple(range(len(grid)))
    possible = [move for move in moves(len(grid)) if len(grid) == 2 or move[0] == straight]
    if len(cases) > MOST_MOVED:
        possible = possible[:1]
    coarse = _coarse(_centred(textures, common), grid)
    best: dict[tuple[int, int], tuple[float, Move]] = {}
    for move in possible:
        turned = coarse if move == possible[0] else _coarse(_centred(_moved(textures, grid, move), common), grid)
        for start in range(0, len(cases), ROWS):
            rows, columns = np.nonzero(coarse[start : start + ROWS] @ turned.T > ROUGHLY)
            rows += start
            upper = rows < columns
            for i, j in zip(rows[upper].tolist(), columns[upper].tolist(), strict=True):
                pair = _centred(np.stack([textures[i], _moved(textures[j : j + 1], grid, move)[0]]), common)
                likeness = float(pair[0] @ pair[1])
                if likeness > max(ALIKE, best.get((i, j), (0.0,))[0]):
                    best[i, j] = likeness, move
    return [
        Duplicate(cases[i], cases[j], likeness, move="" if move == possible[0] else describe(move)[0])
        for (i, j), (likeness, move) in best.items()
    ]


def _moved(textures: NDArray[np.float16], grid: Sequence[int], move: Move) -> NDArray[np.float16]:
    return np.stack([moved(texture.reshape(grid), move).ravel() for texture in textures])


def _centred(textures: NDArray[np.float16], common: NDArray[np.floating]) -> NDArray[np.float32]:
    return _unit(textures.astype(np.float32) - common.astype(np.float32))


def _coarse(textures: NDArray[np.float32], grid: Sequence[int]) -> NDArray[np.float32]:
    """Means over 2 pixels along each axis."""
    shape = [part for length in grid for part in (length // 2, 2)]
    means = textures.reshape(len(textures), *shape).mean(tuple(range(2, 2 * len(grid) + 1, 2)))
    return _unit(means.reshape(len(textures), -1))


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 1e-6, lengths, np.inf), np.float32)
