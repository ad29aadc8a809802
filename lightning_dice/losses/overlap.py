"""What every overlap loss shares: its settings, and the way from sums to one number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_dice.functional import AbsentPolicy, AbsentRule, Pool, pool_sums, weighted_mean
from lightning_dice.functional.pooling import gradient_shares
from lightning_dice.kernels import Activation, OverlapSums, overlap_sums
from lightning_dice.settings import class_indices, class_weights_tensor, kept_classes, one_of, smooth_pair

Reduction = Literal["mean", "sum", "none"]


class OverlapLoss(nn.Module):
    """Base of the overlap losses: a subclass says what the score of a class is, given its sums.

    Args:
        activation: `"sigmoid"`, `"softmax"`, or `None` where the input is probabilities.
        smooth: in pixels, added to numerator and denominator; a pair sets them apart.
        pool: what shares one ratio: `"image"`, each image its own; `"batch"`, all images of the batch, on all ranks;
            `"all"`, all images and all classes.
        squared: square probabilities and target in the denominator.
        exclude_classes: indices of classes that do not count, such as `[0]` for the background.
        class_weights: one for each class, excluded ones too; only their ratios matter, so they never scale the loss.
        ignore_index: pixels whose target holds this value count as nothing.
        absent: what a class counts that the target does not have: `"smooth"`, `"skip"` or `"penalize"`, see
            `lightning_dice.functional.AbsentPolicy`.
        reduction: `"mean"` over images and classes; `"sum"` of the same; `"none"`, `(images, classes)` with NaN for
            what is left out.
        across_ranks: in a distributed training, give what one process with the whole batch would give.

    Raises:
        ValueError: a setting outside its range; in a call, a shape that would broadcast.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        *,
        activation: Activation = "sigmoid",
        smooth: float | Sequence[float] = 1.0,
        pool: Pool = "batch",
        squared: bool = False,
        exclude_classes: Iterable[int] = (),
        class_weights: Iterable[float] | Tensor | None = None,
        ignore_index: int | None = None,
        absent: AbsentRule | AbsentPolicy = "smooth",
        reduction: Reduction = "mean",
        across_ranks: bool = True,
    ) -> None:
        super().__init__()
        self.activation: Activation = one_of("activation", activation, ("sigmoid", "softmax", None))
        self.smooth = smooth_pair(smooth)
        self.pool: Pool = one_of("pool", pool, Pool)
        self.squared = squared
        self.exclude_classes = class_indices("exclude_classes", exclude_classes)
        self.ignore_index = ignore_index
        self.absent = absent if isinstance(absent, AbsentPolicy) else AbsentPolicy(absent)
        self.reduction: Reduction = one_of("reduction", reduction, Reduction)
        self.across_ranks = across_ranks
        weights = class_weights_tensor(class_weights)
        if weights is not None and pool == "all":
            raise ValueError('class_weights need a ratio for each class; with pool="all" the classes share one')
        self.register_buffer("class_weights", weights)

    def score(self, sums: OverlapSums) -> Tensor:
        """The score of each class, `(images, classes)`; 1 is perfect, NaN is undefined."""
        raise NotImplementedError

    def forward(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss.

        Args:
            logits: `(batch, classes, *space)`; probabilities with `activation=None`.
            target: `"sigmoid"`: the shape of logits; `"softmax"`: class ids `(batch, *space)` or soft labels of the
                shape of logits.
            weight: of each pixel, `(batch, *space)`, or of each pixel and class, of the shape of logits.

        Returns:
            A scalar, or `(images, classes)` with `reduction="none"`; float32 (float64 for float64 logits).
        """
        sums = overlap_sums(
            logits,
            target,
            activation=self.activation,
            ignore_index=self.ignore_index,
            weight=weight,
            squared=self.squared,
            absent_nll=self.absent.needs_penalty,
        )
        return self.from_sums(sums).to(torch.promote_types(logits.dtype, torch.float32))

    def from_sums(self, sums: OverlapSums) -> Tensor:
        """The loss of sums that have been added up elsewhere, over accumulated micro-batches for example."""
        classes = sums.overlap.shape[1]
        class_weights = self.class_weights
        if class_weights is not None and class_weights.numel() != classes:
            raise ValueError(
                f"class_weights must have one for each of the {classes} classes, got {class_weights.numel()}"
            )
        if self.exclude_classes:
            kept_indices = kept_classes(classes, self.exclude_classes)
            sums = sums.map(lambda field: field[:, kept_indices])
            class_weights = None if class_weights is None else class_weights[kept_indices]
        pooled = pool_sums(sums, self.pool, across_ranks=self.across_ranks)
        score = self.score(pooled)
        kept = self.absent.kept(score, pooled)
        loss = self.absent.loss(1 - score, pooled)
        # Pooled sums are the same on every rank already.
        spread = self.across_ranks and self.pool == "image"
        if self.reduction == "none":
            return loss.where(kept, torch.nan)
        if self.reduction == "sum":
            total = (loss.where(kept, 0.0) * (1.0 if class_weights is None else class_weights)).sum()
            return total * gradient_shares() if spread else total
        return weighted_mean(loss, kept, class_weights, across_ranks=spread)

    def extra_repr(self) -> str:
        """The settings, as `print(loss)` shows them."""
        names = "activation", "smooth", "pool", "squared", "exclude_classes", "ignore_index", "reduction"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names) + f", absent={self.absent.rule!r}"
