"""The numbers of each epoch, as a table and as curves."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_dice.callbacks.loggers import log_picture
from lightning_dice.callbacks.throughput import Throughput
from lightning_dice.io import number, read_csv, write_csv

FIRST_COLUMNS = (
    *("epoch", "step", "lr", "seconds", "images_per_second", "memory_gb"),
    *("train/loss", "train/dice", "val/loss", "val/dice"),
)


class History(Callback):
    """Write one row for each epoch to `metrics.csv`, and draw `curves.png` when training ends or breaks off.

    The table is rewritten whole, under a temporary name, at the end of each epoch. Columns: `epoch` (from 0), `step`
    (optimizer steps so far), `lr` (of the first parameter group, at the epoch's first step), `seconds` (training and
    validation of the epoch), `images_per_second` (of all processes, while training), `memory_gb` (10⁹ bytes, the most
    so far: of tensors on the GPU, or of the process; of the process that needs most), then every metric logged under
    `train/` or `val/`. `val/` is empty in an epoch without validation. The loggers get throughput and memory too. A
    resumed run goes on with the table it finds; epochs that are trained again lose their row.

    Args:
        folder: the run's folder.
        monitor: the metric whose best epoch is marked in the picture.
        mode: whether the best value of `monitor` is the greatest or the least.
    """

    def __init__(self, folder: str | Path, monitor: str = "val/dice", mode: Literal["max", "min"] = "max") -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', got {mode!r}")
        self.folder, self.monitor, self.mode = Path(folder), monitor, mode
        self._rows: dict[int, dict[str, str]] = {}
        self._undone: dict[int, dict[str, str]] = {}
        self._open: int | None = None
        self._trained = self._validated = False
        self._before: dict[str, str] = {}
        self._lr = float("nan")
        self._epoch = -1
        self._resumed: dict[str, Any] = {}
        self._started = time.monotonic()
        self._throughput = Throughput()

    @property
    def table(self) -> Path:
        """Where the table is written."""
        return self.folder / "metrics.csv"

    @property
    def picture(self) -> Path:
        """Where the curves are drawn."""
        return self.folder / "curves.png"

    def state_dict(self) -> dict[str, Any]:
        """The learning rate at the epoch's first step, which may have changed when the epoch goes on."""
        return {"epoch": self._epoch, "lr": self._lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until the epoch goes on."""
        self._resumed = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the table of a run that is resumed."""
        self._rows, self._undone, self._open, self._trained = {}, {}, None, False
        for row in read_csv(self.table) if trainer.is_global_zero else []:
            epoch = int(row["epoch"])
            (self._rows if epoch < trainer.current_epoch else self._undone)[epoch] = row
        progress: Any = trainer.fit_loop.epoch_progress.current
        if progress.ready == progress.processed and trainer.current_epoch - 1 in self._rows:
            # Its process may have ended before the module's own metrics came into the row.
            self._open = trainer.current_epoch - 1
            self._complete(trainer)
        self._begin(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time and the learning rate."""
        self._complete(trainer)
        self._begin(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note that this fit has trained, and on how many images."""
        self._trained = True
        self._throughput.add(batch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of the training."""
        self._throughput.pause(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that this epoch's `val/` metrics are its own."""
        self._validated = self._validated or not trainer.sanity_checking
        self._throughput.go_on()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the epoch's row."""
        self._throughput.pause(trainer)
        used = self._throughput.of_all(trainer)
        if self._trained:
            # The same on every rank; said again so that Lightning need not warn.
            pl_module.log_dict(used, sync_dist=True)
        # On every rank, whatever is done with it: reading a metric is where Lightning reduces it over the ranks.
        metrics = self._metrics(trainer)
        epoch = trainer.current_epoch
        if not self._trained and epoch in self._undone:
            # A checkpoint saved at an epoch's end ends that epoch again, without its metrics.
            self._rows[epoch] = self._undone[epoch]
        else:
            metrics = self._of_this_epoch(metrics)
            seconds = time.monotonic() - self._started
            row = {"epoch": str(epoch), "step": str(trainer.global_step), "lr": number(self._lr)}
            row |= {"seconds": f"{seconds:.2f}"} | {name: number(value) for name, value in used.items()}
            self._rows[epoch] = row | metrics
        # Ended again or not: what the module logs now may not be in the row that was read.
        self._open = epoch
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the curves."""
        self._complete(trainer)
        self._draw(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw the curves as far as they go."""
        if trainer.state.fn == "fit":
            if trainer.world_size == 1:  # The other ranks may be gone.
                self._complete(trainer, logged=False)
            self._draw(trainer)

    def _begin(self, trainer: Trainer) -> None:
        self._started, self._validated = time.monotonic(), False
        self._throughput.start()
        self._before = self._metrics(trainer)
        self._epoch, resumed, self._resumed = trainer.current_epoch, self._resumed, {}
        if resumed.get("epoch") == self._epoch:
            self._lr = resumed["lr"]
        elif trainer.optimizers:
            self._lr = float(trainer.optimizers[0].param_groups[0]["lr"])

    def _metrics(self, trainer: Trainer) -> dict[str, str]:
        # What begins with loss/ is a setting of the loss that changes.
        splits = ("train/", "loss/", "val/") if self._validated else ("train/", "loss/")
        metrics = {key: value for key, value in trainer.callback_metrics.items() if key.startswith(splits)}
        # `loss_epoch` and `loss_step` are Lightning's second names of a metric logged both ways.
        aliases = {name + way for name in metrics for way in ("_step", "_epoch")}
        return {key: number(float(value)) for key, value in metrics.items() if key not in aliases}

    def _of_this_epoch(self, metrics: dict[str, str]) -> dict[str, str]:
        """Without what the module has yet to log in its own `on_train_epoch_end`, which runs after ours.

        Lightning keeps the value of the epoch before until then. One that has not changed is left out too: it comes
        when the row is completed.
        """
        before = {name: value for name, value in self._before.items() if name.startswith("train/")}
        return {name: value for name, value in metrics.items() if before.get(name) != value}

    def _complete(self, trainer: Trainer, *, logged: bool = True) -> None:
        """Fetch what the module logged in its own `on_train_epoch_end`, if it came to that."""
        metrics = self._metrics(trainer)
        if not logged:
            metrics = self._of_this_epoch(metrics)
        epoch, self._open = self._open, None
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
            # A picture is not worth a run, nor may it hide the exception that ended one.
            warnings.warn(f"could not draw {self.picture}: {error}", stacklevel=2)
            return
        log_picture(trainer, "curves", self.picture)
