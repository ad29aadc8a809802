"""Calibration: reliability by confidence bins, and the expected calibration error."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dice.functional import probabilities
from lightning_dice.scoring.settings import Activation

# Pixels per step, so that the probabilities of a volume are never in memory all at once.
CHUNK = 2**21


class Reliability(NamedTuple):
    """Pixels counted by the confidence of their prediction; the counts of several images add up.

    With `"sigmoid"` there is a row for each class: confidence is the class's probability, and a pixel is correct if the
    class is there. With `"softmax"` there is one row, for the most probable class of each pixel and whether it is the
    true one.

    Attributes:
        pixels: number of pixels, int64 `(rows, bins)`.
        confidence: sum of their confidences, float64 `(rows, bins)`.
        correct: number of correct pixels, int64 `(rows, bins)`.

    >>> counts = Reliability(np.array([[1, 2]]), np.array([[0.25, 1.5]]), np.array([[0, 1]]))
    >>> counts.merge(counts).pixels.tolist(), counts.calibration_error()
    ([[2, 4]], [0.25])
    """

    pixels: NDArray[np.int64]
    confidence: NDArray[np.float64]
    correct: NDArray[np.int64]

    def merge(self, other: Reliability) -> Reliability:
        """Return the counts of both images together."""
        return Reliability(self.pixels + other.pixels, self.confidence + other.confidence, self.correct + other.correct)

    def calibration_error(self) -> list[float]:
        r"""Return the expected calibration error of each row, in [0, 1]; NaN for a row without pixels.

        .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{n} \left| \mathrm{correct}_b - \mathrm{confidence}_b \right|

        (Naeini et al., AAAI 2015; Guo et al., ICML 2017), where both terms are means over the pixels of bin `b`.
        """
        gaps = np.abs(self.correct - self.confidence).sum(1)
        total = self.pixels.sum(1)
        return [float(gap / count) if count else float("nan") for gap, count in zip(gaps, total, strict=True)]


def reliability(
    logits: Tensor,
    target: Tensor,
    *,
    activation: Activation,
    ignore_index: int | None = None,
    bins: int = 15,
    temperature: float = 1.0,
    are_probabilities: bool = False,
) -> Reliability:
    """Count the pixels of an image by confidence, in bins of equal width.

    Args:
        logits: `(classes, *space)`.
        target: class ids `(*space)` with `"softmax"`, planes `(classes, *space)` with `"sigmoid"`.
        activation: turns logits into probabilities.
        ignore_index: pixels with this label are not counted.
        bins: number of bins in [0, 1]; a confidence on an edge belongs to the bin above.
        temperature: divides the logits.
        are_probabilities: `logits` are probabilities already.

    >>> counts = reliability(torch.tensor([[2.0, 2.0, -2.0]]), torch.tensor([[1, 0, 0]]), activation="sigmoid", bins=2)
    >>> counts.pixels.tolist(), counts.correct.tolist(), [round(error, 3) for error in counts.calibration_error()]
    ([[1, 2]], [[0, 1]], [0.294])
    """
    rows = 1 if activation == "softmax" else len(logits)
    tables = np.zeros((3, rows, bins))
    flat_logits = logits.reshape(len(logits), -1)
    flat_target = target.reshape(1 if activation == "softmax" else len(target), -1)
    for start in range(0, flat_logits.shape[1], CHUNK):
        probs, labels = flat_logits[:, start : start + CHUNK], flat_target[:, start : start + CHUNK]
        if not are_probabilities:
            probs = probabilities(probs, activation, temperature)
        if activation == "softmax":
            confidence, ids = probs.max(0, keepdim=True)
            correct = ids == labels
        else:
            confidence, correct = probs, labels == 1
        known = torch.ones_like(correct) if ignore_index is None else labels != ignore_index
        # On the CPU, because a GPU adds up the bins in a different order each time.
        for row, (values, hits, kept) in enumerate(zip(confidence.cpu(), correct.cpu(), known.cpu(), strict=True)):
            kept_values, kept_hits = values[kept].double().numpy(), hits[kept].numpy()
            index = np.minimum((kept_values * bins).astype(np.int64), bins - 1)
            for table, weights in zip(tables, (None, kept_values, kept_hits), strict=True):
                table[row] += np.bincount(index, weights, minlength=bins)
    return Reliability(tables[0].astype(np.int64), tables[1], tables[2].astype(np.int64))
