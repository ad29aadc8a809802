"""Counts of hard predictions, from which metrics are computed."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dice.kernels import native
from lightning_dice.kernels.backend import OutOfRange
from lightning_dice.kernels.checks import ROUNDING, can_read_values, value_range
from lightning_dice.kernels.dispatch import can_count_natively
from lightning_dice.kernels.sums import OverlapSums, holds_label, valid_pixels


def count_classes(logits: Tensor, target: Tensor, ignore_index: int | None = None) -> OverlapSums:
    """Count the predictions of the greatest logit, the first among equals; a pixel with a NaN predicts no class.

    Args:
        logits: `(images, classes, *space)`.
        target: class ids, `(images, *space)`.
        ignore_index: label of the pixels to ignore.

    Returns:
        The counts, int64 `(images, classes)`.

    Raises:
        OutOfRange: on the CPU, an id is neither a class nor ignored.

    >>> logits = torch.tensor([[[3.0, 0.0, 5.0], [1.0, 2.0, 1.0]]])
    >>> sums = count_classes(logits, torch.tensor([[0, 1, 1]]))
    >>> sums.overlap, sums.predicted
    (tensor([[1, 1]]), tensor([[2, 1]]))
    """
    ignore_index = ignore_index if holds_label(target, ignore_index) else None
    if can_count_natively(logits.shape[1], ignore_index, logits, target):
        counts = native.count("logits", logits, target, logits.shape[1], ignore_index=ignore_index)
        return OverlapSums(*counts.unbind())
    greatest, predicted = logits.max(1)
    # The argmax of a pixel with a NaN is some class, perhaps the right one.
    predicted = torch.where(greatest.isnan(), logits.shape[1], predicted)
    _check_ids(target, logits.shape[1], ignore_index)
    return _count_ids(predicted, target, logits.shape[1], ignore_index)


def count_labels(predicted: Tensor, target: Tensor, classes: int, ignore_index: int | None = None) -> OverlapSums:
    """Count predicted class ids, `(images, *space)` like the target. See `count_classes` for the rest.

    >>> count_labels(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, 0]]), classes=2).overlap
    tensor([[1, 1]])
    """
    ignore_index = ignore_index if holds_label(target, ignore_index) else None
    if can_count_natively(classes, ignore_index, predicted, target):
        counts = native.count("ids", predicted, target, classes, ignore_index=ignore_index)
        return OverlapSums(*counts.unbind())
    _check_ids(target, classes, ignore_index)
    valid = valid_pixels(target, ignore_index)
    _check_ids(predicted if valid is None else predicted.where(valid, 0), classes, None)
    return _count_ids(predicted, target, classes, ignore_index)


def count_planes(values: Tensor, target: Tensor, threshold: float, ignore_index: int | None = None) -> OverlapSums:
    """Count the values, `(images, classes, *space)`, above a threshold as predictions.

    The target has the shape of `values` and holds 0 and 1. See `count_classes` for the rest.

    >>> sums = count_planes(torch.tensor([[[0.9, 0.6, 0.1]]]), torch.tensor([[[1, 0, 1]]]), threshold=0.5)
    >>> sums.overlap.item(), sums.predicted.item(), sums.actual.item(), sums.count.item()
    (1, 2, 2, 3)
    """
    ignore_index = ignore_index if holds_label(target, ignore_index) else None
    classes = values.shape[1]
    if can_count_natively(classes, ignore_index, values, target):
        # torch compares in the dtype of the values.
        rounded = float(torch.tensor(threshold, dtype=values.dtype))
        counts = native.count("planes", values, target, classes, ignore_index=ignore_index, threshold=rounded)
        return OverlapSums(*counts.unbind())
    if can_read_values(target) and target.numel():
        low, high = value_range(target, ignore_index)
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):
            raise OutOfRange
    return _count_planes((values > threshold).flatten(2), target.flatten(2), ignore_index)


def _check_ids(ids: Tensor, classes: int, ignore_index: int | None) -> None:
    if not can_read_values(ids) or not ids.numel():
        return
    ids = ids.long()
    wrong = (ids < 0) | (ids >= classes)
    if bool((wrong if ignore_index is None else wrong & (ids != ignore_index)).any()):
        raise OutOfRange


def _count_planes(predicted: Tensor, target: Tensor, ignore_index: int | None) -> OverlapSums:
    actual = target == 1
    valid = valid_pixels(target, ignore_index)
    if valid is None:
        count = torch.full(predicted.shape[:2], predicted.shape[2], dtype=torch.int64, device=predicted.device)
    else:
        predicted, actual, count = predicted & valid, actual & valid, valid.sum(-1)
    return OverlapSums((predicted & actual).sum(-1), predicted.sum(-1), actual.sum(-1), count)


def _count_ids(predicted: Tensor, target: Tensor, classes: int, ignore_index: int | None) -> OverlapSums:
    predicted, target = predicted.flatten(1).long(), target.flatten(1)
    images = predicted.shape[0]
    valid = valid_pixels(target, ignore_index)
    target = target.long()
    valid = torch.ones_like(target, dtype=torch.bool) if valid is None else valid

    def count(ids: Tensor, included: Tensor) -> Tensor:
        # A bin for each class, and one for the excluded pixels.
        bins = torch.where(included, ids, classes)
        if bins.device.type == "cpu":
            first = torch.arange(images).unsqueeze(1) * (classes + 1)
            table = torch.bincount((bins + first).flatten(), minlength=images * (classes + 1))
            return table.view(images, classes + 1)[:, :classes]
        # bincount reads the greatest id, which stalls a GPU.
        zeros = torch.zeros(images, classes + 1, dtype=torch.int64, device=bins.device)
        return zeros.scatter_add_(1, bins, torch.ones_like(bins))[:, :classes]

    pixels = valid.sum(1, keepdim=True).expand(images, classes)
    return OverlapSums(
        count(target, valid & (predicted == target)), count(predicted, valid), count(target, valid), pixels
    )
