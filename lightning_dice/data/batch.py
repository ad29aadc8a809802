"""What travels between a data set, a network and a loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Sample(NamedTuple):
    """One case, as a data set returns it.

    Attributes:
        image: float32, `(channels, *space)`.
        mask: integers. With `activation="softmax"` the class id of each pixel, `(*space)`; with `"sigmoid"`
            one 0/1 plane for each class, `(classes, *space)`. Pixels to be ignored hold the ignored label.
        case: the name by which scores and files know it, unique in its split.
    """

    image: Tensor
    mask: Tensor
    case: str


class Batch(NamedTuple):
    """Samples of one size, stacked.

    Attributes:
        image: float32, `(batch, channels, *space)`.
        mask: `(batch, *space)` class ids or `(batch, classes, *space)` planes, as in `Sample`.
        case: one name for each image.
    """

    image: Tensor
    mask: Tensor
    case: list[str]
