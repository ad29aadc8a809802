"""Losses based on the Tversky index and its special case, the Jaccard score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from lightning_dice.argument_checks import check_number
from lightning_dice.functional import jaccard_score, minus_log, power, tversky_score
from lightning_dice.kernels import OverlapSums
from lightning_dice.losses import compat
from lightning_dice.losses.overlap import OverlapLoss, OverlapSettings

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class JaccardLoss(OverlapLoss):
    r"""Jaccard loss: 1 minus intersection over union (soft IoU).

    .. math:: L = 1 - \frac{\sum p t + s}{\sum p + \sum t - \sum p t + s}

    With `squared=True` it is 1 minus the Tanimoto coefficient. With `overlap="minimum"`, which soft labels need, it is
    the first form of Wang et al., "Jaccard Metric Losses" (NeurIPS 2023).

    All settings are those of `OverlapLoss`.

    Raises:
        ValueError: an invalid setting; in a call, a shape that would broadcast or, on the CPU, an invalid value.

    >>> import torch
    >>> JaccardLoss()(torch.zeros(1, 1, 2), torch.tensor([[[1, 0]]]))
    tensor(0.4000)
    """

    def per_class(self, sums: OverlapSums) -> Tensor:
        """Return 1 minus the Jaccard score."""
        return 1 - jaccard_score(sums, self.smooth)

    @classmethod
    def like_monai(cls, **arguments: Unpack[compat.MonaiOverlap]) -> Self:
        """Reproduce MONAI's `DiceLoss` with `jaccard=True`, the default here; see `DiceLoss.like_monai`.

        >>> JaccardLoss.like_monai(sigmoid=True).smooth
        (5e-06, 5e-06)
        """
        return cls(**compat.monai_jaccard(**arguments))

    @classmethod
    def like_smp(cls, mode: str, **arguments: Unpack[compat.SmpOverlap]) -> Self:
        """Reproduce smp's `JaccardLoss`, for targets that have every class; see `DiceLoss.like_smp`.

        >>> JaccardLoss.like_smp("binary", smooth=0.5).smooth
        (0.5, 0.5)
        """
        return cls(**compat.smp_overlap(mode, **arguments))


class LogJaccardLoss(OverlapLoss):
    r"""Logarithmic Jaccard loss, whose gradient is largest where the overlap is small.

    .. math:: L = (-\log J)^\gamma

    The Jaccard score J is that of `JaccardLoss`, and the power that of `LogDiceLoss`.

    Args:
        gamma: exponent, > 0; below 1 the gradient is also large where the overlap is nearly perfect.
        **settings: settings of `OverlapLoss`.

    Raises:
        ValueError: as `JaccardLoss`, or an invalid gamma.

    >>> import torch
    >>> LogJaccardLoss()(torch.zeros(1, 1, 2), torch.tensor([[[1, 0]]]))
    tensor(0.5108)
    """

    def __init__(self, *, gamma: float = 1.0, **settings: Unpack[OverlapSettings]) -> None:
        super().__init__(**settings)
        self.gamma = check_number("gamma", gamma, open_ends=True)

    def per_class(self, sums: OverlapSums) -> Tensor:
        """Return (-log J)^gamma."""
        return minus_log(jaccard_score(sums, self.smooth), self.gamma)

    @classmethod
    def like_smp(cls, mode: str, **arguments: Unpack[compat.SmpOverlap]) -> Self:
        """Reproduce smp's `JaccardLoss` with `log_loss=True`, the default here; see `DiceLoss.like_smp`.

        >>> LogJaccardLoss.like_smp("binary", smooth=0.5).smooth
        (0.5, 0.5)
        """
        return cls(**compat.smp_log("JaccardLoss", mode, **arguments))


class TverskyLoss(OverlapLoss):
    r"""Tversky loss: false positives and false negatives have weights of their own (Salehi et al., MLMI 2017).

    .. math:: L = 1 - \frac{I + s}{I + \alpha\,(\sum p - I) + \beta\,(\sum t - I) + s}, \qquad I = \sum p t

    `alpha = beta = 1/2` is Dice with twice the `smooth`; `alpha = beta = 1` is Jaccard. The defaults favour recall, as
    in the paper, for small lesions. (Focal Tversky papers often exchange the two letters.)

    Args:
        alpha: weight of false positives, >= 0.
        beta: weight of false negatives, >= 0.
        **settings: settings of `OverlapLoss`, without `squared`.

    Raises:
        ValueError: as `JaccardLoss`, a weight below 0, or `squared=True`.

    >>> import torch
    >>> TverskyLoss(alpha=0.5, beta=0.5, smooth=0.5)(torch.zeros(1, 1, 2), torch.tensor([[[1, 0]]]))
    tensor(0.3333)
    """

    def __init__(self, *, alpha: float = 0.3, beta: float = 0.7, **settings: Unpack[OverlapSettings]) -> None:
        super().__init__(**settings)
        self.alpha, self.beta = check_number("alpha", alpha), check_number("beta", beta)
        _refuse_squares(self)

    def per_class(self, sums: OverlapSums) -> Tensor:
        """Return 1 minus the Tversky index."""
        return 1 - tversky_score(sums, self.alpha, self.beta, self.smooth)

    # Not `cls`: a subclass, such as the focal one, is not the peer's loss.
    @classmethod
    def like_monai(
        cls, *, alpha: float = 0.5, beta: float = 0.5, **arguments: Unpack[compat.MonaiOverlap]
    ) -> TverskyLoss:
        """Reproduce MONAI's `TverskyLoss`; see `DiceLoss.like_monai`.

        >>> loss = TverskyLoss.like_monai(sigmoid=True, alpha=0.3, beta=0.7)
        >>> loss.alpha, loss.beta, loss.smooth
        (0.3, 0.7, (1e-05, 1e-05))
        """
        return TverskyLoss(alpha=alpha, beta=beta, **compat.monai_overlap(**arguments))

    @classmethod
    def like_smp(
        cls,
        mode: str,
        *,
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma: float = 1.0,
        **arguments: Unpack[compat.SmpOverlap],
    ) -> TverskyLoss:
        """Reproduce smp's `TverskyLoss` with `gamma=1`, for targets that have every class; see `DiceLoss.like_smp`.

        >>> TverskyLoss.like_smp("binary", alpha=0.3, beta=0.7).absent.rule
        'skip'
        """
        _refuse_power(gamma, "FocalTverskyLoss")
        return TverskyLoss(alpha=alpha, beta=beta, **compat.smp_overlap(mode, **arguments))


class FocalTverskyLoss(TverskyLoss):
    r"""Focal Tversky loss: a power of the Tversky loss of each class (Abraham and Khan, ISBI 2019).

    .. math:: L = (1 - T)^\gamma

    An exponent below 1, as in the paper, raises the gradient of classes that are already well segmented; one above 1
    raises that of the hard ones. The paper writes the exponent as 1/γ, with γ = 4/3.

    Args:
        gamma: exponent, > 0.
        alpha: weight of false positives, >= 0.
        beta: weight of false negatives, >= 0.
        **settings: settings of `OverlapLoss`, without `squared`.

    Raises:
        ValueError: as `TverskyLoss`, or an invalid gamma.

    >>> import torch
    >>> FocalTverskyLoss()(torch.zeros(1, 1, 2), torch.tensor([[[1, 0]]]))
    tensor(0.3536)
    """

    def __init__(
        self, *, gamma: float = 0.75, alpha: float = 0.3, beta: float = 0.7, **settings: Unpack[OverlapSettings]
    ) -> None:
        super().__init__(alpha=alpha, beta=beta, **settings)
        self.gamma = check_number("gamma", gamma, open_ends=True)

    @classmethod
    def like_monai(cls, **arguments: Any) -> NoReturn:
        """Raise `ValueError`: MONAI's `AsymmetricFocalTverskyLoss` is another loss."""
        raise ValueError("MONAI has no focal Tversky loss of this form: use TverskyLoss.like_monai(...)")

    @classmethod
    def like_smp(cls, mode: str, **arguments: Any) -> NoReturn:
        """Raise `ValueError`: smp raises the mean over classes to gamma, not the loss of each class."""
        raise ValueError(
            "smp raises the mean over classes to gamma, FocalTverskyLoss the loss of each class: use "
            "TverskyLoss.like_smp(...) for gamma=1; with a single class set gamma, alpha and beta here"
        )

    def per_class(self, sums: OverlapSums) -> Tensor:
        """Return (1 - T)^gamma."""
        return power(super().per_class(sums), self.gamma)


