"""Learning rate schedules: a warm-up before any of torch's, their length, and when one that follows a metric steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler, PolynomialLR, ReduceLROnPlateau, SequentialLR

from lightning_dice.library_internals.lightning import load_training_data
from lightning_dice.library_internals.torch import sequence_parts

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

# Names of the argument of torch's schedules that is their length.
LENGTHS = ("T_max", "total_iters", "total_steps")


class UnknownLengthError(ValueError):
    """The number of steps of a schedule in a training is not known."""


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


def plateau_frequency(scheduler: Any, interval: str, monitor: str, trainer: Trainer | None = None) -> int:
    """Return how many of its intervals a schedule waits between two steps: 1, unless it follows a validation.

    Args:
        scheduler: any schedule; only `ReduceLROnPlateau` follows a metric.
        interval: `"epoch"` or `"step"`.
        monitor: the metric that it follows; only those of a validation, `val/...`, are restricted.
        trainer: validates every `check_val_every_n_epoch` epochs; every epoch without it.

    Raises:
        ValueError: the metric would not be there, or would be an old one, when the schedule steps.

    >>> import torch
    >>> plateau = ReduceLROnPlateau(torch.optim.SGD([torch.zeros(1)]))
    >>> plateau_frequency(plateau, "epoch", "val/dice")
    1
    >>> plateau_frequency(plateau, "step", "val/dice")
    Traceback (most recent call last):
    ValueError: scheduler ReduceLROnPlateau follows val/dice, which a validation at the end of an epoch gives it: \
set interval="epoch", got "step"
    """
    if not isinstance(scheduler, ReduceLROnPlateau) or not monitor.startswith("val/"):
        return 1
    follows = f"scheduler ReduceLROnPlateau follows {monitor}, which a validation at the end of an epoch gives it"
    if interval != "epoch":
        raise ValueError(f'{follows}: set interval="epoch", got "{interval}"')
    if trainer is None:
        return 1
    if trainer.limit_val_batches == 0:
        raise ValueError(f"{follows}: set limit_val_batches of the Trainer above 0, or use another schedule")
    if trainer.check_val_every_n_epoch is None:
        raise ValueError(
            f"{follows}: set check_val_every_n_epoch of the Trainer to a number of epochs, got None, or use another "
            "schedule"
        )
    return int(trainer.check_val_every_n_epoch)


def training_length(trainer: Trainer, interval: str) -> int:
    """Return how often a schedule steps in a training.

    Args:
        trainer: at `configure_optimizers`, or later.
        interval: `"epoch"`: the number of epochs; `"step"`: the number of optimizer steps.

    Raises:
        UnknownLengthError: the training has no known end.
    """
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else None
    if interval == "epoch" and trainer.max_steps == -1 and epochs is not None:
        return epochs
    load_training_data(trainer)
    steps = trainer.estimated_stepping_batches
    batches = trainer.num_training_batches
    if interval == "step" and steps not in (-1, float("inf")):
        return int(steps)
    if interval == "epoch" and batches not in (0, float("inf")) and trainer.max_steps != -1:
        in_epoch = -(-int(batches) // trainer.accumulate_grad_batches)
        by_steps = -(-trainer.max_steps // in_epoch)
        return by_steps if epochs is None else min(epochs, by_steps)
    raise UnknownLengthError(
        f"scheduler: how many {interval}s the training has is not known: give trainer.max_epochs or trainer.max_steps, "
        f"or the length of the schedule ({' or '.join(LENGTHS)})"
    )


def with_length(
    scheduler: Callable[[Optimizer], LRScheduler], length: Callable[[], int]
) -> Callable[[Optimizer], LRScheduler]:
    """Give a schedule the length of the training, if its own is `None`.

    Args:
        scheduler: a `functools.partial` of one of torch's schedules with `T_max=None`, `total_iters=None` or
            `total_steps=None`, or of `warmup` with such a `scheduler`, which gets what remains after the warm-up, at
            least 1. Anything else is returned as it is.
        length: returns the number of steps of the schedule in the training; called only if it is needed.

    >>> from torch.optim.lr_scheduler import CosineAnnealingLR
    >>> with_length(partial(CosineAnnealingLR, T_max=None, eta_min=0.1), lambda: 12).keywords
    {'T_max': 12, 'eta_min': 0.1}
    """
    if not isinstance(scheduler, partial):
        return scheduler
    given: dict[str, Any] = dict(scheduler.keywords)
    for name in LENGTHS:
        if name in given and given[name] is None:
            given[name] = length()
    if scheduler.func is warmup and isinstance(given.get("scheduler"), partial):
        first = given.get("epochs", 0)
        given["scheduler"] = with_length(given["scheduler"], lambda: max(1, length() - first))
    return partial(scheduler.func, *scheduler.args, **given)


def check_length(scheduler: LRScheduler, interval: str, length: int, epochs: int | None) -> None:
    """Check that a schedule does not end long before the training.

    Args:
        scheduler: the schedule.
        interval: when it steps, `"epoch"` or `"step"`.
        length: number of its steps in the training.
        epochs: number of epochs of the training; `None`: not known.

    Raises:
        ValueError: the learning rate would be 0 for the rest of the training, or a length is a number of epochs, and
            the schedule counts optimizer steps.
    """
    part, start = _last_part(scheduler)
    name = next((name for name in LENGTHS if hasattr(part, name)), None)
    if name is None:
        return
    end = start + getattr(part, name)
    kind = f"{type(part).__name__} with {name}={getattr(part, name)}"
    if interval == "step" and end == epochs and end < length:
        raise ValueError(
            f"scheduler: {kind} ends after {end} of {length} optimizer steps, as module.interval=step; that is the "
            f"number of epochs: set {name} to null, which is the whole training, or module.interval=epoch"
        )
    if isinstance(part, PolynomialLR) and end < length:
        raise ValueError(
            f"scheduler: {kind} ends after {end} of {length} {interval}s, and the learning rate is 0 from then on: set "
            f"{name} to null, which is the whole training"
        )


def _last_part(scheduler: LRScheduler) -> tuple[LRScheduler, int]:
    """Return the last schedule of a sequence, and the step at which it starts."""
    start = 0
    while isinstance(scheduler, SequentialLR):
        scheduler, offset = sequence_parts(scheduler)[-1]
        start += offset
    return scheduler, start
