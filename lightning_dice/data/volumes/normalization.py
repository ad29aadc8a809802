"""Normalization of volumes by modality: CT has an absolute scale, MR has none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SCHEMES = ("ct", "zscore", "zscore_nonzero", "rescale_to_0_1", "rgb_to_0_1", "nonorm")


@dataclass(frozen=True)
class Intensities:
    """Statistics of one channel over foreground voxels sampled from the training cases.

    Attributes:
        mean: the mean.
        std: the uncorrected standard deviation.
        percentile_00_5: the 0.5th percentile.
        percentile_99_5: the 99.5th percentile.
        median: the median.
        minimum: the minimum.
        maximum: the maximum.

    >>> Intensities.from_voxels(np.array([0, 1, 5], np.float32)).mean
    2.0
    """

    mean: float
    std: float
    percentile_00_5: float
    percentile_99_5: float
    median: float
    minimum: float
    maximum: float

    @classmethod
    def from_voxels(cls, voxels: NDArray[np.float32]) -> Intensities:
        """Compute the statistics of one or more voxels."""
        values = voxels.astype(np.float64)
        low, median, high = np.percentile(values, (0.5, 50, 99.5))
        numbers = (values.mean(), values.std(), low, high, median, values.min(), values.max())
        return cls(*(float(number) for number in numbers))


def scheme_for_channel(name: str) -> str:
    """Return the scheme that nnU-Net chooses by a channel's name: the scheme of that name, or else `zscore`.

    >>> [scheme_for_channel(name) for name in ("CT", "T1", "noNorm", "rgb_to_0_1")]
    ['ct', 'zscore', 'nonorm', 'rgb_to_0_1']
    """
    name = name.casefold()
    return name if name in SCHEMES else "zscore"


def schemes_for_channels(normalization: str | Iterable[str], channels: int) -> tuple[str, ...]:
    """Return one scheme for each channel.

    Args:
        normalization: schemes or channel names: one for all channels, or one for each.
        channels: number of channels.

    Raises:
        ValueError: the numbers of names and channels differ.

    >>> schemes_for_channels("CT", 2), schemes_for_channels(["T1", "noNorm"], 2)
    (('ct', 'ct'), ('zscore', 'nonorm'))
    """
    names = (normalization,) * channels if isinstance(normalization, str) else tuple(map(str, normalization))
    if len(names) != channels:
        raise ValueError(
            f"normalization must be one of {', '.join(SCHEMES)}, or one for each of the {channels} channels, "
            f"got {list(names)}"
        )
    return tuple(scheme_for_channel(name) for name in names)


def normalize_intensities(
    values: NDArray[np.float32], scheme: str, intensities: Intensities | None = None
) -> NDArray[np.float32]:
    """Normalize one channel of a volume by one of nnU-Net's schemes (Isensee et al., Nature Methods 2021).

    - `ct`: clip to the 0.5th and 99.5th percentiles of the foreground of the training cases, subtract its mean, divide
      by its standard deviation;
    - `zscore`: subtract the volume's own mean, divide by its own (uncorrected) standard deviation;
    - `zscore_nonzero`: the same over the voxels that are not 0; the others stay 0. For skull-stripped images; nnU-Net
      does so if cropping to the nonzero voxels removes much of the image;
    - `rescale_to_0_1`: map the minimum to 0 and the maximum to 1;
    - `rgb_to_0_1`: divide by 255;
    - `nonorm`: leave unchanged.

    Args:
        values: float32, `(*space)`; not modified.
        scheme: one of these.
        intensities: statistics of the training cases, required for `ct`.

    Raises:
        ValueError: `ct` without `intensities`, or `rgb_to_0_1` of values outside [0, 255].

    >>> normalize_intensities(np.array([[[1, 2, 3]]], np.float32), "rescale_to_0_1")
    array([[[0. , 0.5, 1. ]]], dtype=float32)
    """
    if scheme == "ct":
        if intensities is None:
            raise ValueError("intensities must be given for the scheme ct")
        clipped = np.clip(values, intensities.percentile_00_5, intensities.percentile_99_5)
        return np.asarray((clipped - intensities.mean) / max(intensities.std, 1e-8), np.float32)
    if scheme == "zscore":
        return _zscore(values)
    if scheme == "zscore_nonzero":
        inside = values != 0
        result = np.zeros_like(values)
        if inside.any():
            result[inside] = _zscore(values[inside])
        return result
    if scheme == "rescale_to_0_1":
        low, high = float(values.min()), float(values.max())
        return np.asarray((values - low) / max(high - low, 1e-8), np.float32)
    if scheme == "rgb_to_0_1":
        if values.min() < 0 or values.max() > 255:
            raise ValueError(
                f"holds values from {values.min():g} to {values.max():g}, where rgb_to_0_1 requires 0 to 255"
            )
        return np.asarray(values / 255, np.float32)
    return values


def _zscore(values: NDArray[np.float32]) -> NDArray[np.float32]:
    mean = float(values.mean(dtype=np.float64))
    std = float(values.std(dtype=np.float64))
    # Statistics in float64: the mean of equal numbers is then that number, so that a constant volume becomes zeros.
    return np.asarray((values - np.float32(mean)) / np.float32(max(std, 1e-8)), np.float32)
