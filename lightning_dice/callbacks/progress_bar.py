"""Progress: a bar in a terminal, a line for each epoch in a log file."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import CustomBarColumn, RichProgressBarTheme
from rich import get_console
from rich.progress import ProgressColumn, Task, TextColumn
from rich.text import Text

from lightning_dice.callbacks.throughput import Throughput, peak_memory

# What stands beside the bar in a narrow terminal: loss, dice and val/dice, throughput and memory, time left, spaces.
_METRICS, _USE, _TIME, _SPACES = len("loss: 0.693 dice: 0.500 val/dice: 0.307"), len("1234/s 12.3G"), len("-0:00"), 6


class _Times(ProgressColumn):
    """Time passed and time left, or only the latter, in as little room as they take."""

    max_refresh = 0.5

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.both = both

    def render(self, task: Task) -> Text:
        elapsed = task.finished_time if task.finished else task.elapsed
        left = task.time_remaining
        return Text(f"{_clock(elapsed)}<{_clock(left)}" if self.both else f"-{_clock(left)}", style="dim")


class _Use(ProgressColumn):
    """Throughput and memory of the training, as they were when the bar was last updated."""

    text = ""
    task_id: int | None = None

    def render(self, task: Task) -> Text:
        return Text(self.text if task.id == self.task_id else "", style="dim")


class ProgressBar(RichProgressBar):
    """Lightning's rich bar, in one line of a terminal of 80 columns; elsewhere a line of text for each epoch.

    Both show how many images a second the epoch has been trained on so far, by this process times the number of
    processes, and the peak of memory in GB (10⁹ bytes), on the GPU or of the process. Where there is little room, as in
    `85/s 1.2G`, the bar itself is what gives way.

    Metrics are read a few times a second, not at each step: reading one waits for the GPU.

    Args:
        refresh_rate: updates per second.
        interval: seconds between lines within an epoch, where the output is no terminal.
    """

    def __init__(self, refresh_rate: int = 10, interval: float = 300.0) -> None:
        theme = RichProgressBarTheme(
            progress_bar="#56B4E9", progress_bar_finished="#56B4E9", progress_bar_pulse="#56B4E9", metrics=""
        )
        super().__init__(refresh_rate=refresh_rate, theme=theme)
        self.interval = interval
        self._live, self._validated = True, False
        self._shown = self._started = self._printed = 0.0
        self._throughput = Throughput()
        self._use: _Use | None = None

    @property
    def is_enabled(self) -> bool:
        """Whether the bar is drawn."""
        return self._live and super().is_enabled

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out where the output goes."""
        super().setup(trainer, pl_module, stage)
        console = get_console()
        self._live = console.is_terminal or console.is_jupyter

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Narrow columns, so that the metrics have room."""
        width = get_console().width
        roomy = width >= 120
        last = str(max(0, (trainer.max_epochs or 1) - 1))
        # Not known before training, nor of a stream.
        batches = str(trainer.num_training_batches).replace("inf", "1000")
        counts = f"Epoch {last}/{last} {batches}/{batches}"
        left = width - (len(counts) + _TIME + _USE + _METRICS + _SPACES)
        bar = CustomBarColumn(
            bar_width=30 if roomy else min(left, 8),
            complete_style=self.theme.progress_bar,
            finished_style=self.theme.progress_bar_finished,
            pulse_style=self.theme.progress_bar_pulse,
        )
        self._use = _Use()
        done = TextColumn("{task.completed:.0f}/{task.total:.0f}")
        # Shorter than this it shows nothing.
        bars = [bar] if roomy or left >= 3 else []
        return [TextColumn("{task.description}"), *bars, done, _Times(both=roomy), self._use]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What the module logs for the bar, without the run's number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock: an epoch that is resumed in its middle does not start again."""
        super().on_train_start(trainer, pl_module)
        self._started = self._printed = time.monotonic()
        self._throughput.start()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_epoch_start(trainer, pl_module)
        self._validated = False
        self._started = self._printed = time.monotonic()
        self._throughput.start()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of the training."""
        super().on_validation_start(trainer, pl_module)
        self._throughput.pause(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with it."""
        super().on_validation_end(trainer, pl_module)
        self._validated = self._validated or not trainer.sanity_checking
        self._throughput.go_on()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the bar, if it is time."""
        now = time.monotonic()
        self._throughput.add(batch)
        if self.is_enabled:
            if now - self._shown >= 1 / self.refresh_rate or batch_idx + 1 >= self.total_train_batches:
                self._shown = now
                if self._use is not None:
                    self._use.task_id = self.train_progress_bar_id
                    self._use.text = self._used(trainer, roomy=get_console().width >= 120)
                super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif now - self._printed >= self.interval:
            self._printed = now
            self._line(
                trainer, self.get_metrics(trainer, pl_module), f"step {batch_idx + 1}/{self.total_train_batches}"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the epoch's line: means over the epoch, where the bar shows the last batch."""
        super().on_train_epoch_end(trainer, pl_module)
        self._throughput.pause(trainer)
        epoch = trainer.callback_metrics
        losses = [name for name in ("train/loss", "val/loss") if name in epoch]
        shown: dict[str, Any] = {name: float(epoch[name]) for name in losses}
        running = self.get_metrics(trainer, pl_module)
        shown |= {name: value for name, value in running.items() if "/" in name and name not in shown}
        shown = shown or running
        # Lightning keeps the values of the last validation, which are not this epoch's.
        shown = {name: value for name, value in shown.items() if self._validated or not name.startswith("val/")}
        self._line(trainer, shown, f"step {trainer.global_step}")

    def _line(self, trainer: Trainer, metrics: dict[str, Any], where: str) -> None:
        if self._live or not super().is_enabled:
            return
        values = [
            f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics.items()
        ]
        last = f"/{trainer.max_epochs - 1}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        seconds = _clock(time.monotonic() - self._started)
        used = [text] if (text := self._used(trainer, roomy=True)) else []
        print("  ".join([f"epoch {trainer.current_epoch}{last}", where, *values, *used, seconds]), flush=True)

    def _used(self, trainer: Trainer, *, roomy: bool) -> str:
        """Throughput and memory, with their units or as short as can be."""
        rate, memory = self._throughput.rate(), peak_memory(trainer.strategy.root_device)
        parts = []
        if rate is not None:
            rate *= trainer.world_size
            shown = f"{rate / 1000:.0f}k" if rate >= 9999.5 else f"{rate:.{0 if rate >= 9.95 else 1}f}"
            parts.append(f"{shown} images/s" if roomy else f"{shown}/s")
        if memory is not None:
            parts.append(f"{memory:.1f} GB" if roomy else f"{memory:.1f}G")
        return ("  " if roomy else " ").join(parts)


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
