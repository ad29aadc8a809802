"""Find the temperature and the thresholds of a network from validation cases."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dice.argument_checks import check_choice, check_count, check_label, check_number
from lightning_dice.functional import AbsentPolicy, dice_score, hard_sums
from lightning_dice.kernels import OverlapSums

# Beyond these, a network is not miscalibrated but has memorized the split, or learnt nothing.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.1, 10.0
# Candidate thresholds, as logits: a logit of -12 is a probability of 6e-6, and a step of 0.05 is at most 0.0125.
STEP, LARGEST_CANDIDATE = 0.05, 12.0
# After the temperature, a threshold must not be so near 0 or 1 that its logit is rounded.
_LARGEST_LOGIT = 30.0
_CHUNK = 2**21


class Scores(NamedTuple):
    """Scores of a temperature and thresholds on the cases of a `Calibrator`.

    Attributes:
        dice: for each class, the mean over the cases that have a score; NaN for a class that has none or is excluded.
        nll: mean negative log-likelihood of the pixels that were drawn, in nats.

    >>> Scores([0.5, math.nan, 0.75], nll=0.1).mean_dice
    0.625
    """

    dice: list[float]
    nll: float

    @property
    def mean_dice(self) -> float:
        """The mean over the classes that have a score; NaN if none has."""
        scored = [value for value in self.dice if not math.isnan(value)]
        return sum(scored) / len(scored) if scored else math.nan


class Calibrator:
    r"""Collect cases in bounded memory, and find their best temperature and thresholds.

    The temperature minimizes the negative log-likelihood (Guo et al., ICML 2017) of pixels that are drawn at random
    from each case; of a case with no more than `pixels`, all are used. The thresholds maximize, for each class, the
    mean Dice score over the cases, among logits in steps of 0.05. They are counted exactly, from a table of each case's
    pixels by logit. Of equally good ones the nearest to the present threshold is chosen, so that Dice never falls on
    the collected cases.

    A softmax of more than two classes has no thresholds: that of one class would move the pixels of all others, so they
    would have to be found together, from the logits of all cases at once.

    Args:
        classes: number of channels of the logits.
        activation: `"sigmoid"` or `"softmax"`.
        threshold: the present threshold, a probability; a softmax of two classes has 1/2.
        ignore_index: the label of pixels that do not count.
        exclude_classes: classes that are not scored.
        smooth: smoothing of the Dice score, in pixels.
        absent: the score of a class that a case does not have.
        pool: `"image"`: the mean over cases; `"dataset"`: one ratio over all of them.
        pixels: the most pixels of each case that are drawn for the temperature.
        seed: for drawing them.

    Raises:
        ValueError: a setting out of its range; in `add`, logits that are not finite or do not fit the target.

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
        self.threshold_logit = math.log(threshold / (1 - threshold)) if activation == "sigmoid" else 0.0
        self.ignore_index = check_label("ignore_index", ignore_index)
        self.exclude_classes, self.smooth = exclude_classes, smooth
        self.absent = absent if absent is not None else AbsentPolicy()
        self.pool: Literal["image", "dataset"] = check_choice("pool", pool, ("image", "dataset"))
        self.pixels = check_count("pixels", pixels)
        self.generator = torch.Generator().manual_seed(seed)
        steps = round(LARGEST_CANDIDATE / STEP)
        candidates = torch.arange(-steps, steps + 1, dtype=torch.float64) * STEP
        # In float32, like the logits that they are compared with: a threshold selects the same pixels here and later.
        candidates = torch.cat([candidates, torch.tensor([self.threshold_logit])]).float()
        self.candidates = torch.unique(candidates)  # sorted
        # Of each case, overlap, predicted, actual and count: (4, candidates, classes), or (4, 1, classes) without any.
        self._tables: list[Tensor] = []
        self._logits: list[Tensor] = []  # of the drawn pixels, (classes, pixels)
        self._targets: list[Tensor] = []
        self._weights: list[Tensor] = []  # of each drawn pixel, how many pixels of the case it represents

    @property
    def cases(self) -> int:
        """The number of collected cases."""
        return len(self._logits)

    @property
    def drawn(self) -> int:
        """The number of pixels that the temperature is found from."""
        return sum(logits.shape[1] for logits in self._logits)

    @property
    def has_thresholds(self) -> bool:
        """Whether thresholds can be found."""
        return self.activation == "sigmoid" or self.classes == 2

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Add a case.

        Args:
            logits: `(classes, *space)`.
            target: class ids `(*space)` (softmax) or planes `(classes, *space)`.
        """
        if len(logits) != self.classes:
            raise ValueError(f"logits must be (classes, *space) of {self.classes} classes, got {tuple(logits.shape)}")
        if not bool(logits.isfinite().all()):
            raise ValueError(
                "logits must be finite, got NaN or infinite values: is the network trained, and are its weights finite?"
            )
        # Counted as in the metric; this also checks shapes and labels.
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
            second = _count_above(flat[1] - flat[0], truth[0] == 1, known[0], self.candidates)
            self._tables.append(_counts_of_both(second))
        else:
            each = [_count_above(*planes, self.candidates) for planes in zip(flat, truth == 1, known, strict=True)]
            self._tables.append(torch.stack(each, 2))

    def _draw(self, flat: Tensor, truth: Tensor, known: Tensor) -> None:
        valid = known.any(0).nonzero()[:, 0]
        drawn = valid
        if len(valid) > self.pixels:
            drawn = valid[torch.randint(len(valid), (self.pixels,), generator=self.generator)]
        self._logits.append(flat[:, drawn])
        # -1 marks the planes' pixels that do not count.
        self._targets.append(truth[:, drawn].to(torch.int16).where(known[:, drawn], -1))
        self._weights.append(torch.full((len(drawn),), len(valid) / max(1, len(drawn))))

    def samples(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the drawn pixels of each case: logits `(classes, pixels)`, and ids `(1, pixels)` or planes as target.

        The target is -1 where a pixel does not count.
        """
        yield from zip(self._logits, self._targets, strict=True)

    def nll(self, temperature: float = 1.0) -> float:
        """Return the mean negative log-likelihood of a (plane's) pixel at a temperature; NaN if there are no pixels."""
        total = weight = 0.0
        for logits, target, represented in zip(self._logits, self._targets, self._weights, strict=True):
            z, known = logits.double() / temperature, target >= 0
            if self.activation == "softmax":
                losses = F.cross_entropy(z.T, target[0].clamp(min=0).long(), reduction="none").unsqueeze(0)
            else:
                losses = F.binary_cross_entropy_with_logits(z, target.clamp(min=0).double(), reduction="none")
            weights = represented.double() * known
            total += float((losses * weights).sum())
            weight += float(weights.sum())
        return total / weight if weight else math.nan

    def temperature(self) -> float:
        """Return the temperature of the least negative log-likelihood, from 0.1 to 10; 1 if there are no pixels."""
        from scipy.optimize import minimize_scalar

        if math.isnan(self.nll()):
            return 1.0
        # Convex in 1/T, so there is a single minimum in log T.
        bounds = math.log(LOWEST_TEMPERATURE), math.log(HIGHEST_TEMPERATURE)
        found = minimize_scalar(
            lambda log_t: self.nll(math.exp(log_t)), bounds=bounds, method="bounded", options={"xatol": 1e-4}
        )
        best = math.exp(float(found.x))
        return best if self.nll(best) < self.nll() else 1.0

    def thresholds(self, temperature: float) -> list[float]:
        """Return the thresholds after the temperature that maximize each class's mean Dice over the cases.

        Raises:
            ValueError: a softmax of more than two classes, or no case was added.
        """
        if not self.has_thresholds or not self._tables:
            raise ValueError(
                f"there are no thresholds of {self.cases} cases with {self.classes} classes ({self.activation})"
            )
        dice = self._dice()
        if self.activation == "softmax":
            best = self._best_candidate(dice.nanmean(1), temperature)
            p = 1 / (1 + math.exp(-best / temperature))
            return [1 - p, p]
        logits = [self._best_candidate(scores, temperature) for scores in dice.T]
        return [1 / (1 + math.exp(-logit / temperature)) for logit in logits]

    def _best_candidate(self, scores: Tensor, temperature: float) -> float:
        candidates = self.candidates.double()
        allowed = (candidates / temperature).abs() <= _LARGEST_LOGIT
        # No score counts as 0: for a class that no case has, all candidates are then equally good, and the present
        # threshold is kept instead of one that predicts the class.
        scores = scores.nan_to_num(0.0).where(allowed, -torch.inf)
        best = candidates[scores >= scores.max() - 1e-12]
        return float(best[(best - self.threshold_logit).abs().argmin()])

    def scores(self, temperature: float = 1.0, thresholds: list[float] | None = None) -> Scores:
        """Return the scores of a temperature and thresholds on the collected cases.

        Args:
            temperature: above 0.
            thresholds: some that `thresholds` returned; `None`: the present one.
        """
        if not self.has_thresholds:
            return Scores(self._dice()[0].tolist(), self.nll(temperature))
        dice = self._dice()
        at = [self.threshold_logit] * self.classes
        if thresholds is not None:
            at = [temperature * math.log(t / (1 - t)) for t in thresholds]
            at = [at[1]] * 2 if self.activation == "softmax" else at
        rows = [int((self.candidates.double() - logit).abs().argmin()) for logit in at]
        return Scores([float(dice[row, index]) for index, row in enumerate(rows)], self.nll(temperature))

    def _dice(self) -> Tensor:
        """Return the Dice of each candidate, float64 `(candidates, classes)`; NaN where no case has a score."""
        tables = torch.stack(self._tables, 1)
        sums = OverlapSums(*(tables.sum(1, keepdim=True) if self.pool == "dataset" else tables))
        score = dice_score(sums, self.smooth)
        mean = score.where(self.absent.kept(score, sums), torch.nan).nanmean(0)
        mean[:, list(self.exclude_classes)] = torch.nan
        return mean


