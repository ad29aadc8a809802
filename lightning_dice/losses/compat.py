"""Arguments of MONAI's, segmentation_models_pytorch's (smp) and nnU-Net's losses, translated into settings.

The constructors `like_monai`, `like_smp` and `like_nnunet` of the losses take the peer's names and defaults. The loss
equals the peer's in value and gradient (checked with MONAI 1.6, smp 0.6 and nnU-Net 2.8) for labels of 0 and 1, and for
soft labels where this is mentioned. Arguments that cannot be reproduced, or should not be, raise `ValueError` with what
to use instead.

Targets keep the layout of this library: class ids `(batch, *space)` with a softmax, where MONAI and nnU-Net have
`(batch, 1, *space)`; planes with a sigmoid, whatever `to_onehot_y` is. These differences remain:

MONAI
    - `reduction="none"` returns `(images, classes)`, without axes of size 1.
    - One channel with `include_background=False` is refused; MONAI warns and keeps it.
    - With several planes (sigmoid), pixels that hold `ignore_index` are ignored; MONAI ignores the pixels that are 0 in
      all planes, which is the background. `GeneralizedDiceLoss`, `DiceCELoss` and `DiceFocalLoss` of MONAI have no
      `ignore_index`; it is available here.
    - `FocalLoss` with `ignore_index` is the mean; MONAI divides by the pixels of one plane and so multiplies the loss
      by the number of classes.

smp
    - Classes that the target does not have are left out of the mean; smp counts them as perfect. With 1 of 4 classes
      absent, smp's loss and gradient are 3/4 of these.
    - Nothing is clamped by `eps`: only absent classes have so small a denominator, and a score below it keeps its
      gradient in `LogDiceLoss`, `LogJaccardLoss` and `LogTverskyLoss`.

nnU-Net
    - Its Dice loss is the negative score; 1 is added here, which leaves the gradient unchanged.
    - With regions and an ignored label, its cross-entropy is multiplied by the number of regions; here it is the mean.
      All planes of an ignored pixel hold the label, where nnU-Net has one more plane for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor

from lightning_dice.argument_checks import check_choice, check_class_indices, check_number
from lightning_dice.kernels import Activation
from lightning_dice.losses.overlap import OverlapSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

MonaiWeight = Sequence[float] | float | Tensor | None
SmpMode = Literal["binary", "multiclass", "multilabel"]

# Weights that were printed with six digits and copied still have a mean of 1.
_ROUNDING = 1e-5


class MonaiArguments(TypedDict, total=False):
    """Arguments that all losses of MONAI take."""

    include_background: bool
    to_onehot_y: bool  # no effect: ids are never made one-hot
    reduction: Literal["mean", "sum", "none"]
    weight: MonaiWeight  # with a mean of 1, unless reduction="sum": MONAI's scale the loss
    ignore_index: int | None


class MonaiOverlap(MonaiArguments, total=False):
    """Arguments of MONAI's overlap losses, and of the Dice term of its compound losses."""

    sigmoid: bool
    softmax: bool
    other_act: Callable[[Tensor], Tensor] | None  # refused
    squared_pred: bool
    jaccard: bool  # refused, except by JaccardLoss
    smooth_nr: float
    smooth_dr: float
    batch: bool
    soft_label: bool


class MonaiFocal(MonaiArguments, total=False):
    """Arguments of MONAI's `FocalLoss`, without `gamma`."""

    alpha: float | Sequence[float] | None  # one number
    use_softmax: bool  # refused


class SmpArguments(TypedDict, total=False):
    """Arguments that the losses of smp share."""

    from_logits: bool
    ignore_index: int | None
    eps: float  # no effect
    class_weights: Sequence[float] | None


class SmpOverlap(SmpArguments, total=False):
    """Arguments of smp's overlap losses, and the number of classes."""

    classes: Sequence[int] | None
    num_classes: int | None  # not smp's: `classes` needs it, unless there are class_weights
    smooth: float
    log_loss: bool  # refused, except by the logarithmic losses


class SmpFocal(SmpArguments, total=False):
    """Arguments of smp's `FocalLoss`, without `alpha` and `gamma`."""

    reduction: str | None  # "mean"
    normalized: bool  # refused
    reduced_threshold: float | None  # refused


class NnunetDice(TypedDict, total=False):
    """Arguments of nnU-Net's Dice loss; the defaults are those of its trainer."""

    batch_dice: bool  # whether the images of a batch share one ratio; nnU-Net's plans tell
    do_bg: bool | None  # whether class 0 counts; by default with regions alone
    smooth: float  # in pixels
    regions: bool  # whether classes overlap, each with a plane and a sigmoid
    ignore_label: int | None


