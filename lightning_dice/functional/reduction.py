"""Pooling of sums and means over images and classes, with the same result on one process or many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dice.kernels import OverlapSums

Pool = Literal["image", "batch", "all"]


class DeferredReduction(NamedTuple):
    """A result that still waits for sums over the ranks of a distributed training.

    Deferring lets several results share one message; see `finish_reductions`.

    Attributes:
        local_sums: this rank's share of the sums: floating-point tensors of any shape, the same shapes on every rank.
        finish: computes the result from the sums, in their order: those of all ranks, or of this rank alone.

    >>> mean = weighted_mean(torch.tensor([[1.0, 3.0]]), torch.tensor([[True, True]]))
    >>> mean.local_sums
    (tensor(4.), tensor(2.))
    >>> finish_reductions([mean, mean.apply(torch.sqrt)])
    [tensor(2.), tensor(1.4142)]
    """

    local_sums: tuple[Tensor, ...]
    finish: Callable[..., Tensor]

    @staticmethod
    def ready(result: Tensor) -> DeferredReduction:
        """Wrap a result that needs no sums over the ranks."""
        return DeferredReduction((), lambda: result)

    @staticmethod
    def combine(reductions: Sequence[DeferredReduction], function: Callable[..., Tensor]) -> DeferredReduction:
        """Return `function(*results)` of several reductions, whose sums then travel in one message."""

        def finish(*sums: Tensor) -> Tensor:
            return function(*_finish_each(reductions, sums))

        return DeferredReduction(_all_sums(reductions), finish)

    def apply(self, function: Callable[[Tensor], Tensor]) -> DeferredReduction:
        """Apply `function` to the result, once it is there."""
        return DeferredReduction(self.local_sums, lambda *sums: function(self.finish(*sums)))

    def finish_locally(self) -> DeferredReduction:
        """Compute the result of this rank alone, and send nothing."""
        return DeferredReduction.ready(self.finish(*self.local_sums))


def finish_reductions(reductions: Sequence[DeferredReduction]) -> list[Tensor]:
    """Compute the results; in a distributed training, all sums travel in one all-reduce, which has a gradient.

    Ranks communicate only while a gradient is taken: in an evaluation they may hold unequal numbers of batches.
    The backward pass sends no message; its gradient is scaled so that the averaging of DDP (or FSDP) gives the true
    one. Every rank gets the same results.

    Args:
        reductions: the same number, kinds and shapes on every rank.

    >>> finish_reductions([DeferredReduction.ready(torch.tensor(3.0))])
    [tensor(3.)]
    """
    local = _all_sums(reductions)
    if not local or _gradient_world_size() == 1:
        return _finish_each(reductions, local)
    dtype = reduce(torch.promote_types, (one.dtype for one in local))
    message = _sum_over_ranks(torch.cat([one.to(dtype).reshape(-1) for one in local]))
    pieces = torch.split(message, [one.numel() for one in local])
    return _finish_each(
        reductions, [piece.view(one.shape).to(one.dtype) for piece, one in zip(pieces, local, strict=True)]
    )


def _all_sums(reductions: Sequence[DeferredReduction]) -> tuple[Tensor, ...]:
    return tuple(one for reduction in reductions for one in reduction.local_sums)


def _finish_each(reductions: Sequence[DeferredReduction], sums: Sequence[Tensor]) -> list[Tensor]:
    """Give each reduction its own of the sums, which come in the order of `_all_sums`."""
    rest = iter(sums)
    return [reduction.finish(*islice(rest, len(reduction.local_sums))) for reduction in reductions]


def pool_sums(sums: OverlapSums, pool: Pool) -> OverlapSums:
    """Add up, on this rank, the sums that share one ratio.

    Args:
        sums: `(images, classes)`.
        pool: `"image"`: each image has its own ratio; `"batch"`: all images of the batch share one; `"all"`: all images
            and all classes share one.

    Returns:
        `(images, classes)`, `(1, classes)` or `(1, 1)`.

    >>> field = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> pool_sums(OverlapSums(field, field, field, field), "batch").overlap
    tensor([[4., 6.]])
    """
    if pool == "image":
        return sums
    if pool == "all":
        sums = sums.map(lambda field: field.sum(1, keepdim=True))
    return sums.map(lambda field: field.sum(0, keepdim=True))


def pool_and_reduce(
    sums: Sequence[OverlapSums], pool: Pool, formula: Callable[..., DeferredReduction], *, across_ranks: bool = True
) -> DeferredReduction:
    """Pool sums over images, and with `"batch"` and `"all"` over the ranks; then apply a formula to them.

    Args:
        sums: each `(images, classes)`.
        pool: which sums share one ratio, see `pool_sums`.
        formula: takes the pooled sums, one argument for each, and returns a mean over their images and classes.
        across_ranks: whether the ranks share ratios and, with `"image"`, the mean over the images.

    >>> sums = OverlapSums(*torch.tensor([[[1.0], [3.0]], [[2.0], [6.0]], [[2.0], [6.0]], [[4.0], [8.0]]]))
    >>> def recall(pooled):
    ...     return weighted_mean(pooled.overlap / pooled.actual, pooled.actual > 0)
    >>> finish_reductions([pool_and_reduce([sums], "batch", recall)])
    [tensor(0.5000)]
    """
    pooled = [pool_sums(one, pool) for one in sums]
    if not across_ranks:
        return formula(*pooled).finish_locally()
    if pool == "image":
        return formula(*pooled)

    def finish(*fields: Tensor) -> Tensor:
        rest = iter(fields)
        summed = [one.replace(**dict(zip(one.fields, rest, strict=False))) for one in pooled]
        # Every rank has the same sums by now, hence the same mean.
        mean = formula(*summed)
        return mean.finish(*mean.local_sums)

    return DeferredReduction(tuple(field for one in pooled for field in one.fields.values()), finish)


def weighted_mean(values: Tensor, kept: Tensor, class_weights: Tensor | None = None) -> DeferredReduction:
    """Average the kept values, weighted by class; over all ranks, once `finish_reductions` has run.

    Args:
        values: `(images, classes)`.
        kept: bool, `(images, classes)`; values that are not kept may be NaN.
        class_weights: `(classes,)`, or the shape of values; only their ratios matter.

    Returns:
        A scalar; 0, with a gradient of 0, where nothing is kept.

    >>> kept = torch.tensor([[True, True, False]])
    >>> finish_reductions([weighted_mean(torch.tensor([[1.0, 3.0, torch.nan]]), kept, torch.tensor([3.0, 1.0, 1.0]))])
    [tensor(1.5000)]
    """
    weight = kept.to(values.dtype)
    if class_weights is not None:
        weight = weight * class_weights.to(values.dtype)
    total, norm = (values.where(kept, 0.0) * weight).sum(), weight.sum()
    return DeferredReduction((total, norm), lambda total, norm: total / torch.where(norm > 0, norm, 1.0))


def _gradient_world_size() -> int:
    """Return the number of ranks over which DDP averages the gradient being taken; 1 if none is taken."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and torch.is_grad_enabled() else 1


class _SumOverRanks(torch.autograd.Function):
    """All-reduce with a gradient.

    Every rank computes the same loss L from the same sums S, so dL/dS is already the same everywhere and needs no
    message. The true gradient of the weights is the sum over ranks of dL/dS · dS_rank/dweights; DDP takes the mean,
    which is short by the number of ranks.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return grad[0] * dist.get_world_size()


def _sum_over_ranks(values: Tensor) -> Tensor:
    result: Tensor = _SumOverRanks.apply(values)
    return result
