"""Dice loss and its variants: logarithmic, log-cosh and generalized."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dice.argument_checks import check_choice, check_number
from lightning_dice.functional import ClassWeighting, dice_score, generalized_dice_score, minus_log
from lightning_dice.kernels import OverlapSums
from lightning_dice.losses import compat
from lightning_dice.losses.overlap import OverlapLoss, OverlapSettings

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class DiceLoss(OverlapLoss):
    r"""Soft Dice loss: 1 minus the Dice score of probabilities and target.

    .. math:: L = 1 - \frac{2\sum p t + s}{\sum p + \sum t + s}

    `DiceLoss()` takes the sigmoid of the logits, sums over the whole batch and smooths with `s = 1`: for one channel,
    the loss that most tutorials write in four lines. With several channels each class has its own ratio, and the loss
    is their mean; `pool="all"` flattens everything into one ratio, as some tutorials do.

    The loss is in [0, 1] if `smooth` is one number and `absent` is not `"penalize"`; it is 0 for a perfect match.

    Two known weaknesses have settings. Very small targets give large and unsteady losses: keep `pool="batch"`, choose a
    `smooth` so small that one pixel still matters, exclude the background with `exclude_classes=[0]`, and set
    `absent="penalize"` so that images without a target push false positives down. The loss ignores where pixels are:
    pass a `weight` to give pixels near a boundary more weight, or wrap the loss in `BoundaryWeightedLoss`.

    With `squared=True` the denominator is :math:`\sum p^2 + \sum t^2`, as in V-Net (Milletari et al., 3DV 2016). With
    `overlap="minimum"` the product becomes min(p, t), so that the loss of soft labels is least, and 0, at p = t (the
    first form of Wang et al., "Dice Semimetric Losses", MICCAI 2023, without the cancellation of p + t - |p - t|).

    All settings are those of `OverlapLoss`.

    Raises:
        ValueError: an invalid setting; in a call, a shape that would broadcast or, on the CPU, an invalid value, such
            as 255 in a mask without `ignore_index=255`.

    >>> import torch
    >>> logits = torch.tensor([[[[4.0, -4.0], [4.0, -4.0]]]])
    >>> mask = torch.tensor([[[[1, 0], [0, 0]]]])
    >>> DiceLoss()(logits, mask)
    tensor(0.2590)
    >>> ids = torch.tensor([[[0, 1], [0, 255]]])
    >>> DiceLoss(activation="softmax", smooth=1e-5, pool="image", ignore_index=255)(logits.expand(1, 2, 2, 2), ids)
    tensor(0.5143)
    """

    def per_class(self, sums: OverlapSums) -> Tensor:
        """Return 1 minus the Dice score."""
        return 1 - dice_score(sums, self.smooth)

    @classmethod
    def like_monai(cls, **arguments: Unpack[compat.MonaiOverlap]) -> Self:
        """Reproduce MONAI's `DiceLoss` from its arguments; see `lightning_dice.losses.compat` for what differs.

        Raises:
            ValueError: an argument that cannot be reproduced, with what to use instead.

        >>> loss = DiceLoss.like_monai(softmax=True, to_onehot_y=True, include_background=False)
        >>> loss.smooth, loss.pool, loss.exclude_classes
        ((1e-05, 1e-05), 'image', (0,))
        >>> DiceLoss.like_monai(softmax=True, weight=[10, 10, 10])
        Traceback (most recent call last):
        ...
        ValueError: weight must have a mean of 1 over the classes that count, got 10; in MONAI it scales the loss by \
