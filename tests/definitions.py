"""Independent definitions, in plain Python floats and loops: what the library is checked against."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


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


def probabilities(logits: Sequence[float], activation: str | None) -> list[float]:
    """Of the classes at one pixel."""
    if activation == "sigmoid":
        return [1 / (1 + math.exp(-z)) for z in logits]
    if activation == "softmax":
        top = max(logits)
        exps = [math.exp(z - top) for z in logits]
        return [e / math.fsum(exps) for e in exps]
    return list(logits)


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
    """Sums of each class in each image, pixel by pixel."""
    images, classes = logits.shape[:2]
    front, back = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    result = [[PlainSums() for _ in range(classes)] for _ in range(images)]
    planes = target.shape == logits.shape
    for b in range(images):
        for place in itertools.product(*(range(size) for size in logits.shape[2:])):
            at = (b, slice(None), *place)
            labels = target[at].tolist() if planes else [target[(b, *place)].item()] * classes
            if not planes or activation == "softmax":
                ignored = [any(label == ignore_index for label in labels)] * classes
            else:
                ignored = [label == ignore_index for label in labels]
            if all(ignored):
                continue
            z = logits[at].double().tolist()
            p = probabilities(z, activation)
            exclusive = not planes or activation == "softmax"
            if annotated is not None and exclusive:
                missing = [c for c in range(1, classes) if not annotated[b, c]]
                p[0] += math.fsum(p[c] for c in missing)
                p = [0.0 if c in missing else value for c, value in enumerate(p)]
            for c in range(classes):
                if ignored[c] or (annotated is not None and not annotated[b, c]):
                    continue
                t = float(labels[c]) if planes else float(labels[c] == c)
                w = 1.0
                if weight is not None:
                    w = float(weight[at][c]) if weight.shape == logits.shape else float(weight[(b, *place)])
                sums = result[b][c]
                sums.overlap.append(w * p[c] * t)
                sums.predicted.append(w * p[c])
                sums.actual.append(w * t)
                sums.count.append(w)
                log = math.log(p[c]) if p[c] > 0 else -100.0
                log_not = math.log1p(-p[c]) if p[c] < 1 else -100.0
                sums.predicted_squares.append(w * p[c] ** 2)
                sums.actual_squares.append(w * t**2)
                sums.minimum.append(w * min(p[c], t))
                sums.nll.append(-w * (t * log + (0.0 if exclusive else (1 - t) * log_not)))
                sums.all_nll.append(-w * log)
                sums.absent_nll.append(-w * log_not)
                hard, easy = -t * (1 - p[c]) ** gamma * log, 0.0 if exclusive else -(1 - t) * p[c] ** gamma * log_not
                sums.focal.append(w * (hard if exclusive else front * hard + back * easy))
    return result


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
    """The mean Dice loss, from the definition."""
    table = plain_sums(logits, target, activation=activation, ignore_index=ignore_index, weight=weight)
    squares = "_squares" if squared else ""
    classes = [c for c in range(logits.shape[1]) if c not in exclude_classes]
    if pool == "image":
        groups = [(c, [(b, c)]) for b in range(len(table)) for c in classes]
    elif pool == "batch":
        groups = [(c, [(b, c) for b in range(len(table))]) for c in classes]
    else:
        groups = [(0, [(b, c) for b in range(len(table)) for c in classes])]
    total, norm = [], []
    for c, members in groups:

        def added(name: str, members: list[tuple[int, int]] = members) -> float:
            return math.fsum(table[b][k].total(name) for b, k in members)

        if added("count") == 0 or (absent == "skip" and added("actual") == 0):
            continue
        below = added(f"predicted{squares}") + added(f"actual{squares}") + smooth[1]
        if below == 0:
            continue
        loss = 1 - (2 * added("overlap") + smooth[0]) / below
        if absent == "penalize" and added("actual") == 0:
            loss = added("absent_nll") / added("count")
        w = 1.0 if class_weights is None else class_weights[c]
        total.append(w * loss)
        norm.append(w)
    return math.fsum(total) / math.fsum(norm) if norm and math.fsum(norm) > 0 else 0.0


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
    """Logits (or probabilities) and a target that fits the activation; 255 marks ignored pixels."""
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
