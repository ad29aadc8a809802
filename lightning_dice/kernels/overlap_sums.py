"""The entry point: check the input, choose a backend, return the sums."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_dice.kernels import autograd, reference
from lightning_dice.kernels.backend import SumsSpec
from lightning_dice.kernels.checks import (
    COMPARABLE,
    Activation,
    can_read_values,
    check_logits,
    check_shapes,
    check_values,
)
from lightning_dice.kernels.dispatch import choose_backend, refuse_if_strict
from lightning_dice.kernels.pixels import Pixels, read_pixels
from lightning_dice.kernels.sums import OverlapSums, RequiredSums, holds_label


def overlap_sums(
    logits: Tensor,
    target: Tensor,
    *,
    activation: Activation = "sigmoid",
    ignore_index: int | None = None,
    weight: Tensor | None = None,
    annotated: Tensor | None = None,
    required: RequiredSums = RequiredSums(),  # noqa: B008  (frozen)
) -> OverlapSums:
    """Compute the sums over pixels of each class in each image that overlap losses need.

    Args:
        logits: `(batch, classes, *space)`, floating point, with any number of space axes.
        target: with `"softmax"`, class ids `(batch, *space)` or soft labels `(batch, classes, *space)`; with
            `"sigmoid"`, one plane for each class, `(batch, classes, *space)`; with `None`, either.
        activation: maps logits to probabilities; `None` if they are probabilities already.
        ignore_index: pixels whose target holds this value are excluded from every sum, and their logits may hold
            anything, NaN included. With planes, each plane ignores its own pixels; with soft labels, a pixel is ignored
            if any class holds the value.
        weight: weight of each pixel, `(batch, *space)`, or of each pixel and class, `(batch, classes, *space)`.
        annotated: bool, `(batch, classes)`. The sums of a class that is not annotated in an image are 0. If classes
            exclude each other, its pixels are expected to be labelled as background, class 0, and its probability is
            added to that of the background.
        required: sums beyond overlap, predicted, actual and count.

    Returns:
        The sums, in float64 (float32 on devices without it), differentiable in `logits`.

    Raises:
        ValueError: a shape would broadcast, a dtype is wrong or, on the CPU, a value is outside its range.

    >>> logits = torch.tensor([[[9.0, 9.0, -9.0]]])
    >>> sums = overlap_sums(logits, torch.tensor([[[1, 0, 0]]]))
    >>> [round(float(field), 2) for field in (sums.overlap, sums.predicted, sums.actual, sums.count)]
    [1.0, 2.0, 1.0, 3.0]
    """
    with full_precision(logits):
        check_shapes(logits, target, activation=activation, weight=weight, annotated=annotated)
        if annotated is None and not target.requires_grad and not (weight is not None and weight.requires_grad):
            spec = _make_spec(logits, target, activation, ignore_index, required)
            if (backend := choose_backend(spec, logits, target, weight)) is not None:
                return _backend_sums(backend, spec, logits, target, weight)
        refuse_if_strict()
        pixels = checked_pixels(
            logits, target, activation=activation, ignore_index=ignore_index, weight=weight, annotated=annotated
        )
        return reference.overlap_sums(pixels, required)


def _make_spec(
    logits: Tensor, target: Tensor, activation: Activation, ignore_index: int | None, required: RequiredSums
) -> SumsSpec:
    planes = target.shape == logits.shape
    ignore_index = ignore_index if holds_label(target, ignore_index) else None
    return SumsSpec(activation, planes, planes and target.is_floating_point(), ignore_index, required)


def _backend_sums(backend: str, spec: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> OverlapSums:
    if can_read_values(logits):
        check_logits(logits, activation=spec.activation)
    if torch.compiler.is_compiling():
        stacked = autograd.compiled_sums(logits, target, weight, backend, *autograd.flatten_spec(spec))
    else:
        stacked = autograd.eager_sums(logits, target, weight, backend, spec)
    fields = dict(zip(spec.rows, stacked.unbind(), strict=True))
    if not spec.soft:
        # Labels are 0 or 1.
        fields |= {"minimum": fields["overlap"]} if spec.required.minimum else {}
        fields |= {"actual_squares": fields["actual"]} if spec.required.squares else {}
    return OverlapSums(**fields, exclusive=spec.activation == "softmax" or not spec.planes)


def full_precision(logits: Tensor) -> torch.autocast:
    """Return a context without autocast, which would compute part of a loss in half precision.

    Raises:
        ValueError: the logits are not a tensor, as from a network with several outputs.

    >>> with full_precision(torch.zeros(1, 1, 4)):
    ...     torch.is_autocast_enabled("cpu")
    False
    """
    if not isinstance(logits, Tensor):
        hint = (
            ": for a network with several outputs use DeepSupervision(loss)"
            if isinstance(logits, (list, tuple))
            else ""
        )
        hint = ': use logits["out"], or the key that the network returns' if isinstance(logits, Mapping) else hint
        raise ValueError(f"logits must be a tensor, got {type(logits).__name__}{hint}")
    return torch.autocast(logits.device.type, enabled=False)


def checked_pixels(
    logits: Tensor,
    target: Tensor,
    *,
    activation: Activation = "sigmoid",
    ignore_index: int | None = None,
    weight: Tensor | None = None,
    annotated: Tensor | None = None,
) -> Pixels:
    """Check and flatten logits and target, and blank ignored pixels. Takes the arguments of `overlap_sums`.

    Raises:
        ValueError: a shape would broadcast, a dtype is wrong or, on the CPU, a value is outside its range.

    >>> pixels = checked_pixels(torch.zeros(1, 2, 2, 2), torch.tensor([[[0, 1], [1, 255]]]),
    ...                         activation="softmax", ignore_index=255)
    >>> pixels.logits.shape, pixels.target, pixels.weight
    (torch.Size([1, 2, 4]), tensor([[[0, 1, 1, 0]]]), tensor([[[1., 1., 1., 0.]]]))
    """
    check_shapes(logits, target, activation=activation, weight=weight, annotated=annotated)
    if can_read_values(logits, target, *(() if weight is None else (weight,))):
        check_values(logits, target, activation=activation, ignore_index=ignore_index, weight=weight)
        check_logits(logits, activation=activation)
    if not target.is_floating_point() and target.dtype not in (*COMPARABLE, torch.bool):
        target = target.long()
    return read_pixels(
        logits, target, activation=activation, ignore_index=ignore_index, weight=weight, annotated=annotated
    )
