"""What the sums accept, and the one place where an implementation is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lightning_dice.kernels import reference
from lightning_dice.kernels.pixels import Pixels, read_pixels
from lightning_dice.kernels.sums import OverlapSums, Wanted, valid_pixels

Activation = Literal["sigmoid", "softmax"] | None

# torch knows no minimum of the other unsigned types.
_COMPARABLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

# What sums and interpolations of values in [0, 1] may be beyond it.
_ROUNDING = 1e-5
# So many values do not lie in [0, 1] by chance.
_TELLING = 64

_FLAT_TARGET = "for a mask of shape (batch, *space) use target.unsqueeze(1)"
_IDS_TARGET = 'class ids (batch, *space) go with activation="softmax"'
_PLANE_TARGET = "for a target of shape (batch, 1, *space) use target.squeeze(1)"


def overlap_sums(
    logits: Tensor,
    target: Tensor,
    *,
    activation: Activation = "sigmoid",
    ignore_index: int | None = None,
    weight: Tensor | None = None,
    annotated: Tensor | None = None,
    wanted: Wanted = Wanted(),  # noqa: B008  (frozen)
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
        pixels = checked_pixels(
            logits, target, activation=activation, ignore_index=ignore_index, weight=weight, annotated=annotated
        )
        return reference.overlap_sums(pixels, wanted)


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
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        check_values(logits, target, activation=activation, ignore_index=ignore_index, weight=weight)
        check_logits(logits, activation=activation)
    if not target.is_floating_point() and target.dtype not in (*_COMPARABLE, torch.bool):
        target = target.long()
    return read_pixels(
        logits, target, activation=activation, ignore_index=ignore_index, weight=weight, annotated=annotated
    )


def check_shapes(
    logits: Tensor,
    target: Tensor,
    *,
    activation: Activation,
    weight: Tensor | None = None,
    annotated: Tensor | None = None,
) -> None:
    """Refuse whatever would broadcast into a plausible, wrong number. Reads no value, so it never stalls a GPU.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    if activation not in ("sigmoid", "softmax", None):
        raise ValueError(f'activation must be "sigmoid", "softmax" or None, got {activation!r}')
    for name, value in (("logits", logits), ("target", target)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    if logits.ndim < 3:
        raise ValueError(f"logits must have the shape (batch, classes, *space), got {tuple(logits.shape)}")
    shape, classes = tuple(logits.shape), logits.shape[1]
    ids_shape = shape[:1] + shape[2:]
    if activation == "softmax" and classes < 2:
        raise ValueError(
            f"softmax needs at least 2 classes, logits have {classes}: a softmax over one channel is always 1; "
            'use activation="sigmoid" for a binary task'
        )
    came = tuple(target.shape)
    as_planes = came == shape
    as_ids = came == ids_shape and classes > 1
    if activation == "sigmoid" and not as_planes:
        hint = f"; {_FLAT_TARGET if classes == 1 else _IDS_TARGET}" if came == ids_shape else ""
        raise ValueError(f"target must have the shape of logits, {shape}, got {came}{hint}")
    if not (as_planes or as_ids):
        hint = f"; {_PLANE_TARGET}" if came == (shape[0], 1, *shape[2:]) else ""
        raise ValueError(
            f"target must be class ids with the batch and space axes of logits, {ids_shape}, "
            f"or soft labels of the shape of logits, {shape}, got {came}{hint}"
        )
    if as_ids and not as_planes and (target.is_floating_point() or target.dtype == torch.bool):
        raise ValueError(
            f"target holds class ids and must be of an integer dtype, got {target.dtype}; use target.long()"
        )
    if weight is not None and tuple(weight.shape) not in (ids_shape, shape):
        raise ValueError(f"weight must have the shape {ids_shape} or {shape}, got {tuple(weight.shape)}")
    if weight is not None and not weight.is_floating_point():
        raise ValueError(f"weight must be floating point, got {weight.dtype}")
    if annotated is not None and (tuple(annotated.shape) != shape[:2] or annotated.dtype != torch.bool):
        raise ValueError(
            f"annotated must be bool of the shape (batch, classes), {shape[:2]}, "
            f"got {annotated.dtype} of the shape {tuple(annotated.shape)}"
        )


def check_values(
    logits: Tensor,
    target: Tensor,
    *,
    activation: Activation,
    ignore_index: int | None = None,
    weight: Tensor | None = None,
) -> None:
    """Refuse values that have no meaning: ids, planes, probabilities or weights out of range.

    Reads the values, so it makes a GPU wait: on the CPU it runs at every call, elsewhere on the first batch only.

    Raises:
        ValueError: names the values that came and the remedy.

    >>> check_values(torch.zeros(1, 1, 2), torch.tensor([[[0, 7]]]), activation="sigmoid")
    Traceback (most recent call last):
    ...
    ValueError: target must lie in [0, 1], got values from 0 to 7
    """
    if target.numel() == 0:
        return
    target, weight = target.detach(), None if weight is None else weight.detach()
    if weight is not None and not bool(((weight >= 0) & weight.isfinite()).all()):
        raise ValueError(f"weight must be finite and >= 0, got values from {weight.min():g} to {weight.max():g}")
    classes = logits.shape[1]
    planes = target.shape == logits.shape
    low, high = _range(target, ignore_index)
    if planes and not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        hint = "; a mask of 0 and 255 becomes 0 and 1 by target == 255" if (low, high) == (0, 255) else ""
        raise ValueError(f"target must lie in [0, 1], got values from {low:g} to {high:g}{hint}")
    if planes and activation == "softmax":
        _check_sums_to_one(target, ignore_index)
    if not planes and not (low >= 0 and high < classes):
        ignored = "" if ignore_index is None else f" (ignored: {ignore_index})"
        remedy = "set ignore_index for a label to be left out, or give logits a channel for every class"
        remedy = "ids start at 0" if low >= 1 and high == classes else remedy
        raise ValueError(
            f"target must hold class ids from 0 to {classes - 1}{ignored}, got values from {low:g} to {high:g}; "
            + remedy
        )
    if activation is None:
        probs = logits.detach()
        if (valid := valid_pixels(target, ignore_index)) is not None:
            probs = probs.where(valid if planes else valid.unsqueeze(1), 0)
        low, high = (float(v) for v in torch.aminmax(probs))
        if low < -_ROUNDING or high > 1 + _ROUNDING:
            raise ValueError(
                f"activation=None takes probabilities in [0, 1], got values from {low:g} to {high:g}; "
                'for logits use activation="sigmoid" or "softmax"'
            )


def _check_sums_to_one(target: Tensor, ignore_index: int | None) -> None:
    valid = valid_pixels(target, ignore_index)
    total = target.sum(1, dtype=torch.float32 if target.is_floating_point() else torch.int64)
    wrong = (total - 1).abs() > 2e-2
    if valid is not None:
        wrong &= valid.all(1)
    if bool(wrong.any()):
        raise ValueError(
            "the soft labels of a pixel must sum to 1 over the classes with a softmax, got sums from "
            f'{total[wrong].min():g} to {total[wrong].max():g}; for classes that overlap use activation="sigmoid"'
        )


def check_logits(logits: Tensor, *, activation: Activation) -> None:
    """Refuse what an activation would be applied to for the second time. Reads the values, as `check_values` does.

    Raises:
        ValueError: probabilities under a softmax, or a mask of 0 and 1. (Probabilities under a sigmoid cannot be told
            from the logits of a young net.)
    """
    if activation is None or logits.numel() < _TELLING:
        return
    logits = logits.detach()
    low, high = (float(v) for v in torch.aminmax(logits))
    if not 0 <= low < high <= 1:
        return
    if activation == "softmax":
        if bool((logits.sum(1, dtype=torch.float32) - 1).abs().max() < 2e-3 * logits.shape[1]):
            raise ValueError(
                "logits are probabilities: they lie in [0, 1] and sum to 1 over the classes; "
                "leave the net's softmax out, or set activation=None"
            )
    elif bool(((logits == 0) | (logits == 1)).all()):
        raise ValueError(
            "logits are a mask: each of them is 0 or 1; for a prediction that is already decided set activation=None"
        )


def _range(target: Tensor, ignore_index: int | None) -> tuple[float, float]:
    """The least and the greatest value that is not ignored; (0, 0) where all is ignored."""
    if target.dtype == torch.bool:
        return 0.0, 1.0
    if not target.is_floating_point() and target.dtype not in _COMPARABLE:
        target = target.long()
    low, high = (float(v) for v in torch.aminmax(target))
    # The second, masked pass is only needed where an ignored value (or NaN) stands at an end of the range.
    if ignore_index is not None and (low == ignore_index or high == ignore_index or low != low):
        valid = valid_pixels(target, ignore_index)
        kept = target if valid is None else target[valid]
        return (float(kept.min()), float(kept.max())) if kept.numel() else (0.0, 0.0)
    return low, high
