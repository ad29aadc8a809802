"""Detect masks that are transposed, flipped or rotated against their images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dice.kernels.sums import valid_pixels

# Each row is one mistake, with all orientations in which it shows: augmentation that flips or rotates image and mask
# together turns one into another. A transposed mask, for example, shows along the other diagonal in a flipped image.
ORIENTATIONS = {
    "transposed: its rows are the image's columns": ((True, False, False), (True, True, True)),
    "flipped along one axis": ((False, False, True), (False, True, False)),
    "rotated by 90 degrees": ((True, True, False), (True, False, True)),
    "rotated by 180 degrees": ((False, True, True),),
}

FEWEST_IMAGES = 8
FEWEST_PIXELS = 64  # of boundary
MAX_SIZE = 512  # pixels along an axis; larger images are reduced


def edge_scores(image: Tensor, mask: Tensor, ignore_index: int | None = None) -> Tensor:
    """Score how well the boundaries of masks match the edges of their images, in eight orientations.

    A score is the mean rank, in [0, 1], of the image's gradient at the boundary pixels among all pixels: 1/2 by chance.
    Ranks depend neither on a few strong edges nor on brightness or contrast. No value is read back from a GPU.

    Args:
        image: `(batch, channels, *space)`, two space axes of equal length.
        mask: ids `(batch, *space)` or planes `(batch, classes, *space)`.
        ignore_index: label of the pixels to ignore.

    Returns:
        `(batch, 8)`: the unchanged mask, then in the order of `ORIENTATIONS`; NaN with too little boundary.

    >>> image = torch.zeros(1, 1, 64, 64)
    >>> image[..., 8:32, 8:24] = 1
    >>> scores = edge_scores(image, image[:, 0].long())
    >>> scores.shape, scores.argmax().item()
    (torch.Size([1, 8]), 0)
    """
    planes = mask.unsqueeze(1) if mask.ndim == 3 else mask
    boundary = boundary_pixels(planes, ignore_index).float().unsqueeze(1)
    factor = -(-image.shape[-1] // MAX_SIZE)
    image, boundary = F.avg_pool2d(image.float(), factor), F.max_pool2d(boundary, factor)
    rank, boundary = edge_ranks(image), boundary.squeeze(1)
    pixels = boundary.sum((1, 2))
    moved = [boundary, *(_move(boundary, *move) for row in ORIENTATIONS.values() for move in row)]
    scores = torch.stack([(rank * one).sum((1, 2)) / pixels for one in moved], 1)
    return scores.masked_fill((pixels < FEWEST_PIXELS).unsqueeze(1), torch.nan)


def misplaced(scores: Tensor) -> str | None:
    """Return the orientation that fits the images clearly better than the masks' own and all others, if there is one.

    Clearly: on average better than the best of the others by 0.03, and by three standard errors over the images.

    Args:
        scores: from `edge_scores`, `(images, 8)`.

    Returns:
        A key of `ORIENTATIONS`; `None` also with fewer than `FEWEST_IMAGES` images that have a score.

    >>> scores = torch.full((9, 8), 0.5)
    >>> scores[:, 1] = 0.8
    >>> misplaced(scores)
    "transposed: its rows are the image's columns"
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
    axes = [axis for axis, flip in ((-2, vertically), (-1, horizontally)) if flip]
    return plane.flip(axes) if axes else plane


def boundary_pixels(planes: Tensor, ignore_index: int | None = None) -> Tensor:
    """Return the pixels that have a neighbour with another label along some axis, bool `(batch, *space)`.

    Args:
        planes: `(batch, classes, *space)`; ids are one plane.
        ignore_index: label of the pixels to ignore: they are not neighbours.

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
    """Return the rank of each pixel's gradient within its image, in [0, 1], `(batch, *space)`.

    The gradient is the magnitude over all channels, after a mean over 3 pixels along each axis. Equal gradients share
    their mean rank.

    Args:
        image: `(batch, channels, *space)`, one to three space axes.

    >>> edge_ranks(torch.tensor([[[0.0, 0.0, 0.0, 3.0, 3.0, 3.0]]]))
    tensor([[0.1667, 0.5000, 0.8333, 0.8333, 0.5000, 0.1667]])
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
