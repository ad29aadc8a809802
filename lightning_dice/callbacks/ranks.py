"""Exchange objects among the processes of a training run."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer


def is_distributed(trainer: Trainer) -> bool:
    """Return whether the processes of the trainer can exchange messages, and there are several."""
    return trainer.world_size > 1 and torch.distributed.is_available() and torch.distributed.is_initialized()


def all_gather(trainer: Trainer, value: Any) -> list[Any]:
    """Return the `value` of each rank, in the order of the ranks, on every rank. All ranks must call it."""
    if not is_distributed(trainer):
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def gather_on_rank_zero(trainer: Trainer, value: Any) -> list[Any]:
    """Return the `value` of each rank, in the order of the ranks, on rank 0 and an empty list on the others.

    All ranks must call it.
    """
    if not is_distributed(trainer):
        return [value] if trainer.is_global_zero else []
    values: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
    torch.distributed.gather_object(value, values)
    return values or []
