"""Logits from the output of any network, and images padded and logits resized to fit it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def read_logits(output: Any) -> list[Tensor]:
    """Return the logits in the output of a segmentation network, the level to be scored first.

    Args:
        output: a tensor; a mapping with `"out"` (torchvision) or `"logits"`; an object with `.logits` (transformers);
            a list or tuple of tensors, finest first (deep supervision).

    Raises:
        ValueError: any other output.

    >>> import torch
    >>> [tuple(level.shape) for level in read_logits({"out": torch.zeros(1, 2, 4, 4)})]
    [(1, 2, 4, 4)]
    """
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        for key in ("out", "logits"):
            if key in output:
                return read_logits(output[key])
        raise ValueError(f'net returned a mapping without "out" or "logits": {sorted(map(str, output))}')
    if isinstance(getattr(output, "logits", None), Tensor):
        return [output.logits]
    if isinstance(output, (list, tuple)) and output and all(isinstance(level, Tensor) for level in output):
        return list(output)
    raise ValueError(
        'net must return a tensor, a mapping with "out" or "logits", an object with .logits or a list of tensors, '
        f"got {type(output).__name__}"
    )


def pad_to_multiple(image: Tensor, divisor: int) -> Tensor:
    """Pad an image at the end of each space axis, by repeating its edge, to a multiple of `divisor`.

    Args:
        image: `(batch, channels, *space)`, 1 to 3 space axes.
        divisor: in pixels: the stride of the network's coarsest features.

    >>> import torch
    >>> pad_to_multiple(torch.zeros(1, 3, 30, 65), 32).shape
    torch.Size([1, 3, 32, 96])
    """
    padding: list[int] = []
    for size in reversed(image.shape[2:]):
        padding += [0, -size % divisor]
    return F.pad(image, padding, mode="replicate") if any(padding) else image


def resize_to(logits: Tensor, space: tuple[int, ...]) -> Tensor:
    """Resize the logits of a coarser output to `space`, by linear interpolation.

    >>> import torch
    >>> resize_to(torch.tensor([[[0.0, 4.0]]]), (4,))
    tensor([[[0., 1., 3., 4.]]])
    """
    if tuple(logits.shape[2:]) == space:
        return logits
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(space)]
    return F.interpolate(logits, size=space, mode=mode, align_corners=False)


def crop_to(logits: Tensor, space: tuple[int, ...]) -> Tensor:
    """Undo `pad_to_multiple`: keep the first `space` pixels along the axes.

    >>> import torch
    >>> crop_to(torch.zeros(1, 2, 32, 96), (30, 65)).shape
    torch.Size([1, 2, 30, 65])
    """
    for axis, size in enumerate(space, start=2):
        logits = logits.narrow(axis, 0, size)
    return logits
