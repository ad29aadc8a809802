"""Counts of hard predictions: what metrics are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dice.kernels import native
from lightning_dice.kernels.backend import OutOfRange
from lightning_dice.kernels.checks import ROUNDING, reads_values, value_range
from lightning_dice.kernels.dispatch import native_counts
from lightning_dice.kernels.sums import OverlapSums, holds_label, valid_pixels


def count_classes(logits: Tensor, target: Tensor, ignore_index: int | None = None) -> OverlapSums:
    """Count the class of each pixel's greatest logit, the first of equals; where one is NaN, none is predicted.

    Args:
        logits: `(images, classes, *space)`.
        target: class ids, `(images, *space)`.
        ignore_index: the label of pixels that count as nothing.

    Returns:
        int64 `(images, classes)`.

    Raises:
        OutOfRange: on the CPU, an id that is no class and not ignored.
    """
    ignore_index = ignore_index if holds_label(target, ignore_index) else None
    if native_counts(logits.shape[1], ignore_index, logits, target):
        return _sums(native.count("logits", logits, target, logits.shape[1], ignore_index=ignore_index))
    greatest, predicted = logits.max(1)
    # Its argmax would be some class, and may be the right one.
    predicted = torch.where(greatest.isnan(), logits.shape[1], predicted)
    _check_ids(target, logits.shape[1], ignore_index)
    return _count(predicted, target, logits.shape[1], ignore_index)


def count_labels(predicted: Tensor, target: Tensor, classes: int, ignore_index: int | None = None) -> OverlapSums:
    """Count predicted class ids against true ones, both `(images, *space)`; otherwise as `count_classes`."""
    ignore_index = ignore_index if holds_label(target, ignore_index) else None
    if native_counts(classes, ignore_index, predicted, target):
        return _sums(native.count("ids", predicted, target, classes, ignore_index=ignore_index))
    _check_ids(target, classes, ignore_index)
    valid = valid_pixels(target, ignore_index)
    _check_ids(predicted if valid is None else predicted.where(valid, 0), classes, None)
    return _count(predicted, target, classes, ignore_index)


def count_planes(values: Tensor, target: Tensor, threshold: float, ignore_index: int | None = None) -> OverlapSums:
    """Count planes: a pixel is predicted where its value, `(images, classes, *space)`, is above the threshold.

    The target has the shape of `values` and holds 0 and 1; otherwise as `count_classes`.
    """
    ignore_index = ignore_index if holds_label(target, ignore_index) else None
    if native_counts(values.shape[1], ignore_index, values, target):
        # As torch compares: the number in the dtype of the values.
        at = float(torch.tensor(threshold, dtype=values.dtype))
        return _sums(native.count("planes", values, target, values.shape[1], ignore_index=ignore_index, threshold=at))
    if reads_values(target) and target.numel():
        low, high = value_range(target, ignore_index)
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):
            raise OutOfRange
    return _count_planes((values > threshold).flatten(2), target.flatten(2), ignore_index)


def _sums(counts: Tensor) -> OverlapSums:
    return OverlapSums(*counts.unbind())


def _check_ids(ids: Tensor, classes: int, ignore_index: int | None) -> None:
    if not reads_values(ids) or not ids.numel():
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


def _count(predicted: Tensor, target: Tensor, classes: int, ignore_index: int | None) -> OverlapSums:
    predicted, target = predicted.flatten(1).long(), target.flatten(1)
    images = predicted.shape[0]
    valid = valid_pixels(target, ignore_index)
    target = target.long()
    valid = torch.ones_like(target, dtype=torch.bool) if valid is None else valid

    def count(ids: Tensor, where: Tensor) -> Tensor:
        # A bin for each class, and one more for pixels that do not count.
        bins = torch.where(where, ids, classes)
        if bins.device.type == "cpu":
            first = torch.arange(images).unsqueeze(1) * (classes + 1)
            table = torch.bincount((bins + first).flatten(), minlength=images * (classes + 1))
            return table.view(images, classes + 1)[:, :classes]
        # bincount asks for the greatest id, for which a GPU must wait.
        zeros = torch.zeros(images, classes + 1, dtype=torch.int64, device=bins.device)
        return zeros.scatter_add_(1, bins, torch.ones_like(bins))[:, :classes]

    pixels = valid.sum(1, keepdim=True).expand(images, classes)
    return OverlapSums(
        count(target, valid & (predicted == target)), count(predicted, valid), count(target, valid), pixels
    )
