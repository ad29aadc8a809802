"""What a target says beyond its values: how far each pixel lies from a boundary, and where the skeletons run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_dice.functional.target_reader import TargetReader


def signed_distance(mask: Any, spacing: tuple[float, ...] | None = None) -> Any:
    r"""Euclidean distance of each pixel to the nearest one of the other side: below 0 inside, above 0 outside.

    .. math:: \phi(x) = \begin{cases} -\min_{y \notin G} |x - y| & x \in G \\ \min_{y \in G} |x - y| & \text{else}
        \end{cases}

    Pixels on either side of a boundary are 1 from it and never 0. The published code of Kervadec et al. (MIDL 2019)
    adds 1 inside, so that the outermost pixels of the mask are 0 and the loss does not see them.

    Args:
        mask: a bool array, any number of axes.
        spacing: the size of a pixel along each axis; 1 by default.

    Returns:
        A float64 array of the shape of mask. 0 everywhere where the mask is empty or full: no boundary, no distance.

    Raises:
        ValueError: a spacing for another number of axes.

    >>> signed_distance(np.array([0, 0, 1, 1, 1, 0]) == 1).tolist()
    [2.0, 1.0, -1.0, -2.0, -1.0, 1.0]
    """
    if mask.all() or not mask.any():
        return np.zeros(mask.shape)
    from scipy import ndimage  # Here, as it would slow the start of every command.

    inside, outside = (ndimage.distance_transform_edt(one, _sampling(mask, spacing)) for one in (mask, ~mask))
    return outside - inside


def boundary_distance(labels: Any, valid: Any = None, spacing: tuple[float, ...] | None = None) -> Any:
    """Euclidean distance of each pixel to the nearest one on a boundary.

    A pixel is on a boundary where one that shares a side with it has another label.

    Args:
        labels: an array of labels, any number of axes.
        valid: a bool array of the same shape; pixels that are not valid have no label, and no boundary.
        spacing: the size of a pixel along each axis; 1 by default.

    Returns:
        A float64 array of the shape of labels; infinite everywhere where there is no boundary.

    Raises:
        ValueError: a spacing for another number of axes.

    >>> boundary_distance(np.array([0, 0, 0, 1, 2, 2])).tolist()
    [2.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    """
    from scipy import ndimage  # Here, as it would slow the start of every command.

    edge = np.zeros(labels.shape, dtype=bool)
    for axis in range(labels.ndim):
        along, change, known = (np.moveaxis(one, axis, 0) for one in (edge, labels, edge if valid is None else valid))
        differs = change[1:] != change[:-1]
        if valid is not None:
            differs &= known[1:] & known[:-1]
        along[1:] |= differs
        along[:-1] |= differs
    sampling = _sampling(labels, spacing)
    return ndimage.distance_transform_edt(~edge, sampling) if edge.any() else np.full(labels.shape, np.inf)


def tubed_skeleton(mask: Any, radius: float = 2.0) -> Any:
    """The pixels of a mask that lie within a radius of its skeleton.

    In two dimensions a radius of 2 is the two dilations by a cross of the published code of Kirchhoff et al. (ECCV
    2024); in three they make an octahedron, and this a ball. A component of which thinning leaves nothing, as
    scikit-image's does of many boxes of even width in three dimensions, has its deepest pixels for a skeleton.

    Args:
        mask: a bool array of two or three axes.
        radius: in pixels, Euclidean; with 0, the skeleton alone.

    Returns:
        A bool array of the shape of mask.

    Raises:
        ValueError: another number of axes.

    >>> mask = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]) == 1
    >>> tubed_skeleton(mask, radius=0).astype(int).tolist()
    [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]
    """
    if mask.ndim not in (2, 3):
        raise ValueError(f"a skeleton needs an image of 2 or 3 space axes, got {mask.ndim}")
    if not mask.any():
        return np.zeros(mask.shape, dtype=bool)
    from scipy import ndimage  # Here, as both take longer than all the rest, and most losses have no skeletons.
    from skimage.morphology import skeletonize

    skeleton = skeletonize(np.ascontiguousarray(mask)) > 0  # type: ignore[no-untyped-call]
    # Thinning in three dimensions takes away all of what is two pixels wide: the ridge of its distances is left then.
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
    """The signed distance to the boundary of each class: a map in the sense of `SegmentationLoss.maps`.

    Called with the target of one image on the CPU, ids `(*space)` or planes `(classes, *space)`, it returns float32
    `(classes, *space)`; see `signed_distance`. 0 everywhere for a class that is nowhere or everywhere.

    Args:
        activation: of the loss; this and the following as in `TargetReader`.
        classes: how many there are; needed with class ids.
        ignore_index: the label of pixels that count as nothing.
        exclude_classes: indices of classes that are not computed but 0 everywhere.
        spacing: the size of a pixel along each axis; 1 by default.

    >>> SignedDistance("softmax", classes=2)(torch.tensor([0, 0, 1, 1]))
    tensor([[-2., -1.,  1.,  2.],
            [ 2.,  1., -1., -2.]])
    """

    spacing: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "spacing", _spacing(self.spacing))

    def __call__(self, target: Tensor) -> Tensor:
        """The distances, float32 `(classes, *space)`."""
        return self.of_masks(self.masks(target))

    def of_masks(self, masks: Tensor) -> Tensor:
        """The distances of bool planes `(classes, *space)`, such as a prediction's."""
        return self.of_each_class(lambda mask: signed_distance(mask, self.spacing), masks)


