"""Scores of a class in an image, each one formula on the sums."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dice.kernels import OverlapSums


def dice_score(sums: OverlapSums, smooth: float | tuple[float, float] = 0.0) -> Tensor:
    r"""Dice score of each class in each image.

    .. math:: D = \frac{2\sum p t + s}{\sum p + \sum t + s}

    The denominator is linear in `p`, as in the set definition of Dice (1945); V-Net (Milletari et al., 3DV 2016)
    squares `p` and `t` there, which is a matter of the sums, not of this formula.

    Args:
        sums: what `lightning_dice.kernels.overlap_sums` or `hard_sums` returns.
        smooth: `s` above, in pixels; a pair sets numerator and denominator apart.

    Returns:
        `(images, classes)`, in [0, 1] if `smooth` is one number. NaN where numerator and denominator are both 0: with
        `smooth=0`, a class absent from both sides has no score.

    >>> from lightning_dice.functional import hard_sums
    >>> sums = hard_sums(torch.tensor([[[9.0, 9.0, -9.0]]]), torch.tensor([[[1, 0, 0]]]))
    >>> dice_score(sums)
    tensor([[0.6667]], dtype=torch.float64)
    """
    above, below = smooth if isinstance(smooth, tuple) else (smooth, smooth)
    overlap, denominator = sums.overlap, sums.predicted + sums.actual + below
    if not overlap.is_floating_point():
        wide = torch.float32 if overlap.device.type == "mps" else torch.float64
        overlap, denominator = overlap.to(wide), denominator.to(wide)
    # Divided by 1 where undefined: the gradient of 0/0 is NaN even behind a `where`.
    defined = denominator != 0
    score = (2 * overlap + above) / torch.where(defined, denominator, 1.0)
    return torch.where(defined, score, torch.nan)
