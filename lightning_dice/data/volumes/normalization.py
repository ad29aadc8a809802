"""Intensities of volumes by what was measured: CT has a scale of its own, MR has none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SCHEMES = ("ct", "zscore", "zscore_nonzero", "rescale_to_0_1", "rgb_to_0_1", "nonorm")


@dataclass(frozen=True)
class Intensities:
    """What the foreground voxels of the training cases are like, in one channel.

    Attributes:
        mean: of the sampled voxels.
        std: uncorrected.
        percentile_00_5: 0.5 % of them are darker.
        percentile_99_5: 99.5 % of them are darker.
        median: the middle.
        minimum: the least.
        maximum: the greatest.
    """

    mean: float
    std: float
    percentile_00_5: float
    percentile_99_5: float
    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, voxels: NDArray[np.float32]) -> Intensities:
        """Of some voxels, at least one."""
        values = voxels.astype(np.float64)
        low, median, high = np.percentile(values, (0.5, 50, 99.5))
        numbers = (values.mean(), values.std(), low, high, median, values.min(), values.max())
        return cls(*(float(number) for number in numbers))


def scheme_of(name: str) -> str:
    """The scheme that nnU-Net chooses by a channel's name: a z-score, but for CT and names that say otherwise.

    >>> [scheme_of(name) for name in ("CT", "T1", "noNorm", "rgb_to_0_1")]
    ['ct', 'zscore', 'nonorm', 'rgb_to_0_1']
    """
    name = name.casefold()
    return name if name in SCHEMES else "zscore"


def check_schemes(normalization: str | Iterable[str], channels: int) -> tuple[str, ...]:
    """One scheme for each channel.

    Args:
        normalization: schemes, or names of channels; one for all, or one for each.
        channels: how many there are.

    Raises:
        ValueError: another number of them than of channels.
    """
    names = (normalization,) * channels if isinstance(normalization, str) else tuple(map(str, normalization))
    if len(names) != channels:
        raise ValueError(
            f"normalization must be one of {', '.join(SCHEMES)}, or one for each of the {channels} channels, "
            f"got {list(names)}"
        )
    return tuple(scheme_of(name) for name in names)


def normalized(values: NDArray[np.float32], scheme: str, intensities: Intensities | None) -> NDArray[np.float32]:
    r"""A channel of one volume, normalized.

    As nnU-Net's schemes of these names (Isensee et al., Nature Methods 2021):

    - `ct`: clipped to the 0.5 and 99.5 percentiles of the foreground of the training cases, less its mean, over its
      standard deviation;
    - `zscore`: less the volume's own mean, over its own (uncorrected) standard deviation;
    - `zscore_nonzero`: the same over the voxels that are not 0, where 0 stays 0: for skull-stripped images, as nnU-Net
      does where cropping to them takes much away;
    - `rescale_to_0_1`: from the least to the greatest value;
    - `rgb_to_0_1`: divided by 255;
    - `nonorm`: as it is.

    Args:
        values: float32, `(*space)`; not changed.
        scheme: one of these.
        intensities: of the training cases, for `ct`.

    Raises:
        ValueError: `rgb_to_0_1` of values outside [0, 255].
    """
    if scheme == "ct":
        if intensities is None:
            raise ValueError("intensities must be given for the scheme ct")
        clipped = np.clip(values, intensities.percentile_00_5, intensities.percentile_99_5)
        return np.asarray((clipped - intensities.mean) / max(intensities.std, 1e-8), np.float32)
    if scheme == "zscore":
        return _standardized(values)
    if scheme == "zscore_nonzero":
        inside = values != 0
        result = np.zeros_like(values)
        if inside.any():
            result[inside] = _standardized(values[inside])
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


def _standardized(values: NDArray[np.float32]) -> NDArray[np.float32]:
    mean = float(values.mean(dtype=np.float64))
    std = float(values.std(dtype=np.float64))
    # In float64, and back: the mean of equal numbers is that number, whose zeros nothing blows up.
    return np.asarray((values - np.float32(mean)) / np.float32(max(std, 1e-8)), np.float32)
