"""The sums themselves, as a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def valid_pixels(target: Tensor, ignore_index: int | None) -> Tensor | None:
    """Where the target does not hold the ignored label; `None` if that is everywhere.

    A label that the target's dtype cannot hold is nowhere: compared with uint8, torch takes -1 for 255.
    """
    if ignore_index is None or target.dtype == torch.bool:
        return None
    if not target.is_floating_point():
        limits = torch.iinfo(target.dtype)
        if not limits.min <= ignore_index <= limits.max:
            return None
    return target != ignore_index


@dataclass(frozen=True)
class OverlapSums:
    r"""Sums over the pixels of each class in each image, every one of shape `(images, classes)`.

    With the pixel weight `w` (0 at ignored pixels), the probability `p` and the target `t`:

    Attributes:
        overlap: :math:`\sum w p t`.
        predicted: :math:`\sum w p`, or :math:`\sum w p^2` where squares were asked for.
        actual: :math:`\sum w t`, or :math:`\sum w t^2`.
        count: :math:`\sum w`, in pixels.
        nll: :math:`\sum w\,(-\log p)` of the true class (`softmax`), or the binary cross-entropy (`sigmoid`);
            `None` unless asked for.
        absent_nll: :math:`\sum w\,(-\log(1 - p))`, the cross-entropy of a class that should not be there;
            `None` unless asked for.
    """

    overlap: Tensor
    predicted: Tensor
    actual: Tensor
    count: Tensor
    nll: Tensor | None = None
    absent_nll: Tensor | None = None

    @property
    def fields(self) -> tuple[Tensor, ...]:
        """The sums that were asked for, in the order above."""
        given = (self.overlap, self.predicted, self.actual, self.count, self.nll, self.absent_nll)
        return tuple(field for field in given if field is not None)

    def map(self, function: Callable[[Tensor], Tensor]) -> OverlapSums:
        """The same sums with `function` applied to each tensor."""
        return OverlapSums(
            function(self.overlap),
            function(self.predicted),
            function(self.actual),
            function(self.count),
            None if self.nll is None else function(self.nll),
            None if self.absent_nll is None else function(self.absent_nll),
        )
