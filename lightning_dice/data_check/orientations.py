"""The orientations of an image, and how well a mask's outline fits its image in each of them."""

from __future__ import annotations

import itertools
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightning_dice.data_check.task import Task
from lightning_dice.functional.orientation import boundary_pixels, edge_ranks

MIN_OUTLINE = 64  # pixels
GRID = {1: 4096, 2: 384, 3: 64}  # pixels along an axis: larger images are reduced

Orientation: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]  # the order of the axes, and which are then flipped


def orientations(axes: int) -> list[Orientation]:
    """Return all ways to permute and flip the axes of an image; the first leaves it unchanged.

    >>> len(orientations(2)), len(orientations(3)), orientations(2)[1]
    (8, 48, ((0, 1), (1,)))
    """
    flips = [tuple(axis for axis in range(axes) if chosen[axis]) for chosen in itertools.product((0, 1), repeat=axes)]
    return [(order, flipped) for order in itertools.permutations(range(axes)) for flipped in flips]


def reorient(array: Any, orientation: Orientation) -> Any:
    """Permute the axes of an array, then flip them.

    >>> reorient(np.array([[1, 2], [3, 4]]), ((1, 0), (1,))).tolist()
    [[3, 1], [4, 2]]
    """
    order, flipped = orientation
    array = array.transpose(order)
    return np.flip(array, flipped) if flipped else array


def describe_orientation(orientation: Orientation) -> tuple[str, str]:
    """Describe what happened to a mask that `reorient` restores, and give code that does the same.

    >>> describe_orientation(((1, 0), ()))
    ('transposed, with rows and columns swapped', 'mask.T')
    >>> describe_orientation(((0, 2, 1), (2,)))
    ('with axes permuted (0, 2, 1) and flipped along axis 2', 'mask.transpose(0, 2, 1)[:, :, ::-1]')
    """
    order, flipped = orientation
    axes = len(order)
    if axes == 2:
        return _DESCRIPTIONS_2D[orientation]
    permuted = order != tuple(range(axes))
    words = [f"with axes permuted {order}"] if permuted else []
    words += [f"flipped along ax{'e' if len(flipped) > 1 else 'i'}s {', '.join(map(str, flipped))}"] if flipped else []
    code = f"mask.transpose{order}" if permuted else "mask"
    if flipped:
        code += f"[{', '.join('::-1' if axis in flipped else ':' for axis in range(axes))}]"
    return " and ".join(words), code


_DESCRIPTIONS_2D: dict[Orientation, tuple[str, str]] = {
    ((0, 1), ()): ("unchanged", "mask"),
    ((0, 1), (0,)): ("upside down", "mask[::-1]"),
    ((0, 1), (1,)): ("mirrored left to right", "mask[:, ::-1]"),
    ((0, 1), (0, 1)): ("rotated by 180 degrees", "mask[::-1, ::-1]"),
    ((1, 0), ()): ("transposed, with rows and columns swapped", "mask.T"),
    ((1, 0), (0, 1)): ("mirrored along its rising diagonal", "mask[::-1, ::-1].T"),
    ((1, 0), (0,)): ("rotated by 90 degrees clockwise", "numpy.rot90(mask)"),
    ((1, 0), (1,)): ("rotated by 90 degrees counter-clockwise", "numpy.rot90(mask, -1)"),
}


def edges_and_outline(image: Tensor, mask: Tensor, task: Task) -> tuple[NDArray[np.float32], NDArray[np.bool_]] | None:
    """Return the ranks of an image's gradient, and its mask's outline, on a grid of at most `GRID` pixels per axis.

    Args:
        image: finite, `(channels, *space)`.
        mask: ids `(*space)` or planes `(classes, *space)`.
        task: meaning of the mask.

    Returns:
        Both `(*grid)`; `None` if there is too little outline to judge.
    """
    axes = image.ndim - 1
    layers = (mask if mask.ndim == image.ndim else mask.unsqueeze(0)).unsqueeze(0)
    if layers.is_floating_point():
        layers = layers > 0.5
    outline = boundary_pixels(layers, None if layers.dtype == torch.bool else task.ignore_index).float()
    size = tuple(outline.shape[1:])
    if tuple(image.shape[1:]) != size:
        image = F.interpolate(image.unsqueeze(0), size=size, mode="nearest")[0]
    factors = tuple(-(-length // GRID[axes]) for length in size)
    if max(factors) > 1:
        average: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[axes - 1]
        maximum: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[axes - 1]
        image = average(image.unsqueeze(0), factors, ceil_mode=True)[0]
        outline = maximum(outline.unsqueeze(0), factors, ceil_mode=True)[0]
    where = outline[0].numpy() > 0
    if np.count_nonzero(where) < MIN_OUTLINE or where.all():
        return None
    return edge_ranks(image.unsqueeze(0))[0].numpy(), where


def measure_alignment(image: Tensor, mask: Tensor, task: Task) -> NDArray[np.float32]:
    """Return the mean rank of the image's gradient along the mask's outline, in each of `orientations`.

    NaN in orientations that change the size, and in all of them if there is too little outline.

    >>> mask = torch.zeros(64, 64, dtype=torch.int64)
    >>> mask[8:40, 8:24] = 1
    >>> alignment = measure_alignment(mask[None].float(), mask.flip(0), Task(["background", "bar"]))
    >>> describe_orientation(orientations(2)[int(alignment.argmax())])
    ('upside down', 'mask[::-1]')
    """
    mask_size = tuple(mask.shape[mask.ndim - image.ndim + 1 :])
    possible = orientations(image.ndim - 1)
    alignment = np.full(len(possible), np.nan, np.float32)
    found = edges_and_outline(image, mask, task)
    if found is not None:
        ranks, outline = found
        for index, orientation in enumerate(possible):
            if tuple(mask_size[axis] for axis in orientation[0]) == mask_size:
                alignment[index] = ranks[reorient(outline, orientation)].mean()
    return alignment
