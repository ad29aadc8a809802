"""A training that was broken off goes on as if it had not been."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from operator import attrgetter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.loop import _Loop
from torch import Tensor
from torchmetrics import Metric

from lightning_dice.data.samplers import mixed_seed

# Whether all ranks save the checkpoint that is being made: a rank alone must not wait for messages of the others.
_together: ContextVar[bool] = ContextVar("_together", default=True)


@contextmanager
def saving_alone() -> Iterator[None]:
    """Within it a checkpoint is made by this rank alone, perhaps because another one is lost."""
    token = _together.set(False)
    try:
        yield
    finally:
        _together.reset(token)


class ExactResume(Callback):
    """Let a resumed training give, bit for bit on the CPU, what it would have given uninterrupted.

    Lightning's checkpoints hold weights, optimizer, schedule and the number of batches done. What is missing there:

    - Random numbers of the network, such as dropout's. Each step's follow from the seed, the epoch, the batch and the
      rank, whatever was drawn before: `random`, numpy and torch are seeded anew at each step, of evaluations too.
    - In the middle of an epoch, the means and metrics over its first part, on each rank.
    - A validation, or the end of an epoch, that was due when the checkpoint was written.

    `SegmentationData` goes on with the next batch of the epoch by itself.

    - Between two optimizer steps (`accumulate_grad_batches`), as at a validation, the gradients so far, on each rank.

    A checkpoint that a rank had to write alone, because an exception ended another, holds that rank's metrics only.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self._saved: dict[str, Any] | None = None
        self._epoch_ends = self._between_epochs = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the global seed, of the first rank: without one, each has another."""
        if self.seed is None:
            self.seed = int(trainer.strategy.broadcast(torch.initial_seed()))

    def state_dict(self) -> dict[str, Any]:
        """The seed."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the seed of the training that was broken off."""
        self.seed = state_dict["seed"]

    def _seed(self, trainer: Trainer, stage: int, *place: int) -> None:
        seed = mixed_seed(self.seed or 0, stage, trainer.current_epoch, *place, trainer.global_rank)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the step."""
        self._seed(trainer, 0, batch_idx)

    def on_validation_batch_start(self, trainer: Trainer, *arguments: Any, **_: Any) -> None:
        """Seed the step."""
        self._seed(trainer, 1, trainer.global_step, int(arguments[2]))

    def on_test_batch_start(self, trainer: Trainer, *arguments: Any, **_: Any) -> None:
        """Seed the step."""
        self._seed(trainer, 2, int(arguments[2]))

    def on_predict_batch_start(self, trainer: Trainer, *arguments: Any, **_: Any) -> None:
        """Seed the step."""
        self._seed(trainer, 3, int(arguments[2]))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what each rank has counted so far."""
        if trainer.state.fn != "fit":
            return
        loops = checkpoint["loops"]["fit_loop"]
        _let_validation_follow(trainer, loops)
        epoch = loops["epoch_progress"]["current"]
        mine: dict[str, Any] = {"logged": _logged(trainer)}
        if epoch["processed"] < epoch["ready"]:
            mine |= {"means": _means(trainer), "metrics": _metrics(pl_module)}
            if trainer.fit_loop.epoch_loop._should_accumulate():
                mine["gradients"] = {
                    name: parameter.grad.detach().cpu().clone()
                    for name, parameter in pl_module.named_parameters()
                    if parameter.grad is not None
                }
        together = _together.get() and trainer.world_size > 1 and dist.is_initialized()
        everyone: list[Any] = [None] * trainer.world_size
        if together:
            dist.all_gather_object(everyone, mine)
        else:
            everyone[trainer.global_rank] = mine
        checkpoint["ranks"] = everyone
        # Within the hooks of an epoch's end, after which schedulers that watch a metric take their step.
        total = loops["epoch_progress"]["total"]
        checkpoint["epoch_ends"] = total["processed"] == total["completed"] + 1

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep it until training starts."""
        self._between_epochs = False
        if trainer.state.fn == "fit" and trainer.fit_loop._iteration_based_training():
            # With max_steps Lightning takes an epoch that has ended for one that goes on.
            progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
            if progress["current"]["processed"] == progress["current"]["ready"]:
                self._between_epochs = True
                for counts in progress.values():
                    counts["completed"] = counts["processed"]
        everyone = checkpoint.get("ranks") or []
        # Another number of ranks has other shares: better no metrics of the epoch's first part than wrong ones.
        known = trainer.state.fn == "fit" and len(everyone) == trainer.world_size
        self._saved = everyone[trainer.global_rank] if known else None
        self._epoch_ends = trainer.state.fn == "fit" and bool(checkpoint.get("epoch_ends"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put it back."""
        saved, self._saved = self._saved, None
        if self._between_epochs:
            self._between_epochs = False
            _Loop.restarting.fset(trainer.fit_loop, False)  # type: ignore[attr-defined]
        if saved:
            if "means" in saved:
                _restore_means(trainer, pl_module, saved["means"])
                _restore_metrics(pl_module, saved["metrics"])
            for name, parameter in pl_module.named_parameters():
                if name in saved.get("gradients", {}):
                    parameter.grad = saved["gradients"][name].to(parameter.device)
            trainer._logger_connector._callback_metrics.update(_on(pl_module.device, saved["logged"]))
        if self._epoch_ends:
            self._epoch_ends = False
            for config in trainer.lr_scheduler_configs:
                due = config.interval == "epoch" and trainer.current_epoch % config.frequency == 0
                if config.reduce_on_plateau and due and config.monitor in trainer.callback_metrics:
                    pl_module.lr_scheduler_step(config.scheduler, trainer.callback_metrics[config.monitor])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let schedulers that watch a metric take their step, which a resumed epoch would leave out."""
        trainer.fit_loop._restarting = False


def _let_validation_follow(trainer: Trainer, loops: dict[str, Any]) -> None:
    """Make what is due after this batch, validation or the epoch's end, happen in a training that goes on from here.

    Lightning takes a batch after which its callbacks save for unfinished, counts it when resuming, and passes over
    the validation that was to follow, and over the end of the epoch. Saved as a validation that has just begun, it is
    run; saved as finished, the epoch ends.
    """
    loop = trainer.fit_loop.epoch_loop
    batches = loops["epoch_loop.batch_progress"]
    total, current = batches["total"], batches["current"]
    in_batch_end = total["ready"] == total["processed"] == total["completed"] + 1
    fetcher = trainer.fit_loop._data_fetcher
    if not in_batch_end or fetcher is None or trainer.validating:
        return
    due = bool(trainer.enable_validation and loop._should_check_val_fx(fetcher))
    if not due and not batches["is_last_batch"]:
        return
    total["completed"] = total["processed"]
    current["completed"] = current["processed"]
    if due:
        validation = loops["epoch_loop.val_loop.batch_progress"]
        for progress in (validation["total"], validation["current"]):
            progress.update(ready=progress["completed"] + 1, started=progress["completed"] + 1)
            progress["processed"] = progress["completed"]
        validation["current"].update(ready=1, started=1, processed=0, completed=0)
        validation["is_last_batch"] = False
    else:
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1


def _means(trainer: Trainer) -> list[dict[str, Any]]:
    """What `self.log` has added up in this epoch."""
    rows = []
    for metric in trainer.fit_loop.epoch_loop._results.values():
        meta = metric.meta
        reducible = meta.is_mean_reduction or meta.is_sum_reduction or meta.is_max_reduction or meta.is_min_reduction
        if not meta.on_epoch or metric.has_reset or (metric.is_tensor and not reducible):
            continue
        settings = {
            name: getattr(meta, name)
            for name in ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "add_dataloader_idx")
        }
        row: dict[str, Any] = {
            "settings": settings,
            "sync": bool(meta.sync.should),
            "rank_zero_only": bool(meta.sync.rank_zero_only),
        }
        rows.append(row)
        if not metric.is_tensor:
            # A metric of the module, by the attribute under which it lies there; its state is kept with the others'.
            row["metric"] = meta.metric_attribute
            continue
        row |= {
            "reduce": next(way for way in ("mean", "sum", "max", "min") if getattr(meta, f"is_{way}_reduction")),
            "value": metric.value.detach().cpu().clone(),
        }
        if meta.is_mean_reduction:
            row["count"] = torch.as_tensor(metric.cumulated_batch_size).cpu().clone()
    return rows


def _restore_means(trainer: Trainer, module: LightningModule, rows: list[dict[str, Any]]) -> None:
    results = trainer.fit_loop.epoch_loop._results
    for row in rows:
        settings = {
            **row["settings"],
            "sync_dist": row["sync"],
            "sync_dist_fn": trainer.strategy.reduce,
            "rank_zero_only": row["rank_zero_only"],
            "batch_size": 1,
        }
        if "metric" in row:
            metric = attrgetter(row["metric"])(module)
            results.log(**settings, value=metric, metric_attribute=row["metric"])
            continue
        value = row["value"].to(trainer.strategy.root_device)
        results.log(**settings, value=value, reduce_fx=getattr(torch, row["reduce"]))
        name = f"{settings['fx']}.{settings['name']}"
        results[name].value = value
        if "count" in row:
            results[name].cumulated_batch_size = row["count"].to(value.device)
    # The first batch of a loop starts its sums anew; the epoch's first one lies behind.
    trainer._logger_connector._first_loop_iter = False


def _counted(module: LightningModule) -> dict[str, Metric]:
    return {name: part for name, part in module.named_modules() if isinstance(part, Metric) and part._defaults}


def _metrics(module: LightningModule) -> dict[str, Any]:
    """The states of the module's metrics that have counted something."""
    return {
        name: {
            "count": metric._update_count,
            "states": {
                state: [one.detach().cpu().clone() for one in value]
                if isinstance(value, list)
                else value.detach().cpu().clone()
                for state, value in ((state, getattr(metric, state)) for state in metric._defaults)
            },
        }
        for name, metric in _counted(module).items()
        if metric._update_count
    }


def _restore_metrics(module: LightningModule, saved: Mapping[str, Any]) -> None:
    for name, metric in _counted(module).items():
        if name in saved:
            for state, value in saved[name]["states"].items():
                setattr(metric, state, _on(metric.device, value))
            metric._update_count = saved[name]["count"]
            metric._computed = None


def _logged(trainer: Trainer) -> dict[str, Tensor]:
    """What callbacks have been told so far, such as the last validation's score."""
    return {name: value.detach().cpu().clone() for name, value in trainer._logger_connector._callback_metrics.items()}


def _on(device: torch.device, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _on(device, one) for key, one in value.items()}
    return [_on(device, one) for one in value]
