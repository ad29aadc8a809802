"""Mirrored copies of an image, and the mean of several predictions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dice.argument_checks import check_class_indices


class Mirroring:
    """Test-time augmentation: predict an image and its mirror images along every combination of some axes.

    Args:
        axes: space axes, from 0; n of them make 2^n predictions. By default the image is not mirrored.

    Raises:
        ValueError: an axis below 0 or named twice; in `check`, one that the image does not have.

    >>> Mirroring([0, 1]).combinations
    [(), (0,), (1,), (0, 1)]
    """

    def __init__(self, axes: Iterable[int] = ()) -> None:
        try:
            self.axes = check_class_indices("axes", axes)
        except ValueError:
            raise ValueError(
                f"mirror_axes must be distinct space axes, counted from 0, such as [0, 1], got {axes!r}"
            ) from None

    def __repr__(self) -> str:
        return f"Mirroring({list(self.axes)})"

    @property
    def combinations(self) -> list[tuple[int, ...]]:
        """The axes that each prediction mirrors, starting with none: the image itself."""
        return [axes for number in range(len(self.axes) + 1) for axes in combinations(self.axes, number)]

    def check(self, space_axes: int) -> None:
        """Check that an image of this many space axes has all of `axes`."""
        if any(axis >= space_axes for axis in self.axes):
            raise ValueError(f"mirror_axes must be space axes from 0 to {space_axes - 1}, got {list(self.axes)}")


def mirror(batch: Tensor, axes: Sequence[int]) -> Tensor:
    """Mirror images `(batch, channels, *space)` along space axes.

    >>> mirror(torch.tensor([[[1, 2, 3]]]), [0])
    tensor([[[3, 2, 1]]])
    """
    return batch.flip([axis + 2 for axis in axes]) if axes else batch


def mean_logits(predictions: Iterable[Tensor], activation: str) -> Tensor:
    r"""Return the logits of the mean probabilities of several predictions.

    They are :math:`\log \bar p_c` with softmax, and :math:`\log \bar p - \log (1 - \bar p)` with sigmoid. Both are
    computed from logarithms, so that probabilities near 0 and 1 keep their digits.

    Args:
        predictions: logits `(batch, classes, *space)`; an iterator keeps three of them in memory at a time.
        activation: `"softmax"` or `"sigmoid"`.

    Raises:
        ValueError: there are no predictions.

    >>> mean_logits([torch.tensor([[0.0]]), torch.tensor([[200.0]])], "sigmoid").sigmoid()
    tensor([[0.7500]])
    """
    total = rest = None
    count = 0
    for logits in predictions:
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        count += 1
        log_p = logits.log_softmax(1) if activation == "softmax" else F.logsigmoid(logits)
        total = log_p if total is None else torch.logaddexp(total, log_p)
        if activation == "sigmoid":
            log_q = F.logsigmoid(-logits)
            rest = log_q if rest is None else torch.logaddexp(rest, log_q)
    if total is None:
        raise ValueError("predictions must be at least one, got none")
    return total - math.log(count) if rest is None else total - rest
