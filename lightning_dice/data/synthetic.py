"""A synthetic segmentation task, drawn from a seed: no files, no download, the same images on every machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from lightning_dice.data.batch import Sample
from lightning_dice.data.images.image_format import ImageFormat
from lightning_dice.data.images.mask_format import MaskFormat
from lightning_dice.data.images.prediction_io import ImagePredictionIO
from lightning_dice.data.interfaces import Cases, PredictionIO, Split
from lightning_dice.data.splits import SPLITS
from lightning_dice.data.synthetic_scene import LOOKS, Scene

MAX_CHECKED = 64  # cases of each split that `check` draws


class SyntheticSource:
    r"""Images of many small, low-contrast objects among clutter, drawn on the fly.

    An image shows objects, distracting shapes, scratches and noise on an uneven, textured background. Objects have
    soft edges, and the smallest and faintest of them are lost in the noise, so no network reaches a Dice of 1. Classes
    differ in shape (disc, square, ring, bar) and in being brighter or darker than their surroundings. A few images have
    no object; the smaller the images and the foreground, the more of them.

    A case depends on `(seed, split, index)` and the settings only, not on the order of access, the worker or the
    process. Images are rounded to 8 bits, as if read from a PNG.

    Args:
        size: space axes of an image, in pixels: two, or three for volumes.
        channels: number of channels of an image; all show the same scene, each with its own gain and noise.
        classes: names. With `activation="sigmoid"` 1 to 8, whose objects may overlap; with `"softmax"` 2 to 9, of which
            the first is the background and no two share a pixel.
        activation: the network's, which decides the form of a mask, see `Sample`.
        ignore_index: the label of pixels to be ignored. It is never drawn, but must not be a class.
        cases: number of cases in each split: a mapping, or three numbers for train, val and test. 0: no such split.
        foreground_fraction: expected share of the pixels that are objects, in (0, 0.5]. Each class gets an equal part
            of it; a pixel of several overlapping classes counts for each.
        contrast: mean difference of an object from its surroundings, where black is 0 and white 1.
        noise: standard deviation of the noise, on the same scale.
        seed: for the whole data set.

    Raises:
        ValueError: for a setting out of its range.

    >>> source = SyntheticSource(size=(64, 64), cases={"train": 4, "val": 2})
    >>> image, mask, case, *_ = source.split("train")[0]
    >>> image.shape, image.dtype, mask.shape, mask.dtype, case
    (torch.Size([1, 64, 64]), torch.float32, torch.Size([1, 64, 64]), torch.uint8, 'train-0000')
    >>> print(source.split("test"))
    None
    """

    def __init__(
        self,
        *,
        size: Sequence[int] = (128, 128),
        channels: int = 1,
        classes: Sequence[str] = ("object",),
        activation: Literal["sigmoid", "softmax"] = "sigmoid",
        ignore_index: int | None = 255,
        cases: Mapping[str, int] | Sequence[int] = (160, 40, 40),
        foreground_fraction: float = 0.03,
        contrast: float = 0.25,
        noise: float = 0.05,
        seed: int = 0,
    ) -> None:
        if len(size) not in (2, 3) or not all(_is_integer(s) and s >= 16 for s in size):
            raise ValueError(f"size must be two or three integers of at least 16 pixels, got {_format(size)}")
        if not _is_integer(channels) or channels < 1:
            raise ValueError(f"channels must be a positive integer, got {channels!r}")
        if activation not in ("sigmoid", "softmax"):
            raise ValueError(f"activation must be 'sigmoid' or 'softmax', got {activation!r}")
        background = int(activation == "softmax")
        fewest, most = 1 + background, len(LOOKS) + background
        if isinstance(classes, str) or not fewest <= len(classes) <= most:
            rule = "the first being the background" if background else "none being the background"
            raise ValueError(
                f"classes must be {fewest} to {most} names with activation={activation!r}, {rule}, "
                f"got {_format(classes)}"
            )
        if len(set(classes)) < len(classes):
            raise ValueError(f"classes must differ from each other, got {_format(classes)}")
        labels = len(classes) if background else 2
        if ignore_index is not None and (not _is_integer(ignore_index) or 0 <= ignore_index < labels):
            raise ValueError(
                f"ignore_index must be None or an integer outside the labels of a mask, 0 to {labels - 1}, "
                f"got {ignore_index!r}"
            )
        if not 0 < foreground_fraction <= 0.5:
            raise ValueError(
                f"foreground_fraction must be a share of the pixels in (0, 0.5], got {foreground_fraction!r}"
            )
        for name, value in (("contrast", contrast), ("noise", noise)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], where black is 0 and white 1, got {value!r}")
        if not _is_integer(seed) or seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")

        self.cases = _check_cases(cases)
        self.classes = tuple(classes)
        self.activation = activation
        self.ignore_index = ignore_index
        self.channels = channels
        self.seed = seed
        self._scene = Scene(
            size=tuple(int(s) for s in size),
            looks=len(classes) - background,
            overlap=not background,
            foreground_fraction=foreground_fraction,
            contrast=contrast,
            noise=noise,
        )

    @property
    def size(self) -> tuple[int, ...]:
        """Space axes of every image, in pixels."""
        return self._scene.size

    @property
    def reader(self) -> PredictionIO:
        """Reads images, or NIfTI volumes without preprocessing, and writes masks of ids."""
        if len(self.size) == 2:
            return ImagePredictionIO(
                MaskFormat(self.classes, self.activation, self.ignore_index), ImageFormat(self.channels)
            )
        from lightning_dice.data.label_map import LabelMap
        from lightning_dice.data.volumes.prediction_io import VolumePredictionIO
        from lightning_dice.data.volumes.preprocessing import Preprocessor

        labels = LabelMap.of_ids(self.classes, self.activation, self.ignore_index)
        return VolumePredictionIO(labels, self.channels, lambda: Preprocessor(("nonorm",) * self.channels))

    def check(self) -> str:
        """Draw some cases of each split.

        Returns:
            A line for each split: cases, size, and each class's share of the pixels and of the cases.
        """
        lines = []
        for name in SPLITS:
            if (cases := self.split(name)) is None:
                continue
            drawn = [self._planes(cases[i].mask) for i in range(min(len(cases), MAX_CHECKED))]
            pixels = torch.stack([planes.flatten(1).sum(1) for planes in drawn])
            share = pixels.sum(0) / (len(drawn) * math.prod(self.size))
            present = (pixels > 0).double().mean(0)
            shown = "cases" if len(drawn) == len(cases) else f"the first {len(drawn)} cases"
            found = [
                f"{c} {100 * share[k]:.1f} % of pixels, in {100 * present[k]:.0f} % of {shown}"
                for k, c in enumerate(self.classes)
            ]
            number = f"{len(cases)} case{'s' if len(cases) > 1 else ''}"
            lines.append(f"{name}: {number}, {'x'.join(map(str, self.size))}; " + "; ".join(found))
        return "\n".join(lines)

    def split(self, name: Split) -> Cases | None:
        """Return the cases of a split, or `None` if it has none."""
        if name not in SPLITS:
            raise ValueError(f"name must be one of {', '.join(SPLITS)}, got {name!r}")
        return _SyntheticCases(self, name, self.cases[name]) if self.cases[name] else None

    def draw(self, split: Split, index: int) -> Sample:
        """Draw one case of a split."""
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, SPLITS.index(split), index]))
        scene, planes = self._scene.draw(rng)
        image = torch.from_numpy(self._scene.photograph(scene, self.channels, rng))
        if self.activation == "sigmoid":
            mask = torch.from_numpy(planes.astype(np.uint8))
        else:
            labels = np.arange(1, len(planes) + 1, dtype=np.uint8)
            mask = torch.from_numpy((planes * labels.reshape(-1, *[1] * (planes.ndim - 1))).sum(0, dtype=np.uint8))
        return Sample(image, mask, f"{split}-{index:04d}")

    def _planes(self, mask: torch.Tensor) -> torch.Tensor:
        if self.activation == "sigmoid":
            return mask.double()
        return torch.stack([mask == k for k in range(len(self.classes))]).double()


class _SyntheticCases:
    def __init__(self, source: SyntheticSource, name: Split, number: int) -> None:
        self.source = source
        self.name = name
        self.sizes: Sequence[tuple[int, ...]] = [source.size] * number

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be between 0 and {len(self) - 1}, got {index}")
        return self.source.draw(self.name, index)


def _check_cases(cases: Mapping[str, int] | Sequence[int]) -> dict[Split, int]:
    requirement = (
        "cases must be a mapping from train, val and test to numbers of cases, or three such numbers, at least one "
        "of them above 0"
    )
    shown = dict(cases) if isinstance(cases, Mapping) else cases
    if not isinstance(cases, Mapping):
        if len(cases) != len(SPLITS):
            raise ValueError(f"{requirement}, got {_format(shown)}")
        cases = dict(zip(SPLITS, cases, strict=True))
    counts: dict[Split, int] = {name: cases.get(name, 0) for name in SPLITS}
    unknown = set(cases) - set(SPLITS)
    if unknown or not all(_is_integer(n) and n >= 0 for n in counts.values()) or not any(counts.values()):
        raise ValueError(f"{requirement}, got {_format(shown)}")
    return counts


def _is_integer(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _format(value: Any) -> str:
    """Format a value for a message; lists of a config have a type of their own."""
    return repr(value if isinstance(value, (str, Mapping)) else tuple(value))
