"""What an evaluation step says of its cases, and what of it is to be recorded."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_dice.functional import hard_prediction
from lightning_dice.scoring.settings import Activation

__all__ = ["Activation", "evaluated_split", "gather", "step_labels", "step_logits", "step_temperature"]


def step_logits(outputs: Any) -> Tensor | None:
    """The logits that an evaluation step returned, if it did."""
    logits = outputs.get("logits") if isinstance(outputs, dict) else None
    return logits if isinstance(logits, Tensor) else None


def step_labels(outputs: Any, activation: Activation, threshold: float) -> Tensor | None:
    """The masks that an evaluation step decided on, `(batch, *space)` ids or `(batch, classes, *space)` planes.

    Those that it returned as `labels`; else those that its logits stand for; `None` if it returned neither.
    """
    labels = outputs.get("labels") if isinstance(outputs, dict) else None
    if isinstance(labels, Tensor):
        return labels
    logits = step_logits(outputs)
    return None if logits is None else hard_prediction(logits, activation=activation, threshold=threshold)


def step_temperature(outputs: Any) -> float:
    """By what the step's logits are to be divided to become those of calibrated probabilities; 1 if it does not say."""
    return float(outputs["temperature"]) if isinstance(outputs, dict) and "temperature" in outputs else 1.0


def evaluated_split(trainer: Trainer, *, during_fit: bool) -> str | None:
    """`"test"` or `"val"` if the cases now evaluated are to be recorded, else None."""
    if trainer.sanity_checking:
        return None
    if trainer.testing:
        return "test"
    return "val" if trainer.state.fn == "validate" or during_fit else None


def gather(trainer: Trainer, value: Any) -> list[Any]:
    """What each rank holds, in the order of the ranks, on rank 0; an empty list on the others. All ranks must call."""
    if trainer.world_size == 1 or not torch.distributed.is_initialized():
        return [value] if trainer.is_global_zero else []
    values: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
    torch.distributed.gather_object(value, values)
    return values or []