@dataclass(frozen=True)
class BoundaryWeight(TargetReader):
    r"""A weight that is greatest at the boundaries: a map in the sense of `SegmentationLoss.maps`.

    .. math:: w(x) = 1 + a\,\exp\left(-\frac{d(x)^2}{2\sigma^2}\right)

    with d as in `boundary_distance`. Called with the target of one image on the CPU: of ids `(*space)` it returns one
    weight for each pixel, by the boundaries between any two labels; of planes `(classes, *space)` one for each plane.
    1 where there is no boundary.

    The weight of U-Net (Ronneberger et al., MICCAI 2015) has the sum of the distances to the two nearest cells in the
    place of d, so that it is for narrow gaps between cells alone, and adds one that balances the classes.

    Args:
        activation: of the loss; this and the following as in `TargetReader`.
        classes: how many there are; needed with class ids where `activation` is `None`.
        ignore_index: the label of pixels that count as nothing; between them and others there is no boundary.
        exclude_classes: not used.
        width: sigma above, in pixels (or units of spacing).
        strength: a above.
        spacing: the size of a pixel along each axis; 1 by default.

    >>> BoundaryWeight("softmax", width=1.0, strength=4.0)(torch.tensor([0, 0, 0, 2, 2]))
    tensor([1.5413, 3.4261, 5.0000, 5.0000, 3.4261])
    """

    width: float = 5.0
    strength: float = 10.0
    spacing: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "spacing", _spacing(self.spacing))

    def __call__(self, target: Tensor) -> Tensor:
        """The weights, float32 of the shape of the target."""
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
    """The skeleton of each class, widened within it: a map in the sense of `SegmentationLoss.maps`.

    Called with the target of one image on the CPU, ids `(*space)` or planes `(classes, *space)`, of two or three space
    axes, it returns 0 and 1, float32 `(classes, *space)`; see `tubed_skeleton`.

    The published code of Kirchhoff et al. (ECCV 2024) takes one skeleton of all classes but the background together;
    here each class has its own.

    Args:
        activation: of the loss; this and the following as in `TargetReader`.
        classes: how many there are; needed with class ids.
        ignore_index: the label of pixels that count as nothing.
        exclude_classes: indices of classes that are not computed but 0 everywhere.
        radius: in pixels.

    >>> mask = torch.tensor([[[0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]])
    >>> TubedSkeleton(radius=1)(mask)
    tensor([[[0., 0., 0., 0., 0.],
             [1., 1., 1., 1., 1.],
             [0., 0., 0., 0., 0.]]])
    """

    radius: float = 2.0

    def __call__(self, target: Tensor) -> Tensor:
        """The skeletons, float32 `(classes, *space)`."""
        return self.of_each_class(lambda mask: tubed_skeleton(mask, self.radius), self.masks(target))


def _sampling(mask: Any, spacing: tuple[float, ...] | None) -> tuple[float, ...] | None:
    if spacing is not None and len(spacing) != mask.ndim:
        raise ValueError(f"spacing must have one number for each of the {mask.ndim} space axes, got {list(spacing)}")
    return spacing


def _spacing(spacing: Iterable[float] | None) -> tuple[float, ...] | None:
    if spacing is None:
        return None
    # Not a string, nor one number: which axes it would be for is not said.
    sizes = tuple(spacing) if isinstance(spacing, Iterable) and not isinstance(spacing, str) else ()
    if not sizes or not all(isinstance(size, (int, float)) and math.isfinite(size) and size > 0 for size in sizes):
        raise ValueError(f"spacing must be None or a number > 0 for each space axis, got {spacing!r}")
    return sizes
