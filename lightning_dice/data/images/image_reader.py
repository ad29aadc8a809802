"""Read image files (PNG, JPEG, BMP, TIFF, NumPy) into arrays at full bit depth.

Pillow reads PNG, JPEG and BMP, except that it would reduce PNGs of 16-bit colour to 8 bit: imagecodecs reads these, and
tifffile all TIFFs; both are optional. `windowed_tiff` reads parts of large TIFFs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.WebPImagePlugin  # noqa: F401  (it registers WebP, which Pillow otherwise loads only in some programs)
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lightning_dice.data.errors import DataProblem
from lightning_dice.data.images.tiff_library import tifffile_for
from lightning_dice.extras import MissingExtra, require

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")  # by content: a GIF or WebP named .png is read too
LOSSY = ("JPEG", "MPO", "WEBP")
COLORS = {1: "gray", 2: "gray+alpha", 3: "RGB", 4: "RGBA"}
PNG = b"\x89PNG\r\n\x1a\n"
NUMPY = b"\x93NUMPY"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ORIENTATION = 274  # the tag of EXIF and of TIFF


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image file, upright.

    Attributes:
        pixels: `(height, width, channels)` as stored: bool, unsigned or signed integers, or floats.
        path: the file, for messages.
        max_value: the stored value that becomes 1; `None` if the type has none (floats, signed and 32-bit integers).
        alpha: the last channel is opacity.
        palette: `(colors, 3)`, if the pixels are indices into it.
        lossy: compressed in a way that changes values.
        turned: turned or flipped according to its orientation tag.

    >>> image = DecodedImage(np.zeros((2, 3, 3), np.uint8), Path("a.png"), max_value=255)
    >>> image.size, image.kind
    ((2, 3), '8-bit RGB')
    """

    pixels: NDArray[Any]
    path: Path
    max_value: float | None
    alpha: bool = False
    palette: NDArray[np.uint8] | None = None
    lossy: bool = False
    turned: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels."""
        return self.pixels.nbytes

    def window(self, rows: slice, columns: slice) -> DecodedImage:
        """Return a part of the image."""
        return replace(self, pixels=self.pixels[rows, columns])

    def blocks(self) -> list[slice]:
        """Return all rows as one block."""
        return [slice(0, self.pixels.shape[0])]

    def clear_cache(self) -> None:
        """Do nothing: the whole image is in memory."""

    @property
    def kind(self) -> str:
        """Depth and colour, such as `16-bit RGB`."""
        plain = isinstance(self.max_value, int) and self.pixels.dtype.kind in "bu"
        depth = f"{int(self.max_value or 0).bit_length()}-bit" if plain else str(self.pixels.dtype)
        channels = self.pixels.shape[2]
        if self.palette is not None:
            return f"{depth} palette"
        known = channels in COLORS and self.alpha == (channels in (2, 4))
        return f"{depth} {COLORS[channels] if known else f'{channels}-channel'}"

    def apply_palette(self) -> NDArray[Any]:
        """Return the pixels, looked up in the palette if there is one; grays give one channel."""
        if self.palette is None:
            return self.pixels
        colors: NDArray[Any] = self.palette[self.pixels[..., 0]]
        used = self.palette[np.unique(self.pixels)]
        return colors[..., :1] if (used == used[:, :1]).all() else colors


def read_image(path: Path, data: bytes | None = None) -> DecodedImage:
    """Decode a PNG, JPEG, BMP, TIFF or NumPy file, which is recognized by its content, not its name.

    A NumPy array is `(height, width)`, or has channels as its first or last axis, whichever is shorter. A TIFF of
    several pages is one image if the metadata of ImageJ or OME call the pages channels (`CYX`); otherwise the pages may
    be a stack or a film, and are refused.

    Args:
        path: the file.
        data: its bytes, if they have been read already.

    Raises:
        DataError: naming the file: it is empty, truncated, of another kind, of several frames or too large.
        MissingExtra: a TIFF, or a PNG of 16-bit colour, without the libraries that read them.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.png"
    ...     Image.new("RGB", (3, 2)).save(path)
    ...     image = read_image(path)
    ...     image.pixels.shape, image.kind, read_size(path)
    ((2, 3, 3), '8-bit RGB', (2, 3))
    """
    data = read_bytes(path) if data is None else data
    read_size(path, data)  # Detect a decompression bomb before it is decoded.
    try:
        if data.startswith(NUMPY):
            return _read_array(path, data)
        image = _read_tiff(path, data) if data[:4] in TIFF else _read_pillow(path, data)
    except (DataProblem, MissingExtra):
        raise
    except Exception as error:  # Decoders raise anything: struct.error, KeyError, zlib.error ...
        raise _undecodable(path, data, error) from error
    orientation = _orientation(path, data)
    return replace(image, pixels=_turn(image.pixels, orientation), turned=orientation != 1)


def read_bytes(path: Path) -> bytes:
    """Read a file that must not be empty.

    Raises:
        DataError: it cannot be opened, is a broken link or empty.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        link = path.is_symlink() and not path.exists()
        what = (
            f"is a link to {path.readlink()}, which does not exist" if link else f"cannot be opened ({error.strerror})"
        )
        raise DataProblem(what, path) from error
    if not data:
        raise DataProblem("is empty (0 bytes)", path, "Copy it again or remove it.")
    return data


