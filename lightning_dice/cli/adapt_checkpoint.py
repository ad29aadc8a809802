"""Adapt a checkpoint to a run that is resumed with other settings, or from another folder."""

from __future__ import annotations

import os
import warnings
from typing import Any

import lightning as L
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_dice.library_internals.lightning import read_optimizers


def update_checkpoint_paths(checkpoint: dict[str, Any], old: str | None, new: str) -> None:
    """Update the callbacks' paths after the run's folder has moved; else ModelCheckpoint forgets its best score."""
    if old is None or old == new:
        return

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {moved(key): moved(entry) for key, entry in value.items()}
        return new + value[len(old) :] if isinstance(value, str) and value.startswith(old + os.sep) else value

    checkpoint["callbacks"] = {name: moved(state) for name, state in checkpoint.get("callbacks", {}).items()}


def apply_optimizer_settings(
    checkpoint: dict[str, Any], module: L.LightningModule, *, rate_changed: bool = True
) -> None:
    """Replace the settings of optimizer and schedule in a checkpoint by the module's.

    Both keep their settings in their state, so that a resumed run would silently use the old ones. The schedule
    continues as if it had been the new one from the start; one that follows a metric keeps its state.

    Args:
        checkpoint: changed in place.
        module: creates the new optimizer and schedule.
        rate_changed: whether the learning rate was changed; if not, a rate that a plateau has lowered stays.
    """
    optimizers, schedulers = read_optimizers(module.configure_optimizers())
    kept = {"params"}
    for index, (described, state) in enumerate(zip(schedulers, checkpoint["lr_schedulers"], strict=False)):
        scheduler = described["scheduler"] if isinstance(described, dict) else described
        if isinstance(scheduler, ReduceLROnPlateau):
            if not rate_changed:
                kept.add("lr")  # It may have been lowered.
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The optimizer has not stepped, which is fine here.
            for _ in range(state["last_epoch"]):
                scheduler.step()
        checkpoint["lr_schedulers"][index] = scheduler.state_dict()
    for optimizer, state in zip(optimizers, checkpoint["optimizer_states"], strict=True):
        for saved, new in zip(state["param_groups"], optimizer.param_groups, strict=True):
            saved.update({name: value for name, value in new.items() if name not in kept})
