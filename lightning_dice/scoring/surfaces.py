"""Surface Dice and surface distances of two masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_dice.scoring.surface_elements import surface_elements

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]

# Elements of a mask per step, of which only those of the surface are kept.
CHUNK = 2**24


class SurfaceScores(NamedTuple):
    """Distances between two surfaces, summarized.

    Attributes:
        dice: surface Dice, in [0, 1]; 0 if one of the masks is empty, NaN if both are.
        hd95: Hausdorff distance at the 95th percentile; NaN if a mask is empty.
        mean: average symmetric surface distance; NaN if a mask is empty.
    """

    dice: float
    hd95: float
    mean: float


def surface_scores(predicted: Mask, actual: Mask, spacing: Sequence[float], tolerance: float) -> SurfaceScores:
    r"""Compute surface Dice, 95% Hausdorff distance and mean surface distance of two masks.

    **Surface Dice** (normalized surface distance, NSD; Nikolov et al., JMIR 2021) is the share of both surfaces that
    is within the tolerance of the other one:

    .. math:: \frac{|S_P \cap B_T^{(\tau)}| + |S_T \cap B_P^{(\tau)}|}{|S_P| + |S_T|}

    The surface consists of elements between pixels, each weighted by its area (2D: length), as in DeepMind's
    `surface-distance` and MONAI's `compute_surface_dice(use_subvoxels=True)`. Counting boundary pixels, MONAI's
    default, gives slanted and thin parts other weights and ignores unequal spacing: on random masks the two differ by
    0.07 on average, and by up to 0.17.

    **Hausdorff 95** and the **mean surface distance** use boundary pixels, those with a neighbour across a face that is
    not in the mask, as MONAI and medpy define them. Hausdorff 95 is the larger of the two directed percentiles (linear
    between ranks); the mean is over the boundary pixels of both masks together.

    Outside the image there is no mask: a mask that reaches the border has a surface there.

    Args:
        predicted: `(*space)`, bool, 1 to 3 space axes.
        actual: the true mask, in the same shape.
        spacing: distance between neighbouring pixels along each axis.
        tolerance: in the unit of `spacing`. A distance equal to it is within, even if rounding makes it larger.

    Raises:
        ValueError: more than 3 space axes.

    >>> predicted, actual = np.zeros((2, 9, 9), dtype=bool)
    >>> predicted[2:6, 2:6] = actual[2:6, 3:7] = True
    >>> scores = surface_scores(predicted, actual, spacing=(1, 1), tolerance=1)
    >>> scores.dice, scores.hd95, scores.mean
    (1.0, 1.0, 0.5)
    """
    if not 1 <= predicted.ndim <= 3:
        raise ValueError(f"surface distances need 1 to 3 space axes, got {predicted.ndim}; set surfaces=False")
    if not (predicted.any() and actual.any()):
        return SurfaceScores(0.0 if predicted.any() or actual.any() else math.nan, math.nan, math.nan)
    box = bounding_box(predicted | actual)
    predicted, actual = np.pad(predicted[box], 1), np.pad(actual[box], 1)
    scale = np.asarray(spacing, dtype=np.float64)
    elements, pixels = [_Surface(scale), _Surface(scale)], [_Surface(scale), _Surface(scale)]
    rows = predicted.shape[0]
    step = max(1, CHUNK // predicted[0].size)
    # An element is between a row and the next one; the last row is padding and has none.
    for start in range(0, rows - 1, step):
        stop = min(start + step, rows - 1)
        for surface, mask in zip(elements, (predicted, actual), strict=True):
            surface.add(start, *surface_elements(mask[start : stop + 1], spacing))
        before = max(start - 1, 0)
        for surface, mask in zip(pixels, (predicted, actual), strict=True):
            surface.add(start, _boundary_pixels(mask[before : stop + 1])[start - before : stop - before])
    forward, backward = _nearest_distances(*elements)
    reach = tolerance * (1 + 1e-9)
    weights = [np.concatenate(surface.areas) for surface in elements]
    within = weights[0][forward <= reach].sum() + weights[1][backward <= reach].sum()
    forward, backward = _nearest_distances(*pixels)
    return SurfaceScores(
        float(within / (weights[0].sum() + weights[1].sum())),
        float(max(np.percentile(forward, 95), np.percentile(backward, 95))),
        float(np.concatenate([forward, backward]).mean()),
    )


class _Surface:
    """The points of a surface, in the unit of spacing, and their areas."""

    def __init__(self, scale: Floats) -> None:
        self.scale = scale
        self.points: list[Floats] = []
        self.areas: list[Floats] = []

    def add(self, start: int, where: Mask, areas: Floats | None = None) -> None:
        """Add the points of some rows, of which `start` is the first, and their areas."""
        found = np.argwhere(where).astype(np.float64)
        found[:, 0] += start
        self.points.append(found * self.scale)
        if areas is not None:
            self.areas.append(areas)


def _boundary_pixels(mask: Mask) -> Mask:
    from scipy import ndimage

    inner: Mask = ndimage.binary_erosion(mask)
    return mask & ~inner


def bounding_box(mask: Mask) -> tuple[slice, ...]:
    """Return the bounding box of a mask, which must not be empty.

    >>> bounding_box(np.array([[0, 0, 0], [0, 1, 1]]) == 1)
    (slice(1, 2, None), slice(1, 3, None))
    """
    box = []
    for axis in range(mask.ndim):
        found = np.flatnonzero(mask.any(tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(int(found[0]), int(found[-1]) + 1))
    return tuple(box)


def _nearest_distances(first: _Surface, second: _Surface) -> tuple[Floats, Floats]:
    """Return the distance from each point of one surface to the nearest point of the other, in both directions."""
    from scipy.spatial import KDTree

    points = [np.concatenate(surface.points) for surface in (first, second)]
    # Leaves larger than the default, because each tree is queried only once.
    forward, backward = (
        KDTree(points[1 - side], leafsize=32).query(points[side], workers=-1)[0].astype(np.float64) for side in (0, 1)
    )
    return forward, backward
