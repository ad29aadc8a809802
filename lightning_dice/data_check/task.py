"""The classes of a data set, and which pixels of a mask belong to each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """The meaning of a data set's masks.

    Attributes:
        classes: names of the logits' channels.
        activation: `"softmax"`: ids of mutually exclusive classes; `"sigmoid"`: a plane for each class.
        ignore_index: label of pixels that are not counted.
        exclude_classes: indices of classes that neither loss nor score counts, such as the background of a softmax.

    >>> task = Task(["background", "axon", "myelin"], "softmax")
    >>> task.counted, task.foreground
    ([0, 1, 2], [1, 2])
    """

    classes: Sequence[str]
    activation: Literal["softmax", "sigmoid"] = "softmax"
    ignore_index: int | None = 255
    exclude_classes: Sequence[int] = ()

    @property
    def counted(self) -> list[int]:
        """Indices of the classes that loss and score count."""
        return [index for index in range(len(self.classes)) if index not in self.exclude_classes]

    @property
    def foreground(self) -> list[int]:
        """Indices of the counted classes without the background: the first class of a softmax with such a name."""
        first = str(self.classes[0]).lower()
        has_background = self.activation == "softmax" and first in ("background", "bg", "other", "rest", "none")
        return [index for index in self.counted if index >= has_background]


def class_plane(mask: Tensor, index: int, axes: int, task: Task) -> Tensor:
    """Return where a mask has a class, bool `(*space)`; soft labels count if above 1/2.

    Args:
        mask: ids `(*space)` or planes `(classes, *space)`.
        index: the class's index.
        axes: number of space axes.
        task: the meaning of the mask.

    >>> class_plane(torch.tensor([[0, 1], [1, 255]]), 1, 2, Task(["background", "cell"])).tolist()
    [[False, True], [True, False]]
    """
    if mask.ndim == axes:
        return mask == index
    plane = mask[index]
    return (plane > 0.5) & ~ignored_pixels(plane, task)


def ignored_pixels(mask: Tensor, task: Task) -> Tensor:
    """Return where a mask has the ignored label, or NaN among soft labels.

    >>> ignored_pixels(torch.tensor([0, 1, 255]), Task(["background", "cell"])).tolist()
    [False, False, True]
    """
    found = torch.isnan(mask) if mask.is_floating_point() else torch.zeros_like(mask, dtype=torch.bool)
    return found if task.ignore_index is None else found | (mask == task.ignore_index)
