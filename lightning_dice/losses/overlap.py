"""Base of the overlap losses: their settings, and the way from sums to one number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, TypedDict

import torch
from torch import Tensor

from lightning_dice.argument_checks import (
    check_choice,
    check_class_indices,
    check_class_weights,
    check_flag,
    check_smooth,
    included_classes,
)
from lightning_dice.functional import AbsentPolicy, AbsentRule, DeferredReduction, Pool, pool_and_reduce, weighted_mean
from lightning_dice.kernels import Activation, OverlapSums, RequiredSums
from lightning_dice.losses.base import SumsLoss, class_weights_of

Reduction = Literal["mean", "sum", "none"]
SoftOverlap = Literal["product", "minimum"]


class OverlapSettings(TypedDict, total=False):
    """Settings of `OverlapLoss`, to type the signatures of its subclasses."""

    activation: Activation
    smooth: float | Sequence[float]
    pool: Pool
    squared: bool
    overlap: SoftOverlap
    exclude_classes: Iterable[int]
    class_weights: Iterable[float] | Tensor | None
    ignore_index: int | None
    absent: AbsentRule | AbsentPolicy
    reduction: Reduction
    across_ranks: bool


class OverlapLoss(SumsLoss):
    """Base of the overlap losses: a subclass defines `per_class`, the loss of each class from its sums.

    Args:
        activation: `"sigmoid"`, `"softmax"`, or `None` where the input is probabilities.
        smooth: in pixels, added to numerator and denominator; a pair sets them separately.
        pool: which pixels share one ratio: `"image"`: those of each image; `"batch"`: those of the whole batch, on all
            ranks; `"all"`: as `"batch"`, with all classes together.
        squared: square probabilities and target in the denominator.
        overlap: what a pixel of probability p and label t adds to the overlap: `"product"`, p·t, or `"minimum"`,
            min(p, t). The same for labels of 0 and 1; with soft labels only the minimum is greatest at p = t.
        exclude_classes: indices of classes that do not count, such as `[0]` for the background.
        class_weights: one for each class, excluded ones too; only their ratios matter, so they never scale the loss.
        ignore_index: label of the pixels to ignore.
        absent: how to count a class that the target does not have: `"smooth"`, `"skip"` or `"penalize"`, see
            `lightning_dice.functional.AbsentPolicy`.
        reduction: `"mean"` over images and classes; `"sum"` over them; `"none"`: `(images, classes)`, with NaN for
            classes that are left out.
        across_ranks: in distributed training, compute the loss of all ranks together, as one process with the whole
            batch would; this costs one small all-reduce in each forward pass with a gradient. With False each rank
            takes the ratios (or the mean over images) of its own batch and sends nothing. DDP averages the gradients,
            so that the loss is the mean over the ranks, which depends on how the images are divided among them.

    Raises:
        ValueError: an invalid setting; in a call, a shape that would broadcast.
        TypeError: a setting that does not exist.

    >>> class FalseDiscoveryLoss(OverlapLoss):
    ...     def per_class(self, sums):
    ...         return 1 - (sums.overlap + self.smooth[0]) / (sums.predicted + self.smooth[1])
    >>> FalseDiscoveryLoss()(torch.zeros(1, 1, 2), torch.tensor([[[1, 0]]]))
    tensor(0.2500)
    """

    class_weights: Tensor | None

    def __init__(
        self,
        *,
        activation: Activation = "sigmoid",
        smooth: float | Sequence[float] = 1.0,
        pool: Pool = "batch",
        squared: bool = False,
        overlap: SoftOverlap = "product",
        exclude_classes: Iterable[int] = (),
        class_weights: Iterable[float] | Tensor | None = None,
        ignore_index: int | None = None,
        absent: AbsentRule | AbsentPolicy = "smooth",
        reduction: Reduction = "mean",
        across_ranks: bool = True,
        **unknown: object,
    ) -> None:
        super().__init__(activation=activation, ignore_index=ignore_index)
        self._refuse_unknown(unknown)
        self.smooth = check_smooth(smooth)
        self.pool: Pool = check_choice("pool", pool, Pool)
        self.squared = check_flag("squared", squared)
        self.overlap: SoftOverlap = check_choice("overlap", overlap, SoftOverlap)
        if squared and overlap == "minimum":
            raise ValueError(
                'overlap="minimum" needs squared=False: over a squared denominator the score is not greatest at p = t'
            )
        self.exclude_classes = check_class_indices("exclude_classes", exclude_classes)
        self.absent = absent if isinstance(absent, AbsentPolicy) else AbsentPolicy(absent)
        self.reduction: Reduction = check_choice("reduction", reduction, Reduction)
        self.across_ranks = check_flag("across_ranks", across_ranks)
        weights = check_class_weights(class_weights)
        if weights is not None and pool == "all":
            raise ValueError('class_weights need a ratio for each class; with pool="all" the classes share one')
        self.register_setting("class_weights", weights)

    def per_class(self, sums: OverlapSums) -> Tensor:
        """Return the loss of each class, `(images, classes)`: 0 is perfect, NaN is undefined.

        A formula that needs more than overlap, predicted, actual and count also overrides `required_sums`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define per_class(self, sums), the loss of each class")

    @property
    def required_sums(self) -> RequiredSums:
        """The sums to compute beyond the four that are always computed."""
        return RequiredSums(
            squares=self.squared, minimum=self.overlap == "minimum", absent_nll=self.absent.rule == "penalize"
        )

    def deferred_from_sums(self, sums: OverlapSums) -> DeferredReduction:
        """Compute the loss from sums `(images, classes)`, up to the sums over the ranks."""
        weights = None
        if self.class_weights is not None:
            weights = class_weights_of(self.class_weights, sums.overlap.shape[1], sums.overlap)
        if self.exclude_classes:
            included = included_classes(sums.overlap.shape[1], self.exclude_classes)
            sums = sums.map(lambda field: field[:, included])
            weights = None if weights is None else weights[included]

        def formula(pooled: OverlapSums) -> DeferredReduction:
            return self.reduce_classes(*self.class_losses(pooled), weights)

        return pool_and_reduce([sums], self.pool, formula, across_ranks=self.across_ranks)

    def class_losses(self, sums: OverlapSums) -> tuple[Tensor, Tensor]:
        """Return the loss of each class from pooled sums, and which of them count: both `(images, classes)`."""
        loss = self.per_class(self._choose_sums(sums))
        if loss.shape != sums.overlap.shape:
            raise ValueError(
                f"{type(self).__name__}.per_class must return a loss for each class, {tuple(sums.overlap.shape)}, "
                f"got {tuple(loss.shape)}"
            )
        return self.absent.loss(loss, sums), self.absent.kept(loss, sums)

    def reduce_classes(self, loss: Tensor, kept: Tensor, weights: Tensor | None) -> DeferredReduction:
        """Apply `reduction` to losses `(images, classes)`; weights are `(classes,)` or of the same shape."""
        if self.reduction == "none":
            return DeferredReduction.ready(loss.where(kept, torch.nan))
        if self.reduction == "sum":
            total = (loss.where(kept, 0.0) * (1.0 if weights is None else weights)).sum()
            return DeferredReduction((total,), lambda total: total)
        return weighted_mean(loss, kept, weights)

    def _choose_sums(self, sums: OverlapSums) -> OverlapSums:
        """Put the squared sums, or the minimum, where formulas expect `predicted`, `actual` and `overlap`."""
        if self.squared and sums.predicted_squares is not None and sums.actual_squares is not None:
            return sums.replace(predicted=sums.predicted_squares, actual=sums.actual_squares)
        if self.overlap == "minimum" and sums.minimum is not None:
            return sums.replace(overlap=sums.minimum)
        return sums
