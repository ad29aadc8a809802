"""An image with its predicted classes drawn over it, as pixels."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightning_dice.io import write_atomically
from lightning_dice.plotting.colors import class_colors


def mask_overlay(
    image: Tensor,
    labels: Tensor,
    classes: int,
    activation: Literal["sigmoid", "softmax"],
    background: Collection[int] = (),
) -> NDArray[np.uint8]:
    """Draw each class over an image in a colour of its own.

    Args:
        image: `(channels, height, width)`; the first three channels are shown, or the first in gray.
        labels: class ids `(height, width)` (softmax) or planes `(classes, height, width)` (sigmoid).
        classes: their number.
        activation: which of the two forms `labels` has.
        background: indices of classes that are not drawn.

    Returns:
        RGB pixels `(height, width, 3)`.

    >>> import torch
    >>> pixels = mask_overlay(torch.rand(1, 4, 6), torch.ones(4, 6).int(), 2, "softmax", [0])
    >>> pixels.shape, pixels.dtype
    ((4, 6, 3), dtype('uint8'))
    """
    shown = image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    low, high = np.percentile(shown.numpy(), [1, 99])
    canvas = ((shown - low) / max(float(high - low), 1e-6)).clamp(0, 1).permute(1, 2, 0).numpy() * 255
    found = labels.cpu().numpy()
    for index, color in enumerate(class_colors(classes, skip=list(background))):
        if index not in background:
            where = (found == index) if activation == "softmax" else found[index]
            canvas[where] = 0.5 * canvas[where] + 0.5 * np.array(color)
    pixels: NDArray[np.uint8] = canvas.round().astype(np.uint8)
    return pixels


def slice_with_most_foreground(image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the slice along the last axis that has most foreground, with the second axis pointing up.

    Args:
        image: `(channels, *space)`; resampled to the labels' size if its own differs.
        labels: `(*space)` or `(classes, *space)`, of three space axes.
    """
    size = labels.shape[-3:]
    if image.shape[1:] != size:
        image = F.interpolate(image[None], size=size, mode="nearest")[0]
    most = int((labels != 0).flatten(0, -2).sum(0).argmax())
    image, labels = image[..., most], labels[..., most]
    return image.transpose(-1, -2).flip(-2), labels.transpose(-1, -2).flip(-2)


def write_png(path: Path, pixels: NDArray[Any]) -> None:
    """Write pixels as a PNG file, whole or not at all."""
    from PIL import Image

    write_atomically(path, lambda part: Image.fromarray(pixels).save(part, format="PNG"))