def monai_overlap(
    *,
    include_background: bool = True,
    to_onehot_y: bool = False,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Tensor], Tensor] | None = None,
    squared_pred: bool = False,
    jaccard: bool = False,
    reduction: Literal["mean", "sum", "none"] = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    weight: MonaiWeight = None,
    soft_label: bool = False,
    ignore_index: int | None = None,
    pixels_per_smooth: float = 1.0,
) -> OverlapSettings:
    """Return the settings of `OverlapLoss` for MONAI's arguments; `pixels_per_smooth` is the unit of its smoothing.

    >>> settings = monai_overlap(softmax=True, to_onehot_y=True, include_background=False)
    >>> settings["activation"], settings["smooth"], settings["pool"], settings["exclude_classes"]
    ('softmax', (1e-05, 1e-05), 'image', (0,))
    """
    if jaccard:
        raise ValueError("jaccard must be False; use JaccardLoss.like_monai(...) with the same arguments")
    if other_act is not None:
        raise ValueError(
            "other_act must be None; apply it to the net's output and leave out sigmoid and softmax, if it gives "
            "probabilities in [0, 1]"
        )
    if sigmoid and softmax:
        raise ValueError("sigmoid and softmax must not both be True")
    return {
        "activation": "sigmoid" if sigmoid else "softmax" if softmax else None,
        "smooth": (smooth_nr * pixels_per_smooth, smooth_dr * pixels_per_smooth),
        "pool": "batch" if batch else "image",
        "squared": squared_pred,
        # With squares MONAI's |p - t|^2 gives back the product, for soft labels too.
        "overlap": "minimum" if soft_label and not squared_pred else "product",
        "exclude_classes": () if include_background else (0,),
        "class_weights": _monai_weights(weight, include_background, reduction),
        "ignore_index": ignore_index,
        "reduction": reduction,
    }


def monai_jaccard(*, jaccard: bool = True, **arguments: Any) -> OverlapSettings:
    """Return the settings of `JaccardLoss` for the arguments of MONAI's `DiceLoss(jaccard=True)`.

    MONAI doubles numerator and denominator, so that its `smooth_nr` and `smooth_dr` are half as many pixels.
    """
    if not jaccard:
        raise ValueError("jaccard must be True; otherwise use DiceLoss.like_monai(...)")
    return monai_overlap(pixels_per_smooth=0.5, **arguments)


def monai_generalized(w_type: str, **arguments: Unpack[MonaiOverlap]) -> dict[str, Any]:
    """Return the settings of `GeneralizedDiceLoss` for MONAI's arguments."""
    names = {"square": "inverse_square", "simple": "inverse", "uniform": "uniform"}
    weighting = names[check_choice("w_type", w_type, tuple(names))]
    settings = monai_overlap(**arguments)
    if weighting != "uniform" and settings["smooth"] != (0, 0):
        raise ValueError(
            f"smooth_nr and smooth_dr must be 0 with w_type={w_type!r}, got {settings['smooth']}: MONAI adds them to "
            "sums that it has divided by the (squared) size of a class, so that 1e-5 acts as 10 pixels on a class of "
            "1000 and as 100000 on one of 100000. Set them to 0, or set GeneralizedDiceLoss(smooth=...), in pixels of "
            "the rarest class"
        )
    if settings["reduction"] == "sum":
        raise ValueError(
            'reduction must be "mean" or "none": "sum" adds the one ratio of an image once for each class here, and '
            "once in MONAI"
        )
    return {"weighting": weighting, **settings}


def monai_compound(pixel_term: str, **arguments: Unpack[MonaiOverlap]) -> OverlapSettings:
    """Return the settings of the Dice term of a compound loss; `pixel_term` names the other term in an error."""
    if arguments.get("jaccard"):
        raise ValueError(
            f"jaccard must be False; give CompoundLoss the terms JaccardLoss.like_monai(...) and {pixel_term}(...) "
            "instead"
        )
    if arguments.get("other_act") is None and not (arguments.get("sigmoid") or arguments.get("softmax")):
        raise ValueError(
            "sigmoid=True or softmax=True must be given: without them MONAI takes the same numbers as probabilities in "
            "the Dice term and as logits in the other"
        )
    if arguments.get("reduction", "mean") != "mean":
        raise ValueError(f'reduction must be "mean": two terms add up as means, got {arguments["reduction"]!r}')
    return monai_overlap(**arguments)


