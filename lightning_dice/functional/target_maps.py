"""Maps of a target: distances to boundaries, boundary weights and skeletons."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_dice.extras import require
from lightning_dice.functional.target_reader import TargetReader


def signed_distance(mask: Any, spacing: tuple[float, ...] | None = None) -> Any:
    r"""Compute the distance of each pixel to the nearest one on the other side: negative inside, positive outside.

    .. math:: \phi(x) = \begin{cases} -\min_{y \notin G} |x - y| & x \in G \\ \min_{y \in G} |x - y| & \text{else}
        \end{cases}

    Pixels beside a boundary have the distance 1 or -1, never 0. The published code of Kervadec et al. (MIDL 2019) adds
    1 inside, so that the outermost pixels of the mask are 0 and do not enter the loss.

    Args:
        mask: bool array, any number of axes.
        spacing: size of a pixel along each axis; 1 by default.

    Returns:
        float64 array of the shape of mask; 0 everywhere if the mask is empty or full.

    Raises:
        ValueError: a spacing for another number of axes.

    >>> signed_distance(np.array([0, 0, 1, 1, 1, 0]) == 1).tolist()
    [2.0, 1.0, -1.0, -2.0, -1.0, 1.0]
    """
    if mask.all() or not mask.any():
        return np.zeros(mask.shape)
    from scipy import ndimage  # Imported here, as it would slow the start of every command.

    inside, outside = (ndimage.distance_transform_edt(one, _check_spacing(mask, spacing)) for one in (mask, ~mask))
    return outside - inside


def boundary_distance(labels: Any, valid: Any = None, spacing: tuple[float, ...] | None = None) -> Any:
    """Compute the Euclidean distance of each pixel to the nearest boundary pixel.

    A pixel is on a boundary if a pixel that shares a side with it has another label.

    Args:
        labels: array of labels, any number of axes.
        valid: bool array of the same shape; invalid pixels have no label, and no boundary.
        spacing: size of a pixel along each axis; 1 by default.

    Returns:
        float64 array of the shape of labels; infinite everywhere if there is no boundary.

    Raises:
        ValueError: a spacing for another number of axes.

    >>> boundary_distance(np.array([0, 0, 0, 1, 2, 2])).tolist()
    [2.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    """
    from scipy import ndimage  # Imported here, as it would slow the start of every command.

    edge = np.zeros(labels.shape, dtype=bool)
    for axis in range(labels.ndim):
        along, change, known = (np.moveaxis(one, axis, 0) for one in (edge, labels, edge if valid is None else valid))
        differs = change[1:] != change[:-1]
        if valid is not None:
            differs &= known[1:] & known[:-1]
        along[1:] |= differs
        along[:-1] |= differs
    sampling = _check_spacing(labels, spacing)
    return ndimage.distance_transform_edt(~edge, sampling) if edge.any() else np.full(labels.shape, np.inf)


def tubed_skeleton(mask: Any, radius: float = 2.0) -> Any:
    """Return the pixels of a mask within a radius of its skeleton.

    In two dimensions a radius of 2 equals the two dilations by a cross in the published code of Kirchhoff et al. (ECCV
    2024); in three, those make an octahedron, and this a ball. If thinning leaves nothing of a component, as that of
    scikit-image does with many boxes of even width in three dimensions, its deepest pixels are its skeleton.

    Args:
        mask: bool array of two or three axes.
        radius: in pixels, Euclidean; with 0, only the skeleton.

    Returns:
        bool array of the shape of mask.

    Raises:
        ValueError: not two or three axes.

    >>> mask = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]) == 1
    >>> tubed_skeleton(mask, radius=0).astype(int).tolist()
    [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]
    """
    if mask.ndim not in (2, 3):
        raise ValueError(f"a skeleton needs an image of 2 or 3 space axes, got {mask.ndim}")
    require("skimage", needed_by="a skeleton")
    if not mask.any():
        return np.zeros(mask.shape, dtype=bool)
    from scipy import ndimage  # Imported here, as both are slow to import, and most losses have no skeletons.
    from skimage.morphology import skeletonize

    skeleton = skeletonize(np.ascontiguousarray(mask)) > 0  # type: ignore[no-untyped-call]
    # In three dimensions, thinning removes components that are two pixels wide: use the ridge of their distances.
    parts, found = ndimage.label(mask, np.ones((3,) * mask.ndim))
    lost = np.setdiff1d(np.arange(1, found + 1), np.unique(parts[skeleton]))
    if lost.size:
        inner = ndimage.distance_transform_edt(mask)
        ridge = np.zeros(found + 1)
        ridge[lost] = ndimage.maximum(inner, parts, lost)
        skeleton |= np.isin(parts, lost) & (inner >= ridge[parts])
    if radius > 0 and skeleton.any():
        skeleton = ndimage.distance_transform_edt(~skeleton) <= radius
    return skeleton & mask


@dataclass(frozen=True)
class SignedDistance(TargetReader):
    """Signed distance to the boundary of each class, see `signed_distance`; one of the `SegmentationLoss.maps`.

    Call it with the target of one image on the CPU, ids `(*space)` or planes `(classes, *space)`; it returns float32
    `(classes, *space)`, 0 for a class that is nowhere or everywhere.

    Args:
        activation: the loss's activation, see `TargetReader`.
        classes: number of classes; needed with class ids.
        ignore_index: label of the pixels to ignore.
        exclude_classes: indices of classes to skip; their distances are 0 everywhere.
        spacing: size of a pixel along each axis; 1 by default.

    >>> SignedDistance("softmax", classes=2)(torch.tensor([0, 0, 1, 1]))
    tensor([[-2., -1.,  1.,  2.],
            [ 2.,  1., -1., -2.]])
    """

    spacing: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "spacing", _read_spacing(self.spacing))

    def __call__(self, target: Tensor) -> Tensor:
        """Compute the distances, float32 `(classes, *space)`."""
        return self.of_masks(self.masks(target))

    def of_masks(self, masks: Tensor) -> Tensor:
        """Compute the distances of bool planes `(classes, *space)`, such as those of a prediction."""
        return self.map_classes(lambda mask: signed_distance(mask, self.spacing), masks)


@dataclass(frozen=True)
class BoundaryWeight(TargetReader):
    r"""Pixel weight that is greatest at boundaries; one of the `SegmentationLoss.maps`.

    .. math:: w(x) = 1 + a\,\exp\left(-\frac{d(x)^2}{2\sigma^2}\right)

    with d as in `boundary_distance`. Call it with the target of one image on the CPU: for ids `(*space)` it returns one
    weight for each pixel, from the boundaries between any two labels; for planes `(classes, *space)` one in each plane.
    The weight is 1 if there is no boundary.

    The weight of U-Net (Ronneberger et al., MICCAI 2015) uses the sum of the distances to the two nearest cells as d,
    so that it acts on narrow gaps between cells alone, and adds a weight that balances the classes.

    Args:
        activation: the loss's activation, see `TargetReader`.
        classes: number of classes; needed with class ids if `activation` is `None`.
        ignore_index: label of the pixels to ignore; they have no boundary with other pixels.
        exclude_classes: not used.
        width: sigma above, in pixels (or the unit of `spacing`).
        strength: a above.
        spacing: size of a pixel along each axis; 1 by default.

    >>> BoundaryWeight("softmax", width=1.0, strength=4.0)(torch.tensor([0, 0, 0, 2, 2]))
    tensor([1.5413, 3.4261, 5.0000, 5.0000, 3.4261])
    """

    width: float = 5.0
    strength: float = 10.0
    spacing: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "spacing", _read_spacing(self.spacing))

    def __call__(self, target: Tensor) -> Tensor:
        """Compute the weights, float32, of the shape of target."""
        valid = self.valid(target)
        if self.holds_ids(target):
            return self._weight(target, valid)
        planes = target if target.dtype == torch.bool else target >= 0.5
        each = [self._weight(plane, None if valid is None else valid[index]) for index, plane in enumerate(planes)]
        return torch.stack(each)

    def _weight(self, labels: Tensor, valid: Tensor | None) -> Tensor:
        distance = boundary_distance(labels.numpy(), None if valid is None else valid.numpy(), self.spacing)
        return torch.from_numpy(np.float32(1 + self.strength * np.exp(-((distance / self.width) ** 2) / 2)))


@dataclass(frozen=True)
class TubedSkeleton(TargetReader):
    """Skeleton of each class, widened within it, see `tubed_skeleton`; one of the `SegmentationLoss.maps`.

    Call it with the target of one image on the CPU, ids `(*space)` or planes `(classes, *space)`, with two or three
    space axes; it returns 0 and 1, float32 `(classes, *space)`.

    Each class has its own skeleton; the published code of Kirchhoff et al. (ECCV 2024) has one for all classes but the
    background.

    Args:
        activation: the loss's activation, see `TargetReader`.
        classes: number of classes; needed with class ids.
        ignore_index: label of the pixels to ignore.
        exclude_classes: indices of classes to skip; their skeletons are empty.
        radius: of the widening, in pixels.

    >>> mask = torch.tensor([[[0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]])
    >>> TubedSkeleton(radius=1)(mask)
    tensor([[[0., 0., 0., 0., 0.],
             [1., 1., 1., 1., 1.],
             [0., 0., 0., 0., 0.]]])
    """

    radius: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require("skimage", needed_by="TubedSkeleton")

    def __call__(self, target: Tensor) -> Tensor:
        """Compute the skeletons, float32 `(classes, *space)`."""
        return self.map_classes(lambda mask: tubed_skeleton(mask, self.radius), self.masks(target))


def _check_spacing(mask: Any, spacing: tuple[float, ...] | None) -> tuple[float, ...] | None:
    if spacing is not None and len(spacing) != mask.ndim:
        raise ValueError(f"spacing must have one number for each of the {mask.ndim} space axes, got {list(spacing)}")
    return spacing


def _read_spacing(spacing: Iterable[float] | None) -> tuple[float, ...] | None:
    if spacing is None:
        return None
    # Neither a string nor one number, which does not tell the number of axes.
    sizes = tuple(spacing) if isinstance(spacing, Iterable) and not isinstance(spacing, str) else ()
    if not sizes or not all(isinstance(size, (int, float)) and math.isfinite(size) and size > 0 for size in sizes):
        raise ValueError(f"spacing must be None or a number > 0 for each space axis, got {spacing!r}")
    return sizes
