"""Measurements of one case: sizes, intensities, classes, and features for comparing it with other cases."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dice.data.batch import Sample
from lightning_dice.data.interfaces import Split
from lightning_dice.data_check.orientations import measure_alignment
from lightning_dice.data_check.task import Task, class_plane, ignored_pixels
from lightning_dice.data_check.texture import texture
from lightning_dice.data_check.thumbnail import draw_thumbnail

SMALL = 10  # pixels: smaller components are counted separately
MAX_LEVELS = 32  # distinct values: more are not counted
SAMPLED = 2**18  # pixels for percentiles


@dataclass(frozen=True)
class ClassComponents:
    """One class in one mask.

    Attributes:
        pixels: number of pixels.
        sizes: pixels of each connected component, ascending; pixels that touch at a corner are one component.
        edge: number of pixels with a neighbour of another class along some axis.
    """

    pixels: int
    sizes: NDArray[np.int64]
    edge: int


@dataclass
class CaseStatistics:
    """Measurements of one case, without its pixels.

    Attributes:
        split: the case's split.
        name: the case's name, as in the table of scores.
        index: the case's position in its split.
        size: space axes of the image.
        mask_size: space axes of the mask; they differ if the image was resampled for evaluation.
        spacing: the mask's spacing, in mm along each axis.
        kind: bit depth and colour of the file; empty if the source does not report them.
        channels: number of channels of the image.
        range: minimum, 1st, 50th and 99th percentile and maximum of the image's finite values.
        mean: the mean of each channel.
        std: the standard deviation of each channel.
        nonfinite: number of values of the image that are NaN or infinite.
        levels: number of distinct values of the image; `None` if more than `MAX_LEVELS`.
        pixels: number of pixels of the mask.
        components: the connected components of each class.
        ignored: number of ignored pixels; for planes, the mean over the classes.
        unannotated: classes whose plane has only the ignored label.
        unknown_labels: number of pixels of each label of the mask that belongs to no class.
        image_digest: equal for equal images.
        mask_digest: equal for equal masks.
        texture: see `lightning_dice.data_check.texture.texture`; all 0 for a constant image.
        alignment: how well the mask's outline fits the image's edges in each of `orientations`: see
            `measure_alignment`.
        thumbnail: the image, and the mask drawn over it, as a JPEG; `None` if not drawn.
    """

    split: Split
    name: str
    index: int
    size: tuple[int, ...]
    mask_size: tuple[int, ...]
    spacing: tuple[float, ...] | None = None
    kind: str = ""
    channels: int = 1
    range: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    nonfinite: int = 0
    levels: int | None = None
    pixels: int = 0
    components: list[ClassComponents] = field(default_factory=list)
    ignored: float = 0.0
    unannotated: tuple[int, ...] = ()
    unknown_labels: dict[int, int] = field(default_factory=dict)
    image_digest: bytes = b""
    mask_digest: bytes = b""
    texture: NDArray[np.float16] = field(default_factory=lambda: np.zeros(0, np.float16))
    alignment: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    thumbnail: bytes | None = None

    @property
    def key(self) -> str:
        """Split and name, as in findings."""
        return f"{self.split}/{self.name}"

    def foreground_pixels(self, task: Task) -> int:
        """Return the pixels of the foreground classes; pixels of overlapping classes count for each."""
        return sum(self.components[index].pixels for index in task.foreground)

    @property
    def has_alignment(self) -> bool:
        """Whether there is enough outline to judge the mask's position."""
        return bool(self.alignment.size) and not math.isnan(self.alignment[0])


def measure(
    sample: Sample, split: Split, task: Task, *, index: int = 0, kind: str = "", thumbnail: bool = True
) -> CaseStatistics:
    """Measure a case.

    Args:
        sample: image `(channels, *space)`, mask `(*space)` or `(classes, *space)`.
        split: the case's split.
        task: the meaning of the mask.
        index: the case's position in its split.
        kind: bit depth and colour of the image's file.
        thumbnail: whether to draw a thumbnail.

    >>> image = torch.zeros(1, 32, 32)
    >>> image[:, 8:16, 8:24] = 1
    >>> case = measure(Sample(image, image[0].int(), "a"), "train", Task(["background", "bar"]))
    >>> case.components[1].pixels, case.components[1].sizes.tolist(), case.levels, int(case.alignment.argmax())
    (128, [128], 2, 0)
    """
    image, mask = sample.image.float(), sample.mask
    mask_size = tuple(mask.shape[mask.ndim - image.ndim + 1 :])
    case = CaseStatistics(split, sample.case, index, tuple(image.shape[1:]), mask_size, sample.spacing, kind)
    case.channels = image.shape[0]
    _measure_image(image, case)
    _measure_mask(mask, case, task)
    case.image_digest, case.mask_digest = _digest(image), _digest(mask)
    finite = image if not case.nonfinite else torch.nan_to_num(image, nan=case.range[2], posinf=0.0, neginf=0.0)
    case.texture = texture(finite)
    case.alignment = measure_alignment(finite, mask, task)
    if thumbnail:
        case.thumbnail = draw_thumbnail(finite, mask, task)
    return case


