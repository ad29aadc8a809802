"""Deep supervision: a loss at every level of a network's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from lightning_dice.argument_checks import check_choice, check_number
from lightning_dice.functional import DeferredReduction
from lightning_dice.functional.target_resizing import Reduce, coarser_target, coarser_weight
from lightning_dice.library_internals.torch import original_module
from lightning_dice.losses.base import SegmentationLoss, TargetMap, call_torch_loss
from lightning_dice.losses.overlap import OverlapLoss


class DeepSupervision(SegmentationLoss):
    r"""Weighted mean of a loss over the levels of a network's output, each against the target at its size.

    .. math:: L = \frac{\sum_i w_i\,L(z_i, t_i)}{\sum_i w_i}

    Weights of :math:`2^{-i}` are those of nnU-Net (Isensee et al., Nature Methods 2021), which leaves out the coarsest
    level. nnU-Net and others take the nearest pixel of each cell as the target of a coarser level, so that objects
    smaller than a cell come and go; here every pixel of the cell counts, see
    `lightning_dice.functional.coarser_target`. Distances, skeletons and regions are those of the `"max"` target.

    With `reduce="area"`, coarser targets are soft labels. The Dice loss of a soft label with `overlap="product"` is
    neither 0 nor least at p = t: if an object covers 0.6 of a cell, it is least at p = 1. Coarser levels then learn to
    round, which does no harm if you use the finest level only. For levels that learn the covered fraction, give the
    loss `overlap="minimum"`; for hard labels, use `reduce="max"`.

    Args:
        loss: a module of logits and target. A module that is not a `SegmentationLoss` gets these two alone; if it has
            an `ignore_index` for ids, as `torch.nn.CrossEntropyLoss` does, it cannot ignore soft labels, and a cell
            without a valid pixel gets 0 for every class.
        weights: one for each level, finest first, >= 0; only their ratios matter, and a level of weight 0 is not
            computed. 1/2^i by default.
        reduce: how to make the target coarser: `"area"` or `"max"`, see `lightning_dice.functional.coarser_target`.

    Raises:
        ValueError: weights below 0 or all 0, or a loss with `reduction="none"`; in a call, levels of different numbers
            of classes, another number of levels than of weights, or a level larger than the target.

    >>> from lightning_dice.losses import DiceLoss
    >>> levels = [torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 2, 2)]
    >>> mask = torch.zeros(1, 1, 4, 4)
    >>> mask[..., 1, 2] = 1
    >>> DeepSupervision(DiceLoss(), weights=[1, 1])(levels, mask)
    tensor(0.7077)
    """

    def __init__(self, loss: nn.Module, weights: Sequence[float] | None = None, reduce: Reduce = "area") -> None:
        if not isinstance(loss, nn.Module):
            raise ValueError(f"loss must be a module of logits and target, got {type(loss).__name__}")
        original = original_module(loss)
        if isinstance(original, OverlapLoss) and original.reduction == "none":
            raise ValueError('loss must have one value, got reduction="none"')
        ours = isinstance(original, SegmentationLoss)
        ignore_index = getattr(loss, "ignore_index", None)
        super().__init__(
            activation=original.activation if isinstance(original, SegmentationLoss) else None,
            ignore_index=ignore_index if ours or isinstance(ignore_index, int) else None,
        )
        self.loss = loss
        self.weights = None if weights is None else tuple(check_number("weights", weight) for weight in weights)
        if self.weights is not None and not any(self.weights):
            raise ValueError(f"weights must not all be 0, got {list(self.weights)}")
        self.reduce: Reduce = check_choice("reduce", reduce, Reduce)

    @property
    def maps(self) -> Mapping[str, TargetMap]:  # type: ignore[override]
        """The maps of the loss."""
        return getattr(self.loss, "maps", {}) if isinstance(original_module(self.loss), SegmentationLoss) else {}

    @property
    def values(self) -> Mapping[str, Tensor]:
        """The term values of a `CompoundLoss`, from the finest level of the last call."""
        return cast("Mapping[str, Tensor]", getattr(self.loss, "values", {}))

    def deferred(
        self,
        logits: Tensor | Sequence[Tensor],
        target: Tensor,
        weight: Tensor | None = None,
        *,
        annotated: Tensor | None = None,
        maps: Mapping[str, Tensor] | None = None,
    ) -> DeferredReduction:
        """Compute the loss up to the sums over the ranks, which are sent for all levels at once.

        Args:
            logits: each level's logits, finest first, `(batch, classes, *space)`; one tensor is one level.
            target: as in `SegmentationLoss.forward`, at the size of the finest level or larger.
            weight: as in `SegmentationLoss.forward`, at the size of the target; coarser levels get its means.
            annotated: as in `SegmentationLoss.forward`.
            maps: for levels at the size of the target; coarser levels compute their own.
        """
        if not isinstance(logits, (Tensor, list, tuple)):
            raise ValueError(
                f"logits must be a tensor, or a list of tensors, finest first, got {type(logits).__name__}"
            )
        levels = [logits] if isinstance(logits, Tensor) else list(logits)
        shares = [1.0] if isinstance(logits, Tensor) else _normalized_weights(self.weights, len(levels))
        if len({level.shape[1] for level in levels if level.ndim > 1}) > 1:
            raise ValueError(
                "logits must have the same classes at all levels, got the shapes "
                f"{[tuple(level.shape) for level in levels]}: leave out what are no logits"
            )
        for finer, coarser in pairwise(levels):
            if any(after > before for before, after in zip(finer.shape[2:], coarser.shape[2:], strict=False)):
                shapes = [tuple(level.shape[2:]) for level in levels]
                raise ValueError(f"logits must come finest first, got levels of the sizes {shapes}")
        axes = levels[0].ndim - 2
        if weight is not None and weight.shape[-axes:] != target.shape[-axes:]:
            # Made coarser, it would fit a level whatever its axes are.
            raise ValueError(
                "weight must have the shape (batch, *space) or (batch, classes, *space) with the space of target, "
                f"{tuple(target.shape[-axes:])}, got {tuple(weight.shape)}"
            )
        # Coarsest first, so that the last values of a compound loss are those of the finest level.
        counted = [(level, share) for level, share in reversed(list(zip(levels, shares, strict=True))) if share]
        losses = [self._at_level(level, target, weight, annotated=annotated, maps=maps) for level, _ in counted]

        def weighted_sum(*values: Tensor) -> Tensor:
            for value in values:
                if value.ndim:
                    raise ValueError(f"loss must return a scalar, got the shape {tuple(value.shape)}")
            return torch.stack([share * value for (_, share), value in zip(counted, values, strict=True)]).sum()

        return DeferredReduction.combine(losses, weighted_sum)

    def _at_level(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        *,
        annotated: Tensor | None,
        maps: Mapping[str, Tensor] | None,
    ) -> DeferredReduction:
        space, classes = tuple(logits.shape[2:]), logits.shape[1]
        own = target
        if tuple(target.shape[-len(space) :]) != space:
            own = coarser_target(
                target,
                space,
                activation=self.activation,
                classes=classes,
                ignore_index=self.ignore_index,
                reduce=self.reduce,
            )
            maps = self._coarser_maps(target, own, space, classes)
        if isinstance(original_module(self.loss), SegmentationLoss):
            weight = None if weight is None else coarser_weight(weight, space)
            return cast("SegmentationLoss", self.loss).deferred_call(
                logits, own, weight, annotated=annotated, maps=maps
            )
        if weight is not None or annotated is not None:
            raise ValueError(f"loss, a {type(self.loss).__name__}, takes neither weight nor annotated")
        if own.is_floating_point() and self.ignore_index is not None:
            own = own.masked_fill(own == self.ignore_index, 0)
        return DeferredReduction.ready(call_torch_loss(self.loss, logits, own))

    def _coarser_maps(
        self, target: Tensor, own: Tensor, space: tuple[int, ...], classes: int
    ) -> Mapping[str, Tensor] | None:
        """Compute the maps of a coarser level from hard labels, as maps lose small objects at labels below 1/2."""
        soft = self.activation == "softmax" and own.ndim == target.ndim and target.is_floating_point()
        if not self.maps or self.reduce == "max" or soft or not len(target):
            return None
        hard = coarser_target(
            target, space, activation=self.activation, classes=classes, ignore_index=self.ignore_index, reduce="max"
        )
        if hard.ndim < own.ndim:
            # As planes, like the target of the level.
            ignored = (
                torch.zeros_like(hard, dtype=torch.bool) if self.ignore_index is None else hard == self.ignore_index
            )
            planes = torch.zeros_like(own).scatter_(1, hard.masked_fill(ignored, 0).long().unsqueeze(1), 1.0)
            hard = planes if self.ignore_index is None else planes.masked_fill(ignored.unsqueeze(1), self.ignore_index)
        return {
            name: torch.stack([compute(one.cpu()) for one in hard]).to(target.device)
            for name, compute in self.maps.items()
        }


def _normalized_weights(weights: tuple[float, ...] | None, levels: int) -> list[float]:
    """Return the weights of the levels, with a sum of 1."""
    if not levels:
        raise ValueError("logits must hold at least one level, got none")
    if weights is None:
        weights = tuple(0.5**level for level in range(levels))
    if len(weights) != levels:
        raise ValueError(f"weights must have one for each of the {levels} levels, got {len(weights)}")
    return [weight / sum(weights) for weight in weights]
