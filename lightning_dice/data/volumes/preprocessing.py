"""Preprocessing of volumes: normalized intensities, resampled to the network's spacing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dice.data.errors import DataError, DataProblem
from lightning_dice.data.volumes.fingerprint import Fingerprint
from lightning_dice.data.volumes.nifti import Geometry
from lightning_dice.data.volumes.normalization import Intensities, normalize_intensities, schemes_for_channels
from lightning_dice.data.volumes.resampling import Interpolation, resample_image, resampled_size


@dataclass(frozen=True)
class Preprocessor:
    """Turns the channels of a case into the image that the network sees.

    Attributes:
        schemes: the normalization of each channel.
        intensities: statistics of the training cases for each channel; empty if no scheme needs them.
        spacing: mm along each axis to resample to; `None`: not resampled.
        interpolation: for images.

    >>> Preprocessor(("zscore",), spacing=(1.0, 1.0, 2.0)).output_size((100, 100, 50), (1.0, 1.0, 4.0))
    (100, 100, 100)
    """

    schemes: tuple[str, ...]
    intensities: tuple[Intensities, ...] = ()
    spacing: tuple[float, ...] | None = None
    interpolation: Interpolation = "linear"

    def output_size(self, size: Sequence[int], spacing: Sequence[float]) -> tuple[int, ...]:
        """Return the size of the image that the network sees."""
        return tuple(size) if self.spacing is None else resampled_size(size, spacing, self.spacing)

    def __call__(self, channels: Sequence[NDArray[np.float32]], files: Sequence[Path], geometry: Geometry) -> Tensor:
        """Return the image, float32 `(channels, *space)`.

        Args:
            channels: the values of each file, `(*space)`.
            files: for messages.
            geometry: the files' common geometry.

        Raises:
            DataError: a scheme refuses the values of a file.
        """
        parts = []
        for index, (values, path) in enumerate(zip(channels, files, strict=True)):
            statistics = self.intensities[index] if self.intensities else None
            try:
                parts.append(torch.from_numpy(normalize_intensities(values, self.schemes[index], statistics)))
            except ValueError as refused:
                raise DataProblem(str(refused), path, "Choose another data.normalization.") from refused
        return resample_image(torch.stack(parts), self.output_size(geometry.size, geometry.spacing), self.interpolation)


@dataclass(frozen=True)
class VolumePreprocessing:
    """Settings of a `Preprocessor`.

    Args:
        normalization: a scheme of `lightning_dice.data.volumes.normalization.normalize_intensities` or a channel's
            name, for all channels or one for each. `None`: `zscore`, or in `NnunetSource` by the names of the channels.
        spacing: mm along each axis (left-right, back-front, foot-head) to resample images to. `"median"`: the training
            cases' median, `Fingerprint.median_spacing`; in a list, `None` is the median of its axis. `None`: images
            are not resampled. Scores are computed in the original geometry in any case.
        interpolation: `"linear"` or `"cubic"`, for images; see `lightning_dice.data.volumes.resampling`.

    Raises:
        ValueError: for a setting out of its range.

    >>> VolumePreprocessing("CT", spacing=[1, 1, None]).spacing
    (1.0, 1.0, None)
    """

    normalization: str | Sequence[str] | None = None
    spacing: str | Sequence[float | None] | None = "median"
    interpolation: Interpolation = "linear"

    def __post_init__(self) -> None:
        if self.interpolation not in ("linear", "cubic"):
            raise ValueError(f"interpolation must be linear or cubic, got {self.interpolation!r}")
        object.__setattr__(self, "spacing", _check_spacing(self.spacing))

    def schemes(self, channels: int) -> tuple[str, ...]:
        """Return the normalization scheme of each channel.

        Raises:
            ValueError: there are not as many names as channels.
        """
        return schemes_for_channels("zscore" if self.normalization is None else self.normalization, channels)

    def preprocessor(self, channels: int, fingerprint: Callable[[], Fingerprint]) -> Preprocessor:
        """Return the preprocessor for images of some channels.

        Args:
            channels: an image's channels.
            fingerprint: returns the fingerprint; called only if statistics of the training cases are needed.

        Raises:
            DataError: CT normalization is required, and the training cases have no foreground.
        """
        schemes = self.schemes(channels)
        intensities: tuple[Intensities, ...] = ()
        if "ct" in schemes:
            intensities = fingerprint().intensities
            if len(intensities) != channels:
                raise DataError(
                    f"data.normalization=CT needs the intensities of the training cases' foreground in {channels} "
                    f"channels, got those of {len(intensities)}: are all masks empty?"
                )
        if self.spacing is None or isinstance(self.spacing, str):
            return Preprocessor(schemes, intensities, None, self.interpolation)
        median = fingerprint().median_spacing() if None in self.spacing else (0.0,) * len(self.spacing)
        spacing = tuple(found if fixed is None else fixed for fixed, found in zip(self.spacing, median, strict=True))
        return Preprocessor(schemes, intensities, spacing, self.interpolation)


def _check_spacing(spacing: str | Sequence[float | None] | None) -> tuple[float | None, ...] | None:
    if spacing is None:
        return None
    if spacing == "median":
        return (None, None, None)
    required = "spacing must be median, null or mm along three axes such as [1,1,null]"
    if isinstance(spacing, str) or not isinstance(spacing, Sequence) or len(spacing) != 3:
        raise ValueError(f"{required}, got {spacing!r}")
    if not all(length is None or (isinstance(length, (int, float)) and 0 < length < math.inf) for length in spacing):
        raise ValueError(f"{required}, got {list(spacing)}")
    return tuple(None if length is None else float(length) for length in spacing)
