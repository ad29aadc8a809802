"""Measure how many images per second a training processes, and how much memory it needs."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sized
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_dice.data.batch import find_batch
from lightning_dice.library_internals.lightning import is_last_batch

_STATUS = Path("/proc/self/status")


def batch_size(batch: Any) -> int:
    """Return the number of images in a batch of any form that a module takes; for other forms, its length.

    >>> batch_size({"image": torch.zeros(5, 1, 8, 8), "mask": torch.zeros(5, 1, 8, 8)})
    5
    """
    found = find_batch(batch)
    if found is not None:
        return len(found.image)
    return len(batch) if isinstance(batch, Sized) else 0


def peak_memory(device: torch.device) -> float | None:
    """Return the peak memory of this process so far, in GB (10⁹ bytes); None where it is unknown.

    On a GPU, the memory of its tensors there (`torch.cuda.max_memory_allocated`); elsewhere the resident set of the
    process, without the data loader's workers.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if _STATUS.is_file():
        # Not getrusage, which includes the peak of the process that forked this one.
        peak = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
        if peak:
            return int(peak[1]) * 1024 / 1e9
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # bytes there
    return None


class EpochThroughput:
    """Count the images of an epoch and the seconds of training on them, excluding validation.

    >>> throughput = EpochThroughput()
    >>> throughput.start()
    >>> throughput.add({"image": torch.zeros(5, 1, 8, 8), "mask": torch.zeros(5, 1, 8, 8)})
    >>> throughput.images
    5
    """

    def __init__(self) -> None:
        self.images, self.seconds = 0, 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Start the clock of an epoch."""
        self.images, self.seconds = 0, 0.0
        self._started = time.perf_counter()

    def add(self, batch: Any) -> None:
        """Count the images of a batch."""
        self.images += batch_size(batch)

    def pause(self, trainer: Trainer) -> None:
        """Stop the clock: the training is interrupted, by a validation for example."""
        if self._started is None:
            return
        if trainer.strategy.root_device.type == "cuda":
            # Once per epoch: work that the GPU has not finished belongs to the training.
            torch.cuda.synchronize(trainer.strategy.root_device)
        self.seconds += time.perf_counter() - self._started
        self._started = None

    def resume(self, trainer: Trainer) -> None:
        """Start the clock again, unless the epoch is at its end: a checkpoint may be written there."""
        if not is_last_batch(trainer):
            self._started = time.perf_counter()

    def images_per_second(self) -> float | None:
        """Return the images per second of this process in this epoch so far; None before the first batch."""
        seconds = self.seconds
        if self._started is not None:
            seconds += time.perf_counter() - self._started
        return self.images / seconds if self.images and seconds > 0 else None

    def reduce(self, trainer: Trainer) -> dict[str, float]:
        """Return the `images_per_second` of all processes together, and the largest `memory_gb` of any process.

        All processes must call it, after `pause`. An unknown value is missing.
        """
        device = trainer.strategy.root_device
        memory = peak_memory(device)
        wide = torch.float32 if device.type == "mps" else torch.float64
        images = trainer.strategy.reduce(torch.tensor(self.images, dtype=wide, device=device), reduce_op="sum")
        # The others wait for the slowest process.
        slowest = torch.tensor([self.seconds, -1.0 if memory is None else memory], dtype=wide, device=device)
        largest: Any = trainer.strategy.reduce(slowest, reduce_op="max")
        seconds, gigabytes = largest.tolist()
        known = {"images_per_second": float(images) / seconds} if seconds > 0 and float(images) else {}
        return known | ({"memory_gb": gigabytes} if gigabytes >= 0 else {})
