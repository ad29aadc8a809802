"""Elements of a mask's surface, in the gaps between its pixels, and their areas."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

# The surface that separates the corners of a 2x2x2 neighbourhood, for the codes 0 to 127; the other codes are the same
# with inside and outside exchanged. Each three digits are an element: its area along each axis, in eighths of a face.
# From `surface-distance` (Copyright 2018 Google Inc., Apache License 2.0); the signs of the normals are left out, as
# areas do not depend on them.
_ELEMENTS = """
    0 111 111 220220 111 202202 111111 400222111 111 111111 202202 400222111 220220 400222111 400222111 400400 111
    022022 111111 040222111 111111 004222111 111111111 111222222111 111111 022022111 202202111 111333022202
    111220220 333022111220 400111222111 400111222 111 111111 022022 040111222 111111 111202202 022022111
    333022111202 111111 111111111 004222111 222222111111 111220220 400222111111 022333111220 400222111 220220
    040222111 040111222 040040 220220111 333202111220 111040222111 040222111 111220220 040222111111 333220111202
    040222111 220220220220 220220111 111220220 220220 111 111111 111111 111220220 022022 004222111 022022111
    333022111220 111111 111111111 111202202 400222111111 040222111 222222111111 202333022111 400222111 202202
    004222111 111202202 202333220111 004222111 004004 111111222004 111222004 202202111 004222111111 202202202202
    111202202 202333220111 004222111 111202202 202202 111111 111111111 111022022 040111222111 022022111
    004222111111 022022022022 022022111 111111111 111111111111 004222111111 111111111 040222111111 111111111
    022022111 111111 400222111 222111222111 333022111202 040222111 333220022111 111222004 111022022 022022
    400222111111 111111111 202202111 111111 220220111 111111 111111 111
"""


def surface_elements(
    mask: NDArray[np.bool_], spacing: Sequence[float]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return the neighbourhoods of 2 pixels along each axis that a surface passes through, and its area in each.

    They are those of DeepMind's `surface-distance`, and of MONAI's `get_mask_edges` with a spacing.

    Args:
        mask: `(*space)`, bool, 1 to 3 axes.
        spacing: distance between neighbouring pixels along each axis.

    Returns:
        Bool array, one shorter along each axis, and the areas (2D: lengths; 1D: 1) of its true elements, in C order.

    >>> found, areas = surface_elements(np.array([[0, 0, 0], [0, 1, 1], [0, 1, 1]]) == 1, (1, 2))
    >>> found.astype(int).tolist(), areas.round(3).tolist()
    ([[1, 1], [1, 0]], [1.118, 2.0, 1.0])
    """
    codes = np.zeros([size - 1 for size in mask.shape], np.uint8)
    for corner in product((slice(None, -1), slice(1, None)), repeat=mask.ndim):
        codes <<= 1
        codes |= mask[corner]
    areas = _areas(*map(float, spacing))
    found = (codes != 0) & (codes != len(areas) - 1)
    return found, areas[codes[found]]


@cache
def _areas(*spacing: float) -> NDArray[np.float64]:
    """Return the area of each code: a bit for each corner of a neighbourhood, the first corner in the highest bit."""
    if len(spacing) == 1:
        return np.array([0.0, 1.0, 1.0, 0.0])
    if len(spacing) == 2:
        first, second = spacing
        diagonal = np.linalg.norm(spacing) / 2
        half = [0.0, diagonal, diagonal, second, diagonal, first, 2 * diagonal, diagonal]
        return np.array([*half, *half[::-1]])
    import torch  # Rounds as MONAI's table does.

    elements = torch.zeros(128, 4, 3)
    for code, digits in enumerate(_ELEMENTS.split()):
        for index, digit in enumerate(digits):
            elements[code, index // 3, index % 3] = int(digit) / 8
    first, second, third = spacing
    faces = torch.tensor([second * third, first * third, first * second])
    half = torch.linalg.norm(elements * faces, dim=-1).sum(-1).double().numpy()
    return np.concatenate([half, half[::-1]])
