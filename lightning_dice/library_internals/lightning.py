"""Internals of Lightning, read in lightning 2.6.6: loops, logged values and the state that checkpoints keep of them."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from lightning_dice.library_internals import MissingInternalError, internal, set_internal

_LIBRARY = "lightning"


def attached_trainer(module: LightningModule) -> Trainer | None:
    """Return the Trainer that a module is attached to (`_trainer`), if any: `module.trainer` raises where none is."""
    trainer: Trainer | None = internal(module, "_trainer", _LIBRARY)
    return trainer


def is_accumulating(trainer: Trainer) -> bool:
    """Return whether no optimizer step follows the present batch (`fit_loop.epoch_loop._should_accumulate`)."""
    return bool(internal(trainer, "fit_loop.epoch_loop._should_accumulate", _LIBRARY)())


def epoch_progress(trainer: Trainer) -> Any:
    """Return the numbers of epochs that this fit has made `ready`, `started`, `processed` and `completed`."""
    return internal(trainer, "fit_loop.epoch_progress.current", _LIBRARY)


def batch_progress(trainer: Trainer) -> Any:
    """Return the numbers of batches of this epoch that are `ready`, `started`, `processed` and `completed`."""
    return internal(trainer, "fit_loop.epoch_loop.batch_progress.current", _LIBRARY)


def is_last_batch(trainer: Trainer) -> bool:
    """Return whether the present training batch is the last one of its epoch (`batch_progress.is_last_batch`)."""
    return bool(internal(trainer, "fit_loop.epoch_loop.batch_progress.is_last_batch", _LIBRARY))


def set_batches_done(trainer: Trainer, done: int) -> None:
    """Correct the number of batches done in the resumed epoch, for another batch size (`batch_progress.current`)."""
    progress = batch_progress(trainer)
    pending = progress.ready - progress.completed  # A callback may have saved the checkpoint within a batch.
    progress.ready = progress.started = progress.processed = done
    progress.completed = done - pending


def load_training_data(trainer: Trainer) -> None:
    """Make the training data loader, if that has not been done (`fit_loop.setup_data`).

    `trainer.estimated_stepping_batches` does it too, unless the number of epochs is unlimited.
    """
    if trainer.train_dataloader is None:
        internal(trainer, "fit_loop.setup_data", _LIBRARY)()


def validation_is_due(trainer: Trainer) -> bool:
    """Return whether a validation follows the present batch (`fit_loop.epoch_loop._should_check_val_fx`)."""
    fetcher = internal(trainer, "fit_loop._data_fetcher", _LIBRARY)
    check = internal(trainer, "fit_loop.epoch_loop._should_check_val_fx", _LIBRARY)
    return bool(trainer.enable_validation and check(fetcher))


def is_fetching(trainer: Trainer) -> bool:
    """Return whether the loop over training batches is running (`fit_loop._data_fetcher` exists)."""
    return internal(trainer, "fit_loop._data_fetcher", _LIBRARY) is not None


def mark_as_fresh(trainer: Trainer) -> None:
    """Let the fit loop and the loops below it treat the next epoch as one that was not resumed (`_Loop.restarting`).

    With `max_steps`, the fit loop's own setter keeps the mark whatever it is given.
    """
    restarting = internal("lightning.pytorch.loops.loop", "_Loop.restarting", _LIBRARY)
    restarting.fset(trainer.fit_loop, False)


def mark_epoch_as_fresh(trainer: Trainer) -> None:
    """Let the fit loop alone treat this epoch as one that was not resumed (`fit_loop._restarting`)."""
    set_internal(trainer, "fit_loop._restarting", False, _LIBRARY)


def callback_metrics(trainer: Trainer) -> dict[str, Tensor]:
    """Return the dict in which Lightning keeps `trainer.callback_metrics`, to be read without reducing, or changed."""
    metrics: dict[str, Tensor] = internal(trainer, "_logger_connector._callback_metrics", _LIBRARY)
    return metrics


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """Return what `trainer.save_checkpoint` writes, without its barrier (`_checkpoint_connector.dump_checkpoint`)."""
    dump = internal(trainer, "_checkpoint_connector.dump_checkpoint", _LIBRARY)
    checkpoint: dict[str, Any] = dump(weights_only=False)
    return checkpoint


def read_optimizers(configured: Any) -> tuple[list[Any], list[Any]]:
    """Return optimizers and schedulers from any form that `configure_optimizers` may return (`_configure_optimizers`).

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    >>> read_optimizers({"optimizer": optimizer}) == ([optimizer], [])
    True
    """
    read = internal("lightning.pytorch.core.optimizer", "_configure_optimizers", _LIBRARY)
    optimizers, schedulers, _ = read(configured)
    return optimizers, schedulers


class AccessibleWeightAveraging(WeightAveraging):
    """Lightning's `WeightAveraging`, whose averaged model and its swaps with the module's weights can be seen.

    Attributes:
        swapped: whether the module holds the averaged weights at the moment, and the average the trained ones.
    """

    swapped = False

    @property
    def average_model(self) -> Any:
        """The `torch.optim.swa_utils.AveragedModel`, or None outside a fit (`_average_model`)."""
        return internal(self, "_average_model", _LIBRARY)

    def drop_average_model(self) -> None:
        """Forget the average, after which the callback does nothing (`_average_model`)."""
        set_internal(self, "_average_model", None, _LIBRARY)

    def set_default_device(self, device: torch.device) -> None:
        """Set the device of the average, unless the constructor was given one (`_device`)."""
        if internal(self, "_device", _LIBRARY) is None:
            set_internal(self, "_device", device, _LIBRARY)

    def _swap_models(self, pl_module: LightningModule) -> None:
        internal(super(), "_swap_models", _LIBRARY)(pl_module)
        self.swapped = not self.swapped


def saved_loop_state(checkpoint: dict[str, Any], name: str) -> Any:
    """Return part of the state of the fit loop that a checkpoint holds, such as `"epoch_progress"`, to be changed.

    Raises:
        MissingInternalError: there is no such part.

    >>> saved_loop_state({"loops": {"fit_loop": {"epoch_progress": {}}}}, "epoch_progress")
    {}
    """
    try:
        return checkpoint["loops"]["fit_loop"][name]
    except KeyError as error:
        raise MissingInternalError(f"checkpoint['loops']['fit_loop'][{name!r}]", _LIBRARY) from error


def count_step_of_loggers(checkpoint: dict[str, Any]) -> None:
    """Add 1 to the steps at which a checkpoint's training has logged (`_batches_that_stepped`)."""
    state = saved_loop_state(checkpoint, "epoch_loop.state_dict")
    if "_batches_that_stepped" not in state:
        raise MissingInternalError("checkpoint: epoch_loop.state_dict['_batches_that_stepped']", _LIBRARY)
    state["_batches_that_stepped"] += 1


