"""Record the metrics of each epoch as a table and as curves."""

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

FIRST_COLUMNS = (
    *("epoch", "step", "lr", "seconds", "images_per_second", "memory_gb"),
    *("train/loss", "train/dice", "val/loss", "val/dice"),
)


class History(Callback):
    """Write one row per epoch to `metrics.csv`, and draw `curves.png` when training ends or fails.

    The whole table is rewritten at the end of each epoch, under a temporary name first. Columns: `epoch` (from 0),
    `step` (optimizer steps so far), `lr` (of the first parameter group, at the epoch's first step), `seconds` (training
    and validation of the epoch), `images_per_second` (of all processes, while training), `memory_gb` (10⁹ bytes; the
    peak so far of the process that needs most: of its tensors on the GPU, otherwise of the process), then every metric
    logged under `train/`, `val/` or `loss/`. `val/` is empty in an epoch without validation. The loggers receive
    throughput and memory too. A resumed run continues the table that it finds; epochs that are trained again replace
    their rows.

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
        self._rows: dict[int, dict[str, str]] = {}
        self._superseded: dict[int, dict[str, str]] = {}  # of epochs that are trained again
        self._incomplete: int | None = None  # the epoch whose row lacks what the module logs at the epoch's end
        self._trained = self._validated = False
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
            epoch = int(row["epoch"])
            (self._rows if epoch < trainer.current_epoch else self._superseded)[epoch] = row
        progress = epoch_progress(trainer)
        if progress.ready == progress.processed and trainer.current_epoch - 1 in self._rows:
            # The process may have ended before it wrote what the module logged at the end of that epoch.
            self._incomplete = trainer.current_epoch - 1
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
        """Note that this epoch has `val/` metrics, and start the clock again."""
        self._validated = self._validated or not trainer.sanity_checking
        self._throughput.resume()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the epoch's row."""
        self._throughput.pause(trainer)
        usage = self._throughput.reduce(trainer)
        if self._trained:
            # The same on every rank; sync_dist only avoids Lightning's warning.
            pl_module.log_dict(usage, sync_dist=True)
        # On every rank, because reading a metric makes Lightning reduce it over the ranks.
        metrics = self._read_metrics(trainer)
        epoch = trainer.current_epoch
        if not self._trained and epoch in self._superseded:
            # A run resumed from a checkpoint of an epoch's end ends that epoch again, without its metrics.
            self._rows[epoch] = self._superseded[epoch]
        else:
            metrics = self._without_former_values(metrics)
            seconds = time.monotonic() - self._started
            row = {"epoch": str(epoch), "step": str(trainer.global_step), "lr": number(self._lr)}
            row |= {"seconds": f"{seconds:.2f}"} | {name: number(value) for name, value in usage.items()}
            self._rows[epoch] = row | metrics
        # Also if the row was read: it may lack what the module logs now.
        self._incomplete = epoch
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
        self._started, self._validated = time.monotonic(), False
        self._throughput.start()
        self._metrics_before = self._read_metrics(trainer)
        self._epoch, resumed, self._resumed = trainer.current_epoch, self._resumed, {}
        if resumed.get("epoch") == self._epoch:
            self._lr = resumed["lr"]
        elif trainer.optimizers:
            self._lr = float(trainer.optimizers[0].param_groups[0]["lr"])

    def _read_metrics(self, trainer: Trainer) -> dict[str, str]:
        # Under loss/ are settings of the loss that change.
        splits = ("train/", "loss/", "val/") if self._validated else ("train/", "loss/")
        metrics = {key: value for key, value in trainer.callback_metrics.items() if key.startswith(splits)}
        # `loss_epoch` and `loss_step` are Lightning's second names of a metric logged both ways.
        aliases = {name + way for name in metrics for way in ("_step", "_epoch")}
        return {key: number(float(value)) for key, value in metrics.items() if key not in aliases}

    def _without_former_values(self, metrics: dict[str, str]) -> dict[str, str]:
        """Remove the metrics that the module has yet to log in its own `on_train_epoch_end`, which runs after ours.

        Until then Lightning keeps their values of the epoch before. Values that happen to be equal to the former ones
        are removed too, and added when the row is completed.
        """
        before = {name: value for name, value in self._metrics_before.items() if name.startswith("train/")}
        return {name: value for name, value in metrics.items() if before.get(name) != value}

    def _complete_row(self, trainer: Trainer, *, logged: bool = True) -> None:
        """Add the metrics that the module logged in its own `on_train_epoch_end`, if that has run (`logged`)."""
        metrics = self._read_metrics(trainer)
        if not logged:
            metrics = self._without_former_values(metrics)
        epoch, self._incomplete = self._incomplete, None
        if epoch is None:
            return
        completed = self._rows[epoch] | metrics
        if completed != self._rows[epoch]:
            self._rows[epoch] = completed
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        rows = [self._rows[epoch] for epoch in sorted(self._rows)]
        known = dict.fromkeys(key for row in rows for key in row)
        columns = [key for key in FIRST_COLUMNS if key in known]
        write_csv(self.table, columns + [key for key in known if key not in columns], rows)

    def _draw(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or not self._rows:
            return
        from lightning_dice.plotting.curves import draw_curves

        rows = [
            {key: float(value) for key, value in self._rows[epoch].items() if value} for epoch in sorted(self._rows)
        ]
        try:
            draw_curves(self.picture, rows, self.monitor, self.mode)
        except OSError as error:
            # Must not end a run, nor hide the exception that ended it.
            warnings.warn(f"could not draw {self.picture}: {error}", stacklevel=2)
            return
        log_picture(trainer, "curves", self.picture)
