"""What is wrong with a batch, said on the first one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_dice.callbacks.scores import Activation, step_logits
from lightning_dice.data.batch import Batch


class InputCheck(Callback):
    """Look at the first batch of training and of validation, and refuse what would be trained on without a word.

    Later batches are not looked at: reading values back would stall a GPU at each step.

    Args:
        classes: names of the logits' channels.
        activation: what the loss applies to the logits; it decides the mask's form.
        ignore_index: the label of pixels that do not count.

    Raises:
        ValueError: during the fit: mask values outside the classes, image values or logits that are not finite, axes
            of image and mask that differ, logits with another number of channels. The message says how to mend it.
    """

    def __init__(self, classes: Sequence[str], activation: Activation, ignore_index: int | None = None) -> None:
        self.classes, self.activation, self.ignore_index = list(classes), activation, ignore_index
        self._seen: set[str] = set()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Check the batch, once."""
        if self._first("train"):
            self._check_batch(batch)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check the batch, once."""
        if self._first("val"):
            self._check_batch(batch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Check the logits, once."""
        logits = step_logits(outputs)
        if logits is not None and self._first("logits"):
            self._check_logits(logits)

    def _first(self, what: str) -> bool:
        first = what not in self._seen
        self._seen.add(what)
        return first

    def _check_batch(self, batch: Batch) -> None:
        image, mask = batch.image.detach().cpu(), batch.mask.detach().cpu()
        self._check_shapes(image, mask)
        for index, case in enumerate(batch.case):
            if not image[index].isfinite().all():
                raise ValueError(f"the image of case {case!r} has values that are not finite (NaN or infinite)")
            if not mask.is_floating_point():
                self._check_labels(mask[index], case)

    def _check_shapes(self, image: Tensor, mask: Tensor) -> None:
        space = tuple(image.shape[2:])
        planes = (image.shape[0], len(self.classes), *space)
        # Floating-point masks are soft labels, one plane for each class under either activation.
        expected = planes if self.activation == "sigmoid" or mask.is_floating_point() else (image.shape[0], *space)
        if tuple(mask.shape) != expected:
            raise ValueError(
                f"with {len(self.classes)} classes, activation={self.activation!r} and images of shape "
                f"{tuple(image.shape)} the mask must have the shape {expected}, got {tuple(mask.shape)}"
            )

    def _check_labels(self, mask: Tensor, case: str) -> None:
        found = torch.unique(mask).tolist()
        values = [value for value in found if value != self.ignore_index]
        if not values:
            warnings.warn(f"every pixel of the mask of case {case!r} is ignored: it teaches nothing", stacklevel=2)
        allowed = range(2) if self.activation == "sigmoid" else range(len(self.classes))
        wrong = [value for value in values if value not in allowed]
        if not wrong:
            return
        if wrong == [255] and set(values) <= {0, 255}:
            remedy = "the mask looks like a 0/255 picture: set 'data.values={255:1}'"
        else:
            remedy = (
                "map them with 'data.values={value:class,...}', or name the one to be ignored with data.ignore_index"
            )
        raise ValueError(
            f"the mask of case {case!r} holds the values {_some(wrong)}, outside {allowed[0]} to {allowed[-1]} "
            f"({_some(self.classes)}); {remedy}"
        )

    def _check_logits(self, logits: Tensor) -> None:
        if logits.shape[1] != len(self.classes):
            raise ValueError(
                f"the net returns logits with {logits.shape[1]} channels, {tuple(logits.shape)}, but there are "
                f"{len(self.classes)} classes ({_some(self.classes)}): set the net's number of output channels"
            )
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(
                "the net returns logits that are not finite on the first validation batch: look for a division by "
                "zero or a logarithm in the net, and try trainer.precision=32-true"
            )


def _some(items: Sequence[Any], limit: int = 8) -> str:
    shown = ", ".join(map(str, items[:limit]))
    return shown + (", ..." if len(items) > limit else "")
