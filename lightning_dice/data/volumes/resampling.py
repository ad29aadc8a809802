"""Resampling volumes to another spacing.

The outer edges of the volume stay in place, as with `align_corners=False` of `torch.nn.functional.interpolate`, so that
resizing logits to the original size is the exact way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Interpolation = Literal["linear", "cubic"]
MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def resampled_size(size: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> tuple[int, ...]:
    """Return the size at the target spacing, rounded, at least 1.

    >>> resampled_size((100, 100, 20), (1.0, 1.0, 5.0), (1.0, 2.0, 2.5))
    (100, 50, 40)
    """
    return tuple(max(1, round(n * old / new)) for n, old, new in zip(size, spacing, target, strict=True))


def resample_image(image: Tensor, size: Sequence[int], interpolation: Interpolation = "linear") -> Tensor:
    """Resample an image to another size.

    Args:
        image: float32, `(channels, *space)`.
        size: the space axes of the result.
        interpolation: `"linear"` by torch, or `"cubic"`: splines of order 3 by SciPy, as in nnU-Net, which are sharper,
            may overshoot, and take about ten times as long. Neither smooths before downsampling.

    >>> resample_image(torch.tensor([[[[0.0]], [[4.0]]]]), (4, 1, 1)).flatten()
    tensor([0., 1., 3., 4.])
    """
    if tuple(image.shape[1:]) == tuple(size):
        return image
    if interpolation == "linear":
        return F.interpolate(image[None], size=tuple(size), mode=MODES[len(size)], align_corners=False)[0]
    from scipy.ndimage import zoom

    factors = [new / old for new, old in zip(size, image.shape[1:], strict=True)]
    # `grid_mode` keeps the outer edges of the voxels in place; "nearest" repeats the border, as torch does.
    parts = [zoom(plane.numpy(), factors, order=3, mode="nearest", grid_mode=True) for plane in image]
    return torch.stack([torch.from_numpy(part) for part in parts])


def resample_mask(mask: Tensor, size: Sequence[int], planes: bool) -> Tensor:
    """Resample a mask to another size: each voxel gets the label with the largest linearly interpolated share.

    Ties go to the lower label. Thin objects keep more of their volume than with nearest-neighbour interpolation.
    nnU-Net requires a share of at least 1/2 instead, and assigns the other voxels to the background.

    Args:
        mask: ids `(*space)`, or with `planes` 0, 1 and the ignored label in `(classes, *space)`.
        size: the space axes of the result.
        planes: whether there is a plane for each class.

    >>> resample_mask(torch.tensor([[[1]], [[2]], [[2]]]), (2, 1, 1), planes=False).flatten()
    tensor([1, 2])
    """
    space = mask.shape[1:] if planes else mask.shape
    if tuple(space) == tuple(size):
        return mask
    if planes:
        return torch.stack([resample_mask(plane, size, False) for plane in mask])
    best = torch.full(tuple(size), -1.0)
    result = torch.zeros(tuple(size), dtype=mask.dtype)
    for label in torch.unique(mask):
        plane = (mask == label).float()[None, None]
        share = F.interpolate(plane, size=tuple(size), mode=MODES[len(size)], align_corners=False)[0, 0]
        better = share > best
        best[better] = share[better]
        result[better] = label
    return result
