"""Keep the checkpoint of the best validation."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any, Literal
from weakref import proxy

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_dice.argument_checks import check_choice
from lightning_dice.io import write_atomically
from lightning_dice.library_internals.lightning import callback_metrics

BEST = "best.ckpt"
# Arguments of `ModelCheckpoint` that this class has no use for -> what does it instead.
_VALIDATE = "it is written after a validation: choose when to validate by trainer.check_val_every_n_epoch or "
_VALIDATE += "trainer.val_check_interval"
_REFUSED = {
    "every_n_train_steps": f"{_VALIDATE}; callbacks=frequent_checkpoint writes last.ckpt between validations",
    "train_time_interval": f"{_VALIDATE}; callbacks=frequent_checkpoint writes last.ckpt between validations",
    "every_n_epochs": _VALIDATE,
    "save_on_train_epoch_end": _VALIDATE,
    "save_last": "callbacks.last_checkpoint writes last.ckpt",
    "save_on_exception": "callbacks.interrupt writes last.ckpt when a training fails",
    "enable_version_counter": "best.ckpt is replaced, and never written beside an older one",
}


class BestCheckpoint(ModelCheckpoint):
    """Keep `best.ckpt`, the checkpoint of the best validation there has been, whenever and how often you validate.

    Lightning's `ModelCheckpoint` with a fixed file name keeps the last one that entered the `save_top_k` best, and at
    the end of an epoch it takes the score of a validation within the epoch for that of the present weights. This one
    writes right after each validation whose score is among the best, or at the end of a training epoch if `monitor` is
    logged there. Of equal scores the first is the best, and NaN is worse than any number.

    Args:
        dirpath: folder of the checkpoints.
        monitor: the metric that decides.
        mode: `"max"` if its largest value is the best, `"min"` if it is the smallest.
        save_top_k: how many checkpoints to keep. 1: only `best.ckpt`. With more, or -1 for all, each has a file of its
            own, and `best.ckpt` is one more name of the best. 0: none, and there is no `best.ckpt`.
        filename: name of the other files without `.ckpt`, as in `ModelCheckpoint`: `"{epoch}-{val/dice:.3f}"`. A name
            without braces is completed by epoch and step.
        save_weights_only: leave out optimizer and schedule; such a checkpoint cannot be resumed.
        auto_insert_metric_name: whether `{epoch}` in `filename` becomes `epoch=3`, and not `3`.
        others: the remaining arguments of `ModelCheckpoint` are refused.

    Raises:
        ValueError: an argument is out of its range, or one that is refused; while training, `monitor` is not logged.

    >>> BestCheckpoint("runs/mine/checkpoints").best_path.name
    'best.ckpt'
    """

    def __init__(
        self,
        dirpath: str | Path,
        monitor: str = "val/dice",
        mode: Literal["max", "min"] = "max",
        save_top_k: int = 1,
        filename: str = "best",
        *,
        save_weights_only: bool = False,
        auto_insert_metric_name: bool = True,
        **others: Any,
    ) -> None:
        for name in others:
            if name not in _REFUSED:
                raise ValueError(f"there is no setting {name}")
            raise ValueError(f"{name} is no setting of best.ckpt: {_REFUSED[name]}")
        if isinstance(save_top_k, bool) or not isinstance(save_top_k, int) or save_top_k < -1:
            raise ValueError(f"save_top_k must be a number of checkpoints, or -1 for all, got {save_top_k!r}")
        if not isinstance(monitor, str) or not monitor:
            raise ValueError(f"monitor must be the name of a metric, got {monitor!r}")
        super().__init__(
            dirpath,
            filename,
            monitor=monitor,
            mode=check_choice("mode", mode, ("max", "min")),
            save_top_k=save_top_k,
            save_weights_only=save_weights_only,
            auto_insert_metric_name=auto_insert_metric_name,
        )
        self._seen: Tensor | None = None  # the last value of `monitor` that was considered
        self._validated = False

    @property
    def best_path(self) -> Path:
        """Path of `best.ckpt`."""
        return Path(self._best)

    @property
    def _best(self) -> str:
        return os.path.join(str(self.dirpath), BEST)  # It may be a URL, which `Path` would change.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the score that a checkpoint may have brought: it is not of a new validation."""
        self._seen, self._validated = self._logged(trainer), False

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Do nothing: between validations there is no new score."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the checkpoint, if the validation was among the best."""
        self._validated = self._validated or not trainer.sanity_checking
        self._consider(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the checkpoint, if `monitor` is a metric of the training, such as `train/loss`.

        Raises:
            ValueError: there was a validation, and `monitor` was not logged.
        """
        self._consider(trainer)
        if self._validated and self._logged(trainer) is None:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise ValueError(f"monitor must be a logged metric, got {self.monitor!r}; logged are {known}")

    def _logged(self, trainer: Trainer) -> Tensor | None:
        return callback_metrics(trainer).get(str(self.monitor))

    def _consider(self, trainer: Trainer) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or getattr(trainer, "fast_dev_run", False):
            return
        metrics = dict(trainer.callback_metrics)  # Read by all ranks, as Lightning then reduces over them.
        logged = self._logged(trainer)
        if logged is None or logged is self._seen:
            return  # Lightning keeps old values; one that is logged is a new object.
        self._seen = logged
        # The ranks must agree, and may have logged values of their own.
        score = torch.tensor(float(trainer.strategy.broadcast(float(logged))))
        self.current_score = score
        is_best = self.best_model_score is None or self._better(score, self.best_model_score)
        if is_best:
            self.best_model_score = score
        path = self._path_of(metrics, trainer)
        if path in self.best_k_models:
            enters = self._better(score, self.best_k_models[path])
        elif self.save_top_k == -1 or len(self.best_k_models) < self.save_top_k:
            enters = True
        else:
            enters = self.save_top_k > 0 and self._better(
                score, self.best_k_models[self._ordered()[self.save_top_k - 1]]
            )
        if enters:
            self._save(trainer, path, score, is_best=is_best)

    def _better(self, one: Tensor, other: Tensor) -> bool:
        return _rank(one, self.mode) < _rank(other, self.mode)

    def _ordered(self) -> list[str]:
        """Return the paths of the kept checkpoints, the best first."""
        return sorted(self.best_k_models, key=lambda path: _rank(self.best_k_models[path], self.mode))

    def _path_of(self, metrics: dict[str, Tensor], trainer: Trainer) -> str:
        name = str(self.filename)
        if "{" not in name and self.save_top_k != 1:
            name += "-{epoch}-{step}"
        values = {"epoch": torch.tensor(trainer.current_epoch), "step": torch.tensor(trainer.global_step)}
        return self.format_checkpoint_name({**metrics, **values}, name)

    def _save(self, trainer: Trainer, path: str, score: Tensor, *, is_best: bool) -> None:
        best = self._best
        if is_best:
            self.best_k_models.pop(best, None)  # Its file is replaced.
            self.best_model_path = best
        self.best_k_models[path] = score
        dropped = [] if self.save_top_k == -1 else self._ordered()[self.save_top_k :]
        for name in dropped:
            del self.best_k_models[name]
        self.kth_best_model_path = self._ordered()[-1]
        self.kth_value = self.best_k_models[self.kth_best_model_path]
        # After the attributes, which the checkpoint holds.
        trainer.save_checkpoint(path, self.save_weights_only)
        if is_best and path != best:
            if "://" in best:
                trainer.save_checkpoint(best, self.save_weights_only)
            elif trainer.is_global_zero:
                write_atomically(self.best_path, lambda part: _link(Path(path), part))
            trainer.strategy.barrier()
        resumed = None if trainer.ckpt_path is None else Path(trainer.ckpt_path).resolve()
        for name in dropped:
            if name != best and Path(name).resolve() != resumed:
                trainer.strategy.remove_checkpoint(name)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))


def _rank(score: Tensor, mode: str) -> float:
    """Return a number that is the smaller the better the score."""
    value = float(score)
    return math.inf if math.isnan(value) else -value if mode == "max" else value


def _link(path: Path, link: Path) -> None:
    """Give a checkpoint a second name."""
    if path.is_dir():  # Of a strategy that shards the weights.
        link.symlink_to(os.path.relpath(path, link.parent), target_is_directory=True)
        return
    try:
        os.link(path, link)
    except OSError:  # A file system without links.
        shutil.copyfile(path, link)
