"""Record the metrics of each epoch and each validation as a table and as curves."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_dice.argument_checks import check_choice
from lightning_dice.callbacks.picture_logging import log_picture
from lightning_dice.callbacks.throughput import EpochThroughput
from lightning_dice.io import number, read_csv, write_csv
from lightning_dice.library_internals.lightning import epoch_progress

Key = tuple[int, int]  # epoch and step of a row
FIRST_COLUMNS = (
    *("epoch", "step", "lr", "seconds", "images_per_second", "memory_gb"),
    *("train/loss", "train/dice", "val/loss", "val/dice"),
)


class History(Callback):
    """Write one row per epoch to `metrics.csv`, and draw `curves.png` when training ends or fails.

    A validation within an epoch has a row of its own, with `epoch`, `step` and `val/` alone; one after the last step of
    an epoch is in the epoch's row. The whole table is rewritten each time, under a temporary name first. Columns:
    `epoch` (from 0), `step` (optimizer steps so far), `lr` (of the first parameter group, at the epoch's first step),
    `seconds` (training and validation of the epoch), `images_per_second` (of all processes, while training),
    `memory_gb` (10⁹ bytes; the peak so far of the process that needs most: of its tensors on the GPU, otherwise of the
    process), then every metric logged under `train/`, `val/` or `loss/`. `val/` is empty in an epoch without validation
    at its end. The loggers receive throughput and memory too. A resumed run continues the table that it finds; epochs
    that are trained again replace their rows.

    Args:
        folder: the run's folder.
        monitor: metric whose best epoch is marked in the picture.
        mode: `"max"` if the best value of `monitor` is the largest, `"min"` if it is the smallest.

    Raises:
        ValueError: another mode.

    >>> History("runs/mine").table.as_posix()
    'runs/mine/metrics.csv'
    """

    def __init__(self, folder: str | Path, monitor: str = "val/dice", mode: Literal["max", "min"] = "max") -> None:
        self.folder, self.monitor = Path(folder), monitor
        self.mode = check_choice("mode", mode, ("max", "min"))
        self._rows: dict[Key, dict[str, str]] = {}
        self._superseded: dict[int, dict[str, str]] = {}  # of epochs that are trained again
        self._incomplete: Key | None = None  # the row that still lacks the values logged at the epoch's end
        self._trained = False
        self._validated: Key | None = None  # the row of the last validation
        self._metrics_before: dict[str, str] = {}
        self._lr = float("nan")
        self._epoch = -1
        self._resumed: dict[str, Any] = {}
        self._started = time.monotonic()
        self._throughput = EpochThroughput()

    @property
    def table(self) -> Path:
        """Path of the table."""
        return self.folder / "metrics.csv"

    @property
    def picture(self) -> Path:
        """Path of the picture of the curves."""
        return self.folder / "curves.png"

    def state_dict(self) -> dict[str, Any]:
        """Return the learning rate at the epoch's first step, which later steps may have changed."""
        return {"epoch": self._epoch, "lr": self._lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the learning rate until the epoch is resumed."""
        self._resumed = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the table of a run that is resumed."""
        self._rows, self._superseded, self._incomplete, self._trained = {}, {}, None, False
        for row in read_csv(self.table) if trainer.is_global_zero else []:
            epoch, step = key = int(row["epoch"]), int(row["step"])
            within = epoch == trainer.current_epoch and step <= trainer.global_step and not _is_of_epoch(row)
            if epoch < trainer.current_epoch or within:
                self._rows[key] = row
            elif _is_of_epoch(row):
                self._superseded[epoch] = row
        progress = epoch_progress(trainer)
        former = [key for key, row in self._rows.items() if key[0] == trainer.current_epoch - 1 and _is_of_epoch(row)]
        if progress.ready == progress.processed and former:
            # The process may have ended before it wrote what the module logged at the end of that epoch.
            self._incomplete = former[-1]
            self._complete_row(trainer)
        self._start_epoch(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the former row, and note the time and the learning rate."""
        self._complete_row(trainer)
        self._start_epoch(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images."""
        self._trained = True
        self._throughput.add(batch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of the throughput."""
        self._throughput.pause(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the validation's metrics, and start the clock again."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            # On every rank, because reading a metric makes Lightning reduce it over the ranks.
            metrics = self._read_metrics(trainer, ("val/",))
            key = trainer.current_epoch, trainer.global_step
            self._rows[key] = {"epoch": str(key[0]), "step": str(key[1])} | metrics
            self._validated = key
            self._write(trainer)
        self._throughput.resume(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the epoch's row."""
        self._throughput.pause(trainer)
        usage = self._throughput.reduce(trainer)
        if self._trained:
            # The same on every rank; sync_dist only avoids Lightning's warning.
            pl_module.log_dict(usage, sync_dist=True)
        # On every rank, because reading a metric makes Lightning reduce it over the ranks.
        epoch, step = key = trainer.current_epoch, trainer.global_step
        metrics = self._read_metrics(trainer, self._kinds(key))
        if not self._trained and epoch in self._superseded:
            # A run resumed from a checkpoint of an epoch's end ends that epoch again, without its metrics.
            self._rows[key] = self._superseded[epoch]
        else:
            metrics = self._without_former_values(metrics)
            seconds = time.monotonic() - self._started
            row = {"epoch": str(epoch), "step": str(step), "lr": number(self._lr)}
            row |= {"seconds": f"{seconds:.2f}"} | {name: number(value) for name, value in usage.items()}
            validation = self._rows.get(key, {})  # the one after the last step
            self._rows[key] = row | validation | metrics
        # Also if the row was read: it may lack what the module logs now.
        self._incomplete = key
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the last row, and draw the curves."""
        self._complete_row(trainer)
        self._draw(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw the curves of the epochs so far."""
        if trainer.state.fn == "fit":
            if trainer.world_size == 1:  # The other ranks may be gone.
                self._complete_row(trainer, logged=False)
            self._draw(trainer)

    def _start_epoch(self, trainer: Trainer) -> None:
        self._started = time.monotonic()
        self._throughput.start()
        self._metrics_before = self._read_metrics(trainer, ("train/",))
        self._epoch, resumed, self._resumed = trainer.current_epoch, self._resumed, {}
        if resumed.get("epoch") == self._epoch:
            self._lr = resumed["lr"]
        elif trainer.optimizers:
            self._lr = float(trainer.optimizers[0].param_groups[0]["lr"])

    def _kinds(self, key: Key | None) -> tuple[str, ...]:
        """Return how the names of the metrics of a row start."""
        # Under loss/ are settings of the loss that change.
        return ("train/", "loss/", "val/") if key is not None and key == self._validated else ("train/", "loss/")

    def _read_metrics(self, trainer: Trainer, kinds: tuple[str, ...]) -> dict[str, str]:
        metrics = {key: value for key, value in trainer.callback_metrics.items() if key.startswith(kinds)}
        # `loss_epoch` and `loss_step` are Lightning's second names of a metric logged both ways.
        aliases = {name + way for name in metrics for way in ("_step", "_epoch")}
        return {key: number(float(value)) for key, value in metrics.items() if key not in aliases}

    def _without_former_values(self, metrics: dict[str, str]) -> dict[str, str]:
        """Remove the metrics that the module has yet to log in its own `on_train_epoch_end`, which runs after ours.

        Until then Lightning keeps their values of the epoch before. Values that happen to be equal to the former ones
        are removed too, and added when the row is completed.
        """
        return {name: value for name, value in metrics.items() if self._metrics_before.get(name) != value}

    def _complete_row(self, trainer: Trainer, *, logged: bool = True) -> None:
        """Add the metrics that the module logged in its own `on_train_epoch_end`, if that has run (`logged`)."""
        key, self._incomplete = self._incomplete, None
        metrics = self._read_metrics(trainer, self._kinds(key))
        if not logged:
            metrics = self._without_former_values(metrics)
        if key is None:
            return
        completed = self._rows[key] | metrics
        if completed != self._rows[key]:
            self._rows[key] = completed
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        rows = [self._rows[key] for key in sorted(self._rows)]
        known = dict.fromkeys(key for row in rows for key in row)
        columns = [key for key in FIRST_COLUMNS if key in known]
        write_csv(self.table, columns + [key for key in known if key not in columns], rows)

    def _time(self, epoch: int, step: int) -> float:
        """Return the time of a row in epochs: that of an epoch's end is its number."""
        ends = {key[0]: key[1] for key, row in self._rows.items() if _is_of_epoch(row)}
        begin = ends.get(epoch - 1, 0)
        end = ends.get(epoch, max(step, 2 * begin - ends.get(epoch - 2, 0)))  # Unfinished: as long as the former one.
        return epoch - 1 + (step - begin) / max(1, end - begin)

    def _draw(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or not self._rows:
            return
        from lightning_dice.plotting.curves import draw_curves

        rows = [
            {name: float(value) for name, value in self._rows[key].items() if value} | {"time": self._time(*key)}
            for key in sorted(self._rows)
        ]
        try:
            draw_curves(self.picture, rows, self.monitor, self.mode)
        except OSError as error:
            # Must not end a run, nor hide the exception that ended it.
            warnings.warn(f"could not draw {self.picture}: {error}", stacklevel=2)
            return
        log_picture(trainer, "curves", self.picture)


def _is_of_epoch(row: dict[str, str]) -> bool:
    """Return whether a row is that of an epoch, not of a validation within one."""
    return "seconds" in row
