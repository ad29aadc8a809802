"""Whether probabilities are what they say: reliability by bins, and the expected calibration error."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dice.functional import probabilities
from lightning_dice.scoring.settings import Activation

# Pixels that are looked at in one piece, so that a volume's probabilities are never there as a whole.
CHUNK = 2**21


class Reliability(NamedTuple):
    """Pixels by the confidence that they were predicted with; adds up over images.

    Rows are the classes with `"sigmoid"`, where the confidence is the class's probability and `right` says where the
    class is; with `"softmax"` there is a single row for the most probable class and whether it is the true one.

    Attributes:
        pixels: how many, int64 `(rows, bins)`.
        confidence: their summed confidence, float64 `(rows, bins)`.
        right: how many of them are right, int64 `(rows, bins)`.
    """

    pixels: NDArray[np.int64]
    confidence: NDArray[np.float64]
    right: NDArray[np.int64]

    def plus(self, other: Reliability) -> Reliability:
        """Both images together."""
        return Reliability(self.pixels + other.pixels, self.confidence + other.confidence, self.right + other.right)

    def error(self) -> list[float]:
        r"""The expected calibration error of each row, in [0, 1]; NaN for a row without a pixel.

        .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{n} \left| \mathrm{right}_b - \mathrm{confidence}_b \right|

        (Naeini et al., AAAI 2015; Guo et al., ICML 2017), with the means over the pixels of a bin.
        """
        gaps = np.abs(self.right - self.confidence).sum(1)
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
        activation: what turns logits into probabilities.
        ignore_index: pixels whose target holds this value are not counted.
        bins: from 0 to 1; a confidence on an edge belongs to the bin above.
        temperature: by which logits are divided before.
        are_probabilities: `logits` are probabilities already.

    >>> found = reliability(torch.tensor([[2.0, 2.0, -2.0]]), torch.tensor([[1, 0, 0]]), activation="sigmoid", bins=2)
    >>> found.pixels.tolist(), found.right.tolist(), [round(value, 3) for value in found.error()]
    ([[1, 2]], [[0, 1]], [0.294])
    """
    rows = 1 if activation == "softmax" else len(logits)
    tables = np.zeros((3, rows, bins))
    flat = logits.reshape(len(logits), -1)
    truth = target.reshape(1 if activation == "softmax" else len(target), -1)
    for start in range(0, flat.shape[1], CHUNK):
        probs, labels = flat[:, start : start + CHUNK], truth[:, start : start + CHUNK]
        if not are_probabilities:
            probs = probabilities(probs, activation, temperature)
        if activation == "softmax":
            confidence, ids = probs.max(0, keepdim=True)
            right = ids == labels
        else:
            confidence, right = probs, labels == 1
        known = torch.ones_like(right) if ignore_index is None else labels != ignore_index
        # Counted on the CPU: sums by bin on a GPU come in another order each time.
        for row, (values, hits, kept) in enumerate(zip(confidence.cpu(), right.cpu(), known.cpu(), strict=True)):
            sure, hit = values[kept].double().numpy(), hits[kept].numpy()
            place = np.minimum((sure * bins).astype(np.int64), bins - 1)
            for table, weights in zip(tables, (None, sure, hit), strict=True):
                table[row] += np.bincount(place, weights, minlength=bins)
    return Reliability(tables[0].astype(np.int64), tables[1], tables[2].astype(np.int64))
