"""The backends in autograd: as an operator, which `torch.compile` keeps whole, and as a function for eager calls."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from lightning_dice.kernels import reference
from lightning_dice.kernels.backend import OutOfRange, SumsSpec
from lightning_dice.kernels.checks import check_values
from lightning_dice.kernels.dispatch import BACKENDS
from lightning_dice.kernels.pixels import read_pixels
from lightning_dice.kernels.sums import Focal, RequiredSums

_SUM_NAMES = tuple(field.name for field in dataclasses.fields(RequiredSums))
# Activation, ignored label, names of the required sums joined by commas, gamma and alpha of the focal factor.
FlatSpec = tuple[str | None, int | None, str, float, float | None]


def flatten_spec(spec: SumsSpec) -> FlatSpec:
    """Flatten a spec to scalars, as the schema of an operator requires. `planes` and `soft` follow from the tensors."""
    focal = spec.required.focal
    names = [name for name in _SUM_NAMES if getattr(spec.required, name)]
    gamma, alpha = (focal.gamma, focal.alpha) if focal else (0.0, None)
    return spec.activation, spec.ignore_index, ",".join(names), gamma, alpha


def _unflatten_spec(logits: Tensor, target: Tensor, activation: Any, ignore_index: int | None, *flat: Any) -> SumsSpec:
    planes = target.shape == logits.shape
    return SumsSpec(activation, planes, planes and target.is_floating_point(), ignore_index, _unflatten_required(*flat))


@functools.cache
def _unflatten_required(sums: str, gamma: float, alpha: float | None) -> RequiredSums:
    names = set(sums.split(",")) - {""}
    flags: dict[str, Any] = dict.fromkeys(names - {"focal"}, True)
    return RequiredSums(**flags, focal=Focal(gamma, alpha) if "focal" in names else None)


@torch.library.custom_op("lightning_dice::overlap_sums", mutates_args=())
def compiled_sums(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    backend: str,
    activation: str | None,
    ignore_index: int | None,
    sums: str,
    gamma: float,
    alpha: float | None,
) -> Tensor:
    """Return the sums of `SumsSpec.rows`, float64 `(rows, images, classes)`, in a graph of `torch.compile`.

    The last five arguments are those of `flatten_spec`, the others those of `Backend.forward`.

    Raises:
        ValueError: on the CPU, a value is outside its range.
    """
    spec = _unflatten_spec(logits, target, activation, ignore_index, sums, gamma, alpha)
    return _forward(backend, spec, logits, target, weight)


@torch.library.custom_op("lightning_dice::overlap_sums_backward", mutates_args=())
def _compiled_gradient(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    backend: str,
    activation: str | None,
    ignore_index: int | None,
    sums: str,
    gamma: float,
    alpha: float | None,
) -> Tensor:
    spec = _unflatten_spec(logits, target, activation, ignore_index, sums, gamma, alpha)
    return BACKENDS[backend].backward(spec, grad, logits, target, weight)


@compiled_sums.register_fake
def _(logits: Tensor, target: Tensor, weight: Tensor | None, backend: str, *flat: Any) -> Tensor:
    rows = len(_unflatten_spec(logits, target, *flat).rows)
    return logits.new_empty((rows, logits.shape[0], logits.shape[1]), dtype=torch.float64)


@_compiled_gradient.register_fake
def _(grad: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, target, weight, ctx.backend, *ctx.flat = inputs
    ctx.save_for_backward(logits, target, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, target, weight = ctx.saved_tensors
    if torch.is_grad_enabled():
        gradient = _reference_gradient(_unflatten_spec(logits, target, *ctx.flat), grad, logits, target, weight)
    else:
        gradient = _compiled_gradient(grad, logits, target, weight, ctx.backend, *ctx.flat)
    return gradient, None, None, None, *(None for _ in ctx.flat)


compiled_sums.register_autograd(_backward, setup_context=_setup_context)


def eager_sums(logits: Tensor, target: Tensor, weight: Tensor | None, backend: str, spec: SumsSpec) -> Tensor:
    """Return what `compiled_sums` does, in an eager call."""
    # The operator would do, but takes 0.11 ms more, forward and backward: 29 % of a call of `overlap_sums`, and 20 % of
    # one of `DiceLoss`, on logits of 8 x 1 x 64 x 64 (torch 2.14, one thread, medians of 3000 interleaved calls).
    sums: Tensor = _EagerSums.apply(logits, target, weight, backend, spec)
    return sums


class _EagerSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, backend: str, spec: SumsSpec
    ) -> Tensor:
        ctx.save_for_backward(logits, target, weight)
        ctx.backend, ctx.spec = backend, spec
        return _forward(backend, spec, logits, target, weight)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradient = _reference_gradient(ctx.spec, grad[0], logits, target, weight)
        else:
            gradient = BACKENDS[ctx.backend].backward(ctx.spec, grad[0], logits, target, weight)
        return gradient, None, None, None, None


def _forward(backend: str, spec: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    options: Any = {"activation": spec.activation, "ignore_index": spec.ignore_index, "weight": weight}
    if logits.device.type == "cpu" and not BACKENDS[backend].CHECKS_VALUES:
        check_values(logits, target, **options)
    try:
        return BACKENDS[backend].forward(spec, logits, target, weight)
    except OutOfRange:
        check_values(logits, target, **options)
        # The check, in another dtype, found every value in range: it was at a limit.
        return _reference_sums(spec, logits, target, weight)


def _reference_gradient(spec: SumsSpec, grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Return a gradient of the logits that can be differentiated again, which only the reference provides."""
    sums = _reference_sums(spec, logits, target, weight)
    (gradient,) = torch.autograd.grad(sums, logits, grad, create_graph=True)
    return gradient


def _reference_sums(spec: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    pixels = read_pixels(logits, target, activation=spec.activation, ignore_index=spec.ignore_index, weight=weight)
    sums = reference.overlap_sums(pixels, spec.required)
    return torch.stack([sums.fields[name].double() for name in spec.rows])
