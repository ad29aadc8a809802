"""Which images share one ratio, and the mean over what is left; the same on one process or many."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dice.kernels import OverlapSums

Pool = Literal["image", "batch", "all"]


def pool_sums(sums: OverlapSums, pool: Pool, *, across_ranks: bool = True) -> OverlapSums:
    """Add up the sums of what shares one ratio.

    Args:
        sums: `(images, classes)`.
        pool: `"image"`: each image has its own ratio; `"batch"`: all images of the batch, on all ranks, share one;
            `"all"`: so do all classes.
        across_ranks: whether `"batch"` and `"all"` reach over the ranks of a distributed training. Only where a
            gradient is taken: in an evaluation the ranks need not hold equally many batches.

    Returns:
        `(images, classes)`, `(1, classes)` or `(1, 1)`.
    """
    if pool == "image":
        return sums
    if pool == "all":
        sums = sums.map(lambda field: field.sum(1, keepdim=True))
    sums = sums.map(lambda field: field.sum(0, keepdim=True))
    if not (across_ranks and gradient_shares() > 1):
        return sums
    # One message for all the fields.
    summed = _sum_over_ranks(torch.stack(list(sums.fields.values()))).unbind()
    return sums.having(dict(zip(sums.fields, summed, strict=True)))


def weighted_mean(
    values: Tensor, kept: Tensor, class_weights: Tensor | None = None, *, across_ranks: bool = False
) -> Tensor:
    """Mean of `values` over what is kept, weighted by class.

    Args:
        values: `(images, classes)`.
        kept: bool, `(images, classes)`; what is not kept may hold NaN.
        class_weights: `(classes,)`, or of the shape of values; only their ratios matter.
        across_ranks: whether the images of all ranks share the mean, as they do on one process. Each rank then returns
            its own share of it times the number of ranks, so that DDP's averaging gives the true gradient however
            unequal the batches are.

    Returns:
        A scalar; 0, with a gradient of 0, where nothing is kept.
    """
    weight = kept.to(values.dtype)
    if class_weights is not None:
        weight = weight * class_weights.to(values.dtype)
    total, norm = (values.where(kept, 0.0) * weight).sum(), weight.sum()
    if across_ranks and gradient_shares() > 1:
        norm = sum_over_ranks(norm)
        total = total * dist.get_world_size()
    return total / torch.where(norm > 0, norm, 1.0)


def gradient_shares() -> int:
    """Over how many ranks DDP averages the gradient that is being taken; 1 if none is."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and torch.is_grad_enabled() else 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum over all ranks, without a gradient."""
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


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
