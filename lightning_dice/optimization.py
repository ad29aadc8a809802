"""How a module is optimized: optimizer, schedule, learning rate, accumulated gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_dice.argument_checks import check_choice
from lightning_dice.library_internals.lightning import attached_trainer, batch_progress
from lightning_dice.schedules import (
    UnknownLengthError,
    check_length,
    plateau_frequency,
    training_length,
    with_length,
)

Interval = Literal["epoch", "step"]
RateScaling = Literal["linear", "sqrt"]
OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


class Optimization(L.LightningModule):
    """Base of `SegmentationModule`: makes the optimizer and the schedule, and weighs accumulated gradients.

    Attributes:
        optimizer, scheduler, interval, monitor, lr_scaling: see `SegmentationModule`.
    """

    optimizer: OptimizerFactory | None
    scheduler: SchedulerFactory | None
    interval: Interval
    monitor: str
    lr_scaling: RateScaling | None
    _lr: float | None = None

    def set_optimization(
        self,
        optimizer: OptimizerFactory | None,
        scheduler: SchedulerFactory | None,
        interval: Interval,
        monitor: str,
        lr_scaling: RateScaling | None,
    ) -> None:
        """Take the settings, which are those of `SegmentationModule`.

        Raises:
            ValueError: a setting is refused.
        """
        for name, factory, example in (
            ("optimizer", optimizer, "partial(torch.optim.SGD, lr=0.1)"),
            ("scheduler", scheduler, "partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=None)"),
        ):
            if factory is not None and not callable(factory):
                raise ValueError(
                    f"{name} must be a function that makes one, such as {example}, got one that is made already: "
                    f"{type(factory).__name__}"
                )
        self.optimizer, self.scheduler, self.monitor = optimizer, scheduler, monitor
        self.interval = check_choice("interval", interval, Interval)
        self.lr_scaling = check_choice("lr_scaling", lr_scaling, ("linear", "sqrt", None))

    @property
    def lr(self) -> float:
        """The learning rate of the first parameter group, which Lightning's `Tuner.lr_find` reads and sets.

        Setting it changes the rates of the other groups by the same factor, from the next `configure_optimizers` on.
        """
        if self._lr is not None:
            return self._lr
        try:
            return float(self._make_optimizer(iter([nn.Parameter(torch.zeros(1))])).param_groups[0]["lr"])
        except (TypeError, ValueError, KeyError) as error:
            raise AttributeError(f"the optimizer's learning rate is not known: {error}") from error

    @lr.setter
    def lr(self, rate: float) -> None:
        self._lr = rate

    def _make_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        make = self.optimizer if self.optimizer is not None else lambda params: torch.optim.AdamW(params, lr=1e-3)
        return make(parameters)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and the scheduler, if there is one, in Lightning's form.

        Without a Trainer, a scheduler that has the length of the training is left out.
        """
        optimizer = self._make_optimizer(parameter for parameter in self.parameters() if parameter.requires_grad)
        factor = self._rate_factor()
        if self._lr is not None:
            factor = factor * self._lr / optimizer.param_groups[0]["lr"]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor
        if self.scheduler is None:
            return optimizer
        trainer = attached_trainer(self)
        try:
            scheduler = with_length(self.scheduler, self._schedule_length)(optimizer)
        except UnknownLengthError:
            if trainer is None:
                return optimizer
            raise
        if trainer is not None and isinstance(scheduler, LRScheduler):
            with suppress(UnknownLengthError):
                check_length(scheduler, self.interval, self._schedule_length(), trainer.max_epochs)
        frequency = plateau_frequency(scheduler, self.interval, self.monitor, trainer)
        settings = {"interval": self.interval, "frequency": frequency, "monitor": self.monitor}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **settings}}

    def _schedule_length(self) -> int:
        trainer = attached_trainer(self)
        if trainer is None:
            raise UnknownLengthError("scheduler has the length of a training, but the module has no Trainer")
        return training_length(trainer, self.interval)

    def _rate_factor(self) -> float:
        """Return the factor of the learning rate for the number of processes that have their own batches."""
        trainer = attached_trainer(self)
        if self.lr_scaling is None or trainer is None:
            return 1.0
        # The strategy knows which processes see different data: not all of them, if a model is split over GPUs.
        processes = int((trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1))
        return float(processes) if self.lr_scaling == "linear" else math.sqrt(processes)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients.

        The Trainer divides each loss by `accumulate_grad_batches`, also where fewer batches are left at the end of an
        epoch. Here each batch of a step has the same share of it.

        Args:
            loss: as the Trainer has divided it.
            args: for `torch.Tensor.backward`, as are `kwargs`.
            kwargs: see `args`.
        """
        share = self._share_of_step()
        super().backward(loss if share == 1 else loss * share, *args, **kwargs)

    def _share_of_step(self) -> float:
        """Return by how much more than `1/accumulate_grad_batches` a batch counts in the present optimizer step."""
        trainer = attached_trainer(self)
        if trainer is None or not self.automatic_optimization or trainer.strategy.handles_gradient_accumulation:
            return 1.0
        wanted, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
        if wanted == 1 or batches == math.inf:
            return 1.0
        first = (batch_progress(trainer).ready - 1) // wanted * wanted
        return float(wanted / min(wanted, int(batches) - first))
