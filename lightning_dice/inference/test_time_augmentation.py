"""The mean of predictions: over flips of an image, and over networks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dice.argument_checks import check_class_indices


class Mirroring:
    """Test-time augmentation: each image also mirrored, along every combination of some axes.

    Args:
        axes: of space, from 0; n of them make 2^n predictions. None by default: the image as it is.

    Raises:
        ValueError: an axis below 0 or named twice; in a call, one that the image does not have.

    >>> Mirroring([0, 1]).combinations
    [(), (0,), (1,), (0, 1)]
    """

    def __init__(self, axes: Iterable[int] = ()) -> None:
        try:
            self.axes = check_class_indices("axes", axes)
        except ValueError:
            raise ValueError(
                f"mirror_axes must be distinct space axes from 0 on, such as [0, 1], got {axes!r}"
            ) from None

    def __repr__(self) -> str:
        return f"Mirroring({list(self.axes)})"

    @property
    def combinations(self) -> list[tuple[int, ...]]:
        """The axes of each flip, that of none first."""
        return [chosen for number in range(len(self.axes) + 1) for chosen in combinations(self.axes, number)]

    def check(self, space_axes: int) -> None:
        """See that the image has the axes."""
        if any(axis >= space_axes for axis in self.axes):
            raise ValueError(f"mirror_axes must be space axes from 0 to {space_axes - 1}, got {list(self.axes)}")


def flipped(batch: Tensor, axes: Sequence[int]) -> Tensor:
    """`(batch, channels, *space)`, mirrored along space axes."""
    return batch.flip([axis + 2 for axis in axes]) if axes else batch


def mean_logits(predictions: Iterable[Tensor], activation: str) -> Tensor:
    r"""Logits of the mean of the probabilities that logits stand for.

    With softmax they are :math:`\log \bar p_c`, with sigmoid :math:`\log \bar p - \log (1 - \bar p)`; both by way of
    logarithms, so that a probability next to 0 or 1 keeps its digits.

    Args:
        predictions: logits `(batch, classes, *space)`, one by one: three are in memory at a time.
        activation: `"softmax"` or `"sigmoid"`.

    >>> mean_logits([torch.tensor([[0.0]]), torch.tensor([[200.0]])], "sigmoid").sigmoid()
    tensor([[0.7500]])
    """
    total = rest = None
    number = 0
    for logits in predictions:
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        number += 1
        log_p = logits.log_softmax(1) if activation == "softmax" else F.logsigmoid(logits)
        total = log_p if total is None else torch.logaddexp(total, log_p)
        if activation == "sigmoid":
            log_q = F.logsigmoid(-logits)
            rest = log_q if rest is None else torch.logaddexp(rest, log_q)
    if total is None:
        raise ValueError("predictions must be at least one, got none")
    return total - math.log(number) if rest is None else total - rest
