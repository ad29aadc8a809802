"""Learning rates that begin low: a warm-up before any of torch's schedules."""

from __future__ import annotations

import math
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
    r"""Raise the rate linearly for the first epochs, and then follow a schedule from its beginning.

    .. math::
        \eta(e) = \eta_0 \left(f + (1 - f) \frac{e}{n}\right) \text{ for } e < n, \qquad
        \eta(e) = s(e - n) \text{ from } e = n \text{ on}

    with n = `epochs`, f = `start_factor` and s the schedule that `scheduler` makes, whose own length is what remains
    after the warm-up. An epoch e is a step of the schedule: with `module.interval=step`, where the rate changes at each
    optimizer step, `epochs` and the schedule's length are numbers of optimizer steps.

    It is torch's `SequentialLR` of `LinearLR` and the schedule, and is saved and resumed as such.

    Args:
        optimizer: whose rates change, each group's by the same factor.
        scheduler: called with the optimizer; not `ReduceLROnPlateau`, which follows a metric and not the epochs.
        epochs: n, at least 1: the first n epochs are below the full rate, and epoch n is the first at it.
        start_factor: f, in (0, 1]: the share of the full rate in the first epoch.

    Raises:
        ValueError: a number out of its range, or a schedule that follows a metric.

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
    given = isinstance(start_factor, (int, float)) and not isinstance(start_factor, bool)
    if not given or not math.isfinite(start_factor) or not 0 < start_factor <= 1:
        raise ValueError(f"start_factor must be a share of the full rate in (0, 1], got {start_factor!r}")
    rising = LinearLR(optimizer, start_factor=start_factor, total_iters=epochs)
    following = scheduler(optimizer)
    if isinstance(following, ReduceLROnPlateau):
        raise ValueError(
            "scheduler must follow the epochs, which ReduceLROnPlateau, following a metric, does not: use "
            "scheduler=plateau without a warm-up, or another schedule after it"
        )
    return _Sequence(optimizer, [rising, following], milestones=[epochs])


class _Sequence(SequentialLR):
    """Torch's, without the warning that some of its releases give of what they do themselves."""

    def step(self) -> None:  # type: ignore[override]
        with warnings.catch_warnings():
            # At the milestone they call `step(0)` on the next schedule, whose argument is deprecated.
            warnings.filterwarnings("ignore", r"The epoch parameter in `scheduler\.step\(\)`", UserWarning)
            super().step()
