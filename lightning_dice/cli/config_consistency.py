"""Keep a run's config in its checkpoints, equal on all ranks, and apply it when the run is resumed."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf

from lightning_dice.cli.adapt_checkpoint import adapt_checkpoint, update_checkpoint_paths
from lightning_dice.cli.errors import UserError


class ConfigConsistency(Callback):
    """Apply the config to a checkpoint that is resumed, and store it in checkpoints and loggers, equal on all ranks.

    Args:
        config: plain values.
        save: called by the first rank when training starts, and so nothing in the config was refused; for a run that is
            resumed, whose folder must stay as it was until then.
    """

    def __init__(self, config: dict[str, Any], save: Callable[[], object] | None = None) -> None:
        self.config, self.save = config, save

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compare the config across ranks."""
        check_config_consistency(OmegaConf.to_yaml(OmegaConf.create(self.config)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the config, and save it."""
        for logger in trainer.loggers:
            logger.log_hyperparams(self.config)
        self._save(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the config of a run that had nothing left to train."""
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        if self.save is not None and trainer.is_global_zero:
            self.save()
        self.save = None

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Apply the settings that changed."""
        saved = checkpoint.get("config") or {}
        update_checkpoint_paths(checkpoint, saved.get("folder"), self.config["folder"])
        if trainer.state.fn == "fit":
            for note in adapt_checkpoint(checkpoint, trainer, self.config):
                if trainer.is_global_zero:
                    print(note, flush=True)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the config in the checkpoint."""
        checkpoint["config"] = self.config


def check_config_consistency(config: str) -> None:
    """Check that all ranks have the same config. Only a hash is sent, and the configs if it differs.

    Raises:
        UserError: on every rank, with the lines that differ from the first rank's.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    digest = hashlib.sha256(config.encode()).hexdigest()
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    if len(set(digests)) == 1:
        return
    configs = [""] * len(digests)
    dist.all_gather_object(configs, config)
    diffs = []
    for rank, other in enumerate(configs):
        if other != configs[0]:
            lines = difflib.unified_diff(configs[0].splitlines(), other.splitlines(), "rank 0", f"rank {rank}", n=1)
            diffs.append("\n".join(line.rstrip("\n") for line in lines))
    raise UserError("the ranks have different configs, and would train different things:\n" + "\n".join(diffs))
