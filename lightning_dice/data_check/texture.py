"""The texture of an image on a small grid, used to find duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

# Images of any size are compared on one grid for each number of space axes, of equally many pixels.
GRIDS = {1: (4096,), 2: (64, 64), 3: (16, 16, 16)}


def texture(image: Tensor) -> NDArray[np.float16]:
    """Return an image without its brightness, contrast and number of pixels, as a vector of length 1.

    The mean over the channels is reduced to a grid and normalized locally to mean 0 and variance 1 (with a Gaussian of
    4 pixels of 64). Two images of similar objects share shape and shading, but not this.

    Args:
        image: finite, `(channels, *space)`.

    Returns:
        Flattened over the grid; all 0 for a constant image.

    >>> import torch
    >>> image = torch.rand(1, 128, 96, generator=torch.Generator().manual_seed(0))
    >>> float((texture(image) * texture(0.5 * image + 0.2)).sum()) > 0.99  # only brightness and contrast differ
    True
    """
    from scipy import ndimage

    grid = GRIDS[image.ndim - 1]
    small = pool_to_size(image.mean(0, keepdim=True), grid, "avg")[0].numpy().astype(np.float32)
    sigma = grid[-1] / 16
    high = small - ndimage.gaussian_filter(small, sigma)
    local = np.sqrt(ndimage.gaussian_filter(high * high, sigma))
    spread = float(high.std())
    if spread <= 1e-6 * (float(np.abs(small).max()) + 1e-12):
        return np.zeros(high.size, np.float16)
    flat = (high / (local + 0.2 * spread)).ravel()
    flat -= flat.mean()
    return np.asarray(flat / np.linalg.norm(flat), np.float16)


def pool_to_size(image: Tensor, size: Sequence[int], kind: Literal["avg", "max"]) -> Tensor:
    """Reduce `(channels, *space)` to a grid of `size`: the mean or the maximum of the pixels in each cell.

    >>> import torch
    >>> pool_to_size(torch.arange(4.0).reshape(1, 4), (2,), "max")
    tensor([[1., 3.]])
    """
    axes = image.ndim - 1
    average: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[axes - 1]
    maximum: Any = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[axes - 1]
    result: Tensor = (average if kind == "avg" else maximum)(image.unsqueeze(0), tuple(size))[0]
    return result
