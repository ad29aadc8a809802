"""A synthetic segmentation task, drawn from a seed: no files, no download, the same images on every machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_dice.data.batch import Sample
from lightning_dice.data.images.image_format import ImageFormat
from lightning_dice.data.images.mask_format import MaskFormat
from lightning_dice.data.images.prediction_io import ImagePredictionIO
from lightning_dice.data.interfaces import Cases, PredictionIO, Split
from lightning_dice.data.splits import SPLITS

Floats = NDArray[np.float32]
Shape = Literal["disc", "ring", "square", "bar"]

# Shape and sign of the contrast of the objects of the n-th class. Looks that no class has are drawn as clutter.
LOOKS: tuple[tuple[Shape, float], ...] = (
    ("disc", 1.0),
    ("square", -1.0),
    ("ring", 1.0),
    ("bar", -1.0),
    ("disc", -1.0),
    ("square", 1.0),
    ("ring", -1.0),
    ("bar", 1.0),
)

EMPTY = 0.04  # share of images without any object
ABSENT = 0.2  # probability that one of several classes is missing from an image with objects
CLUTTER = 1 / 1200  # distracting shapes per pixel
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
        channels: of an image; all show the same scene, each with its own gain and noise.
        classes: names. With `activation="sigmoid"` 1 to 8, whose objects may overlap; with `"softmax"` 2 to 9, of which
            the first is the background and no two share a pixel.
        activation: of the network, which decides the form of a mask, see `Sample`.
        ignore_index: the label of pixels to be ignored. It is never drawn, but must not be a class.
        cases: number of cases in each split: a mapping, or three numbers for train, val and test. 0: no such split.
        foreground_fraction: expected share of the pixels that are objects, in (0, 0.5]. Each class gets an equal part
            of it; a pixel of several overlapping classes counts for each.
        contrast: mean difference of an object from its surroundings, where black is 0 and white 1.
        noise: standard deviation of the noise, on the same scale.
        seed: of the whole data set.

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
        self._scene = _Scene(
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
            raise IndexError(f"index must lie in 0 to {len(self) - 1}, got {index}")
        return self.source.draw(self.name, index)


@dataclass(frozen=True)
class _Scene:
    """Draws images and the pixels of each class, whatever the form of a mask."""

    size: tuple[int, ...]
    looks: int
    overlap: bool
    foreground_fraction: float
    contrast: float
    noise: float

    def draw(self, rng: np.random.Generator) -> tuple[Floats, NDArray[np.bool_]]:
        """Draw a scene without noise, `(*space)`, and the pixels of each class, `(classes, *space)`."""
        scene = np.full(self.size, 0.45, dtype=np.float32)
        scene += 0.12 * _smooth_field(rng, self.size, period=min(self.size) / 2)
        # Texture of about the objects' size and contrast, so that the faintest objects cannot be distinguished from it.
        scene += 0.15 * self.contrast * _smooth_field(rng, self.size, period=6)
        self._draw_clutter(scene, rng)

        planes = np.zeros((self.looks, *self.size), dtype=bool)
        if rng.random() >= EMPTY:
            # The amount varies between images by a factor of mean 1.
            pixels = self.foreground_fraction / (1 - EMPTY) * rng.uniform(0.4, 1.6) * math.prod(self.size)
            part = rng.uniform(0.4, 1.6, size=self.looks) * (rng.random(self.looks) >= ABSENT)
            if not part.any():
                part[rng.integers(self.looks)] = 1
            self._draw_objects(scene, planes, (pixels * part / part.sum()).tolist(), rng)
        return scene, planes

    def photograph(self, scene: Floats, channels: int, rng: np.random.Generator) -> Floats:
        """Return the image of a scene, `(channels, *space)`, with gain and noise, rounded to 8 bits."""
        gain = rng.uniform(0.85, 1.15, size=(channels, *[1] * scene.ndim)).astype(np.float32)
        noise = rng.standard_normal((channels, *scene.shape), dtype=np.float32)
        if channels > 1:
            # A network could average out noise that is independent in each channel.
            noise = math.sqrt(0.5) * (noise + rng.standard_normal(scene.shape, dtype=np.float32))
        image = scene * gain + np.float32(self.noise) * noise
        rounded: Floats = (np.rint(image.clip(0, 1) * 255) / 255).astype(np.float32)
        return rounded

    def _draw_objects(
        self, scene: Floats, planes: NDArray[np.bool_], missing: list[float], rng: np.random.Generator
    ) -> None:
        """Draw objects until each class has the pixels it is `missing`."""
        taken = np.zeros(self.size, dtype=bool)
        # Bounded, as an image may be too full to find free pixels in.
        for _ in range(int(50 + sum(missing))):
            wanted = [k for k in range(self.looks) if missing[k] > 0]
            if not wanted:
                break
            look = wanted[rng.integers(len(wanted))]
            shape, sign = LOOKS[look]
            strength = sign * self.contrast * rng.uniform(0.5, 1.5)
            box, level = _draw_shape(rng, self.size, shape)
            inside = level > 0.5
            new = inside & ~(planes[look][box] if self.overlap else taken[box])
            pixels = int(new.sum())
            # Drawing the last object with a probability proportional to what is missing keeps the expected share exact.
            if pixels > missing[look] and rng.random() * pixels > missing[look]:
                missing[look] = 0
                continue
            missing[look] -= pixels
            if not self.overlap:
                level = np.where(taken[box] & inside, 0, level)
                taken[box] |= inside
            scene[box] += np.float32(strength) * level
            planes[look][box] |= new

    def _draw_clutter(self, scene: Floats, rng: np.random.Generator) -> None:
        """Draw distractors: the looks that no class has, and scratches."""
        pixels = math.prod(self.size)
        number = CLUTTER * pixels * (6 / min(self.size) if len(self.size) == 3 else 1)
        spare = LOOKS[self.looks :]
        for _ in range(rng.poisson(number) if spare else 0):
            shape, sign = spare[rng.integers(len(spare))]
            box, level = _draw_shape(rng, self.size, shape)
            scene[box] += np.float32(sign * self.contrast * rng.uniform(0.4, 1.6)) * level
        for _ in range(rng.poisson(number / 6)):
            box, level = _draw_shape(rng, self.size, "bar", radius=(0.05, 0.25), width=0.5)
            scene[box] += np.float32(rng.choice([-1, 1]) * self.contrast * rng.uniform(0.4, 1.2)) * level


def _draw_shape(
    rng: np.random.Generator,
    size: tuple[int, ...],
    shape: Shape,
    radius: tuple[float, float] | None = None,
    width: float | None = None,
) -> tuple[tuple[slice, ...], Floats]:
    """Draw one shape at a random place.

    Args:
        rng: the random generator.
        size: space axes of the image.
        shape: which shape.
        radius: minimum and maximum, as a share of the shortest axis; `None`: the shape's own range in pixels.
        width: half the width of a bar, in pixels.

    Returns:
        Its bounding box, and the values in it: 1 inside, 0 outside, and between at the edge.
    """
    shortest = min(size)
    least, most = {"disc": (2.1, 8.5), "ring": (3.5, 8.0), "square": (3.0, 7.0), "bar": (4.0, 11.0)}[shape]
    most = min(most, shortest / 4)
    if radius is not None:
        least, most = (r * shortest for r in radius)
    # Log-uniform: small ones are more frequent.
    length = math.exp(rng.uniform(math.log(min(least, most)), math.log(most)))
    if shape == "bar":
        aspects = [length, *([width or max(1.0, length / 5)] * (len(size) - 1))]
    elif shape == "ring":
        aspects = [length] * len(size)
    else:
        aspects = [length, *(max(1.3, length * a) for a in rng.uniform(0.6, 1, size=len(size) - 1))]
    edge = rng.uniform(0.8, 2.0)  # pixels from 0 to 1

    center = [rng.uniform(0, s) for s in size]
    reach = math.hypot(*aspects) if shape in ("bar", "square") else max(aspects)
    reach += edge
    box = tuple(
        slice(max(0, math.floor(c - reach)), min(s, math.ceil(c + reach) + 1))
        for c, s in zip(center, size, strict=True)
    )
    axes: list[Any] = [
        np.arange(b.start + 0.5 - c, b.stop - c, dtype=np.float32).reshape(
            [-1 if i == k else 1 for i in range(len(size))]
        )
        for k, (b, c) in enumerate(zip(box, center, strict=True))
    ]
    # One rotation in the plane of each pair of neighbouring axes.
    for k in range(len(size) - 1):
        angle = rng.uniform(0, math.pi)
        cos, sin = math.cos(angle), math.sin(angle)
        axes[k], axes[k + 1] = cos * axes[k] + sin * axes[k + 1], cos * axes[k + 1] - sin * axes[k]

    if shape in ("disc", "ring"):
        norm = np.sqrt(sum((x / a) ** 2 for x, a in zip(axes, aspects, strict=True)))
        inwards = (1 - norm) * min(aspects)
        if shape == "ring":
            thickness = max(1.6, 0.4 * length)
            inwards = thickness / 2 - abs(inwards - thickness / 2)
    else:
        inwards = aspects[0] - abs(axes[0])
        for x, a in zip(axes[1:], aspects[1:], strict=True):
            inwards = np.minimum(inwards, a - abs(x))
    level: Floats = (inwards / edge + 0.5).clip(0, 1).astype(np.float32)
    return box, level


def _smooth_field(rng: np.random.Generator, size: tuple[int, ...], period: float) -> Floats:
    """Draw a random field that varies over about `period` pixels, with a standard deviation of about 0.7 or less."""
    knots = [math.ceil(s / period) + 2 for s in size]
    field = rng.standard_normal(knots, dtype=np.float32)
    for axis, (s, k) in enumerate(zip(size, knots, strict=True)):
        at = np.arange(s, dtype=np.float32) / np.float32(period)
        low = at.astype(np.intp)
        t = at - low
        t = t * t * (3 - 2 * t)  # with linear weights the grid would be visible
        weights = np.zeros((s, k), dtype=np.float32)
        rows = np.arange(s)
        weights[rows, low] = 1 - t
        weights[rows, low + 1] = t
        field = np.moveaxis(np.tensordot(weights, field, axes=(1, axis)), 0, axis)
    return field


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
