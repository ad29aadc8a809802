"""Adapter from losses of probabilities, such as torch's own, to logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_dice.functional import DeferredReduction
from lightning_dice.kernels import Activation, checked_pixels, wide_dtype
from lightning_dice.kernels.overlap_sums import full_precision
from lightning_dice.library_internals.torch import is_vmapped
from lightning_dice.losses.base import SegmentationLoss


class OnProbabilities(SegmentationLoss):
    r"""Adapter that calls a loss of probabilities with the activated logits, and the target as planes of their dtype.

    .. math:: L = \ell\left(\mathrm{activation}(z),\ t\right)

    If pixels are ignored, `loss` gets only the others, as `(pixels, classes)` with a softmax and as `(pixels,)` of all
    planes with a sigmoid; it must then treat each pixel separately, as `torch.nn.SmoothL1Loss` does. In a distributed
    training it must be a mean over entries, or a sum (`reduction="sum"`); the ranks' numbers of entries are accounted
    for. In older releases of torch, `torch.compile` with `fullgraph=True` then needs
    `torch._dynamo.config.capture_dynamic_output_shape_ops = True`, as the number of pixels is no constant.

    Args:
        loss: a module of probabilities and target, both `(batch, classes, *space)`.
        activation: `"sigmoid"`, `"softmax"`, or `None` where the input is probabilities.
        ignore_index: label of the pixels to ignore.

    Raises:
        ValueError: a loss of this library, or not a module; in a call, `weight` or `annotated`, or a shape that would
            broadcast.

    >>> import torch
    >>> OnProbabilities(nn.SmoothL1Loss())(torch.zeros(1, 1, 2), torch.tensor([[[1, 0]]]))
    tensor(0.1250)
    """

    def __init__(self, loss: nn.Module, *, activation: Activation = "sigmoid", ignore_index: int | None = None) -> None:
        if not isinstance(loss, nn.Module):
            raise ValueError(f"loss must be a module of probabilities and target, got {loss!r}")
        if isinstance(loss, SegmentationLoss):
            raise ValueError(
                f"loss must not be one of lightning_dice.losses, got {type(loss).__name__}: they take logits, or "
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
        """Compute the loss of probabilities up to the sums over the ranks; `weight` and `annotated` are refused."""
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
                if not torch.compiler.is_compiling() and is_vmapped(valid):
                    raise ValueError(
                        "OnProbabilities with ignore_index cannot be vmapped, as the number of pixels that are not "
                        "ignored is a shape: call it in a loop instead"
                    )
                # One list of pixels for both, as a compiler knows that two of them are equally long only then.
                places = valid.nonzero(as_tuple=True)
                probs, planes = probs[places], planes[places]
            value = self._mean_of_entries(probs, planes)
        if getattr(self.loss, "reduction", "mean") == "sum":
            return DeferredReduction((value,), lambda total: total)
        # In a wide dtype, so that dividing the sum by the entries gives back the mean.
        entries = probs.new_full((), probs.numel(), dtype=wide_dtype(probs))
        above = value.to(entries.dtype) * entries
        return DeferredReduction(
            (above, entries), lambda above, entries: (above / entries.clamp(min=1)).to(value.dtype)
        )

    def _mean_of_entries(self, probs: Tensor, planes: Tensor) -> Tensor:
        """Return the loss, or 0 without entries, where a mean is NaN."""
        if torch.compiler.is_compiling():
            # How many pixels are ignored is no constant of a graph.
            value: Tensor = self.loss(probs, planes)
            entries = probs.new_full((), probs.numel())
            return torch.where(entries > 0, value, 0.0)
        return self.loss(probs, planes) if probs.numel() else probs.sum()
