"""What a class counts that is absent: the one policy that losses and metrics share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_dice.kernels import OverlapSums

AbsentRule = Literal["smooth", "skip", "penalize"]


@dataclass(frozen=True)
class AbsentPolicy:
    """Decides what a class counts in an image (or in the pooled batch) whose target does not have it.

    | | target has none, prediction has some | neither has any |
    |---|---|---|
    | `"smooth"` | the smoothed formula: with `smooth=0` a score of 0 | the formula: 1; left out with `smooth=0` |
    | `"skip"` | left out of the mean | left out of the mean |
    | `"penalize"` | loss: the mean of -log(1 - p); metric: as `"smooth"` | as `"smooth"` |

    Whatever the rule, a class of which every pixel is ignored is left out, and so is a score of 0/0.

    The smoothed formula hardly moves the prediction on an empty image: the gradient of 1 - s/(Σp + s) falls with the
    square of Σp. The penalty is the cross-entropy of the class being absent: a pixel is pushed down by p / count.

    Args:
        rule: one of the above.

    Raises:
        ValueError: an unknown rule.
    """

    rule: AbsentRule = "smooth"

    def __post_init__(self) -> None:
        if self.rule not in get_args(AbsentRule):
            raise ValueError(f"absent must be one of {', '.join(map(repr, get_args(AbsentRule)))}, got {self.rule!r}")

    def kept(self, score: Tensor, sums: OverlapSums) -> Tensor:
        """Which entries of a score or a loss, `(images, classes)`, enter a mean.

        One of 0/0 does not; one that is NaN because a logit is does, and makes the mean NaN: it must be seen.
        """
        broken = ~(sums.overlap + sums.predicted).isfinite()
        kept = (sums.count > 0) & (~score.isnan() | broken)
        return kept & ((sums.actual > 0) | broken) if self.rule == "skip" else kept

    def loss(self, loss: Tensor, sums: OverlapSums) -> Tensor:
        """The loss `(images, classes)` with the penalty in the place of absent classes, where the rule has one."""
        if self.rule != "penalize" or sums.absent_nll is None:
            return loss
        return torch.where(sums.actual > 0, loss, sums.absent_nll / sums.count.clamp(min=torch.finfo(loss.dtype).tiny))
