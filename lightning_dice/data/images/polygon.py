"""Fill polygons."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_ON_VERTEX = 1e-12  # pixels


def fill_polygon(x: Floats, y: Floats, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the pixels inside a closed polygon or on its outline, exactly those of `skimage.draw.polygon`.

    Where the outline crosses itself, inside and outside alternate.

    Args:
        x: column of each vertex; the centres of pixels have whole numbers.
        y: row of each vertex.
        shape: height and width of the mask.

    >>> corners = np.array([0.5, 2.5, 2.5, 0.5]), np.array([0.0, 0.0, 1.0, 1.0])
    >>> fill_polygon(*corners, (3, 4)).astype(int)
    array([[0, 1, 1, 0],
           [0, 1, 1, 0],
           [0, 0, 0, 0]])
    """
    mask = np.zeros(shape, bool)
    (top, bottom), (left, right) = (_covered(y, shape[0]), _covered(x, shape[1]))
    # A pixel is inside if the outline crosses the ray to its right, or to its left, an odd number of times. The one ray
    # counts an edge's first row, the other its last row, so that they differ on the outline alone.
    inside = _crosses_to_the_right(x, y, (top, bottom), (left, right))
    inside |= _crosses_to_the_right(-x, -y, (1 - bottom, 1 - top), (1 - right, 1 - left))[::-1, ::-1]
    mask[top:bottom, left:right] = inside
    columns, rows = np.rint(x), np.rint(y)
    vertex = (abs(x - columns) < _ON_VERTEX) & (abs(y - rows) < _ON_VERTEX)
    vertex &= (columns >= 0) & (columns < shape[1]) & (rows >= 0) & (rows < shape[0])
    mask[rows[vertex].astype(int), columns[vertex].astype(int)] = True
    return mask


def _covered(places: Floats, size: int) -> tuple[int, int]:
    """Return the first pixel that the vertices enclose along an axis, and the one after the last."""
    first = int(np.floor(places.min()).clip(0, size))
    return first, max(first, int((np.floor(places.max()) + 1).clip(0, size)))


def _crosses_to_the_right(x: Floats, y: Floats, rows: tuple[int, int], columns: tuple[int, int]) -> NDArray[np.bool_]:
    """Return for each pixel of these rows and columns whether the ray to its right crosses the outline oddly often."""
    x_before, y_before = np.roll(x, 1), np.roll(y, 1)
    first = np.ceil(np.minimum(y, y_before)).clip(*rows).astype(int)
    stop = np.ceil(np.maximum(y, y_before)).clip(*rows).astype(int)
    # One crossing for each edge and each row between its ends.
    edge = np.repeat(np.arange(len(x)), stop - first)
    row = np.arange(len(edge)) + np.repeat(stop - np.cumsum(stop - first), stop - first)
    x0, x1, y0, y1 = x[edge], x_before[edge], y[edge] - row, y_before[edge] - row
    pixel = np.rint((x0 * y1 - x1 * y0) / (y1 - y0))
    # The crossing is within half a pixel of this one, so that rounding decides for no other.
    right_of_pixel = ((x0 - pixel) * y1 - (x1 - pixel) * y0) / (y1 - y0) > 0
    stop_column = (pixel + right_of_pixel).clip(*columns).astype(int)
    ends = np.zeros((rows[1] - rows[0], columns[1] - columns[0] + 1), np.int32)
    np.add.at(ends, (row - rows[0], stop_column - columns[0]), 1)
    odd: NDArray[np.bool_] = ends[:, :0:-1].cumsum(1)[:, ::-1] % 2 == 1
    return odd
