"""Whether masks lie on their images, or would if they were transposed, flipped or turned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dice.kernels.sums import valid_pixels

# What a mask may have gone through. Augmentation that flips or turns image and mask together makes one member of a row
# of another: the transposed mask of a flipped image is seen mirrored along the other diagonal.
ORIENTATIONS = {
    "transposed: its rows are the image's columns": ((True, False, False), (True, True, True)),
    "flipped along one axis": ((False, False, True), (False, True, False)),
    "turned by 90 degrees": ((True, True, False), (True, False, True)),
    "turned by 180 degrees": ((False, True, True),),
}

FEWEST_IMAGES = 8
FEWEST_PIXELS = 64  # of boundary
FINEST = 512  # pixels along an axis: larger images are reduced


def edge_scores(image: Tensor, mask: Tensor, ignore_index: int | None = None) -> Tensor:
    """How well each mask's boundary lies on the edges of its image, as it is and in seven other orientations.

    The mean rank, in [0, 1], that the gradient at the boundary's pixels has among all of the image: 1/2 by chance. Of
    ranks, a few strong edges do not decide, and neither brightness nor contrast matters. Reads no value back.

    Args:
        image: `(batch, channels, *space)`, two space axes of one length.
        mask: ids `(batch, *space)` or planes `(batch, classes, *space)`.
        ignore_index: the label of pixels that count as nothing.

    Returns:
        `(batch, 8)`, the first as it is, then in the order of `ORIENTATIONS`; NaN with too little boundary.
    """
    planes = mask.unsqueeze(1) if mask.ndim == 3 else mask
    boundary = boundary_pixels(planes, ignore_index).float().unsqueeze(1)
    factor = -(-image.shape[-1] // FINEST)
    image, boundary = F.avg_pool2d(image.float(), factor), F.max_pool2d(boundary, factor)
    rank, boundary = edge_ranks(image), boundary.squeeze(1)
    pixels = boundary.sum((1, 2))
    moved = [boundary, *(_move(boundary, *move) for row in ORIENTATIONS.values() for move in row)]
    scores = torch.stack([(rank * one).sum((1, 2)) / pixels for one in moved], 1)
    return scores.masked_fill((pixels < FEWEST_PIXELS).unsqueeze(1), torch.nan)


def misplaced(scores: Tensor) -> str | None:
    """The orientation in which masks lie clearly better on their images than in all others, if it is not their own.

    Clearly: better than the best of all others by 0.03 of the mean rank, and by three standard errors over the images.

    Args:
        scores: of `edge_scores`; of some images, `(images, 8)`.
    """
    scores = scores[~scores.isnan().any(1)]
    if len(scores) < FEWEST_IMAGES:
        return None
    start = 1
    for name, row in ORIENTATIONS.items():
        own = torch.zeros(scores.shape[1], dtype=torch.bool)
        own[start : start + len(row)] = True
        start += len(row)
        better = scores[:, own].amax(1) - scores[:, ~own].amax(1)
        if better.mean() > 0.03 and better.mean() > 3 * better.std() / len(better) ** 0.5:
            return name
    return None


def _move(plane: Tensor, transpose: bool, vertically: bool, horizontally: bool) -> Tensor:
    plane = plane.transpose(-1, -2) if transpose else plane
    axes = [axis for axis, wanted in ((-2, vertically), (-1, horizontally)) if wanted]
    return plane.flip(axes) if axes else plane


def boundary_pixels(planes: Tensor, ignore_index: int | None = None) -> Tensor:
    """Pixels beside one of another label along some axis, `(batch, *space)`; an ignored pixel has none.

    Args:
        planes: `(batch, classes, *space)`; ids are one plane.
        ignore_index: the label of pixels that count as nothing.

    >>> boundary_pixels(torch.tensor([[[0, 0, 1, 1, 1]]])).int()
    tensor([[0, 1, 1, 0, 0]], dtype=torch.int32)
    """
    valid = valid_pixels(planes, ignore_index)
    found = torch.zeros_like(planes[:, 0], dtype=torch.bool)
    for axis in range(-1, 1 - planes.ndim, -1):
        length = planes.shape[axis] - 1
        differs = planes.narrow(axis, 0, length) != planes.narrow(axis, 1, length)
        if valid is not None:
            differs &= valid.narrow(axis, 0, length) & valid.narrow(axis, 1, length)
        between = differs.any(1)
        found.narrow(axis, 0, length).logical_or_(between)
        found.narrow(axis, 1, length).logical_or_(between)
    return found


def edge_ranks(image: Tensor) -> Tensor:
    """The rank of each pixel's gradient among all of its image, in [0, 1], `(batch, *space)`; equal ones share theirs.

    Args:
        image: `(batch, channels, *space)` with one to three space axes; it is smoothed a little (a mean over 3 pixels
            along each axis), and the gradient's magnitude is taken over all channels.
    """
    axes = image.ndim - 2
    mean = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[axes - 1]
    around = (1, 1) * axes
    smooth = F.pad(mean(F.pad(image, around, mode="replicate"), 3, 1), around, mode="replicate")
    inner = [slice(None)] * 2 + [slice(1, -1)] * axes
    energy = torch.zeros_like(image)
    for axis in range(-1, -axes - 1, -1):
        sides = [list(inner), list(inner)]
        sides[0][axis], sides[1][axis] = slice(2, None), slice(None, -2)
        energy += (smooth[tuple(sides[0])] - smooth[tuple(sides[1])]).square()
    return _ranks(energy.sum(1).sqrt())


def _ranks(values: Tensor) -> Tensor:
    flat = values.flatten(1).contiguous()
    ordered = flat.sort(1).values
    below, above = (torch.searchsorted(ordered, flat, right=right) for right in (False, True))
    return ((below + above) / (2 * flat.shape[1])).view_as(values)
