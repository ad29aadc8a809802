"""Scores of single cases, from what a step returns."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_dice.functional import dice_score, hard_sums

Activation = Literal["sigmoid", "softmax"]


class CaseScore(NamedTuple):
    """What a prediction reaches on one case.

    Attributes:
        dice: of each class, in [0, 1]; NaN for a class that is neither predicted nor there.
        mean: over the classes that are scored and have a score; NaN if none has.
        actual: pixels of each class in the mask.
        predicted: pixels of each class in the prediction.
    """

    dice: list[float]
    mean: float
    actual: list[int]
    predicted: list[int]


def score_cases(
    logits: Tensor,
    mask: Tensor,
    *,
    activation: Activation,
    threshold: float = 0.5,
    ignore_index: int | None = None,
    exclude_classes: Collection[int] = (),
) -> list[CaseScore]:
    """Score each image of a batch by itself.

    Args:
        logits: `(batch, classes, *space)`.
        mask: as in `lightning_dice.data.batch.Batch`.
        activation: what turns logits into probabilities.
        threshold: a probability; with `"softmax"` it has no part.
        ignore_index: the label of pixels that do not count.
        exclude_classes: indices of the classes left out of the mean.
    """
    sums = hard_sums(logits, mask, activation=activation, threshold=threshold, ignore_index=ignore_index)
    # One transfer for the three tables: each would wait for the GPU.
    table = torch.stack([dice_score(sums).double(), sums.actual.double(), sums.predicted.double()]).cpu()
    dice, actual, predicted = table.tolist()
    cases = []
    for scores, there, said in zip(dice, actual, predicted, strict=True):
        scored = [s for i, s in enumerate(scores) if i not in exclude_classes and not math.isnan(s)]
        mean = sum(scored) / len(scored) if scored else math.nan
        cases.append(CaseScore(scores, mean, [int(n) for n in there], [int(n) for n in said]))
    return cases


def step_logits(outputs: Any) -> Tensor | None:
    """The logits that an evaluation step returned, if it did."""
    logits = outputs.get("logits") if isinstance(outputs, dict) else None
    return logits if isinstance(logits, Tensor) else None


def evaluated_split(trainer: Trainer, *, during_fit: bool) -> str | None:
    """`"test"` or `"val"` if the cases now evaluated are to be recorded, else None."""
    if trainer.sanity_checking:
        return None
    if trainer.testing:
        return "test"
    return "val" if trainer.state.fn == "validate" or during_fit else None


def gather(trainer: Trainer, value: Any) -> list[Any]:
    """What each rank holds, in the order of the ranks, on rank 0; an empty list on the others. All ranks must call."""
    if trainer.world_size == 1 or not torch.distributed.is_initialized():
        return [value] if trainer.is_global_zero else []
    values: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
    torch.distributed.gather_object(value, values)
    return values or []
