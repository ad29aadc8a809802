"""Volumes at another spacing: a pure zoom, whose extent stays.

Voxel edges, not centres, stay in their places, which is `align_corners=False` of `torch.nn.functional.interpolate`:
resizing logits to the old size is the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Interpolation = Literal["linear", "cubic"]
MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def zoomed_size(size: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> tuple[int, ...]:
    """The size at another spacing, rounded, at least 1.

    >>> zoomed_size((100, 100, 20), (1.0, 1.0, 5.0), (1.0, 2.0, 2.5))
    (100, 50, 40)
    """
    return tuple(max(1, round(n * old / new)) for n, old, new in zip(size, spacing, target, strict=True))


def zoomed_image(image: Tensor, size: Sequence[int], interpolation: Interpolation = "linear") -> Tensor:
    """An image at another size.

    Args:
        image: float32, `(channels, *space)`.
        size: the space axes wanted.
        interpolation: `"linear"` by torch, or `"cubic"`: splines of order 3 by SciPy, as nnU-Net has them, which are
            sharper, may overshoot, and take some ten times as long. Neither smooths before it makes smaller.
    """
    if tuple(image.shape[1:]) == tuple(size):
        return image
    if interpolation == "linear":
        return F.interpolate(image[None], size=tuple(size), mode=MODES[len(size)], align_corners=False)[0]
    from scipy.ndimage import zoom

    factors = [new / old for new, old in zip(size, image.shape[1:], strict=True)]
    # `grid_mode` takes the edges of voxels for their ends; "nearest" repeats the border, as torch does.
    parts = [zoom(plane.numpy(), factors, order=3, mode="nearest", grid_mode=True) for plane in image]
    return torch.stack([torch.from_numpy(part) for part in parts])


def zoomed_mask(mask: Tensor, size: Sequence[int], planes: bool) -> Tensor:
    """A mask at another size: each voxel gets the label whose linearly interpolated share is the greatest.

    Of equal shares the lower label wins. In contrast to a look-up of the nearest voxel, thin objects keep their volume
    as well as they can. nnU-Net asks for a share of at least 1/2, and leaves what no label reaches to the background.

    Args:
        mask: ids `(*space)`, or with `planes` 0, 1 and the ignored label in `(classes, *space)`.
        size: the space axes wanted.
        planes: whether there is a plane for each class.
    """
    space = mask.shape[1:] if planes else mask.shape
    if tuple(space) == tuple(size):
        return mask
    if planes:
        return torch.stack([zoomed_mask(plane, size, False) for plane in mask])
    best = torch.full(tuple(size), -1.0)
    result = torch.zeros(tuple(size), dtype=mask.dtype)
    for label in torch.unique(mask):
        plane = (mask == label).float()[None, None]
        share = F.interpolate(plane, size=tuple(size), mode=MODES[len(size)], align_corners=False)[0, 0]
        better = share > best
        best[better] = share[better]
        result[better] = label
    return result
