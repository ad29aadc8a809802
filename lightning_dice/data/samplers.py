"""Samplers and data loaders: shuffling, resuming within an epoch, workers."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_dice.data.batch import Batch
from lightning_dice.data.interfaces import Cases


class TrainSampler(DistributedSampler[tuple[int, int]]):
    """Yields pairs of an index and a seed for its augmentation; process r of n takes every n-th, from the r-th on.

    It is a `DistributedSampler`, because Lightning does not replace one, not even for a single process.

    Args:
        cases: the training cases.
        world: number of processes.
        rank: rank of this process.
        seed: determines the order and the augmentation seeds, together with the epoch.

    >>> [index for index, _ in TrainSampler([None] * 5, world=2, rank=0, seed=0)]
    [1, 0]
    """

    def __init__(self, cases: Cases, world: int, rank: int, *, seed: int) -> None:
        super().__init__(cast("Dataset[Any]", cases), num_replicas=world, rank=rank, drop_last=True)
        self.cases = len(cases)
        self.entropy = seed
        # An epoch that began with another seed, and that seed.
        self.other: tuple[int, int] | None = None
        # The interrupted epoch, and how many of this process's cases in it are done.
        self.skip: tuple[int, int] | None = None

    def seed_of(self, epoch: int) -> int:
        """Return the seed of an epoch: if the seed has changed in its middle, its first one."""
        return self.other[1] if self.other is not None and self.other[0] == epoch else self.entropy

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed_of(self.epoch), self.epoch))
        order = torch.randperm(self.cases, generator=generator).tolist()
        seeds = torch.randint(2**32, (self.cases,), generator=generator).tolist()
        skip, self.skip = self.skip, None
        done = skip[1] if skip is not None and skip[0] == self.epoch else 0
        # A Trainer sets the epoch; a bare loop does not.
        self.epoch += 1
        mine = range(self.rank, self.total_size, self.num_replicas)[done:]
        return iter([(order[i], seeds[i]) for i in mine])


def mixed_seed(*numbers: int) -> int:
    """Hash numbers into a 64-bit seed; with the sum of seed and epoch, run 1 would repeat run 0 one epoch later.

    >>> mixed_seed(0, 1) == mixed_seed(1, 0)
    False
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class LazyDataLoader(DataLoader[Batch]):
    """A loader whose workers start when the first batch is requested.

    When a run is resumed, Lightning makes the iterator before it sets the sampler's epoch; workers that read ahead
    would return cases of the first epoch.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


class EvalSampler(DistributedSampler[list[int]]):
    """Yields batches of consecutive cases of one size; each process takes its own range of cases, none twice.

    All processes have equally many batches, the last of which may be empty: FSDP communicates in every forward pass,
    and DDP broadcasts the network's buffers, such as those of batch norm, in the first one of a validation.

    Args:
        cases: the cases of a split.
        world: number of processes.
        rank: rank of this process.
        batch_size: the largest number of cases in a batch.

    >>> from lightning_dice.data import SyntheticSource
    >>> cases = SyntheticSource(size=(32, 32), cases=(0, 5, 0)).split("val")
    >>> [list(EvalSampler(cases, world=2, rank=rank, batch_size=2)) for rank in range(2)]
    [[[0, 1], []], [[2, 3], [4]]]
    """

    def __init__(self, cases: Cases, world: int, rank: int, *, batch_size: int) -> None:
        super().__init__(cast("Dataset[Any]", cases), num_replicas=world, rank=rank, shuffle=False)
        # If images are resampled, images of one size may have masks of different sizes.
        shapes = getattr(cases, "shapes", cases.sizes)
        shares = [batches_of_one_size(shapes, world, other, batch_size) for other in range(world)]
        most = max(map(len, shares))
        self.batches = shares[rank] + [[] for _ in range(most - len(shares[rank]))]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def batches_of_one_size(sizes: Sequence[Any], world: int, rank: int, batch_size: int) -> list[list[int]]:
    """Return the batches of one rank: consecutive cases of one size, at most `batch_size` of them.

    >>> batches_of_one_size([(4, 4), (4, 4), (4, 4), (6, 4)], world=1, rank=0, batch_size=2)
    [[0, 1], [2], [3]]
    """
    batches: list[list[int]] = []
    for i in range(rank * len(sizes) // world, (rank + 1) * len(sizes) // world):
        if batches and len(batches[-1]) < batch_size and sizes[i] == sizes[batches[-1][0]]:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def start_method() -> str | None:
    """Return the platform's start method for workers if this process was started by another one (joblib's)."""
    known = multiprocessing.get_all_start_methods()
    return None if multiprocessing.get_start_method(allow_none=True) in (None, *known) else known[0]


def ignore_signals(worker: int) -> None:
    """Make a worker ignore the signals that a terminal or a cluster sends to all processes of a job.

    The training process handles them; a worker that they kill would end training in the middle of a step. SIGTERM
    from the training process still ends the worker.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A forked worker has inherited the handler of the training process.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return  # Only Linux reports the sender of a signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait(parent: int) -> None:
        while True:
            if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
                # Exit status 0: torch would report a failure at the end of a program that did not wait for its workers.
                os._exit(0)

    threading.Thread(target=wait, args=(os.getppid(),), daemon=True).start()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed `random`, NumPy and torch, and restore their states afterwards.

    Without workers, augmentations draw from the random state of the training process itself.

    >>> with seeded(3):
    ...     first = random.random()
    >>> with seeded(3):
    ...     random.random() == first
    True
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
