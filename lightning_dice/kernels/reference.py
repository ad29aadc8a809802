r"""The sums in plain PyTorch: what every faster implementation must agree with.

Runs on any device and differentiates twice. An index target is never made one-hot: what a class's own pixels
contribute is gathered, then added to that class.

Accuracy: probabilities are float32 or better, and are added up in float64, block by block, so that no float64 copy of
all of them is made. A float32 sum stops counting at 2^24 pixels and loses digits long before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_dice.kernels.pixels import Pixels, log, softplus
from lightning_dice.kernels.sums import Focal, OverlapSums, RequiredSums, wide_dtype

_BLOCK = 1 << 16  # pixels


def overlap_sums(pixels: Pixels, wanted: RequiredSums) -> OverlapSums:
    """The sums of `lightning_dice.kernels.overlap_sums`."""
    z, w = pixels.logits, pixels.weight
    p = pixels.probs()
    count = z.new_full((z.shape[0], 1), z.shape[2], dtype=wide_dtype(z)) if w is None else total(w)
    predicted = total(_weighted(p, w))
    more: dict[str, Tensor] = {}
    if wanted.squares:
        more["predicted_squares"] = total(_weighted(p * p, w))
    if wanted.all_nll:
        more["all_nll"] = total(_weighted(_minus_log(z, p, pixels.activation), w))
    if wanted.absent_nll:
        more["absent_nll"] = total(_weighted(minus_log_complement(z, p, pixels.activation), w))
    nll = pixels.nll() if wanted.nll or (wanted.focal and not pixels.planes) else None
    if pixels.planes:
        t = pixels.target.to(z.dtype)
        soft = pixels.target.is_floating_point()
        overlap, actual = total(_weighted(p * t, w)), total(_weighted(t, w))
        if wanted.squares:
            more["actual_squares"] = total(_weighted(t * t, w)) if soft else actual
        if wanted.minimum:
            more["minimum"] = total(_weighted(torch.minimum(p, t), w)) if soft else overlap
        if wanted.nll and nll is not None:
            more["nll"] = total(_weighted(nll, w))
        if wanted.focal:
            more["focal"] = total(_weighted(_focal_planes(pixels, p, t, wanted.focal), w))
    else:
        ids = pixels.target.long()
        own = None if w is None else w if w.shape[1] == 1 else w.gather(1, ids)
        p_true = p.gather(1, ids)
        overlap = _total_by_class(_weighted(p_true, own), ids, z)
        actual = _total_by_class(torch.ones_like(p_true) if own is None else own, ids, z)
        if wanted.squares:
            more["actual_squares"] = actual
        if wanted.minimum:
            more["minimum"] = overlap
        if nll is not None:
            if wanted.nll:
                more["nll"] = _total_by_class(_weighted(nll, own), ids, z)
            if wanted.focal:
                more["focal"] = _total_by_class(_weighted(_focal(nll, wanted.focal.gamma), own), ids, z)
    exclusive = pixels.activation == "softmax" or not pixels.planes
    sums = OverlapSums(overlap, predicted, actual, count.expand_as(overlap), **more, exclusive=exclusive)
    if pixels.annotated is None:
        return sums
    annotated = pixels.annotated
    return sums.map(lambda field: field.where(annotated, torch.zeros((), dtype=field.dtype, device=field.device)))


def total(values: Tensor) -> Tensor:
    """Sum the pixels of `(images, classes, pixels)`, in float64."""
    result: Tensor = _Total.apply(values)
    return result


def _minus_log(z: Tensor, p: Tensor, activation: str | None) -> Tensor:
    """-log p of every class."""
    if activation == "softmax":
        return -z.log_softmax(1)
    return softplus(-z) if activation == "sigmoid" else -log(p)


def minus_log_complement(z: Tensor, p: Tensor, activation: str | None) -> Tensor:
    """-log(1 - p), without the cancellation of 1 - p where p is near 1."""
    if activation == "sigmoid":
        return softplus(z)
    if activation is None:
        return -log(1 - p)
    # Only one class can pass 1/2; for it 1 - p is the share of the others, taken from their logits.
    likely = p > 0.5
    others = z.masked_fill(likely, -torch.inf).logsumexp(1, keepdim=True)
    return torch.where(likely, softplus(z - others), -torch.log1p(-p.masked_fill(likely, 0)))


def _focal(nll: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma (-log p) of the true class, given -log p."""
    # 1 - p by expm1 keeps its digits near p = 1; clamped, as a power below 1 has no gradient at 0.
    return (-torch.expm1(-nll)).clamp(min=torch.finfo(nll.dtype).tiny) ** gamma * nll


def _focal_planes(pixels: Pixels, p: Tensor, t: Tensor, focal: Focal) -> Tensor:
    """The focal cross-entropy of each plane, linear in t: the mean over labels drawn with probability t."""
    z = pixels.logits
    if pixels.activation == "softmax":
        return t * _focal(-z.log_softmax(1), focal.gamma)
    if pixels.activation == "sigmoid":
        nll, absent = softplus(-z), softplus(z)
        # p^gamma as exp(-gamma · -log p): finite with its gradient for every logit and every gamma.
        present, absent = torch.exp(-focal.gamma * absent) * nll, torch.exp(-focal.gamma * nll) * absent
    else:
        present, absent = _focal(-log(p), focal.gamma), _focal(-log(1 - p), focal.gamma)
    front, back = (1.0, 1.0) if focal.alpha is None else (focal.alpha, 1 - focal.alpha)
    return front * t * present + back * (1 - t) * absent


def _weighted(values: Tensor, weight: Tensor | None) -> Tensor:
    return values if weight is None else values * weight


class _Total(torch.autograd.Function):
    """Sum over pixels in float64. Written out because autograd would join the gradients of the blocks by a copy."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = values.shape, values.dtype
        blocks = [block.sum(-1, dtype=wide_dtype(values)) for block in torch.split(values, _BLOCK, dim=-1)]
        return torch.stack(blocks).sum(0)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return grad[0].to(ctx.dtype).unsqueeze(-1).expand(ctx.shape)


def _total_by_class(values: Tensor, ids: Tensor, like: Tensor) -> Tensor:
    """Add each pixel of `(images, 1, pixels)` to its own class, in float64: one accumulator takes millions of terms."""
    zeros = like.new_zeros(like.shape[:2], dtype=wide_dtype(like))
    return zeros.scatter_add(1, ids.squeeze(1), values.squeeze(1).to(zeros.dtype))
