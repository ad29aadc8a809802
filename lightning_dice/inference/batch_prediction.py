"""Logits and labels of batches, from a module and its `Inference` settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_dice.inference.logit_resampling import resample_logits
from lightning_dice.inference.postprocessing import PostProcessing
from lightning_dice.inference.predictor import Inference, Predictor

_CERTAIN = 50.0  # A logit; its probability is 1 to rounding, and its exponential is far from float32's limits.


class PredictingModule(Protocol):
    """A module with settings for prediction, such as a `SegmentationModule`."""

    inference: Inference

    def predictor(self, device: torch.device | str | None = None) -> Predictor:
        """Return the predictor of this module's settings."""
        ...

    def __call__(self, image: Tensor, /) -> Any:
        """Return logits `(batch, classes, *space)`."""
        ...


def batch_logits(module: PredictingModule, image: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
    """Return logits `(batch, classes, *size)` of images `(batch, channels, *space)` on the module's device.

    With windows or mirroring, images are predicted one by one.

    Args:
        module: a module in evaluation mode.
        image: on the module's device, as are the logits.
        size: the space axes of the logits, which are interpolated linearly; by default those of the image.
    """
    inference, space = module.inference, tuple(image.shape[2:])
    size = space if size is None else size
    if not len(image):
        # The network runs all the same, see `SegmentationModule.levels`, but on one window.
        window = space if inference.window is None else inference.window.size
        logits: Tensor = module(image.new_zeros(0, image.shape[1], *window))
        return logits.new_zeros(0, logits.shape[1], *size)
    if inference.is_single_pass:
        logits = module(image)
        return logits if size == space else torch.stack([resample_logits(one, size) for one in logits])
    predictor = module.predictor(image.device)
    # Each image's logits move before they are stacked: those of windows are on the host.
    return torch.stack([predictor.logits(one, size).to(image.device) for one in image])


def batch_labels(
    module: PredictingModule, logits: Tensor, spacing: Sequence[Sequence[float] | None] | None = None
) -> Tensor | None:
    """Return post-processed labels of a batch, or `None` where post-processing cannot change them.

    Args:
        module: the module whose `inference.postprocessing` is applied.
        logits: `(batch, classes, *space)`.
        spacing: each image's pixel spacing along each axis, in mm; `None` if unknown, for an image or all.

    Returns:
        Class ids, int64 `(batch, *space)` (softmax), or bool planes `(batch, classes, *space)` (sigmoid). `None` where
        `hard_prediction` makes the same labels, and for a batch without images.
    """
    postprocessing = module.inference.postprocessing
    if not len(logits) or postprocessing == PostProcessing():
        return None
    predictor = module.predictor(logits.device)
    if not postprocessing.changes_labels(predictor.activation, predictor.threshold):
        return None
    spacing = [None] * len(logits) if spacing is None else spacing
    labels = torch.stack([predictor.labels_from_logits(one, steps) for one, steps in zip(logits, spacing, strict=True)])
    return labels if labels.dtype == torch.bool else labels.long()


def logits_of_labels(labels: Tensor, like: Tensor) -> Tensor:
    """Return logits that are almost certain of the labels, and finite: for metrics that take logits.

    Args:
        labels: as `batch_labels` returns them.
        like: logits `(batch, classes, *space)`, whose shape, dtype and device the result has.

    >>> logits_of_labels(torch.tensor([[1, 0]]), torch.zeros(1, 2, 2))
    tensor([[[-50.,  50.],
             [ 50., -50.]]])
    """
    if labels.dtype == torch.bool:
        return torch.where(labels, _CERTAIN, -_CERTAIN).to(like.dtype)
    return torch.full_like(like, -_CERTAIN).scatter_(1, labels.unsqueeze(1), _CERTAIN)
