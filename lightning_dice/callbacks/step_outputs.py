"""Read what evaluation steps return."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_dice.data.batch import Batch
from lightning_dice.functional import hard_prediction
from lightning_dice.scoring.settings import Activation

__all__ = ["Activation", "case_names", "evaluated_split", "step_labels", "step_logits", "step_temperature"]


def step_logits(outputs: Any) -> Tensor | None:
    """Return the logits in the output of an evaluation step, or None if it has none.

    >>> import torch
    >>> step_logits({"logits": torch.zeros(2, 1, 4, 4)}).shape
    torch.Size([2, 1, 4, 4])
    """
    logits = outputs.get("logits") if isinstance(outputs, dict) else None
    return logits if isinstance(logits, Tensor) else None


def step_labels(outputs: Any, activation: Activation, threshold: float) -> Tensor | None:
    """Return the predicted masks in the output of an evaluation step, or None if it has none.

    Args:
        outputs: what the step returned. Its `"labels"` are used if present; otherwise they come from its logits.
        activation: for the logits.
        threshold: probability above which a pixel is predicted as a class; unused with `"softmax"`.

    Returns:
        Class ids `(batch, *space)`, or boolean planes `(batch, classes, *space)`.

    >>> import torch
    >>> step_labels({"logits": torch.tensor([[[-1.0, 2.0]]])}, "sigmoid", 0.5)
    tensor([[[False,  True]]])
    """
    labels = outputs.get("labels") if isinstance(outputs, dict) else None
    if isinstance(labels, Tensor):
        return labels
    logits = step_logits(outputs)
    return None if logits is None else hard_prediction(logits, activation=activation, threshold=threshold)


def step_temperature(outputs: Any) -> float:
    """Return the temperature of the step's logits, 1 by default; probabilities are calibrated after dividing by it."""
    return float(outputs["temperature"]) if isinstance(outputs, dict) and "temperature" in outputs else 1.0


def evaluated_split(trainer: Trainer, *, during_fit: bool) -> str | None:
    """Return `"test"` or `"val"` if the present evaluation should be recorded, otherwise None.

    Args:
        trainer: running an evaluation.
        during_fit: record validations within a fit too.
    """
    if trainer.sanity_checking:
        return None
    if trainer.testing:
        return "test"
    return "val" if trainer.state.fn == "validate" or during_fit else None


def case_names(trainer: Trainer, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[str]:
    """Return a name for each image of a batch that no other image of the evaluation has.

    Cases without a name are counted: `batch 2, image 0`. With several data loaders or, for cases without a name,
    processes, the name says which.
    """
    names = batch.case
    if not batch.has_names:
        rank = f"process {trainer.global_rank}, " if trainer.world_size > 1 else ""
        names = [f"{rank}batch {batch_idx}, image {index}" for index in range(len(batch.image))]
    loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    several = isinstance(loaders, (list, tuple)) and len(loaders) > 1
    return [f"{name} (data loader {dataloader_idx})" for name in names] if several else names
