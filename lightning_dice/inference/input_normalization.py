"""Normalization of images as they are read, for `SegmentationModule.segment`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InputNormalization:
    """Convert stored images to the input that a network was trained on.

    Args:
        transform: normalizes one image `(channels, *space)` of floats; `None`: no normalization.
        max_value: the stored value that becomes 1, for integers; by default the largest of their type.
        unavailable: names of a normalization that cannot be computed here; every call then raises.

    >>> InputNormalization()(torch.full((1, 1, 1, 2), 255, dtype=torch.uint8))
    tensor([[[[1., 1.]]]])
    """

    transform: Callable[[Tensor], Tensor] | None = None
    max_value: float | None = None
    unavailable: str | Sequence[str] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Return normalized floats.

        Args:
            images: `(batch, channels, *space)`, floats, uint8 or uint16.

        Raises:
            ValueError: images of another type or shape, or a normalization that is not available.
        """
        if self.unavailable:
            raise ValueError(
                f"images of this run are normalized by {self.unavailable}, which the module cannot compute: use the "
                "predict command, or normalize them and call predict_step"
            )
        if images.dtype in (torch.uint8, torch.uint16):
            images = images.float() / (self.max_value or torch.iinfo(images.dtype).max)
        if not images.is_floating_point() or images.ndim < 3:
            raise ValueError(
                f"images must be (batch, channels, *space) of floats, uint8 or uint16, got {tuple(images.shape)} of "
                f"{images.dtype}"
            )
        return images if self.transform is None else torch.stack([self.transform(image) for image in images])
