"""Keep an exponential moving average of the weights, and score and save the average."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_dice.argument_checks import check_count, check_flag
from lightning_dice.library_internals.lightning import AccessibleWeightAveraging
from lightning_dice.library_internals.torch import foreach_copy_, foreach_lerp_


class WeightEMA(AccessibleWeightAveraging):
    r"""Keep an exponential moving average (EMA) of the weights, built on Lightning's `WeightAveraging`.

    .. math:: \bar w_n = d_n \bar w_{n-1} + (1 - d_n) w_n, \qquad d_n = \min\left(d, \frac{1 + n}{10 + n}\right)

    Validation scores the averaged weights. Checkpoints hold them as the module's `state_dict`, so that scoring,
    predicting and loading in a script need no EMA; the weights that the optimizer steps are saved beside them as
    `current_model_state`, from which a resumed run continues exactly. When training ends, the module has the
    averaged weights. Running statistics of batch norm are averaged in the same way.

    It departs from Lightning's `EMAWeightAveraging` 2.6, which

    - uses d from the start, so that in a run of fewer than about 3/(1 - d) steps the average is mostly the initial
      weights;
    - averages integer buffers too, such as the indices in a Swin transformer, which rounds them down;
    - keeps the average on the CPU, where the module was before it moved to the GPU;
    - loads the optimizer's weights instead of the averaged ones when the same Trainer tests a checkpoint after `fit`;
    - swaps the two in a checkpoint saved during validation, for example after an exception;
    - misses the last step in a checkpoint that an earlier callback saves at the end of a batch.

    Args:
        decay: d, in [0, 1): 0.999 averages over about 1000 updates.
        warmup: let d grow from 0.1 as above; otherwise it is `decay` from the second update on.
        update_every_n_steps: optimizer steps between updates.
        device: where the average is kept; by default the training device. `"cpu"` saves GPU memory.

    Raises:
        ValueError: an argument is out of its range.

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
        self.decay, self.warmup = float(decay), check_flag("warmup", warmup)
        self.update_every_n_steps = check_count("update_every_n_steps", update_every_n_steps)
        super().__init__(device=device, use_buffers=True, multi_avg_fn=self._average)

    def decay_at(self, updates: int) -> float:
        """Return d after a number of updates."""
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Return whether the average includes the weights of an optimizer step, counted from 0."""
        # Always the first one: otherwise the weights from before the training would be scored.
        return step_idx is not None and step_idx % self.update_every_n_steps == 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Create the average."""
        self.set_default_device(trainer.strategy.root_device)
        super().setup(trainer, pl_module, stage)
        self.swapped = False
        if self.average_model is not None:
            # Read at every update, which on a GPU would wait for it.
            self.average_model.n_averaged = torch.zeros((), dtype=torch.long)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the averaged weights as the module's, and the optimizer's beside them."""
        if self.average_model is not None and not self.swapped:
            # A callback that saves at the end of a batch, as `SaveOnInterrupt` does, may run before this step's update.
            self.on_train_batch_end(trainer, pl_module, None, None, 0)
            if self.state_key in checkpoint.get("callbacks", {}):
                checkpoint["callbacks"][self.state_key] = self.state_dict()
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self.swapped and self.average_model is not None:
            averaged, current = checkpoint["current_model_state"], checkpoint["state_dict"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = averaged, current

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Load both kinds of weights to train; to score, the module's `state_dict` is the average already."""
        if trainer.state.fn == "fit":
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Drop the average, so that the module is scored with its current weights."""
        self.drop_average_model()

    def _average(self, averaged: Any, current: Any, updates: Tensor | int) -> None:
        """Move tensors of one device and dtype towards the current ones."""
        if averaged[0].is_floating_point() or averaged[0].is_complex():
            done = 0 if self.average_model is None else int(self.average_model.n_averaged)
            # Not d·a + (1 - d)·b, by which a constant drifts.
            foreach_lerp_(averaged, current, 1 - self.decay_at(done))
        else:
            foreach_copy_(averaged, current)
