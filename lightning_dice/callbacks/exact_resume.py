"""Resume an interrupted run, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_dice.callbacks.ranks import all_gather, is_distributed
from lightning_dice.data.samplers import mixed_seed
from lightning_dice.library_internals.lightning import (
    callback_metrics,
    count_step_of_loggers,
    epoch_means,
    is_accumulating,
    is_fetching,
    mark_as_fresh,
    mark_epoch_as_fresh,
    restore_epoch_means,
    saved_loop_state,
    set_batches_done,
    validation_is_due,
)
from lightning_dice.library_internals.torchmetrics import (
    memory,
    set_memory,
    set_update_count,
    state_names,
    update_count,
)

# Whether all ranks save the present checkpoint: a rank that saves alone must not wait for messages of the others.
_all_ranks_save: ContextVar[bool] = ContextVar("_all_ranks_save", default=True)


@contextmanager
def saving_on_this_rank_alone() -> Iterator[None]:
    """Save checkpoints on this rank without waiting for the others, which may have failed."""
    token = _all_ranks_save.set(False)
    try:
        yield
    finally:
        _all_ranks_save.reset(token)


class ExactResume(Callback):
    """Make a resumed run give the results of an uninterrupted one: on the CPU, bit for bit.

    Lightning's checkpoints hold weights, optimizer, schedule and the number of batches done. This adds

    - random numbers of the network, such as dropout's: `random`, numpy and torch are seeded at each step, evaluation
      steps included, from the run's seed, the epoch, the batch and the rank;
    - in the middle of an epoch, the means and metrics over its first part, on each rank;
    - a validation, or the end of an epoch, that was due when the checkpoint was written;
    - between two optimizer steps (`accumulate_grad_batches`), as at a validation, the gradients so far, on each rank.

    `SegmentationData` resumes the epoch at its next batch.

    A checkpoint that one rank had to write alone, because another failed, holds the metrics of that rank only.

    >>> ExactResume().seed is None  # until `fit`, which takes the global seed
    True
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self._saved: dict[str, Any] | None = None
        self._epoch_ends = self._between_epochs = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the global seed of the first rank: if none was set, each rank has another."""
        if self.seed is None:
            self.seed = int(trainer.strategy.broadcast(torch.initial_seed()))

    def state_dict(self) -> dict[str, Any]:
        """Return the seed."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the seed of the interrupted run."""
        self.seed = state_dict["seed"]

    def _seed_step(self, trainer: Trainer, stage: int, *position: int) -> None:
        seed = mixed_seed(self.seed or 0, stage, trainer.current_epoch, *position, trainer.global_rank)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the step."""
        self._seed_step(trainer, 0, batch_idx)

    def on_validation_batch_start(self, trainer: Trainer, *arguments: Any, **_: Any) -> None:
        """Seed the step."""
        self._seed_step(trainer, 1, trainer.global_step, int(arguments[2]))

    def on_test_batch_start(self, trainer: Trainer, *arguments: Any, **_: Any) -> None:
        """Seed the step."""
        self._seed_step(trainer, 2, int(arguments[2]))

    def on_predict_batch_start(self, trainer: Trainer, *arguments: Any, **_: Any) -> None:
        """Seed the step."""
        self._seed_step(trainer, 3, int(arguments[2]))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the means, metrics and gradients of each rank."""
        if trainer.state.fn != "fit":
            return
        keep_pending_validation(trainer, checkpoint)
        epoch = saved_loop_state(checkpoint, "epoch_progress")
        own: dict[str, Any] = {
            "logged": {name: value.detach().cpu().clone() for name, value in callback_metrics(trainer).items()}
        }
        # Schedulers that follow a metric step after the hooks at the end of an epoch, one of which is saving.
        checkpoint["epoch_ends"] = epoch["total"]["processed"] == epoch["total"]["completed"] + 1
        can_compute = _all_ranks_save.get() or not is_distributed(trainer)
        own["remembered"] = _remembered(pl_module, epoch_ends=checkpoint["epoch_ends"] and can_compute)
        if epoch["current"]["processed"] < epoch["current"]["ready"]:
            own |= {"means": epoch_means(trainer), "metrics": _metric_states(pl_module)}
            if is_accumulating(trainer):
                own["gradients"] = {
                    name: parameter.grad.detach().cpu().clone()
                    for name, parameter in pl_module.named_parameters()
                    if parameter.grad is not None
                }
        if _all_ranks_save.get() and is_distributed(trainer):
            checkpoint["ranks"] = all_gather(trainer, own)
        else:
            checkpoint["ranks"] = [own if rank == trainer.global_rank else None for rank in range(trainer.world_size)]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what was saved until training starts."""
        self._between_epochs = False
        fitting = trainer.state.fn == "fit"
        if fitting and trainer.max_steps != -1:
            # With max_steps, Lightning takes an epoch that has ended for an unfinished one.
            progress = saved_loop_state(checkpoint, "epoch_progress")
            if progress["current"]["processed"] == progress["current"]["ready"]:
                self._between_epochs = True
                for counts in progress.values():
                    counts["completed"] = counts["processed"]
        ranks = checkpoint.get("ranks") or []
        # Another number of ranks divides the data otherwise: no metrics of the epoch's first part are better than
        # wrong ones.
        self._saved = ranks[trainer.global_rank] if fitting and len(ranks) == trainer.world_size else None
        if fitting and ranks and len(ranks) != trainer.world_size and any(rank and "means" in rank for rank in ranks):
            rank_zero_warn(
                f"the epoch was interrupted on {len(ranks)} processes, and resumes on {trainer.world_size}: its train/ "
                "metrics are of the rest of the epoch"
            )
        self._epoch_ends = fitting and bool(checkpoint.get("epoch_ends"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore what was saved."""
        saved, self._saved = self._saved, None
        batches = getattr(trainer.datamodule, "resumed_batches", None)  # type: ignore[attr-defined]
        if batches is not None:
            set_batches_done(trainer, batches)
        if self._between_epochs:
            self._between_epochs = False
            mark_as_fresh(trainer)
        if saved:
            if "means" in saved:
                restore_epoch_means(trainer, pl_module, saved["means"])
                _restore_metric_states(pl_module, saved["metrics"])
            _restore_remembered(pl_module, saved.get("remembered", {}))
            for name, parameter in pl_module.named_parameters():
                if name in saved.get("gradients", {}):
                    parameter.grad = saved["gradients"][name].to(parameter.device)
            callback_metrics(trainer).update(_move(pl_module.device, saved["logged"]))
        if self._epoch_ends:
            self._epoch_ends = False
            for config in trainer.lr_scheduler_configs:
                due = config.interval == "epoch" and trainer.current_epoch % config.frequency == 0
                if config.reduce_on_plateau and due and config.monitor in trainer.callback_metrics:
                    pl_module.lr_scheduler_step(config.scheduler, trainer.callback_metrics[config.monitor])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let schedulers that follow a metric step at the end of a resumed epoch too, where Lightning omits it."""
        mark_epoch_as_fresh(trainer)


def keep_pending_validation(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Change the saved progress so that a resumed run runs the validation or the epoch's end due after this batch.

    Doing it twice changes nothing.

    Lightning considers a batch unfinished while callbacks save after it, counts it when resuming, and then skips the
    validation, or the end of the epoch, that would have followed. A validation saved as just begun is run; an epoch
    whose last batch is saved as finished ends.
    """
    batches = saved_loop_state(checkpoint, "epoch_loop.batch_progress")
    total, current = batches["total"], batches["current"]
    in_batch_end = total["ready"] == total["processed"] == total["completed"] + 1
    if not in_batch_end or not is_fetching(trainer) or trainer.validating:
        return
    due = validation_is_due(trainer)
    if not due and not batches["is_last_batch"]:
        return
    total["completed"] = total["processed"]
    current["completed"] = current["processed"]
    if due:
        validation = saved_loop_state(checkpoint, "epoch_loop.val_loop.batch_progress")
        for progress in (validation["total"], validation["current"]):
            progress.update(ready=progress["completed"] + 1, started=progress["completed"] + 1)
            progress["processed"] = progress["completed"]
        validation["current"].update(ready=1, started=1, processed=0, completed=0)
        validation["is_last_batch"] = False
    else:
        count_step_of_loggers(checkpoint)


