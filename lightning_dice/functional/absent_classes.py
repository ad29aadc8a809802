"""Policy for classes that are absent from the target, shared by losses and metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_dice.kernels import OverlapSums

AbsentRule = Literal["smooth", "skip", "penalize"]


@dataclass(frozen=True)
class AbsentPolicy:
    """How to count a class in an image (or in the pooled batch) whose target does not have it.

    | | target has none, prediction has some | neither has any |
    |---|---|---|
    | `"smooth"` | the smoothed formula: with `smooth=0` a score of 0 | the formula: 1; left out with `smooth=0` |
    | `"skip"` | left out of the mean | left out of the mean |
    | `"penalize"` | loss: the mean of -log(1 - p); metric: as `"smooth"` | as `"smooth"` |

    With every rule, a class whose pixels are all ignored is left out, and so is a score of 0/0. A sigmoid or softmax is
    never 0, so a network's prediction has some of every class, however low its logits are; hard predictions, and
    probabilities that are passed with `activation=None`, may have none.

    The smoothed formula hardly moves the prediction on an empty image, as the gradient of 1 - s/(Σp + s) falls with the
    square of Σp. The penalty is the cross-entropy of the class being absent; its gradient in a logit is p / count.

    Args:
        rule: `"smooth"`, `"skip"` or `"penalize"`.

    Raises:
        ValueError: an unknown rule.

    >>> from lightning_dice.functional import dice_score, hard_sums
    >>> sums = hard_sums(torch.tensor([[[9.0, -9.0]]]), torch.tensor([[[0, 0]]]))  # a false positive
    >>> [AbsentPolicy(rule).kept(dice_score(sums), sums).item() for rule in ("smooth", "skip")]
    [True, False]
    """

    rule: AbsentRule = "smooth"

    def __post_init__(self) -> None:
        if self.rule not in get_args(AbsentRule):
            raise ValueError(f"absent must be one of {', '.join(map(repr, get_args(AbsentRule)))}, got {self.rule!r}")

    def kept(self, score: Tensor, sums: OverlapSums) -> Tensor:
        """Return which entries of a score or a loss, `(images, classes)`, enter a mean.

        NaN from 0/0 is left out; NaN from a NaN logit is kept, so that it shows in the mean.
        """
        broken = ~(sums.overlap + sums.predicted).isfinite()
        kept = (sums.count > 0) & (~score.isnan() | broken)
        return kept & ((sums.actual > 0) | broken) if self.rule == "skip" else kept

    def loss(self, loss: Tensor, sums: OverlapSums) -> Tensor:
        """Replace the loss of absent classes by the penalty if the rule is `"penalize"`; `(images, classes)`."""
        if self.rule != "penalize" or sums.absent_nll is None:
            return loss
        return torch.where(sums.actual > 0, loss, sums.absent_nll / sums.count.clamp(min=torch.finfo(loss.dtype).tiny))
