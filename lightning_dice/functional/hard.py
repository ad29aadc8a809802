"""Hard predictions and their counts: what metrics are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_dice.kernels import Activation, OverlapSums
from lightning_dice.kernels.inputs import check_shapes, check_values
from lightning_dice.kernels.sums import valid_pixels


def hard_prediction(logits: Tensor, *, activation: Activation = "sigmoid", threshold: float = 0.5) -> Tensor:
    """The labels that logits stand for.

    Args:
        logits: `(batch, classes, *space)`, or probabilities with `activation=None`.
        activation: `"softmax"`: the class of the greatest logit; `"sigmoid"` and `None`: a plane for each class.
        threshold: a probability; a pixel is foreground above it.

    Returns:
        `"softmax"`: class ids, int64 `(batch, *space)`; else bool planes `(batch, classes, *space)`.

    >>> hard_prediction(torch.tensor([[[2.0, -2.0]]]))
    tensor([[[ True, False]]])
    """
    if activation == "softmax":
        return logits.argmax(1)
    if activation is None:
        return logits > threshold
    # Compared as logits: no probabilities are made, and none is rounded to the threshold.
    return logits > math.log(threshold / (1 - threshold))


def hard_sums(
    logits: Tensor,
    target: Tensor,
    *,
    activation: Activation = "sigmoid",
    threshold: float = 0.5,
    ignore_index: int | None = None,
) -> OverlapSums:
    """Count pixels of each class in each image: both, predicted, actual, all.

    Args:
        logits: `(batch, classes, *space)`, or probabilities with `activation=None`.
        target: as for `lightning_dice.kernels.overlap_sums`, but no soft labels.
        activation: as for `hard_prediction`.
        threshold: a probability; with `"softmax"` it has no part.
        ignore_index: pixels whose target holds this value are not counted.

    Returns:
        int64 `(images, classes)`; exact at any size.

    Raises:
        ValueError: a shape that would broadcast; on the CPU, a value outside its range.

    >>> sums = hard_sums(torch.tensor([[[2.0, 2.0, -2.0]]]), torch.tensor([[[1, 0, 255]]]), ignore_index=255)
    >>> sums.overlap.item(), sums.predicted.item(), sums.actual.item(), sums.count.item()
    (1, 2, 1, 2)
    """
    check_shapes(logits, target, activation=activation)
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        check_values(logits, target, activation=activation, ignore_index=ignore_index)
    if activation == "softmax":
        if target.shape == logits.shape:
            raise ValueError("a hard score needs class ids (batch, *space); for one-hot planes use target.argmax(1)")
        greatest, predicted = logits.max(1)
        # No class is predicted where the logits are NaN: its argmax is some class, and may be the right one.
        predicted = torch.where(greatest.isnan(), logits.shape[1], predicted)
        return _count_ids(predicted, target, logits.shape[1], ignore_index)
    if target.shape != logits.shape:
        raise ValueError(f"target must have the shape of logits, {tuple(logits.shape)}, got {tuple(target.shape)}")
    return _count_planes(hard_prediction(logits, activation=activation, threshold=threshold), target, ignore_index)


def _count_planes(predicted: Tensor, target: Tensor, ignore_index: int | None) -> OverlapSums:
    predicted, target = predicted.flatten(2), target.flatten(2)
    actual = target == 1
    valid = valid_pixels(target, ignore_index)
    if valid is None:
        count = torch.full(predicted.shape[:2], predicted.shape[2], dtype=torch.int64, device=predicted.device)
    else:
        predicted, actual, count = predicted & valid, actual & valid, valid.sum(-1)
    return OverlapSums((predicted & actual).sum(-1), predicted.sum(-1), actual.sum(-1), count)


def _count_ids(predicted: Tensor, target: Tensor, classes: int, ignore_index: int | None) -> OverlapSums:
    predicted, target = predicted.flatten(1), target.flatten(1)
    images = predicted.shape[0]
    valid = valid_pixels(target, ignore_index)
    target = target.long()
    valid = torch.ones_like(target, dtype=torch.bool) if valid is None else valid
    # A bin for each class of each image, and one more for pixels that do not count.
    first = torch.arange(images, device=target.device).unsqueeze(1) * (classes + 1)

    def count(ids: Tensor, where: Tensor) -> Tensor:
        bins = torch.where(where, ids, classes) + first
        return torch.bincount(bins.flatten(), minlength=images * (classes + 1)).view(images, classes + 1)[:, :classes]

    pixels = valid.sum(1, keepdim=True).expand(images, classes)
    return OverlapSums(
        count(target, valid & (predicted == target)), count(predicted, valid), count(target, valid), pixels
    )
