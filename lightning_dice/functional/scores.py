"""Scores of each class in each image, each one formula on the sums."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_dice.kernels import OverlapSums, wide_dtype


def dice_score(sums: OverlapSums, smooth: float | tuple[float, float] = 0.0) -> Tensor:
    r"""Dice score of each class in each image.

    .. math:: D = \frac{2\sum p t + s}{\sum p + \sum t + s}

    The denominator is linear in `p`, as in the set definition of Dice (1945). V-Net (Milletari et al., 3DV 2016)
    squares `p` and `t` there; for that, pass sums of squares as `predicted` and `actual`.

    Args:
        sums: from `lightning_dice.kernels.overlap_sums` or `hard_sums`.
        smooth: `s` above, in pixels; a pair sets numerator and denominator separately.

    Returns:
        `(images, classes)`, in [0, 1] if `smooth` is one number. NaN where numerator and denominator are 0: with
        `smooth=0`, a class absent from both prediction and target has no score.

    >>> from lightning_dice.functional import hard_sums
    >>> sums = hard_sums(torch.tensor([[[9.0, 9.0, -9.0]]]), torch.tensor([[[1, 0, 0]]]))
    >>> dice_score(sums)
    tensor([[0.6667]], dtype=torch.float64)
    """
    above, below = _pair(smooth)
    return _ratio(2 * sums.overlap, sums.predicted + sums.actual, above, below)


def jaccard_score(sums: OverlapSums, smooth: float | tuple[float, float] = 0.0) -> Tensor:
    r"""Jaccard score (intersection over union) of each class in each image.

    .. math:: J = \frac{\sum p t + s}{\sum p + \sum t - \sum p t + s}

    With sums of squares as `predicted` and `actual` it is the Tanimoto coefficient.

    Args:
        sums: as for `dice_score`.
        smooth: `s` above, in pixels; a pair sets numerator and denominator separately.

    Returns:
        `(images, classes)`; NaN where numerator and denominator are 0.

    >>> from lightning_dice.functional import hard_sums
    >>> sums = hard_sums(torch.tensor([[[9.0, 9.0, -9.0]]]), torch.tensor([[[1, 0, 0]]]))
    >>> jaccard_score(sums)
    tensor([[0.5000]], dtype=torch.float64)
    """
    above, below = _pair(smooth)
    return _ratio(sums.overlap, sums.predicted + sums.actual - sums.overlap, above, below)


def tversky_score(sums: OverlapSums, alpha: float, beta: float, smooth: float | tuple[float, float] = 0.0) -> Tensor:
    r"""Tversky index of each class in each image (Salehi et al., MLMI 2017).

    .. math:: T = \frac{I + s}{I + \alpha\,(\sum p - I) + \beta\,(\sum t - I) + s}, \qquad I = \sum p t

    Dice is :math:`\alpha = \beta = 1/2` (with half its `smooth`), Jaccard :math:`\alpha = \beta = 1`.

    Args:
        sums: as for `dice_score`.
        alpha: weight of false positives.
        beta: weight of false negatives.
        smooth: `s` above, in pixels; a pair sets numerator and denominator separately.

    Returns:
        `(images, classes)`; NaN where numerator and denominator are 0.

    >>> from lightning_dice.functional import hard_sums
    >>> sums = hard_sums(torch.tensor([[[9.0, 9.0, -9.0]]]), torch.tensor([[[1, 0, 0]]]))
    >>> tversky_score(sums, alpha=0.25, beta=0.75)
    tensor([[0.8000]], dtype=torch.float64)
    """
    above, below = _pair(smooth)
    wrong = alpha * (sums.predicted - sums.overlap) + beta * (sums.actual - sums.overlap)
    return _ratio(sums.overlap, sums.overlap + wrong, above, below)


ClassWeighting = Literal["inverse_square", "inverse", "uniform"]


def generalized_dice_score(
    sums: OverlapSums,
    weighting: ClassWeighting = "inverse_square",
    smooth: float | tuple[float, float] = 0.0,
    *,
    count_absent: bool = True,
) -> Tensor:
    r"""Generalized Dice score of each image: one ratio over the classes (Sudre et al., DLMIA 2017).

    .. math:: G = \frac{2\sum_c w_c \sum p_c t_c + s}{\sum_c w_c (\sum p_c + \sum t_c) + s}, \qquad
        w_c = \left(\frac{\min_k \sum t_k}{\sum t_c}\right)^2

    The paper has :math:`w_c = (\sum t_c)^{-2}`. Except for `s`, only the ratios of the weights matter. With a weight of
    1 for the rarest class of the image, `smooth` is in pixels of that class, and no weight is infinite.

    Args:
        sums: as for `dice_score`.
        weighting: `"inverse_square"`, as above, `"inverse"` or `"uniform"`: an exponent of 2, 1 or 0.
        smooth: `s` above, in pixels; a pair sets numerator and denominator separately.
        count_absent: whether a class that the target does not have gets the weight of the rarest class, or none.

    Returns:
        `(images, 1)`; NaN where numerator and denominator are 0.

    >>> from lightning_dice.functional import hard_sums
    >>> ids = torch.tensor([[0, 0, 0, 1]])
    >>> sums = hard_sums(torch.tensor([[[9.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0]]]), ids, activation="softmax")
    >>> generalized_dice_score(sums)
    tensor([[0.6875]], dtype=torch.float64)
    """
    power = {"inverse_square": 2, "inverse": 1, "uniform": 0}[weighting]
    actual = sums.actual if sums.actual.is_floating_point() else sums.actual.to(wide_dtype(sums.actual))
    present = actual > 0
    rarest = actual.where(present, torch.inf).amin(1, keepdim=True)
    weight = torch.where(present, (rarest / actual.where(present, 1.0)) ** power, float(count_absent))
    # A class whose pixels are all ignored has no weight.
    weight = weight.where(sums.count > 0, 0.0)
    above, below = _pair(smooth)
    overlap, both = (weight * sums.overlap).sum(1, keepdim=True), (weight * (sums.predicted + sums.actual)).sum(1, True)
    return _ratio(2 * overlap, both, above, below)


def power(loss: Tensor, gamma: float) -> Tensor:
    """Raise a loss >= 0 to the power of gamma, with a finite gradient at 0 for `gamma` below 1.

    Below 1e-6 it is a straight line to 0. The slope of the power, 0.75 · (1e-6)^-0.25 = 24 there for a gamma of 0.75,
    would grow without limit towards a perfect prediction, where rounding alone would then decide the step.

    >>> power(torch.tensor([0.0, 0.25]), 0.5)
    tensor([0.0000, 0.5000])
    """
    if gamma == 1:
        return loss
    if gamma > 1:
        return loss.clamp(min=0) ** gamma
    low = 1e-6
    return torch.where(loss > low, loss.clamp(min=low) ** gamma, loss * low ** (gamma - 1))


def minus_log(score: Tensor, gamma: float = 1.0) -> Tensor:
    """Return the logarithmic loss of a score, (-log score)^gamma, finite with a finite gradient at scores of 0 and 1.

    >>> minus_log(torch.tensor([[1.0, 0.5]]), gamma=2.0)
    tensor([[0.0000, 0.4805]])
    """
    # The tiny clamp keeps the full gradient of every score but 0, whose logarithm is infinite.
    return power(-score.clamp(min=torch.finfo(score.dtype).tiny).log(), gamma)


def _pair(smooth: float | tuple[float, float]) -> tuple[float, float]:
    return smooth if isinstance(smooth, tuple) else (smooth, smooth)


def _ratio(numerator: Tensor, denominator: Tensor, above: float, below: float) -> Tensor:
    """Return (numerator + above) / (denominator + below), NaN where the denominator is 0."""
    denominator = denominator + below
    if not numerator.is_floating_point():
        numerator, denominator = numerator.to(wide_dtype(numerator)), denominator.to(wide_dtype(denominator))
    # Divided by 1 where undefined: the gradient of 0/0 is NaN even behind a `where`.
    defined = denominator != 0
    score = (numerator + above) / torch.where(defined, denominator, 1.0)
    return torch.where(defined, score, torch.nan)
