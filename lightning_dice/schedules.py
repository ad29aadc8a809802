"""Learning rate schedules: a warm-up before any of torch's schedules."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler, ReduceLROnPlateau, SequentialLR


def warmup(
    optimizer: Optimizer,
    scheduler: Callable[[Optimizer], LRScheduler],
    *,
    epochs: int,
    start_factor: float = 0.1,
) -> SequentialLR:
    r"""Raise the learning rate linearly for the first epochs, then follow a schedule from its start.

    .. math::
        \eta(e) = \eta_0 \left(f + (1 - f) \frac{e}{n}\right) \text{ for } e < n, \qquad
        \eta(e) = s(e - n) \text{ from } e = n \text{ on}

    with n = `epochs`, f = `start_factor` and s the schedule that `scheduler` returns, whose length is the number of
    epochs after the warm-up. An epoch e is a step of the schedule: with `module.interval=step`, where the rate changes
    at each optimizer step, `epochs` and the schedule's length are numbers of optimizer steps.

    The result is torch's `SequentialLR` of `LinearLR` and the schedule, and is saved and resumed as such.

    Args:
        optimizer: the rates of all its parameter groups are multiplied by the same factor.
        scheduler: called with the optimizer; not `ReduceLROnPlateau`, which follows a metric and not the epochs.
        epochs: n, at least 1: the first n epochs are below the full rate, which epoch n reaches.
        start_factor: f, in (0, 1]: fraction of the full rate in the first epoch.

    Raises:
        ValueError: a number is out of its range, or the schedule follows a metric.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> poly = lambda optimizer: torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=2)
    >>> schedule = warmup(optimizer, poly, epochs=2, start_factor=0.5)
    >>> for _ in range(4):
    ...     print(schedule.get_last_lr()[0])
    ...     optimizer.step()
    ...     schedule.step()
    0.5
    0.75
    1.0
    0.5
    """
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        raise ValueError(f"epochs must be an integer >= 1, got {epochs!r}; without a warm-up use the schedule itself")
    is_number = isinstance(start_factor, (int, float)) and not isinstance(start_factor, bool)
    if not is_number or not 0 < start_factor <= 1:  # NaN too
        raise ValueError(f"start_factor must be a fraction of the full rate in (0, 1], got {start_factor!r}")
    rising = LinearLR(optimizer, start_factor=start_factor, total_iters=epochs)
    following = scheduler(optimizer)
    if isinstance(following, ReduceLROnPlateau):
        raise ValueError(
            "scheduler must follow the epochs, but ReduceLROnPlateau follows a metric: use scheduler=plateau without a "
            "warm-up, or another schedule after the warm-up"
        )
    return _Sequence(optimizer, [rising, following], milestones=[epochs])


class _Sequence(SequentialLR):
    """Torch's `SequentialLR`, without the deprecation warning that it causes itself in some releases."""

    def step(self) -> None:  # type: ignore[override]
        with warnings.catch_warnings():
            # At the milestone it calls `step(0)` on the next schedule, an argument that is deprecated.
            warnings.filterwarnings("ignore", r"The epoch parameter in `scheduler\.step\(\)`", UserWarning)
            super().step()
