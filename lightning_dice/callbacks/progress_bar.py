"""Progress: a bar in a terminal, a line per epoch in a log file."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import (
    BatchesProcessedColumn,
    CustomBarColumn,
    CustomTimeColumn,
    RichProgressBarTheme,
)
from rich import get_console
from rich.progress import ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from lightning_dice.callbacks.throughput import EpochThroughput, peak_memory

# From this many columns on, the bar shows elapsed time and full units too.
_WIDE = 120
# Lengths beside the bar, in a wide terminal and in a narrow one.
_TIME = {True: len("0:00:00 • 0:00:00"), False: len("00:00")}
_USAGE = {True: len("1234 images/s  12.3 GB"), False: len("1234/s 12.3G")}
_METRICS, _SPACES = len("loss: 0.693 dice: 0.500 val/dice: 0.307"), 6


class _UsageColumn(ProgressColumn):
    """Throughput and memory of the training, when the bar was last updated."""

    text = ""
    task_id: int | None = None

    def render(self, task: Task) -> Text:
        return Text(self.text if task.id == self.task_id else "", style="dim")


class ProgressBar(RichProgressBar):
    """Lightning's rich progress bar on one line of an 80-column terminal; without a terminal, a text line per epoch.

    Both show the images per second of the epoch so far, of this process times the number of processes, and the peak
    memory in GB (10⁹ bytes), of the GPU or of the process. In a narrow terminal these are short, as in `85/s 1.2G`, and
    the bar becomes shorter or disappears.

    Metrics are read a few times per second, not at each step, because reading one waits for the GPU.

    Args:
        refresh_rate: updates per second.
        interval: seconds between lines within an epoch, if there is no terminal.

    >>> ProgressBar(refresh_rate=2).refresh_rate
    2
    """

    def __init__(self, refresh_rate: int = 10, interval: float = 300.0) -> None:
        theme = RichProgressBarTheme(
            progress_bar="#56B4E9", progress_bar_finished="#56B4E9", progress_bar_pulse="#56B4E9", metrics=""
        )
        super().__init__(refresh_rate=refresh_rate, theme=theme)
        self.interval = interval
        self._in_terminal, self._validated = True, False
        self._updated = self._epoch_start = self._printed = 0.0
        self._throughput = EpochThroughput()
        self._usage: _UsageColumn | None = None

    @property
    def is_enabled(self) -> bool:
        """Whether the bar is drawn."""
        return self._in_terminal and super().is_enabled

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out whether there is a terminal or a notebook."""
        super().setup(trainer, pl_module, stage)
        console = get_console()
        self._in_terminal = console.is_terminal or console.is_jupyter

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Return columns that leave room for the metrics."""
        width = get_console().width
        wide = width >= _WIDE
        last = str(max(0, (trainer.max_epochs or 1) - 1))
        # Unknown before training, and for a stream.
        batches = str(trainer.num_training_batches).replace("inf", "1000")
        counts = f"Epoch {last}/{last} {batches}/{batches}"
        room = width - (len(counts) + _TIME[wide] + _USAGE[wide] + _METRICS + _SPACES)
        bar = CustomBarColumn(
            bar_width=min(max(room, 8), 30) if wide else min(room, 8),
            complete_style=self.theme.progress_bar,
            finished_style=self.theme.progress_bar_finished,
            pulse_style=self.theme.progress_bar_pulse,
        )
        self._usage = _UsageColumn()
        return [
            TextColumn("{task.description}"),
            *([bar] if wide or room >= 3 else []),  # A shorter bar shows nothing.
            BatchesProcessedColumn(style=self.theme.batch_progress),
            CustomTimeColumn(style=self.theme.time) if wide else TimeRemainingColumn(compact=True),
            self._usage,
        ]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics that the module logs for the bar, without the logger's version."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks: an epoch that is resumed in its middle has no `on_train_epoch_start`."""
        super().on_train_start(trainer, pl_module)
        self._start_clocks()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        super().on_train_epoch_start(trainer, pl_module)
        self._validated = False
        self._start_clocks()

    def _start_clocks(self) -> None:
        self._epoch_start = self._printed = time.monotonic()
        self._throughput.start()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of the throughput."""
        super().on_validation_start(trainer, pl_module)
        self._throughput.pause(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the throughput again."""
        super().on_validation_end(trainer, pl_module)
        self._validated = self._validated or not trainer.sanity_checking
        self._throughput.resume(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the bar, if an update is due."""
        now = time.monotonic()
        self._throughput.add(batch)
        if self.is_enabled:
            if now - self._updated >= 1 / self.refresh_rate or batch_idx + 1 >= self.total_train_batches:
                self._updated = now
                if self._usage is not None:
                    self._usage.task_id = self.train_progress_bar_id
                    self._usage.text = self._format_usage(trainer, wide=get_console().width >= _WIDE)
                super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif now - self._printed >= self.interval:
            self._printed = now
            step = f"step {batch_idx + 1}/{self.total_train_batches}"
            self._print_line(trainer, self.get_metrics(trainer, pl_module), step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's line, with means over the epoch, where the bar shows the last batch."""
        super().on_train_epoch_end(trainer, pl_module)
        self._throughput.pause(trainer)
        means = trainer.callback_metrics
        shown: dict[str, Any] = {name: float(means[name]) for name in ("train/loss", "val/loss") if name in means}
        running = self.get_metrics(trainer, pl_module)
        shown |= {name: value for name, value in running.items() if "/" in name and name not in shown}
        shown = shown or running
        # Lightning keeps the values of the last validation, which may have been in an earlier epoch.
        shown = {name: value for name, value in shown.items() if self._validated or not name.startswith("val/")}
        self._print_line(trainer, shown, f"step {trainer.global_step}")

    def _print_line(self, trainer: Trainer, metrics: dict[str, Any], step: str) -> None:
        if self._in_terminal or not super().is_enabled:
            return
        values = [
            f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics.items()
        ]
        last = f"/{trainer.max_epochs - 1}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        usage = [text] if (text := self._format_usage(trainer, wide=True)) else []
        elapsed = str(timedelta(seconds=int(time.monotonic() - self._epoch_start)))
        print("  ".join([f"epoch {trainer.current_epoch}{last}", step, *values, *usage, elapsed]), flush=True)

    def _format_usage(self, trainer: Trainer, *, wide: bool) -> str:
        """Return throughput and memory as text, with full units or as short as possible."""
        rate, memory = self._throughput.images_per_second(), peak_memory(trainer.strategy.root_device)
        parts = []
        if rate is not None:
            rate *= trainer.world_size
            digits = f"{rate / 1000:.0f}k" if rate >= 9999.5 else f"{rate:.{0 if rate >= 9.95 else 1}f}"
            parts.append(f"{digits} images/s" if wide else f"{digits}/s")
        if memory is not None:
            parts.append(f"{memory:.1f} GB" if wide else f"{memory:.1f}G")
        return ("  " if wide else " ").join(parts)
