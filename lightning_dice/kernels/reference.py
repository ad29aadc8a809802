r"""The sums in plain PyTorch: what every faster implementation must agree with.

Runs on any device and differentiates twice. An index target is never made one-hot: what a class's own pixels
contribute is gathered, then added to that class.

Accuracy: probabilities are float32 or better, and are added up in float64, block by block, so that no float64 copy of
all of them is made. A float32 sum stops counting at 2^24 pixels and loses digits long before.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dice.kernels.sums import OverlapSums, valid_pixels

_BLOCK = 1 << 16  # pixels


def overlap_sums(
    logits: Tensor,
    target: Tensor,
    *,
    activation: str | None,
    ignore_index: int | None,
    weight: Tensor | None,
    squared: bool,
    nll: bool,
    absent_nll: bool,
) -> OverlapSums:
    """The sums of `lightning_dice.kernels.overlap_sums`, for input that has passed its checks."""
    z = logits.flatten(2) if logits.ndim > 2 else logits.unsqueeze(-1)
    z = z if z.dtype == torch.float64 else z.float()
    planes = target.shape == logits.shape
    t = target.reshape(z.shape if planes else (z.shape[0], z.shape[2]))
    w = None
    if weight is not None:
        w = weight.reshape(z.shape if weight.shape == logits.shape else (z.shape[0], 1, z.shape[2])).to(z.dtype)

    valid = valid_pixels(t, ignore_index)
    if valid is not None:
        if not planes:
            valid = valid.unsqueeze(1)
        elif activation == "softmax":
            valid = valid.all(1, keepdim=True)
        t = t.where(valid if planes else valid.squeeze(1), torch.zeros((), dtype=t.dtype, device=t.device))
        # Replaced, not multiplied by zero: an ignored pixel may hold NaN, and NaN times zero is NaN.
        z = z.where(valid, torch.zeros((), dtype=z.dtype, device=z.device))
        w = valid.to(z.dtype) if w is None else w.where(valid, torch.zeros((), dtype=z.dtype, device=z.device))

    p = z.softmax(1) if activation == "softmax" else z.sigmoid() if activation == "sigmoid" else z
    count = z.new_full((z.shape[0], 1), z.shape[2], dtype=_wide(z)) if w is None else _total(w)
    complement = _total(_weighted(_minus_log_complement(z, p, activation), w)) if absent_nll else None
    predicted = _total(_weighted(p * p if squared else p, w))
    if planes:
        t = t.to(z.dtype)
        overlap, actual = _total(_weighted(p * t, w)), _total(_weighted(t * t if squared else t, w))
        true_nll = _total(_weighted(_minus_log_planes(z, p, t, activation), w)) if nll else None
    else:
        ids = t.long().unsqueeze(1)
        own = None if w is None else w if w.shape[1] == 1 else w.gather(1, ids)
        p_true = p.gather(1, ids)
        overlap = _total_by_class(_weighted(p_true, own), ids, z)
        actual = _total_by_class(torch.ones_like(p_true) if own is None else own, ids, z)
        true_nll = None
        if nll:
            log_p = z.log_softmax(1).gather(1, ids) if activation == "softmax" else _log(p_true)
            true_nll = _total_by_class(_weighted(-log_p, own), ids, z)
    return OverlapSums(overlap, predicted, actual, count.expand_as(overlap), true_nll, complement)


def _minus_log_planes(z: Tensor, p: Tensor, t: Tensor, activation: str | None) -> Tensor:
    if activation == "softmax":
        return -t * z.log_softmax(1)
    if activation == "sigmoid":
        return F.binary_cross_entropy_with_logits(z, t, reduction="none")
    return F.binary_cross_entropy(p, t, reduction="none")


def _minus_log_complement(z: Tensor, p: Tensor, activation: str | None) -> Tensor:
    """-log(1 - p), without the cancellation of 1 - p where p is near 1."""
    if activation == "sigmoid":
        return _softplus(z)
    if activation is None:
        return -_log(1 - p)
    # Only the greatest class can pass 1/2; for it 1 - p is the share of the others, taken from their logits.
    top = z.argmax(1, keepdim=True)
    is_top = torch.zeros_like(z, dtype=torch.bool).scatter(1, top, True)
    others = z.masked_fill(is_top, -torch.inf).logsumexp(1, keepdim=True)
    return torch.where(is_top, _softplus(z - others), -torch.log1p(-p.masked_fill(is_top, 0)))


def _softplus(z: Tensor) -> Tensor:
    # The default threshold of 20 leaves out e^-20, which float64 would show.
    return F.softplus(z, threshold=40)


def _log(p: Tensor) -> Tensor:
    # Clamped before the logarithm: after it, the gradient at 0 would be 0 times infinity.
    return p.clamp(min=torch.finfo(p.dtype).tiny).log()


def _weighted(values: Tensor, weight: Tensor | None) -> Tensor:
    return values if weight is None else values * weight


def _wide(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64


class _Total(torch.autograd.Function):
    """Sum over pixels in float64. Written out because autograd would join the gradients of the blocks by a copy."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = values.shape, values.dtype
        blocks = [block.sum(-1, dtype=_wide(values)) for block in torch.split(values, _BLOCK, dim=-1)]
        return torch.stack(blocks).sum(0)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return grad[0].to(ctx.dtype).unsqueeze(-1).expand(ctx.shape)


def _total(values: Tensor) -> Tensor:
    """Sum the pixels of `(images, classes, pixels)`."""
    total: Tensor = _Total.apply(values)
    return total


def _total_by_class(values: Tensor, ids: Tensor, like: Tensor) -> Tensor:
    """Add each pixel of `(images, 1, pixels)` to its own class, in float64: one accumulator takes millions of terms."""
    zeros = like.new_zeros(like.shape[:2], dtype=_wide(like))
    return zeros.scatter_add(1, ids.squeeze(1), values.squeeze(1).to(zeros.dtype))
