"""How the pixels of an image file become the network's input."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_dice.data.errors import DataProblem
from lightning_dice.data.images.image_reader import DecodedImage, to_tensor


class BlockwiseImage(Protocol):
    """An image that can be read in blocks of rows: a `DecodedImage` or a `WindowedTiff`."""

    def blocks(self) -> Iterable[slice]:
        """Return the rows of each block."""
        ...

    def window(self, rows: slice, columns: slice) -> DecodedImage:
        """Return a part of the image."""
        ...


@dataclass(frozen=True)
class ImageFormat:
    """How images are stored, and how they become the network's input.

    Args:
        channels: the network's input channels: 1 for gray, 3 for RGB (gray is repeated).
        bands: the stored channels to use, in order, counted from 1 as GDAL does: `[4, 3, 2]` is true colour in
            Sentinel-2's numbering. `None`: all.
        max_value: the stored value that becomes 1; it need not be the greatest. `None`: 255 and 65535 for unsigned
            integers of 8 and 16 bits, 1 for floats; other integers need one.
        nodata: the stored value, perhaps NaN, of pixels that show nothing, in any of the bands. Each channel of these
            pixels is filled with the mean of its other pixels, and they are ignored in the mask.

    Raises:
        ValueError: a setting is out of its range, or `bands` are not as many as `channels`.

    >>> from pathlib import Path
    >>> stored = DecodedImage(np.array([[[7, 0, 1000], [9, 500, -1]]], np.int16), Path("a.tif"), max_value=None)
    >>> ImageFormat(channels=2, bands=[3, 2], max_value=1000).to_tensor(stored)
    tensor([[[ 1.0000, -0.0010]],
    <BLANKLINE>
            [[ 0.0000,  0.5000]]])
    >>> ImageFormat(channels=1, bands=[3], max_value=1000, nodata=-1).to_tensor(stored)
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
            # In a YAML file .nan is a number; on the command line it is text.
            text = {".nan": "nan"}.get(str(self.nodata).lower(), str(self.nodata))
            try:
                object.__setattr__(self, "nodata", float(text))
            except ValueError:
                raise ValueError(f"nodata must be a stored value, or nan, got {self.nodata!r}") from None
        object.__setattr__(self, "channels", int(self.channels))

    def to_tensor(self, image: DecodedImage, fill: NDArray[np.float64] | float | None = None) -> Tensor:
        """Return a float32 tensor `(channels, height, width)`.

        Args:
            image: a whole image, or a window of one.
            fill: what `nodata` pixels become, in each channel: for a window the `means` of the whole image. By
                default the means of `image`.

        Raises:
            DataError: for another number of channels, an integer type that needs `max_value`, or NaN and infinite
                values.
        """
        holes, whole = self.nodata_mask(image), image
        image = self._select_bands(image)
        if holes is not None:
            image = _fill_holes(image, holes, np.asarray(self.means(whole) if fill is None else fill))
        if self.max_value is not None:
            image = replace(image, pixels=image.apply_palette(), palette=None, max_value=float(self.max_value))
        return to_tensor(image, self.channels)

    def means(self, image: BlockwiseImage) -> NDArray[np.float64]:
        """Return the mean of each channel over the pixels that show something, in float64; 0 if none does."""
        count, total = 0, np.zeros(1)
        for rows in image.blocks():
            pixels = self._select_bands(image.window(rows, slice(None))).pixels
            seen = pixels[~self._is_nodata(pixels).any(-1)]
            # Sums of whole numbers are exact in any order; those of floats agree to rounding.
            total = total + seen.sum(0, dtype=np.float64)
            count += len(seen)
        return total / max(count, 1)

    def nodata_mask(self, image: DecodedImage) -> NDArray[np.bool_] | None:
        """Return the pixels that show nothing as a mask `(height, width)`; `None` if there are none."""
        if self.nodata is None:
            return None
        found = np.asarray(self._is_nodata(self._select_bands(image).pixels).any(-1))
        return found if found.any() else None

    def _select_bands(self, image: DecodedImage) -> DecodedImage:
        if self.bands is None and (self.nodata is None or image.palette is None):
            return image
        if self.bands is None:
            return replace(image, pixels=image.apply_palette(), palette=None)
        # Always three colours: `apply_palette` gives one channel for a window that shows only grays.
        pixels = image.pixels if image.palette is None else image.palette[image.pixels[..., 0]]
        if max(self.bands) > pixels.shape[2]:
            what = f"has {pixels.shape[2]} channels ({image.kind}), but data.bands={list(self.bands)} was asked for"
            raise DataProblem(what, image.path, "Bands are counted from 1.")
        chosen = pixels[..., [band - 1 for band in self.bands]]
        return replace(image, pixels=chosen, alpha=False, palette=None)

    def _is_nodata(self, pixels: NDArray[Any]) -> NDArray[np.bool_]:
        nodata = math.nan if self.nodata is None else self.nodata
        return np.isnan(pixels) if math.isnan(nodata) else np.asarray(pixels == nodata)


def _fill_holes(image: DecodedImage, holes: NDArray[np.bool_], fill: NDArray[np.float64]) -> DecodedImage:
    # A window of a palette that shows only grays has one channel, and `fill` may have three.
    pixels = np.repeat(image.pixels, max(1, fill.size // image.pixels.shape[2]), axis=2)
    pixels[holes] = fill
    return replace(image, pixels=pixels)
