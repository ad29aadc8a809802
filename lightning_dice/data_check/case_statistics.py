"""What one case shows: its size, intensities and classes, and the little that a comparison with other cases needs."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightning_dice.data.batch import Sample
from lightning_dice.data.interfaces import Split
from lightning_dice.functional.orientation import boundary_pixels, edge_ranks
from lightning_dice.plotting.colors import IGNORED, class_colors, parse_color

SMALL = 10  # pixels: components below it are counted apart
LEVELS = 32  # more distinct values than this are not counted
SAMPLED = 2**18  # pixels that percentiles are taken of
THUMBNAIL = 112  # pixels, of the longer side

# Images of any size are compared on one grid for each number of space axes, of equally many pixels.
GRIDS = {1: (4096,), 2: (64, 64), 3: (16, 16, 16)}
FEWEST_PIXELS = 64  # of outline
FINEST = {1: 4096, 2: 384, 3: 64}  # pixels along an axis on which orientations are tried: more are reduced

Move = tuple[tuple[int, ...], tuple[int, ...]]  # the order of the axes, and which of them are flipped then


@dataclass(frozen=True)
class Task:
    """What the masks of a data set mean.

    Attributes:
        classes: names of the logits' channels.
        activation: `"softmax"`: ids of classes that exclude each other; `"sigmoid"`: a plane for each class.
        ignore_index: the label of pixels that count as nothing.
        exclude_classes: indices that neither loss nor score counts, such as the background of a softmax.

    >>> Task(["background", "axon", "myelin"], "softmax", exclude_classes=[0]).counted
    [1, 2]
    """

    classes: Sequence[str]
    activation: Literal["softmax", "sigmoid"] = "softmax"
    ignore_index: int | None = 255
    exclude_classes: Sequence[int] = ()

    @property
    def counted(self) -> list[int]:
        """Indices of the classes that loss and score count."""
        return [index for index in range(len(self.classes)) if index not in self.exclude_classes]

    @property
    def objects(self) -> list[int]:
        """Indices of the classes that are something: a softmax's first class is not, if it is called background."""
        first = str(self.classes[0]).lower()
        rest = self.activation == "softmax" and first in ("background", "bg", "other", "rest", "none")
        return [index for index in self.counted if index >= rest]


@dataclass(frozen=True)
class Objects:
    """What a mask holds of one class.

    Attributes:
        pixels: how many.
        sizes: pixels of each connected component, ascending; pixels that touch at a corner are one component.
        edge: pixels of the class beside one of another along some axis.
    """

    pixels: int
    sizes: NDArray[np.int64]
    edge: int


@dataclass
class CaseStatistics:
    """One case, without its pixels.

    Attributes:
        split: where it stands.
        name: as scores know it.
        index: in the split.
        size: space axes of the image.
        mask_size: of the mask; another one where the image was resampled for evaluation.
        spacing: of the mask, in mm along each axis.
        kind: depth and colour of the file, where the source tells; else empty.
        channels: of the image.
        range: of the image: minimum, 1st, 50th and 99th percentile, maximum; of the finite values.
        mean: of each channel.
        std: of each channel.
        nonfinite: values of the image that are NaN or infinite.
        levels: distinct values of the image; `None` if there are more than `LEVELS`.
        pixels: of the mask.
        objects: of each class.
        ignored: pixels that count as nothing: for planes, the mean over the classes.
        unannotated: classes whose plane holds nothing but the ignored label.
        strange: pixels of each value of the mask that no class has.
        image_digest: equal for equal images.
        mask_digest: equal for equal masks.
        texture: a picture on the grid of `GRIDS` from which brightness, contrast and slow changes of both are removed,
            of mean 0 and length 1; 0 where there is nothing left.
        placement: how well the mask's outline lies on the image's edges, as it is and in each orientation of
            `moves(axes)`; NaN where that has another size, or there is too little outline.
        thumbnail: the image, and the mask drawn over it, as a JPEG; `None` if none was asked for.
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
    objects: list[Objects] = field(default_factory=list)
    ignored: float = 0.0
    unannotated: tuple[int, ...] = ()
    strange: dict[int, int] = field(default_factory=dict)
    image_digest: bytes = b""
    mask_digest: bytes = b""
    texture: NDArray[np.float16] = field(default_factory=lambda: np.zeros(0, np.float16))
    placement: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    thumbnail: bytes | None = None

    @property
    def key(self) -> str:
        """Split and name, by which findings know it."""
        return f"{self.split}/{self.name}"

    def foreground(self, task: Task) -> int:
        """Pixels of the classes that are something; overlapping ones count for each."""
        return sum(self.objects[index].pixels for index in task.objects)


def measure(
    sample: Sample, split: Split, task: Task, *, index: int = 0, kind: str = "", thumbnail: bool = True
) -> CaseStatistics:
    """Measure a case.

    Args:
        sample: as a source gives it: image `(channels, *space)`, mask `(*space)` or `(classes, *space)`.
        split: where it stands.
        task: what the mask means.
        index: in the split.
        kind: depth and colour of the image's file.
        thumbnail: whether to draw it.

    >>> image = torch.zeros(1, 32, 32)
    >>> image[:, 8:16, 8:24] = 1
    >>> case = measure(Sample(image, image[0].int(), "a"), "train", Task(["background", "bar"]))
    >>> case.objects[1].pixels, case.objects[1].sizes.tolist(), case.levels, int(case.placement.argmax())
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
    _measure_placement(finite, mask, case, task)
    if thumbnail:
        case.thumbnail = draw(finite, mask, task)
    return case


