"""Independent definitions of the losses, in plain Python floats and loops, for comparison."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# The logarithm of 0 is replaced by that of the least normal float64.
LEAST = sys.float_info.min


@dataclass
class PlainSums:
    """Sums of one class in one image."""

    overlap: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)
    actual: list[float] = field(default_factory=list)
    count: list[float] = field(default_factory=list)
    predicted_squares: list[float] = field(default_factory=list)
    actual_squares: list[float] = field(default_factory=list)
    minimum: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    all_nll: list[float] = field(default_factory=list)
    absent_nll: list[float] = field(default_factory=list)
    focal: list[float] = field(default_factory=list)

    def total(self, name: str) -> float:
        return math.fsum(getattr(self, name))


@dataclass
class PlainPixel:
    """One pixel: probability, label and weight of each class, and whether the class counts."""

    p: list[float]
    t: list[float]
    w: list[float]
    counts: list[bool]

    def log(self, c: int) -> float:
        return math.log(max(self.p[c], LEAST))

    def log_not(self, c: int) -> float:
        return math.log1p(-self.p[c]) if self.p[c] < 1 else math.log(LEAST)


@dataclass
class PlainImages:
    """The pixels of each image, and whether the classes are exclusive."""

    pixels: list[list[PlainPixel]]
    classes: int
    exclusive: bool

    def of(self, image: int, c: int) -> Iterator[PlainPixel]:
        return (pixel for pixel in self.pixels[image] if pixel.counts[c])


def probabilities(logits: Sequence[float], activation: str | None) -> list[float]:
    """Return the probabilities of the classes at one pixel."""
    if activation == "sigmoid":
        return [1 / (1 + math.exp(-z)) for z in logits]
    if activation == "softmax":
        top = max(logits)
        exps = [math.exp(z - top) for z in logits]
        return [e / math.fsum(exps) for e in exps]
    return list(logits)


def plain_images(
    logits: Tensor,
    target: Tensor,
    *,
    activation: str | None,
    ignore_index: int | None = None,
    weight: Tensor | None = None,
    annotated: Tensor | None = None,
) -> PlainImages:
    """Read logits and target pixel by pixel."""
    classes = logits.shape[1]
    planes = target.shape == logits.shape
    exclusive = not planes or activation == "softmax"
    # (images, pixels, classes): a list is read much faster than a tensor.
    all_z = logits.detach().double().flatten(2).mT.tolist()
    all_t = target.flatten(2).mT.tolist() if planes else target.flatten(1).tolist()
    by_class = weight is not None and weight.shape == logits.shape
    all_w = None if weight is None else weight.flatten(2).mT.tolist() if by_class else weight.flatten(1).tolist()
    images = []
    for b, image in enumerate(all_z):
        pixels = []
        known = [True] * classes if annotated is None else annotated[b].tolist()
        for i, z in enumerate(image):
            labels = all_t[b][i] if planes else [all_t[b][i]] * classes
            ignored = [label == ignore_index for label in labels]
            if exclusive:
                ignored = [any(ignored)] * classes
            if all(ignored):
                continue
            # Logits of ignored pixels are not read, as they may be anything.
            p = probabilities([0.0 if skip else value for value, skip in zip(z, ignored, strict=True)], activation)
            if exclusive and annotated is not None:
                missing = [c for c in range(1, classes) if not known[c]]
                p[0] += math.fsum(p[c] for c in missing)
                p = [0.0 if c in missing else value for c, value in enumerate(p)]
            t = [float(label) if planes else float(label == c) for c, label in enumerate(labels)]
            w = [1.0] * classes
            if all_w is not None:
                w = all_w[b][i] if by_class else [all_w[b][i]] * classes
            counts = [ok and not skip for ok, skip in zip(known, ignored, strict=True)]
            pixels.append(PlainPixel(p, t, w, counts))
        images.append(pixels)
    return PlainImages(images, classes, exclusive)


def plain_sums(
    logits: Tensor,
    target: Tensor,
    *,
    activation: str | None,
    ignore_index: int | None = None,
    weight: Tensor | None = None,
    annotated: Tensor | None = None,
    gamma: float = 2.0,
    alpha: float | None = None,
) -> list[list[PlainSums]]:
    """Compute the sums of each class in each image, pixel by pixel."""
    images = plain_images(
        logits, target, activation=activation, ignore_index=ignore_index, weight=weight, annotated=annotated
    )
    return added_up(images, gamma=gamma, alpha=alpha)


def added_up(images: PlainImages, gamma: float = 2.0, alpha: float | None = None) -> list[list[PlainSums]]:
    """Add up the pixels of each class in each image."""
    result = [[PlainSums() for _ in range(images.classes)] for _ in images.pixels]
    for b, row in enumerate(result):
        for c, sums in enumerate(row):
            for pixel in images.of(b, c):
                p, t, w = pixel.p[c], pixel.t[c], pixel.w[c]
                log, log_not = pixel.log(c), pixel.log_not(c)
                sums.overlap.append(w * p * t)
                sums.predicted.append(w * p)
                sums.actual.append(w * t)
                sums.count.append(w)
                sums.predicted_squares.append(w * p**2)
                sums.actual_squares.append(w * t**2)
                sums.minimum.append(w * min(p, t))
                sums.nll.append(w * cross_entropy_of(pixel, c, images.exclusive))
                sums.all_nll.append(-w * log * (smoothing_of(pixel) if images.exclusive else 1))
                sums.absent_nll.append(-w * log_not)
                sums.focal.append(w * focal_of(pixel, c, images.exclusive, gamma, alpha))
    return result


def smoothing_of(pixel: PlainPixel) -> float:
    """Return what a class gets of a label that is spread over the annotated classes, times the number of classes."""
    labelled = math.fsum(t for t, counts in zip(pixel.t, pixel.counts, strict=True) if counts)
    return labelled * len(pixel.t) / sum(pixel.counts)


def cross_entropy_of(pixel: PlainPixel, c: int, exclusive: bool) -> float:
    """Return the cross-entropy of class c at a pixel."""
    t = pixel.t[c]
    return -t * pixel.log(c) - (0.0 if exclusive else (1 - t) * pixel.log_not(c))


def focal_of(pixel: PlainPixel, c: int, exclusive: bool, gamma: float, alpha: float | None) -> float:
    """Return the focal cross-entropy of class c at a pixel (Lin et al., ICCV 2017)."""
    front, back = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    p, t = pixel.p[c], pixel.t[c]
    hard = -t * (1 - p) ** gamma * pixel.log(c)
    return hard if exclusive else front * hard - back * (1 - t) * p**gamma * pixel.log_not(c)


def root(loss: float, gamma: float, low: float = 1e-6) -> float:
    """Return loss^gamma; for gamma below 1, a straight line to 0 below 1e-6."""
    return loss * low ** (gamma - 1) if gamma < 1 and loss <= low else max(loss, 0.0) ** gamma


# From overlap, predicted, actual and the smoothing of numerator and denominator to a score; `None` for 0/0.
Score = Callable[[float, float, float, float, float], "float | None"]


def ratio(above: float, below: float) -> float | None:
    return above / below if below != 0 else None


def plain_dice(overlap: float, predicted: float, actual: float, above: float, below: float) -> float | None:
    return ratio(2 * overlap + above, predicted + actual + below)


def plain_jaccard(overlap: float, predicted: float, actual: float, above: float, below: float) -> float | None:
    return ratio(overlap + above, predicted + actual - overlap + below)


def plain_tversky(alpha: float, beta: float) -> Score:
    def score(overlap: float, predicted: float, actual: float, above: float, below: float) -> float | None:
        false = alpha * (predicted - overlap) + beta * (actual - overlap)
        return ratio(overlap + above, overlap + false + below)

    return score


def plain_overlap_loss(
    images: PlainImages,
    score: Score,
    penalty: Callable[[float], float] = lambda score: 1 - score,
    *,
    smooth: tuple[float, float] = (1.0, 1.0),
    pool: str = "batch",
    squared: bool = False,
    overlap: str = "product",
    exclude_classes: Sequence[int] = (),
    class_weights: Sequence[float] | None = None,
    absent: str = "smooth",
    weighting: str | None = None,
) -> float:
    """Average the penalties of the scores over classes (and images).

    With `weighting`, the classes of an image share one score, weighted by their sizes (Sudre et al., 2017).
    """
    table = added_up(images)
    squares = "_squares" if squared else ""
    names = "minimum" if overlap == "minimum" else "overlap", f"predicted{squares}", f"actual{squares}"
    classes = [c for c in range(images.classes) if c not in exclude_classes]
    everyone = range(len(table))
    if pool == "image":
        groups = [[(c, [(b, c)]) for c in classes] for b in everyone]
    elif pool == "batch":
        groups = [[(c, [(b, c) for b in everyone]) for c in classes]]
    else:
        groups = [[(0, [(b, c) for b in everyone for c in classes])]]

    def total(name: str, members: list[tuple[int, int]]) -> float:
        return math.fsum(table[b][c].total(name) for b, c in members)

    above, below = [], []
    for group in groups:
        common = None
        if weighting is not None:
            power = {"inverse_square": 2, "inverse": 1, "uniform": 0}[weighting]
            sizes = [total("actual", members) for _, members in group]
            rarest = min([size for size in sizes if size > 0], default=0.0)
            parts = []
            for (_, members), size in zip(group, sizes, strict=True):
                if total("count", members) == 0 or (size == 0 and absent != "smooth"):
                    continue
                by = (rarest / size) ** power if size > 0 else 1.0
                parts.append([by * total(name, members) for name in names])
            common = score(*(math.fsum(part[k] for part in parts) for k in range(3)), *smooth)
        for c, members in group:
            missing = total("actual", members) == 0
            if total("count", members) == 0 or (absent == "skip" and missing):
                continue
            own = score(*(total(name, members) for name in names), *smooth)
            if absent == "penalize" and missing and (own is not None or weighting):
                loss = total("absent_nll", members) / total("count", members)
            else:
                value = common if weighting else own
                if value is None:
                    continue
                loss = penalty(value)
            w = 1.0 if class_weights is None else class_weights[c]
            above.append(w * loss)
            below.append(w)
    return math.fsum(above) / math.fsum(below) if math.fsum(below) > 0 else 0.0


def plain_pixel_mean(
    images: PlainImages,
    cost: Callable[[PlainPixel, int], float],
    *,
    pool: str = "batch",
    class_weights: Sequence[float] | None = None,
) -> float:
    """Average the cost of each class over the pixels; with exclusive classes, a pixel has the weight of its class."""
    weights = class_weights or [1.0] * images.classes
    everyone = list(range(len(images.pixels)))
    means = []
    for group in [[b] for b in everyone] if pool == "image" else [everyone]:
        above, below = [], []
        for b in group:
            for c in range(images.classes):
                for pixel in images.of(b, c):
                    above.append(weights[c] * pixel.w[c] * cost(pixel, c))
                    below.append(weights[c] * pixel.w[c] * (pixel.t[c] if images.exclusive else 1.0))
        if math.fsum(below) > 0:
            means.append(math.fsum(above) / math.fsum(below))
    return math.fsum(means) / len(means) if means else 0.0


def plain_cross_entropy(
    images: PlainImages,
    *,
    label_smoothing: float = 0.0,
    pool: str = "batch",
    class_weights: Sequence[float] | None = None,
) -> float:
    """Return the cross-entropy; smoothing spreads a part of each label over annotated classes (or both, in a plane)."""

    def cost(pixel: PlainPixel, c: int) -> float:
        share = -(pixel.log(c) + pixel.log_not(c)) / 2
        if images.exclusive:
            share = -smoothing_of(pixel) * pixel.log(c) / images.classes
        own = cross_entropy_of(pixel, c, images.exclusive)
        return (1 - label_smoothing) * own + (label_smoothing * share if label_smoothing else 0.0)

    return plain_pixel_mean(images, cost, pool=pool, class_weights=class_weights)


def plain_focal(
    images: PlainImages,
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
    pool: str = "batch",
    class_weights: Sequence[float] | None = None,
) -> float:
    """Return the focal loss."""
    return plain_pixel_mean(
        images,
        lambda pixel, c: focal_of(pixel, c, images.exclusive, gamma, alpha),
        pool=pool,
        class_weights=class_weights,
    )


def plain_top_k(images: PlainImages, *, k: float = 0.1, class_weights: Sequence[float] | None = None) -> float:
    """Average over images the mean cross-entropy of their hardest pixels (of all planes), a fraction k of them."""
    weights = class_weights or [1.0] * images.classes
    means = []
    for pixels in images.pixels:
        entries: list[tuple[float, float]] = []  # cost and weight
        for pixel in pixels:
            w = {c: weights[c] * pixel.w[c] for c in range(images.classes) if pixel.counts[c]}
            costs = {c: w[c] * cross_entropy_of(pixel, c, images.exclusive) for c in w}
            if images.exclusive:
                entries.append((math.fsum(costs.values()), math.fsum(w[c] * pixel.t[c] for c in w)))
            else:
                entries += [(costs[c], w[c]) for c in w]
        entries = sorted((entry for entry in entries if entry[1] > 0), reverse=True)
        if entries:
            hardest = entries[: max(1, math.floor(k * len(entries) + 1e-9))]
            means.append(math.fsum(cost for cost, _ in hardest) / math.fsum(w for _, w in hardest))
    return math.fsum(means) / len(means) if means else 0.0


def plain_squared_error(images: PlainImages) -> float:
    """Return the mean of (p - t)^2 over the classes of all pixels."""
    everyone = range(len(images.pixels))
    errors = [
        (pixel.p[c] - pixel.t[c]) ** 2 for b in everyone for c in range(images.classes) for pixel in images.of(b, c)
    ]
    return math.fsum(errors) / len(errors) if errors else 0.0


def plain_dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    activation: str | None = "sigmoid",
    smooth: tuple[float, float] = (1.0, 1.0),
    pool: str = "batch",
    squared: bool = False,
    exclude_classes: Sequence[int] = (),
    class_weights: Sequence[float] | None = None,
    ignore_index: int | None = None,
    absent: str = "smooth",
    weight: Tensor | None = None,
) -> float:
    """Return the mean Dice loss."""
    return plain_overlap_loss(
        plain_images(logits, target, activation=activation, ignore_index=ignore_index, weight=weight),
        plain_dice,
        smooth=smooth,
        pool=pool,
        squared=squared,
        exclude_classes=exclude_classes,
        class_weights=class_weights,
        absent=absent,
    )


def random_case(
    seed: int,
    *,
    activation: str | None,
    batch: int = 2,
    classes: int = 3,
    space: Sequence[int] = (5, 4),
    soft: bool = False,
    ignored: bool = False,
    dtype: torch.dtype = torch.float64,
    spread: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """Return random logits (or probabilities) and a target that fits the activation; 255 marks ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, *space, generator=generator, dtype=torch.float64) * spread
    if activation is None:
        logits = logits.sigmoid()
    if activation == "softmax" and not soft:
        target = torch.randint(0, classes, (batch, *space), generator=generator)
    elif activation == "softmax":
        target = torch.rand(batch, classes, *space, generator=generator, dtype=torch.float64).softmax(1)
    elif soft:
        target = torch.rand(batch, classes, *space, generator=generator, dtype=torch.float64)
    else:
        target = torch.randint(0, 2, (batch, classes, *space), generator=generator)
    if ignored:
        target = target.masked_fill(torch.rand(target.shape, generator=generator) < 0.3, 255)
    return logits.to(dtype), target
