"""Samplers and data loaders: shuffling, resuming in an epoch, workers."""

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
    """Pairs of an index and a seed for its augmentation; process r of n takes every n-th, from the r-th on.

    It is a `DistributedSampler`, which Lightning leaves in its place, even for one process.
    """

    def __init__(self, cases: Cases, world: int, rank: int, *, seed: int) -> None:
        super().__init__(cast("Dataset[Any]", cases), num_replicas=world, rank=rank, drop_last=True)
        self.cases = len(cases)
        self.entropy = seed
        # An epoch, and how many of this process's cases in it are done already.
        self.skip: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(mixed_seed(self.entropy, self.epoch))
        order = torch.randperm(self.cases, generator=generator).tolist()
        seeds = torch.randint(2**32, (self.cases,), generator=generator).tolist()
        skip, self.skip = self.skip, None
        done = skip[1] if skip is not None and skip[0] == self.epoch else 0
        # A Trainer sets the epoch itself; a bare loop has nobody who would.
        self.epoch += 1
        mine = range(self.rank, self.total_size, self.num_replicas)[done:]
        return iter([(order[i], seeds[i]) for i in mine])


def mixed_seed(*numbers: int) -> int:
    """A seed of 64 bits: hashed, as the sum of seed and epoch would give run 1 the order of run 0, one epoch on."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class LazyDataLoader(DataLoader[Batch]):
    """A loader whose workers begin with the first batch asked for.

    Lightning makes the iterator of a resumed training before it tells the sampler which epoch it is; workers that read
    ahead would bring the first epoch's cases.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


class EvalSampler(DistributedSampler[list[int]]):
    """Batches of consecutive cases of one size; each process takes its own stretch of the cases, none twice.

    All processes have equally many batches, the last of which may be empty: FSDP sends weights in every forward pass,
    and DDP the network's buffers, such as those of batch norm, in the first one of a validation.
    """

    def __init__(self, cases: Cases, world: int, rank: int, *, batch_size: int) -> None:
        super().__init__(cast("Dataset[Any]", cases), num_replicas=world, rank=rank, shuffle=False)
        # Where images are resampled, masks of other sizes may belong to images of one size.
        shapes = getattr(cases, "shapes", cases.sizes)
        shares = [batches_of_one_size(shapes, world, other, batch_size) for other in range(world)]
        most = max(map(len, shares))
        self.batches = shares[rank] + [[] for _ in range(most - len(shares[rank]))]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def batches_of_one_size(sizes: Sequence[Any], world: int, rank: int, batch_size: int) -> list[list[int]]:
    """The batches of one rank: consecutive cases of one size, at most `batch_size` of them."""
    batches: list[list[int]] = []
    for i in range(rank * len(sizes) // world, (rank + 1) * len(sizes) // world):
        if batches and len(batches[-1]) < batch_size and sizes[i] == sizes[batches[-1][0]]:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def start_method() -> str | None:
    """The platform's way to start workers, where this process was started in another that they cannot be (joblib's)."""
    known = multiprocessing.get_all_start_methods()
    return None if multiprocessing.get_start_method(allow_none=True) in (None, *known) else known[0]


def ignore_signals(worker: int) -> None:
    """Let the training, not its workers, act on what a terminal or a cluster sends to all processes of a job.

    A worker that ends by such a signal would end the training at once, in the middle of a step. SIGTERM from the
    training itself ends it.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What was forked has the training's own handler.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return  # Only Linux tells who has sent a signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait(parent: int) -> None:
        while True:
            if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
                # No failure, which torch would report at the end of a program that did not wait long enough.
                os._exit(0)

    threading.Thread(target=wait, args=(os.getppid(),), daemon=True).start()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed what augmentations draw from, and put it back: without workers it is the training's own."""
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
