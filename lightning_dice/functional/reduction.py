"""Which images share one ratio, and the mean over what is left; the same on one process or many."""

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
    """A result up to the point where something is summed over the ranks of a distributed training.

    What has a result in this form can wait for others, so that all of them send one message; see `finish_reductions`.

    Attributes:
        parts: what is to be summed over the ranks: floating-point tensors of any shape, the same on every rank.
        finish: the result, given the parts in their order, summed over all ranks or of this one alone.

    >>> finish_reductions([weighted_mean(torch.tensor([[1.0, 3.0]]), torch.tensor([[True, True]]))])
    [tensor(2.)]
    """

    parts: tuple[Tensor, ...]
    finish: Callable[..., Tensor]

    @staticmethod
    def of(result: Tensor) -> DeferredReduction:
        """A result for which nothing has to be summed."""
        return DeferredReduction((), lambda: result)

    @staticmethod
    def joined(partials: Sequence[DeferredReduction], function: Callable[..., Tensor]) -> DeferredReduction:
        """A function of several results, whose parts go in one message; it is called with the results, in order."""

        def finish(*parts: Tensor) -> Tensor:
            return function(*_finished(partials, parts))

        return DeferredReduction(tuple(part for partial in partials for part in partial.parts), finish)

    def then(self, function: Callable[[Tensor], Tensor]) -> DeferredReduction:
        """The same, with `function` applied to the result."""
        return DeferredReduction(self.parts, lambda *parts: function(self.finish(*parts)))

    def local(self) -> DeferredReduction:
        """The result of this rank alone, as it is without other ranks."""
        return DeferredReduction.of(self.finish(*self.parts))


def finish_reductions(partials: Sequence[DeferredReduction]) -> list[Tensor]:
    """The results. In a distributed training all their parts go over the ranks in one all-reduce, with a gradient.

    Only where a gradient is taken: in an evaluation the ranks need not hold equally many batches, and nothing is sent.
    The gradient needs no message of its own, and is scaled so that DDP's averaging (or FSDP's) gives the true one.
    Every rank gets the same results.

    Args:
        partials: of the same number, kinds and shapes on every rank.
    """
    parts = [part for partial in partials for part in partial.parts]
    if not parts or gradient_shares() == 1:
        return _finished(partials, parts)
    dtype = reduce(torch.promote_types, (part.dtype for part in parts))
    message = _sum_over_ranks(torch.cat([part.to(dtype).reshape(-1) for part in parts]))
    pieces = torch.split(message, [part.numel() for part in parts])
    summed = [piece.view(part.shape).to(part.dtype) for piece, part in zip(pieces, parts, strict=True)]
    return _finished(partials, summed)


def _finished(partials: Sequence[DeferredReduction], parts: Sequence[Tensor]) -> list[Tensor]:
    """The results, of the parts of all of them in their order."""
    rest = iter(parts)
    return [partial.finish(*islice(rest, len(partial.parts))) for partial in partials]


def pool_sums(sums: OverlapSums, pool: Pool) -> OverlapSums:
    """Add up the sums of what shares one ratio, on this rank.

    Args:
        sums: `(images, classes)`.
        pool: `"image"`: each image has its own ratio; `"batch"`: all images of the batch share one; `"all"`: so do all
            classes.

    Returns:
        `(images, classes)`, `(1, classes)` or `(1, 1)`.
    """
    if pool == "image":
        return sums
    if pool == "all":
        sums = sums.map(lambda field: field.sum(1, keepdim=True))
    return sums.map(lambda field: field.sum(0, keepdim=True))


def of_pooled(
    sums: Sequence[OverlapSums], pool: Pool, formula: Callable[..., DeferredReduction], *, across_ranks: bool = True
) -> DeferredReduction:
    """A formula on sums that are pooled over images, and with `"batch"` and `"all"` over the ranks.

    Args:
        sums: each `(images, classes)`.
        pool: what shares one ratio, see `pool_sums`.
        formula: called with the pooled sums, one argument for each; returns a mean over what they are of.
        across_ranks: whether ranks share ratios, and with `"image"` the mean over the images.
    """
    pooled = [pool_sums(one, pool) for one in sums]
    if not across_ranks:
        return formula(*pooled).local()
    if pool == "image":
        return formula(*pooled)

    def finish(*parts: Tensor) -> Tensor:
        rest = iter(parts)
        summed = [one.having(dict(zip(one.fields, rest, strict=False))) for one in pooled]
        # The same on every rank already, and so is its mean.
        partial = formula(*summed)
        return partial.finish(*partial.parts)

    return DeferredReduction(tuple(field for one in pooled for field in one.fields.values()), finish)


def weighted_mean(values: Tensor, kept: Tensor, class_weights: Tensor | None = None) -> DeferredReduction:
    """Mean of `values` over what is kept, weighted by class; over that of all ranks, once `finish_reductions` has run.

    Args:
        values: `(images, classes)`.
        kept: bool, `(images, classes)`; what is not kept may hold NaN.
        class_weights: `(classes,)`, or of the shape of values; only their ratios matter.

    Returns:
        A scalar; 0, with a gradient of 0, where nothing is kept.
    """
    weight = kept.to(values.dtype)
    if class_weights is not None:
        weight = weight * class_weights.to(values.dtype)
    total, norm = (values.where(kept, 0.0) * weight).sum(), weight.sum()
    return DeferredReduction((total, norm), lambda total, norm: total / torch.where(norm > 0, norm, 1.0))


def gradient_shares() -> int:
    """Over how many ranks DDP averages the gradient that is being taken; 1 if none is."""
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
