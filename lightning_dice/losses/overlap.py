"""What every overlap loss shares: its settings, and the way from sums to one number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, TypedDict

import torch
from torch import Tensor

from lightning_dice.argument_checks import class_indices, class_weights_tensor, flag, kept_classes, one_of, smooth_pair
from lightning_dice.functional import AbsentPolicy, AbsentRule, DeferredReduction, Pool, of_pooled, weighted_mean
from lightning_dice.kernels import Activation, OverlapSums, RequiredSums
from lightning_dice.losses.base import SumsLoss, class_weights_of

Reduction = Literal["mean", "sum", "none"]
SoftOverlap = Literal["product", "minimum"]


class OverlapSettings(TypedDict, total=False):
    """The settings of `OverlapLoss`, for the signatures of its subclasses."""

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
    """Base of the overlap losses: a subclass says what the loss of a class is, given its sums.

    Args:
        activation: `"sigmoid"`, `"softmax"`, or `None` where the input is probabilities.
        smooth: in pixels, added to numerator and denominator; a pair sets them apart.
        pool: what shares one ratio: `"image"`, each image its own; `"batch"`, all images of the batch, on all ranks;
            `"all"`, all images and all classes.
        squared: square probabilities and target in the denominator.
        overlap: what a pixel of probability p and label t adds to the overlap: `"product"`, p·t, or `"minimum"`,
            min(p, t). The same for labels of 0 and 1; of soft labels only the minimum is greatest at p = t.
        exclude_classes: indices of classes that do not count, such as `[0]` for the background.
        class_weights: one for each class, excluded ones too; only their ratios matter, so they never scale the loss.
        ignore_index: pixels whose target holds this value count as nothing.
        absent: what a class counts that the target does not have: `"smooth"`, `"skip"` or `"penalize"`, see
            `lightning_dice.functional.AbsentPolicy`.
        reduction: `"mean"` over images and classes; `"sum"` of the same; `"none"`, `(images, classes)` with NaN for
            what is left out.
        across_ranks: in a distributed training, give what one process with the whole batch would give, at the price of
            one small all-reduce in each forward pass with a gradient. False: send nothing. Each process then has the
            ratios (or the mean over images) of its own batch, and DDP averages the gradients: the loss is the mean of
            the processes' losses, which depends on how the images are shared out.

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
        self._refuse(unknown)
        self.smooth = smooth_pair(smooth)
        self.pool: Pool = one_of("pool", pool, Pool)
        self.squared = flag("squared", squared)
        self.overlap: SoftOverlap = one_of("overlap", overlap, SoftOverlap)
        if squared and overlap == "minimum":
            raise ValueError(
                'overlap="minimum" goes with squared=False: the minimum of p and t is not greatest at p = t when the '
                "denominator is squared"
            )
        self.exclude_classes = class_indices("exclude_classes", exclude_classes)
        self.absent = absent if isinstance(absent, AbsentPolicy) else AbsentPolicy(absent)
        self.reduction: Reduction = one_of("reduction", reduction, Reduction)
        self.across_ranks = flag("across_ranks", across_ranks)
        weights = class_weights_tensor(class_weights)
        if weights is not None and pool == "all":
            raise ValueError('class_weights need a ratio for each class; with pool="all" the classes share one')
        self.register_buffer("class_weights", weights)

    def per_class(self, sums: OverlapSums) -> Tensor:
        """The loss of each class, `(images, classes)`; 0 is perfect, NaN is undefined. What a subclass defines.

        A formula on more than overlap, predicted, actual and count says so by `wanted`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define per_class(self, sums), the loss of each class")

    @property
    def wanted(self) -> RequiredSums:
        """Sums it needs beyond the four that are always there."""
        return RequiredSums(
            squares=self.squared, minimum=self.overlap == "minimum", absent_nll=self.absent.rule == "penalize"
        )

    def partial_of_sums(self, sums: OverlapSums) -> DeferredReduction:
        """The loss of sums `(images, classes)`, up to what the ranks sum."""
        weights = None
        if self.class_weights is not None:
            weights = class_weights_of(self.class_weights, sums.overlap.shape[1], sums.overlap)
        if self.exclude_classes:
            kept_indices = kept_classes(sums.overlap.shape[1], self.exclude_classes)
            sums = sums.map(lambda field: field[:, kept_indices])
            weights = None if weights is None else weights[kept_indices]

        def formula(pooled: OverlapSums) -> DeferredReduction:
            return self.reduced(*self.table(pooled), weights)

        return of_pooled([sums], self.pool, formula, across_ranks=self.across_ranks)

    def table(self, sums: OverlapSums) -> tuple[Tensor, Tensor]:
        """The loss of each class `(images, classes)` of pooled sums, and whether it enters the mean."""
        loss = self.per_class(self._own(sums))
        if loss.shape != sums.overlap.shape:
            raise ValueError(
                f"{type(self).__name__}.per_class must return a loss for each class, {tuple(sums.overlap.shape)}, "
                f"got {tuple(loss.shape)}"
            )
        return self.absent.loss(loss, sums), self.absent.kept(loss, sums)

    def reduced(self, loss: Tensor, kept: Tensor, weights: Tensor | None) -> DeferredReduction:
        """A table, `(images, classes)`, as one number; weights are `(classes,)` or of the shape of the table."""
        if self.reduction == "none":
            return DeferredReduction.of(loss.where(kept, torch.nan))
        if self.reduction == "sum":
            total = (loss.where(kept, 0.0) * (1.0 if weights is None else weights)).sum()
            return DeferredReduction((total,), lambda total: total)
        return weighted_mean(loss, kept, weights)

    def _own(self, sums: OverlapSums) -> OverlapSums:
        """The sums with this loss's kind of overlap and of denominator in the usual places."""
        if self.squared and sums.predicted_squares is not None and sums.actual_squares is not None:
            return sums.having({"predicted": sums.predicted_squares, "actual": sums.actual_squares})
        if self.overlap == "minimum" and sums.minimum is not None:
            return sums.having({"overlap": sums.minimum})
        return sums