def class_plane(mask: Tensor, index: int, axes: int, task: Task) -> Tensor:
    """Where a mask is of a class, bool `(*space)`; soft labels count from 1/2 on.

    Args:
        mask: ids `(*space)` or planes `(classes, *space)`.
        index: of the class.
        axes: how many space axes there are.
        task: what the mask means.
    """
    if mask.ndim == axes:
        return mask == index
    plane = mask[index]
    here = plane > 0.5
    return here & ~_ignored(plane, task)


def _ignored(mask: Tensor, task: Task) -> Tensor:
    """Where a mask says nothing: at the ignored label, or NaN among soft labels."""
    found = torch.isnan(mask) if mask.is_floating_point() else torch.zeros_like(mask, dtype=torch.bool)
    return found if task.ignore_index is None else found | (mask == task.ignore_index)


def moves(axes: int) -> list[Move]:
    """All ways to exchange and flip the axes of a picture; the first leaves it as it is.

    >>> len(moves(2)), len(moves(3)), moves(2)[1]
    (8, 48, ((0, 1), (1,)))
    """
    flips = [tuple(axis for axis in range(axes) if chosen[axis]) for chosen in itertools.product((0, 1), repeat=axes)]
    return [(order, flipped) for order in itertools.permutations(range(axes)) for flipped in flips]


def moved(array: Any, move: Move) -> Any:
    """An array with its axes exchanged, then flipped."""
    order, flipped = move
    array = array.transpose(order)
    return np.flip(array, flipped) if flipped else array


def describe(move: Move) -> tuple[str, str]:
    """What has happened to a mask that this move brings back, and the move as code.

    >>> describe(((1, 0), ()))
    ('transposed: its rows are the columns of the image', 'mask.T')
    >>> describe(((0, 2, 1), (2,)))
    ('its axes exchanged (0, 2, 1) and flipped along axis 2', 'mask.transpose(0, 2, 1)[:, :, ::-1]')
    """
    order, flipped = move
    axes = len(order)
    if axes == 2:
        return _PLANE[move]
    exchanged = order != tuple(range(axes))
    words = [f"its axes exchanged {order}"] if exchanged else []
    words += [f"flipped along ax{'e' if len(flipped) > 1 else 'i'}s {', '.join(map(str, flipped))}"] if flipped else []
    code = f"mask.transpose{order}" if exchanged else "mask"
    if flipped:
        code += f"[{', '.join('::-1' if axis in flipped else ':' for axis in range(axes))}]"
    return " and ".join(words), code


_PLANE: dict[Move, tuple[str, str]] = {
    ((0, 1), ()): ("as it is", "mask"),
    ((0, 1), (0,)): ("upside down", "mask[::-1]"),
    ((0, 1), (1,)): ("mirrored left to right", "mask[:, ::-1]"),
    ((0, 1), (0, 1)): ("turned by 180 degrees", "mask[::-1, ::-1]"),
    ((1, 0), ()): ("transposed: its rows are the columns of the image", "mask.T"),
    ((1, 0), (0, 1)): ("mirrored along its rising diagonal", "mask[::-1, ::-1].T"),
    ((1, 0), (0,)): ("turned by 90 degrees clockwise", "numpy.rot90(mask)"),
    ((1, 0), (1,)): ("turned by 90 degrees counter-clockwise", "numpy.rot90(mask, -1)"),
}


