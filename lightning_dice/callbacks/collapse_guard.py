"""Stops or warns when every prediction is empty."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_dice.callbacks.gradient_guard import _SHOWN, _check_count
from lightning_dice.callbacks.input_check import read_batch
from lightning_dice.callbacks.step_outputs import Activation, step_logits
from lightning_dice.functional import hard_sums

_CAUSES = (
    "From scratch, the Dice loss alone hardly finds small targets: its gradient vanishes where nothing overlaps. "
    "Other causes are a rate at which the network has died, images that are not normalized, and a smooth that is large "
    "against the objects, in pixels. Try loss=dice_ce, or loss.absent=penalize; a tenth of optimizer.lr, or "
    "scheduler=warmup_cosine; normalize=image; loss.smooth=1 or less; a larger data.batch_size. In the first epochs of "
    "a long training it may pass"
)


class CollapseError(ValueError):
    """Predictions that have been all alike for some validations."""


class CollapseGuard(Callback):
    """Say why, when a network predicts the same everywhere, validation after validation.

    Collapsed is a validation in which no pixel is predicted as any of the classes that count, although some are; or in
    which every pixel is predicted as one class (softmax), or as every class that counts (sigmoid), although not all
    are. Pixels are counted over all cases and all processes, without those that are ignored.

    After `patience` of them in a row it warns, once in a training, with what leads there and what to try; or it stops
    the training with `CollapseError`. The validation step must return `{"logits": (batch, classes, *space)}`. Masks of
    soft labels are passed over.

    Args:
        classes: names of the logits' channels.
        activation: what turns logits into probabilities.
        threshold: a probability; with `"softmax"` it has no part.
        ignore_index: the label of pixels that do not count.
        exclude_classes: indices of classes that do not count, such as the background.
        patience: validations in a row.
        action: `"warn"` or `"stop"`.

    Raises:
        ValueError: a setting out of its range.
        CollapseError: in training, with `action="stop"`.

    >>> guard = CollapseGuard(["background", "cell"], "softmax", exclude_classes=[0])
    >>> guard.collapse(predicted=[100, 0], actual=[90, 10], count=[100, 100])
    "no pixel has been predicted as 'cell', though the masks hold 10"
    >>> guard.collapse(predicted=[99, 1], actual=[90, 10], count=[100, 100])
    """

    def __init__(
        self,
        classes: Sequence[str],
        activation: Activation,
        threshold: float = 0.5,
        ignore_index: int | None = None,
        exclude_classes: Collection[int] = (),
        *,
        patience: int = 3,
        action: Literal["warn", "stop"] = "warn",
    ) -> None:
        if activation not in get_args(Activation):
            raise ValueError(f'activation must be "sigmoid" or "softmax", got {activation!r}')
        if action not in ("warn", "stop"):
            raise ValueError(f"action must be 'warn' or 'stop', got {action!r}")
        _check_count("patience", patience, 1)
        self.classes, self.activation, self.threshold = list(classes), activation, threshold
        self.ignore_index, self.exclude_classes = ignore_index, frozenset(exclude_classes)
        self.patience, self.action = patience, action
        self._counts: Tensor | None = None
        self._row, self._told = 0, False

    def state_dict(self) -> dict[str, Any]:
        """How many validations have been collapsed in a row, and whether it was said."""
        return {"row": self._row, "told": self._told}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._row, self._told = state_dict["row"], state_dict["told"]

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count."""
        self._counts = None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the pixels of each class, on the device."""
        logits, given = step_logits(outputs), read_batch(batch)
        if logits is None or given is None or given.mask.is_floating_point() or not _watched(trainer):
            return
        sums = hard_sums(
            logits, given.mask, activation=self.activation, threshold=self.threshold, ignore_index=self.ignore_index
        )
        counts = torch.stack([sums.predicted, sums.actual, sums.count]).sum(1)
        self._counts = counts if self._counts is None else self._counts + counts

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the validation."""
        if not _watched(trainer):
            return
        # A rank without a batch takes part too.
        counts = self._counts
        if counts is None:
            counts = torch.zeros(3, len(self.classes), dtype=torch.int64, device=pl_module.device)
        total: Any = trainer.strategy.reduce(counts, reduce_op="sum")
        collapsed = self.collapse(*total.tolist())
        self._row, self._counts = 0 if collapsed is None else self._row + 1, None
        if collapsed is None or self._row < self.patience:
            return
        message = f"for {self._row} validation{'s' * (self._row > 1)} in a row {collapsed}. {_CAUSES}"
        if self.action == "stop":
            raise CollapseError(message)
        if not self._told:
            self._told = True
            rank_zero_warn(message)

    def collapse(self, predicted: Sequence[int], actual: Sequence[int], count: Sequence[int]) -> str | None:
        """In what way predictions are all alike, though the masks are not; None if they are not.

        Args:
            predicted: pixels of each class in the predictions.
            actual: pixels of each class in the masks.
            count: pixels that count, for each class.
        """
        kept = [index for index in range(len(self.classes)) if index not in self.exclude_classes and count[index]]
        there = sum(actual[index] for index in kept)
        names = " or ".join(repr(self.classes[index]) for index in kept[:_SHOWN])
        if there and not any(predicted[index] for index in kept):
            return f"no pixel has been predicted as {names}, though the masks hold {there:,}"
        if self.activation == "softmax":
            for index in kept:
                if actual[index] < predicted[index] == count[index]:
                    share = actual[index] / count[index]
                    return f"every pixel has been predicted as {self.classes[index]!r}, though only {share:.1%} are"
        elif kept and all(predicted[index] == count[index] for index in kept):
            share = there / sum(count[index] for index in kept)
            if share < 1:
                every = names.replace(" or ", " and ")
                return f"every pixel has been predicted as {every}, though only {share:.1%} are"
        return None


def _watched(trainer: Trainer) -> bool:
    return trainer.state.fn == "fit" and not trainer.sanity_checking