def _measure_image(image: Tensor, case: CaseStatistics) -> None:
    values = image.flatten(1)
    finite = torch.isfinite(values)
    case.nonfinite = int(values.numel() - finite.sum())
    step = max(1, values.shape[1] // SAMPLED)
    sampled = values[:, ::step].flatten()
    sampled = sampled[torch.isfinite(sampled)] if case.nonfinite else sampled
    known = [values[i][finite[i]] if case.nonfinite else values[i] for i in range(len(values))]
    known = [channel if len(channel) else torch.zeros(1) for channel in known]
    low, high = (float(f(torch.stack([f(channel) for channel in known]))) for f in (torch.min, torch.max))
    percentiles = np.percentile(sampled.numpy(), [1, 50, 99]) if len(sampled) else np.zeros(3)
    case.range = (low, float(percentiles[0]), float(percentiles[1]), float(percentiles[2]), high)
    case.mean = tuple(float(channel.double().mean()) for channel in known)
    case.std = tuple(float(channel.double().std(correction=0)) for channel in known)
    # The first channel is enough to tell an image from a mask, and a sample rules out most images.
    few = np.unique(values[0][:: max(1, values.shape[1] // 4096)].numpy())
    levels = len(np.unique(values[0].numpy())) if len(few) <= MAX_LEVELS else len(few)
    case.levels = levels if levels <= MAX_LEVELS else None


def _measure_mask(mask: Tensor, case: CaseStatistics, task: Task) -> None:
    axes = len(case.mask_size)
    case.pixels = math.prod(case.mask_size)
    ignored = ignored_pixels(mask, task)
    if mask.ndim > axes:
        counts = ignored.flatten(1).sum(1).tolist()
        case.ignored = sum(counts) / len(counts)
        case.unannotated = tuple(index for index, count in enumerate(counts) if count == case.pixels)
    else:
        case.ignored = int(ignored.sum())
    if not mask.is_floating_point() and mask.dtype != torch.bool:
        ids = 2 if mask.ndim > axes else len(task.classes)
        unknown = ((mask < 0) | (mask >= ids)) & ~ignored
        if bool(unknown.any()):
            labels, counted = np.unique(mask[unknown].numpy(), return_counts=True)
            case.unknown_labels = dict(zip(labels.tolist(), counted.tolist(), strict=True))
    # One class at a time, because the planes of all classes of a volume may not fit in memory.
    planes = (class_plane(mask, i, axes, task).numpy() for i in range(len(task.classes)))
    case.components = [measure_components(plane) for plane in planes]


def measure_components(plane: NDArray[np.bool_]) -> ClassComponents:
    """Measure the connected components of a class.

    >>> found = measure_components(np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]]) == 1)
    >>> found.pixels, found.sizes.tolist(), found.edge
    (5, [1, 4], 4)
    """
    from scipy import ndimage

    pixels = int(np.count_nonzero(plane))
    if not pixels:
        return ClassComponents(0, np.zeros(0, np.int64), 0)
    box = []
    for axis in range(plane.ndim):
        used = np.flatnonzero(plane.any(tuple(other for other in range(plane.ndim) if other != axis)))
        box.append(slice(max(0, int(used[0]) - 1), int(used[-1]) + 2))
    part = plane[tuple(box)]
    numbers, _ = ndimage.label(part, ndimage.generate_binary_structure(part.ndim, part.ndim))
    sizes = np.sort(np.bincount(numbers.ravel())[1:]).astype(np.int64)
    # The border of the image is not an edge of the components that it cuts.
    inner = ndimage.binary_erosion(part, border_value=1)
    return ClassComponents(pixels, sizes, pixels - int(np.count_nonzero(inner)))


def _digest(tensor: Tensor) -> bytes:
    array = np.ascontiguousarray(tensor.numpy())
    state = blake2b(f"{array.dtype}{array.shape}".encode(), digest_size=16)
    state.update(array.view(np.uint8).data)
    return state.digest()
