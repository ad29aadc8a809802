"""Flattened logits and target, with ignored pixels blanked: the input of the reference and of other losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dice.kernels.sums import valid_pixels


@dataclass(frozen=True)
class Pixels:
    """Flattened input; whatever ignored pixels held is replaced by 0.

    Attributes:
        logits: `(images, classes, pixels)`, float32 or float64.
        target: class ids `(images, 1, pixels)` or planes `(images, classes, pixels)`.
        weight: `(images, 1 or classes, pixels)`; `None` if every pixel has the weight 1.
        activation: maps logits to probabilities.
        planes: whether the target holds planes.
        annotated: `(images, classes)`, False for a class that is not annotated in an image; `None` if all are.

    >>> pixels = Pixels(torch.zeros(1, 2, 3), torch.tensor([[[0, 1, 1]]]), None, "softmax", planes=False)
    >>> pixels.probs()
    tensor([[[0.5000, 0.5000, 0.5000],
             [0.5000, 0.5000, 0.5000]]])
    >>> pixels.target_planes()
    tensor([[[1., 0., 0.],
             [0., 1., 1.]]])
    >>> pixels.nll()
    tensor([[[0.6931, 0.6931, 0.6931]]])
    """

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    activation: str | None
    planes: bool
    annotated: Tensor | None = None

    def probs(self) -> Tensor:
        """Return the probabilities, `(images, classes, pixels)`."""
        if self.activation is None:
            return self.logits
        function = _Softmax if self.activation == "softmax" else _Sigmoid
        probs: Tensor = function.apply(self.logits)
        return probs

    def target_planes(self) -> Tensor:
        """Return the target as planes in the dtype of the logits, one-hot for class ids."""
        if self.planes:
            return self.target.to(self.logits.dtype)
        return torch.zeros_like(self.logits).scatter_(1, self.target.long(), 1.0)

    def nll(self) -> Tensor:
        """Return -log p of the true class, `(images, 1, pixels)`, or with planes the cross-entropy of each plane."""
        z, t = self.logits, self.target
        if not self.planes:
            return _true_nll(z, t.long()) if self.activation == "softmax" else -log(z.gather(1, t.long()))
        t = t.to(z.dtype)
        if self.activation == "softmax":
            return -t * z.log_softmax(1)
        if self.activation == "sigmoid":
            return t * softplus(-z) + (1 - t) * softplus(z)
        return -t * log(z) - (1 - t) * log(1 - z)


def read_pixels(
    logits: Tensor,
    target: Tensor,
    *,
    activation: str | None,
    ignore_index: int | None = None,
    weight: Tensor | None = None,
    annotated: Tensor | None = None,
) -> Pixels:
    """Flatten input that has been checked, and blank its ignored pixels.

    Args:
        logits: `(batch, classes, *space)`.
        target: ids `(batch, *space)` or planes `(batch, classes, *space)`.
        activation: maps logits to probabilities.
        ignore_index: label of the pixels to ignore.
        weight: `(batch, *space)` or `(batch, classes, *space)`.
        annotated: `(batch, classes)`. If classes exclude each other, pixels of a class that is not annotated are
            labelled as background, class 0, so the probability of that class is added to the background's (Shi et al.,
            Medical Image Analysis 2021, "marginal loss").
    """
    z = logits.flatten(2)
    z = z if z.dtype == torch.float64 else z.float()
    planes = target.shape == logits.shape
    t = target.reshape(z.shape if planes else (z.shape[0], 1, z.shape[2]))
    w = None
    if weight is not None:
        w = weight.reshape(z.shape if weight.shape == logits.shape else (z.shape[0], 1, z.shape[2])).to(z.dtype)

    valid = valid_pixels(t, ignore_index)
    if valid is not None:
        if planes and activation == "softmax":
            valid = valid.all(1, keepdim=True)
        t = t.where(valid, torch.zeros((), dtype=t.dtype, device=t.device))
        # Replaced, not multiplied by zero: an ignored pixel may hold NaN, and NaN times zero is NaN.
        zero = torch.zeros((), dtype=z.dtype, device=z.device)
        z = z.where(valid, zero)
        w = valid.to(z.dtype) if w is None else w.where(valid, zero)
    if annotated is not None:
        z = _merge_unannotated(z, annotated, exclusive=not planes or activation == "softmax", activation=activation)
        if planes:
            t = t.where(annotated.unsqueeze(2), torch.zeros((), dtype=t.dtype, device=t.device))
    return Pixels(z, t, w, activation, planes, annotated)


def _merge_unannotated(z: Tensor, annotated: Tensor, *, exclusive: bool, activation: str | None) -> Tensor:
    """Blank the classes that are not annotated, after adding their probability to the background's if exclusive."""
    missing = ~annotated.unsqueeze(2)
    nothing = torch.zeros((), dtype=z.dtype, device=z.device)
    if not exclusive:
        return z.where(~missing, nothing)
    merged = missing.clone()
    merged[:, 0] = True
    if activation == "softmax":
        # Low enough for a probability of 0, but finite, as infinity minus infinity is NaN.
        nothing = torch.full((), torch.finfo(z.dtype).min / 8, dtype=z.dtype, device=z.device)
        background = z.masked_fill(~merged, -torch.inf).logsumexp(1, keepdim=True)
    else:
        background = z.where(merged, nothing).sum(1, keepdim=True)
    return torch.cat([background, z[:, 1:].where(~missing[:, 1:], nothing)], 1)


class _Sigmoid(torch.autograd.Function):
    """Sigmoid with the gradient p · sigmoid(-z). Above a logit of 18, float32 rounds p to 1 and p (1 - p) to 0."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.sigmoid()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        derivative: Tensor = z.sigmoid() * (-z).sigmoid()
        return grad[0] * derivative


class _Softmax(torch.autograd.Function):
    """Softmax whose gradient stays exact if one class is almost certain: see "By p" in `kernels.backend`.

    The class m is the one with p > 1/2, if any. Only its own gradient needs the form without cancellation, with
    q as the sum of the other probabilities.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        p = z.softmax(1)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        (p,), g = ctx.saved_tensors, grad[0]
        likely = p > 0.5
        others = p.masked_fill(likely, 0)
        rest, whole = (g * others).sum(1, keepdim=True), (g * p).sum(1, keepdim=True)
        gradient: Tensor = p * torch.where(likely, g * others.sum(1, keepdim=True) - rest, g - whole)
        return gradient


def _true_nll(z: Tensor, ids: Tensor) -> Tensor:
    """Return -log p of the true class as softplus(logsumexp of the others - its logit), which is exact near p = 1."""
    own = z.gather(1, ids)
    others = z.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    # Infinity minus infinity is NaN: an infinite logit, from a network that has diverged, must show.
    return softplus(others - own) + (own - own)


def softplus(z: Tensor) -> Tensor:
    """Return log(1 + e^z), exact in float64: with the default threshold of 20, torch drops a term of e^-20."""
    return F.softplus(z, threshold=40)


def log(p: Tensor) -> Tensor:
    """Return the logarithm of a probability, finite and with a gradient of 0 at p = 0."""
    # Clamped before the logarithm, as afterwards the gradient at 0 would be 0 times infinity.
    return p.clamp(min=torch.finfo(p.dtype).tiny).log()
