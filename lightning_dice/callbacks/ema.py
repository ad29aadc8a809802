"""Averaged weights: what is scored and kept is smoother than what the optimizer steps through."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class WeightEMA(WeightAveraging):
    r"""An exponential moving average of the weights (EMA), by Lightning's `WeightAveraging`.

    .. math:: \bar w_n = d_n \bar w_{n-1} + (1 - d_n) w_n, \qquad d_n = \min\left(d, \frac{1 + n}{10 + n}\right)

    Validation scores the averaged weights; checkpoints hold them as the module's `state_dict`, so that scoring,
    predicting and loading in a script need nothing of this, and the optimizer's own weights beside it, as
    `current_model_state`, from which a resumed training goes on exactly. When training ends the module has the averaged
    weights. The running statistics of batch norm are averaged in the same way.

    It departs from Lightning's `EMAWeightAveraging` 2.6, which

    - has d throughout, so that in a training of fewer than some 3/(1 - d) steps the average is mostly the beginning;
    - averages integer buffers too, which truncates them downwards, such as the indices in a Swin transformer;
    - keeps the average where the module lies before it is moved to the GPU, on the CPU;
    - loads the optimizer's weights instead of the averaged ones when the same Trainer tests a checkpoint after `fit`;
    - saves the two in each other's place if a checkpoint is saved during validation, as after an exception;
    - lacks the last step if one is saved at a batch's end by a callback before it.

    Args:
        decay: d, in [0, 1): 0.999 averages over some 1000 updates.
        warmup: let d grow from 0.1 as above; else it is d from the second update on.
        update_every_n_steps: optimizer steps between updates.
        device: where the average lies; by default where the module is trained. `"cpu"` saves GPU memory.

    Raises:
        ValueError: a number out of its range.

    >>> ema = WeightEMA(0.999)
    >>> [round(ema.decay_at(n), 3) for n in (0, 10, 100, 10_000)]
    [0.1, 0.55, 0.918, 0.999]
    """

    def __init__(
        self,
        decay: float = 0.999,
        *,
        warmup: bool = True,
        update_every_n_steps: int = 1,
        device: torch.device | str | int | None = None,
    ) -> None:
        if not isinstance(decay, (int, float)) or isinstance(decay, bool) or not 0 <= decay < 1:
            raise ValueError(f"decay must be a number in [0, 1), got {decay!r}")
        if not isinstance(warmup, bool):
            raise ValueError(f"warmup must be True or False, got {warmup!r}")
        every = update_every_n_steps
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"update_every_n_steps must be an integer >= 1, got {every!r}")
        super().__init__(device=device, use_buffers=True, multi_avg_fn=self._average)
        self.decay, self.warmup, self.update_every_n_steps = float(decay), warmup, every
        self._swapped = False

    def decay_at(self, updates: int) -> float:
        """The d after so many updates."""
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether the average takes in the weights of this optimizer step, from 0."""
        # The first is always taken: what would be scored otherwise are the weights before training.
        return step_idx is not None and step_idx % self.update_every_n_steps == 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the average."""
        if self._device is None:
            self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
        self._swapped = False
        if self._average_model is not None:
            # Read on every update: on a GPU each reading would wait for it.
            self._average_model.n_averaged = torch.zeros((), dtype=torch.long)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the averaged weights as the module's, and those of the optimizer beside them."""
        if self._average_model is not None and not self._swapped:
            # Whoever saves at a batch's end, as `SaveOnInterrupt` does, may come before the average of that step.
            self.on_train_batch_end(trainer, pl_module, None, None, 0)
            if self.state_key in checkpoint.get("callbacks", {}):
                checkpoint["callbacks"][self.state_key] = self.state_dict()
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._swapped and self._average_model is not None:
            averaged, current = checkpoint["current_model_state"], checkpoint["state_dict"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = averaged, current

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with both. What is scored are the averaged weights, which are the module's already."""
        if trainer.state.fn == "fit":
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module to whoever scores it next."""
        self._average_model = None

    def _swap_models(self, pl_module: LightningModule) -> None:
        super()._swap_models(pl_module)
        self._swapped = not self._swapped

    def _average(self, averaged: Any, current: Any, updates: Tensor | int) -> None:
        """Move tensors of one device and dtype towards the current ones."""
        if averaged[0].is_floating_point() or averaged[0].is_complex():
            done = 0 if self._average_model is None else int(self._average_model.n_averaged)
            # Not d·a + (1 - d)·b, by which a constant drifts.
            torch._foreach_lerp_(averaged, current, 1 - self.decay_at(done))
        else:
            torch._foreach_copy_(averaged, current)
