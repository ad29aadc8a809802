"""MONAI's transforms as augmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_dice.extras import require


class MonaiAugment:
    """Augments image and mask with MONAI's dictionary transforms, for any number of space axes.

    The transforms get `{"image": (channels, *space), "mask": (planes, *space)}`; a map of ids is one plane. MONAI's own
    random state is seeded from torch's in each call, so it follows the datamodule's seeds. As in any augmentation, the
    mask holds 1 + label, and 0 where it is ignored: transforms that move voxels must sample the mask by nearest
    neighbour (`mode: [bilinear, nearest]`) and fill with 0 (`padding_mode: [border, zeros]`), so that voxels from
    outside the image are ignored.

    Args:
        transforms: applied in order, such as `monai.transforms.RandFlipd(keys=["image", "mask"], prob=0.5)`.

    >>> from monai.transforms import RandFlipd
    >>> augment = MonaiAugment([RandFlipd(keys=["image", "mask"], prob=1.0, spatial_axis=0)])
    >>> image, mask = augment(torch.rand(1, 2, 3, 3), torch.arange(18, dtype=torch.int32).view(2, 3, 3))
    >>> mask[:, 0, 0], mask.dtype
    (tensor([9, 0], dtype=torch.int32), torch.int32)
    """

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        require("monai", needed_by=type(self).__name__)
        from monai.transforms.compose import Compose  # Takes seconds; other data need not wait for it.

        self.transforms = list(transforms)
        self._compose: Any = Compose(self.transforms)

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Augment an image `(channels, *space)`, float, and its mask `(*space)` or `(classes, *space)`, integers."""
        self._compose.set_random_state(seed=int(torch.randint(2**32, ())))
        ids = mask.ndim < image.ndim
        planes = mask.as_subclass(Tensor)
        planes = planes[None] if ids else planes
        result = self._compose({"image": image.as_subclass(Tensor), "mask": planes})
        changed, labels = (_as_plain_tensor(result[name]) for name in ("image", "mask"))
        labels = labels.round().to(mask.dtype) if labels.is_floating_point() else labels.to(mask.dtype)
        return changed.to(image.dtype).contiguous(), (labels[0] if ids else labels).contiguous()

    def __repr__(self) -> str:
        return f"MonaiAugment({', '.join(type(transform).__name__ for transform in self.transforms)})"


def _as_plain_tensor(values: Tensor) -> Tensor:
    """Drop MONAI's affine and history, which a batch does not need."""
    return values.as_tensor() if hasattr(values, "as_tensor") else values
