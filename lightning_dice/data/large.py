"""Pictures that are too large to be decoded whole: tiled or striped TIFFs, read by windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lightning_dice.data.images import ImageFormat
from lightning_dice.data.readers import ORIENTATION, TIFF, Problem, page_picture
from lightning_dice.data.transforms import Standardize

if TYPE_CHECKING:
    from typing_extensions import Self

LARGE = 100_000_000  # pixels
PIECE = 2**30  # bytes, the most that a row of tiles, or a strip, may hold once decoded
RATIO = 2000  # deflate reaches 1032, and a picture's tags count too
BLOCK = 2**22  # pixels in one step over a whole picture
JPEG = (6, 7, 34892, 33007)

Stage = Callable[[Tensor], Tensor]


class LargeImage:
    """A TIFF as a float32 image `(channels, height, width)` whose windows are decoded when they are asked for.

    `image[..., rows, columns]`, with slices of step 1, gives the values that `image_format` gives of the whole picture.
    The tiles or strips of the rows that were asked for last are kept, as stored, so that windows which are read row by
    row, overlapping or not, have each tile decoded once; memory is that of the width times the depth of a window. Not
    for several threads at once.

    Args:
        path: the file: one picture, whatever its compression, in tiles, in strips or uncompressed.
        image_format: what the network gets of a picture; without `nodata`, which needs all of it.

    Raises:
        DataError: the file is truncated, of several pictures, compressed in one piece, stored turned, of other channels
            or more compressed than a picture can be. Reading a window raises it where a tile cannot be decoded or
            holds values that are not finite.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "slide.tif"
    ...     tifffile.imwrite(path, np.full((300, 500, 3), 51, np.uint8), photometric="rgb", tile=(128, 128))
    ...     with LargeImage(path, ImageFormat(channels=3)) as image:
    ...         print(tuple(image.shape), image[..., 100:102, 200:201].flatten())
    (3, 300, 500) tensor([0.2000, 0.2000, 0.2000, 0.2000, 0.2000, 0.2000])
    """

    def __init__(self, path: Path, image_format: ImageFormat) -> None:
        self.path, self.image_format = path, image_format
        if image_format.nodata is not None:
            what = "is too large to be read whole, which data.nodata asks for: holes are filled with the picture's mean"
            raise Problem(what, path, "Cut it into tiles.")
        self._stages: tuple[Stage, ...] = ()
        self._bands: dict[int, NDArray[Any]] = {}
        try:
            self._tiff = tifffile.TiffFile(path)
        except OSError as error:
            raise Problem(f"cannot be opened ({error.strerror})", path) from error
        except Exception as error:  # tifffile raises whatever a damaged header brings up.
            raise Problem(f"cannot be decoded ({type(error).__name__}: {error})", path, "Copy it again.") from error
        try:
            self._open()
        except Problem:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise Problem(f"cannot be decoded ({type(error).__name__}: {error})", path, "Copy it again.") from error

    def _open(self) -> None:
        # Reduced copies and transparency masks come along as pages of their own: bits 0 and 2.
        pages: list[Any] = [p for p in self._tiff.pages if not int(getattr(p, "subfiletype", 0)) & 0b101]
        if len(pages) != 1 or pages[0].imagedepth != 1:
            raise Problem(f"holds {len(pages)} pictures, one is required", self.path, "Save each as a file of its own.")
        self._page = page = pages[0]
        self._planes, _, self.height, self.width, self._samples = page.shaped
        turn = page.tags.valueof(ORIENTATION, default=1)
        if turn in range(2, 9):
            what = f"is stored turned (orientation tag {turn}), and with {self.height}x{self.width} pixels too large"
            raise Problem(f"{what} to be turned in memory", self.path, "Save it upright.")
        found = self._tiff.filehandle.size
        ends = [start + count for start, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
        if not ends or max(ends) > found:
            what = f"is truncated: {max(ends, default=0)} bytes expected, {found} found"
            raise Problem(what, self.path, "Copy it again.")
        row = self._planes * self.width * self._samples * page.dtype.itemsize
        if self.height * row > RATIO * found:
            what = f"may be a decompression bomb: {self.height * row} bytes of pixels in a file of {found}"
            raise Problem(what, self.path)
        self._plain = page.is_contiguous and page.compression == 1 and page.fillorder == 1 and page.bitspersample >= 8
        if self._plain:
            self._rows, self._across = max(1, 2**22 // row), 1
        elif page.is_tiled:
            self._rows, self._across = page.tilelength, -(-self.width // page.tilewidth)
        else:
            self._rows, self._across = min(page.rowsperstrip, self.height), 1
        if self._rows * row > PIECE:
            what = f"is compressed in pieces of {self._rows} rows, {self._rows * row} bytes each: too large to be read"
            raise Problem(what, self.path, "Save it in tiles of 512x512 pixels or so.")
        _ = self[:, :1, :1]

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
        picture = page_picture(self.path, self._page, self._stored(rows, columns))
        image = self.image_format.image(picture)
        for stage in self._stages:
            image = stage(image)
        return image[channels]

    def then(self, stage: Stage) -> LargeImage:
        """The same picture, of which every window goes through a function of its pixels; in place."""
        self._stages = (*self._stages, stage)
        return self

    def blocks(self) -> Iterator[Tensor]:
        """The whole picture from top to bottom, in pieces of full width."""
        step = max(1, BLOCK // self.width)
        for start in range(0, self.height, step):
            yield self[:, start : start + step, :]

    def preview(self, longest: int = 2048) -> tuple[Tensor, int]:
        """Every n-th pixel of every n-th row, at most `longest` along an axis, and n."""
        step = -(-max(self.height, self.width) // longest)
        rows = [self[:, row : row + 1, :][..., ::step] for row in range(0, self.height, step)]
        return torch.cat(rows, dim=1), step

    def close(self) -> None:
        """Close the file."""
        self._bands.clear()
        self._tiff.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stored(self, rows: slice, columns: slice) -> NDArray[Any]:
        """A window of samples as stored, `(height, width, samples)`."""
        first, last = rows.start // self._rows, -(-rows.stop // self._rows)
        # What lies above is not asked for again by windows that go down.
        self._bands = {number: band for number, band in self._bands.items() if first <= number < last}
        parts = []
        for number in range(first, last):
            if number not in self._bands:
                self._bands[number] = self._decode(number)
            top = number * self._rows
            parts.append(self._bands[number][max(0, rows.start - top) : rows.stop - top, columns])
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _decode(self, number: int) -> NDArray[Any]:
        """A row of tiles, or a strip, `(height, width, samples)`."""
        page, top = self._page, number * self._rows
        height = min(self._rows, self.height - top)
        band = np.empty((height, self.width, self._planes * self._samples), page.dtype)
        try:
            for plane in range(self._planes):
                samples = slice(plane * self._samples, (plane + 1) * self._samples)
                if self._plain:
                    row = self.width * self._samples
                    start = page.dataoffsets[0] + (plane * self.height + top) * row * page.dtype.itemsize
                    stored = page.dtype.newbyteorder(self._tiff.byteorder)
                    values = self._tiff.filehandle.read_array(stored, height * row, start)
                    band[..., samples] = values.reshape(height, self.width, self._samples)
                else:
                    self._decode_segments(number, plane, band[..., samples])
        except Exception as error:  # Decoders raise whatever their format brings up.
            what = f"cannot be decoded from row {top} on ({type(error).__name__}: {error})"
            raise Problem(what, self.path, "Copy it again or remove it.") from error
        return band

    def _decode_segments(self, number: int, plane: int, band: NDArray[Any]) -> None:
        page = self._page
        down = -(-self.height // self._rows)
        start = (plane * down + number) * self._across
        indices = list(range(start, start + self._across))
        tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.compression in JPEG else {}
        read = self._tiff.filehandle.read_segments(
            [page.dataoffsets[i] for i in indices], [page.databytecounts[i] for i in indices], indices=indices
        )
        for data, index in read:
            tile, (_, _, _, left, _), (_, height, width, _) = page.decode(data, index, **tables)
            part = band[:height, left : left + width]
            part[...] = page.nodata if tile is None else tile[0, : part.shape[0], : part.shape[1]]


def open_large(path: Path, image_format: ImageFormat, limit: int = LARGE) -> LargeImage | None:
    """A picture that is to be read by windows, or `None`: it is no TIFF, or no larger than what is read whole.

    Args:
        path: of the file.
        image_format: what the network gets of it.
        limit: in pixels; at most `PIL.Image.MAX_IMAGE_PIXELS`, beyond which a file of any kind is not decoded whole.

    Raises:
        DataError: as by `LargeImage`; a file that has no readable header is left to who reads it whole.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) not in TIFF:
                return None
        with tifffile.TiffFile(path) as tiff:
            pixels = tiff.pages.first.imagelength * tiff.pages.first.imagewidth
    except Exception:  # Whoever reads it whole says what is wrong with it.
        return None
    if Image.MAX_IMAGE_PIXELS is not None:
        limit = min(limit, Image.MAX_IMAGE_PIXELS)
    return LargeImage(path, image_format) if pixels > limit else None


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
        return image.then(_standardization(image))
    what = f"is too large to be read whole, which normalization by {type(normalize).__name__} asks for"
    raise Problem(what, image.path, "Cut it into tiles, or train with normalize=image, fixed or imagenet.")


def _standardization(image: LargeImage) -> Stage:
    """What `Standardize` does, with mean and standard deviation from one pass, in float64.

    Blocks are merged by their means and sums of squared deviations, which do not cancel as sums of squares do.
    """
    count = 0
    mean = torch.zeros(len(image[:, :1, :1]), 1).double()
    squares = mean.clone()
    for block in image.blocks():
        pixels = block.flatten(1).double()
        center = pixels.mean(1, keepdim=True)
        number, shift = pixels.shape[1], center - mean
        total = count + number
        squares += (pixels - center).square().sum(1, keepdim=True) + shift.square() * (count * number / total)
        mean, count = mean + shift * (number / total), total
    std = (squares / count).sqrt()
    flat = std <= 4 * torch.finfo(torch.float32).eps * mean.abs()
    center, width = mean.float()[..., None], std.masked_fill(flat, torch.inf).float()[..., None]
    return lambda window: (window - center) / width


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