def epoch_means(trainer: Trainer) -> list[dict[str, Any]]:
    """Return what `self.log(..., on_epoch=True)` has accumulated in this epoch (`fit_loop.epoch_loop._results`).

    A logged `torchmetrics.Metric` is described by the attribute of the module that holds it.
    """
    rows = []
    for metric in internal(trainer, "fit_loop.epoch_loop._results", _LIBRARY).values():
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
            row["metric"] = meta.metric_attribute
            continue
        row |= {
            "reduce": next(way for way in ("mean", "sum", "max", "min") if getattr(meta, f"is_{way}_reduction")),
            "value": metric.value.detach().cpu().clone(),
        }
        if meta.is_mean_reduction:
            row["count"] = torch.as_tensor(metric.cumulated_batch_size).cpu().clone()
    return rows


def restore_epoch_means(trainer: Trainer, module: LightningModule, rows: list[dict[str, Any]]) -> None:
    """Continue the means of an epoch from what `epoch_means` returned when its checkpoint was written."""
    results = internal(trainer, "fit_loop.epoch_loop._results", _LIBRARY)
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
    # In the first batch of a loop `self.log` resets the sums; the first batch of this epoch has passed.
    set_internal(trainer, "_logger_connector._first_loop_iter", False, _LIBRARY)