def _metrics(module: LightningModule) -> dict[str, Metric]:
    """Return the module's metrics that have states of their own, by name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, Metric) and state_names(child)}


def _metric_states(module: LightningModule) -> dict[str, Any]:
    """Return the states of those metrics of the module that have been updated."""
    return {
        name: {
            "count": update_count(metric),
            "states": {
                state: [tensor.detach().cpu().clone() for tensor in value]
                if isinstance(value, list)
                else value.detach().cpu().clone()
                for state, value in ((state, getattr(metric, state)) for state in state_names(metric))
            },
        }
        for name, metric in _metrics(module).items()
        # A wrapper does not count its updates.
        if update_count(metric) or any(memory(metric).values())
    }


def _restore_metric_states(module: LightningModule, saved: Mapping[str, Any]) -> None:
    for name, metric in _metrics(module).items():
        if name in saved:
            for state, value in saved[name]["states"].items():
                setattr(metric, state, _move(metric.device, value))
            set_update_count(metric, saved[name]["count"])


def _remembered(module: LightningModule, *, epoch_ends: bool) -> dict[str, dict[str, Any]]:
    """Return what metrics remember beside their states, from one epoch to the next.

    Where the epoch ends, the module computes its metrics after the callbacks; the resumed run does not.
    """
    remembered = {}
    for name, child in module.named_modules():
        if isinstance(child, Metric) and memory(child):
            parts = [part for part in child.modules() if isinstance(part, Metric)]
            if epoch_ends and any(map(update_count, parts)):
                child = child.clone()
                child.compute()
            remembered[name] = {
                key: value.detach().cpu().clone() if isinstance(value, Tensor) else value
                for key, value in memory(child).items()
            }
    return remembered


def _restore_remembered(module: LightningModule, saved: Mapping[str, Mapping[str, Any]]) -> None:
    for name, child in module.named_modules():
        if isinstance(child, Metric) and name in saved:
            values = {key: _move(child.device, value) for key, value in saved[name].items()}
            set_memory(child, {key: value for key, value in values.items() if key in memory(child)})


def _move(device: torch.device, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, Mapping):
        return {key: _move(device, entry) for key, entry in value.items()}
    return [_move(device, entry) for entry in value]