its mean, here only the ratios matter: give [1, 1, 1] and multiply by 10
        """
        return cls(**compat.monai_overlap(**arguments))

    @classmethod
    def like_smp(cls, mode: str, **arguments: Unpack[compat.SmpOverlap]) -> Self:
        """Reproduce smp's `DiceLoss` from its arguments, for targets that have every class; see `like_monai`.

        `mode` is `"binary"`, `"multilabel"` (planes) or `"multiclass"` (ids); a `smooth` of 1 is 2 pixels.

        >>> loss = DiceLoss.like_smp("multiclass", classes=[1, 2], num_classes=3, smooth=0.5)
        >>> loss.smooth, loss.pool, loss.exclude_classes, loss.absent.rule
        ((1.0, 1.0), 'batch', (0,), 'skip')
        """
        return cls(**compat.smp_overlap(mode, pixels_per_smooth=2, **arguments))

    @classmethod
    def like_nnunet(cls, **arguments: Unpack[compat.NnunetDice]) -> Self:
        """Reproduce nnU-Net's `SoftDiceLoss`, by default as its trainer sets it; see `like_monai`.

        >>> DiceLoss.like_nnunet().exclude_classes, DiceLoss.like_nnunet(regions=True).exclude_classes
        ((0,), ())
        """
        return cls(**compat.nnunet_dice(**arguments))


class LogDiceLoss(OverlapLoss):
    r"""Logarithmic Dice loss, whose gradient is largest where the overlap is small.

    .. math:: L = (-\log D)^\gamma

    The Dice part of the exponential logarithmic loss (Wong et al., MICCAI 2018, with :math:`\gamma = 0.3`).

    Args:
        gamma: exponent, > 0; below 1 the gradient is also large where the overlap is nearly perfect.
        **settings: settings of `OverlapLoss`.

    Raises:
        ValueError: as `DiceLoss`, or an invalid gamma.

    >>> LogDiceLoss()(torch.zeros(1, 1, 2), torch.tensor([[[1, 0]]]))
    tensor(0.4055)
    """

    def __init__(self, *, gamma: float = 1.0, **settings: Unpack[OverlapSettings]) -> None:
        super().__init__(**settings)
        self.gamma = check_number("gamma", gamma, open_ends=True)

    def per_class(self, sums: OverlapSums) -> Tensor:
        """Return (-log D)^gamma."""
        return minus_log(dice_score(sums, self.smooth), self.gamma)

    @classmethod
    def like_smp(cls, mode: str, **arguments: Unpack[compat.SmpOverlap]) -> Self:
        """Reproduce smp's `DiceLoss` with `log_loss=True`, the default here; see `DiceLoss.like_smp`.

        >>> LogDiceLoss.like_smp("binary").gamma
        1.0
        """
        return cls(**compat.smp_log("DiceLoss", mode, pixels_per_smooth=2, **arguments))


class LogCoshDiceLoss(OverlapLoss):
    r"""Log-cosh Dice loss, flat near a perfect match (Jadon, CIBCB 2020).

    .. math:: L = \log\cosh(1 - D)

    All settings are those of `OverlapLoss`.

    Raises:
        ValueError: as `DiceLoss`.

    >>> LogCoshDiceLoss()(torch.zeros(1, 1, 2), torch.tensor([[[1, 0]]]))
    tensor(0.0546)
    """

    def per_class(self, sums: OverlapSums) -> Tensor:
        """Return log cosh(1 - D)."""
        loss = 1 - dice_score(sums, self.smooth)
        # This form does not overflow, and does not round small losses to the logarithm of 1.
        return loss.abs() + torch.log1p(torch.expm1(-2 * loss.abs()) / 2)


class GeneralizedDiceLoss(OverlapLoss):
    r"""Generalized Dice loss: one ratio over all classes, weighted by their sizes (Sudre et al., DLMIA 2017).

    .. math:: L = 1 - \frac{2\sum_c w_c \sum p_c t_c + s}{\sum_c w_c (\sum p_c + \sum t_c) + s}, \qquad
        w_c \propto \left(\sum t_c\right)^{-2}

    The weights are relative to the rarest class of the image (or batch), so that `smooth` is in pixels of that class.
    A class that the target does not have gets the weight of the rarest one (`absent="smooth"`), no weight (`"skip"`),
    or the penalty (`"penalize"`). With `pool="image"` the weights of an image depend on that image alone, unlike those
    of `torchmetrics.functional.generalized_dice_score` and some others.

    Args:
        weighting: `"inverse_square"`, `"inverse"` or `"uniform"`.
        **settings: settings of `OverlapLoss`, without `class_weights`, `pool="all"` and `reduction="sum"`.

    Raises:
        ValueError: as `DiceLoss`, or one of these three settings.

    >>> logits = torch.tensor([[[4.0, 4.0, 0.0, 0.0], [0.0, 0.0, 4.0, 4.0]]])
    >>> GeneralizedDiceLoss(activation="softmax")(logits, torch.tensor([[0, 0, 0, 1]]))
    tensor(0.2527)
    """

    def __init__(self, *, weighting: ClassWeighting = "inverse_square", **settings: Unpack[OverlapSettings]) -> None:
        super().__init__(**settings)
        self.weighting: ClassWeighting = check_choice("weighting", weighting, ClassWeighting)
        if self.class_weights is not None or self.pool == "all":
            raise ValueError('classes are weighted by their sizes: leave out class_weights and pool="all"')
        if self.reduction == "sum":
            raise ValueError('reduction="sum" has no meaning, as all classes share one ratio: use "mean" or "none"')

    def per_class(self, sums: OverlapSums) -> Tensor:
        """Return 1 minus the ratio of all classes, which is the same for each class."""
        count_absent = self.absent.rule == "smooth"
        score = generalized_dice_score(sums, self.weighting, self.smooth, count_absent=count_absent)
        loss = (1 - score).expand_as(sums.overlap)
        # Without any present class the ratio is 0/0; that NaN must not hide the penalty.
        return loss.where(sums.actual > 0, 0.0) if self.absent.rule == "penalize" else loss

    @classmethod
    def like_monai(cls, *, w_type: str = "square", **arguments: Unpack[compat.MonaiOverlap]) -> Self:
        """Reproduce MONAI's `GeneralizedDiceLoss`, without its smoothing; see `DiceLoss.like_monai`.

        `w_type` is `"square"`, `"simple"` or `"uniform"`; unless it is `"uniform"`, `smooth_nr` and `smooth_dr` must be
        0. MONAI's default of 1e-5 is refused, as it is added to sums that are divided by the squared size of a class:
        it grows with that square in pixels, and a wrong mask of a large object scores well. `reduction="none"` returns
        the ratio of an image once for each class.

        >>> GeneralizedDiceLoss.like_monai(softmax=True, w_type="simple", smooth_nr=0, smooth_dr=0).weighting
        'inverse'
        """
        return cls(**compat.monai_generalized(w_type, **arguments))
