"""Read windows of large TIFFs without decoding the rest: in tiles, in strips or uncompressed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lightning_dice.data.errors import DataProblem
from lightning_dice.data.images.image_format import ImageFormat
from lightning_dice.data.images.image_reader import ORIENTATION, TIFF, DecodedImage, image_from_tiff_page
from lightning_dice.data.images.tiff_library import tifffile_for
from lightning_dice.data.transforms import Standardize
from lightning_dice.extras import MissingExtra

if TYPE_CHECKING:
    from typing_extensions import Self

LARGE = 100_000_000  # pixels; prediction reads larger TIFFs by windows
WINDOWED = 2**22  # pixels; decoding a smaller file takes hardly longer than decoding a window of it
MAX_CHUNK_BYTES = 2**30  # the most that a row of tiles, or a strip, may hold once decoded
MAX_COMPRESSION = 2000  # deflate reaches 1032, and the file's tags count too
BLOCK_PIXELS = 2**22  # in one step of a pass over an image
JPEG = (6, 7, 34892, 33007)
Stage = Callable[[Tensor], Tensor]


class WindowedTiff:
    """A TIFF whose windows are decoded on demand. Not thread-safe.

    The tiles or strips of the last window, and those decoded before in the same rows, are cached as stored: reading
    windows row by row, overlapping or not, decodes each tile once, and needs memory for the image's width times a
    window's height. The file is open only while it is read, so that there is nothing to share between processes, and
    nothing that cannot be pickled.

    Args:
        path: the file, of one image, in any compression.

    Attributes:
        size: height and width.
        kind: depth and colour, as of a `DecodedImage`.
        turned: always false; turned images are refused.
        chunk_pixels: pixels that are decoded together, in one tile or strip; 1 if the file is not compressed.

    Raises:
        DataError: the file is truncated, holds several images, is compressed in one piece, stored turned, or more
            compressed than an image can be. Reading a window raises it if a tile cannot be decoded.

    >>> import tempfile
    >>> import tifffile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "slide.tif"
    ...     tifffile.imwrite(path, np.eye(300, 500, dtype=np.uint8), tile=(128, 128), compression="zlib")
    ...     image = WindowedTiff(path)
    ...     print(image.size, image.window(slice(100, 102), slice(99, 103)).pixels[..., 0].tolist())
    (300, 500) [[0, 1, 0, 0], [0, 0, 1, 0]]
    """

    turned = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tiles: dict[tuple[int, int, int], NDArray[Any]] = {}
        try:
            with tifffile_for(path).TiffFile(path) as tiff:
                self._read_header(tiff)
        except (DataProblem, MissingExtra):
            raise
        except OSError as error:
            raise DataProblem(f"cannot be opened ({error.strerror})", path) from error
        except Exception as error:  # tifffile raises anything for a damaged header.
            raise DataProblem(f"cannot be decoded ({type(error).__name__}: {error})", path, "Copy it again.") from error

    def _read_header(self, tiff: Any) -> None:
        # Reduced copies and transparency masks are pages of their own: bits 0 and 2.
        pages: list[Any] = [p for p in tiff.pages if not int(getattr(p, "subfiletype", 0)) & 0b101]
        if len(pages) != 1 or pages[0].imagedepth != 1:
            raise DataProblem(
                f"holds {len(pages)} images, but one is required", self.path, "Save each as a file of its own."
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
        if height * row > MAX_COMPRESSION * found:
            what = f"may be a decompression bomb: {height * row} bytes of pixels in a file of {found}"
            raise DataProblem(what, self.path)
        plain = page.is_contiguous and page.compression == 1 and page.fillorder == 1 and page.bitspersample >= 8
        self._plain = page.dtype.newbyteorder(tiff.byteorder) if plain else None
        self._tile = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, height), width)
        self.chunk_pixels = 1 if plain else self._tile[0] * self._tile[1]
        if not plain and self._tile[0] * row > MAX_CHUNK_BYTES:
            what = f"is compressed in pieces of {self._tile[0]} rows, {self._tile[0] * row} bytes each: too large"
            raise DataProblem(f"{what} to be read", self.path, "Save it in tiles of 512x512 pixels or so.")
        tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.compression in JPEG else {}
        self._decode: Callable[..., Any] = page.decode
        self._tables = tables
        # The tags that describe the pixels are read now, while the file is open.
        self.kind = self.window(slice(0, 1), slice(0, 1)).kind
        self.dtype: np.dtype[Any] = page.dtype
        self.clear_cache()

    @property
    def nbytes(self) -> int:
        """Bytes kept in memory, approximately: cached tiles, and the offsets of all tiles as Python numbers."""
        return 80 * len(self._offsets) + sum(tile.nbytes for tile in self._tiles.values())

    def window(self, rows: slice, columns: slice) -> DecodedImage:
        """Return a part of the image, as `read_image` returns the whole."""
        (top, bottom, _), (left, right, _) = rows.indices(self.size[0]), columns.indices(self.size[1])
        return image_from_tiff_page(self.path, self._page, self._read_samples(top, bottom, left, right))

    def blocks(self) -> Iterator[slice]:
        """Yield rows from top to bottom, in steps that fit into memory at full width."""
        step = max(1, BLOCK_PIXELS // self.size[1])
        return (slice(start, min(start + step, self.size[0])) for start in range(0, self.size[0], step))

    def clear_cache(self) -> None:
        """Free the cached tiles."""
        self._tiles.clear()

    def _read_samples(self, top: int, bottom: int, left: int, right: int) -> NDArray[Any]:
        """Return the stored samples of a window, `(height, width, samples)`."""
        found = np.empty((bottom - top, right - left, self._planes * self._samples), self._page.dtype)
        if self._plain is not None:
            shape = (self._planes, *self.size, self._samples)
            stored = np.memmap(self.path, self._plain, "r", self._offsets[0], shape)[:, top:bottom, left:right]
            for plane in range(self._planes):
                found[..., plane * self._samples : (plane + 1) * self._samples] = stored[plane]
            return found
        length, width = self._tile
        bands = range(top // length, -(-bottom // length))
        # Windows are read downwards, so the tiles above are not needed again.
        self._tiles = {place: tile for place, tile in self._tiles.items() if place[1] in bands}
        with self.path.open("rb") as file:
            for plane in range(self._planes):
                samples = slice(plane * self._samples, (plane + 1) * self._samples)
                for band in bands:
                    for column in range(left // width, -(-right // width)):
                        tile = self._tiles.get((plane, band, column))
                        if tile is None:
                            tile = self._tiles[plane, band, column] = self._decode_tile(file, plane, band, column)
                        y, x = band * length, column * width
                        part = tile[max(0, top - y) : bottom - y, max(0, left - x) : right - x]
                        y, x = max(y, top) - top, max(x, left) - left
                        found[y : y + part.shape[0], x : x + part.shape[1], samples] = part
        return found

    def _decode_tile(self, file: IO[bytes], plane: int, band: int, column: int) -> NDArray[Any]:
        """Return a tile or a strip, `(height, width, samples)`, cut off at the image's border."""
        (length, width), (tall, wide) = self._tile, self.size
        index = (plane * -(-tall // length) + band) * -(-wide // width) + column
        height, width = min(length, tall - band * length), min(width, wide - column * width)
        try:
            if not self._counts[index]:  # An empty tile is not stored.
                return np.full((height, width, self._samples), self._page.nodata, self._page.dtype)
            file.seek(self._offsets[index])
            tile = self._decode(file.read(self._counts[index]), index, **self._tables)[0]
            return np.asarray(tile[0, :height, :width])
        except Exception as error:  # Decoders may raise anything.
            what = f"cannot be decoded from row {band * length} on ({type(error).__name__}: {error})"
            raise DataProblem(what, self.path, "Copy it again or remove it.") from error


def tiff_pixels(path: Path) -> int | None:
    """Return the number of pixels of a TIFF's first image; `None` if it is not a TIFF, or has no readable header."""
    try:
        with path.open("rb") as file:
            if file.read(4) not in TIFF:
                return None
        with tifffile_for(path).TiffFile(path) as tiff:
            return int(tiff.pages.first.imagelength * tiff.pages.first.imagewidth)
    except MissingExtra:
        raise
    except Exception:  # Reading the whole file reports what is wrong with it.
        return None


def open_windowed_tiff(path: Path) -> WindowedTiff | None:
    """Open an image to read windows of it, or return `None` if it is better, or only, decoded whole.

    Raises:
        DataError: as by `WindowedTiff`, for a TIFF too large to be decoded whole.
    """
    pixels = tiff_pixels(path)
    if pixels is None or pixels <= WINDOWED:
        return None
    whole = Image.MAX_IMAGE_PIXELS is None or pixels <= Image.MAX_IMAGE_PIXELS
    try:
        image = WindowedTiff(path)
    except DataProblem:
        if whole:  # Decoding it whole works, or reports the problem.
            return None
        raise
    return None if whole and image.chunk_pixels > WINDOWED else image


class LargeImage:
    """A TIFF as a float32 image `(channels, height, width)` whose windows are decoded on demand. Not thread-safe.

    `image[..., rows, columns]`, with slices of step 1, has the values that `image_format` gives these pixels in the
    whole image. If `image_format` has a `nodata` value, the first window with such pixels takes one pass over the
    image, for the mean that fills them.

    Args:
        path: the file, as for `WindowedTiff`.
        image_format: how images are stored, and how they become the network's input.

    Raises:
        DataError: as by `WindowedTiff`, and for another number of channels. Reading a window raises it if a tile cannot
            be decoded, or holds NaN or infinite values.

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
        self.tiff = WindowedTiff(path)
        self.height, self.width = self.tiff.size
        self._stages: tuple[Stage, ...] = ()
        self._fill: NDArray[np.float64] | None = None
        image_format.to_tensor(self.tiff.window(slice(0, 1), slice(0, 1)), 0.0)
        self.tiff.clear_cache()

    @property
    def shape(self) -> torch.Size:
        """`(channels, height, width)`."""
        return torch.Size((self.image_format.channels, self.height, self.width))

    @property
    def ndim(self) -> int:
        """Always 3."""
        return 3

    @property
    def dtype(self) -> torch.dtype:
        """The type of the windows."""
        return torch.float32

    def __getitem__(self, index: Any) -> Tensor:
        channels, rows, columns = _slices(index, self.shape)
        window = self.tiff.window(rows, columns)
        if self._fill is None and self.image_format.nodata_mask(window) is not None:
            self._fill = self.image_format.means(self.tiff)
        image = self.image_format.to_tensor(window, self._fill)
        for stage in self._stages:
            image = stage(image)
        return image[channels]

    def blocks(self) -> Iterator[Tensor]:
        """Yield the image from top to bottom, in blocks of full width."""
        for rows in self.tiff.blocks():
            yield self[:, rows, :]

    def normalized(self, normalize: Stage | None) -> LargeImage:
        """Normalize every window as `normalize` does the whole image, up to rounding; in place.

        `Standardize` needs a pass over the image first.

        Args:
            normalize: `None`, `Standardize`, torchvision's `Normalize`, or a `Compose` of these.

        Raises:
            DataError: for another function, which may need the whole image.
        """
        if isinstance(normalize, v2.Compose):
            for part in normalize.transforms:
                self.normalized(part)
        elif isinstance(normalize, Standardize):
            self._stages = (*self._stages, normalize.fit_blocks(self.blocks()))
        elif isinstance(normalize, v2.Normalize):
            self._stages = (*self._stages, normalize)
        elif normalize is not None:
            what = f"is too large to be read whole, which normalization by {type(normalize).__name__} requires"
            raise DataProblem(what, self.path, "Cut it into tiles, or train with normalize=image, fixed or imagenet.")
        return self

    def preview(self, longest: int = 2048) -> tuple[Tensor, int]:
        """Return every n-th pixel of every n-th row, at most `longest` along an axis, and n."""
        step = -(-max(self.height, self.width) // longest)
        rows = [self[:, row : row + 1, :][..., ::step] for row in range(0, self.height, step)]
        return torch.cat(rows, dim=1), step

    def close(self) -> None:
        """Free the cached tiles."""
        self.tiff.clear_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_large_image(path: Path, image_format: ImageFormat, limit: int = LARGE) -> LargeImage | None:
    """Open a TIFF that is too large to be decoded whole, or return `None` for any other file.

    Args:
        path: the file.
        image_format: how images are stored, and how they become the network's input.
        limit: pixels that are decoded whole; at most `PIL.Image.MAX_IMAGE_PIXELS`, the limit for all kinds of files.

    Raises:
        DataError: as by `LargeImage`. A file without a readable header is not an error here: reading it whole reports
            the problem.
    """
    pixels = tiff_pixels(path)
    if Image.MAX_IMAGE_PIXELS is not None:
        limit = min(limit, Image.MAX_IMAGE_PIXELS)
    return LargeImage(path, image_format) if pixels is not None and pixels > limit else None


def _slices(index: Any, shape: torch.Size) -> tuple[slice, slice, slice]:
    """Return slices of all three axes, with their ends."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is Ellipsis for part in parts):
        place = next(i for i, part in enumerate(parts) if part is Ellipsis)
        parts[place : place + 1] = [slice(None)] * (len(shape) - len(parts) + 1)
    parts += [slice(None)] * (len(shape) - len(parts))
    if len(parts) != len(shape) or not all(isinstance(p, slice) and p.step in (None, 1) for p in parts):
        raise IndexError(f"index must be slices of step 1 along channels, rows and columns, got {index!r}")
    ends = [part.indices(size) for part, size in zip(parts, shape, strict=True)]
    channels, rows, columns = (slice(start, max(start, stop)) for start, stop, _ in ends)
    if rows.start == rows.stop or columns.start == columns.stop:
        raise IndexError(f"index must leave some pixels of {tuple(shape)}, got {index!r}")
    return channels, rows, columns
