"""Lesion-wise precision, recall and F1."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class LesionScores(NamedTuple):
    """Lesions counted one by one, regardless of their size.

    Attributes:
        actual: number of lesions in the mask.
        predicted: number of lesions in the prediction.
        precision: fraction of predicted lesions that match; NaN if there are none.
        recall: fraction of actual lesions that are matched; NaN if there are none.
        f1: harmonic mean of the two; 0 if nothing matches, NaN if neither mask has a lesion.
    """

    actual: int
    predicted: int
    precision: float
    recall: float
    f1: float


def lesion_scores(
    predicted: NDArray[np.bool_], actual: NDArray[np.bool_], iou: float = 0.0, connectivity: int | None = None
) -> LesionScores:
    r"""Compute lesion-wise precision, recall and F1.

    A lesion is a connected component. With `iou=0` two lesions match if they share a pixel: a predicted lesion that
    covers two actual ones finds both, and two pieces within one actual lesion are both correct. With `iou` above 0 they
    match if their intersection over union exceeds it, each lesion with at most one other; of all ways to pair them the
    one with the most pairs counts (above 0.5 there is only one).

    Args:
        predicted: `(*space)`, bool.
        actual: the true mask, in the same shape.
        iou: in [0, 1).
        connectivity: along how many axes at once two neighbours may differ, as in `component_regions`; by default the
            number of axes, so that pixels that touch at a corner belong to one lesion.

    >>> lesion_scores(np.array([1, 0, 0, 1]) == 1, np.array([1, 0, 1, 0]) == 1)
    LesionScores(actual=2, predicted=2, precision=0.5, recall=0.5, f1=0.5)
    """
    from scipy import ndimage

    structure = ndimage.generate_binary_structure(actual.ndim, connectivity or actual.ndim)
    predicted_ids, predicted_lesions = ndimage.label(predicted, structure)
    actual_ids, actual_lesions = ndimage.label(actual, structure)
    both = predicted & actual
    # One entry for each pair of lesions that overlap: a table of all pairs would not fit for thousands of them.
    codes = predicted_ids[both].astype(np.int64) * (actual_lesions + 1) + actual_ids[both]
    pairs, shared = np.unique(codes, return_counts=True)
    first, second = np.divmod(pairs, actual_lesions + 1)
    if iou == 0:
        correct, found = len(np.unique(first)), len(np.unique(second))
    else:
        predicted_sizes, actual_sizes = np.bincount(predicted_ids.ravel()), np.bincount(actual_ids.ravel())
        union = predicted_sizes[first] + actual_sizes[second] - shared
        matching = shared / union > iou
        correct = found = _count_matches(first[matching], second[matching])
    precision = correct / predicted_lesions if predicted_lesions else math.nan
    recall = found / actual_lesions if actual_lesions else math.nan
    if not (predicted_lesions or actual_lesions):
        f1 = math.nan
    elif not correct:
        f1 = 0.0
    else:
        f1 = 2 * precision * recall / (precision + recall)
    return LesionScores(actual_lesions, predicted_lesions, precision, recall, f1)


def _count_matches(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """Return the size of a maximum matching: the most pairs such that no lesion occurs twice."""
    if not len(first):
        return 0
    from scipy import sparse
    from scipy.sparse.csgraph import maximum_bipartite_matching

    graph = sparse.csr_matrix((np.ones(len(first), dtype=bool), (first, second)))
    return int((maximum_bipartite_matching(graph) >= 0).sum())
