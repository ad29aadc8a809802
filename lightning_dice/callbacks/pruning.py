"""End the trials of a sweep that have no hope."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_dice.io import number, read_csv
from lightning_dice.trials import read_trial, read_trials


class MedianPruner(Callback):
    """End a trial whose best score so far is worse than the median of the finished trials' scores at the same epoch.

    This is Optuna's `MedianPruner`, for any sweeper and any launcher: the scores of the other trials are read from the
    `metrics.csv` in their folders. Pruned and failed trials do not count, nor epochs without validation. A trial whose
    scores have all been NaN is pruned too. The training ends as if it were done; what it has reached is its value. In a
    run that is no trial of a sweep nothing happens. Rank 0 decides for all.

    Args:
        folder: the run's folder; those of the other trials lie beside it.
        monitor: the metric that is compared.
        mode: whether its best value is the greatest or the least.
        startup_trials: finished trials before any is pruned.
        warmup_epochs: epochs that every trial is given.

    Raises:
        ValueError: a setting that does not fit.
    """

    def __init__(
        self,
        folder: str | Path,
        monitor: str = "val/dice",
        mode: Literal["max", "min"] = "max",
        startup_trials: int = 5,
        warmup_epochs: int = 0,
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', got {mode!r}")
        for name, count in (("startup_trials", startup_trials), ("warmup_epochs", warmup_epochs)):
            if not isinstance(count, int) or count < 0:
                raise ValueError(f"{name} must be a whole number >= 0, got {count!r}")
        self.folder, self.monitor, self.mode = Path(folder), monitor, mode
        self.startup_trials, self.warmup_epochs = startup_trials, warmup_epochs
        self.pruned = False
        self._best = math.nan
        self._validated = False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed trial must know."""
        return {"best": self._best, "pruned": self.pruned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up."""
        self._best, self.pruned = float(state_dict["best"]), bool(state_dict["pruned"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a trial at once that was broken off after it had been pruned."""
        trainer.should_stop = trainer.should_stop or self.pruned

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that this epoch has scores."""
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare, and stop."""
        validated, self._validated = self._validated, False
        if not validated:
            return
        # On every rank: reading a metric is where Lightning reduces it over the ranks.
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            known = ", ".join(sorted(metrics)) or "nothing"
            raise ValueError(f"monitor must be a logged metric, got {self.monitor!r}; there is {known}")
        # Of as many digits as the tables have: a trial must not be worse than its twin.
        self._best = self._better(self._best, float(number(float(metrics[self.monitor])) or math.nan))
        reason = self.reason(trainer.current_epoch, self._best) if trainer.is_global_zero else None
        reason = trainer.strategy.broadcast(reason)
        if reason is not None:
            self.pruned = trainer.should_stop = True
            if trainer.is_global_zero:
                print(f"pruned: {reason}", flush=True)

    def reason(self, epoch: int, best: float) -> str | None:
        """Why a trial should be pruned.

        Args:
            epoch: the last one, from 0.
            best: its best score so far.

        Returns:
            `None` if it should go on.
        """
        if epoch < self.warmup_epochs or read_trial(self.folder) is None:
            return None
        sweep = self.folder.parent
        finished = [trial for trial in read_trials(sweep) if trial.status == "finished"]
        if not finished or len(finished) < self.startup_trials:
            return None
        if math.isnan(best):
            return f"{self.monitor} has been NaN in all {epoch + 1} epochs"
        scores = [score for trial in finished if (score := self._score(sweep / str(trial.number), epoch)) is not None]
        if not scores:
            return None
        middle = median(scores)
        if not (best < middle if self.mode == "max" else best > middle):
            return None
        worse = "less" if self.mode == "max" else "more"
        return (
            f"the best {self.monitor} up to epoch {epoch}, {best:.4f}, is {worse} than the median of {len(scores)} "
            f"finished trials there, {middle:.4f}"
        )

    def _score(self, folder: Path, epoch: int) -> float | None:
        """What another trial had at this epoch; `None` if it did not validate there, or had NaN."""
        for row in read_csv(folder / "metrics.csv"):
            if row["epoch"] == str(epoch) and self.monitor in row:
                score = float(row[self.monitor])
                return None if math.isnan(score) else score
        return None

    def _better(self, one: float, other: float) -> float:
        known = [score for score in (one, other) if not math.isnan(score)]
        return (max if self.mode == "max" else min)(known, default=math.nan)
