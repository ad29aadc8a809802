"""How many images a second a training takes in, and how much memory it needs."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sized
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_dice.callbacks.input_check import read_batch

_STATUS = Path("/proc/self/status")


def batch_size(batch: Any) -> int:
    """Images in a batch of any form that a module takes; of another form, its length.

    >>> batch_size({"image": torch.zeros(5, 1, 8, 8), "mask": torch.zeros(5, 1, 8, 8)})
    5
    """
    given = read_batch(batch)
    if given is not None:
        return len(given.image)
    return len(batch) if isinstance(batch, Sized) else 0


def peak_memory(device: torch.device) -> float | None:
    """The most memory that this process has needed so far, in GB (10⁹ bytes); None where that is not known.

    On a GPU that of its tensors there (`torch.cuda.max_memory_allocated`); elsewhere the resident set of the process,
    without that of the data loader's workers.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if _STATUS.is_file():
        # Not getrusage, which counts what the process that forked this one had needed.
        peak = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
        if peak:
            return int(peak[1]) * 1024 / 1e9
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # bytes there
    return None


class Throughput:
    """Counts the images of an epoch and the time in which they were trained on, without validations."""

    def __init__(self) -> None:
        self.images, self.seconds = 0, 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Begin an epoch."""
        self.images, self.seconds = 0, 0.0
        self._started = time.perf_counter()

    def add(self, batch: Any) -> None:
        """Count a batch."""
        self.images += batch_size(batch)

    def pause(self, trainer: Trainer) -> None:
        """Something else than training begins."""
        if self._started is None:
            return
        if trainer.strategy.root_device.type == "cuda":
            # Once in an epoch: what has been asked of the GPU belongs to the training.
            torch.cuda.synchronize(trainer.strategy.root_device)
        self.seconds += time.perf_counter() - self._started
        self._started = None

    def go_on(self) -> None:
        """Training goes on."""
        self._started = time.perf_counter()

    def rate(self) -> float | None:
        """Images a second of this process up to now; None before the first."""
        seconds = self.seconds
        if self._started is not None:
            seconds += time.perf_counter() - self._started
        return self.images / seconds if self.images and seconds > 0 else None

    def of_all(self, trainer: Trainer) -> dict[str, float]:
        """`images_per_second` of all processes together, and `memory_gb` of the one that needs most.

        All processes must call, once training has paused. What is not known is left out.
        """
        device = trainer.strategy.root_device
        memory = peak_memory(device)
        wide = torch.float32 if device.type == "mps" else torch.float64
        images = trainer.strategy.reduce(torch.tensor(self.images, dtype=wide, device=device), reduce_op="sum")
        # The slowest one is what the others wait for.
        slowest = torch.tensor([self.seconds, -1.0 if memory is None else memory], dtype=wide, device=device)
        most: Any = trainer.strategy.reduce(slowest, reduce_op="max")
        seconds, gigabytes = most.tolist()
        known = {"images_per_second": float(images) / seconds} if seconds > 0 and float(images) else {}
        return known | ({"memory_gb": gigabytes} if gigabytes >= 0 else {})
