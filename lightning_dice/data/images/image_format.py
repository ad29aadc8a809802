"""What a stored image becomes for the network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_dice.data.errors import DataProblem
from lightning_dice.data.images.image_reader import Picture, to_image


class Blockwise(Protocol):
    """A picture, decoded or not, that is looked at in blocks of rows: `Picture` or `LargePicture`."""

    def blocks(self) -> Iterable[slice]:
        """The rows of each."""
        ...

    def window(self, rows: slice, columns: slice) -> Picture:
        """A part of it."""
        ...


@dataclass(frozen=True)
class ImageFormat:
    """How images are stored, and what the network gets of them.

    Args:
        channels: of the images as the network sees them: 1 for gray, 3 for RGB (gray is repeated).
        bands: which of the stored channels they are, in order, counted from 1 as GDAL does: `[4, 3, 2]` is true colour
            in Sentinel-2's numbering. `None`: all.
        max_value: the stored value that becomes 1; it need not be the greatest. `None`: 255 and 65535 of unsigned integers
            of 8 and 16 bits, 1 of floats; other integers need one.
        nodata: the stored value of pixels that show nothing, in any of the bands; NaN where floats say so. They are
            filled with the mean of the others in their channel, and ignored in the mask.

    Raises:
        ValueError: a setting out of its range, or as many bands as there are no channels.

    >>> from pathlib import Path
    >>> picture = Picture(np.array([[[7, 0, 1000], [9, 500, -1]]], np.int16), Path("a.tif"), max_value=None)
    >>> ImageFormat(channels=2, bands=[3, 2], max_value=1000).image(picture)
    tensor([[[ 1.0000, -0.0010]],
    <BLANKLINE>
            [[ 0.0000,  0.5000]]])
    >>> ImageFormat(channels=1, bands=[3], max_value=1000, nodata=-1).image(picture)
    tensor([[[1., 1.]]])
    """

    channels: int = 3
    bands: Sequence[int] | None = None
    max_value: float | None = None
    nodata: float | None = None

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"channels must be 1 or more, got {self.channels}; set data.channels=3 for RGB")
        if self.bands is not None:
            bands = tuple(int(band) for band in self.bands)
            if min(bands, default=0) < 1:
                raise ValueError(f"bands must be numbers of channels, counted from 1, got {list(bands)}")
            if len(bands) != self.channels:
                raise ValueError(
                    f"bands must be as many as channels, {self.channels}, got {list(bands)}; "
                    f"set data.channels={len(bands)}"
                )
            object.__setattr__(self, "bands", bands)
        if self.max_value is not None and not (self.max_value > 0 and math.isfinite(self.max_value)):
            raise ValueError(f"max_value must be a stored value above 0, got {self.max_value}")
        if self.nodata is not None:
            # A YAML file's .nan is a number, that of a command line is text.
            text = {".nan": "nan"}.get(str(self.nodata).lower(), str(self.nodata))
            try:
                object.__setattr__(self, "nodata", float(text))
            except ValueError:
                raise ValueError(f"nodata must be a stored value, or nan, got {self.nodata!r}") from None
        object.__setattr__(self, "channels", int(self.channels))

    def image(self, picture: Picture, fill: NDArray[np.float64] | float | None = None) -> Tensor:
        """A float32 tensor `(channels, height, width)`.

        Args:
            picture: a whole one, or a window.
            fill: what pixels without an image get, for each channel: of a window the `means` of the whole picture. By
                default those of this one.

        Raises:
            DataError: for another number of channels, an integer type without a max_value, or a value that is not finite.
        """
        holes, whole = self.missing(picture), picture
        picture = self._chosen(picture)
        if holes is not None:
            picture = _filled(picture, holes, np.asarray(self.means(whole) if fill is None else fill))
        if self.max_value is not None:
            picture = replace(picture, pixels=picture.colors(), palette=None, max_value=float(self.max_value))
        return to_image(picture, self.channels)

    def means(self, picture: Blockwise) -> NDArray[np.float64]:
        """The mean of each stored channel over the pixels that show something, in float64; 0 where none does."""
        count, total = 0, np.zeros(1)
        for rows in picture.blocks():
            pixels = self._chosen(picture.window(rows, slice(None))).pixels
            seen = pixels[~self._holes(pixels).any(-1)]
            # Sums of whole numbers are exact in any order; those of floats agree to rounding.
            total = total + seen.sum(0, dtype=np.float64)
            count += len(seen)
        return total / max(count, 1)

    def missing(self, picture: Picture) -> NDArray[np.bool_] | None:
        """Where pixels show nothing, `(height, width)`; `None`: nowhere."""
        if self.nodata is None:
            return None
        found = np.asarray(self._holes(self._chosen(picture).pixels).any(-1))
        return found if found.any() else None

    def _chosen(self, picture: Picture) -> Picture:
        if self.bands is None and (self.nodata is None or picture.palette is None):
            return picture
        if self.bands is None:
            return replace(picture, pixels=picture.colors(), palette=None)
        # All three colours, also of a window that shows grays alone.
        pixels = picture.pixels if picture.palette is None else picture.palette[picture.pixels[..., 0]]
        if max(self.bands) > pixels.shape[2]:
            what = f"has {pixels.shape[2]} channels ({picture.kind}), data.bands={list(self.bands)} was asked for"
            raise DataProblem(what, picture.path, "Bands are counted from 1.")
        chosen = pixels[..., [band - 1 for band in self.bands]]
        return replace(picture, pixels=chosen, alpha=False, palette=None)

    def _holes(self, pixels: NDArray[Any]) -> NDArray[np.bool_]:
        nodata = math.nan if self.nodata is None else self.nodata
        return np.isnan(pixels) if math.isnan(nodata) else np.asarray(pixels == nodata)


def _filled(picture: Picture, holes: NDArray[np.bool_], fill: NDArray[np.float64]) -> Picture:
    # A window of a palette may show grays alone, in one channel.
    pixels = np.repeat(picture.pixels, max(1, fill.size // picture.pixels.shape[2]), axis=2)
    pixels[holes] = fill
    return replace(picture, pixels=pixels)