def read_size(path: Path, data: bytes | None = None, *, whole: bool = True) -> tuple[int, int]:
    """Return height and width of the upright image, from the header alone.

    Args:
        path: the file.
        data: its bytes, if they have been read already.
        whole: the image will be decoded whole, so that it must not exceed `PIL.Image.MAX_IMAGE_PIXELS`; otherwise a
            TIFF may have any size.

    Raises:
        DataError: it has no readable header, or is too large.
    """
    file = BytesIO(data) if data is not None else path
    try:
        with path.open("rb") if data is None else BytesIO(data[:4]) as start:
            magic = start.read(4)
        if magic in TIFF:
            with tifffile_for(path).TiffFile(file) as tiff:
                page = tiff.pages.first
                height, width = page.imagelength, page.imagewidth
        elif magic == NUMPY[:4]:
            with path.open("rb") if data is None else BytesIO(data) as header:
                _, height, width = _array_shape(path, *_array_header(header))
        else:
            with Image.open(file, formats=FORMATS) as image:
                width, height = image.size
    except (DataProblem, MissingExtra):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _possible_bomb(path, str(error)) from error
    except OSError as error:
        if data is None:
            return read_size(path, read_bytes(path), whole=whole)
        raise _undecodable(path, data, error) from error
    except Exception as error:
        raise _undecodable(path, read_bytes(path) if data is None else data, error) from error
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > limit and (whole or magic not in TIFF):
        raise _possible_bomb(path, f"{height}x{width} pixels, more than {limit}")
    return (width, height) if _orientation(path, data) >= 5 else (height, width)


def to_tensor(image: DecodedImage, channels: int) -> Tensor:
    """Return a float32 tensor `(channels, height, width)`: integers divided by `max_value`, floats unchanged.

    Gray is repeated to three channels. Alpha is dropped, unless `channels` includes it.

    Raises:
        DataError: for another number of channels, an integer type without a `max_value`, or NaN and infinite values.

    >>> image = DecodedImage(np.array([[[0], [51], [255]]], np.uint8), Path("a.png"), max_value=255)
    >>> to_tensor(image, channels=1)
    tensor([[[0.0000, 0.2000, 1.0000]]])
    >>> to_tensor(image, channels=3).shape
    torch.Size([3, 1, 3])
    >>> to_tensor(image, channels=4)
    Traceback (most recent call last):
    lightning_dice.data.errors.DataProblem: a.png: has 1 channel (8-bit gray), but data.channels=4 was asked for. ...
    """
    pixels = image.apply_palette()
    if image.alpha and pixels.shape[2] != channels:
        pixels = pixels[..., :-1]
    found = pixels.shape[2]
    if found != channels and (found, channels) != (1, 3):
        asked = f"has {found} channel{'s' * (found != 1)} ({image.kind}), but data.channels={channels} was asked for"
        raise DataProblem(asked, image.path, f"Set data.channels={found}, or convert the file.")
    if image.max_value is None and pixels.dtype.kind != "f":
        remedy = "Set data.max_value to the stored value that becomes 1."
        raise DataProblem(f"holds {pixels.dtype} values, which have no default max_value", image.path, remedy)
    with np.errstate(over="ignore"):  # A float64 beyond float32 becomes inf, which is refused below.
        values = np.array(pixels.transpose(2, 0, 1), dtype=np.float32, order="C")
    if pixels.dtype.kind == "f" and not np.isfinite(values).all():
        count = int(values.size - np.isfinite(values).sum())
        raise DataProblem(f"holds {count} values that are not finite (NaN or infinite)", image.path, "Fill them first.")
    # Divide and repeat in NumPy: torch would wake its threads for each small image, in every reading thread.
    if image.max_value is not None:
        values /= image.max_value
    return torch.from_numpy(np.repeat(values, channels, axis=0) if found != channels else values)