def monai_dice_ce(label_smoothing: float, **arguments: Unpack[MonaiOverlap]) -> OverlapSettings:
    """Return the settings of the Dice term of `DiceCELoss` for MONAI's arguments."""
    weight = arguments.pop("weight", None)
    sigmoid = arguments.get("sigmoid", False)
    settings = monai_compound("CrossEntropyLoss", **arguments)
    if sigmoid and label_smoothing:
        raise ValueError("label_smoothing must be 0 with sigmoid=True: MONAI leaves it out of the binary cross-entropy")
    if weight is None:
        return settings
    if sigmoid:
        raise ValueError(
            "weight must be None with sigmoid=True: in MONAI it then weighs the foreground's pixels in the "
            "cross-entropy, not classes; use DiceFocalLoss(gamma=0, alpha=...) to set foreground against background"
        )
    if not arguments.get("to_onehot_y"):
        raise ValueError(
            "weight needs to_onehot_y=True: MONAI's cross-entropy is divided by the weights for ids, but not for "
            "one-hot targets"
        )
    weights = torch.as_tensor(weight, dtype=torch.float64).flatten().tolist()
    _monai_weights(weights if arguments.get("include_background", True) else weights[1:], True, "mean")
    return {**settings, "class_weights": weights}


def monai_dice_focal(**arguments: Unpack[MonaiOverlap]) -> OverlapSettings:
    """Return the settings of the Dice term of `DiceFocalLoss` for MONAI's arguments."""
    if arguments.get("softmax"):
        raise ValueError(
            "softmax must be False: MONAI's focal term is a sigmoid for each class even then; "
            'use DiceFocalLoss(activation="softmax"), whose two terms agree'
        )
    settings = monai_compound("FocalLoss", **arguments)
    _check_background(arguments.get("include_background", True), settings["class_weights"])
    return settings


def monai_focal(
    *,
    include_background: bool = True,
    to_onehot_y: bool = False,
    alpha: float | Sequence[float] | None = None,
    weight: MonaiWeight = None,
    reduction: str = "mean",
    use_softmax: bool = False,
    ignore_index: int | None = None,
) -> dict[str, Any]:
    """Return the settings of `FocalLoss`, without `gamma`, for MONAI's arguments."""
    if use_softmax:
        raise ValueError(
            "use_softmax must be False: MONAI divides by the pixels of all planes, this library by the pixels; "
            'CompoundLoss([FocalLoss(activation="softmax")], [1 / classes]) is its loss'
        )
    if alpha is not None and not isinstance(alpha, (int, float)):
        raise ValueError(
            "alpha must be one number: in MONAI one for each class weighs the foreground alone; give class_weights"
        )
    if reduction != "mean":
        raise ValueError(f'reduction must be "mean", got {reduction!r}')
    weights = _monai_weights(weight, include_background, "mean")
    _check_background(include_background, weights)
    return {"activation": "sigmoid", "alpha": alpha, "class_weights": weights, "ignore_index": ignore_index}


def smp_overlap(
    mode: str,
    *,
    classes: Sequence[int] | None = None,
    log_loss: bool = False,
    from_logits: bool = True,
    smooth: float = 0.0,
    ignore_index: int | None = None,
    eps: float = 1e-7,
    class_weights: Sequence[float] | None = None,
    num_classes: int | None = None,
    pixels_per_smooth: float = 1.0,
) -> OverlapSettings:
    """Return the settings of `OverlapLoss` for smp's arguments; `pixels_per_smooth` is the unit of its `smooth`.

    >>> smp_overlap("multiclass", classes=[1, 2], num_classes=3)["exclude_classes"]
    (0,)
    """
    if log_loss:
        raise ValueError(
            "log_loss must be False; use the like_smp(...) of LogDiceLoss, LogJaccardLoss or LogTverskyLoss"
        )
    _check_smp(mode, eps, class_weights, classes)
    excluded: tuple[int, ...] = ()
    if classes is not None:
        counted = check_class_indices("classes", classes)
        total = num_classes if class_weights is None else len(class_weights)
        if total is None:
            raise ValueError("classes need num_classes, so that the other classes can be excluded")
        if not counted or max(counted) >= total:
            raise ValueError(f"classes must name classes from 0 to {total - 1}, got {list(counted)}")
        excluded = tuple(index for index in range(total) if index not in counted)
    activation: Activation = "softmax" if mode == "multiclass" else "sigmoid"
    return {
        "activation": activation if from_logits else None,
        "smooth": smooth * pixels_per_smooth,
        "pool": "batch",
        "overlap": "minimum",
        "exclude_classes": excluded,
        "class_weights": class_weights,
        "ignore_index": ignore_index,
        "absent": "skip",
    }