class LogTverskyLoss(OverlapLoss):
    r"""Logarithmic Tversky loss, whose gradient is largest where the overlap is small.

    .. math:: L = (-\log T)^\gamma

    The Tversky index T, with its weights of false positives and false negatives, is that of `TverskyLoss`, and the
    power that of `LogDiceLoss`.

    Args:
        gamma: exponent, > 0; below 1 the gradient is also large where the overlap is nearly perfect.
        alpha: weight of false positives, >= 0.
        beta: weight of false negatives, >= 0.
        **settings: settings of `OverlapLoss`, without `squared`.

    Raises:
        ValueError: as `TverskyLoss`, or an invalid gamma.

    >>> import torch
    >>> LogTverskyLoss()(torch.zeros(1, 1, 2), torch.tensor([[[1, 0]]]))
    tensor(0.2877)
    """

    def __init__(
        self, *, gamma: float = 1.0, alpha: float = 0.3, beta: float = 0.7, **settings: Unpack[OverlapSettings]
    ) -> None:
        super().__init__(**settings)
        self.alpha, self.beta = check_number("alpha", alpha), check_number("beta", beta)
        self.gamma = check_number("gamma", gamma, open_ends=True)
        _refuse_squares(self)

    def per_class(self, sums: OverlapSums) -> Tensor:
        """Return (-log T)^gamma."""
        return minus_log(tversky_score(sums, self.alpha, self.beta, self.smooth), self.gamma)

    @classmethod
    def like_smp(
        cls,
        mode: str,
        *,
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma: float = 1.0,
        **arguments: Unpack[compat.SmpOverlap],
    ) -> Self:
        """Reproduce smp's `TverskyLoss` with `log_loss=True`, the default here, and `gamma=1`; see `DiceLoss.like_smp`.

        >>> LogTverskyLoss.like_smp("binary", alpha=0.3, beta=0.7).beta
        0.7
        """
        _refuse_power(gamma, "LogTverskyLoss")
        return cls(alpha=alpha, beta=beta, **compat.smp_log("TverskyLoss", mode, **arguments))


def _refuse_power(gamma: float, alternative: str) -> None:
    if gamma != 1:
        raise ValueError(
            f"gamma must be 1, got {gamma}: smp raises the mean over classes to it; {alternative} raises the loss of "
            "each class, which is the same for one class"
        )


def _refuse_squares(loss: OverlapLoss) -> None:
    if loss.squared:
        raise ValueError("squared must be False: with squares, sum p - sum pt no longer counts false positives")
