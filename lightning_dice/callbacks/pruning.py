"""End the hopeless trials of a sweep."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_dice.argument_checks import check_choice, check_count
from lightning_dice.io import number, read_csv
from lightning_dice.trials import read_trial, read_trials


class MedianPruner(Callback):
    """End a trial whose best score so far is worse than the median of the finished trials' scores at the same epoch.

    This is Optuna's `MedianPruner`, for any sweeper and any launcher: the scores of the other trials are read from the
    `metrics.csv` in their folders. Pruned and failed trials are not considered, nor are epochs without validation. A
    trial whose scores have all been NaN is pruned too. A pruned training ends normally, and its best score becomes the
    trial's value. In a run that is not a trial of a sweep, the callback does nothing. Rank 0 decides for all ranks.

    Args:
        folder: the run's folder, beside the other trials' folders.
        monitor: metric to compare.
        mode: `"max"` if its best value is the largest, `"min"` if it is the smallest.
        startup_trials: number of finished trials before any trial is pruned.
        warmup_epochs: number of epochs before a trial may be pruned.

    Raises:
        ValueError: an argument is out of its range.

    >>> MedianPruner("sweeps/mine/3").reason(epoch=5, best=0.2) is None  # not a trial of a sweep
    True
    """

    def __init__(
        self,
        folder: str | Path,
        monitor: str = "val/dice",
        mode: Literal["max", "min"] = "max",
        startup_trials: int = 5,
        warmup_epochs: int = 0,
    ) -> None:
        self.folder, self.monitor = Path(folder), monitor
        self.mode = check_choice("mode", mode, ("max", "min"))
        self.startup_trials = check_count("startup_trials", startup_trials, 0)
        self.warmup_epochs = check_count("warmup_epochs", warmup_epochs, 0)
        self.pruned = False
        self._best = math.nan
        self._validated = False

    def state_dict(self) -> dict[str, Any]:
        """Return the best score, whether the trial is pruned, and the settings that decided it."""
        return {"best": self._best, "pruned": self.pruned, "decided_by": self._settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score, and whether the trial is pruned, unless other settings have decided it."""
        former, own = state_dict.get("decided_by") or self._settings(), self._settings()
        if former[:2] == own[:2]:  # Otherwise scores of another metric, or the worst one.
            self._best = float(state_dict["best"])
        self.pruned = bool(state_dict["pruned"]) and former == own

    def _settings(self) -> list[Any]:
        return [self.monitor, self.mode, self.startup_trials, self.warmup_epochs]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a trial at once if it was interrupted after it had been pruned."""
        trainer.should_stop = trainer.should_stop or self.pruned

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that this epoch has a validation, and its score: there may be several."""
        if not trainer.sanity_checking:
            self._validated = True
            self._note_score(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the best score with the other trials, and stop if it is worse."""
        validated, self._validated = self._validated, False
        if not validated:
            return
        if not self._note_score(trainer):
            known = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise ValueError(f"monitor must be a logged metric, got {self.monitor!r}; logged are {known}")
        reason = self.reason(trainer.current_epoch, self._best) if trainer.is_global_zero else None
        reason = trainer.strategy.broadcast(reason)
        if reason is not None:
            self.pruned = trainer.should_stop = True
            if trainer.is_global_zero:
                print(f"pruned: {reason}", flush=True)

    def _note_score(self, trainer: Trainer) -> bool:
        """Take the last score into account, if there is one."""
        # On every rank, because reading a metric makes Lightning reduce it over the ranks.
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            return False
        # Rounded as in the tables, so that a trial is not worse than an equal one.
        self._best = self._better(self._best, float(number(float(metrics[self.monitor])) or math.nan))
        return True

    def reason(self, epoch: int, best: float) -> str | None:
        """Return why a trial should be pruned, or None if it should continue.

        Args:
            epoch: last epoch of the trial, counted from 0.
            best: best score of the trial so far.
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
        """Return another trial's score at an epoch; None if it did not validate then, or scored NaN."""
        # The last one: validations within the epoch have rows before.
        for row in reversed(read_csv(folder / "metrics.csv")):
            if row["epoch"] == str(epoch) and self.monitor in row:
                score = float(row[self.monitor])
                return None if math.isnan(score) else score
        return None

    def _better(self, one: float, other: float) -> float:
        known = [score for score in (one, other) if not math.isnan(score)]
        return (max if self.mode == "max" else min)(known, default=math.nan)