def smp_log(
    plain: str, mode: str, *, log_loss: bool = True, pixels_per_smooth: float = 1.0, **arguments: Any
) -> OverlapSettings:
    """Return the settings of a logarithmic loss for the arguments of smp's loss `plain` with `log_loss=True`."""
    if not log_loss:
        raise ValueError(f"log_loss must be True; without the logarithm use {plain}.like_smp(...)")
    return smp_overlap(mode, pixels_per_smooth=pixels_per_smooth, **arguments)


def smp_focal(
    mode: str,
    *,
    from_logits: bool = True,
    ignore_index: int | None = None,
    eps: float = 1e-7,
    reduction: str | None = "mean",
    normalized: bool = False,
    reduced_threshold: float | None = None,
    class_weights: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Return the settings of `FocalLoss`, without `gamma` and `alpha`, for smp's arguments."""
    _check_smp(mode, eps, class_weights)
    if normalized or reduced_threshold is not None:
        raise ValueError("normalized must be False and reduced_threshold None: other values define a different loss")
    if reduction != "mean":
        raise ValueError(f'reduction must be "mean", got {reduction!r}')
    if mode == "multiclass" and not from_logits:
        raise ValueError(
            'from_logits must be True with mode="multiclass": smp takes a sigmoid of the logarithm of probabilities, '
            "p / (1 + p); use FocalLoss(activation=None)"
        )
    # In smp each class of a multiclass task is a binary task: one against the rest.
    activation = "sigmoid" if from_logits else None
    return {"activation": activation, "class_weights": class_weights, "ignore_index": ignore_index}


def nnunet_dice(
    *,
    batch_dice: bool = False,
    do_bg: bool | None = None,
    smooth: float = 1e-5,
    regions: bool = False,
    ignore_label: int | None = None,
) -> OverlapSettings:
    """Return the settings of `OverlapLoss` for nnU-Net's arguments.

    >>> nnunet_dice()["exclude_classes"], nnunet_dice(regions=True)["exclude_classes"]
    ((0,), ())
    """
    return {
        "activation": "sigmoid" if regions else "softmax",
        "smooth": smooth,
        "pool": "batch" if batch_dice else "image",
        "exclude_classes": () if (regions if do_bg is None else do_bg) else (0,),
        "ignore_index": ignore_label,
    }


def _monai_weights(weight: MonaiWeight, include_background: bool, reduction: str) -> list[float] | None:
    """Return MONAI's weights as `class_weights`, which also have one for an excluded background."""
    if weight is None:
        return None
    weights = torch.as_tensor(weight, dtype=torch.float64)
    if weights.ndim == 0:
        if weights != 1:
            raise ValueError(
                f"weight must be one for each class, got {float(weights):g}: multiply the loss by it instead"
            )
        return None
    if reduction == "none":
        raise ValueError('weight must be None with reduction="none": multiply the table by it instead')
    mean = float(weights.mean())
    # A sum over classes is weighted, and not divided by the weights, here as in MONAI.
    if reduction == "mean" and abs(mean - 1) > _ROUNDING:
        remedy = "" if mean == 0 else f": give [{', '.join(f'{w:g}' for w in weights / mean)}] and multiply by {mean:g}"
        raise ValueError(
            f"weight must have a mean of 1 over the classes that count, got {mean:g}; in MONAI it scales the loss "
            f"by its mean, here only the ratios matter{remedy}"
        )
    return [*([] if include_background else [0.0]), *weights.tolist()]


def _check_background(include_background: bool, weights: object) -> None:
    if not include_background and weights is None:
        raise ValueError(
            "include_background=False needs weight=[1.0, ...], a 1 for each other class: the focal term leaves a class "
            "out by a weight of 0, and must know how many there are"
        )


def _check_smp(mode: str, eps: float, class_weights: object, classes: object = None) -> None:
    check_choice("mode", mode, SmpMode)
    check_number("eps", eps, 0, 1e-3)
    if mode == "binary" and (classes is not None or class_weights is not None):
        raise ValueError('mode="binary" has one class: leave out classes and class_weights')
