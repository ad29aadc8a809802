"""Sums of each region of an image instead of the whole image, for lesion-wise losses."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dice.kernels.pixels import Pixels
from lightning_dice.kernels.reference import accumulate
from lightning_dice.kernels.sums import OverlapSums, RequiredSums, wide_dtype
from lightning_dice.library_internals.torch import is_vmapped


def region_sums(
    pixels: Pixels,
    regions: Tensor,
    required: RequiredSums = RequiredSums(),  # noqa: B008  (frozen)
) -> tuple[OverlapSums, Tensor]:
    """Compute the sums of each region of each class in each image.

    Each pixel is added once: to its region or, if it belongs to all regions of its class and image, to a shared sum,
    which is then added to each of them. Class ids are never expanded to one-hot planes: outside its own class, a pixel
    contributes only to `predicted` and `count`.

    Args:
        pixels: logits and target.
        regions: integers `(images, classes, pixels)`. The regions of each class in each image are numbered from 0, and
            a pixel with a negative number belongs to all of them.
        required: sums beyond overlap, predicted, actual and count; squares, minimum and absent_nll are supported.

    Returns:
        The sums, `(regions, 1)`, ordered by image, then class, then number; and the class of each region,
        `(regions,)`. In float64 (float32 on devices without it), differentiable twice in the logits.

    Raises:
        ValueError: another sum is required, or `torch.func.vmap` hides an axis of regions.

    >>> from lightning_dice.kernels import checked_pixels
    >>> probs, mask = torch.tensor([[[1.0, 0.5, 0.5, 0.5]]]), torch.tensor([[[1, 0, 0, 1]]])
    >>> sums, _ = region_sums(checked_pixels(probs, mask, activation=None), torch.tensor([[[0, 0, 1, 1]]]))
    >>> sums.predicted.squeeze(1).tolist(), sums.overlap.squeeze(1).tolist()
    ([1.5, 1.0], [1.0, 0.5])
    """
    if required.nll or required.all_nll or required.focal:
        raise ValueError(f"sums required of regions must be squares, minimum or absent_nll, got {required}")
    if is_vmapped(regions):
        raise ValueError("a loss of lesions cannot be vmapped, as their number is a shape: call it in a loop instead")
    accumulators = _Accumulators(regions)
    count = accumulators.add(torch.ones_like(pixels.logits[:1, :1]) if pixels.weight is None else pixels.weight)
    annotated = None if pixels.annotated is None else pixels.annotated.flatten()[accumulators.group].unsqueeze(1)
    sums = accumulate(pixels, required, accumulators.add, count, annotated)
    return sums, accumulators.group % regions.shape[1]


class _Accumulators:
    """The accumulator to which each pixel of each class is added: one for each region, then one for each group.

    A group is a class in an image. Its accumulator takes the pixels that belong to all of its regions.

    Attributes:
        index: accumulator of each pixel, `(images, classes, pixels)`.
        group: group of each region, `(regions,)`.
    """

    def __init__(self, regions: Tensor) -> None:
        images, classes = regions.shape[:2]
        # An image without pixels has no regions.
        greatest = regions.amax(2) if regions.shape[2] else regions.new_full((images, classes), -1)
        number = (greatest + 1).long().flatten()
        ends = number.cumsum(0)
        # The number of regions is a shape, and the only value that a GPU must be stalled for.
        self.regions = int(ends[-1]) if ends.numel() else 0
        groups = torch.arange(images * classes, device=regions.device)
        self.group = groups.repeat_interleave(number, output_size=self.regions)
        first = (ends - number).view(images, classes, 1)
        self.index = torch.where(regions >= 0, regions + first, groups.view(images, classes, 1) + self.regions)

    def add(self, values: Tensor, ids: Tensor | None = None) -> Tensor:
        """Sum `(images, classes, pixels)` to `(regions, 1)`; with ids, add each pixel only to its own class."""
        index = self.index if ids is None else self.index.gather(1, ids)
        images, classes = self.index.shape[:2]
        zeros = values.new_zeros(self.regions + images * classes, dtype=wide_dtype(values))
        # float64, as an accumulator may take millions of terms.
        summed = zeros.scatter_add(0, index.flatten(), values.to(zeros.dtype).expand(index.shape).flatten())
        return (summed[: self.regions] + summed[self.regions :][self.group]).unsqueeze(1)
