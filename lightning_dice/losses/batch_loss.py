"""The loss of a batch, of each of its images, and of every level of a network's output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_dice.data.batch import Batch
from lightning_dice.functional.target_resizing import pad_target
from lightning_dice.library_internals.torch import original_module
from lightning_dice.losses.base import SegmentationLoss, call_torch_loss
from lightning_dice.losses.deep_supervision import DeepSupervision


def batch_loss(loss: nn.Module, logits: Any, batch: Batch) -> Tensor:
    """Return the loss of a batch.

    Args:
        loss: a `SegmentationLoss`, or any module of logits and mask.
        logits: `(batch, classes, *space)`, or those of each level for `DeepSupervision`.
        batch: passes its mask, weight, annotated classes and maps to the loss.

    Raises:
        ValueError: the batch has a weight or annotated classes, and the loss is not a `SegmentationLoss`.

    >>> batch = Batch(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    >>> batch_loss(nn.BCEWithLogitsLoss(), torch.zeros(1, 1, 2, 2), batch)
    tensor(0.6931)
    """
    if isinstance(original_module(loss), SegmentationLoss):
        result: Tensor = loss(logits, batch.mask, batch.weight, annotated=batch.annotated, maps=batch.maps)
        return result
    if batch.weight is not None or batch.annotated is not None:
        raise ValueError(
            f"the batch has a weight or annotated classes, which a {type(loss).__name__} does not take: wrap it in "
            "a lightning_dice.losses.SegmentationLoss, or leave them out"
        )
    return call_torch_loss(loss, logits, batch.mask)


def mean_image_loss(loss: nn.Module, logits: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean of the losses of single images, and of each of the loss's terms; 0 without images.

    Args:
        loss: as in `batch_loss`.
        logits: `(batch, classes, *space)`.
        batch: as in `batch_loss`.
    """
    if not len(logits):
        # Called for the names of the terms alone: every process must log the same ones.
        mask = batch.mask.new_zeros(1, *batch.mask.shape[1:])
        if mask.is_floating_point():
            mask[:, :1] = 1  # A softmax needs labels that sum to 1.
        batch_loss(loss, logits.new_zeros(1, *logits.shape[1:]), Batch(batch.image, mask))
        zero = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        return zero, dict.fromkeys(loss_terms(loss), zero)
    losses, terms = [], []
    for index in range(len(logits)):
        losses.append(batch_loss(loss, logits[index : index + 1], batch.image_at(index)))
        terms.append(loss_terms(loss))
    means = {name: torch.stack([values[name] for values in terms]).mean() for name in terms[0]}
    return torch.stack(losses).mean(), means


def deep_supervision_loss(loss: nn.Module, levels: list[Tensor], batch: Batch) -> Tensor:
    """Return the loss of several levels, as `DeepSupervision` defines it, at the size of the padded image.

    Args:
        loss: the loss of each level, or a `DeepSupervision`.
        levels: logits, finest first, the first at the size of the padded image.
        batch: as in `batch_loss`; its image is not padded.
    """
    loss = loss if isinstance(original_module(loss), DeepSupervision) else DeepSupervision(loss)
    space = tuple(levels[0].shape[2:])
    if tuple(batch.image.shape[2:]) != space:
        # The padding is ignored if the loss can ignore pixels; else it repeats the last row, as the image's does.
        inner, is_ids = original_module(loss.loss), batch.mask.ndim < batch.image.ndim
        can_ignore = isinstance(inner, SegmentationLoss) or is_ids
        ignore_index = getattr(inner, "ignore_index", None) if can_ignore else None
        weight = None if batch.weight is None else pad_target(batch.weight, space, ignore_index=None)
        mask = pad_target(batch.mask, space, ignore_index=ignore_index)
        batch = batch._replace(mask=mask, weight=weight, maps={})
    return batch_loss(loss, levels, batch)


def loss_terms(loss: nn.Module) -> dict[str, Tensor]:
    """Return the terms of the last call of a loss that has several, by name."""
    return dict(getattr(loss, "values", {}))