def _read_pillow(path: Path, data: bytes) -> DecodedImage:
    depth, color = (data[24], data[25]) if data.startswith(PNG) else (8, 0)
    with Image.open(BytesIO(data), formats=FORMATS) as image:
        # Cameras append a preview to a JPEG, which makes it an MPO of two frames; the first is the image.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames > 1:
            raise _several_frames(path, frames)
        lossy = image.format in LOSSY
        if depth == 16 and color != 0:
            require("imagecodecs", needed_by=f"{path}, a PNG of 16-bit colour,")
            import imagecodecs

            deep = np.asarray(imagecodecs.png_decode(data))
            return DecodedImage(with_channels(deep), path, max_value=65535, alpha=color in (4, 6))
        pixels = with_channels(np.asarray(image))
        mode = image.mode
        if mode == "1":
            return DecodedImage(pixels.view(np.uint8) != 0, path, max_value=1)  # Pillow's True is the byte 255.
        if mode == "L" and depth in (2, 4):  # Pillow stretches them to 8 bit; a mask's ids must stay as stored.
            max_value = 2**depth - 1
            return DecodedImage(pixels // (255 // max_value), path, max_value=max_value)
        if mode in ("P", "PA"):
            return DecodedImage(pixels[..., :1], path, max_value=255, palette=read_palette(image), lossy=lossy)
        if mode in ("L", "LA", "RGB", "RGBA"):
            return DecodedImage(pixels, path, max_value=255, alpha=mode in ("LA", "RGBA"), lossy=lossy)
        if mode.startswith("I"):  # 16-bit gray PNG: "I;16", before Pillow 10.3 "I"
            return DecodedImage(pixels.astype(np.uint16), path, max_value=65535)
    raise _unknown_colors(path, mode)


def _read_tiff(path: Path, data: bytes) -> DecodedImage:
    with tifffile_for(path).TiffFile(BytesIO(data)) as file:
        # Reduced copies (overviews) and transparency masks are pages of their own: bits 0 and 2.
        pages: list[Any] = [page for page in file.pages if not int(getattr(page, "subfiletype", 0)) & 0b101]
        channels = len(pages) > 1 and file.series[0].axes == "CYX" and len(file.series[0].pages) == len(pages)
        if not pages or (len(pages) > 1 and not channels) or pages[0].imagedepth != 1:
            raise _several_frames(path, len(pages) * (pages[0].imagedepth if pages else 1))
        page = pages[0]
        spans = [
            (start, count) for one in pages for start, count in zip(one.dataoffsets, one.databytecounts, strict=True)
        ]
        ends = [start + count for start, count in spans]
        if not ends or max(ends) > len(data):  # A truncated JPEG strip decodes without an error.
            what = f"is truncated: {max(ends, default=0)} bytes expected, {len(data)} found"
            raise DataProblem(what, path, "Copy it again.")
        pixels = page.asarray()
        if channels:
            pixels = np.stack([pixels, *(one.asarray() for one in pages[1:])], axis=-1)
            return image_from_tiff_page(path, page, pixels)
        pixels = np.moveaxis(pixels, 0, -1) if page.axes.startswith("S") else with_channels(pixels)
        return image_from_tiff_page(path, page, pixels)


def image_from_tiff_page(path: Path, page: Any, pixels: NDArray[Any]) -> DecodedImage:
    """Make an image of decoded pixels of a TIFF page, according to the page's tags.

    Args:
        path: the file.
        page: a `tifffile.TiffPage`.
        pixels: all pixels or a window, `(height, width, samples)`.

    Raises:
        DataError: for colours other than gray, palette and RGB.
    """
    photometric = tifffile_for(path).PHOTOMETRIC(page.photometric)
    jpeg = page.compression in (6, 7, 33003, 33005, 34712)
    known = ("MINISWHITE", "MINISBLACK", "RGB", "PALETTE")
    if photometric.name not in known and not (photometric.name == "YCBCR" and jpeg):
        raise _unknown_colors(path, photometric.name)
    max_value = 2**page.bitspersample - 1 if pixels.dtype.kind in "bu" and page.bitspersample <= 16 else None
    if photometric.name == "MINISWHITE" and max_value is not None:
        pixels = ~pixels if pixels.dtype == bool else max_value - pixels
    palette = None
    if photometric.name == "PALETTE":
        palette = np.zeros((65536 if pixels.dtype == np.uint16 else 256, 3), np.uint8)
        stored = np.asarray(page.colormap)
        palette[: stored.shape[1]] = (stored.T >> 8).astype(np.uint8)
    alpha = len(page.extrasamples) > 0 and page.extrasamples[-1] in (1, 2)
    return DecodedImage(pixels, path, max_value=max_value, alpha=alpha, palette=palette, lossy=jpeg)


def _array_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _array_shape(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[bool, int, int]:
    """Return whether channels come first, and height and width of an array."""
    form = "arrays must be (height, width), (height, width, channels) or (channels, height, width)"
    if dtype.kind not in "buif":
        raise DataProblem(f"holds {dtype}, but numbers are required", path, "Save it as integers or floats.")
    if len(shape) == 2:
        return False, shape[0], shape[1]
    if len(shape) != 3 or shape[0] == shape[2]:
        raise DataProblem(f"has the shape {shape}: {form}, with fewer channels than pixels", path, "Save it so.")
    first = shape[0] < shape[2]
    return (True, shape[1], shape[2]) if first else (False, shape[0], shape[1])


def _read_array(path: Path, data: bytes) -> DecodedImage:
    first, _, _ = _array_shape(path, *_array_header(BytesIO(data)))
    pixels = np.load(BytesIO(data), allow_pickle=False)
    pixels = np.moveaxis(pixels, 0, -1) if first else with_channels(pixels)
    return DecodedImage(pixels, path, max_value=default_max_value(pixels.dtype))


def default_max_value(dtype: np.dtype[Any]) -> int | None:
    """Return the value of an array's type that becomes 1; `None` for floats, signed and wider integers.

    >>> default_max_value(np.dtype(np.uint16)), default_max_value(np.dtype(np.int16))
    (65535, None)
    """
    return {"b1": 1, "u1": 255, "u2": 65535}.get(dtype.str[1:])


def read_palette(image: Image.Image) -> NDArray[np.uint8]:
    """Return the palette of a Pillow image, filled up to `(256, 3)`."""
    palette = np.zeros((256, 3), np.uint8)
    stored = np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    palette[: len(stored)] = stored
    return palette


def with_channels(pixels: NDArray[Any]) -> NDArray[Any]:
    """Add an axis of channels to `(height, width)`.

    >>> with_channels(np.zeros((2, 3))).shape, with_channels(np.zeros((2, 3, 4))).shape
    ((2, 3, 1), (2, 3, 4))
    """
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _orientation(path: Path, data: bytes | None) -> int:
    """Return the orientation tag, 1 to 8; 1 (upright) if there is none."""
    file = BytesIO(data) if data is not None else path
    with path.open("rb") if data is None else BytesIO(data[:4]) as start:
        magic = start.read(4)
    if magic == NUMPY[:4]:
        return 1
    if magic in TIFF:
        with tifffile_for(path).TiffFile(file) as tiff:
            found = tiff.pages.first.tags.valueof(ORIENTATION, default=1)
    else:
        with Image.open(file, formats=FORMATS) as image:
            exif = Image.Exif()
            try:  # Not image.getexif(), which would decode the whole file of a PNG without EXIF.
                exif.load(image.info.get("exif") or b"")
                found = exif.get(ORIENTATION, 1)
            except (SyntaxError, ValueError, KeyError, IndexError, TypeError, struct.error):
                found = 1  # The metadata are damaged, the pixels are not.
    return int(found) if found in range(1, 9) else 1


def _turn(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _undecodable(path: Path, data: bytes, error: Exception) -> DataProblem:
    if data.startswith(b"version https://git-lfs"):
        return DataProblem("is a Git LFS pointer, not the image", path, "Fetch the images with `git lfs pull`.")
    if isinstance(error, UnidentifiedImageError):
        what = f"is not a PNG, JPEG, BMP, TIFF or NumPy image: it begins with {data[:12]!r}"
        return DataProblem(what, path, "Remove or replace it.")
    return DataProblem(f"cannot be decoded ({type(error).__name__}: {error})", path, "Copy it again or remove it.")


def _possible_bomb(path: Path, reason: str) -> DataProblem:
    remedy = (
        "If the size is right, save it as a TIFF in tiles of 512x512 pixels, which is read in windows "
        "(data.read_size, data.tile), or raise PIL.Image.MAX_IMAGE_PIXELS."
    )
    return DataProblem(f"may be a decompression bomb: {reason}", path, remedy)


def _several_frames(path: Path, frames: int) -> DataProblem:
    remedy = "Save each frame as a file of its own; if they are channels, with tifffile's planarconfig='separate'."
    return DataProblem(f"holds {frames} frames, but one is required", path, remedy)


def _unknown_colors(path: Path, found: str) -> DataProblem:
    return DataProblem(f"has the colours {found}; gray, palette and RGB are read", path, "Save it as RGB or gray.")
