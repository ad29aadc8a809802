"""Losses by the Tversky index, and by its special case, the Jaccard score."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_dice.functional import jaccard_score, power, tversky_score
from lightning_dice.kernels import OverlapSums
from lightning_dice.losses.overlap import OverlapLoss, OverlapSettings
from lightning_dice.settings import number

if TYPE_CHECKING:
    from typing_extensions import Unpack


class JaccardLoss(OverlapLoss):
    r"""Jaccard loss: 1 minus intersection over union (soft IoU).

    .. math:: L = 1 - \frac{\sum p t + s}{\sum p + \sum t - \sum p t + s}

    With `squared=True` it is 1 minus the Tanimoto coefficient; with `overlap="minimum"` the first form of Wang et al.,
    "Jaccard Metric Losses" (NeurIPS 2023), which soft labels need.

    Args:
        **settings: those of `OverlapLoss`.

    >>> import torch
    >>> JaccardLoss()(torch.zeros(1, 1, 2), torch.tensor([[[1, 0]]]))
    tensor(0.4000)
    """

    def per_class(self, sums: OverlapSums) -> Tensor:
        """1 minus the Jaccard score."""
        return 1 - jaccard_score(sums, self.smooth)


class TverskyLoss(OverlapLoss):
    r"""Tversky loss: false positives and false negatives weigh what you say (Salehi et al., MLMI 2017).

    .. math:: L = 1 - \frac{I + s}{I + \alpha\,(\sum p - I) + \beta\,(\sum t - I) + s}, \qquad I = \sum p t

    `alpha = beta = 1/2` is Dice with twice the `smooth`, `alpha = beta = 1` is Jaccard. The default favours recall, as
    the paper does for small lesions. (In focal Tversky papers the two letters are often exchanged.)

    Args:
        alpha: weight of false positives, >= 0.
        beta: weight of false negatives, >= 0.
        **settings: those of `OverlapLoss`; `squared` is refused.

    >>> import torch
    >>> TverskyLoss(alpha=0.5, beta=0.5, smooth=0.5)(torch.zeros(1, 1, 2), torch.tensor([[[1, 0]]]))
    tensor(0.3333)
    """

    def __init__(self, *, alpha: float = 0.3, beta: float = 0.7, **settings: Unpack[OverlapSettings]) -> None:
        super().__init__(**settings)
        self.alpha, self.beta = number("alpha", alpha), number("beta", beta)
        if self.squared:
            raise ValueError("squared must be False: with squares, false positives are no longer sum p - sum pt")

    def per_class(self, sums: OverlapSums) -> Tensor:
        """1 minus the Tversky index."""
        return 1 - tversky_score(sums, self.alpha, self.beta, self.smooth)


class FocalTverskyLoss(TverskyLoss):
    r"""Focal Tversky loss: :math:`(1 - T)^\gamma` (Abraham and Khan, ISBI 2019).

    An exponent below 1, as in the paper, raises the gradient of classes that are already well segmented; above 1 it
    raises that of the hard ones. The paper writes the exponent as 1/γ with γ = 4/3.

    Args:
        gamma: the exponent, > 0.
        alpha: weight of false positives, >= 0.
        beta: weight of false negatives, >= 0.
        **settings: those of `OverlapLoss`; `squared` is refused.

    >>> import torch
    >>> FocalTverskyLoss()(torch.zeros(1, 1, 2), torch.tensor([[[1, 0]]]))
    tensor(0.3536)
    """

    def __init__(
        self, *, gamma: float = 0.75, alpha: float = 0.3, beta: float = 0.7, **settings: Unpack[OverlapSettings]
    ) -> None:
        super().__init__(alpha=alpha, beta=beta, **settings)
        self.gamma = number("gamma", gamma, open_ends=True)

    def per_class(self, sums: OverlapSums) -> Tensor:
        """(1 - T)^gamma."""
        return power(super().per_class(sums), self.gamma)
