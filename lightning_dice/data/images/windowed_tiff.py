"""TIFFs of which windows are decoded, and the rest is not: in tiles, in strips or uncompressed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lightning_dice.data.errors import DataProblem
from lightning_dice.data.images.image_format import ImageFormat
from lightning_dice.data.images.image_reader import ORIENTATION, TIFF, Picture, page_picture
from lightning_dice.data.transforms import Standardize

if TYPE_CHECKING:
    from typing_extensions import Self

LARGE = 100_000_000  # pixels
Stage = Callable[[Tensor], Tensor]


WINDOWED = 2**22  # pixels: up to here decoding all of a file costs hardly more than a window
PIECE = 2**30  # bytes, the most that a row of tiles, or a strip, may hold once decoded
RATIO = 2000  # deflate reaches 1032, and a picture's tags count too
BLOCK = 2**22  # pixels in one step over a whole picture
JPEG = (6, 7, 34892, 33007)


class LargePicture:
    """A TIFF whose windows are decoded when they are asked for.

    The tiles or strips that the last window touched, and those decoded before in the same rows, are kept as stored:
    windows that are read row by row, overlapping or not, have each decoded once, with a memory of the width times the
    depth of a window. The file is open only while it is read, so that processes and pickles have nothing to share. Not
    for several threads at once.

    Args:
        path: the file: one picture, whatever its compression.

    Attributes:
        size: height and width.
        turned: never.
        piece: pixels that are decoded together: of a tile, or a strip; 1 where nothing is compressed.

    Raises:
        DataError: the file is truncated, of several pictures, compressed in one piece, stored turned, or more
            compressed than a picture can be. Reading a window raises it where a tile cannot be decoded.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "slide.tif"
    ...     tifffile.imwrite(path, np.eye(300, 500, dtype=np.uint8), tile=(128, 128), compression="zlib")
    ...     picture = LargePicture(path)
    ...     print(picture.size, picture.window(slice(100, 102), slice(99, 103)).pixels[..., 0].tolist())
    (300, 500) [[0, 1, 0, 0], [0, 0, 1, 0]]
    """

    turned = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tiles: dict[tuple[int, int, int], NDArray[Any]] = {}
        try:
            with tifffile.TiffFile(path) as tiff:
                self._look(tiff)
        except DataProblem:
            raise
        except OSError as error:
            raise DataProblem(f"cannot be opened ({error.strerror})", path) from error
        except Exception as error:  # tifffile raises whatever a damaged header brings up.
            raise DataProblem(f"cannot be decoded ({type(error).__name__}: {error})", path, "Copy it again.") from error

    def _look(self, tiff: tifffile.TiffFile) -> None:
        # Reduced copies and transparency masks come along as pages of their own: bits 0 and 2.
        pages: list[Any] = [p for p in tiff.pages if not int(getattr(p, "subfiletype", 0)) & 0b101]
        if len(pages) != 1 or pages[0].imagedepth != 1:
            raise DataProblem(
                f"holds {len(pages)} pictures, one is required", self.path, "Save each as a file of its own."
            )
        self._page = page = pages[0]
        self._planes, _, height, width, self._samples = page.shaped
        self.size: tuple[int, int] = (height, width)
        turn = page.tags.valueof(ORIENTATION, default=1)
        if turn in range(2, 9):
            what = f"is stored turned (orientation tag {turn}), and with {height}x{width} pixels too large"
            raise DataProblem(f"{what} to be turned in memory", self.path, "Save it upright.")
        self._offsets, self._counts = page.dataoffsets, page.databytecounts
        found = tiff.filehandle.size
        ends = [start + count for start, count in zip(self._offsets, self._counts, strict=True)]
        if not ends or max(ends) > found:
            what = f"is truncated: {max(ends, default=0)} bytes expected, {found} found"
            raise DataProblem(what, self.path, "Copy it again.")
        row = self._planes * width * self._samples * page.dtype.itemsize
        if height * row > RATIO * found:
            what = f"may be a decompression bomb: {height * row} bytes of pixels in a file of {found}"
            raise DataProblem(what, self.path)
        plain = page.is_contiguous and page.compression == 1 and page.fillorder == 1 and page.bitspersample >= 8
        self._plain = page.dtype.newbyteorder(tiff.byteorder) if plain else None
        self._tile = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, height), width)
        self.piece = 1 if plain else self._tile[0] * self._tile[1]
        if not plain and self._tile[0] * row > PIECE:
            what = f"is compressed in pieces of {self._tile[0]} rows, {self._tile[0] * row} bytes each: too large"
            raise DataProblem(f"{what} to be read", self.path, "Save it in tiles of 512x512 pixels or so.")
        tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.compression in JPEG else {}
        self._decode: Callable[..., Any] = page.decode
        self._tables = tables
        # What the tags say of the pixels' meaning is read now, while the file is open.
        self.kind = self.window(slice(0, 1), slice(0, 1)).kind
        self.dtype: np.dtype[Any] = page.dtype
        self.forget()

    @property
    def nbytes(self) -> int:
        """What is kept in memory, as far as it matters: the places of the tiles, in Python's numbers, and the tiles."""
        return 80 * len(self._offsets) + sum(tile.nbytes for tile in self._tiles.values())

    def window(self, rows: slice, columns: slice) -> Picture:
        """A part of the picture, as `read_picture` gives it of the whole."""
        (top, bottom, _), (left, right, _) = rows.indices(self.size[0]), columns.indices(self.size[1])
        return page_picture(self.path, self._page, self._stored(top, bottom, left, right))

    def blocks(self) -> Iterator[slice]:
        """Rows from top to bottom, in steps that a memory holds at full width."""
        step = max(1, BLOCK // self.size[1])
        return (slice(start, min(start + step, self.size[0])) for start in range(0, self.size[0], step))

    def forget(self) -> None:
        """Free what the last windows have left."""
        self._tiles.clear()

    def _stored(self, top: int, bottom: int, left: int, right: int) -> NDArray[Any]:
        """Samples as stored, `(height, width, samples)`."""
        found = np.empty((bottom - top, right - left, self._planes * self._samples), self._page.dtype)
        if self._plain is not None:
            shape = (self._planes, *self.size, self._samples)
            stored = np.memmap(self.path, self._plain, "r", self._offsets[0], shape)[:, top:bottom, left:right]
            for plane in range(self._planes):
                found[..., plane * self._samples : (plane + 1) * self._samples] = stored[plane]
            return found
        length, width = self._tile
        bands = range(top // length, -(-bottom // length))
        # What lies above is not asked for again by windows that go down.
        self._tiles = {place: tile for place, tile in self._tiles.items() if place[1] in bands}
        with self.path.open("rb") as file:
            for plane in range(self._planes):
                samples = slice(plane * self._samples, (plane + 1) * self._samples)
                for band in bands:
                    for column in range(left // width, -(-right // width)):
                        tile = self._tiles.get((plane, band, column))
                        if tile is None:
                            tile = self._tiles[plane, band, column] = self._read(file, plane, band, column)
                        y, x = band * length, column * width
                        part = tile[max(0, top - y) : bottom - y, max(0, left - x) : right - x]
                        y, x = max(y, top) - top, max(x, left) - left
                        found[y : y + part.shape[0], x : x + part.shape[1], samples] = part
        return found

    def _read(self, file: IO[bytes], plane: int, band: int, column: int) -> NDArray[Any]:
        """A tile, or a strip, `(height, width, samples)`; what a tile has beyond the picture's border may be left."""
        (length, width), (tall, wide) = self._tile, self.size
        index = (plane * -(-tall // length) + band) * -(-wide // width) + column
        height, width = min(length, tall - band * length), min(width, wide - column * width)
        try:
            if not self._counts[index]:  # Nothing is stored where nothing is to be seen.
                return np.full((height, width, self._samples), self._page.nodata, self._page.dtype)
            file.seek(self._offsets[index])
            tile = self._decode(file.read(self._counts[index]), index, **self._tables)[0]
            return np.asarray(tile[0, :height, :width])
        except Exception as error:  # Decoders raise whatever their format brings up.
            what = f"cannot be decoded from row {band * length} on ({type(error).__name__}: {error})"
            raise DataProblem(what, self.path, "Copy it again or remove it.") from error


def tiff_pixels(path: Path) -> int | None:
    """How many pixels the first picture of a TIFF has; `None` for what is no TIFF, or has no readable header."""
    try:
        with path.open("rb") as file:
            if file.read(4) not in TIFF:
                return None
        with tifffile.TiffFile(path) as tiff:
            return int(tiff.pages.first.imagelength * tiff.pages.first.imagewidth)
    except Exception:  # Whoever reads it whole says what is wrong with it.
        return None


def open_windows(path: Path, least: int | None = None) -> LargePicture | None:
    """A picture to read windows of, or `None` where it is better, or only, decoded whole.

    Args:
        path: of the file.
        least: pixels; smaller ones are decoded whole, by default those of up to `WINDOWED`.

    Raises:
        DataError: as by `LargePicture`, of a TIFF too large to be decoded whole.
    """
    pixels = tiff_pixels(path)
    if pixels is None or pixels <= (WINDOWED if least is None else least):
        return None
    whole = Image.MAX_IMAGE_PIXELS is None or pixels <= Image.MAX_IMAGE_PIXELS
    try:
        picture = LargePicture(path)
    except DataProblem:
        if whole:  # Who reads it whole can, or tells why not.
            return None
        raise
    return None if whole and picture.piece > WINDOWED else picture


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
    raise DataProblem(what, image.path, "Cut it into tiles, or train with normalize=image, fixed or imagenet.")


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
