"""Targets at another size: coarser, for the coarser outputs of a network, and padded, as its input is."""

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
    r"""A target at a coarser size, in which small objects are still there.

    Each pixel of the result stands for a cell of the target; along an axis of n pixels, of which m are left, cell i
    reaches from :math:`\lfloor i n / m \rfloor` to :math:`\lceil (i + 1) n / m \rceil`: where n is no multiple of m,
    neighbours share pixels. With the valid pixels V of a cell:

    .. math:: \text{area:}\quad t_c = \frac{1}{|V|} \sum_{i \in V} t_{i, c} \qquad
        \text{max:}\quad t_c = \max_{i \in V} t_{i, c}

    An object smaller than a cell keeps its share of it (`"area"`), or takes the cell (`"max"`); the nearest pixel,
    which others take for the cell, as a rule misses it.

    Args:
        target: class ids `(batch, *size)`, or planes or soft labels `(batch, classes, *size)`, 1 to 3 axes of size.
        space: the coarser size.
        activation: as of the loss: of soft labels of a `"softmax"`, a pixel is ignored if any class holds the label.
        classes: of the logits.
        ignore_index: the label of pixels that count as nothing.
        reduce: `"area"`: planes and soft labels become means, and ids become soft labels, each class's share of the
            cell. `"max"`: planes keep the greatest value, and ids the class that has fewest pixels in the image among
            those in the cell (of equally rare ones the last).

    Returns:
        `"area"`: `(batch, classes, *space)`, float32 or, for a float64 target, float64; shares of ids and of soft
        labels sum to 1. `"max"`: the shape and dtype of the target otherwise. A cell of which every pixel is ignored
        holds the ignored label. The target itself where it has that size already.

    Raises:
        ValueError: a size beyond the target's; another number of classes; ids that are no integers or, on the CPU, out
            of range; `"max"` of soft labels that must sum to 1.

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
            return _rarest(target, valid, space, classes, ignore_index)
        return _shares(target, valid, space, classes, ignore_index)
    if activation == "softmax":
        if reduce == "max":
            raise ValueError(
                'reduce="max" of soft labels would not sum to 1 over the classes: use "area", or give class ids'
            )
        valid = None if valid is None else valid.all(1, keepdim=True)
    if reduce == "max":
        return _greatest(target, valid, space, ignore_index)
    return _means(target, valid, space, ignore_index)


def coarser_weight(weight: Tensor, space: Sequence[int]) -> Tensor:
    """The mean of a pixel weight, `(batch, *size)` or `(batch, classes, *size)`, over the cells of `coarser_target`.

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
        target: class ids `(batch, *size)` or planes `(batch, classes, *size)`; a pixel weight, too.
        space: the size of the padded image.
        ignore_index: what the padding holds; `None` repeats the last rows and columns, as the image does.

    Returns:
        The target itself where it has that size already. Of the target's dtype, but for integers (and bool) that
        cannot hold the ignored label: those widen to int16 or, for greater labels, int64.

    Raises:
        ValueError: a size below the target's.

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
        # By index, as torch repeats the edge of floating-point tensors alone.
        for axis, (before, after) in enumerate(zip(size, space, strict=True), start=target.ndim - axes):
            if after > before:
                places = torch.arange(after, device=target.device).clamp(max=before - 1)
                target = target.index_select(axis, places)
        return target
    padding: list[int] = []
    for before, after in zip(reversed(size), reversed(space), strict=True):
        padding += [0, after - before]
    return F.pad(_holding(target, ignore_index), padding, value=ignore_index)


def _is_planes(target: Tensor, space: tuple[int, ...], classes: int, activation: Activation) -> bool:
    """Whether the target is planes, by its axes.

    Raises:
        ValueError: neither planes nor ids.
    """
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


def _means(target: Tensor, valid: Tensor | None, space: tuple[int, ...], ignore_index: int | None) -> Tensor:
    values = target.to(torch.promote_types(target.dtype, torch.float32))
    if valid is None or ignore_index is None:
        return _mean(values, space)
    share = _mean(valid.to(values.dtype), space)
    # Replaced, not multiplied by zero, as an ignored label may be anything.
    means = _mean(values.where(valid, 0.0), space) / share.where(share > 0, 1.0)
    return means.where(share > 0, float(ignore_index))


def _shares(
    ids: Tensor, valid: Tensor | None, space: tuple[int, ...], classes: int, ignore_index: int | None
) -> Tensor:
    """Class by class: all of them at the full size would be the one-hot copy that a target never becomes."""
    if classes - 1 > torch.iinfo(ids.dtype).max:
        ids = ids.long()  # Compared with uint8, torch takes class 256 for 0.
    shares = []
    for index in range(classes):
        own = ids == index if valid is None else (ids == index) & valid
        shares.append(_mean(own.unsqueeze(1).float(), space))
    result = torch.cat(shares, 1)
    if valid is None or ignore_index is None:
        return result
    share = _mean(valid.unsqueeze(1).float(), space)
    return (result / share.where(share > 0, 1.0)).where(share > 0, float(ignore_index))


def _greatest(target: Tensor, valid: Tensor | None, space: tuple[int, ...], ignore_index: int | None) -> Tensor:
    values = target.to(torch.promote_types(target.dtype, torch.float32))
    greatest: Tensor = _GREATEST[len(space)](values if valid is None else values.where(valid, -torch.inf), space)
    if ignore_index is not None:
        greatest = greatest.where(greatest > -torch.inf, float(ignore_index))
    return greatest.to(target.dtype)


def _rarest(
    ids: Tensor, valid: Tensor | None, space: tuple[int, ...], classes: int, ignore_index: int | None
) -> Tensor:
    """By rank: with the classes of an image numbered from the most common one, the rarest of a cell is the greatest."""
    batch = ids.shape[0]
    # Ignored pixels are one more class, the most common of all.
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


def _holding(target: Tensor, label: int) -> Tensor:
    """The target in a dtype that can hold the label."""
    if target.is_floating_point():
        return target
    for dtype in (target.dtype, torch.int16, torch.int64):
        limits = torch.iinfo(dtype) if dtype != torch.bool else None
        if limits is not None and limits.min <= label <= limits.max:
            return target.to(torch.promote_types(target.dtype, dtype))
    raise ValueError(f"ignore_index must fit int64, got {label}")
