"""What validation cases say about a network's certainty: its temperature, and the thresholds of the greatest Dice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dice.argument_checks import check_choice, check_count, check_number
from lightning_dice.functional import AbsentPolicy, dice_score, hard_sums
from lightning_dice.kernels import OverlapSums

# Beyond these a network is not miscalibrated but has learnt the split, or nothing.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.1, 10.0
# Thresholds that are tried, as logits: e^-12 is a probability of 6e-6, and steps of 0.05 are at most 0.0125.
STEP, FARTHEST = 0.05, 12.0
# A threshold, after the temperature, stays so far from 0 and 1 that its logit is exact.
_LARGEST_LOGIT = 30.0
_CHUNK = 2**21


class Scores(NamedTuple):
    """How well a decision does.

    Attributes:
        dice: of each class, the mean over the cases that have a score; NaN for a class that has none or is left out.
        nll: mean over the pixels that were drawn, nats.
    """

    dice: list[float]
    nll: float

    @property
    def mean_dice(self) -> float:
        """Over the classes that have a score; NaN if none has."""
        scored = [value for value in self.dice if not math.isnan(value)]
        return sum(scored) / len(scored) if scored else math.nan


class Calibrator:
    r"""Collects cases, in bounded memory, and finds what makes the most of their logits.

    The temperature is the one of the least negative log-likelihood (Guo et al., ICML 2017), over pixels drawn at random
    from each case: all of a case that has no more than `pixels`. Thresholds are, for each class, those of the greatest
    mean Dice over the cases among logits in steps of 0.05, counted exactly: what counts is a table of pixels by logit
    for each case. Of equally good ones the nearest to the present threshold is taken, so that Dice never falls on the
    cases collected.

    For a softmax of more than two classes there are no thresholds: one class's moves the pixels of all others, so that
    they would have to be found together, from the logits of all cases at once.

    Args:
        classes: of the logits.
        activation: `"sigmoid"` or `"softmax"`.
        threshold: the present one, a probability; with softmax 1/2 of two classes.
        ignore_index: the label of pixels that do not count.
        exclude_classes: classes that are not scored.
        smooth: of the Dice score, in pixels.
        absent: what a class counts that a case does not have.
        pool: `"image"`: the mean over cases; `"dataset"`: one ratio over all of them.
        pixels: at most so many of each case are drawn for the temperature.
        seed: of the drawing.

    Raises:
        ValueError: a setting out of its range; in a call, logits that are not finite or do not fit the target.

    >>> calibrator = Calibrator(1, "sigmoid")
    >>> calibrator.add(torch.tensor([[2.0, -1.0, -1.0, -3.0]]), torch.tensor([[1, 1, 1, 0]]))
    >>> [round(t, 2) for t in calibrator.thresholds(temperature=1.0)]
    [0.26]
    """

    def __init__(
        self,
        classes: int,
        activation: Literal["sigmoid", "softmax"],
        *,
        threshold: float = 0.5,
        ignore_index: int | None = None,
        exclude_classes: tuple[int, ...] = (),
        smooth: float | tuple[float, float] = 0.0,
        absent: AbsentPolicy | None = None,
        pool: Literal["image", "dataset"] = "image",
        pixels: int = 2**16,
        seed: int = 0,
    ) -> None:
        self.classes = check_count("classes", classes)
        self.activation: Literal["sigmoid", "softmax"] = check_choice("activation", activation, ("sigmoid", "softmax"))
        check_number("threshold", threshold, 0, 1, open_ends=True)
        self.present = math.log(threshold / (1 - threshold)) if activation == "sigmoid" else 0.0
        self.ignore_index, self.exclude_classes, self.smooth = ignore_index, exclude_classes, smooth
        self.absent = absent if absent is not None else AbsentPolicy()
        self.pool: Literal["image", "dataset"] = check_choice("pool", pool, ("image", "dataset"))
        self.pixels = check_count("pixels", pixels)
        self.generator = torch.Generator().manual_seed(seed)
        steps = round(FARTHEST / STEP)
        limits = torch.arange(-steps, steps + 1, dtype=torch.float64) * STEP
        # As float32, in which they are compared with logits: a threshold means the same pixels here and there.
        self.limits = torch.cat([limits, torch.tensor([self.present])]).float()
        self.limits = torch.unique(self.limits)  # sorted
        # Of each case, overlap, predicted, actual and count: (4, thresholds, classes), or (4, 1, classes) without any.
        self._tables: list[Tensor] = []
        self._logits: list[Tensor] = []  # drawn, (classes, pixels)
        self._targets: list[Tensor] = []
        self._weights: list[Tensor] = []  # how many pixels each drawn one stands for

    @property
    def cases(self) -> int:
        """How many were collected."""
        return len(self._logits)

    @property
    def drawn(self) -> int:
        """How many pixels the temperature is found from."""
        return sum(logits.shape[1] for logits in self._logits)

    @property
    def has_thresholds(self) -> bool:
        """Whether thresholds can be found."""
        return self.activation == "sigmoid" or self.classes == 2

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Collect a case.

        Args:
            logits: `(classes, *space)`.
            target: class ids `(*space)` (softmax) or planes `(classes, *space)`.
        """
        if len(logits) != self.classes:
            raise ValueError(f"logits must be (classes, *space) of {self.classes} classes, got {tuple(logits.shape)}")
        if not bool(logits.isfinite().all()):
            raise ValueError("logits must be finite: the network's are not, or it was not trained")
        # Counted as the metric does; checks shapes and labels too.
        counts = hard_sums(
            logits.unsqueeze(0), target.unsqueeze(0), activation=self.activation, ignore_index=self.ignore_index
        )
        flat = logits.detach().reshape(self.classes, -1).float().cpu()
        ids = self.activation == "softmax"
        truth = target.reshape(1 if ids else self.classes, -1).cpu()
        known = torch.ones_like(truth, dtype=torch.bool) if self.ignore_index is None else truth != self.ignore_index
        self._draw(flat, truth, known)
        if not self.has_thresholds:
            self._tables.append(torch.stack([counts.overlap, counts.predicted, counts.actual, counts.count]).cpu())
        elif ids:
            self._tables.append(_both(_by_threshold(flat[1] - flat[0], truth[0] == 1, known[0], self.limits)))
        else:
            each = [_by_threshold(*planes, self.limits) for planes in zip(flat, truth == 1, known, strict=True)]
            self._tables.append(torch.stack(each, 2))

    def _draw(self, flat: Tensor, truth: Tensor, known: Tensor) -> None:
        counting = known.any(0).nonzero()[:, 0]
        chosen = counting
        if len(counting) > self.pixels:
            chosen = counting[torch.randint(len(counting), (self.pixels,), generator=self.generator)]
        self._logits.append(flat[:, chosen])
        # -1: does not count.
        self._targets.append(truth[:, chosen].to(torch.int16).where(known[:, chosen], -1))
        self._weights.append(torch.full((len(chosen),), len(counting) / max(1, len(chosen))))

    def samples(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each case, the logits `(classes, pixels)` that were drawn and their target, -1 where it does not count.

        The target is ids `(1, pixels)` or planes `(classes, pixels)`.
        """
        yield from zip(self._logits, self._targets, strict=True)

    def nll(self, temperature: float = 1.0) -> float:
        """The mean negative log-likelihood of a pixel, or of a plane's pixel, at a temperature; NaN of no pixel."""
        total = weight = 0.0
        for logits, target, stands_for in zip(self._logits, self._targets, self._weights, strict=True):
            z, known = logits.double() / temperature, target >= 0
            if self.activation == "softmax":
                losses = F.cross_entropy(z.T, target[0].clamp(min=0).long(), reduction="none").unsqueeze(0)
            else:
                losses = F.binary_cross_entropy_with_logits(z, target.clamp(min=0).double(), reduction="none")
            weights = stands_for.double() * known
            total += float((losses * weights).sum())
            weight += float(weights.sum())
        return total / weight if weight else math.nan

    def temperature(self) -> float:
        """The temperature of the least negative log-likelihood, from 0.1 to 10; 1 where no pixel counts."""
        from scipy.optimize import minimize_scalar

        if math.isnan(self.nll()):
            return 1.0
        # Convex in 1/T, and so with a single minimum in log T.
        bounds = math.log(LOWEST_TEMPERATURE), math.log(HIGHEST_TEMPERATURE)
        found = minimize_scalar(
            lambda log_t: self.nll(math.exp(log_t)), bounds=bounds, method="bounded", options={"xatol": 1e-4}
        )
        best = math.exp(float(found.x))
        return best if self.nll(best) < self.nll() else 1.0

    def thresholds(self, temperature: float) -> list[float]:
        """The threshold of each class after the temperature, by which the mean Dice of the cases is greatest.

        Raises:
            ValueError: there are none for this activation and number of classes, or no case was collected.
        """
        if not self.has_thresholds or not self._tables:
            raise ValueError(
                f"there are no thresholds of {self.cases} cases with {self.classes} classes ({self.activation})"
            )
        limits = self.limits.double()
        possible = (limits / temperature).abs() <= _LARGEST_LOGIT
        dice = self._dice()
        if self.activation == "softmax":
            best = self._best(dice.nanmean(1), limits, possible)
            p = 1 / (1 + math.exp(-best / temperature))
            return [1 - p, p]
        found = [self._best(scores, limits, possible) for scores in dice.T]
        return [1 / (1 + math.exp(-limit / temperature)) for limit in found]

    def _best(self, scores: Tensor, limits: Tensor, possible: Tensor) -> float:
        # To have no score is no worse than 0: of a class that no case has, all thresholds are best, and the present one
        # is taken, not one that predicts it.
        scores = scores.nan_to_num(0.0).where(possible, -torch.inf)
        best = scores >= scores.max() - 1e-12
        return float(limits[best][(limits[best] - self.present).abs().argmin()])

    def scores(self, temperature: float = 1.0, thresholds: list[float] | None = None) -> Scores:
        """What a temperature and thresholds do on the collected cases; without thresholds, the present one.

        Args:
            temperature: above 0.
            thresholds: some that `thresholds` has found.
        """
        if not self.has_thresholds:
            return Scores(self._dice()[0].tolist(), self.nll(temperature))
        dice = self._dice()
        at = [self.present] * self.classes
        if thresholds is not None:
            at = [temperature * math.log(t / (1 - t)) for t in thresholds]
            at = [at[1]] * 2 if self.activation == "softmax" else at
        places = [int((self.limits.double() - limit).abs().argmin()) for limit in at]
        return Scores([float(dice[place, index]) for index, place in enumerate(places)], self.nll(temperature))

    def _dice(self) -> Tensor:
        """`(thresholds, classes)`, float64; NaN where no case has a score."""
        tables = torch.stack(self._tables, 1)
        sums = OverlapSums(*(tables.sum(1, keepdim=True) if self.pool == "dataset" else tables))
        score = dice_score(sums, self.smooth)
        mean = score.where(self.absent.kept(score, sums), torch.nan).nanmean(0)
        mean[:, list(self.exclude_classes)] = torch.nan
        return mean


def _by_threshold(logits: Tensor, actual: Tensor, known: Tensor, limits: Tensor) -> Tensor:
    """Overlap, predicted, actual and count of one class with logits above each of the limits, `(4, thresholds)`."""
    tables = torch.zeros(2, len(limits) + 1, dtype=torch.int64)
    for start in range(0, len(logits), _CHUNK):
        part = slice(start, start + _CHUNK)
        # How many limits lie below a logit: it is above those, and above no other.
        places = torch.bucketize(logits[part], limits)
        for table, chosen in zip(tables, (actual[part], ~actual[part]), strict=True):
            table += torch.bincount(places[chosen & known[part]], minlength=len(limits) + 1)
    above = tables.flip(1).cumsum(1).flip(1)[:, 1:]
    there, everywhere = tables[0].sum().expand(len(limits)), tables.sum().expand(len(limits))
    return torch.stack([above[0], above.sum(0), there, everywhere])


def _both(second: Tensor) -> Tensor:
    """The counts of two classes that exclude each other, `(4, thresholds, 2)`, from those of the second."""
    overlap, predicted, actual, counted = second
    neither = counted - predicted - actual + overlap
    first = torch.stack([neither, counted - predicted, counted - actual, counted])
    return torch.stack([first, second], 2)
