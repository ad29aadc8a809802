"""What travels between a data set, a network and a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


class Whole(Protocol):
    """The image that a sample is a part of."""

    def normalization(self, normalize: Callable[[Tensor], Tensor], /) -> Callable[[Tensor], Tensor]:
        """What `normalize` does to all of it, as a function for its parts."""
        ...


class Sample(NamedTuple):
    """One case, as a data set returns it.

    Attributes:
        image: float32, `(channels, *space)`.
        mask: integers. With `activation="softmax"` the class id of each pixel, `(*space)`; with `"sigmoid"`
            one 0/1 plane for each class, `(classes, *space)`. Pixels to be ignored hold the ignored label.
        case: the name by which scores and files know it, unique in its split.
        spacing: distance between neighbouring pixels of the mask along each axis, in mm; `None` where it is not known.
        whole: what this is a window of, and is normalized by; `None`: of nothing.

    For training, image and mask have the same space axes. For evaluation the mask is the case's own: where the image
    was resampled, their sizes differ, and logits are resized to the mask.
    """

    image: Tensor
    mask: Tensor
    case: str
    spacing: tuple[float, ...] | None = None
    whole: Whole | None = None


class _Batch(NamedTuple):
    image: Tensor
    mask: Tensor
    case: list[str]
    maps: dict[str, Tensor]
    spacing: list[tuple[float, ...] | None]


class Batch(_Batch):
    """Samples of one size, stacked.

    Attributes:
        image: float32, `(batch, channels, *space)`.
        mask: `(batch, *space)` class ids or `(batch, classes, *space)` planes, as in `Sample`.
        case: one name for each image.
        maps: what `SegmentationData.maps` says of the masks, by name, stacked; empty by default.
        spacing: that of each case, as in `Sample`; all unknown by default.
    """

    __slots__ = ()

    # A default of the class would be one dict for all batches.
    def __new__(
        cls,
        image: Tensor,
        mask: Tensor,
        case: list[str],
        maps: Mapping[str, Tensor] | None = None,
        spacing: Sequence[tuple[float, ...] | None] | None = None,
    ) -> Self:
        """A dict of its own for each."""
        known: list[tuple[float, ...] | None] = [None] * len(case)
        if spacing is not None:
            known = list(spacing)
        return super().__new__(cls, image, mask, case, dict(maps or {}), known)
