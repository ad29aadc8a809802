"""Duplicate images: identical pixels, or the same picture after a change that is easily overlooked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_dice.data_check.case_statistics import CaseStatistics
from lightning_dice.data_check.orientations import Orientation, describe_orientation, orientations, reorient
from lightning_dice.data_check.texture import GRIDS

# Copies of images of twelve public data sets (with other brightness, contrast and gamma, JPEG of quality 30, half the
# size, noise of 8 of 255) have a similarity of 0.88 or more with the original, all but the darkest 0.95; different
# images of these sets, fundus and chest X-rays among them, at most 0.77. Successive frames of a video from a waiting
# car have 0.99, and are as good as copies; neighbouring sections of electron microscopy at most 0.55.
MIN_SIMILARITY = 0.9
MIN_COARSE_SIMILARITY = 0.7  # on the coarser grid, which finds the candidates

MIN_FOR_MEAN = 16  # images: with fewer, a pair of copies would dominate the mean
MAX_REORIENTED = 5000  # images, up to which flipped and turned copies are looked for
MAX_COMPARED = 50_000  # images, up to which anything but exact copies is
ROWS = 512  # compared at once


class Duplicate(NamedTuple):
    """Two cases with the same image.

    Attributes:
        first: the earlier one.
        second: the later one.
        similarity: correlation of their textures; 1 if all pixels are equal.
        exact: whether all pixels are equal.
        change: what was done to the second one, in words; empty if its orientation is the same.
    """

    first: CaseStatistics
    second: CaseStatistics
    similarity: float
    exact: bool = False
    change: str = ""

    @property
    def across_splits(self) -> bool:
        """Whether they are in different splits."""
        return self.first.split != self.second.split


def find_duplicates(cases: Sequence[CaseStatistics]) -> list[Duplicate]:
    """Find all pairs of cases with the same image: across splits first, then by similarity.

    Overlapping crops of one large image are not found, nor are images shifted by more than some thousandths.

    Args:
        cases: with the same number of space axes. Constant images are ignored.

    >>> facts = {"range": (0.0, 0.0, 0.5, 1.0, 1.0), "image_digest": b"equal"}
    >>> a, b = (CaseStatistics(split, "x", 0, (64, 64), (64, 64), **facts) for split in ("train", "test"))
    >>> [(pair.first.key, pair.second.key, pair.exact, pair.across_splits) for pair in find_duplicates([a, b])]
    [('train/x', 'test/x', True, True)]
    """
    cases = [case for case in cases if case.range[0] < case.range[4]]
    identical: dict[bytes, list[CaseStatistics]] = defaultdict(list)
    for case in cases:
        identical[case.image_digest].append(case)
    found = [Duplicate(group[0], case, 1.0, exact=True) for group in identical.values() for case in group[1:]]
    # Of identical images, only one is compared with the others.
    unique = [group[0] for group in identical.values()]
    if 2 <= len(unique) <= MAX_COMPARED and all(case.texture.size for case in unique):
        found += _find_similar(unique)
    return sorted(found, key=lambda pair: (not pair.across_splits, -pair.similarity, pair.first.key, pair.second.key))


def group_duplicates(pairs: Iterable[Duplicate]) -> list[list[CaseStatistics]]:
    """Group the cases that are connected by pairs, each case once.

    >>> a, b, c, d, e = (CaseStatistics("train", name, 0, (1,), (1,)) for name in "abcde")
    >>> groups = group_duplicates([Duplicate(a, b, 1), Duplicate(d, e, 1), Duplicate(b, c, 1)])
    >>> [[case.name for case in group] for group in groups]
    [['a', 'b', 'c'], ['d', 'e']]
    """
    group_of: dict[str, list[CaseStatistics]] = {}
    for pair in pairs:
        first, second = (group_of.setdefault(case.key, [case]) for case in (pair.first, pair.second))
        if first is not second:
            first += second
            group_of.update((case.key, first) for case in second)
    unique = {id(group): group for group in group_of.values()}
    return list(unique.values())


def _find_similar(cases: Sequence[CaseStatistics]) -> list[Duplicate]:
    textures = np.stack([case.texture for case in cases])
    # What all images of a set share, such as the round border of a fundus, must not make them similar.
    common = textures.mean(0, dtype=np.float32) if len(cases) >= MIN_FOR_MEAN else np.zeros(textures.shape[1])
    grid = GRIDS[len(cases[0].size)]
    unpermuted = tuple(range(len(grid)))
    candidates = [each for each in orientations(len(grid)) if len(grid) == 2 or each[0] == unpermuted]
    if len(cases) > MAX_REORIENTED:
        candidates = candidates[:1]
    coarse = _coarse(_center(textures, common), grid)
    best: dict[tuple[int, int], tuple[float, Orientation]] = {}
    for orientation in candidates:
        turned = coarse
        if orientation != candidates[0]:
            turned = _coarse(_center(_reorient_all(textures, grid, orientation), common), grid)
        for start in range(0, len(cases), ROWS):
            rows, columns = np.nonzero(coarse[start : start + ROWS] @ turned.T > MIN_COARSE_SIMILARITY)
            rows += start
            upper = rows < columns
            for i, j in zip(rows[upper].tolist(), columns[upper].tolist(), strict=True):
                pair = np.stack([textures[i], _reorient_all(textures[j : j + 1], grid, orientation)[0]])
                first, second = _center(pair, common)
                similarity = float(first @ second)
                if similarity > max(MIN_SIMILARITY, best.get((i, j), (0.0,))[0]):
                    best[i, j] = similarity, orientation
    return [
        Duplicate(
            cases[i],
            cases[j],
            similarity,
            change="" if orientation == candidates[0] else describe_orientation(orientation)[0],
        )
        for (i, j), (similarity, orientation) in best.items()
    ]


def _reorient_all(textures: NDArray[np.float16], grid: Sequence[int], orientation: Orientation) -> NDArray[np.float16]:
    return np.stack([reorient(texture.reshape(grid), orientation).ravel() for texture in textures])


def _center(textures: NDArray[np.float16], common: NDArray[np.floating]) -> NDArray[np.float32]:
    return _normalize(textures.astype(np.float32) - common.astype(np.float32))


def _coarse(textures: NDArray[np.float32], grid: Sequence[int]) -> NDArray[np.float32]:
    """Average over 2 pixels along each axis."""
    shape = [part for length in grid for part in (length // 2, 2)]
    means = textures.reshape(len(textures), *shape).mean(tuple(range(2, 2 * len(grid) + 1, 2)))
    return _normalize(means.reshape(len(textures), -1))


def _normalize(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 1e-6, lengths, np.inf), np.float32)
