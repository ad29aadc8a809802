"""Logits and target as every sum, and every loss that is not a sum, reads them: ignored pixels hold nothing."""

from __future__ import annotations

from dataclasses import dataclass

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
        if self.activation == "softmax":
            return self.logits.softmax(1)
        return self.logits.sigmoid() if self.activation == "sigmoid" else self.logits

    def target_planes(self) -> Tensor:
        """The target as planes of the logits' dtype, for losses that cannot do without: ids become one-hot."""
        if self.planes:
            return self.target.to(self.logits.dtype)
        return torch.zeros_like(self.logits).scatter_(1, self.target.long(), 1.0)

    def nll(self) -> Tensor:
        """-log p of the true class, `(images, 1, pixels)`, or with planes the cross-entropy of each of them."""
        z, t = self.logits, self.target
        if not self.planes:
            log_p = z.log_softmax(1) if self.activation == "softmax" else log(z)
            return -log_p.gather(1, t.long())
        t = t.to(z.dtype)
        if self.activation == "softmax":
            return -t * z.log_softmax(1)
        if self.activation == "sigmoid":
            return F.binary_cross_entropy_with_logits(z, t, reduction="none")
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


def log(p: Tensor) -> Tensor:
    """Logarithm of a probability, of which 0 has a finite one with a gradient of 0."""
    # Clamped before the logarithm: after it, the gradient at 0 would be 0 times infinity.
    return p.clamp(min=torch.finfo(p.dtype).tiny).log()
