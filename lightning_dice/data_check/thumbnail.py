"""Thumbnails of cases: the image beside the same image with its mask painted over it."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor

from lightning_dice.data_check.task import Task, class_plane, ignored_pixels
from lightning_dice.data_check.texture import pool_to_size
from lightning_dice.functional.orientation import boundary_pixels
from lightning_dice.plotting.colors import IGNORED, class_colors, parse_color

THUMBNAIL = 112  # pixels, of the longer side


def draw_thumbnail(image: Tensor, mask: Tensor, task: Task, longest: int = THUMBNAIL) -> bytes:
    """Draw a case as a JPEG: the image on the left, and on the right the same image with its mask in colour.

    Of a volume, the slice along the last axis with the most foreground.

    Args:
        image: finite, `(channels, *space)`.
        mask: ids `(*space)` or planes `(classes, *space)`.
        task: names and excluded classes.
        longest: pixels of the longer side of each of the two; smaller images are not enlarged.
    """
    from PIL import Image

    image, mask = _to_2d(image, mask, task)
    planes = torch.stack([class_plane(mask, i, 2, task) for i in range(len(task.classes))])
    ignored = ignored_pixels(mask, task)
    ignored = (ignored.all(0) if ignored.ndim == 3 else ignored).unsqueeze(0)
    scale = min(1.0, longest / max(planes.shape[1:]))
    size = tuple(max(1, round(length * scale)) for length in planes.shape[1:])
    colors = image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    low, high = np.percentile(colors[:, :: max(1, colors.shape[1] // 512), :: max(1, colors.shape[2] // 512)], [1, 99])
    colors = pool_to_size(((colors - low) / max(float(high - low), 1e-6)).clamp(0, 1), size, "avg")
    plain = colors.permute(1, 2, 0).numpy() * 255
    painted = plain.copy()
    layers = [(pool_to_size(ignored.float(), size, "avg")[0].numpy() > 0.5, parse_color(IGNORED))]
    palette = class_colors(len(task.classes), skip=[i for i in range(len(task.classes)) if i not in task.foreground])
    # By the maximum, so that thin structures stay visible.
    layers += [
        (pool_to_size(planes[i : i + 1].float(), size, "max")[0].numpy() > 0, palette[i]) for i in task.foreground
    ]
    for where, color in layers:
        painted[where] = 0.5 * painted[where] + 0.5 * np.array(color)
    for where, color in layers[1:]:
        rim = boundary_pixels(torch.from_numpy(where)[None, None])[0].numpy() & where
        painted[rim] = color
    gap = np.full((plain.shape[0], 2, 3), 255.0)
    picture = np.concatenate([plain, gap, painted], 1).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=72)
    return file.getvalue()


def _to_2d(image: Tensor, mask: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """Return the slice of a volume with the most foreground; a signal becomes 32 equal rows."""
    axes = image.ndim - 1
    if axes == 3:
        total = sum(class_plane(mask, i, axes, task).sum((0, 1)) for i in task.foreground)
        index = int(total.argmax()) if isinstance(total, Tensor) and bool(total.any()) else mask.shape[-1] // 2
        # The image may be resampled: take its slice at the same height.
        level = min(image.shape[-1] - 1, int((index + 0.5) * image.shape[-1] / mask.shape[-1]))
        return image[..., level], mask[..., index]
    if axes == 1:
        image, mask = (part.unsqueeze(-2).expand(*part.shape[:-1], 32, -1) for part in (image, mask))
    return image, mask
