"""Progress of a long command, and stopping it by a signal."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from lightning_dice.cli.workers import WorkerPool

_LINE = 30.0  # seconds between lines of progress, where there is no terminal


class Progress:
    """A progress bar on standard error; a line every half minute if that is not a terminal.

    Args:
        total: images, over all processes.
        device: for the description.
        pool: counts the images.
    """

    def __init__(self, total: int, device: torch.device, pool: WorkerPool) -> None:
        import time

        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._pool, self._total, self._clock = pool, total, time.monotonic
        self._console = Console(stderr=True)
        live = pool.first and self._console.is_terminal and total > 0
        columns = [
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
            *(TextColumn("left"), TimeRemainingColumn()),
        ]
        self._bar = RichProgress(*columns, console=self._console) if live else None
        processes = f", {pool.size} processes" if pool.size > 1 else ""
        self._task: Any = self._bar.add_task(f"predicting on {device}{processes}", total=total) if self._bar else None
        self._start = self._printed = self._clock()

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def print_line(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def count(self) -> None:
        """Count one image, done or skipped."""
        self._show(self._pool.count())

    def refresh(self) -> None:
        """Show the images that all processes have done so far."""
        if self._pool.first and self._pool.size > 1:
            self._show(self._pool.count(0))

    def _show(self, done: int) -> None:
        now = self._clock()
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif self._pool.first and now - self._printed >= _LINE and 0 < done < self._total:
            self._printed = now
            left = (now - self._start) / done * (self._total - done)
            self.print_line(f"{done} of {self._total} images, about {left / 60:.1f} minutes left")


class Terminated(BaseException):
    """Raised on SIGTERM. A `BaseException`, so that `except Exception` does not swallow it."""


class Stop:
    """Stops a command after the current image on Ctrl-C; a second Ctrl-C, or SIGTERM, drops that image.

    No file is left half-written in any case.

    Args:
        silent: leave the message to another process.

    Attributes:
        asked: the number of the signal after which no further image is started; 0: none.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self.asked, self.silent = 0, silent

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals within this context."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGTERM:
            raise Terminated
        if self.asked:
            raise KeyboardInterrupt
        # Not by print, which the signal may have interrupted.
        os.write(2, b"\nStopping after this image; Ctrl-C again drops it and stops at once.\n")
        self.asked = number

    def status(self, number: int) -> int:
        """Print how to continue, and return the exit status that shells expect."""
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if not self.silent:
            print(f"\nStopped by {name}: run the same command again to continue.", file=sys.stderr)
        return 128 + number
