"""Flattened logits and target, with ignored pixels blanked: the input of the reference and of other losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dice.kernels.sums import valid_pixels
from lightning_dice.library_internals.torch import is_transforming


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
        return apply_exactly(_Softmax if self.activation == "softmax" else _Sigmoid, self.logits)

    def target_planes(self) -> Tensor:
        """Return the target as planes in the dtype of the logits, one-hot for class ids."""
        if self.planes:
            return self.target.to(self.logits.dtype)
        classes = torch.arange(self.logits.shape[1], device=self.target.device).view(-1, 1)
        return (self.target == classes).to(self.logits.dtype)

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


class ExactFunction(torch.autograd.Function):
    """Base of functions with a derivative more exact than that of torch: of one tensor, and with its `save`d tensor.

    Called by `apply_exactly`.
    """

    @staticmethod
    def value(x: Tensor) -> Tensor:
        """Return the result."""
        raise NotImplementedError

    @staticmethod
    def save(x: Tensor, y: Tensor) -> Tensor:
        """Return what the derivative needs: the argument or the result."""
        return x

    @staticmethod
    def pull(grad: Tensor, saved: Tensor) -> Tensor:
        """Return the gradient of the argument from that of the result."""
        raise NotImplementedError

    @classmethod
    def push(cls, tangent: Tensor, saved: Tensor) -> Tensor:
        """Return the tangent of the result from that of the argument: by default, of a symmetric derivative."""
        return cls.pull(tangent, saved)


class _Transformed(torch.autograd.Function):
    """An `ExactFunction` in a transform of `torch.func` or in forward mode.

    Every function could have this form, but its call takes 15 µs more.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, function: type[ExactFunction]) -> Tensor:
        return function.value(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.function = inputs
        saved = ctx.function.save(x, output)
        ctx.save_for_backward(saved)
        ctx.save_for_forward(saved)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        return ctx.function.pull(grad[0], *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        pushed: Tensor = ctx.function.push(tangents[0], *ctx.saved_tensors)
        return pushed


def apply_exactly(function: type[ExactFunction], x: Tensor) -> Tensor:
    """Call a function, within transforms of `torch.func` too."""
    transforming = not torch.compiler.is_compiling() and is_transforming()
    result: Tensor = _Transformed.apply(x, function) if transforming else function.apply(x)
    return result


class _Sigmoid(ExactFunction):
    """Sigmoid with the gradient p · sigmoid(-z). Above a logit of 18, float32 rounds p to 1 and p (1 - p) to 0."""

    @staticmethod
    def value(x: Tensor) -> Tensor:
        return x.sigmoid()

    @staticmethod
    def pull(grad: Tensor, saved: Tensor) -> Tensor:
        return grad * (saved.sigmoid() * (-saved).sigmoid())

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.sigmoid()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return _Sigmoid.pull(grad[0], *ctx.saved_tensors)


class _Softmax(ExactFunction):
    """Softmax whose gradient stays exact if one class is almost certain: see "By p" in `kernels.backend`.

    The class m is the one with p > 1/2, if any. Only its own gradient needs the form without cancellation, with
    q as the sum of the other probabilities. The derivative is a symmetric matrix, so tangents follow the same formula.
    """

    @staticmethod
    def value(x: Tensor) -> Tensor:
        return x.softmax(1)

    @staticmethod
    def save(x: Tensor, y: Tensor) -> Tensor:
        return y

    @staticmethod
    def pull(grad: Tensor, saved: Tensor) -> Tensor:
        g, p = grad, saved
        likely = p > 0.5
        others = p.masked_fill(likely, 0)
        rest, whole = (g * others).sum(1, keepdim=True), (g * p).sum(1, keepdim=True)
        return p * torch.where(likely, g * others.sum(1, keepdim=True) - rest, g - whole)

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        p = z.softmax(1)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return _Softmax.pull(grad[0], *ctx.saved_tensors)


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
