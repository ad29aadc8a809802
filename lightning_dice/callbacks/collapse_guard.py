"""Stop or warn when all predictions are alike."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_dice.argument_checks import check_choice, check_count, check_label
from lightning_dice.callbacks.step_outputs import Activation, step_logits
from lightning_dice.data.batch import find_batch
from lightning_dice.functional import hard_sums

_MAX_NAMES = 8  # of classes, in a message
_CAUSES = (
    "From scratch, the Dice loss alone hardly finds small targets: its gradient vanishes where nothing overlaps. "
    "Other causes are a learning rate that is too high, images that are not normalized, and a smooth that is large "
    "compared with the objects, in pixels. Try loss=dice_ce, or loss.absent=penalize; a tenth of optimizer.lr, or "
    "scheduler=warmup_cosine; normalize=image; loss.smooth=1 or less; a larger data.batch_size. In the first epochs of "
    "a long training it may be temporary"
)


class CollapseError(ValueError):
    """Raised when all predictions have been alike for several validations."""


class CollapseGuard(Callback):
    """Warn or stop when the network predicts the same class everywhere, validation after validation.

    A validation is collapsed if no pixel is predicted as any of the included classes, although some pixels are; or if
    every pixel is predicted as one class (softmax), or as every included class (sigmoid), although not all pixels are.
    Pixels are counted over all cases and all processes; ignored ones are excluded.

    After `patience` collapsed validations in a row the callback warns, once per run, with possible causes and
    remedies, or stops the training with `CollapseError`. The validation step must return
    `{"logits": (batch, classes, *space)}`. Masks of soft labels are not counted.

    Args:
        classes: names of the logits' channels.
        activation: for the logits, `"sigmoid"` or `"softmax"`.
        threshold: probability above which a pixel is predicted as a class; unused with `"softmax"`.
        ignore_index: label of ignored pixels.
        exclude_classes: indices of classes that are not included, such as the background.
        patience: number of collapsed validations in a row.
        action: `"warn"` or `"stop"`.

    Raises:
        ValueError: an argument is out of its range.
        CollapseError: in training, with `action="stop"`.

    >>> guard = CollapseGuard(["background", "cell"], "softmax", exclude_classes=[0])
    >>> guard.describe_collapse(predicted=[100, 0], actual=[90, 10], count=[100, 100])
    "no pixel has been predicted as 'cell', though the masks hold 10"
    >>> guard.describe_collapse(predicted=[99, 1], actual=[90, 10], count=[100, 100])
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
        self.classes, self.threshold = list(classes), threshold
        self.ignore_index = check_label("ignore_index", ignore_index)
        self.activation = check_choice("activation", activation, Activation)
        self.exclude_classes = frozenset(exclude_classes)
        self.patience = check_count("patience", patience)
        self.action = check_choice("action", action, ("warn", "stop"))
        self._counts: Tensor | None = None
        self._in_a_row, self._warned = 0, False

    def state_dict(self) -> dict[str, Any]:
        """Return the number of collapsed validations in a row, and whether the warning was issued."""
        return {"row": self._in_a_row, "told": self._warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self._in_a_row, self._warned = state_dict["row"], state_dict["told"]

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the counts."""
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
        logits, found = step_logits(outputs), find_batch(batch)
        if logits is None or found is None or found.mask.is_floating_point() or not _is_counted(trainer):
            return
        sums = hard_sums(
            logits, found.mask, activation=self.activation, threshold=self.threshold, ignore_index=self.ignore_index
        )
        counts = torch.stack([sums.predicted, sums.actual, sums.count]).sum(1)
        self._counts = counts if self._counts is None else self._counts + counts

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn or stop if the validation is collapsed."""
        if not _is_counted(trainer):
            return
        # A rank without a batch must reduce too.
        counts = self._counts
        if counts is None:
            counts = torch.zeros(3, len(self.classes), dtype=torch.int64, device=pl_module.device)
        total: Any = trainer.strategy.reduce(counts, reduce_op="sum")
        collapsed = self.describe_collapse(*total.tolist())
        self._in_a_row, self._counts = 0 if collapsed is None else self._in_a_row + 1, None
        if collapsed is None or self._in_a_row < self.patience:
            return
        message = f"for {self._in_a_row} validation{'s' * (self._in_a_row > 1)} in a row {collapsed}. {_CAUSES}"
        if self.action == "stop":
            raise CollapseError(message)
        if not self._warned:
            self._warned = True
            rank_zero_warn(message)

    def describe_collapse(self, predicted: Sequence[int], actual: Sequence[int], count: Sequence[int]) -> str | None:
        """Describe how the predictions are all alike although the masks are not; None if they differ.

        Args:
            predicted: number of pixels of each class in the predictions.
            actual: number of pixels of each class in the masks.
            count: number of pixels that are not ignored, for each class.
        """
        included = [index for index in range(len(self.classes)) if index not in self.exclude_classes and count[index]]
        present = sum(actual[index] for index in included)
        names = " or ".join(repr(self.classes[index]) for index in included[:_MAX_NAMES])
        if present and not any(predicted[index] for index in included):
            return f"no pixel has been predicted as {names}, though the masks hold {present:,}"
        if self.activation == "softmax":
            for index in included:
                if actual[index] < predicted[index] == count[index]:
                    share = actual[index] / count[index]
                    return f"every pixel has been predicted as {self.classes[index]!r}, though only {share:.1%} are"
        elif included and all(predicted[index] == count[index] for index in included):
            share = present / sum(count[index] for index in included)
            if share < 1:
                every = names.replace(" or ", " and ")
                return f"every pixel has been predicted as {every}, though only {share:.1%} are"
        return None


def _is_counted(trainer: Trainer) -> bool:
    """Return whether this is a validation within a fit, after the sanity check."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking
