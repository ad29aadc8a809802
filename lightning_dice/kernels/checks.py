"""Checks of the shapes, dtypes and values from which sums are computed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_dice.kernels.sums import valid_pixels
from lightning_dice.library_internals.torch import is_vmapped

Activation = Literal["sigmoid", "softmax"] | None

# torch has no minimum for the other unsigned dtypes.
COMPARABLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

# How far rounding may take sums and interpolations of values in [0, 1] out of that range.
ROUNDING = 1e-5
# Fewer logits may lie in [0, 1] by chance.
_MIN_LOGITS = 64

_FLAT_TARGET = "for a mask of shape (batch, *space) use target.unsqueeze(1)"
_IDS_TARGET = 'class ids (batch, *space) go with activation="softmax"'
_PLANE_TARGET = "for a target of shape (batch, 1, *space) use target.squeeze(1)"


def can_read_values(*values: Tensor) -> bool:
    """Whether values can be checked in every call: only on the CPU, as reading them would stall a GPU; not in `vmap`.

    >>> can_read_values(torch.zeros(1)), can_read_values(torch.zeros(1, device="meta"))
    (True, False)
    """
    if torch.compiler.is_compiling():
        return False
    return all(one.device.type == "cpu" and not is_vmapped(one) for one in values)


def check_shapes(
    logits: Tensor,
    target: Tensor,
    *,
    activation: Activation,
    weight: Tensor | None = None,
    annotated: Tensor | None = None,
) -> None:
    """Refuse shapes that would broadcast into a plausible, wrong number, and wrong dtypes.

    Reads no values, so it never stalls a GPU.

    Raises:
        ValueError: names the argument, what was expected and what was given.

    >>> check_shapes(torch.zeros(2, 1, 4), torch.zeros(1, 1, 4), activation="sigmoid")
    Traceback (most recent call last):
    ...
    ValueError: target must have the shape of logits, (2, 1, 4), got (1, 1, 4)
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
    if logits.shape[1] == 0:
        raise ValueError(f"logits must have at least one class, got the shape {tuple(logits.shape)}")
    shape, classes = tuple(logits.shape), logits.shape[1]
    ids_shape = shape[:1] + shape[2:]
    if activation == "softmax" and classes < 2:
        raise ValueError(
            f"softmax needs at least 2 classes, logits have {classes}: a softmax over one channel is always 1; "
            'use activation="sigmoid" for a binary task'
        )
    received = tuple(target.shape)
    as_planes = received == shape
    as_ids = received == ids_shape and classes > 1
    if activation == "sigmoid" and not as_planes:
        hint = f"; {_FLAT_TARGET if classes == 1 else _IDS_TARGET}" if received == ids_shape else ""
        raise ValueError(f"target must have the shape of logits, {shape}, got {received}{hint}")
    if not (as_planes or as_ids):
        hint = f"; {_PLANE_TARGET}" if received == (shape[0], 1, *shape[2:]) else ""
        raise ValueError(
            f"target must be class ids with the batch and space axes of logits, {ids_shape}, "
            f"or soft labels of the shape of logits, {shape}, got {received}{hint}"
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
    """Refuse class ids, planes, probabilities and weights outside their range.

    Reads the values, which stalls a GPU: it runs in every call on the CPU, and on the first batch elsewhere.

    Raises:
        ValueError: names the values found and the remedy.

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
    low, high = value_range(target, ignore_index)
    if planes and not (low >= -ROUNDING and high <= 1 + ROUNDING):
        hint = "; convert a mask of 0 and 255 by target == 255" if (low, high) == (0, 255) else ""
        raise ValueError(f"target must lie in [0, 1], got values from {low:g} to {high:g}{hint}")
    if planes and activation == "softmax":
        _check_sums_to_one(target, ignore_index)
    if not planes and not (low >= 0 and high < classes):
        ignored = "" if ignore_index is None else f" (ignored: {ignore_index})"
        remedy = "set ignore_index to the label to ignore, or give logits a channel for every class"
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
        if low < -ROUNDING or high > 1 + ROUNDING:
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
    """Refuse logits to which an activation was already applied. Reads the values, like `check_values`.

    Raises:
        ValueError: the logits are probabilities under a softmax, or a mask of 0 and 1. (Probabilities under a sigmoid
            look like the logits of a net at the start of training.)

    >>> check_logits(torch.eye(8).view(1, 1, 8, 8), activation="sigmoid")
    Traceback (most recent call last):
    ...
    ValueError: logits are a mask of 0 and 1; to score a finished prediction set activation=None
    """
    if activation is None or logits.numel() < _MIN_LOGITS:
        return
    logits = logits.detach()
    # A corner is enough to accept real logits.
    for part in (logits[0].flatten(1)[:, :_MIN_LOGITS] if logits[0].is_contiguous() else logits[:1], logits):
        low, high = (float(v) for v in torch.aminmax(part))
        if not 0 <= low <= high <= 1:
            return
    if low == high:
        return
    if activation == "softmax":
        # Probabilities that were rounded to bfloat16 sum to 1 within 2e-3.
        if bool((logits.sum(1, dtype=torch.float32) - 1).abs().max() < 1e-2):
            raise ValueError(
                "logits are probabilities: they lie in [0, 1] and sum to 1 over the classes; "
                "remove the net's softmax, or set activation=None"
            )
    elif bool(((logits == 0) | (logits == 1)).all()):
        raise ValueError("logits are a mask of 0 and 1; to score a finished prediction set activation=None")


def value_range(target: Tensor, ignore_index: int | None) -> tuple[float, float]:
    """Return the least and the greatest value that is not ignored; (0, 0) if all are ignored.

    >>> value_range(torch.tensor([0, 2, 255]), ignore_index=255)
    (0.0, 2.0)
    """
    if target.dtype == torch.bool:
        return 0.0, 1.0
    if not target.is_floating_point() and target.dtype not in COMPARABLE:
        target = target.long()
    low, high = (float(v) for v in torch.aminmax(target))
    # A second, masked pass is only needed if an ignored value, or NaN, is an end of the range.
    if ignore_index is not None and (low == ignore_index or high == ignore_index or low != low):
        valid = valid_pixels(target, ignore_index)
        kept = target if valid is None else target[valid]
        return (float(kept.min()), float(kept.max())) if kept.numel() else (0.0, 0.0)
    return low, high
