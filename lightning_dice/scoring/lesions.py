"""Which lesions of a mask a prediction finds."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class LesionScores(NamedTuple):
    """Lesions counted one by one, whatever their size.

    Attributes:
        actual: lesions of the mask.
        predicted: lesions of the prediction.
        precision: predicted lesions that match, of the predicted ones; NaN if there are none.
        recall: actual lesions that are matched, of the actual ones; NaN if there are none.
        f1: their harmonic mean; 0 if nothing matches, NaN if neither mask has a lesion.
    """

    actual: int
    predicted: int
    precision: float
    recall: float
    f1: float


def lesion_scores(
    predicted: NDArray[np.bool_], actual: NDArray[np.bool_], iou: float = 0.0, connectivity: int | None = None
) -> LesionScores:
    r"""Lesion-wise precision, recall and F1.

    A lesion is a connected component. With `iou=0` two lesions match if they share a pixel: a predicted lesion that
    covers two actual ones finds both, and two pieces within an actual one are both right. With `iou` above 0 they match
    if their intersection over union is greater than it, each lesion with at most one other; of all ways to pair them
    the one with the most pairs counts (above 0.5 there is only one).

    Args:
        predicted: `(*space)`, bool.
        actual: of the same shape.
        iou: in [0, 1).
        connectivity: along how many axes at once neighbours may lie apart, as in `component_regions`; the number of
            axes by default, by which pixels that touch at a corner are one lesion.

    >>> lesion_scores(np.array([1, 0, 0, 1]) == 1, np.array([1, 0, 1, 0]) == 1)
    LesionScores(actual=2, predicted=2, precision=0.5, recall=0.5, f1=0.5)
    """
    from scipy import ndimage

    structure = ndimage.generate_binary_structure(actual.ndim, connectivity or actual.ndim)
    said, predicted_lesions = ndimage.label(predicted, structure)
    there, actual_lesions = ndimage.label(actual, structure)
    both = predicted & actual
    # One entry for each pair of lesions that overlap: a table of all pairs would not fit for thousands of them.
    pairs, shared = np.unique(said[both].astype(np.int64) * (actual_lesions + 1) + there[both], return_counts=True)
    first, second = np.divmod(pairs, actual_lesions + 1)
    if iou == 0:
        right, found = len(np.unique(first)), len(np.unique(second))
    else:
        sizes = np.bincount(said.ravel()), np.bincount(there.ravel())
        union = sizes[0][first] + sizes[1][second] - shared
        matching = shared / union > iou
        right = found = _most_pairs(first[matching], second[matching])
    precision = right / predicted_lesions if predicted_lesions else math.nan
    recall = found / actual_lesions if actual_lesions else math.nan
    if not (predicted_lesions or actual_lesions):
        f1 = math.nan
    elif not right:
        f1 = 0.0
    else:
        f1 = 2 * precision * recall / (precision + recall)
    return LesionScores(actual_lesions, predicted_lesions, precision, recall, f1)


def _most_pairs(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """The most pairs in which nobody occurs twice."""
    if not len(first):
        return 0
    from scipy import sparse
    from scipy.sparse.csgraph import maximum_bipartite_matching

    graph = sparse.csr_matrix((np.ones(len(first), dtype=bool), (first, second)))
    return int((maximum_bipartite_matching(graph) >= 0).sum())
