"""Resize targets: make them coarser for deep supervision, or pad them like a network's input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dice.kernels import Activation
from lightning_dice.kernels.sums import valid_pixels

Reduce = Literal["area", "max"]

_MEAN: dict[int, Callable[..., Any]] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
_GREATEST: dict[int, Callable[..., Any]] = {
    1: F.adaptive_max_pool1d,
    2: F.adaptive_max_pool2d,
    3: F.adaptive_max_pool3d,
}


def coarser_target(
    target: Tensor,
    space: Sequence[int],
    *,
    activation: Activation,
    classes: int,
    ignore_index: int | None = None,
    reduce: Reduce = "area",
) -> Tensor:
    r"""Make a target coarser without losing small objects.

    Each pixel of the result covers a cell of the target. Along an axis that shrinks from n to m pixels, cell i is
    :math:`\lfloor i n / m \rfloor` to :math:`\lceil (i + 1) n / m \rceil`; if n is not a multiple of m, adjacent cells
    share pixels. With the valid pixels V of a cell:

    .. math:: \text{area:}\quad t_c = \frac{1}{|V|} \sum_{i \in V} t_{i, c} \qquad
        \text{max:}\quad t_c = \max_{i \in V} t_{i, c}

    An object smaller than a cell keeps the fraction that it covers (`"area"`), or takes the whole cell (`"max"`); the
    nearest pixel, which others use, usually misses it.

    Args:
        target: class ids `(batch, *size)`, or planes or soft labels `(batch, classes, *size)`, 1 to 3 axes of size.
        space: the coarser size.
        activation: as in the loss. With `"softmax"` and soft labels, a pixel is ignored if any class holds the label.
        classes: number of channels of the logits.
        ignore_index: label of the pixels to ignore.
        reduce: `"area"`: planes and soft labels are averaged, and ids become soft labels, the fraction of the cell that
            each class covers. `"max"`: planes keep the greatest value, and ids the class of the cell that has the
            fewest pixels in the image (the last of equally rare ones).

    Returns:
        `"area"`: `(batch, classes, *space)`, float32, or float64 for a float64 target; the labels of a softmax sum to
        1. `"max"`: the axes and dtype of target, at the coarser size. A cell whose pixels are all ignored holds the
        ignored label. A target that has the size already is returned unchanged.

    Raises:
        ValueError: a size larger than the target; another number of classes; ids that are not integers or, on the CPU,
            out of range; `"max"` with soft labels of a softmax.

    >>> ids = torch.zeros(1, 4, 4, dtype=torch.long)
    >>> ids[0, 1, 2] = 1
    >>> coarser_target(ids, (2, 2), activation="softmax", classes=2)[0, 1]
    tensor([[0.0000, 0.2500],
            [0.0000, 0.0000]])
    >>> coarser_target(ids, (2, 2), activation="softmax", classes=2, reduce="max")
    tensor([[[0, 1],
             [0, 0]]])
    """
    space = tuple(space)
    planes = _is_planes(target, space, classes, activation)
    size = tuple(target.shape[2:] if planes else target.shape[1:])
    if any(after > before for after, before in zip(space, size, strict=True)):
        raise ValueError(f"space must be no larger than the target, {size}, got {space}: resize the logits instead")
    if space == size:
        return target
    valid = valid_pixels(target, ignore_index)
    if not planes:
        _check_ids(target, classes, valid)
        if reduce == "max":
            return _rarest_class(target, valid, space, classes, ignore_index)
        return _class_fractions(target, valid, space, classes, ignore_index)
    if activation == "softmax":
        if reduce == "max":
            raise ValueError(
                'reduce="max" needs class ids, as the maxima of soft labels do not sum to 1 over classes; or use "area"'
            )
        valid = None if valid is None else valid.all(1, keepdim=True)
    if reduce == "max":
        return _masked_max(target, valid, space, ignore_index)
    return _masked_mean(target, valid, space, ignore_index)


def coarser_weight(weight: Tensor, space: Sequence[int]) -> Tensor:
    """Average a pixel weight, `(batch, *size)` or `(batch, classes, *size)`, over the cells of `coarser_target`.

    >>> coarser_weight(torch.tensor([[1.0, 3.0, 0.0, 0.0]]), (2,))
    tensor([[2., 0.]])
    """
    space = tuple(space)
    axes = len(space)
    if tuple(weight.shape[-axes:]) == space:
        return weight
    return _mean(weight.reshape(-1, 1, *weight.shape[-axes:]), space).reshape(*weight.shape[:-axes], *space)


def pad_target(target: Tensor, space: Sequence[int], ignore_index: int | None = None) -> Tensor:
    """Pad a target at the end of each space axis, as `pad_to_multiple` pads the image.

    Args:
        target: class ids `(batch, *size)`, planes `(batch, classes, *size)`, or a pixel weight of either shape.
        space: the size of the padded image.
        ignore_index: label of the padding; `None` repeats the last rows and columns, as in the image.

    Returns:
        The padded target, in its own dtype; integers (and bool) that cannot hold the label widen to int16, or to int64
        for greater labels. A target that has the size already is returned unchanged.

    Raises:
        ValueError: a size smaller than the target.

    >>> pad_target(torch.tensor([[1, 0, 1]]), (5,), ignore_index=255)
    tensor([[  1,   0,   1, 255, 255]])
    >>> pad_target(torch.tensor([[1, 0, 1]]), (5,))
    tensor([[1, 0, 1, 1, 1]])
    """
    space = tuple(space)
    axes = len(space)
    size = tuple(target.shape[-axes:])
    if target.ndim - axes not in (1, 2) or any(after < before for after, before in zip(space, size, strict=True)):
        raise ValueError(
            f"space must be at least the size of the target, (batch[, classes], *size), {tuple(target.shape)}, "
            f"got {space}"
        )
    if space == size:
        return target
    if ignore_index is None:
        # By index, as torch's padding repeats the edge of floating-point tensors only.
        for axis, (before, after) in enumerate(zip(size, space, strict=True), start=target.ndim - axes):
            if after > before:
                index = torch.arange(after, device=target.device).clamp(max=before - 1)
                target = target.index_select(axis, index)
        return target
    padding: list[int] = []
    for before, after in zip(reversed(size), reversed(space), strict=True):
        padding += [0, after - before]
    return F.pad(_widen_for(target, ignore_index), padding, value=ignore_index)


def _is_planes(target: Tensor, space: tuple[int, ...], classes: int, activation: Activation) -> bool:
    """Return whether the target is planes, by its axes; raise `ValueError` if it is neither planes nor ids."""
    if len(space) not in _MEAN:
        raise ValueError(f"space must have 1 to 3 axes, got {space}")
    planes = target.ndim == len(space) + 2
    if not planes and target.ndim != len(space) + 1:
        raise ValueError(
            f"target must be class ids (batch, *size) or planes (batch, classes, *size) with {len(space)} axes of "
            f"size, got {tuple(target.shape)}"
        )
    if not planes and (activation == "sigmoid" or classes == 1):
        hint = "use target.unsqueeze(1)" if classes == 1 else 'class ids go with activation="softmax"'
        raise ValueError(
            f"target must have a plane for each of the {classes} classes, got the shape {tuple(target.shape)}; {hint}"
        )
    if planes and target.shape[1] != classes:
        hint = "; for a target of shape (batch, 1, *space) use target.squeeze(1)" if target.shape[1] == 1 else ""
        raise ValueError(f"target must have a plane for each of the {classes} classes, got {target.shape[1]}{hint}")
    if not planes and (target.is_floating_point() or target.dtype == torch.bool):
        raise ValueError(f"target holds class ids and must be of an integer dtype, got {target.dtype}")
    return planes


def _check_ids(target: Tensor, classes: int, valid: Tensor | None) -> None:
    if target.device.type != "cpu" or target.numel() == 0 or torch.compiler.is_compiling():
        return
    kept = target if valid is None else target[valid]
    if kept.numel() and not (int(kept.min()) >= 0 and int(kept.max()) < classes):
        raise ValueError(
            f"target must hold class ids from 0 to {classes - 1}, got values from {kept.min():g} to {kept.max():g}; "
            "set ignore_index for a label to be left out, or give logits a channel for every class"
        )


def _masked_mean(target: Tensor, valid: Tensor | None, space: tuple[int, ...], ignore_index: int | None) -> Tensor:
    values = target.to(torch.promote_types(target.dtype, torch.float32))
    if valid is None or ignore_index is None:
        return _mean(values, space)
    share = _mean(valid.to(values.dtype), space)
    # Replace ignored labels instead of multiplying by 0, as they may be NaN or infinite.
    means = _mean(values.where(valid, 0.0), space) / share.where(share > 0, 1.0)
    return means.where(share > 0, float(ignore_index))


def _class_fractions(
    ids: Tensor, valid: Tensor | None, space: tuple[int, ...], classes: int, ignore_index: int | None
) -> Tensor:
    """Average one class at a time, which avoids a one-hot copy at full size."""
    if classes - 1 > torch.iinfo(ids.dtype).max:
        ids = ids.long()  # Compared with uint8, class 256 would equal 0.
    fractions = []
    for index in range(classes):
        mask = ids == index if valid is None else (ids == index) & valid
        fractions.append(_mean(mask.unsqueeze(1).float(), space))
    result = torch.cat(fractions, 1)
    if valid is None or ignore_index is None:
        return result
    share = _mean(valid.unsqueeze(1).float(), space)
    return (result / share.where(share > 0, 1.0)).where(share > 0, float(ignore_index))


def _masked_max(target: Tensor, valid: Tensor | None, space: tuple[int, ...], ignore_index: int | None) -> Tensor:
    values = target.to(torch.promote_types(target.dtype, torch.float32))
    greatest: Tensor = _GREATEST[len(space)](values if valid is None else values.where(valid, -torch.inf), space)
    if ignore_index is not None:
        greatest = greatest.where(greatest > -torch.inf, float(ignore_index))
    return greatest.to(target.dtype)


def _rarest_class(
    ids: Tensor, valid: Tensor | None, space: tuple[int, ...], classes: int, ignore_index: int | None
) -> Tensor:
    """Rank the classes of each image from the most common one; the rarest class of a cell has the greatest rank."""
    batch = ids.shape[0]
    # Ignored pixels are one more class, the most common one.
    bins = ids.long() if valid is None else ids.long().where(valid, classes)
    flat = bins.flatten(1)
    count = torch.zeros(batch, classes + 1, dtype=torch.int64, device=ids.device)
    count.scatter_add_(1, flat, torch.ones_like(flat))
    count[:, classes] = torch.iinfo(torch.int64).max
    order = count.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    ranks = rank.gather(1, flat).view(batch, 1, *ids.shape[1:]).float()
    rarest = _GREATEST[len(space)](ranks, space).long().flatten(1)
    result = order.gather(1, rarest).view(batch, *space)
    if ignore_index is not None:
        result = result.where(result < classes, ignore_index)
    return result.to(ids.dtype)


def _mean(values: Tensor, space: tuple[int, ...]) -> Tensor:
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    result: Tensor = _MEAN[len(space)](values, space)
    return result


def _widen_for(target: Tensor, label: int) -> Tensor:
    """Return the target in a dtype that can hold the label."""
    if target.is_floating_point():
        return target
    for dtype in (target.dtype, torch.int16, torch.int64):
        limits = torch.iinfo(dtype) if dtype != torch.bool else None
        if limits is not None and limits.min <= label <= limits.max:
            return target.to(torch.promote_types(target.dtype, dtype))
    raise ValueError(f"ignore_index must fit int64, got {label}")