def _count_above(logits: Tensor, actual: Tensor, known: Tensor, candidates: Tensor) -> Tensor:
    """Return overlap, predicted, actual and count of a class for each candidate threshold, `(4, candidates)`."""
    tables = torch.zeros(2, len(candidates) + 1, dtype=torch.int64)
    for start in range(0, len(logits), _CHUNK):
        part = slice(start, start + _CHUNK)
        # The number of candidates below a logit: it is above those, and above no other.
        bins = torch.bucketize(logits[part], candidates)
        for table, chosen in zip(tables, (actual[part], ~actual[part]), strict=True):
            table += torch.bincount(bins[chosen & known[part]], minlength=len(candidates) + 1)
    above = tables.flip(1).cumsum(1).flip(1)[:, 1:]
    actual_pixels, pixels = tables[0].sum().expand(len(candidates)), tables.sum().expand(len(candidates))
    return torch.stack([above[0], above.sum(0), actual_pixels, pixels])


def _counts_of_both(second: Tensor) -> Tensor:
    """Return the counts of two exclusive classes, `(4, candidates, 2)`, from those of the second."""
    overlap, predicted, actual, count = second
    neither = count - predicted - actual + overlap
    first = torch.stack([neither, count - predicted, count - actual, count])
    return torch.stack([first, second], 2)
