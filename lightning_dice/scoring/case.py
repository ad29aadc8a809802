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
from lightning_dice.scoring.surfaces import bounding_box, surface_scores

CHUNK = 2**24  # pixels that are counted at once
_NO_LESIONS = LesionScores(0, 0, math.nan, math.nan, math.nan)

Mask = NDArray[np.bool_]


class ClassScore(NamedTuple):
    """Scores of one class in one case; NaN where a score is undefined.

    | class is in | Dice, Jaccard, surface Dice | distances | volume error | lesions |
    |---|---|---|---|---|
    | mask and prediction | as defined | as defined | as defined | as defined |
    | the mask alone | 0 | NaN | -1 | recall and F1 0, precision NaN |
    | the prediction alone | 0 | NaN | NaN | precision and F1 0, recall NaN |
    | neither | NaN | NaN | NaN | NaN |

    Attributes:
        actual: pixels of the class in the mask.
        predicted: pixels of the class in the prediction.
        dice: in [0, 1], as computed by `DiceScore`.
        jaccard: intersection over union, in [0, 1].
        surface_dice: share of both surfaces within the tolerance, in [0, 1]; see `surface_scores`.
        hd95: Hausdorff distance at the 95th percentile, in mm, or in pixels without a spacing.
        mean_surface_distance: average symmetric surface distance, in the same unit.
        volume_difference: predicted minus actual volume in ml, or area in mm² for 2D images with a spacing; in pixels
            without a spacing.
        volume_error: the difference as a fraction of the actual volume.
        lesions: see `lesion_scores`.

    >>> ClassScore(actual=4, predicted=2, dice=0.5, jaccard=1 / 3).hd95
    nan
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
    """Scores of one case.

    Attributes:
        mean: mean Dice over the scored classes whose Dice is defined; NaN if there are none.
        classes: one for each class; classes that are not scored have only pixel counts, Dice and Jaccard.
        spacing: pixel spacing used for distances and volumes, in mm; `None` if they are in pixels.
    """

    mean: float
    classes: list[ClassScore]
    spacing: tuple[float, ...] | None = None


def score_case(
    predicted: Tensor, target: Tensor, scoring: Scoring, spacing: Sequence[float] | None = None
) -> CaseScore:
    """Score a case.

    Ignored pixels belong to no class, neither in the mask nor in the prediction. For surfaces and lesions they are like
    the area outside the image: a structure that reaches them ends there, in both masks.

    Args:
        predicted: class ids `(*space)`, or planes `(classes, *space)` of 0 and 1 with `activation="sigmoid"`.
        target: integers of the same shape; ignored pixels hold the ignored label.
        scoring: classes and settings.
        spacing: distance between neighbouring pixels along each axis, in mm; `None`: distances are in pixels.

    Raises:
        ValueError: the shapes differ, a label belongs to no class, or the spacing does not match the axes.

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
    sums = _count_pixels(predicted, target, scoring)
    # One transfer for all four tables, because each transfer waits for the GPU.
    counts = [sums.actual.double(), sums.predicted.double()]
    table = torch.stack([dice_score(sums).double(), jaccard_score(sums).double(), *counts])[:, 0].cpu()
    classes = [ClassScore(int(row[2]), int(row[3]), row[0], row[1]) for row in table.T.tolist()]
    steps = _check_spacing(spacing, target.ndim - planes)
    known = [classes[index].dice for index in scoring.scored if not math.isnan(classes[index].dice)]
    mean = sum(known) / len(known) if known else math.nan
    if scoring.surfaces or scoring.lesions:
        labels = predicted.cpu().numpy(), target.cpu().numpy()
        for index in (index for index in scoring.scored if classes[index].actual or classes[index].predicted):
            masks = _class_masks(*labels, index, scoring)
            classes[index] = _add_shape_scores(classes[index], *masks, steps, scoring, index)
    for index in scoring.scored:
        classes[index] = _add_volumes(classes[index], spacing)
    return CaseScore(mean, classes, None if spacing is None else tuple(float(step) for step in spacing))


def _count_pixels(predicted: Tensor, target: Tensor, scoring: Scoring) -> OverlapSums:
    """Return the pixels of each class, `(1, classes)`: the integers that `DiceScore` counts."""
    ignored, target = scoring.ignore_index, target.to(predicted.device)
    # In chunks, because intermediate results for a whole volume are many times its size.
    if scoring.activation == "softmax":
        flat_predicted, flat_target = predicted.reshape(1, -1), target.reshape(1, -1)
        chunks = [slice(start, start + CHUNK) for start in range(0, max(1, flat_target.shape[1]), CHUNK)]
        count = len(scoring.classes)
        parts = [
            label_sums(flat_predicted[:, chunk], flat_target[:, chunk], count, ignore_index=ignored) for chunk in chunks
        ]
        return _combine(parts, lambda tables: torch.stack(tables).sum(0))
    parts = [
        hard_sums(plane.float()[None, None], truth[None, None], activation=None, ignore_index=ignored)
        for plane, truth in zip(predicted, target, strict=True)
    ]
    return _combine(parts, lambda tables: torch.cat(tables, 1))


def _combine(parts: list[OverlapSums], join: Callable[[list[Tensor]], Tensor]) -> OverlapSums:
    names = ("overlap", "predicted", "actual", "count")
    return OverlapSums(*(join([getattr(sums, name) for sums in parts]) for name in names))


def _class_masks(
    predicted: NDArray[np.integer], target: NDArray[np.integer], index: int, scoring: Scoring
) -> tuple[Mask, Mask]:
    if scoring.activation == "softmax":
        predicted_mask, target_mask, labels = predicted == index, target == index, target
    else:
        predicted_mask, target_mask, labels = predicted[index] == 1, target[index] == 1, target[index]
    if scoring.ignore_index is not None:
        predicted_mask = predicted_mask & (labels != scoring.ignore_index)
    return predicted_mask, target_mask


def _add_shape_scores(
    score: ClassScore, predicted: Mask, actual: Mask, steps: tuple[float, ...], scoring: Scoring, index: int
) -> ClassScore:
    # Cropped, because organs and lesions fill a small part of a volume.
    box = bounding_box(predicted | actual)
    predicted, actual = predicted[box], actual[box]
    if scoring.surfaces:
        found = surface_scores(predicted, actual, steps, scoring.tolerance_of(index))
        score = score._replace(surface_dice=found.dice, hd95=found.hd95, mean_surface_distance=found.mean)
    if scoring.lesions:
        score = score._replace(lesions=lesion_scores(predicted, actual, scoring.lesion_iou, scoring.connectivity))
    return score


def _add_volumes(score: ClassScore, spacing: Sequence[float] | None) -> ClassScore:
    if not (score.actual or score.predicted):
        return score
    pixels = score.predicted - score.actual
    unit = 1.0
    if spacing is not None:
        unit = math.prod(spacing) / (1000 if len(spacing) == 3 else 1)  # 1 ml is 1000 mm³
    return score._replace(
        volume_difference=pixels * unit, volume_error=pixels / score.actual if score.actual else math.nan
    )


def _check_spacing(spacing: Sequence[float] | None, axes: int) -> tuple[float, ...]:
    if spacing is None:
        return (1.0,) * axes
    steps = tuple(float(step) for step in spacing)
    if len(steps) != axes or not all(math.isfinite(step) and step > 0 for step in steps):
        raise ValueError(f"spacing must be {axes} numbers > 0, in mm, one for each space axis, got {steps}")
    return steps
