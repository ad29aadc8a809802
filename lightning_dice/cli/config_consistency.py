"""Keep a run's config in its checkpoints, equal on all ranks, and apply it when the run is resumed."""

from __future__ import annotations

import difflib
import hashlib
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf

from lightning_dice.cli.adapt_checkpoint import apply_optimizer_settings, update_checkpoint_paths
from lightning_dice.cli.errors import UserError


class ConfigConsistency(Callback):
    """Store the config in checkpoints and loggers, and check that all ranks have the same one."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compare the config across ranks."""
        check_config_consistency(OmegaConf.to_yaml(OmegaConf.create(self.config)))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the config."""
        for logger in trainer.loggers:
            logger.log_hyperparams(self.config)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Apply the settings that changed."""
        saved = checkpoint.get("config") or {}
        update_checkpoint_paths(checkpoint, saved.get("folder"), self.config["folder"])
        changed = any(saved.get(name) != self.config.get(name) for name in ("optimizer", "scheduler"))
        if trainer.state.fn == "fit" and changed:
            rates = [(config.get("optimizer") or {}).get("lr") for config in (saved, self.config)]
            apply_optimizer_settings(checkpoint, pl_module, rate_changed=rates[0] != rates[1])

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
