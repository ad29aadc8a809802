"""Pictures that are too large to be decoded whole, as images for a network that are read by windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lightning_dice.data.images.image_format import ImageFormat
from lightning_dice.data.images.image_reader import Problem
from lightning_dice.data.images.windowed_tiff import LargePicture, tiff_pixels
from lightning_dice.data.transforms import Standardize

if TYPE_CHECKING:
    from typing_extensions import Self

LARGE = 100_000_000  # pixels

Stage = Callable[[Tensor], Tensor]


class LargeImage:
    """A TIFF as a float32 image `(channels, height, width)` whose windows are decoded when they are asked for.

    `image[..., rows, columns]`, with slices of step 1, gives the values that `image_format` gives of the whole picture.
    With `nodata`, the first window that holds such pixels takes one pass over the picture, for the mean that fills
    them. Not for several threads at once.

    Args:
        path: the file, as of `LargePicture`.
        image_format: what the network gets of a picture.

    Raises:
        DataError: as by `LargePicture`, and for other channels. Reading a window raises it where a tile cannot be
            decoded or holds values that are not finite.

    >>> import tempfile
    >>> import tifffile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "slide.tif"
    ...     tifffile.imwrite(path, np.full((300, 500, 3), 51, np.uint8), photometric="rgb", tile=(128, 128))
    ...     with LargeImage(path, ImageFormat(channels=3)) as image:
    ...         print(tuple(image.shape), image[..., 100:102, 200:201].flatten())
    (3, 300, 500) tensor([0.2000, 0.2000, 0.2000, 0.2000, 0.2000, 0.2000])
    """

    def __init__(self, path: Path, image_format: ImageFormat) -> None:
        self.path, self.image_format = path, image_format
        self.picture = LargePicture(path)
        self.height, self.width = self.picture.size
        self._stages: tuple[Stage, ...] = ()
        self._fill: NDArray[np.float64] | None = None
        image_format.image(self.picture.window(slice(0, 1), slice(0, 1)), 0.0)
        self.picture.forget()

    @property
    def shape(self) -> torch.Size:
        """`(channels, height, width)`."""
        return torch.Size((self.image_format.channels, self.height, self.width))

    @property
    def ndim(self) -> int:
        """3."""
        return 3

    @property
    def dtype(self) -> torch.dtype:
        """Of the windows."""
        return torch.float32

    def __getitem__(self, index: Any) -> Tensor:
        channels, rows, columns = _slices(index, self.shape)
        window = self.picture.window(rows, columns)
        if self._fill is None and self.image_format.missing(window) is not None:
            self._fill = self.image_format.means(self.picture)
        image = self.image_format.image(window, self._fill)
        for stage in self._stages:
            image = stage(image)
        return image[channels]

    def then(self, stage: Stage) -> LargeImage:
        """The same picture, of which every window goes through a function of its pixels; in place."""
        self._stages = (*self._stages, stage)
        return self

    def blocks(self) -> Iterator[Tensor]:
        """The whole picture from top to bottom, in pieces of full width."""
        for rows in self.picture.blocks():
            yield self[:, rows, :]

    def preview(self, longest: int = 2048) -> tuple[Tensor, int]:
        """Every n-th pixel of every n-th row, at most `longest` along an axis, and n."""
        step = -(-max(self.height, self.width) // longest)
        rows = [self[:, row : row + 1, :][..., ::step] for row in range(0, self.height, step)]
        return torch.cat(rows, dim=1), step

    def close(self) -> None:
        """Free what is kept of the file."""
        self.picture.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_large(path: Path, image_format: ImageFormat, limit: int = LARGE) -> LargeImage | None:
    """A picture that is to be read by windows, or `None`: it is no TIFF, or no larger than what is read whole.

    Args:
        path: of the file.
        image_format: what the network gets of it.
        limit: in pixels; at most `PIL.Image.MAX_IMAGE_PIXELS`, beyond which a file of any kind is not decoded whole.

    Raises:
        DataError: as by `LargeImage`; a file that has no readable header is left to who reads it whole.
    """
    pixels = tiff_pixels(path)
    if Image.MAX_IMAGE_PIXELS is not None:
        limit = min(limit, Image.MAX_IMAGE_PIXELS)
    return LargeImage(path, image_format) if pixels is not None and pixels > limit else None


def normalized(image: LargeImage, normalize: Stage | None) -> LargeImage:
    """Normalize as `normalize` does a whole image: the same values, to rounding, in every window.

    `Standardize` needs a pass over the picture first.

    Args:
        image: changed in place.
        normalize: `None`, `Standardize`, torchvision's `Normalize`, or a `Compose` of these.

    Raises:
        DataError: for another function, which may need the whole picture.
    """
    if normalize is None:
        return image
    if isinstance(normalize, v2.Compose):
        for part in normalize.transforms:
            normalized(image, part)
        return image
    if isinstance(normalize, v2.Normalize):
        return image.then(normalize)
    if isinstance(normalize, Standardize):
        return image.then(normalize.over(image.blocks()))
    what = f"is too large to be read whole, which normalization by {type(normalize).__name__} asks for"
    raise Problem(what, image.path, "Cut it into tiles, or train with normalize=image, fixed or imagenet.")


def _slices(index: Any, shape: torch.Size) -> tuple[slice, slice, slice]:
    """Slices of all three axes, with their ends."""
    given = list(index) if isinstance(index, tuple) else [index]
    if any(part is Ellipsis for part in given):
        place = next(i for i, part in enumerate(given) if part is Ellipsis)
        given[place : place + 1] = [slice(None)] * (len(shape) - len(given) + 1)
    given += [slice(None)] * (len(shape) - len(given))
    if len(given) != len(shape) or not all(isinstance(p, slice) and p.step in (None, 1) for p in given):
        raise IndexError(f"index must be slices of step 1 along channels, rows and columns, got {index!r}")
    ends = [part.indices(size) for part, size in zip(given, shape, strict=True)]
    channels, rows, columns = (slice(start, max(start, stop)) for start, stop, _ in ends)
    if rows.start == rows.stop or columns.start == columns.stop:
        raise IndexError(f"index must leave some pixels of {tuple(shape)}, got {index!r}")
    return channels, rows, columns
