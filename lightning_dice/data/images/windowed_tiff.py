"""TIFFs of which windows are decoded, and the rest is not: in tiles, in strips or uncompressed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from lightning_dice.data.images.image_reader import ORIENTATION, TIFF, Picture, Problem, page_picture

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
        except Problem:
            raise
        except OSError as error:
            raise Problem(f"cannot be opened ({error.strerror})", path) from error
        except Exception as error:  # tifffile raises whatever a damaged header brings up.
            raise Problem(f"cannot be decoded ({type(error).__name__}: {error})", path, "Copy it again.") from error

    def _look(self, tiff: tifffile.TiffFile) -> None:
        # Reduced copies and transparency masks come along as pages of their own: bits 0 and 2.
        pages: list[Any] = [p for p in tiff.pages if not int(getattr(p, "subfiletype", 0)) & 0b101]
        if len(pages) != 1 or pages[0].imagedepth != 1:
            raise Problem(f"holds {len(pages)} pictures, one is required", self.path, "Save each as a file of its own.")
        self._page = page = pages[0]
        self._planes, _, height, width, self._samples = page.shaped
        self.size: tuple[int, int] = (height, width)
        turn = page.tags.valueof(ORIENTATION, default=1)
        if turn in range(2, 9):
            what = f"is stored turned (orientation tag {turn}), and with {height}x{width} pixels too large"
            raise Problem(f"{what} to be turned in memory", self.path, "Save it upright.")
        self._offsets, self._counts = page.dataoffsets, page.databytecounts
        found = tiff.filehandle.size
        ends = [start + count for start, count in zip(self._offsets, self._counts, strict=True)]
        if not ends or max(ends) > found:
            what = f"is truncated: {max(ends, default=0)} bytes expected, {found} found"
            raise Problem(what, self.path, "Copy it again.")
        row = self._planes * width * self._samples * page.dtype.itemsize
        if height * row > RATIO * found:
            what = f"may be a decompression bomb: {height * row} bytes of pixels in a file of {found}"
            raise Problem(what, self.path)
        plain = page.is_contiguous and page.compression == 1 and page.fillorder == 1 and page.bitspersample >= 8
        self._plain = page.dtype.newbyteorder(tiff.byteorder) if plain else None
        self._tile = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, height), width)
        self.piece = 1 if plain else self._tile[0] * self._tile[1]
        if not plain and self._tile[0] * row > PIECE:
            what = f"is compressed in pieces of {self._tile[0]} rows, {self._tile[0] * row} bytes each: too large"
            raise Problem(f"{what} to be read", self.path, "Save it in tiles of 512x512 pixels or so.")
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
            raise Problem(what, self.path, "Copy it again or remove it.") from error


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
    except Problem:
        if whole:  # Who reads it whole can, or tells why not.
            return None
        raise
    return None if whole and picture.piece > WINDOWED else picture
