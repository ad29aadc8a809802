"""A way for losses of probabilities, torch's own for example, to be called with logits."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_dice.functional import DeferredReduction
from lightning_dice.kernels import Activation, checked_pixels, wide_dtype
from lightning_dice.kernels.overlap_sums import full_precision
from lightning_dice.losses.base import SegmentationLoss


class OnProbabilities(SegmentationLoss):
    """Gives any loss the probabilities, and the target as planes of the same dtype.

    Where pixels are ignored, `loss` gets the others alone, `(pixels, classes)` with a softmax and `(pixels,)` of all
    planes with a sigmoid: the loss must then be one that looks at each pixel by itself, such as
    `torch.nn.SmoothL1Loss`. In a distributed training it must be a mean over entries, or a sum (`reduction="sum"`):
    each process then counts what it has of them.

    Args:
        loss: a module of probabilities and target, both `(batch, classes, *space)`.
        activation: `"sigmoid"`, `"softmax"`, or `None` where the input is probabilities.
        ignore_index: pixels whose target holds this value count as nothing.

    >>> import torch
    >>> OnProbabilities(nn.SmoothL1Loss())(torch.zeros(1, 1, 2), torch.tensor([[[1, 0]]]))
    tensor(0.1250)
    """

    def __init__(self, loss: nn.Module, *, activation: Activation = "sigmoid", ignore_index: int | None = None) -> None:
        if not isinstance(loss, nn.Module):
            raise ValueError(f"loss must be a module of probabilities and target, got {loss!r}")
        if isinstance(loss, SegmentationLoss):
            raise ValueError(
                f"loss must not be of this library, got {type(loss).__name__}: these take logits themselves, and "
                "probabilities with activation=None"
            )
        super().__init__(activation=activation, ignore_index=ignore_index)
        self.loss = loss

    def deferred(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        annotated: Tensor | None = None,
        maps: Mapping[str, Tensor] | None = None,
    ) -> DeferredReduction:
        """The loss of probabilities, up to what the ranks sum; `weight` and `annotated` are refused."""
        if weight is not None or annotated is not None:
            raise ValueError(f"{type(self.loss).__name__} takes neither weight nor annotated")
        with full_precision(logits):
            pixels = checked_pixels(logits, target, activation=self.activation, ignore_index=self.ignore_index)
            probs, planes = pixels.probs(), pixels.target_planes()
            if pixels.weight is None:
                probs, planes = probs.view_as(logits), planes.view_as(logits)
            else:
                valid = pixels.weight > 0
                if valid.shape[1] == 1 and logits.shape[1] > 1:
                    valid = valid.squeeze(1)
                    probs, planes = probs.movedim(1, 2), planes.movedim(1, 2)
                probs, planes = probs[valid], planes[valid]
            # The mean of nothing is NaN.
            value: Tensor = self.loss(probs, planes) if probs.numel() else probs.sum()
        if getattr(self.loss, "reduction", "mean") == "sum":
            return DeferredReduction((value,), lambda total: total)
        # Wide, so that a mean comes back from its sum as it was.
        entries = probs.new_full((), probs.numel(), dtype=wide_dtype(probs))
        above = value.to(entries.dtype) * entries
        return DeferredReduction(
            (above, entries), lambda above, entries: (above / entries.clamp(min=1)).to(value.dtype)
        )
