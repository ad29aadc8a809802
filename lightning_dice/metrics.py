"""Dice score as a torchmetrics metric, from the same sums and formula as the losses."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_dice.argument_checks import (
    check_choice,
    check_class_indices,
    check_label,
    check_smooth,
    included_classes,
)
from lightning_dice.functional import AbsentPolicy, AbsentRule, dice_score, hard_sums
from lightning_dice.functional.hard_labels import nan_predictions
from lightning_dice.kernels import Activation, OverlapSums

MetricPool = Literal["image", "dataset"]
Average = Literal["macro", "micro", "weighted", "none"]

# Scores are summed as integer multiples of 2^-40: sums of integers depend neither on the order nor on the number of
# processes, and every device supports them. 2^22 cases fit.
_UNITS_PER_SCORE = 2**40


class DiceScore(Metric):
    r"""Dice score of hard predictions, :math:`2|P \cap T| / (|P| + |T|)`, for binary, multilabel and multiclass tasks.

    The score of a class is its mean over the cases that have it. A class absent from both prediction and target of a
    case has no score there; predicted but absent from the target, it scores 0. The state is a few numbers for each
    class, whatever the number of cases.

    The average over the classes is one of

    - macro: the mean of the scores of the classes that have one;
    - micro: one ratio of pixels of all classes, :math:`2\sum_c |P_c \cap T_c| / \sum_c (|P_c| + |T_c|)`;
    - weighted: :math:`\sum_c |T_c| D_c / \sum_c |T_c|`, each class by the size of its target; where no class has a
      target, the mean of the scores.

    Micro and weighted averages are made within each case, and then averaged over the cases, with `pool="image"`; with
    `pool="dataset"`, of the pixels of all cases. They equal those of `torchmetrics.segmentation.DiceScore` with
    `aggregation_level="samplewise"` and `"global"`.

    The score is NaN if a logit that counts is NaN: of that class, or of any with a softmax, and then the average is
    NaN too.

    Args:
        num_classes: number of channels of the logits; 1 for a binary task.
        activation: `"sigmoid"`: the target has a plane of 0 and 1 for each class, and classes may overlap; `"softmax"`:
            the target holds class ids; `None`: as `"sigmoid"`, for probabilities.
        threshold: probability in (0, 1) above which a pixel is foreground; not used with `"softmax"`.
        smooth: in pixels, as in `DiceLoss`; 0 by default.
        pool: `"image"`: each case has its own score, and cases are averaged; `"dataset"`: all cases share one ratio.
        exclude_classes: indices of classes that do not count, such as `[0]` for the background.
        ignore_index: label of the pixels to ignore.
        absent: how to count a class that the target does not have, see `lightning_dice.functional.AbsentPolicy`.
        average: `"macro"`, `"micro"` or `"weighted"`, see above: one number; `"none"`: `(classes,)`, NaN for classes
            that are excluded or were never seen.
        kwargs: as for any `torchmetrics.Metric`.

    Raises:
        ValueError: an invalid setting; in an update, a shape that does not fit or, on the CPU, an invalid value.

    >>> score = DiceScore(num_classes=3, activation="softmax", exclude_classes=[0], average="none")
    >>> logits = torch.eye(3)[torch.tensor([[0, 1, 1, 0]])].movedim(-1, 1)
    >>> score.update(logits, torch.tensor([[0, 1, 0, 0]]))
    >>> score.compute()
    tensor([   nan, 0.6667,    nan])
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    total: Tensor
    cases: Tensor
    overlap: Tensor
    predicted: Tensor
    actual: Tensor
    count: Tensor
    nan_images: Tensor

    def __init__(
        self,
        num_classes: int = 1,
        *,
        activation: Activation = "sigmoid",
        threshold: float = 0.5,
        smooth: float | Sequence[float] = 0.0,
        pool: MetricPool = "image",
        exclude_classes: Iterable[int] = (),
        ignore_index: int | None = None,
        absent: AbsentRule | AbsentPolicy = "smooth",
        average: Average = "macro",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes must be an integer >= 1, got {num_classes!r}")
        if not isinstance(threshold, (int, float)) or not 0 < threshold < 1:
            raise ValueError(f"threshold must be a probability in (0, 1), got {threshold!r}")
        self.num_classes = num_classes
        self.activation: Activation = check_choice("activation", activation, ("sigmoid", "softmax", None))
        self.threshold = threshold
        self.smooth = check_smooth(smooth)
        self.pool: MetricPool = check_choice("pool", pool, MetricPool)
        self.exclude_classes = check_class_indices("exclude_classes", exclude_classes)
        self.ignore_index = check_label("ignore_index", ignore_index)
        self.absent = absent if isinstance(absent, AbsentPolicy) else AbsentPolicy(absent)
        self.average: Average = check_choice("average", average, Average)
        self._nan_classes: Tensor | None = None
        self._included = included_classes(num_classes, self.exclude_classes)
        self._averages_within = average in ("micro", "weighted")
        ratios = 1 if self._averages_within else num_classes
        states = {"total": ratios, "cases": ratios} if pool == "image" else {}
        states |= {} if pool == "image" else dict.fromkeys(("overlap", "predicted", "actual", "count"), num_classes)
        for state, length in (states | {"nan_images": num_classes}).items():
            self.add_state(state, torch.zeros(length, dtype=torch.int64), dist_reduce_fx="sum")
        # A MetricCollection lets metrics of equal states share them, which after one batch may be equal by chance.
        self.add_state("settings", self._settings_code(), dist_reduce_fx="max")

    def _settings_code(self) -> Tensor:
        """Return integers that differ if the states count something else."""
        within = (self.average, self.exclude_classes) if self._averages_within and self.pool == "image" else ()
        settings = (
            *(self.num_classes, self.activation, self.threshold, self.smooth, self.pool, self.absent.rule),
            *(None if self.ignore_index is None else int(self.ignore_index), within),
        )
        return torch.tensor(list(hashlib.sha256(repr(settings).encode()).digest()), dtype=torch.int64)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            preds: logits `(batch, classes, *space)`, floating point.
            target: `"softmax"`: class ids `(batch, *space)`; else planes `(batch, classes, *space)`.
        """
        if preds.ndim < 2 or preds.shape[1] != self.num_classes:
            raise ValueError(
                f"DiceScore: logits must have the shape (batch, {self.num_classes}, *space), for num_classes="
                f"{self.num_classes}, got {tuple(preds.shape)}"
            )
        sums = hard_sums(
            preds, target, activation=self.activation, threshold=self.threshold, ignore_index=self.ignore_index
        )
        self.nan_images += nan_predictions(
            preds, target, sums, activation=self.activation, ignore_index=self.ignore_index
        ).sum(0)
        if self.pool == "dataset":
            self.overlap += sums.overlap.sum(0)
            self.predicted += sums.predicted.sum(0)
            self.actual += sums.actual.sum(0)
            self.count += sums.count.sum(0)
        else:
            score, kept = self._scores(sums)
            if self._averages_within:
                score, kept = self._average(score, kept, sums)
            self.total += (score.where(kept, 0.0) * _UNITS_PER_SCORE).round().long().sum(0)
            self.cases += kept.sum(0)

    def _scores(self, sums: OverlapSums) -> tuple[Tensor, Tensor]:
        """Return the score of each class in each image, and whether it enters a mean."""
        score = dice_score(sums, self.smooth)
        return score, self.absent.kept(score, sums)

    def _average(self, score: Tensor, kept: Tensor, sums: OverlapSums) -> tuple[Tensor, Tensor]:
        """Return the micro or weighted average of each image, and whether it enters a mean, `(images, 1)`."""
        if self.average == "micro":
            pixels = (sums.overlap, sums.predicted, sums.actual, sums.count)
            return self._scores(OverlapSums(*(values[:, self._included].sum(1, keepdim=True) for values in pixels)))
        score, kept, actual = (values[:, self._included] for values in (score, kept, sums.actual))
        weight = actual.where(actual.sum(1, keepdim=True) > 0, 1).where(kept, 0).to(score.dtype)
        average = (score.where(kept, 0) * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        return average, kept.any(1, keepdim=True)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one or several values, by default the current one, as for any `torchmetrics.Metric`."""
        return self._plot(val, ax)

    def compute(self) -> Tensor:
        """Return the score, float32: a scalar, or `(classes,)` with `average="none"`."""
        if self.pool == "dataset":
            sums = OverlapSums(*(s.unsqueeze(0) for s in (self.overlap, self.predicted, self.actual, self.count)))
            pooled, kept = self._scores(sums)
            if self._averages_within:
                pooled, kept = self._average(pooled, kept, sums)
            score = pooled.where(kept, torch.nan).squeeze(0)
        else:
            wide = torch.float32 if self.total.device.type == "mps" else torch.float64
            # A class that was never seen is 0/0, hence NaN.
            score = self.total.to(wide) / _UNITS_PER_SCORE / self.cases
        score = score.float()
        self._nan_classes = self.nan_images > 0
        if self._averages_within:
            return self.mean_of_classes(score)
        excluded = torch.tensor(self.exclude_classes, dtype=torch.long, device=score.device)
        score = score.index_fill(0, excluded, torch.nan).where(~self._nan_classes, torch.nan)
        return score if self.average == "none" else self.mean_of_classes(score)

    def mean_of_classes(self, scores: Tensor) -> Tensor:
        """Return the macro average of what `compute` returned last with `average="none"`; NaN if a logit was NaN.

        >>> score = DiceScore(2, average="none")
        >>> score.update(torch.tensor([[[9.0, -9.0], [torch.nan, -9.0]]]), torch.tensor([[[1, 0], [1, 0]]]))
        >>> score.mean_of_classes(score.compute())
        tensor(nan)
        """
        mean = scores.nanmean()
        return mean if self._nan_classes is None else mean.where(~self._nan_classes[self._included].any(), torch.nan)
