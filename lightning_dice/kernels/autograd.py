"""The sums by a faster twin, in the graph of autograd.

Twice: as an operator of PyTorch, which `torch.compile` takes without a break, and as a function, which in a plain call
takes half the time: 0.04 instead of 0.09 ms, forward and backward, of a few pixels.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from lightning_dice.kernels import reference
from lightning_dice.kernels.backend import OutOfRange, SumsSpec
from lightning_dice.kernels.checks import check_values
from lightning_dice.kernels.dispatch import TWINS
from lightning_dice.kernels.pixels import read_pixels
from lightning_dice.kernels.sums import Focal, RequiredSums

_WISHES = tuple(field.name for field in dataclasses.fields(RequiredSums))
# What a call is told apart from its tensors: the twin, activation, ignored label, names of the sums, focal factor.
Told = tuple[str, str, int | None, str, float, float | None]


def told(twin: str, work: SumsSpec) -> Told:
    """A twin and a work as an operator takes them."""
    focal = work.wanted.focal
    wanted = [name for name in _WISHES if getattr(work.wanted, name)]
    gamma, alpha = (focal.gamma, focal.alpha) if focal else (0.0, None)
    return twin, str(work.activation), work.ignore_index, ",".join(wanted), gamma, alpha


def _work(logits: Tensor, target: Tensor, activation: str, ignore_index: int | None, *wanted: Any) -> SumsSpec:
    planes = target.shape == logits.shape
    return SumsSpec(
        "softmax" if activation == "softmax" else "sigmoid",
        planes,
        planes and target.is_floating_point(),
        ignore_index,
        _wanted(*wanted),
    )


@functools.cache
def _wanted(names: str, gamma: float, alpha: float | None) -> RequiredSums:
    found = set(names.split(",")) - {""}
    flags: dict[str, Any] = dict.fromkeys(found - {"focal"}, True)
    return RequiredSums(**flags, focal=Focal(gamma, alpha) if "focal" in found else None)


@torch.library.custom_op("lightning_dice::overlap_sums", mutates_args=())
def overlap_sums(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    twin: str,
    activation: str,
    ignore_index: int | None,
    wanted: str,
    gamma: float,
    alpha: float | None,
) -> Tensor:
    """The rows of `Work`, float64 `(rows, images, classes)`.

    Arguments as of `lightning_dice.kernels.overlap_sums`; the last six are what `told` makes of a work.

    Raises:
        ValueError: on the CPU, a value outside its range.
    """
    return _forward(twin, _work(logits, target, activation, ignore_index, wanted, gamma, alpha), logits, target, weight)


@torch.library.custom_op("lightning_dice::overlap_sums_backward", mutates_args=())
def _slope(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    twin: str,
    activation: str,
    ignore_index: int | None,
    wanted: str,
    gamma: float,
    alpha: float | None,
) -> Tensor:
    work = _work(logits, target, activation, ignore_index, wanted, gamma, alpha)
    return TWINS[twin].backward(work, grad, logits, target, weight)


@overlap_sums.register_fake
def _(logits: Tensor, target: Tensor, weight: Tensor | None, *told: Any) -> Tensor:
    rows = len(_work(logits, target, *told[1:]).rows)
    return logits.new_empty((rows, logits.shape[0], logits.shape[1]), dtype=torch.float64)


@_slope.register_fake
def _(grad: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, target, weight, *ctx.told = inputs
    ctx.save_for_backward(logits, target, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, target, weight = ctx.saved_tensors
    if torch.is_grad_enabled():
        slope = _slope_of_reference(_work(logits, target, *ctx.told[1:]), grad, logits, target, weight)
    else:
        slope = _slope(grad, logits, target, weight, *ctx.told)
    return slope, None, None, *(None for _ in ctx.told)


overlap_sums.register_autograd(_backward, setup_context=_remember)


def plain_sums(logits: Tensor, target: Tensor, weight: Tensor | None, twin: str, work: SumsSpec) -> Tensor:
    """The same in a call that is not compiled."""
    sums: Tensor = _Sums.apply(logits, target, weight, twin, work)
    return sums


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, twin: str, work: SumsSpec) -> Tensor:
        ctx.save_for_backward(logits, target, weight)
        ctx.twin, ctx.work = twin, work
        return _forward(twin, work, logits, target, weight)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            slope = _slope_of_reference(ctx.work, grad[0], logits, target, weight)
        else:
            slope = TWINS[ctx.twin].backward(ctx.work, grad[0], logits, target, weight)
        return slope, None, None, None, None


def _forward(twin: str, work: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    done = TWINS[twin]
    asked = {"activation": work.activation, "ignore_index": work.ignore_index, "weight": weight}
    if logits.device.type == "cpu" and not done.CHECKS_VALUES:
        check_values(logits, target, **asked)  # type: ignore[arg-type]
    try:
        return done.forward(work, logits, target, weight)
    except OutOfRange:
        check_values(logits, target, **asked)  # type: ignore[arg-type]
        return _reference(work, logits, target, weight)  # At the limits of another dtype, and in range after all.


def _slope_of_reference(work: SumsSpec, grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """The gradient of logits as somebody needs it who differentiates it again: which only the reference can have."""
    sums = _reference(work, logits, target, weight)
    (slope,) = torch.autograd.grad(sums, logits, grad, create_graph=True)
    return slope


def _reference(work: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    pixels = read_pixels(logits, target, activation=work.activation, ignore_index=work.ignore_index, weight=weight)
    sums = reference.overlap_sums(pixels, work.wanted)
    return torch.stack([sums.fields[name].double() for name in work.rows])
