"""How a target is read, ids or planes, by what is computed of it beside the sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_dice.argument_checks import check_count
from lightning_dice.kernels import Activation
from lightning_dice.kernels.sums import valid_pixels


@dataclass(frozen=True)
class TargetReader:
    """How a target is told to be ids or planes, and where it holds a class: what all maps of targets share.

    A target is planes with a sigmoid, and where it is floating point or bool; otherwise it is ids, but with
    `activation=None` only if the number of classes is given. A class is where its soft label is at least 1/2. Ignored
    pixels are of no class.

    Args:
        activation: of the loss.
        classes: how many there are; needed with class ids.
        ignore_index: the label of pixels that count as nothing.
        exclude_classes: indices of classes that are not computed but 0 everywhere.

    Raises:
        ValueError: a number of classes below 1; in a call, ids without one, or planes of another.
    """

    activation: Activation = "sigmoid"
    classes: int | None = None
    ignore_index: int | None = None
    exclude_classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.classes is not None:
            check_count("classes", self.classes, optional=True)

    def holds_ids(self, target: Tensor) -> bool:
        """Whether a target is taken for class ids."""
        if self.activation == "sigmoid" or target.is_floating_point() or target.dtype == torch.bool:
            return False
        return self.activation == "softmax" or self.classes is not None

    def valid(self, target: Tensor) -> Tensor | None:
        """Where the target of one image is not ignored, `(*space)` or `(classes, *space)`; `None`: everywhere."""
        valid = valid_pixels(target, self.ignore_index)
        if valid is not None and self.activation == "softmax" and not self.holds_ids(target):
            valid = valid.all(0, keepdim=True).expand(target.shape)
        return valid

    def masks(self, target: Tensor) -> Tensor:
        """Where each class is, bool `(classes, *space)`."""
        if self.holds_ids(target):
            if self.classes is None:
                raise ValueError("classes, the number of channels of the logits, is needed for a map of class ids")
            # An ignored label may be a class's id: it is not that class.
            # Compared with uint8, torch takes class 256 for 0.
            ids = target.long() if self.classes - 1 > torch.iinfo(target.dtype).max else target
            masks = torch.stack([ids == index for index in range(self.classes)])
        else:
            if self.classes is not None and target.shape[0] != self.classes:
                raise ValueError(
                    f"target must have a plane for each of the {self.classes} classes, got the shape "
                    f"{tuple(target.shape)}"
                )
            masks = target if target.dtype == torch.bool else target >= 0.5
        valid = self.valid(target)
        return masks if valid is None else masks & valid

    def of_each_class(
        self, function: Callable[[Any], Any], masks: Tensor, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """What a function of a bool array says of each class, `(classes, *space)`."""
        result = torch.zeros(masks.shape, dtype=dtype)
        for index, mask in enumerate(masks.numpy()):
            if index not in self.exclude_classes:
                result[index] = torch.from_numpy(np.asarray(function(mask))).to(dtype)
        return result
