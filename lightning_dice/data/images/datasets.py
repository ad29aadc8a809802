"""Map-style data sets of image and mask files: whole images, windows of them, or tiles."""

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
from lightning_dice.data.images.file_layout import Pair
from lightning_dice.data.images.image_format import ImageFormat
from lightning_dice.data.images.image_reader import DecodedImage, read_image
from lightning_dice.data.images.mask_format import MaskFormat, OpenMask
from lightning_dice.data.images.raters import Raters, fuse
from lightning_dice.data.images.windowed_tiff import WindowedTiff, open_windowed_tiff
from lightning_dice.data.transforms import fit_normalization_to_blocks

Window = tuple[slice, ...]
Normalize = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FolderCases:
    """The cases of one split of image and mask files. Each is read when it is indexed.

    Attributes:
        pairs: images and masks.
        sizes: `(height, width)` of each image, upright.
        image_format: how images are stored.
        mask_format: how masks are stored.
        planes: the classes of a mask's planes; empty for masks of ids.
        raters: who made the masks, if each image has several.
        fusion: how their masks are combined: `fusion` or `reference` of `Raters`.

    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     image, mask = Path(folder) / "a.png", Path(folder) / "a_mask.png"
    ...     Image.new("L", (3, 2), 51).save(image)
    ...     Image.new("L", (3, 2), 1).save(mask)
    ...     pairs, classes = [Pair("a", image, (mask,))], MaskFormat(["background", "lesion"])
    ...     sample = FolderCases(pairs, [(2, 3)], ImageFormat(channels=1), classes)[0]
    >>> sample.case, sample.image.shape, sample.mask.tolist()
    ('a', torch.Size([1, 2, 3]), [[1, 1, 1], [1, 1, 1]])
    """

    pairs: Sequence[Pair]
    sizes: Sequence[tuple[int, ...]]
    image_format: ImageFormat
    mask_format: MaskFormat
    planes: Sequence[str] = ()
    raters: Raters | None = None
    fusion: str = "majority"

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
        return opened.read_region((slice(0, height), slice(0, width)))._replace(whole=None)

    def open(self, index: int) -> OpenPair:
        """Open a case to read windows of it: a large TIFF stays on disk, other files are decoded whole.

        Raises:
            DataError: a file cannot be read, or is too large to be decoded whole.
        """
        return OpenPair(self, self.pairs[index])

    def is_large(self, index: int) -> bool:
        """Return whether an image is too large to be decoded whole: more than `PIL.Image.MAX_IMAGE_PIXELS`."""
        height, width = self.sizes[index]
        return Image.MAX_IMAGE_PIXELS is not None and height * width > Image.MAX_IMAGE_PIXELS


class OpenPair:
    """An image and its masks, whose windows become samples. Not thread-safe.

    Pixels have the values that they have in the whole image. A mask is opened when it is first needed, since a sample
    may need only that of one rater.

    Args:
        cases: how both are stored, and how the masks of several raters are combined.
        pair: their files.
        whole: decode them whole, whatever their size.

    Attributes:
        case: its name.
        size: height and width.

    Raises:
        DataError: a file cannot be read; also from `read_region` and `mask_blocks`.
    """

    def __init__(self, cases: FolderCases, pair: Pair, whole: bool = False) -> None:
        self.cases, self.pair, self.whole, self.case = cases, pair, whole, pair.case
        windowed = None if whole else open_windowed_tiff(pair.image)
        self.image: DecodedImage | WindowedTiff = read_image(pair.image) if windowed is None else windowed
        self.size = self.image.size
        self._masks: dict[int, OpenMask] = {}
        self._fill: NDArray[Any] | None = None
        self._normalization: tuple[Normalize, Normalize] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes kept in memory: the stored pixels of files that were decoded whole, and cached tiles."""
        return sum(part.nbytes for part in self._opened)

    @property
    def _opened(self) -> list[DecodedImage | WindowedTiff | OpenMask]:
        return [self.image, *self._masks.values()]

    def read_region(self, region: Window) -> Sample:
        """Return image and mask in some rows and columns of the image.

        With `fusion="random"`, each window has a rater of its own.
        """
        rows, columns = region
        image = self.image.window(rows, columns)
        mask = self._mask(rows, columns)
        nodata = self.cases.image_format.nodata_mask(image)
        if nodata is not None:
            mask = _ignore_pixels(mask, torch.from_numpy(nodata), self.cases.mask_format)
        sample = Sample(self._to_tensor(image, nodata is not None), mask, self.case, whole=self)
        for part in self._opened:  # The next window may be anywhere.
            part.clear_cache()
        return sample

    def normalization(self, normalize: Normalize) -> Normalize:
        """Return what `normalize` does to the whole image; any statistics it needs take one pass, once."""
        if self._normalization is None or self._normalization[0] is not normalize:
            self._normalization = normalize, fit_normalization_to_blocks(normalize, self._blocks)
        return self._normalization[1]

    def _blocks(self) -> Iterator[Tensor]:
        """Yield the image from top to bottom, before normalization."""
        for rows in self.image.blocks():
            image = self.image.window(rows, slice(0, self.size[1]))
            yield self._to_tensor(image, self.cases.image_format.nodata_mask(image) is not None)
        self.image.clear_cache()

    def _to_tensor(self, image: DecodedImage, holes: bool) -> Tensor:
        if holes and self._fill is None:
            self._fill = self.cases.image_format.means(self.image)
        return self.cases.image_format.to_tensor(image, self._fill)

    def mask_blocks(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield ids or planes by blocks of rows, with the flat index of a block's first pixel.

        With `fusion="mean"` and `"random"`, yield each block of every rater.
        """
        raters, columns = self.cases.raters, slice(0, self.size[1])
        each = raters.mask_indices("mean") if raters is not None and self.cases.fusion in ("mean", "random") else []
        for rows in self.image.blocks():
            masks = [self._mask_of(index, rows, columns) for index in each] or [self._mask(rows, columns)]
            yield from ((rows.start * self.size[1], mask.numpy()) for mask in masks)
        for part in self._opened:
            part.clear_cache()

    def _mask(self, rows: slice, columns: slice) -> Tensor:
        raters, fusion = self.cases.raters, self.cases.fusion
        if raters is None:
            return self._mask_of(0, rows, columns)
        masks = [self._mask_of(index, rows, columns) for index in raters.mask_indices(fusion)]
        if len(masks) == 1:
            return masks[0]
        return fuse(masks, "mean" if fusion == "mean" else "majority", self.cases.mask_format)

    def _mask_of(self, rater: int, rows: slice, columns: slice) -> Tensor:
        """Return a window of the mask of one rater, by its position in `Raters.files`."""
        mask_format, raters, files = self.cases.mask_format, self.cases.raters, self.pair.masks
        each = len(files) // (1 if raters is None else len(raters.files))
        numbers = range(rater * each, (rater + 1) * each)
        for number in numbers:
            if number not in self._masks:
                self._masks[number] = OpenMask(self.image, files[number], mask_format, self.whole)
        stored = [plane for number in numbers for plane in self._masks[number].planes(rows, columns)]
        try:
            return mask_format.encode(stored, bool(self.cases.planes))
        except ValueError as error:
            where = ", ".join(str(files[number]) for number in numbers)
            raise DataProblem(str(error), where, "Set data.label_map or data.classes.") from error


