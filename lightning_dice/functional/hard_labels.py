"""Hard predictions and targets, and counts of their pixels, for metrics."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_dice.kernels import Activation, OverlapSums
from lightning_dice.kernels.backend import OutOfRange
from lightning_dice.kernels.checks import can_read_values, check_shapes, check_values, value_range
from lightning_dice.kernels.counts import count_classes, count_labels, count_planes


def hard_prediction(logits: Tensor, *, activation: Activation = "sigmoid", threshold: float = 0.5) -> Tensor:
    """Turn logits into labels.

    Args:
        logits: `(batch, classes, *space)`, or probabilities with `activation=None`.
        activation: `"softmax"`: the class of the greatest logit; `"sigmoid"` and `None`: a plane for each class.
        threshold: probability above which a pixel is foreground; not used with `"softmax"`.

    Returns:
        `"softmax"`: class ids, int64 `(batch, *space)`; else bool planes `(batch, classes, *space)`.

    >>> hard_prediction(torch.tensor([[[2.0, -2.0]]]))
    tensor([[[ True, False]]])
    """
    if activation == "softmax":
        return logits.argmax(1)
    if activation is None:
        return logits > threshold
    # Comparing logits needs no probabilities, and none can round to the threshold.
    return logits > _logit(threshold)


def hard_target(target: Tensor, *, activation: Activation = "sigmoid") -> Tensor:
    """Turn soft labels into hard ones, which a hard score can count.

    Args:
        target: soft labels `(batch, classes, *space)`, floating point, in [0, 1]; values outside are ignored labels,
            and stay. Integers (ids, or planes of 0 and 1) are returned unchanged.
        activation: `"softmax"`: the class with the greatest label, the lowest of equals; else the classes with a label
            above 1/2.

    Returns:
        `"softmax"`: class ids, int64 `(batch, *space)`; else planes, with the shape and dtype of target.

    >>> hard_target(torch.tensor([[[0.5, 0.7, 255.0]]]))
    tensor([[[  0.,   1., 255.]]])
    >>> hard_target(torch.tensor([[[0.5, 0.1, 255.0], [0.5, 0.9, 255.0]]]), activation="softmax")
    tensor([[  0,   1, 255]])
    """
    if not target.is_floating_point():
        return target
    outside = (target < 0) | (target > 1)
    if activation != "softmax":
        return target.where(outside, (target > 0.5).to(target.dtype))
    ignored_label = target.where(outside, 0).sum(1) / outside.sum(1).clamp(min=1)
    return ignored_label.long().where(outside.any(1), target.argmax(1))


def hard_sums(
    logits: Tensor,
    target: Tensor,
    *,
    activation: Activation = "sigmoid",
    threshold: float = 0.5,
    ignore_index: int | None = None,
) -> OverlapSums:
    """Count the pixels of each class in each image: in both, predicted, actual and all.

    Args:
        logits: `(batch, classes, *space)`, or probabilities with `activation=None`.
        target: as for `lightning_dice.kernels.overlap_sums`, without soft labels.
        activation: as for `hard_prediction`.
        threshold: as for `hard_prediction`.
        ignore_index: label of the pixels to ignore.

    Returns:
        int64 `(images, classes)`; exact at any size.

    Raises:
        ValueError: a shape that would broadcast; on the CPU, an invalid value.

    >>> sums = hard_sums(torch.tensor([[[2.0, 2.0, -2.0]]]), torch.tensor([[[1, 0, 255]]]), ignore_index=255)
    >>> sums.overlap.item(), sums.predicted.item(), sums.actual.item(), sums.count.item()
    (1, 2, 1, 2)
    """
    check_shapes(logits, target, activation=activation)
    if target.shape == logits.shape and activation == "softmax":
        raise ValueError(
            "a hard score needs class ids (batch, *space); turn one-hot planes into ids with target.argmax(1)"
        )
    if target.shape != logits.shape and activation is None:
        raise ValueError(f"target must have the shape of logits, {tuple(logits.shape)}, got {tuple(target.shape)}")
    if activation is None and can_read_values(logits):
        check_values(logits, target, activation=None, ignore_index=ignore_index)
    try:
        if activation == "softmax":
            return count_classes(logits, target, ignore_index)
        cut = threshold if activation is None else _logit(threshold)
        return count_planes(logits, target, cut, ignore_index)
    except OutOfRange:
        check_values(logits, target, activation=activation, ignore_index=ignore_index)
        raise


def nan_predictions(
    logits: Tensor, target: Tensor, sums: OverlapSums, *, activation: Activation, ignore_index: int | None = None
) -> Tensor:
    """Return which classes of which images have a NaN among the logits that count, bool `(images, classes)`.

    With `"softmax"`, a NaN leaves all classes of the image without a prediction.

    Args:
        logits: as for `hard_sums`.
        target: as for `hard_sums`.
        sums: what `hard_sums` returned.
        activation: as for `hard_sums`.
        ignore_index: as for `hard_sums`.

    >>> logits, target = torch.tensor([[[torch.nan, -2.0]]]), torch.tensor([[[0, 0]]])
    >>> nan_predictions(logits, target, hard_sums(logits, target), activation="sigmoid")
    tensor([[True]])
    """
    if activation == "softmax":
        # A pixel with a NaN predicts no class.
        return (sums.predicted.sum(1, keepdim=True) < sums.count).expand(sums.count.shape)
    if not logits.numel():
        return torch.zeros_like(sums.count, dtype=torch.bool)
    found = logits.flatten(2).amax(2).isnan()  # The maximum of values with a NaN is NaN.
    if ignore_index is None or (can_read_values(logits) and not bool(found.any())):
        return found
    return (logits.isnan() & (target != ignore_index)).flatten(2).any(2)


def label_sums(predicted: Tensor, target: Tensor, num_classes: int, *, ignore_index: int | None = None) -> OverlapSums:
    """Count pixels as `hard_sums` does, for class ids that were predicted already.

    Args:
        predicted: class ids `(batch, *space)`; any value where the target is ignored.
        target: class ids `(batch, *space)`.
        num_classes: number of classes.
        ignore_index: label of the pixels to ignore.

    Returns:
        int64 `(batch, num_classes)`.

    Raises:
        ValueError: different shapes, or a dtype that is not an integer; on the CPU, an id that is not a class.

    >>> sums = label_sums(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, 2]]), 3)
    >>> sums.overlap.tolist(), sums.predicted.tolist(), sums.actual.tolist()
    ([[1, 1, 0]], [[1, 2, 0]], [[1, 1, 1]])
    """
    if predicted.shape != target.shape or predicted.ndim < 2:
        raise ValueError(
            f"predicted and target must be class ids of equal shape (batch, *space), got {tuple(predicted.shape)} and "
            f"{tuple(target.shape)}"
        )
    for name, ids in (("predicted", predicted), ("target", target)):
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"{name} holds class ids and must be of an integer dtype, got {ids.dtype}")
    try:
        return count_labels(predicted, target, num_classes, ignore_index)
    except OutOfRange:
        for name, ids, ignored in (("target", target, ignore_index), ("predicted", predicted, None)):
            low, high = value_range(ids, ignored)
            if not 0 <= low <= high < num_classes:
                raise ValueError(
                    f"{name} must hold class ids from 0 to {num_classes - 1}"
                    + ("" if ignored is None else f" (ignored: {ignored})")
                    + f", got values from {low:g} to {high:g}"
                ) from None
        raise


def _logit(threshold: float) -> float:
    return math.log(threshold / (1 - threshold))