def texture(image: Tensor) -> NDArray[np.float16]:
    """What of an image does not hang on brightness, contrast or its number of pixels, as a vector of length 1.

    The mean over the channels is reduced to a grid, and made of mean 0 and variance 1 around each place (a Gaussian of
    4 pixels of 64): two pictures of alike things share shape and shading, but not this.
    """
    from scipy import ndimage

    axes = image.ndim - 1
    grid = GRIDS[axes]
    small = _pooled(image.mean(0, keepdim=True), grid, "avg")[0].numpy().astype(np.float32)
    sigma = grid[-1] / 16
    high = small - ndimage.gaussian_filter(small, sigma)
    local = np.sqrt(ndimage.gaussian_filter(high * high, sigma))
    spread = float(high.std())
    if spread <= 1e-6 * (float(np.abs(small).max()) + 1e-12):
        return np.zeros(high.size, np.float16)
    flat = (high / (local + 0.2 * spread)).ravel()
    flat -= flat.mean()
    return np.asarray(flat / np.linalg.norm(flat), np.float16)


def draw(image: Tensor, mask: Tensor, task: Task, longest: int = THUMBNAIL) -> bytes:
    """A JPEG: the image on the left, and on the right the same with its mask in colours.

    Of a volume, the slice along the last axis that holds most foreground.

    Args:
        image: finite, `(channels, *space)`.
        mask: ids `(*space)` or planes `(classes, *space)`.
        task: names and excluded classes.
        longest: pixels of the longer side of each of the two; smaller images are not enlarged.
    """
    from PIL import Image

    axes = image.ndim - 1
    if axes == 3:
        total = sum(class_plane(mask, i, axes, task).sum((0, 1)) for i in task.objects)
        index = int(total.argmax()) if isinstance(total, Tensor) and bool(total.any()) else mask.shape[-1] // 2
        # Of a resampled image, the slice at the same height.
        level = min(image.shape[-1] - 1, int((index + 0.5) * image.shape[-1] / mask.shape[-1]))
        image, mask = image[..., level], mask[..., index]
    elif axes == 1:
        image, mask = (part.unsqueeze(-2).expand(*part.shape[:-1], 32, -1) for part in (image, mask))
    planes = torch.stack([class_plane(mask, i, 2, task) for i in range(len(task.classes))])
    veil = _ignored(mask, task)
    veil = (veil.all(0) if veil.ndim == 3 else veil).unsqueeze(0)
    scale = min(1.0, longest / max(planes.shape[1:]))
    size = tuple(max(1, round(length * scale)) for length in planes.shape[1:])
    colors = image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    low, high = np.percentile(colors[:, :: max(1, colors.shape[1] // 512), :: max(1, colors.shape[2] // 512)], [1, 99])
    colors = _pooled(((colors - low) / max(float(high - low), 1e-6)).clamp(0, 1), size, "avg")
    plain = colors.permute(1, 2, 0).numpy() * 255
    painted = plain.copy()
    # The largest of the pixels that one of the thumbnail stands for: thin things stay visible.
    layers = [(_pooled(veil.float(), size, "avg")[0].numpy() > 0.5, parse_color(IGNORED))]
    palette = class_colors(len(task.classes), skip=[i for i in range(len(task.classes)) if i not in task.objects])
    layers += [(_pooled(planes[i : i + 1].float(), size, "max")[0].numpy() > 0, palette[i]) for i in task.objects]
    for where, color in layers:
        painted[where] = 0.5 * painted[where] + 0.5 * np.array(color)
    for where, color in layers[1:]:
        rim = boundary_pixels(torch.from_numpy(where)[None, None])[0].numpy() & where
        painted[rim] = color
    gap = np.full((plain.shape[0], 2, 3), 255.0)
    picture = np.concatenate([plain, gap, painted], 1).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=72)
    return file.getvalue()


def _pooled(image: Tensor, size: Sequence[int], kind: Literal["avg", "max"]) -> Tensor:
    """`(channels, *space)` on a grid of `size`: the mean, or the largest, of the pixels that one stands for."""
    axes = image.ndim - 1
    average: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[axes - 1]
    largest: Any = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[axes - 1]
    result: Tensor = (average if kind == "avg" else largest)(image.unsqueeze(0), tuple(size))[0]
    return result


def _measure_image(image: Tensor, case: CaseStatistics) -> None:
    values = image.flatten(1)
    finite = torch.isfinite(values)
    case.nonfinite = int(values.numel() - finite.sum())
    step = max(1, values.shape[1] // SAMPLED)
    some = values[:, ::step].flatten()
    some = some[torch.isfinite(some)] if case.nonfinite else some
    known = [values[i][finite[i]] if case.nonfinite else values[i] for i in range(len(values))]
    known = [channel if len(channel) else torch.zeros(1) for channel in known]
    low, high = (float(f(torch.stack([f(channel) for channel in known]))) for f in (torch.min, torch.max))
    middle = np.percentile(some.numpy(), [1, 50, 99]) if len(some) else np.zeros(3)
    case.range = (low, float(middle[0]), float(middle[1]), float(middle[2]), high)
    case.mean = tuple(float(channel.double().mean()) for channel in known)
    case.std = tuple(float(channel.double().std(correction=0)) for channel in known)
    # The first channel tells a picture from a mask.
    few = np.unique(values[0][:: max(1, values.shape[1] // 4096)].numpy())
    levels = len(np.unique(values[0].numpy())) if len(few) <= LEVELS else len(few)
    case.levels = levels if levels <= LEVELS else None


def _measure_mask(mask: Tensor, case: CaseStatistics, task: Task) -> None:
    axes = len(case.mask_size)
    case.pixels = math.prod(case.mask_size)
    ignored = _ignored(mask, task)
    if mask.ndim > axes:
        counts = ignored.flatten(1).sum(1).tolist()
        case.ignored = sum(counts) / len(counts)
        case.unannotated = tuple(index for index, count in enumerate(counts) if count == case.pixels)
    else:
        case.ignored = int(ignored.sum())
    if not mask.is_floating_point() and mask.dtype != torch.bool:
        ids = 2 if mask.ndim > axes else len(task.classes)
        wrong = ((mask < 0) | (mask >= ids)) & ~ignored
        if bool(wrong.any()):
            values, counted = np.unique(mask[wrong].numpy(), return_counts=True)
            case.strange = dict(zip(values.tolist(), counted.tolist(), strict=True))
    # One class after the other: the planes of all classes of a volume may be more than memory holds.
    case.objects = [count_objects(class_plane(mask, i, axes, task).numpy()) for i in range(len(task.classes))]


def count_objects(plane: NDArray[np.bool_]) -> Objects:
    """The connected components of a class.

    >>> found = count_objects(np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]]) == 1)
    >>> found.pixels, found.sizes.tolist(), found.edge
    (5, [1, 4], 4)
    """
    from scipy import ndimage

    pixels = int(np.count_nonzero(plane))
    if not pixels:
        return Objects(0, np.zeros(0, np.int64), 0)
    box = []
    for axis in range(plane.ndim):
        used = np.flatnonzero(plane.any(tuple(other for other in range(plane.ndim) if other != axis)))
        box.append(slice(max(0, int(used[0]) - 1), int(used[-1]) + 2))
    part = plane[tuple(box)]
    numbers, _ = ndimage.label(part, ndimage.generate_binary_structure(part.ndim, part.ndim))
    sizes = np.sort(np.bincount(numbers.ravel())[1:]).astype(np.int64)
    # What the picture's border cuts has no edge there.
    inner = ndimage.binary_erosion(part, border_value=1)
    return Objects(pixels, sizes, pixels - int(np.count_nonzero(inner)))


def placed(image: Tensor, mask: Tensor, task: Task) -> tuple[NDArray[np.float32], NDArray[np.bool_]] | None:
    """Ranks of an image's gradient, and where its mask's outline runs, on a grid of at most `FINEST` pixels a side.

    Returns:
        Both `(*grid)`; `None` where there is too little outline to tell anything.
    """
    axes = image.ndim - 1
    layers = (mask if mask.ndim == image.ndim else mask.unsqueeze(0)).unsqueeze(0)
    if layers.is_floating_point():
        layers = layers > 0.5
    outline = boundary_pixels(layers, None if layers.dtype == torch.bool else task.ignore_index).float()
    size = tuple(outline.shape[1:])
    if tuple(image.shape[1:]) != size:
        image = F.interpolate(image.unsqueeze(0), size=size, mode="nearest")[0]
    factors = tuple(-(-length // FINEST[axes]) for length in size)
    if max(factors) > 1:
        average: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[axes - 1]
        largest: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[axes - 1]
        image = average(image.unsqueeze(0), factors, ceil_mode=True)[0]
        outline = largest(outline.unsqueeze(0), factors, ceil_mode=True)[0]
    where = outline[0].numpy() > 0
    if np.count_nonzero(where) < FEWEST_PIXELS or where.all():
        return None
    return edge_ranks(image.unsqueeze(0))[0].numpy(), where


def _measure_placement(image: Tensor, mask: Tensor, case: CaseStatistics, task: Task) -> None:
    possible = moves(image.ndim - 1)
    case.placement = np.full(len(possible), np.nan, np.float32)
    found = placed(image, mask, task)
    if found is None:
        return
    ranks, outline = found
    for index, move in enumerate(possible):
        if tuple(case.mask_size[axis] for axis in move[0]) == case.mask_size:
            case.placement[index] = ranks[moved(outline, move)].mean()


def _digest(tensor: Tensor) -> bytes:
    array = np.ascontiguousarray(tensor.numpy())
    state = blake2b(f"{array.dtype}{array.shape}".encode(), digest_size=16)
    state.update(array.view(np.uint8).data)
    return state.digest()
