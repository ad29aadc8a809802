"""A short training that records all that must be the same when it is resumed; for test_resume.py and its scripts."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAveragePrecision, BinaryJaccardIndex, MulticlassJaccardIndex
from torchmetrics.wrappers import BootStrapper, ClasswiseWrapper, MinMaxMetric, Running

from lightning_dice import DiceLoss, DiceScore, SegmentationModule
from lightning_dice.callbacks import ExactResume
from lightning_dice.data import SegmentationData, SyntheticSource


class Events(L.Callback):
    """What happens, in order, and what has been logged at the end of each epoch."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.rows: dict[int, dict[str, float]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.events.append(("batch", trainer.current_epoch, batch_idx, trainer.global_step, *batch.case))

    def on_validation_start(self, trainer, pl_module):
        self.events.append(("validation", trainer.current_epoch, trainer.global_step))

    def on_train_epoch_start(self, trainer, pl_module):
        self.events.append(("epoch", trainer.current_epoch))
        self._row(trainer, trainer.current_epoch - 1)

    def on_train_epoch_end(self, trainer, pl_module):
        self.events.append(("epoch's end", trainer.current_epoch))

    def on_train_end(self, trainer, pl_module):
        self._row(trainer, self.events[-1][1])

    def _row(self, trainer, epoch):
        if epoch >= 0 and trainer.callback_metrics:
            # The value of one step is that of the last step of this process.
            metrics = {name: value for name, value in trainer.callback_metrics.items() if name != "train/loss_step"}
            self.rows[epoch] = {name: float(value) for name, value in metrics.items() if "/" in name}


class SaveEverywhere(L.Callback):
    """A checkpoint at every place where one may be saved, but for those between two optimizer steps."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.paths = folder, []

    def _save(self, trainer, where):
        path = self.folder / f"{len(self.paths):03}-{where}-{trainer.current_epoch}-{trainer.global_step}.ckpt"
        self.paths.append(path)
        trainer.save_checkpoint(path)

    def on_train_batch_end(self, trainer, *_):
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self._save(trainer, "batch")

    def on_validation_end(self, trainer, *_):
        self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer, *_):
        self._save(trainer, "epoch")


class Spoil(L.Callback):
    """Make the network worse with each step from one on, so that the last validation is not the best."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step >= self.step:
            pl_module.net.bias.data += 0.5


class LogsMetric(SegmentationModule):
    """Logs a metric as an object, whose values Lightning computes."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.mean = MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.mean(loss.detach())
        self.log("train/mean", self.mean, on_step=False, on_epoch=True)
        return loss


def wrapped_metrics():
    """Metrics that remember more than their states, or have lists of states."""
    return {
        "bootstrap": BootStrapper(BinaryJaccardIndex(), num_bootstraps=2, sampling_strategy="multinomial"),
        "each": ClasswiseWrapper(MulticlassJaccardIndex(2, average="none")),
        "extremes": MinMaxMetric(BinaryJaccardIndex()),
        "last": Running(DiceScore(), window=3),
        "list": BinaryAveragePrecision(),
    }


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0, threshold=10.0)


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)


def train(
    folder: Path | None = None,
    checkpoint: Path | None = None,
    *,
    workers: int = 0,
    epochs: int = 3,
    schedule=cosine,
    average: bool = False,
    batch_norm: bool = True,
    seed: int = 7,
    exact: bool = True,
    batch_size: int = 4,
    metric: bool = False,
    wrapped: bool = False,
    callbacks: tuple[L.Callback, ...] = (),
    **trainer_settings: Any,
) -> dict[str, Any]:
    """Train, from the beginning or from a checkpoint; returns what must be the same."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(seed, verbose=False)
    torch.manual_seed(3)
    # Dropout and batch norm, whose random numbers and statistics must be the same too.
    norm = nn.BatchNorm2d(4) if batch_norm else nn.Identity()
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), norm, nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(4, 1, 1))
    torch.manual_seed(seed)
    data = SegmentationData(
        SyntheticSource(size=(16, 16), cases=(16, 4, 0)), batch_size=batch_size, num_workers=workers
    )
    module = (LogsMetric if metric else SegmentationModule)(
        net,
        DiceLoss(ignore_index=255),
        wrapped_metrics() if wrapped else None,
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-2),
        scheduler=schedule,
    )
    events = Events()
    saver = [SaveEverywhere(folder)] if folder is not None else []
    ema = [EMAWeightAveraging(decay=0.5)] if average else []
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    own = [ExactResume()] if exact else []
    trainer = L.Trainer(
        max_epochs=epochs, callbacks=[*own, *ema, events, *saver, *callbacks], **settings | trainer_settings
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(ModelSummary|workers|logging interval|LeafSpec|before the epoch ended).*")
        warnings.filterwarnings("ignore", "No positive samples", UserWarning)
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "optimizer": trainer.optimizers[0].state_dict()["state"],
        "rate": trainer.optimizers[0].param_groups[0]["lr"],
        "steps": trainer.global_step,
        "steps of loggers": trainer.fit_loop.epoch_loop._batches_that_stepped,
        "events": events.events,
        "rows": events.rows,
        "paths": saver[0].paths if saver else [],
    }


def differences(whole: dict[str, Any], resumed: dict[str, Any]) -> list[str]:
    """In what a resumed training differs from the uninterrupted one."""
    found = []
    for name, value in whole["weights"].items():
        if not torch.equal(value, resumed["weights"][name]):
            found.append(f"weights {name}")
    for index, state in whole["optimizer"].items():
        for name, value in state.items():
            if not torch.equal(value, resumed["optimizer"][index][name]):
                found.append(f"optimizer {index} {name}")
    found += [name for name in ("rate", "steps", "steps of loggers") if whole[name] != resumed[name]]
    events = resumed["events"]
    if events != whole["events"][len(whole["events"]) - len(events) :]:
        found.append(f"events {events}")
    for epoch, row in resumed["rows"].items():
        # Of an epoch that ended before, the checkpoint knows what had been logged when it was written.
        if ("epoch's end", epoch) in events and row != whole["rows"][epoch]:
            found.append(f"epoch {epoch}: {row} for {whole['rows'][epoch]}")
    return found
