"""Logits and target as every sum, and every loss that is not a sum, reads them: ignored pixels hold nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dice.kernels.sums import valid_pixels


@dataclass(frozen=True)
class Pixels:
    """Flattened input in which no ignored pixel can do harm.

    Attributes:
        logits: `(images, classes, pixels)`, float32 or float64; 0 where ignored.
        target: class ids `(images, 1, pixels)` or planes `(images, classes, pixels)`; 0 where ignored.
        weight: `(images, 1 or classes, pixels)`, 0 where ignored; `None`: 1 everywhere.
        activation: what turns logits into probabilities.
        planes: whether the target is planes.
        annotated: `(images, classes)`, False for a class that its image says nothing about; `None`: all are.
    """

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    activation: str | None
    planes: bool
    annotated: Tensor | None = None

    def probs(self) -> Tensor:
        """Probabilities, `(images, classes, pixels)`."""
        if self.activation is None:
            return self.logits
        function = _Softmax if self.activation == "softmax" else _Sigmoid
        probs: Tensor = function.apply(self.logits)
        return probs

    def target_planes(self) -> Tensor:
        """The target as planes of the logits' dtype, for losses that cannot do without: ids become one-hot."""
        if self.planes:
            return self.target.to(self.logits.dtype)
        return torch.zeros_like(self.logits).scatter_(1, self.target.long(), 1.0)

    def nll(self) -> Tensor:
        """-log p of the true class, `(images, 1, pixels)`, or with planes the cross-entropy of each of them."""
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
    """`Pixels` of input that has passed its checks.

    Args:
        logits: `(batch, classes, *space)`.
        target: ids `(batch, *space)` or planes `(batch, classes, *space)`.
        activation: what turns logits into probabilities.
        ignore_index: the label of pixels that count as nothing.
        weight: `(batch, *space)` or `(batch, classes, *space)`.
        annotated: `(batch, classes)`. Where classes exclude each other, a pixel that belongs to a class that is not
            annotated is labelled as background: there the probabilities of these classes count as the background's,
            class 0 (Shi et al., Medical Image Analysis 2021, "marginal loss").
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
        z = _without(z, annotated, exclusive=not planes or activation == "softmax", activation=activation)
        if planes:
            t = t.where(annotated.unsqueeze(2), torch.zeros((), dtype=t.dtype, device=t.device))
    return Pixels(z, t, w, activation, planes, annotated)


def _without(z: Tensor, annotated: Tensor, *, exclusive: bool, activation: str | None) -> Tensor:
    """Logits without the classes that are not annotated, their probability given to the background."""
    missing = ~annotated.unsqueeze(2)
    nothing = torch.zeros((), dtype=z.dtype, device=z.device)
    if not exclusive:
        return z.where(~missing, nothing)
    merged = missing.clone()
    merged[:, 0] = True
    if activation == "softmax":
        # Finite, as infinity minus infinity is NaN; small enough for a probability of 0.
        nothing = torch.full((), torch.finfo(z.dtype).min / 8, dtype=z.dtype, device=z.device)
        background = z.masked_fill(~merged, -torch.inf).logsumexp(1, keepdim=True)
    else:
        background = z.where(merged, nothing).sum(1, keepdim=True)
    return torch.cat([background, z[:, 1:].where(~missing[:, 1:], nothing)], 1)


class _Sigmoid(torch.autograd.Function):
    """Sigmoid with a gradient of p · sigmoid(-z): p (1 - p) is 0 from a logit of 18 on, where float32 has p = 1."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.sigmoid()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        slope: Tensor = z.sigmoid() * (-z).sigmoid()
        return grad[0] * slope


class _Softmax(torch.autograd.Function):
    r"""Softmax whose gradient keeps its digits where one class is all but certain.

    With g from above, :math:`dz_c = p_c\,(g_c - \sum_k g_k p_k)`. For a class m with p > 1/2, of which there can be one
    and whose p may be rounded to 1, that is :math:`p_m\,(g_m q - \sum_{k \ne m} g_k p_k)` with
    :math:`q = \sum_{k \ne m} p_k`, in which nothing of the order of 1 is left to cancel.
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
        slope: Tensor = p * torch.where(likely, g * others.sum(1, keepdim=True) - rest, g - whole)
        return slope


def _true_nll(z: Tensor, ids: Tensor) -> Tensor:
    """-log p of the true class as softplus(logsumexp of the others - its logit), which keeps its digits near p = 1."""
    own = z.gather(1, ids)
    others = z.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    # A logit of infinity is a network that has diverged: infinity minus infinity, NaN, says so.
    return softplus(others - own) + (own - own)


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z); the default threshold of 20 leaves out e^-20, which float64 would show."""
    return F.softplus(z, threshold=40)


def log(p: Tensor) -> Tensor:
    """Logarithm of a probability, of which 0 has a finite one with a gradient of 0."""
    # Clamped before the logarithm: after it, the gradient at 0 would be 0 times infinity.
    return p.clamp(min=torch.finfo(p.dtype).tiny).log()
