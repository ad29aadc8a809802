"""The sums of any input: checked, then done by whichever implementation is chosen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_dice.kernels import autograd, reference
from lightning_dice.kernels.backend import SumsSpec
from lightning_dice.kernels.checks import COMPARABLE, Activation, check_logits, check_shapes, check_values, reads_values
from lightning_dice.kernels.dispatch import chosen, refuse_if_strict
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
    wanted: RequiredSums = RequiredSums(),  # noqa: B008  (frozen)
) -> OverlapSums:
    """Sum what overlap losses need of each class in each image.

    Args:
        logits: `(batch, classes, *space)`, floating point, any number of space axes.
        target: `"softmax"`: class ids `(batch, *space)` or soft labels `(batch, classes, *space)`;
            `"sigmoid"`: one plane for each class, `(batch, classes, *space)`; `None`: either.
        activation: what turns logits into probabilities; `None` where they are probabilities already.
        ignore_index: pixels whose target holds this value count as nothing, whatever their logits hold. With
            planes, a plane's pixel is ignored alone; with soft labels, a pixel is ignored if any class holds it.
        weight: weight of each pixel, `(batch, *space)`, or of each pixel and class, `(batch, classes, *space)`.
        annotated: bool, `(batch, classes)`; a class that is not annotated in an image has sums of 0 there. Where
            classes exclude each other its probability counts as the background's, class 0, as which its pixels are
            labelled.
        wanted: sums beyond overlap, predicted, actual and count.

    Returns:
        The sums, in float64 (float32 on devices without it), differentiable in `logits`.

    Raises:
        ValueError: a shape that would broadcast, a wrong dtype or, on the CPU, a value outside its range.

    >>> logits = torch.tensor([[[9.0, 9.0, -9.0]]])
    >>> sums = overlap_sums(logits, torch.tensor([[[1, 0, 0]]]))
    >>> [round(float(field), 2) for field in (sums.overlap, sums.predicted, sums.actual, sums.count)]
    [1.0, 2.0, 1.0, 3.0]
    """
    with full_precision(logits):
        check_shapes(logits, target, activation=activation, weight=weight, annotated=annotated)
        work = _work(logits, target, activation, ignore_index, wanted)
        twin = None if annotated is not None else _twin(work, logits, target, weight)
        if twin is not None:
            return _by_twin(twin, work, logits, target, weight)
        refuse_if_strict()
        pixels = checked_pixels(
            logits, target, activation=activation, ignore_index=ignore_index, weight=weight, annotated=annotated
        )
        return reference.overlap_sums(pixels, wanted)


def _work(
    logits: Tensor, target: Tensor, activation: Activation, ignore_index: int | None, wanted: RequiredSums
) -> SumsSpec:
    planes = target.shape == logits.shape
    ignore_index = ignore_index if holds_label(target, ignore_index) else None
    return SumsSpec(activation, planes, planes and target.is_floating_point(), ignore_index, wanted)


def _twin(work: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> str | None:
    """The twin that does it: they differentiate in the logits alone."""
    if target.requires_grad or (weight is not None and weight.requires_grad):
        return None
    return chosen(work, logits, target, weight)


def _by_twin(twin: str, work: SumsSpec, logits: Tensor, target: Tensor, weight: Tensor | None) -> OverlapSums:
    if reads_values(logits):
        check_logits(logits, activation=work.activation)
    if torch.compiler.is_compiling():
        stacked = autograd.overlap_sums(logits, target, weight, *autograd.told(twin, work))
    else:
        stacked = autograd.plain_sums(logits, target, weight, twin, work)
    fields = dict(zip(work.rows, stacked.unbind(), strict=True))
    if not work.soft:
        # Of labels that are 0 or 1.
        fields |= {"minimum": fields["overlap"]} if work.wanted.minimum else {}
        fields |= {"actual_squares": fields["actual"]} if work.wanted.squares else {}
    return OverlapSums(**fields, exclusive=work.activation == "softmax" or not work.planes)


def full_precision(logits: Tensor) -> torch.autocast:
    """A context in which autocast, which would run part of a loss in half precision, is off.

    Raises:
        ValueError: logits that are no tensor, as what a network with several outputs returns.
    """
    if not isinstance(logits, Tensor):
        hint = (
            ": for a network with several outputs use DeepSupervision(loss)"
            if isinstance(logits, (list, tuple))
            else ""
        )
        hint = ': take logits["out"], or what the network calls them' if isinstance(logits, Mapping) else hint
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
    """Logits and target, checked and flattened, without harm in ignored pixels. Arguments as of `overlap_sums`.

    Raises:
        ValueError: a shape that would broadcast, a wrong dtype or, on the CPU, a value outside its range.
    """
    check_shapes(logits, target, activation=activation, weight=weight, annotated=annotated)
    if reads_values(logits):
        check_values(logits, target, activation=activation, ignore_index=ignore_index, weight=weight)
        check_logits(logits, activation=activation)
    if not target.is_floating_point() and target.dtype not in (*COMPARABLE, torch.bool):
        target = target.long()
    return read_pixels(
        logits, target, activation=activation, ignore_index=ignore_index, weight=weight, annotated=annotated
    )
