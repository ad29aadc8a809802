"""What a long command shows of its work, and how it is stopped."""

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
    """A bar with the time left, on standard error; where that is no terminal, a line now and then.

    Args:
        total: images, of all processes.
        device: for the description.
        shares: which counts them.
    """

    def __init__(self, total: int, device: torch.device, shares: WorkerPool) -> None:
        import time

        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._shares, self._total, self._clock = shares, total, time.monotonic
        self._console = Console(stderr=True)
        live = shares.first and self._console.is_terminal and total > 0
        columns = [
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
            *(TextColumn("left"), TimeRemainingColumn()),
        ]
        self._bar = RichProgress(*columns, console=self._console) if live else None
        processes = f", {shares.size} processes" if shares.size > 1 else ""
        self._task: Any = self._bar.add_task(f"predicting on {device}{processes}", total=total) if self._bar else None
        self._begun = self._printed = self._clock()

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def tell(self, text: str) -> None:
        """Print a line above the bar, at once."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def count(self) -> None:
        """One more image is done, or skipped."""
        self._show(self._shares.count())

    def look(self) -> None:
        """Show what all processes have done by now."""
        if self._shares.first and self._shares.size > 1:
            self._show(self._shares.count(0))

    def _show(self, done: int) -> None:
        now = self._clock()
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif self._shares.first and now - self._printed >= _LINE and 0 < done < self._total:
            self._printed = now
            left = (now - self._begun) / done * (self._total - done)
            self.tell(f"{done} of {self._total} images, about {left / 60:.1f} minutes left")


class Terminated(BaseException):
    """SIGTERM has come. No `Exception`: nothing that handles errors shall take it for one."""


class Stop:
    """Ctrl-C lets the current image be finished, a second one and SIGTERM drop it; in no case is half a file left.

    Attributes:
        asked: the number of the signal after which no further image shall be begun; 0: none.
        silent: another process says how to go on.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.silent = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Act on signals within this context."""
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
        # Not by print, in the middle of which this may have come.
        os.write(2, b"\nStopping after this image; Ctrl-C again drops it and stops at once.\n")
        self.asked = number

    def status(self, number: int) -> int:
        """Say how to go on; the exit status that shells expect."""
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if not self.silent:
            print(f"\nStopped by {name}: run the same command again to go on.", file=sys.stderr)
        return 128 + number
