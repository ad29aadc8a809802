"""Samples, as data sets return them, and batches, as networks and losses take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


class WholeImage(Protocol):
    """The image that a sample was cut from."""

    def normalization(self, normalize: Callable[[Tensor], Tensor], /) -> Callable[[Tensor], Tensor]:
        """Return what `normalize` does to the whole image, as a function of its parts."""
        ...


class Sample(NamedTuple):
    """A case of a data set.

    For training, image and mask have the same space axes. For evaluation the mask is the case's own: where the image
    was resampled, their sizes differ, and logits are resized to the mask.

    Attributes:
        image: float32, `(channels, *space)`.
        mask: integers. With `activation="softmax"` the class id of each pixel, `(*space)`; with `"sigmoid"`
            one 0/1 plane for each class, `(classes, *space)`. Pixels to be ignored hold the ignored label.
        case: its name in scores and files, unique in its split.
        spacing: distance between neighbouring pixels of the mask along each axis, in mm; `None` if unknown.
        whole: the image that this was cut from, whose values normalize it; `None` if this is a whole image.
    """

    image: Tensor
    mask: Tensor
    case: str
    spacing: tuple[float, ...] | None = None
    whole: WholeImage | None = None


class _Batch(NamedTuple):
    image: Tensor
    mask: Tensor
    case: list[str]
    maps: dict[str, Tensor]
    spacing: list[Sequence[float] | None]
    weight: Tensor | None
    annotated: Tensor | None


class Batch(_Batch):
    """Images of one size with their masks and names, and whatever else the loss takes.

    Attributes:
        image: float32, `(batch, channels, *space)`.
        mask: `(batch, *space)` class ids or `(batch, classes, *space)` planes, as in `Sample`.
        case: one name for each image; `"0 of the batch"`, `"1 of the batch"` ... by default.
        maps: the target maps that `SegmentationData.maps` computes from the masks, stacked, by name; empty by default.
        spacing: each case's spacing, as in `Sample`; all unknown by default.
        weight: pixel weights, `(batch, *space)` or `(batch, classes, *space)`; `None` by default. See
            `SegmentationLoss.forward`, also for `annotated`.
        annotated: which classes each image has been annotated for, bool `(batch, classes)`; `None`: all.

    >>> import torch
    >>> batch = Batch(torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8), ["a", "b"])
    >>> batch.spacing
    [None, None]
    >>> batch.image_at(1).case
    ['b']
    """

    __slots__ = ()

    # Defaults of the fields would be one dict and one list for all batches.
    def __new__(
        cls,
        image: Tensor,
        mask: Tensor,
        case: Sequence[str] | None = None,
        maps: Mapping[str, Tensor] | None = None,
        spacing: Sequence[Sequence[float] | None] | None = None,
        weight: Tensor | None = None,
        annotated: Tensor | None = None,
    ) -> Self:
        """Fill in the defaults."""
        names = _default_names(len(image)) if case is None else list(case)
        spacings: list[Sequence[float] | None] = [None] * len(names) if spacing is None else list(spacing)
        return super().__new__(cls, image, mask, names, dict(maps or {}), spacings, weight, annotated)

    @property
    def has_names(self) -> bool:
        """Whether the cases have names of their own, which other batches do not repeat."""
        return self.case != _default_names(len(self.case))

    def select(self, images: slice) -> Batch:
        """Return a batch of some of the images.

        >>> import torch
        >>> Batch(torch.zeros(3, 1, 8, 8), torch.zeros(3, 8, 8), ["a", "b", "c"]).select(slice(1, None)).case
        ['b', 'c']
        """
        return Batch(
            self.image[images],
            self.mask[images],
            self.case[images],
            {name: values[images] for name, values in self.maps.items()},
            self.spacing[images],
            None if self.weight is None else self.weight[images],
            None if self.annotated is None else self.annotated[images],
        )

    def image_at(self, index: int) -> Batch:
        """Return the batch of one image."""
        return self.select(slice(index, index + 1))

    def spacing_of_image(self) -> list[list[float] | None]:
        """Return each image's pixel spacing, in mm, which differs from its mask's where images were resampled.

        >>> import torch
        >>> Batch(torch.zeros(1, 1, 4, 8), torch.zeros(1, 8, 8), ["a"], spacing=[(0.5, 0.5)]).spacing_of_image()
        [[1.0, 0.5]]
        """
        space = self.image.shape[2:]
        if all(steps is None for steps in self.spacing):
            return [None] * len(self.spacing)
        factors = [new / old for new, old in zip(self.mask.shape[-len(space) :], space, strict=True)]
        return [
            None if steps is None else [step * factor for step, factor in zip(steps, factors, strict=True)]
            for steps in self.spacing
        ]


def _default_names(images: int) -> list[str]:
    return [f"{index} of the batch" for index in range(images)]


def read_batch(batch: Any) -> Batch:
    """Return a batch of any usual form as a `Batch`.

    Args:
        batch: a `Batch`, a pair or triple `(image, mask[, case])`, or a mapping or named tuple with `image`, `mask` and
            perhaps other fields of a `Batch`. Names of cases may be text or integers, in a list or a tensor.

    Raises:
        ValueError: another form, an image that is not a tensor, or a `case` that does not name each image.

    >>> import torch
    >>> read_batch({"image": torch.zeros(1, 3, 4, 4), "mask": torch.zeros(1, 1, 4, 4)}).case
    ['0 of the batch']
    """
    if isinstance(batch, Batch):
        return batch
    fields = _fields(batch)
    case = fields.pop("case", None)
    if case is not None:
        names = _names(case)
        if names is None or len(names) != len(fields["image"]):
            shape = f" {tuple(case.shape)}" if isinstance(case, Tensor) else ""
            got = f"a {type(case).__name__}{shape}" if names is None else f"{len(names)} names"
            raise ValueError(
                f"case, the third part of a batch, must name each of the {len(fields['image'])} images, got {got}; for "
                "pixel weights and others, make the batch a mapping with image, mask, weight ..."
            )
        fields["case"] = names
    return Batch(**fields)


def _fields(batch: Any) -> dict[str, Any]:
    if isinstance(batch, tuple) and "image" in getattr(batch, "_fields", ()):
        batch = batch._asdict()  # type: ignore[attr-defined]
    if isinstance(batch, Mapping) and "image" in batch and "mask" in batch:
        fields = {name: batch[name] for name in Batch._fields if name in batch}
    elif isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        fields = dict(zip(Batch._fields, batch, strict=False))
    else:
        found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"a batch must be (image, mask[, case]) or a mapping with image and mask, got {found}")
    if not isinstance(fields["image"], Tensor):
        raise ValueError(f"the image of a batch must be a tensor, got {type(fields['image']).__name__}")
    return fields


def _names(case: Any) -> list[str] | None:
    """Return names of cases as text; `None` if they are no names."""
    if isinstance(case, Tensor):
        is_ids = case.ndim == 1 and not case.is_floating_point()
        return [str(number) for number in case.tolist()] if is_ids else None
    if isinstance(case, str):
        return [case]
    if not isinstance(case, (list, tuple)) or not all(isinstance(name, (str, int, PurePath)) for name in case):
        return None
    return [str(name) for name in case]


def find_batch(batch: Any) -> Batch | None:
    """Return what `read_batch` does, or `None` if its image or mask is not a tensor; without names that it refuses.

    >>> import torch
    >>> find_batch(torch.zeros(2, 3, 4, 4)) is None
    True
    """
    try:
        found = read_batch(batch)
    except ValueError:
        try:
            found = Batch(**{name: value for name, value in _fields(batch).items() if name != "case"})
        except ValueError:
            return None
    return found if isinstance(found.mask, Tensor) else None
