"""MONAI's transforms as the datamodule's augmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class MonaiAugment:
    """MONAI's dictionary transforms, of any number of space axes, on image and mask.

    They get `{"image": (channels, *space), "mask": (planes, *space)}`: a map of ids has one plane. Their random state,
    which MONAI keeps apart from torch's, is seeded by torch's in each call: the datamodule's seeds hold for them too.
    The mask comes in as it does to any augmentation, 1 + label, and 0 where it is ignored: a transform that moves
    voxels must look it up (`mode: [bilinear, nearest]`) and fill with 0 (`padding_mode: [border, zeros]`), so that what
    comes from outside is ignored.

    Args:
        transforms: called in turn, such as `monai.transforms.RandFlipd(keys=["image", "mask"], prob=0.5)`.

    >>> from monai.transforms import RandFlipd
    >>> augment = MonaiAugment([RandFlipd(keys=["image", "mask"], prob=1.0, spatial_axis=0)])
    >>> image, mask = augment(torch.rand(1, 2, 3, 3), torch.arange(18, dtype=torch.int32).view(2, 3, 3))
    >>> mask[:, 0, 0], mask.dtype
    (tensor([9, 0], dtype=torch.int32), torch.int32)
    """

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        from monai.transforms.compose import Compose  # It takes seconds, which other data need not wait for.

        self.transforms = list(transforms)
        self._compose: Any = Compose(self.transforms)

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Change an image `(channels, *space)`, float, and its mask `(*space)` or `(classes, *space)`, integers."""
        self._compose.set_random_state(seed=int(torch.randint(2**32, ())))
        ids = mask.ndim < image.ndim
        planes = mask.as_subclass(Tensor)
        planes = planes[None] if ids else planes
        given = {"image": image.as_subclass(Tensor), "mask": planes}
        result = self._compose(given)
        changed, labels = (_plain(result[name]) for name in ("image", "mask"))
        labels = labels.round().to(mask.dtype) if labels.is_floating_point() else labels.to(mask.dtype)
        return changed.to(image.dtype).contiguous(), (labels[0] if ids else labels).contiguous()

    def __repr__(self) -> str:
        return f"MonaiAugment({', '.join(type(transform).__name__ for transform in self.transforms)})"


def _plain(values: Tensor) -> Tensor:
    """Without MONAI's affine and history, which a batch has no use for."""
    return values.as_tensor() if hasattr(values, "as_tensor") else values
