"""Base of the maps of a target, which tells ids from planes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_dice.argument_checks import check_count, check_label
from lightning_dice.kernels import Activation
from lightning_dice.kernels.sums import valid_pixels


@dataclass(frozen=True)
class TargetReader:
    """Base of the maps of a target: reads ids or planes as one mask for each class.

    A target is planes with a sigmoid, or if it is floating point or bool. Otherwise it is class ids; with
    `activation=None`, only if `classes` is given. A pixel is of a class if its soft label is at least 1/2. Ignored
    pixels are of no class.

    Args:
        activation: the loss's activation.
        classes: number of classes; needed with class ids.
        ignore_index: label of the pixels to ignore.
        exclude_classes: indices of classes to skip; their maps are 0 everywhere.

    Raises:
        ValueError: `classes` below 1, or an `ignore_index` that is no integer; in a call, ids without `classes`, or
            another number of planes.

    >>> TargetReader("softmax", classes=3).masks(torch.tensor([0, 2, 2])).int()
    tensor([[1, 0, 0],
            [0, 0, 0],
            [0, 1, 1]], dtype=torch.int32)
    """

    activation: Activation = "sigmoid"
    classes: int | None = None
    ignore_index: int | None = None
    exclude_classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.classes is not None:
            check_count("classes", self.classes, optional=True)
        check_label("ignore_index", self.ignore_index)

    def holds_ids(self, target: Tensor) -> bool:
        """Return whether a target is read as class ids."""
        if self.activation == "sigmoid" or target.is_floating_point() or target.dtype == torch.bool:
            return False
        return self.activation == "softmax" or self.classes is not None

    def valid(self, target: Tensor) -> Tensor | None:
        """Return the pixels of one image that are not ignored, of the shape of target; `None` if all are valid."""
        valid = valid_pixels(target, self.ignore_index)
        if valid is not None and self.activation == "softmax" and not self.holds_ids(target):
            valid = valid.all(0, keepdim=True).expand(target.shape)
        return valid

    def masks(self, target: Tensor) -> Tensor:
        """Return the mask of each class, bool `(classes, *space)`."""
        if self.holds_ids(target):
            if self.classes is None:
                raise ValueError("classes, the number of channels of the logits, is needed for a map of class ids")
            # Compared with uint8, class 256 would equal 0.
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

    def map_classes(self, function: Callable[[Any], Any], masks: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Apply a function of a bool array to the mask of each class that is not excluded, `(classes, *space)`."""
        result = torch.zeros(masks.shape, dtype=dtype)
        for index, mask in enumerate(masks.numpy()):
            if index not in self.exclude_classes:
                result[index] = torch.from_numpy(np.asarray(function(mask))).to(dtype)
        return result
