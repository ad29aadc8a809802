"""Draw the scenes of `SyntheticSource`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

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


@dataclass(frozen=True)
class Scene:
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
