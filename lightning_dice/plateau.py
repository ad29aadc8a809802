"""A schedule that follows a metric of the validations steps after each of them, and at no other time."""

from __future__ import annotations

from typing import Any

from lightning import Trainer
from torch.optim.lr_scheduler import ReduceLROnPlateau


def plateau_frequency(scheduler: Any, interval: str, monitor: str, trainer: Trainer | None = None) -> int:
    """Return how many of its intervals a schedule waits between two steps: 1, unless it follows a validation.

    Args:
        scheduler: any schedule; only `ReduceLROnPlateau` follows a metric.
        interval: `"epoch"` or `"step"`.
        monitor: the metric that it follows; only those of a validation, `val/...`, are restricted.
        trainer: validates every `check_val_every_n_epoch` epochs; every epoch without it.

    Raises:
        ValueError: the metric would not be there, or would be an old one, when the schedule steps.

    >>> import torch
    >>> plateau = ReduceLROnPlateau(torch.optim.SGD([torch.zeros(1)]))
    >>> plateau_frequency(plateau, "epoch", "val/dice")
    1
    >>> plateau_frequency(plateau, "step", "val/dice")
    Traceback (most recent call last):
    ValueError: scheduler ReduceLROnPlateau follows val/dice, which a validation at the end of an epoch gives it: \
set interval="epoch", got "step"
    """
    if not isinstance(scheduler, ReduceLROnPlateau) or not monitor.startswith("val/"):
        return 1
    follows = f"scheduler ReduceLROnPlateau follows {monitor}, which a validation at the end of an epoch gives it"
    if interval != "epoch":
        raise ValueError(f'{follows}: set interval="epoch", got "{interval}"')
    if trainer is None:
        return 1
    if trainer.limit_val_batches == 0:
        raise ValueError(f"{follows}: set limit_val_batches of the Trainer above 0, or use another schedule")
    if trainer.check_val_every_n_epoch is None:
        raise ValueError(
            f"{follows}: set check_val_every_n_epoch of the Trainer to a number of epochs, got None, or use another "
            "schedule"
        )
    return int(trainer.check_val_every_n_epoch)