class TiledCases:
    """Cases whose large images are cut into tiles on a grid; each tile is a case of its own.

    A tile is `tile` pixels high and wide; the last two along an axis share the remainder evenly. Together the tiles
    cover each pixel once. A tile is named after its first pixel, `<case>@<row>-<column>`; images that are not cut keep
    their names.

    Args:
        cases: whole images.
        tile: pixels; images with more rows or columns are cut.

    >>> from pathlib import Path
    >>> pairs = [Pair("scene", Path("scene.tif"), (Path("scene_mask.tif"),))]
    >>> cases = FolderCases(pairs, [(300, 100)], ImageFormat(), MaskFormat(["background", "road"]))
    >>> tiles = TiledCases(cases, tile=200)
    >>> tiles.sizes, tiles.locate("scene@150-0")
    ([(150, 100), (150, 100)], ('scene', (300, 100), (slice(150, 300, None), slice(0, 100, None))))
    """

    def __init__(self, cases: FolderCases, tile: int) -> None:
        self.cases = cases
        self.sizes: list[tuple[int, ...]] = []
        self._tiles: list[tuple[int, Window]] = []
        self._names: list[str] = []
        for number, size in enumerate(cases.sizes):
            axes = []
            for length in size:
                starts = tile_starts(length, tile)
                axes.append([slice(a, b) for a, b in zip(starts, [*starts[1:], length], strict=True)])
            name, windows = cases.pairs[number].case, list(product(*axes))
            for window in windows:
                self._tiles.append((number, window))
                self._names.append(f"{name}@{window[0].start}-{window[1].start}" if len(windows) > 1 else name)
                self.sizes.append(tuple(part.stop - part.start for part in window))
        self._numbers = {name: number for number, name in enumerate(self._names)}
        # Tiles are read in order, so an image that had to be decoded whole is kept for all of its tiles.
        self._last = threading.local()

    def __len__(self) -> int:
        return len(self._tiles)

    def __getitem__(self, index: int) -> Sample:
        number, window = self._tiles[index]
        if self.sizes[index] == tuple(self.cases.sizes[number]):
            return self.cases[number]
        if getattr(self._last, "number", None) != number:
            self._last.opened, self._last.number = self.cases.open(number), number
        sample: Sample = self._last.opened.read_region(window)
        return sample._replace(case=self._names[index])

    def locate(self, name: str) -> tuple[str, tuple[int, ...], Window]:
        """Return the image that a tile is cut from: its name, its height and width, and the tile's rows and columns."""
        number, window = self._tiles[self._numbers[name]]
        return self.cases.pairs[number].case, tuple(self.cases.sizes[number]), window

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _last=threading.local())


def tile_starts(length: int, tile: int) -> list[int]:
    """Return where the tiles of an axis begin, as in `TiledCases`.

    >>> tile_starts(8193, 4096), tile_starts(4097, 4096), tile_starts(4096, 4096)
    ([0, 4096, 6145], [0, 2049], [0])
    """
    if length <= tile:
        return [0]
    rest = (-(-length // tile) - 2) * tile
    return [*range(0, rest + 1, tile), rest + (length - rest + 1) // 2]


def _ignore_pixels(mask: Tensor, pixels: Tensor, mask_format: MaskFormat) -> Tensor:
    label = mask_format.ignore_index
    if label is None:
        raise ValueError("nodata needs an ignore_index to mark its pixels in masks; set data.ignore_index=255")
    fits = mask.is_floating_point() or torch.iinfo(mask.dtype).min <= label <= torch.iinfo(mask.dtype).max
    return (mask if fits else mask.int()).masked_fill(pixels, label)
