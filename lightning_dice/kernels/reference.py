"""The sums in plain PyTorch: the definition with which every backend must agree.

Runs on any device and can be differentiated twice. Class ids are never expanded to one-hot planes: each pixel's
contribution to its own class is gathered, then added to that class.

Probabilities are float32 or better. They are added in float64, block by block, so that no float64 copy of all of them
exists. A float32 sum stops counting at 2^24 pixels and loses digits long before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_dice.kernels.pixels import ExactFunction, Pixels, apply_exactly, log, softplus
from lightning_dice.kernels.sums import Focal, OverlapSums, RequiredSums, at_least, wide_dtype

_BLOCK = 1 << 16  # pixels


def overlap_sums(pixels: Pixels, required: RequiredSums) -> OverlapSums:
    """Compute the sums of `lightning_dice.kernels.overlap_sums` from checked, flattened input.

    >>> pixels = Pixels(torch.zeros(1, 1, 4), torch.tensor([[[0, 1, 1, 0]]]), None, "sigmoid", planes=True)
    >>> overlap_sums(pixels, RequiredSums()).overlap
    tensor([[1.]], dtype=torch.float64)
    """
    z, w = pixels.logits, pixels.weight
    count = z.new_full((z.shape[0], 1), z.shape[2], dtype=wide_dtype(z)) if w is None else total(w)

    def add(values: Tensor, ids: Tensor | None = None) -> Tensor:
        return total(values) if ids is None else _total_by_class(values, ids, z)

    return accumulate(pixels, required, add, count, pixels.annotated)


def accumulate(
    pixels: Pixels,
    required: RequiredSums,
    add: Callable[..., Tensor],
    count: Tensor,
    annotated: Tensor | None,
) -> OverlapSums:
    """Compute the sums, whatever the groups of pixels over which they are taken.

    Args:
        pixels: logits and target.
        required: sums beyond overlap, predicted, actual and count.
        add: sums `(images, 1 or classes, pixels)` over the pixels of each group, `add(values)`; `add(values, ids)` adds
            `(images, 1, pixels)` only to the class of each pixel.
        count: the sum of the weights.
        annotated: False for sums that are to be 0; `None` for none.
    """
    z, w = pixels.logits, pixels.weight
    p = pixels.probs()
    predicted = add(_weighted(p, w))
    more: dict[str, Tensor] = {}
    if required.squares:
        more["predicted_squares"] = add(_weighted(p * p, w))
    if required.all_nll:
        more["all_nll"] = add(_weighted(_minus_log(z, p, pixels.activation), _smoothing_weight(pixels)))
    if required.absent_nll:
        more["absent_nll"] = add(_weighted(_minus_log_complement(z, p, pixels.activation), w))
    nll = pixels.nll() if required.nll or (required.focal and not pixels.planes) else None
    if pixels.planes:
        t = pixels.target.to(z.dtype)
        soft = pixels.target.is_floating_point()
        overlap, actual = add(_weighted(p * t, w)), add(_weighted(t, w))
        if required.squares:
            more["actual_squares"] = add(_weighted(t * t, w)) if soft else actual
        if required.minimum:
            more["minimum"] = add(_weighted(torch.minimum(p, t), w)) if soft else overlap
        if required.nll and nll is not None:
            more["nll"] = add(_weighted(nll, w))
        if required.focal:
            more["focal"] = add(_weighted(_focal_planes(pixels, p, t, required.focal), w))
    else:
        ids = pixels.target.long()
        own = None if w is None else w if w.shape[1] == 1 else w.gather(1, ids)
        p_true = p.gather(1, ids)
        overlap = add(_weighted(p_true, own), ids)
        actual = add(torch.ones_like(p_true) if own is None else own, ids)
        if required.squares:
            more["actual_squares"] = actual
        if required.minimum:
            more["minimum"] = overlap
        if nll is not None:
            if required.nll:
                more["nll"] = add(_weighted(nll, own), ids)
            if required.focal:
                more["focal"] = add(_weighted(_focal(nll, required.focal.gamma), own), ids)
    exclusive = pixels.activation == "softmax" or not pixels.planes
    sums = OverlapSums(overlap, predicted, actual, count.expand_as(overlap), **more, exclusive=exclusive)
    sums = sums if pixels.activation is None else _without_underflow(sums)
    if annotated is None:
        return sums
    return sums.map(lambda field: field.where(annotated, torch.zeros((), dtype=field.dtype, device=field.device)))


def _smoothing_weight(pixels: Pixels) -> Tensor | None:
    """Return the weight of each pixel in the sum of -log p over all classes, among which smoothing divides a label."""
    w, annotated = pixels.weight, pixels.annotated
    if annotated is None or (pixels.planes and pixels.activation != "softmax"):
        return w
    images, classes = annotated.shape
    known = annotated.to(pixels.logits.dtype)
    if pixels.planes:
        own = (pixels.target.to(known.dtype) * known.unsqueeze(2)).sum(1, keepdim=True)
    else:
        own = known.gather(1, pixels.target.flatten(1).long()).view(pixels.target.shape)
    own = own * (classes / known.sum(1).clamp(min=1)).view(images, 1, 1)
    return own if w is None else w * own


def _without_underflow(sums: OverlapSums) -> OverlapSums:
    """Raise the sums of probabilities to those of `LEAST`, see `Backend.forward`."""
    count, actual = sums.count, sums.actual
    limits = {"overlap": actual, "predicted": count, "predicted_squares": count, "minimum": actual}
    found = sums.fields
    return sums.replace(**{name: at_least(found[name], limits[name]) for name in limits if name in found})


def total(values: Tensor) -> Tensor:
    """Sum `(images, classes, pixels)` over the pixels, in float64 (float32 on devices without it).

    >>> total(torch.ones(1, 2, 3))
    tensor([[3., 3.]], dtype=torch.float64)
    """
    return apply_exactly(_Total, values)


def _minus_log(z: Tensor, p: Tensor, activation: str | None) -> Tensor:
    """Return -log p of every class."""
    if activation == "softmax":
        return -z.log_softmax(1)
    return softplus(-z) if activation == "sigmoid" else -log(p)


def _minus_log_complement(z: Tensor, p: Tensor, activation: str | None) -> Tensor:
    """Return -log(1 - p) of every class, without the cancellation in 1 - p near p = 1."""
    if activation == "sigmoid":
        return softplus(z)
    if activation is None:
        return -log(1 - p)
    # Only one class can exceed 1/2. Its 1 - p is the probability of the others, computed from their logits.
    likely = p > 0.5
    others = z.masked_fill(likely, -torch.inf).logsumexp(1, keepdim=True)
    return torch.where(likely, softplus(z - others), -torch.log1p(-p.masked_fill(likely, 0)))


def _focal(nll: Tensor, gamma: float) -> Tensor:
    """Return (1 - p)^gamma (-log p), given -log p."""
    # expm1 is exact near p = 1. Clamped, as an exponent below 1 has an infinite derivative at 0.
    return (-torch.expm1(-nll)).clamp(min=torch.finfo(nll.dtype).tiny) ** gamma * nll


def _focal_planes(pixels: Pixels, p: Tensor, t: Tensor, focal: Focal) -> Tensor:
    """Return the focal cross-entropy of each plane, linear in t: its mean over labels drawn with probability t."""
    z = pixels.logits
    if pixels.activation == "softmax":
        return t * _focal(-z.log_softmax(1), focal.gamma)
    if pixels.activation == "sigmoid":
        nll, absent = softplus(-z), softplus(z)
        # p^gamma as exp(-gamma · -log p), which is finite, like its gradient, for every logit and gamma.
        present, absent = torch.exp(-focal.gamma * absent) * nll, torch.exp(-focal.gamma * nll) * absent
    else:
        present, absent = _focal(-log(p), focal.gamma), _focal(-log(1 - p), focal.gamma)
    front, back = (1.0, 1.0) if focal.alpha is None else (focal.alpha, 1 - focal.alpha)
    return front * t * present + back * (1 - t) * absent


def _weighted(values: Tensor, weight: Tensor | None) -> Tensor:
    return values if weight is None else values * weight


class _Total(ExactFunction):
    """Sum over pixels in float64. Its own function, as autograd would copy the gradients of the blocks to join them."""

    @staticmethod
    def value(x: Tensor) -> Tensor:
        blocks = [block.sum(-1, dtype=wide_dtype(x)) for block in torch.split(x, _BLOCK, dim=-1)]
        return torch.stack(blocks).sum(0)

    @staticmethod
    def pull(grad: Tensor, saved: Tensor) -> Tensor:
        return grad.to(saved.dtype).unsqueeze(-1).expand(saved.shape)

    @classmethod
    def push(cls, tangent: Tensor, saved: Tensor) -> Tensor:
        return _Total.value(tangent)

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        # Not the values themselves, which would stay in memory.
        ctx.shape, ctx.dtype = values.shape, values.dtype
        return _Total.value(values)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return grad[0].to(ctx.dtype).unsqueeze(-1).expand(ctx.shape)


def _total_by_class(values: Tensor, ids: Tensor, like: Tensor) -> Tensor:
    """Add each pixel of `(images, 1, pixels)` to its own class, in float64 as a class may have millions of pixels."""
    zeros = like.new_zeros(like.shape[:2], dtype=wide_dtype(like))
    return zeros.scatter_add(1, ids.squeeze(1), values.squeeze(1).to(zeros.dtype))
