"""Cases of images and masks that are files: whole, by windows, or cut into tiles."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_dice.data.batch import Sample
from lightning_dice.data.errors import DataProblem
from lightning_dice.data.images.annotators import Raters, fuse
from lightning_dice.data.images.file_layout import Pair
from lightning_dice.data.images.image_format import ImageFormat
from lightning_dice.data.images.image_reader import Picture, read_picture
from lightning_dice.data.images.mask_format import MaskFormat, OpenMask
from lightning_dice.data.images.windowed_tiff import LargePicture, open_windows
from lightning_dice.data.transforms import normalization_over

Window = tuple[slice, ...]
Normalize = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FolderCases:
    """The cases of one split of pairs of files; each is read when it is asked for.

    Attributes:
        pairs: images and masks.
        sizes: `(height, width)` of each image, upright.
        image_format: how images are stored.
        mask_format: how masks are stored.
        planes: the classes of a mask's planes; empty for masks of ids.
        raters: who made the masks, if several people did.
        way: what is made of their masks: `fusion` or `reference` of `Raters`.
    """

    pairs: Sequence[Pair]
    sizes: Sequence[tuple[int, ...]]
    image_format: ImageFormat
    mask_format: MaskFormat
    planes: Sequence[str] = ()
    raters: Raters | None = None
    way: str = "majority"

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        if self.is_large(index):
            height, width = self.sizes[index]
            what = f"is too large to be read whole: {height}x{width} pixels, more than {Image.MAX_IMAGE_PIXELS}"
            remedy = "Set data.read_size=[768,768] to train on windows of it, data.tile=4096 to score it in tiles."
            raise DataProblem(what, self.pairs[index].image, remedy)
        opened = OpenPair(self, self.pairs[index], whole=True)
        height, width = opened.size
        return opened.window((slice(0, height), slice(0, width)))._replace(whole=None)

    def open(self, index: int) -> OpenPair:
        """A case of which windows are read: from the file of a large TIFF, of other files decoded whole.

        Raises:
            DataError: a file cannot be read, or is too large to be decoded whole.
        """
        return OpenPair(self, self.pairs[index])

    def is_large(self, index: int) -> bool:
        """Whether an image is beyond what is decoded whole, `PIL.Image.MAX_IMAGE_PIXELS`."""
        height, width = self.sizes[index]
        return Image.MAX_IMAGE_PIXELS is not None and height * width > Image.MAX_IMAGE_PIXELS


class OpenPair:
    """An image and its masks, of which windows become samples: the values are those of the whole. Not for threads.

    Masks are opened when they are needed: of several raters, perhaps that of one.

    Args:
        cases: how both are stored, and what is made of several raters' masks.
        pair: their files.
        whole: decode them whole, whatever their size.

    Attributes:
        case: its name.
        size: height and width.

    Raises:
        DataError: a file cannot be read; in `window` and `labels` too.
    """

    def __init__(self, cases: FolderCases, pair: Pair, whole: bool = False) -> None:
        self.cases, self.pair, self.whole, self.case = cases, pair, whole, pair.case
        large = None if whole else open_windows(pair.image)
        self.image: Picture | LargePicture = read_picture(pair.image) if large is None else large
        self.size = self.image.size
        self._masks: dict[int, OpenMask] = {}
        self._fill: NDArray[Any] | None = None
        self._normalization: tuple[Normalize, Normalize] | None = None

    @property
    def nbytes(self) -> int:
        """What is kept in memory: the pixels of what was decoded whole, as stored."""
        return sum(part.nbytes for part in self._parts)

    @property
    def _parts(self) -> list[Picture | LargePicture | OpenMask]:
        return [self.image, *self._masks.values()]

    def window(self, window: Window) -> Sample:
        """Image and mask in some rows and columns, which must lie within.

        Of `fusion="random"` each window is by a rater of its own.
        """
        rows, columns = window
        picture = self.image.window(rows, columns)
        mask = self._mask(rows, columns)
        missing = self.cases.image_format.missing(picture)
        if missing is not None:
            mask = _ignoring(mask, torch.from_numpy(missing), self.cases.mask_format)
        sample = Sample(self._image(picture, missing is not None), mask, self.case, whole=self)
        for part in self._parts:  # The next window lies anywhere.
            part.forget()
        return sample

    def normalization(self, normalize: Normalize) -> Normalize:
        """What `normalize` does to the whole image; where that takes its statistics, by one pass, once."""
        if self._normalization is None or self._normalization[0] is not normalize:
            self._normalization = normalize, normalization_over(normalize, self._blocks)
        return self._normalization[1]

    def _blocks(self) -> Iterator[Tensor]:
        """The image from top to bottom, as the network sees it but for normalization."""
        for rows in self.image.blocks():
            picture = self.image.window(rows, slice(0, self.size[1]))
            yield self._image(picture, self.cases.image_format.missing(picture) is not None)
        self.image.forget()

    def _image(self, picture: Picture, holes: bool) -> Tensor:
        if holes and self._fill is None:
            self._fill = self.cases.image_format.means(self.image)
        return self.cases.image_format.image(picture, self._fill)

    def labels(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """Ids or planes by blocks of rows, and the flat index of a block's first pixel.

        Of `fusion="mean"` and `"random"` those of one rater after the other.
        """
        raters, columns = self.cases.raters, slice(0, self.size[1])
        alone = raters.chosen("mean") if raters is not None and self.cases.way in ("mean", "random") else []
        for rows in self.image.blocks():
            masks = [self._one(index, rows, columns) for index in alone] or [self._mask(rows, columns)]
            yield from ((rows.start * self.size[1], mask.numpy()) for mask in masks)
        for part in self._parts:
            part.forget()

    def _mask(self, rows: slice, columns: slice) -> Tensor:
        raters, way = self.cases.raters, self.cases.way
        if raters is None:
            return self._one(0, rows, columns)
        masks = [self._one(index, rows, columns) for index in raters.chosen(way)]
        if len(masks) == 1:
            return masks[0]
        return fuse(masks, "mean" if way == "mean" else "majority", self.cases.mask_format)

    def _one(self, index: int, rows: slice, columns: slice) -> Tensor:
        """The mask of one of several raters."""
        form, raters, files = self.cases.mask_format, self.cases.raters, self.pair.masks
        each = len(files) // (1 if raters is None else len(raters.files))
        numbers = range(index * each, (index + 1) * each)
        for number in numbers:
            if number not in self._masks:
                self._masks[number] = OpenMask(self.image, files[number], form, self.whole)
        stored = [plane for number in numbers for plane in self._masks[number].planes(rows, columns)]
        try:
            return form.encode(stored, bool(self.cases.planes))
        except ValueError as wrong:
            where = ", ".join(str(files[number]) for number in numbers)
            raise DataProblem(str(wrong), where, "Set data.label_map or data.classes.") from wrong


class TiledCases:
    """Cases of which the large ones are cut on a grid, each tile a case of its own.

    A tile is `tile` pixels high and wide; the last two along an axis share what is left, each more than half of that.
    Together they cover each pixel once. A tile is named after its first pixel: `<case>@<row>-<column>`. What is not cut
    keeps its name.

    Args:
        cases: whole.
        tile: pixels; images of more rows or columns are cut.

    >>> starts(8193, 4096), starts(4097, 4096), starts(4096, 4096)
    ([0, 4096, 6145], [0, 2049], [0])
    """

    def __init__(self, cases: FolderCases, tile: int) -> None:
        self.cases = cases
        self.sizes: list[tuple[int, ...]] = []
        self._tiles: list[tuple[int, Window]] = []
        self._names: list[str] = []
        for number, size in enumerate(cases.sizes):
            axes = []
            for length in size:
                first = starts(length, tile)
                axes.append([slice(a, b) for a, b in zip(first, [*first[1:], length], strict=True)])
            name, windows = cases.pairs[number].case, list(product(*axes))
            for window in windows:
                self._tiles.append((number, window))
                self._names.append(f"{name}@{window[0].start}-{window[1].start}" if len(windows) > 1 else name)
                self.sizes.append(tuple(part.stop - part.start for part in window))
        self._numbers = {name: number for number, name in enumerate(self._names)}
        # Neighbours come one after the other: what had to be decoded whole serves all tiles of an image.
        self._last = threading.local()

    def __len__(self) -> int:
        return len(self._tiles)

    def __getitem__(self, index: int) -> Sample:
        number, window = self._tiles[index]
        if self.sizes[index] == tuple(self.cases.sizes[number]):
            return self.cases[number]
        if getattr(self._last, "number", None) != number:
            self._last.opened, self._last.number = self.cases.open(number), number
        sample: Sample = self._last.opened.window(window)
        return sample._replace(case=self._names[index])

    def part(self, name: str) -> tuple[str, tuple[int, ...], Window]:
        """What a case is a part of: the name of that, its height and width, and the rows and columns."""
        number, window = self._tiles[self._numbers[name]]
        return self.cases.pairs[number].case, tuple(self.cases.sizes[number]), window

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _last=threading.local())


def starts(length: int, tile: int) -> list[int]:
    """Where the tiles of an axis begin, as in `TiledCases`."""
    if length <= tile:
        return [0]
    rest = (-(-length // tile) - 2) * tile
    return [*range(0, rest + 1, tile), rest + (length - rest + 1) // 2]


def _ignoring(mask: Tensor, where: Tensor, mask_format: MaskFormat) -> Tensor:
    label = mask_format.ignore_index
    if label is None:
        raise ValueError("nodata needs an ignore_index, by which masks say so; set data.ignore_index=255")
    fits = mask.is_floating_point() or torch.iinfo(mask.dtype).min <= label <= torch.iinfo(mask.dtype).max
    return (mask if fits else mask.int()).masked_fill(where, label)
