"""The scores of one case, from its mask and a hard prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dice.functional import dice_score, hard_sums, jaccard_score, label_sums
from lightning_dice.kernels import OverlapSums
from lightning_dice.scoring.lesions import LesionScores, lesion_scores
from lightning_dice.scoring.settings import Scoring
from lightning_dice.scoring.surfaces import bounds, surface_scores

PART = 2**24  # pixels that are counted at once
_NO_LESIONS = LesionScores(0, 0, math.nan, math.nan, math.nan)


class ClassScore(NamedTuple):
    """What a prediction reaches of one class of one case. NaN: no score.

    | | Dice, Jaccard, surface Dice | distances | volume error | lesions |
    |---|---|---|---|---|
    | mask and prediction have it | as defined | as defined | as defined | as defined |
    | the mask alone | 0 | NaN | -1 | recall and F1 0, precision NaN |
    | the prediction alone | 0 | NaN | NaN | precision and F1 0, recall NaN |
    | neither | NaN | NaN | NaN | NaN |

    Attributes:
        actual: pixels of it in the mask.
        predicted: pixels of it in the prediction.
        dice: in [0, 1], that of `DiceScore`.
        jaccard: intersection over union, in [0, 1].
        surface_dice: the share of both surfaces within the tolerance, in [0, 1]; see `surface_scores`.
        hd95: Hausdorff distance at the 95th percentile, in mm or, without a spacing, in pixels.
        mean_surface_distance: average symmetric surface distance, in the same unit.
        volume_difference: predicted less actual volume, in ml; an area in mm² of pictures with a spacing; in pixels
            without.
        volume_error: the difference as a share of the actual volume.
        lesions: see `lesion_scores`.
    """

    actual: int
    predicted: int
    dice: float
    jaccard: float
    surface_dice: float = math.nan
    hd95: float = math.nan
    mean_surface_distance: float = math.nan
    volume_difference: float = math.nan
    volume_error: float = math.nan
    lesions: LesionScores = _NO_LESIONS


class CaseScore(NamedTuple):
    """What a prediction reaches on one case.

    Attributes:
        mean: Dice, over the classes that are scored and have a score; NaN if none has.
        classes: one for each class, those that are not scored with their pixels, Dice and Jaccard alone.
        spacing: what distances and volumes were measured by, in mm; `None` for pixels.
    """

    mean: float
    classes: list[ClassScore]
    spacing: tuple[float, ...] | None = None


def score_case(
    predicted: Tensor, target: Tensor, scoring: Scoring, spacing: Sequence[float] | None = None
) -> CaseScore:
    """Score a case.

    Ignored pixels belong to no class, in mask and prediction alike. For surfaces and lesions they are what lies beyond
    the image's border: a structure that runs into them ends there, in both masks.

    Args:
        predicted: class ids `(*space)`, or planes `(classes, *space)` of 0 and 1 with `activation="sigmoid"`.
        target: of the same shape, integers; pixels to be ignored hold the ignored label.
        scoring: classes and settings.
        spacing: distance between neighbouring pixels along each axis, in mm; `None`: distances are in pixels.

    Raises:
        ValueError: shapes that differ, a label that no class has, a spacing that does not fit.

    >>> scoring = Scoring(["background", "cell"], "softmax", exclude_classes=[0], tolerance=1)
    >>> case = score_case(torch.tensor([[0, 1, 1, 0]]), torch.tensor([[0, 0, 1, 1]]), scoring)
    >>> cell = case.classes[1]
    >>> case.mean, cell.surface_dice, cell.mean_surface_distance, cell.volume_difference, cell.lesions.recall
    (0.5, 1.0, 0.5, 0.0, 1.0)
    """
    if predicted.shape != target.shape:
        raise ValueError(
            f"predicted and target must have one shape, got {tuple(predicted.shape)} and {tuple(target.shape)}"
        )
    planes = scoring.activation == "sigmoid"
    if planes and len(target) != len(scoring.classes):
        raise ValueError(f"masks must have a plane for each of {len(scoring.classes)} classes, got {len(target)}")
    sums = _sums(predicted, target, scoring)
    # One transfer for the four tables: each would wait for the GPU.
    counts = [sums.actual.double(), sums.predicted.double()]
    table = torch.stack([dice_score(sums).double(), jaccard_score(sums).double(), *counts])[:, 0].cpu()
    classes = [ClassScore(int(row[2]), int(row[3]), row[0], row[1]) for row in table.T.tolist()]
    steps = _steps(spacing, target.ndim - planes)
    known = [classes[index].dice for index in scoring.scored if not math.isnan(classes[index].dice)]
    mean = sum(known) / len(known) if known else math.nan
    if scoring.surfaces or scoring.lesions:
        said, there = predicted.cpu().numpy(), target.cpu().numpy()
        for index in (index for index in scoring.scored if classes[index].actual or classes[index].predicted):
            masks = _masks(said, there, index, scoring)
            classes[index] = _measured(classes[index], *masks, steps, scoring, index)
    for index in scoring.scored:
        classes[index] = _volumes(classes[index], spacing)
    return CaseScore(mean, classes, None if spacing is None else tuple(float(step) for step in spacing))


def _sums(predicted: Tensor, target: Tensor, scoring: Scoring) -> OverlapSums:
    """Pixels of each class, `(1, classes)`: the integers that `DiceScore` counts."""
    ignored, target = scoring.ignore_index, target.to(predicted.device)
    # Part by part: what is made of a whole volume on the way is many times its size.
    if scoring.activation == "softmax":
        said, there = predicted.reshape(1, -1), target.reshape(1, -1)
        places = [slice(start, start + PART) for start in range(0, max(1, said.shape[1]), PART)]
        count = len(scoring.classes)
        parts = [label_sums(said[:, at], there[:, at], count, ignore_index=ignored) for at in places]
        return _joined(parts, lambda tables: torch.stack(tables).sum(0))
    each = [
        hard_sums(said.float()[None, None], there[None, None], activation=None, ignore_index=ignored)
        for said, there in zip(predicted, target, strict=True)
    ]
    return _joined(each, lambda tables: torch.cat(tables, 1))


def _joined(parts: list[OverlapSums], join: Callable[[list[Tensor]], Tensor]) -> OverlapSums:
    names = ("overlap", "predicted", "actual", "count")
    return OverlapSums(*(join([getattr(sums, name) for sums in parts]) for name in names))


def _masks(
    predicted: NDArray[np.integer], target: NDArray[np.integer], index: int, scoring: Scoring
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    if scoring.activation == "softmax":
        said, there, labels = predicted == index, target == index, target
    else:
        said, there, labels = predicted[index] == 1, target[index] == 1, target[index]
    if scoring.ignore_index is not None:
        said = said & (labels != scoring.ignore_index)
    return said, there


def _measured(
    score: ClassScore,
    predicted: NDArray[np.bool_],
    actual: NDArray[np.bool_],
    steps: tuple[float, ...],
    scoring: Scoring,
    index: int,
) -> ClassScore:
    # Organs and lesions fill a small part of a volume.
    box = bounds(predicted | actual)
    predicted, actual = predicted[box], actual[box]
    if scoring.surfaces:
        found = surface_scores(predicted, actual, steps, scoring.tolerance_of(index))
        score = score._replace(surface_dice=found.dice, hd95=found.hd95, mean_surface_distance=found.mean)
    if scoring.lesions:
        score = score._replace(lesions=lesion_scores(predicted, actual, scoring.lesion_iou, scoring.connectivity))
    return score


def _volumes(score: ClassScore, spacing: Sequence[float] | None) -> ClassScore:
    pixels = score.predicted - score.actual
    unit = 1.0
    if spacing is not None:
        unit = math.prod(spacing) / (1000 if len(spacing) == 3 else 1)  # 1 ml is 1000 mm³
    if not (score.actual or score.predicted):
        return score
    return score._replace(
        volume_difference=pixels * unit, volume_error=pixels / score.actual if score.actual else math.nan
    )


def _steps(spacing: Sequence[float] | None, axes: int) -> tuple[float, ...]:
    if spacing is None:
        return (1.0,) * axes
    steps = tuple(float(step) for step in spacing)
    if len(steps) != axes or not all(math.isfinite(step) and step > 0 for step in steps):
        raise ValueError(f"spacing must be {axes} numbers > 0, in mm, one for each space axis, got {steps}")
    return steps
